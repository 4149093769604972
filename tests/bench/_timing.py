"""What the benches share: interleaved timing and counted operations."""
from __future__ import annotations

import time


def best_seconds(works: dict, device, rounds: int, warmup: int = 1) -> dict[str, float]:
    "Least seconds of each function, called in turn; on a CPU processor time of one thread, since others may use the machine."
    import torch
    cuda = device.type == "cuda"
    clock, sync = (time.perf_counter, torch.cuda.synchronize) if cuda else (time.process_time, lambda: None)
    best = dict.fromkeys(works, float("inf"))
    for i in range(rounds + warmup):
        for name, work in works.items():
            sync()
            start = clock()
            work()
            sync()
            if i >= warmup:
                best[name] = min(best[name], clock() - start)
    return best


def flops(work) -> int:
    "Floating-point operations of a call, as PyTorch counts them."
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()
