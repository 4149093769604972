"""Noise-DA's step against its counted operations (two plain steps and the denoiser on two batches), and the deployed network against the plain one."""
from __future__ import annotations

from tests.bench._timing import best_seconds, flops

CASES = (("UNet", "tiny", "tiny"), ("UNet", "tiny", "nano"), ("NAFNet", "tiny", "nano"))


def _step(strategy, batch):
    def run():
        strategy.zero_grad(set_to_none=True)
        strategy(batch).backward()
        strategy.after_step()
    return run


def _denoiser(strategy, batch):
    "Forward and backward of the denoiser on positives and negatives together, gradients of the conditions included."
    import torch
    x = torch.rand(2 * len(batch["clean"]), 3 * batch["clean"].shape[1], *batch["clean"].shape[2:], device=batch["clean"].device)
    x[:, 3:].requires_grad_()
    level = torch.rand(len(x), device=x.device)

    def run():
        strategy.zero_grad(set_to_none=True)
        leaf = x.detach().requires_grad_()
        strategy.diffusion.denoiser(leaf, level).square().mean().backward()
    return run


def _rows(network: str, preset: str, denoiser: str, device) -> list[dict]:
    "A step's time and operations over those of its parts, and inference with what ships over the plain network."
    import torch
    from irnb.networks import build
    from irnb.strategies import NoiseDA, Supervised
    from irnb.strategies.strategy import toy_batch
    batch = {k: v.to(device) for k, v in toy_batch(8, 48).items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build(network, preset=preset).to(device)
    strategy, plain = NoiseDA(net, denoiser=denoiser).to(device), Supervised(net, "charbonnier")
    works = {"ours": _step(strategy, batch), "plain": _step(plain, batch), "denoiser": _denoiser(strategy, batch)}
    best, count = best_seconds(works, device, rounds=24, warmup=2), {k: flops(w) for k, w in works.items()}
    what = f"Noise-DA (G {network} {preset}, D {denoiser}, 8x3x48x48)"
    pairs = {f"step time / two plain steps and D twice: {what}": (best["ours"], 2 * best["plain"] + best["denoiser"]),
             f"step operations / counted ones: {what}": (count["ours"], 2 * count["plain"] + count["denoiser"])}
    rows = [{"name": k, "ours_s": a, "reference_s": b, "ratio": a / b, "bound": 1.1, "ok": a <= 1.1 * b} for k, (a, b) in pairs.items()]
    rows[0]["name"] += f"; {best['ours'] / best['plain']:.1f} plain steps, {count['ours'] / count['plain']:.1f} by operations"
    return rows + [_inference(strategy, net, batch["degraded"], what, device)]


def _inference(strategy, net, x, what: str, device) -> dict:
    import torch

    @torch.no_grad()
    def run(module):
        return module(x)
    shipped = strategy.restorer()
    best = best_seconds({"ours": lambda: run(shipped), "plain": lambda: run(net)}, device, rounds=40, warmup=2)
    same = shipped is net and flops(lambda: run(shipped)) == flops(lambda: run(net))
    ratio = best["ours"] / best["plain"]
    return {"name": f"inference of what ships / plain network: {what}", "ours_s": best["ours"], "reference_s": best["plain"], "ratio": ratio, "bound": 1.05, "ok": same and ratio <= 1.05}


def ratios() -> list[dict]:
    "Rows: name, ours_s, reference_s, ratio, bound, ok (at most the bound; operations are counted, not timed)."
    import torch
    from irnb.training import pick_device
    device, threads = pick_device("auto"), torch.get_num_threads()
    torch.set_num_threads(1)
    rows = [row for case in CASES for row in _rows(*case, device)]
    torch.set_num_threads(threads)
    return rows
