"""Your network and two training strategies in a Lightning Fabric loop: devices, processes, precision by options.

    pip install "irnb[examples]"
    python fabric.py PICTURES --steps 2000 --precision bf16-mixed
"""
import argparse
import tempfile
from pathlib import Path

import torch
from lightning_fabric import Fabric     # the same as `from lightning.fabric import Fabric`, without the rest of Lightning
from torch import nn

from irnb.data import Loader, benchmark, scan, split, task, write_patches
from irnb.results import evaluate, markdown_table, summary
from irnb.strategies import SPN, Supervised


class MyNet(nn.Module):
    "Any module that maps degraded to restored pictures."
    def __init__(self, width=32):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x):
        return x + self.body(x)


def train(fabric, strategy, loader, steps):
    model, opt = fabric.setup(strategy, torch.optim.AdamW([p for p in strategy.parameters() if p.requires_grad], lr=1e-3))
    for step in range(steps):
        loss = model(loader.batch(step))        # through Fabric's wrapper: precision, and gradients averaged over processes
        opt.zero_grad(); fabric.backward(loss); opt.step()  # noqa: E702
        strategy.after_step()                   # of the strategy itself, which the wrapper shares
    return strategy.restorer().eval()


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("pictures", type=Path)
parser.add_argument("--steps", type=int, default=2000)
parser.add_argument("--accelerator", default="auto")
parser.add_argument("--devices", type=int, default=1)
parser.add_argument("--precision", default="32-true")   # "bf16-mixed" rounds targets by up to half a grey level
options = parser.parse_args()
fabric = Fabric(accelerator=options.accelerator, devices=options.devices, precision=options.precision)
fabric.launch()
denoise, rows = task("denoise"), []
# {"name": "vgg16", "weights": FILE} is the better extractor; "random" is an untrained stand-in that needs no file.
past = dict(extractor="random", rho=0.1, warmup=options.steps // 10, schedule=options.steps, negatives=[{"interval": 0.05, "decay": 0.1}])
strategies = {"supervised": Supervised, "spn": lambda net: SPN(net, **past)}
with tempfile.TemporaryDirectory() as scratch:
    parts = split(scan(options.pictures, min_side=96), {"train": "rest", "test": 0.3})
    tiles = write_patches(parts["train"], Path(scratch, "tiles"), size=96, per_image=256)
    tests = benchmark(parts["test"], denoise, Path(scratch, "tests"), crop=256)
    for name, make in strategies.items():
        fabric.seed_everything(0, verbose=False)
        loader = Loader(tiles, denoise.train, batch=8, crop=64, device=fabric.device, rank=fabric.global_rank, world=fabric.world_size)
        rows += evaluate(train(fabric, make(MyNet()), loader, options.steps), tests, strategy=name, task=denoise.name, seed=0)
fabric.print(markdown_table(summary(rows)))
