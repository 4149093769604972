"""What a rebuilding must not change: ten steps of every strategy and variant, in numbers and in bits.

    python -m tests.bits --out /tmp/old.json      # on the commit before
    python -m tests.bits --against /tmp/old.json  # on the commit after, in the same environment: equal to the bit
    python -m tests.bits --out tests/bits.json    # the committed numbers, which `test_bits.py` holds to a tolerance on any machine

The numbers come from networks and batches in float64, where another processor changes the fourteenth digit only; the bits (a SHA-256 of everything) are those of float32.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from irnb.degradations.noise import GaussianNoise
from irnb.networks import build
from irnb.networks.general import ConStyleEncoder
from irnb.strategies import (CR, DANN, DIL, RCL, SPN, ConStylePretraining, FineTune, IRConStyle, LowFrequency, Neighbor2Neighbor, Noise2Noise, Noise2Self, Noise2Void, NoiseDA,
                             Renoised, SimCLR, Strategy, Supervised)
from irnb.strategies.strategy import ToyNet

STEPS = 10
Make = Callable[[nn.Module], Strategy]
NOISE = [GaussianNoise(sigma) for sigma in (5, 10, 15, 20)]
NEGATIVES = [{"interval": 3, "decay": .1}, {"interval": 4, "decay": .5}]


def cases() -> dict[str, Make]:
    "A strategy per name, around a given network."
    found: dict[str, Make] = {"supervised": Supervised, "supervised_charbonnier": lambda net: Supervised(net, "charbonnier")}
    for variant in ("sf", "pf", "ps", "ss", "erm", "erm_sequential", "lookahead", "pf_branch", "ss_same", "ss_loo", "ss_chain", "ps_fo", "ss_fo"):
        found[f"dil_{variant}"] = lambda net, variant=variant: DIL(net, NOISE, variant=variant, alpha=3e-3)
    found["dil_sf_adam"] = lambda net: DIL(net, NOISE, variant="sf", inner="adam", alpha=1e-3)
    found["dil_pf_adam"] = lambda net: DIL(net, NOISE, variant="pf", inner="adam", alpha=1e-3)
    for query in ("fresh", "reuse"):
        found[f"dil_ps_{query}"] = lambda net, query=query: DIL(net, NOISE, variant="ps", alpha=3e-3, query=query)
    for variant in ("paired", "unpaired", "vanilla", "no_shuffle", "no_swap", "plain", "low_noise", "high_noise", "synthetic_only", "real_only", "placebo"):
        found[f"noise_da_{variant}"] = lambda net, variant=variant: NoiseDA(net, variant=variant, denoiser="nano", length=8)
    for noise in ("target", "matched", "blurred"):
        found[f"renoised_{noise}"] = lambda net, noise=noise: Renoised(net, noise=noise)
    found["dann"] = lambda net: DANN(net, beta=.1, length=8)
    for preset in (None, "frozen", "other", "degraded", "positive", "plus", "random", "adaptive"):
        found[f"spn_{preset or 'history'}"] = lambda net, preset=preset: SPN(
            net, preset=preset, extractor="random", rho=.1, warmup=2, schedule=STEPS, **({} if preset in ("frozen",) else {"negatives": NEGATIVES}))
    found["spn_released_recipe"] = lambda net: SPN(net, preset="released", extractor="random", weights=None, schedule=STEPS)
    found["cr"] = lambda net: CR(net, extractor="random", weight=.01)
    for preset in ("corrected", "official"):
        found[f"constyle_{preset}"] = lambda net, preset=preset: IRConStyle(net, preset=preset, queue_size=8)
    found["constyle_pretraining"] = lambda net: ConStylePretraining(net, NOISE, queue_size=8)
    found |= {"rcl": lambda net: RCL(net, crop=12), "rcl_bounded": lambda net: RCL(net, crop=12, w_excess=10.), "fine_tune": lambda net: FineTune(net, layers=1),
              "noise2noise": lambda net: Noise2Noise(net, extra=.1), "noise2void": Noise2Void, "noise2self": Noise2Self, "neighbor2neighbor": Neighbor2Neighbor,
              "simclr": lambda net: SimCLR(net, crop=16), "low_frequency": LowFrequency}
    return found


def network(name: str) -> nn.Module:
    "A small plain network; a conditioned one where the strategy needs it."
    encoder = {"width": 4, "code_dim": 16, "init": "kaiming"}
    if name == "constyle_pretraining":
        return ConStyleEncoder(**encoder)
    return build("ConStyleNAFNet", preset="tiny", encoder=encoder) if name.startswith("constyle") else ToyNet(width=4)


def redraw(tensor: Tensor) -> None:
    "Other numbers of the same spread: normal draws in float32 differ between processors, uniform ones do not. Equal tensors stay equal."
    spread = float(f"{tensor.std(correction=0):.3g}") if tensor.is_floating_point() and tensor.numel() > 1 else 0.
    if spread:
        u = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel()), dtype=torch.float64)
        tensor.copy_(spread * 12**.5 * (u - .5))


def batch_of(seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    "Smooth pictures, noisy copies of them and other noisy ones, in the manner of `toy_batch` but drawn in float64."
    g = torch.Generator().manual_seed(1000 + seed)
    images = F.interpolate(torch.rand(8, 3, 4, 4, generator=g, dtype=torch.float64), size=(24, 24), mode="bicubic").clamp(0, 1)
    noisy = (images + .35 * (torch.rand(images.shape, generator=g, dtype=torch.float64) - .5)).clamp(0, 1)
    return {"degraded": noisy[:4].to(dtype), "clean": images[:4].to(dtype), "real": noisy[4:].to(dtype)}


def sketch(tensors: list[Tensor]) -> list[float]:
    "Eight random projections of all numbers: no change of any of them goes unseen."
    flat = torch.cat([t.detach().double().flatten() for t in tensors])
    axes = torch.randn(8, flat.numel(), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (axes @ flat / flat.numel() ** .5).tolist()


def run(name: str, make: Make, dtype: torch.dtype) -> dict:
    "Losses of ten steps, the first gradient, the weights and the restorer's output after them, and a SHA-256 of all bytes."
    torch.manual_seed(0)
    strategy = make(network(name)).to(dtype)
    with torch.no_grad():
        for tensor in strategy.parameters():
            redraw(tensor)
    opt = torch.optim.AdamW([p for p in strategy.parameters() if p.requires_grad], lr=2e-3)
    losses, first, digest = [], [], hashlib.sha256()
    for step in range(STEPS):
        batch = batch_of(step, dtype)
        opt.zero_grad()
        loss = strategy(batch)
        loss.backward()
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in strategy.parameters()]
        first = first or sketch(gradients)
        for tensor in (loss, *gradients):
            digest.update(tensor.detach().contiguous().numpy().tobytes())
        opt.step()
        strategy.after_step()
        losses.append(float(strategy.logs["task_loss"]))
    with torch.no_grad():
        out = strategy.restorer().eval()(batch_of(99, dtype)["degraded"])
        out = out if isinstance(out, Tensor) else torch.cat([*out.codes])   # of an encoder
    weights = list(strategy.net.parameters())
    for tensor in (*weights, out):
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return {"losses": losses, "gradient": first, "weights": sketch(weights), "output": sketch([out]), "sha256": digest.hexdigest()}


def measure(names: list[str] | None = None) -> dict[str, dict]:
    "Every case: numbers in float64, bits in float32."
    torch.set_num_threads(1)
    rows = {}
    for name, make in cases().items():
        if not names or name in names:
            rows[name] = run(name, make, torch.float64) | {"sha256": run(name, make, torch.float32)["sha256"]}
    return rows


def main(arguments: list[str]) -> int:
    "Write the numbers, or compare the bits with those of another commit; exit code 1 if they differ."
    parser = argparse.ArgumentParser(prog="python -m tests.bits", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--against", type=Path)
    args = parser.parse_args(arguments)
    rows = measure()
    if args.out:
        args.out.write_text(json.dumps(rows, indent=0) + "\n")
    if args.against:
        old = json.loads(args.against.read_text())
        changed = [name for name in old if name not in rows or rows[name]["sha256"] != old[name]["sha256"]]
        print(f"{len(old) - len(changed)} of {len(old)} equal to the bit" + (f"; changed: {', '.join(changed)}" if changed else ""))
        return int(bool(changed))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
