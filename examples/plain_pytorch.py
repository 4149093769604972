"""Your network, your loop, two training strategies, a folder of pictures; nothing but PyTorch and irnb.

    python plain_pytorch.py PICTURES --steps 2000
"""
import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn

from irnb.data import Loader, benchmark, scan, split, task, write_patches
from irnb.results import evaluate, markdown_table, summary
from irnb.strategies import DIL, Supervised
from irnb.training import pick_device


class MyNet(nn.Module):
    "Any module that maps degraded to restored pictures."
    def __init__(self, width=32):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
                                  nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x):
        return x + self.body(x)


def train(strategy, loader, steps, device):
    strategy.to(device).train()
    opt = torch.optim.AdamW(strategy.parameters(), lr=1e-3)
    for step in range(steps):
        loss = strategy(loader.batch(step))     # {"degraded": (B,3,h,w), "clean": (B,3,h,w)}
        opt.zero_grad()
        loss.backward()
        opt.step()
        strategy.after_step()
    return strategy.restorer().eval()


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("pictures", type=Path)
parser.add_argument("--steps", type=int, default=2000)
options = parser.parse_args()
denoise, device, rows = task("denoise"), pick_device("auto"), []
strategies = {"supervised": (lambda net: Supervised(net, loss="l1"), 8),
              # DIL degrades the clean pictures itself, with each of four strengths: a quarter of the batch is as many images.
              "dil": (lambda net: DIL(net, {"gaussian_noise": [5, 10, 15, 20]}, inner="adam", alpha=1e-3, loss="l1"), 2)}
with tempfile.TemporaryDirectory() as scratch:
    parts = split(scan(options.pictures, min_side=96), {"train": "rest", "test": 0.3})
    tiles = write_patches(parts["train"], Path(scratch, "tiles"), size=96, per_image=256)
    tests = benchmark(parts["test"], denoise, Path(scratch, "tests"), crop=256)
    for name, (make, batch) in strategies.items():
        torch.manual_seed(0)                    # both start from the same weights
        loader = Loader(tiles, denoise.train, batch=batch, crop=64, device=device)
        restorer = train(make(MyNet()), loader, options.steps, device)
        rows += evaluate(restorer, tests, strategy=name, task=denoise.name, seed=0)
        torch.save(restorer.state_dict(), f"{name}.pt")
print(markdown_table(summary(rows)))
