"""The training step against the bare forward and backward of the same network, and the share of it spent waiting for data."""
from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path


def _patches(folder: Path):
    "Tiles of real photographs."
    import skimage.data
    import torch
    from irnb.data import write_patches
    photos = {name: getattr(skimage.data, name)() for name in ("astronaut", "coffee", "rocket")}
    return write_patches({k: torch.from_numpy(v).permute(2, 0, 1).float() / 255 for k, v in photos.items()}, folder / "patches", size=96, stride=64)


def ratios() -> list[dict]:
    "Rows: name, ours_s, reference_s, ratio, bound, ok (ratio and share at most their bound)."
    import torch
    from irnb.data import Loader, task
    from irnb.networks import build
    from irnb.strategies import Supervised
    from irnb.training import Run, TrainConfig, pick_device
    device, config = pick_device("auto"), TrainConfig(steps=10 ** 6)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loader = Loader(_patches(Path(folder)), task("denoise").train, batch=8, crop=64, device=device)
        strategy = Supervised(build("NAFNet", preset="tiny"))
        run, batch = Run(strategy, config, device, ""), loader.batch(0)
        sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None

        def timed(function) -> float:
            sync()
            start = time.perf_counter()
            function()
            sync()
            return time.perf_counter() - start

        def bare():
            for p in strategy.parameters():
                p.grad = None
            (strategy.net(batch["degraded"]) - batch["clean"]).abs().mean().backward()

        whole, plain, waiting = [], [], []
        for i in range(83):  # interleaved, so that a busy machine slows all three
            plain.append(timed(bare))
            waiting.append(timed(lambda: loader.batch(i)))
            whole.append(timed(lambda: run.advance(strategy, batch)))
        step, reference, data = (statistics.median(t[3:]) for t in (whole, plain, waiting))
        ratio = statistics.median(a / b for a, b in zip(whole[3:], plain[3:]))  # of neighbours in time
    return [{"name": "training step / bare forward+backward (NAFNet tiny, 8x3x64x64)", "ours_s": step, "reference_s": reference, "ratio": ratio,
             "bound": 1.05, "ok": ratio <= 1.05},
            {"name": "waiting for data / training step", "ours_s": data, "reference_s": step + data, "ratio": data / (step + data), "bound": .03,
             "ok": data / (step + data) <= .03}]
