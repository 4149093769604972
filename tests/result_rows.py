"""Made-up rows and items for the tests of irnb.results."""
import importlib.util

import numpy as np
import pytest
import torch

needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
needs_wavelets = pytest.mark.skipif(importlib.util.find_spec("pywt") is None, reason="needs PyWavelets")


def row(**changes):
    return dict(image="a", task="denoise", setting="sigma_15", seen=True, strategy="s", seed=0, metric="psnr", value=30.0) | changes


def table(S=3, I=4, gain=0.5, noise=0.0, settings=(("sigma_15", True), ("sigma_25", True), ("sigma_50", False)), seed=0):
    "A degraded row without seeds, a reference and one strategy with a known gain."
    rng, rows = np.random.default_rng(seed), []
    base = rng.normal(30, 3, (len(settings), S, I))
    for k, (name, seen) in enumerate(settings):
        for i in range(I):
            common = dict(image=f"img{i}", setting=name, seen=seen)
            rows.append(row(**common, strategy="degraded", seed="-", value=20.0 + i))
            for s in range(S):
                rows.append(row(**common, strategy="supervised", seed=s, value=base[k, s, i]))
                rows.append(row(**common, strategy="ours", seed=s, value=base[k, s, i] + gain + noise * rng.normal()))
    return rows


def item(side=16, channels=3, scale=1, **changes):
    g = torch.Generator().manual_seed(0)
    clean = torch.rand(channels, side, side, generator=g)
    degraded = (clean + 0.1 * torch.randn(clean.shape, generator=g))[..., ::scale, ::scale].clamp(0, 1)
    return dict(image="a", setting="sigma_25", seen=True, degraded=degraded, clean=clean) | changes


def without(rows, **match):
    return [r for r in rows if any(r[k] != v for k, v in match.items())]
