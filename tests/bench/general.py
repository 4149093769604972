"""What the encoder of ConStyle adds to a restoration, in time and in peak memory, over the same graph without it."""
from __future__ import annotations

from tests.bench._timing import best_seconds

CASES = (("ConStyleNAFNet", "paper"), ("ConStyleRestormer", "paper"))
BOUND = 1.1  # the encoder is 1.5 % of the multiply-accumulates of NAFNet's graph, and its maps are a few channels at full size


def _peak_bytes(work, device) -> int:
    "The most bytes that a work has allocated at one time, weights and inputs apart."
    import torch
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    steps = [(e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for _, size in sorted(steps, key=lambda step: step[0]):
        now += size
        most = max(most, now)
    return most


def _case(name: str, preset: str, side: int, rounds: int, device) -> list[dict]:
    "Rows for one network: time against the graph that is given its conditioning, memory against the one that has none."
    import torch
    from irnb.networks import build, count_macs
    net, bare = (build(name, preset=preset, conditioned=told).eval().to(device) for told in (True, False))
    x = torch.rand(1, 3, side, side, device=device)
    with torch.inference_mode():
        cond = net.encode(x)
        best = best_seconds({"whole": lambda: net(x), "graph": lambda: net.restore(x, cond), "encoder": lambda: net.encode(x)}, device, rounds)
        peaks = [_peak_bytes(lambda: n(x), device) for n in (net, bare)]
    share = 1 + count_macs(net.ConStyle.encoder_q, (side, side), channels=3) / count_macs(bare, (side, side))
    label, ratio, memory = f"{name} {preset}, {side} px", best["whole"] / best["graph"], peaks[0] / peaks[1]
    return [dict(name=f"{label}: restoration over its graph", ours_s=best["whole"], reference_s=best["graph"], ratio=ratio, bound=BOUND, ok=ratio <= BOUND),
            dict(name=f"{label}: graph and encoder over the graph, each timed alone (multiply-accumulates: {share:.3f})", ours_s=best["graph"] + best["encoder"],
                 reference_s=best["graph"], ratio=1 + best["encoder"] / best["graph"], bound=BOUND, ok=best["encoder"] / best["graph"] <= BOUND - 1),
            dict(name=f"{label}: peak memory over the control's, MiB", ours_s=peaks[0] / 2**20, reference_s=peaks[1] / 2**20, ratio=memory, bound=BOUND, ok=memory <= BOUND)]


def ratios(side: int = 128, rounds: int = 4) -> list[dict]:
    "Time and memory of the encoder at inference, on a GPU if there is one."
    import torch
    device, threads = torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [row for name, preset in CASES for row in _case(name, preset, side, rounds, device)]
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    for line in ratios():
        print(line)
