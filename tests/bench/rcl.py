"""RCL's pre-training step over a Supervised step on as many crops of the same size, against the count of operations (sorting included), and the peers beside it."""
from __future__ import annotations

from tests.bench._timing import best_seconds

PICTURES, CROP = 16, 48


def _step(strategy, batch):
    def step():
        strategy.net.zero_grad(set_to_none=True)
        strategy(batch).backward()
        strategy.after_step()
    return step


def _network(kind: str):
    import torch
    from irnb.networks import build
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(kind, preset="tiny", **({"upscale": 1} if kind == "EDSR" else {}))


def ratios(rounds: int = 6) -> list[dict]:
    "Rows: name, ours_s, reference_s (a Supervised step times the count), ratio, bound, ok."
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from irnb.strategies import Supervised
    from irnb.strategies.rcl import RCL, rcl_cost
    from irnb.training import pick_device
    device, rows, threads = pick_device("auto"), [], torch.get_num_threads()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    noisy = {"degraded": torch.rand(PICTURES, 3, 2 * CROP, 2 * CROP, generator=generator).to(device)}
    pairs = {k: torch.rand(2 * PICTURES, 3, CROP, CROP, generator=generator).to(device) for k in ("degraded", "clean")}
    for kind in ("NAFNet", "EDSR"):
        net = _network(kind).to(device)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(pairs["degraded"][:1])
        count = rcl_cost(counter.get_total_flops(), CROP, PICTURES)
        best = best_seconds({"rcl": _step(RCL(net, crop=CROP), noisy), "plain": _step(Supervised(net), pairs)}, device, rounds)
        ratio = best["rcl"] / (best["plain"] * count)
        rows.append({"name": f"RCL step / (Supervised step x {count:.3f} counted): {kind} tiny, {PICTURES} pictures, two crops of {CROP} px", "ours_s": best["rcl"],
                     "reference_s": best["plain"] * count, "plain_s": best["plain"], "ratio": ratio, "bound": 1.1, "ok": ratio <= 1.1})
    torch.set_num_threads(threads)
    return rows
