"""Step time of DIL's variants over the Supervised step on the same images, against the FLOP ratios of the paper's cost table; peak memory of `ps`."""
from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

N, B, SIDE = 4, 4, 48   # confounders, images per confounder, px
# name: (options, FLOPs of a step over those of Supervised on the same N x B images, query = support)
CASES = {"erm": ({"variant": "erm"}, 1), "sf": ({"variant": "sf"}, 1), "pf": ({"variant": "pf"}, 2),
         "ps (autograd)": ({"variant": "ps", "hvp": "autograd"}, 4), "ps (explicit)": ({"variant": "ps", "hvp": "explicit"}, 4),
         "ps (finite_difference)": ({"variant": "ps", "hvp": "finite_difference"}, 4), "ss_same (autograd)": ({"variant": "ss_same", "hvp": "autograd"}, 4),
         "ss_chain (autograd)": ({"variant": "ss_chain", "hvp": "autograd"}, 4), "ss (autograd)": ({"variant": "ss", "hvp": "autograd"}, N + 3),
         "ss (explicit)": ({"variant": "ss", "hvp": "explicit"}, N + 3)}
# Peak resident memory above the state before the step, in a process of its own (Linux: the high-water mark can be reset).
CHILD = """
import json, re, sys, torch
torch.set_num_threads(1)
from irnb.strategies import DIL, Supervised
from irnb.networks import build
options, n, b, side = json.loads(sys.argv[1])
torch.manual_seed(0)
net = build("RRDB", preset="tiny")
strategy = DIL(net, n, query="reuse", loss="mse", **options) if options else Supervised(net, "mse")
batch = {k: torch.rand(n * b, 3, side, side) for k in ("degraded", "clean")}
status = lambda key: int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
small = {k: v[:2 * n, :, :16, :16].contiguous() for k, v in batch.items()}
strategy(small).backward()   # warm: kernels, buffers
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
strategy(batch).backward()
print(json.dumps((status("VmHWM") - before) / 2**20))
"""


def peak(options: dict | None, side: int = 128) -> float:
    "GiB that a step needs at its peak."
    done = subprocess.run([sys.executable, "-c", CHILD, json.dumps([options, N, B, side])], capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout))


def stepper(strategy, batch):
    "A function that trains one step."
    import torch
    opt = torch.optim.AdamW(strategy.parameters(), lr=1e-4)

    def step() -> None:
        opt.zero_grad(set_to_none=True)
        strategy(batch).backward()
        opt.step()
        strategy.after_step()
    return step


def times() -> list[dict]:
    "Rows of step times, variants and reference in turn."
    import torch
    from irnb.networks import build
    from irnb.strategies import DIL, Supervised
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        make = lambda: build("RRDB", preset="tiny")
        batch = {k: torch.rand(N * B, 3, SIDE, SIDE) for k in ("degraded", "clean")}
        reference = stepper(Supervised(make(), "mse"), batch)
        steps = {name: stepper(DIL(make(), N, query="reuse", loss="mse", **options), batch) for name, (options, _) in CASES.items()}
        steps["ss (vmap)"] = stepper(DIL(make(), N, query="reuse", loss="mse", variant="ss", branches="vmap"), batch)
        seconds = {name: [] for name in steps}
        plain = {name: [] for name in steps}
        for turn in range(6):
            for name, step in steps.items():
                for function, found in ((reference, plain[name]), (step, seconds[name])):
                    start = time.perf_counter()
                    function()
                    found.append(time.perf_counter() - start)
    rows = []
    for name, (_, flops) in CASES.items():
        ours, theirs = (statistics.median(t[name][1:]) for t in (seconds, plain))
        ratio = statistics.median(a / b for a, b in zip(seconds[name][1:], plain[name][1:]))
        rows.append({"name": f"DIL {name} step / Supervised step, {flops}x the FLOPs (RRDB tiny, {N}x{B}x3x{SIDE}x{SIDE})", "ours_s": ours, "reference_s": theirs,
                     "ratio": ratio, "bound": round(1.15 * flops, 2), "ok": ratio <= 1.15 * flops})
    loop, vmap = (statistics.median(seconds[name][1:]) for name in ("ss (explicit)", "ss (vmap)"))
    rows.append({"name": "DIL ss: vmap / loop over branches (a comparison, no bound)", "ours_s": vmap, "reference_s": loop, "ratio": vmap / loop, "bound": "none", "ok": True})
    return rows


def ratios() -> list[dict]:
    "Rows: name, ours_s, reference_s, ratio, bound, ok; then peak memory in GiB."
    rows = times()
    if not sys.platform.startswith("linux"):
        return rows
    reference = peak(None)
    for name, bound in (("sf", 1.1), ("ps (explicit)", 2.2), ("ps (finite_difference)", 1.1), ("ps (autograd)", 4.0), ("ss (explicit)", 2.2)):
        gib = peak(CASES[name][0])
        rows.append({"name": f"DIL {name}: peak memory of a step / Supervised (RRDB tiny, {N}x{B}x3x128x128)", "ours_gib": gib, "reference_gib": reference,
                     "ratio": gib / reference, "bound": bound, "ok": gib / reference <= bound})
    return rows
