"""RCL: the distance, the contrast and the residual against closed forms and slow references, the two failure modes, noisy pictures only, fine-tuning, refusals."""
import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import ndimage, stats
from torch import nn

from irnb.degradations.blur import gaussian_blur
from irnb.degradations.noise import RawNoise, raw_noise
from irnb.degradations.sampling import BAYER, Mosaic, demosaic_bilinear, mosaic
from irnb.data import NoisyLoader, few_pictures, noisy_pictures, scan, write_patches
from irnb.image_files import write_image
from irnb.networks import build
from irnb.strategies.rcl import (RCL, FineTune, _blur_matrix, agreement, chosen_parameters, crop_pairs, crop_side, emd_matrix, excess, label_efficiency, layers_by_use,
                                 low_frequency_distance, nt_xent, partner_hits, rcl_cost, read_label_efficiency, residual, transfer)
from irnb.strategies.strategy import Supervised, ToyNet, _loop, _run_gloo, contract, toy_batch
from irnb.training import TrainConfig, train

GAUSS = math.sqrt(2 / math.pi)  # mean absolute value of a standard normal


def g(seed=0):
    return torch.Generator().manual_seed(seed)


def noisy_batch(seed=0, batch=4, size=24, channels=3):
    "Smooth pictures, each with a noise level of its own; 'real' is dropped."
    toy = toy_batch(batch, size, channels, seed)
    levels = torch.linspace(.01, .2, batch).view(-1, 1, 1, 1)
    return {"degraded": toy["clean"] + levels * torch.randn(toy["clean"].shape, generator=g(seed + 7)), "clean": toy["clean"]}


class NoisyOnly(dict):
    "A batch whose clean pictures must not be looked at."

    def __getitem__(self, key):
        assert key != "clean", "the clean pictures were read"
        return super().__getitem__(key)

    def get(self, key, default=None):
        return self[key] if key in self else default

    def items(self):
        raise AssertionError("all entries were read")

    values = items


class Fixed(nn.Module):
    "A function with one parameter that it does not use but for its gradient to exist."

    def __init__(self, function):
        super().__init__()
        self.function, self.w = function, nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.function(x) + 0 * self.w


# --- the distance

@pytest.mark.parametrize("center", [False, True])
def test_distance_against_scipy(center):
    r = torch.randn(5, 3, 4, 6, generator=g(), dtype=torch.float64) * torch.arange(1, 6).view(-1, 1, 1, 1) + .3 * torch.arange(3).view(-1, 1, 1)
    got, flat = emd_matrix(r, center), r.flatten(2).numpy()
    flat = flat - flat.mean(2, keepdims=True) if center else flat
    want = [[np.mean([stats.wasserstein_distance(a, b) for a, b in zip(x, y)]) for y in flat] for x in flat]
    np.testing.assert_allclose(got.numpy(), want, atol=1e-12)
    assert torch.equal(got, got.T) and torch.equal(got.diagonal(), torch.zeros(5, dtype=torch.float64)) and got.dtype == torch.float64


@settings(deadline=None, max_examples=20)
@given(n=st.integers(1, 6), c=st.integers(1, 3), m=st.integers(1, 9), seed=st.integers(0, 999))
def test_a_metric_that_sees_values_and_not_places(n, c, m, seed):
    r = torch.randn(n, c, m, 1, generator=g(seed), dtype=torch.float64)
    D, shuffled = emd_matrix(r), r.clone()
    for i, k in itertools.product(range(n), range(c)):
        shuffled[i, k] = r[i, k][torch.randperm(m, generator=g(i + k))]
    torch.testing.assert_close(emd_matrix(shuffled), D, rtol=0, atol=1e-13)
    assert (D[:, :, None] <= D[:, None, :] + D.T[None] + 1e-12).all() if n > 1 else D.shape == (1, 1)
    torch.testing.assert_close(emd_matrix(3 * r), 3 * D)
    torch.testing.assert_close(emd_matrix(torch.cat((r, r + .5)))[torch.arange(n), torch.arange(n) + n], torch.full((n,), .5, dtype=torch.float64))  # a shift is its own distance
    torch.testing.assert_close(emd_matrix(torch.cat((r, r + .5)), center=True)[torch.arange(n), torch.arange(n) + n], torch.zeros(n, dtype=torch.float64), rtol=0, atol=1e-12)


def test_channels_are_compared_with_their_own_kind():
    r = torch.stack((torch.stack((torch.zeros(3, 3), torch.ones(3, 3))), torch.stack((torch.ones(3, 3), torch.zeros(3, 3)))))
    assert emd_matrix(r)[0, 1] == 1  # a pooled distribution would say 0


@pytest.mark.parametrize("s, t", [(.05, .2), (.1, .1), (.3, .1)])
def test_gaussians_are_at_their_closed_form(s, t):
    values = torch.randn(2, 1, 600, 600, generator=g(), dtype=torch.float64) * torch.tensor([s, t], dtype=torch.float64).view(2, 1, 1, 1)
    assert emd_matrix(values)[0, 1].item() == pytest.approx(abs(s - t) * GAUSS, abs=8e-4)
    quantiles = torch.distributions.Normal(0, 1).icdf((torch.arange(4096, dtype=torch.float64) + .5) / 4096).view(1, 1, 64, 64)
    assert emd_matrix(torch.cat((s * quantiles, t * quantiles)))[0, 1].item() == pytest.approx(abs(s - t) * GAUSS, abs=1e-4 * abs(s - t) + 1e-15)


@pytest.mark.parametrize("m", [64, 1024, 4096])
def test_floor_of_two_samples_of_one_law(m):
    D, n, s = emd_matrix(.1 * torch.randn(60, 1, m, 1, generator=g(m), dtype=torch.float64)), 60, .1
    assert D.sum().item() / (n * (n - 1)) * math.sqrt(m) / s == pytest.approx(1.8, rel=.04)
    x = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    cdf = torch.distributions.Normal(0, 1).cdf(x)
    assert 2 / math.sqrt(math.pi) * torch.trapezoid((cdf * (1 - cdf)).sqrt(), x).item() == pytest.approx(1.8, abs=.03)  # where the 1.8 comes from


def test_gradient_of_the_distance_and_its_dead_point():
    r = torch.randn(4, 2, 3, 3, generator=g(), dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, 4, generator=g(1), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: (emd_matrix(v) * weights).sum(), r) and torch.autograd.gradcheck(lambda v: (emd_matrix(v, True) * weights).sum(), r)
    dead = torch.zeros(4, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    (emd_matrix(dead) * weights).sum().backward()
    assert torch.equal(dead.grad, torch.zeros_like(dead))


def test_no_tensor_of_all_pairs_of_values_is_formed():
    n, m, seen = 24, 900, []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.extend(o.numel() for o in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(o, torch.Tensor))
            return out

    with Watch():
        emd_matrix(torch.randn(n, 1, m, 1, requires_grad=True)).sum().backward()
    assert max(seen) == n * m


def test_half_precision_is_measured_in_float32():
    r = torch.randn(4, 1, 16, 16, generator=g())
    with torch.autocast("cpu", torch.bfloat16):
        assert emd_matrix(r).dtype == torch.float32 and torch.equal(emd_matrix(r), emd_matrix(r.clone()))
        assert nt_xent(emd_matrix(r), .01).dtype == torch.float32
    assert emd_matrix(r.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(emd_matrix(r.bfloat16()), emd_matrix(r.bfloat16().float()))


# --- the contrast

@pytest.mark.parametrize("pictures", [2, 3, 16])
def test_contrast_closed_forms(pictures):
    n, tau = 2 * pictures, .01
    assert nt_xent(torch.full((n, n), .7, dtype=torch.float64), tau).item() == pytest.approx(math.log(n - 1), abs=1e-12)
    for D in (0, .003, .02, 1.):
        solved = torch.full((n, n), D, dtype=torch.float64)
        for i in range(n):
            solved[i, (i + pictures) % n] = 0
        assert nt_xent(solved, tau).item() == pytest.approx(math.log(1 + (n - 2) * math.exp(-D / tau)), abs=1e-12)


def test_contrast_against_a_loop_and_its_gradient():
    D, tau = torch.rand(8, 8, generator=g(), dtype=torch.float64), .3
    rows = [-math.log(math.exp(-D[i, (i + 4) % 8] / tau) / sum(math.exp(-D[i, j] / tau) for j in range(8) if j != i)) for i in range(8)]
    assert nt_xent(D, tau).item() == pytest.approx(np.mean(rows), abs=1e-12)
    assert nt_xent(D + 5, tau).item() == pytest.approx(nt_xent(D, tau).item(), abs=1e-12)  # only differences count
    assert nt_xent(D + 9 * torch.eye(8, dtype=torch.float64), tau).item() == nt_xent(D, tau).item()
    leaf = D.clone().requires_grad_()
    nt_xent(leaf, tau).backward()
    partner = torch.eye(8).roll(4, 1).bool()
    assert (leaf.grad[partner] > 0).all() and (leaf.grad[~partner & ~torch.eye(8).bool()] < 0).all() and not leaf.grad.diagonal().any()
    assert torch.autograd.gradcheck(lambda d: nt_xent(d, tau), D.clone().requires_grad_())


def test_partner_hits_and_the_convention_of_partners():
    noise = torch.cat([v * torch.randn(1, 1, 64, 64, generator=g(i)) for i, v in enumerate((.01, .05, .2, .01, .05, .2))])
    D = emd_matrix(noise)
    assert partner_hits(D) == 1 and nt_xent(D, .01) < .1
    assert partner_hits(D[[0, 1, 2, 4, 5, 3]][:, [0, 1, 2, 4, 5, 3]]) == 0
    far = D + torch.eye(6).roll(3, 1) * torch.tensor([9., 0, 0, 0, 0, 0])[:, None]
    assert partner_hits(far).item() == pytest.approx(5 / 6)


@pytest.mark.parametrize("call, message", [
    (lambda: nt_xent(torch.zeros(2, 2), .01), "1.*negatives"), (lambda: nt_xent(torch.zeros(5, 5), .01), r"\(5, 5\)"), (lambda: nt_xent(torch.zeros(4, 6), .01), r"\(4, 6\)"),
    (lambda: nt_xent(torch.zeros(4, 4), 0), "tau"), (lambda: nt_xent(torch.zeros(4, 4), -1.), "tau"), (lambda: emd_matrix(torch.zeros(4, 3, 2)), r"\(4, 3, 2\)"),
    (lambda: emd_matrix(torch.zeros(0, 3, 2, 2)), r"\(0, 3, 2, 2\)")])
def test_losses_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- crops

def coordinates(b, h, w):
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack((rows, columns)).expand(b, 2, h, w).float() + 1000 * torch.arange(b).view(-1, 1, 1, 1)


@settings(deadline=None, max_examples=40)
@given(b=st.integers(1, 5), h=st.integers(4, 30), w=st.integers(4, 30), step=st.sampled_from((1, 2)), overlap=st.booleans(), seed=st.integers(0, 999), share=st.floats(0, 1))
def test_crops_come_from_their_picture_and_do_not_overlap(b, h, w, step, overlap, seed, share):
    size = max(step, int(share * crop_side((h, w), overlap, step)) // step * step)
    pairs = crop_pairs(coordinates(b, h, w), size, generator=g(seed), overlap=overlap, step=step)
    assert pairs.shape == (2 * b, 2, size, size) and pairs.is_contiguous()
    assert torch.equal(pairs[..., 0, 0].div(1000, rounding_mode="floor").int()[:, 0], torch.arange(b).repeat(2).int())
    corner = pairs[:, :, 0, 0] % 1000
    assert (corner % step == 0).all() and (corner >= 0).all() and (corner <= torch.tensor([h - size, w - size])).all()
    want = coordinates(1, size, size) + corner[:, :, None, None] + 1000 * torch.arange(b).repeat(2).view(-1, 1, 1, 1)
    assert torch.equal(pairs, want)
    apart = (corner[:b] - corner[b:]).abs().amax(1)
    assert overlap or (apart >= size).all()


def test_crops_use_the_whole_picture_in_both_directions_and_orders():
    corner = (crop_pairs(coordinates(4000, 12, 12), 4, generator=g())[:, :, 0, 0] % 1000).view(2, 4000, 2)
    for axis in (0, 1):
        assert sorted(set(corner[0, :, axis].tolist())) == list(range(9))
        before = (corner[0, :, axis] + 4 <= corner[1, :, axis]).float().mean().item()
        after = (corner[1, :, axis] + 4 <= corner[0, :, axis]).float().mean().item()
        assert before == pytest.approx(after, abs=.05) and before > .25
    assert corner[0].mean().item() == pytest.approx(corner[1].mean().item(), abs=.15)
    rolled = crop_pairs(coordinates(4000, 12, 12), 4, generator=g(), overlap=True)[:, :, 0, 0].view(2, 4000, 2) % 1000
    assert ((rolled[0] - rolled[1]).abs().amax(1) < 4).float().mean() > .2  # overlapping ones are drawn where they are allowed


def test_crops_are_the_generators():
    x = torch.rand(3, 3, 20, 20)
    assert torch.equal(crop_pairs(x, 8, generator=g(1)), crop_pairs(x, 8, generator=g(1))) and not torch.equal(crop_pairs(x, 8, generator=g(1)), crop_pairs(x, 8, generator=g(2)))
    assert [crop_side(s) for s in ((20, 20), (10, 40), (15, 13), (9, 40))] == [10, 10, 7, 9] and crop_side((22, 22), step=2) == 10
    assert crop_pairs(x, generator=g()).shape == (6, 3, 10, 10)


@pytest.mark.parametrize("size, options, message", [(11, {}, "11.*20x20.*10"), (21, {"overlap": True}, "21.*20x20"), (5, {"step": 2}, "multiples.*2"), (-1, {}, "crop_pairs")])
def test_crops_refuse(size, options, message):
    with pytest.raises(ValueError, match=message):
        crop_pairs(torch.rand(2, 3, 20, 20), size, generator=g(), **options)


def test_a_picture_of_one_pixel_has_no_two_crops():
    with pytest.raises(ValueError, match="1x1"):
        crop_pairs(torch.rand(2, 3, 1, 1), generator=g())


# --- residuals under the noise model

@pytest.mark.parametrize("a, b", [(.0, .002), (.02, 0.), (.0256, .0036)])
@pytest.mark.parametrize("form", ["full", "masked", "packed"])
def test_residual_of_a_perfect_network_is_the_noise(a, b, form):
    level = torch.tensor([.1, .4, .9], dtype=torch.float64)
    y = level.view(1, 3, 1, 1).expand(1, 3, 400, 400)
    x = raw_noise(y, a, b, generator=g(), form=form)
    perfect = Fixed(lambda x: y if form != "packed" else Mosaic(form="packed")(y))
    r = residual(perfect, x, "RGGB" if form == "masked" else None)
    assert r.shape == ((1, 3, 400, 400) if form == "full" else (1, 4, 200, 200))
    expected = a * (level if form == "full" else level[[0, 1, 1, 2]]) + b
    np.testing.assert_allclose(r.detach().var((0, 2, 3)).numpy(), expected.numpy(), rtol=.03)
    assert r.detach().mean((0, 2, 3)).abs().max() < 4 * math.sqrt(expected.max()) / 200
    kurtosis = ((r / expected.sqrt().view(1, -1, 1, 1)) ** 4).mean().item()
    assert kurtosis == pytest.approx(3, rel=.05)


def test_distance_of_perfect_residuals_is_that_of_the_noise_laws():
    laws, level = [(.01, .0004), (.01, .0025), (0., .0004)], (.2, .8)
    y = torch.tensor(level, dtype=torch.float64).view(2, 1, 1, 1).expand(2, 1, 500, 500)
    for (a, b), (a2, b2) in itertools.product(laws, laws):
        shot, read = torch.tensor([a, a2], dtype=torch.float64), torch.tensor([b, b2], dtype=torch.float64)
        x = raw_noise(y, shot, read, generator=g(3), form="full")
        want = abs(math.sqrt(a * level[0] + b) - math.sqrt(a2 * level[1] + b2)) * GAUSS  # content shows through shot noise even for a perfect network
        assert emd_matrix(x - y)[0, 1].item() == pytest.approx(want, abs=6e-4)


@pytest.mark.parametrize("pattern", BAYER)
def test_residual_of_a_mosaic_looks_at_measured_places_only(pattern):
    x = mosaic(torch.rand(2, 3, 8, 10, dtype=torch.float64), pattern)
    restored = torch.rand(2, 3, 8, 10, dtype=torch.float64)
    r = residual(Fixed(lambda _: restored), x, pattern)
    mask = mosaic(torch.ones(2, 3, 8, 10, dtype=torch.float64), pattern)
    for i, (dy, dx) in enumerate(sorted(((0, 0), (0, 1), (1, 0), (1, 1)), key=lambda p: [("RGB".index(pattern[2 * p[0] + p[1]])), pattern[2 * p[0]:2 * p[0] + 2].count("B")])):
        want = ((x - restored) * mask).sum(1)[:, dy::2, dx::2]
        torch.testing.assert_close(r[:, i], want)


def test_the_residual_is_what_is_taken_away():
    x = torch.rand(2, 3, 8, 8, generator=g())
    assert torch.equal(residual(Fixed(torch.zeros_like), x), x) and torch.equal(residual(Fixed(lambda v: v + .5), x), x - (x + .5))
    with torch.autocast("cpu", torch.bfloat16):
        assert residual(nn.Conv2d(3, 3, 1), x).dtype == torch.float32


def test_residual_refuses_other_shapes_and_odd_mosaics():
    with pytest.raises(ValueError, match=r"\(1, 3, 16, 16\).*transfer"):
        residual(Fixed(lambda x: x.repeat_interleave(2, -1).repeat_interleave(2, -2)), torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match="even"):
        residual(nn.Identity(), torch.rand(1, 3, 7, 8), "RGGB")
    with pytest.raises(ValueError, match="XYZW"):
        residual(nn.Identity(), torch.rand(1, 3, 8, 8), "XYZW")


# --- the consistency term

@pytest.mark.parametrize("sigma", [1.0, 2.0, 3.5])
def test_low_frequencies_against_scipy(sigma):
    x, y = torch.rand(2, 2, 3, 24, 31, generator=g(), dtype=torch.float64)
    blurred = [ndimage.gaussian_filter(v.numpy(), sigma, axes=(2, 3), mode="nearest", radius=math.ceil(3 * sigma)) for v in (x, y)]
    assert low_frequency_distance(x, y, sigma).item() == pytest.approx(np.abs(blurred[0] - blurred[1]).mean(), rel=1e-9)


def test_low_frequencies_measured_in_inference_mode_first():
    _blur_matrix.cache_clear()
    x = torch.rand(2, 1, 12, 12)
    with torch.inference_mode():
        seen = low_frequency_distance(x, x + 1).item()
    y = x.clone().requires_grad_()
    value = low_frequency_distance(y, x + 1)
    value.backward()
    assert value.item() == seen == pytest.approx(1, abs=1e-5) and y.grad.sum().item() == pytest.approx(-1, abs=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert low_frequency_distance(x, x + 1).item() == seen


def test_low_frequencies_of_a_perfect_denoiser_and_of_the_failures():
    y = torch.full((4, 1, 200, 200), .5, dtype=torch.float64)
    x = y + .1 * torch.randn(y.shape, generator=g(), dtype=torch.float64)
    assert low_frequency_distance(y, x).item() == pytest.approx(GAUSS * .1 / (4 * math.sqrt(math.pi)), rel=.04)
    assert low_frequency_distance(x, x).item() == 0
    assert low_frequency_distance(y + .3, x).item() == pytest.approx(.3, abs=2e-3)


def test_low_frequencies_of_a_mosaic_ask_for_all_three_colours():
    y = torch.tensor([.2, .5, .8]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    x = mosaic(y, "GBRG")
    assert low_frequency_distance(y, x, pattern="GBRG").item() < 1e-6 < .1 < low_frequency_distance(x, x, pattern="GBRG").item()


# --- the two failure modes

def oracle_terms(restored, x):
    D = emd_matrix(x - restored)
    return nt_xent(D, .01).item(), low_frequency_distance(restored, x).item(), partner_hits(D).item()


def test_failures_are_told_apart_by_the_loss():
    y = torch.rand(8, 1, 2, 2, generator=g(), dtype=torch.float64)
    y = nn.functional.interpolate(y, size=96, mode="bicubic", align_corners=True)
    x = y + torch.linspace(.01, .2, 8, dtype=torch.float64).view(-1, 1, 1, 1) * torch.randn(y.shape, generator=g(1), dtype=torch.float64)
    pairs = crop_pairs(torch.cat((x, y), 1), 48, generator=g(2))
    x, y = pairs[:, :1], pairs[:, 1:]
    (identity, constant, perfect) = (oracle_terms(v, x) for v in (x, torch.full_like(x, .5), y))
    assert identity[0] == pytest.approx(math.log(15), abs=1e-12) and identity[1] == 0
    assert perfect[2] == 1 and perfect[0] < 1 and perfect[1] < .02
    assert constant[1] > .1 and constant[0] > perfect[0]
    totals = [.1 * c + 10 * low for c, low, _ in (perfect, identity, constant)]
    assert totals == sorted(totals) and totals[2] > 4 * totals[1]


def test_a_constant_network_solves_the_contrast_by_content():
    y = (torch.arange(6, dtype=torch.float64) / 5).view(-1, 1, 1, 1).expand(6, 1, 64, 64)  # grey cards, all with the same noise: nothing but content
    x = crop_pairs(y + .02 * torch.randn(y.shape, generator=g(), dtype=torch.float64), 32, generator=g(1))
    contrast, low, hits = oracle_terms(torch.zeros_like(x), x)
    assert hits == 1 and contrast < 1e-3 and low > .3  # only the low frequencies object


def test_the_amplifier_beats_a_perfect_denoiser_and_the_sign_is_not_seen():
    y = torch.full((6, 1, 96, 96), .5, dtype=torch.float64)
    n = torch.linspace(.005, .05, 6, dtype=torch.float64).view(-1, 1, 1, 1) * torch.randn(y.shape, generator=g(), dtype=torch.float64)
    pairs = crop_pairs(torch.cat((y + n, y, n - gaussian_blur(n, 2., 13)), 1), 48, generator=g(1))
    x, y, high = (pairs[:, i:i + 1] for i in range(3))
    total = lambda restored: .1 * oracle_terms(restored, x)[0] + 10 * oracle_terms(restored, x)[1]
    assert total(x + 4 * high) < total(y)  # a defect of the derived loss, kept in mind here
    assert oracle_terms(x + high, x) == pytest.approx(oracle_terms(x - high, x), abs=.02)
    assert excess(x + 4 * high, x).item() > .05 > excess(y, x).item() and excess(x, x).item() == 0 == excess(x - .5 * high, x).item()


def test_excess_by_hand_and_in_the_loss():
    x, restored = torch.rand(3, 2, 20, 24, generator=g(), dtype=torch.float64), torch.rand(3, 2, 20, 24, generator=g(1), dtype=torch.float64)
    blurred = ndimage.gaussian_filter(x.numpy(), 1.5, axes=(2, 3), mode="nearest", radius=5)
    most, strength = (np.sqrt((v ** 2).mean((1, 2, 3))) for v in (x.numpy() - blurred, (x - restored).numpy()))
    assert excess(restored, x, 1.5).item() == pytest.approx(np.maximum(0, strength - most).mean(), rel=1e-6) and (strength > most).any()
    mosaicked, full = mosaic(x.new_ones(2, 3, 16, 16) * .5 + .1 * torch.randn(2, 3, 16, 16, generator=g(), dtype=torch.float64)), demosaic_bilinear
    assert excess(full(mosaicked), mosaicked, pattern="RGGB").item() == 0 < excess(full(mosaicked) + .5, mosaicked, pattern="RGGB").item()
    class Loud(ToyNet):
        def forward(self, v):
            return super().forward(v) + 3 * (v - gaussian_blur(v, 1., 7))

    plain, bounded, batch = RCL(Loud()), RCL(Loud(), w_excess=5), noisy_batch()
    pairs = crop_pairs(batch["degraded"], generator=RCL(ToyNet()).generator())
    assert bounded(batch).item() == pytest.approx(plain(batch).item() + 5 * excess(Loud()(pairs), pairs).item(), rel=1e-5) and bounded(batch) > plain(batch)


def test_the_identity_is_a_dead_point():
    class Scaled(nn.Module):
        def __init__(self, gain):
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(gain))

        def forward(self, x):
            return x + self.gain * (x.mean((2, 3), keepdim=True) - x)

    for gain, alive in ((0., False), (.05, True)):
        strategy = RCL(Scaled(gain))
        strategy(noisy_batch()).backward()
        assert (strategy.net.gain.grad.abs().item() > 0) == alive
        assert (abs(strategy.logs["contrast"].item() - math.log(7)) < 1e-6) == (not alive)


# --- the strategy

def test_terms_weights_and_logs():
    batch, net = noisy_batch(), ToyNet()
    strategy = RCL(net, tau=.02, w_contrast=.3, w_consistency=4, sigma=1.5, crop=10, seed=5)
    total = strategy(batch)
    pairs = crop_pairs(batch["degraded"], 10, generator=RCL(net, seed=5).generator())
    r = residual(net, pairs)
    contrast, low = nt_xent(emd_matrix(r), .02), low_frequency_distance(net(pairs), pairs, 1.5)
    torch.testing.assert_close(total, .3 * contrast + 4 * low)
    assert torch.equal(strategy.logs["task_loss"], total.detach())
    torch.testing.assert_close(strategy.logs["contrast"], contrast.detach())
    torch.testing.assert_close(strategy.logs["consistency"], low.detach())
    assert torch.equal(strategy.logs["hits"], partner_hits(emd_matrix(r)))
    assert not any(v.requires_grad for v in strategy.logs.values())


def test_defaults_are_the_specifications():
    strategy = RCL(ToyNet())
    assert (strategy.tau, strategy.w_contrast, strategy.w_consistency, strategy.sigma, strategy.w_excess, strategy.center, strategy.overlap) == (.01, .1, 10, 2.0, 0, False, False)
    assert strategy.needs == ("degraded",) and strategy.restorer() is strategy.net


def test_options_reach_the_terms():
    batch = noisy_batch(size=32)
    totals = {name: RCL(ToyNet(), **options)(batch).item() for name, options in
              {"plain": {}, "center": {"center": True}, "crop": {"crop": 8}, "seed": {"seed": 1}, "overlap": {"overlap": True}, "tau": {"tau": .1}, "sigma": {"sigma": 1.}}.items()}
    assert len({round(v, 7) for v in totals.values()}) == len(totals)
    only_low = RCL(ToyNet(), w_contrast=0)
    assert only_low(batch).item() == pytest.approx(10 * only_low.logs["consistency"].item()) and only_low.logs["contrast"] == 0
    RCL(ToyNet(), w_contrast=0)({"degraded": batch["degraded"][:1]})  # no negatives are needed for it


def test_crops_change_from_step_to_step_and_part_to_part():
    strategy, batch = RCL(ToyNet()), noisy_batch()
    first, second = strategy(batch).item(), strategy(batch).item()
    strategy.after_step()
    third = strategy(batch).item()
    assert len({first, second, third}) == 3
    again = RCL(ToyNet())
    assert again(batch).item() == first


def test_clean_pictures_are_never_read():
    strategy = RCL(ToyNet())
    with pytest.raises(AssertionError, match="clean"):
        Supervised(ToyNet())(NoisyOnly(noisy_batch()))
    loss = strategy(NoisyOnly(noisy_batch()))
    assert loss.item() == RCL(ToyNet())({"degraded": noisy_batch()["degraded"]}).item()


@pytest.mark.parametrize("channels, pattern", [(1, None), (3, None), (4, None), (3, "GRBG")])
def test_grey_colour_packed_and_masked(channels, pattern):
    x = toy_batch(4, 24, 3)["clean"]
    x = raw_noise(x, .01, .001, generator=g(), form={1: "plane", 3: "masked" if pattern else "full", 4: "packed"}[channels], pattern=pattern or "RGGB")
    strategy = RCL(ToyNet(channels), pattern=pattern)
    losses, _ = _loop(strategy, [{"degraded": x}] * 20)
    assert losses[-1] < losses[0] and all(map(math.isfinite, losses))


def test_crops_of_a_mosaic_keep_its_colours():
    colour = torch.tensor([.2, .5, .8]).view(1, 3, 1, 1)
    x = mosaic(colour.expand(3, 3, 30, 30), "GRBG") + 0.
    seen = []
    strategy = RCL(Fixed(lambda p: (seen.append(p), p.new_tensor(0.) + colour.expand_as(p))[1]), pattern="GRBG", w_contrast=.1)
    strategy({"degraded": x})
    assert torch.equal(seen[0], mosaic(colour.expand_as(seen[0]), "GRBG")) and strategy.logs["consistency"] < 1e-6


@pytest.mark.parametrize("options, message", [
    ({"tau": 0}, "tau"), ({"tau": -1.}, "tau"), ({"tau": "1e-2"}, "tau.*1.0e-3"), ({"tau": math.nan}, "tau"), ({"w_contrast": -.1}, "w_contrast"), ({"w_consistency": math.inf}, "w_consistency"),
    ({"sigma": 0}, "sigma"), ({"w_excess": -1}, "w_excess"), ({"crop": 1}, "crop"), ({"crop": 8.5}, "crop"), ({"crop": True}, "crop"), ({"crop": 9, "pattern": "RGGB"}, "even")])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        RCL(ToyNet(), **options)


@pytest.mark.parametrize("call, message", [
    (lambda: RCL(ToyNet())({"degraded": torch.rand(1, 3, 24, 24)}), "negatives.*accumulate"), (lambda: RCL(ToyNet(), crop=20)({"degraded": torch.rand(4, 3, 24, 24)}), "20.*24x24.*12"),
    (lambda: RCL(ToyNet())({"clean": torch.rand(4, 3, 24, 24)}), "RCL.*batch.'degraded'"), (lambda: RCL("net"), "nn.Module"),
    (lambda: RCL(nn.Upsample(scale_factor=2))({"degraded": torch.rand(4, 3, 24, 24)}), "scale 1"), (lambda: RCL(ToyNet(), pattern="RBGG")({"degraded": torch.rand(4, 3, 24, 24)}), "RBGG"),
    (lambda: RawNoise(-1e-3), "shot.*-0.001"), (lambda: RawNoise(.01, math.nan), "read"), (lambda: RawNoise(form="packed")(torch.rand(1, 3, 9, 8), generator=g()), "even")])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("options", [{}, {"center": True, "overlap": True, "crop": 16, "w_excess": 3}, {"w_contrast": 0}], ids=str)
def test_contract(options):
    batches = [noisy_batch(i, batch=6) for i in range(6)]
    assert len(contract(lambda net: RCL(net, **options), batches=batches, options=options, processes=False)) == 22


@pytest.mark.slow
@pytest.mark.parametrize("make", [RCL, lambda net: FineTune(net, layers=1), lambda net: FineTune(net, layers=["*.bias"])])
def test_two_processes(make):
    contract(make, batches=[noisy_batch(i, batch=8) for i in range(6)], nets=[ToyNet], same_as_one=make is not RCL,
             options={"layers": ["*.bias"]} if make is not RCL else {})


class Told(RCL):
    "RCL that writes what this process saw where the workers' states show it."

    def __init__(self, net, **options):
        super().__init__(net, **options)
        self.register_buffer("told", torch.zeros(()))

    def after_step(self):
        super().after_step()
        self.told.fill_(self.logs["consistency"])


@pytest.mark.slow
def test_every_process_draws_its_own_crops():
    batch = noisy_batch(batch=4)
    twice = {k: torch.cat((v, v)) for k, v in batch.items()}
    first, second = _run_gloo(Told(ToyNet()), [twice] * 2)
    assert first["told"] != second["told"] and torch.equal(first["net.layers.0.weight"], second["net.layers.0.weight"])


class Batches:
    def __init__(self, stop=None):
        self.stop = stop

    def batch(self, step):
        if step == self.stop:
            raise KeyboardInterrupt
        return {"degraded": noisy_batch(step % 3)["degraded"]}


def test_training_resumes_bit_exact_from_a_kill(tmp_path):
    config = TrainConfig(steps=12, warmup=2, log_every=2, checkpoint_every=4, ema=.9)
    whole = RCL(ToyNet())
    train(whole, Batches(), config, device="cpu", progress=False)
    with pytest.raises(KeyboardInterrupt):
        train(RCL(ToyNet()), Batches(stop=9), config, device="cpu", checkpoint=tmp_path / "c.pt", progress=False)
    resumed = RCL(ToyNet())
    result = train(resumed, Batches(), config, device="cpu", checkpoint=tmp_path / "c.pt", progress=False)
    assert result.resumed_at == 8 and all(torch.equal(a, b) for a, b in zip(whole.net.parameters(), resumed.net.parameters()))
    assert {"task_loss", "contrast", "consistency", "hits"} <= set(result.history[-1])


def test_it_learns_to_tell_noise_laws_apart_and_takes_noise_away():
    def pictures(seed):
        y = toy_batch(6, 48, 1, seed)["clean"]
        s = torch.rand(6, 1, 1, 1, generator=g(seed)) * .18 + .02
        return {"degraded": y + s * torch.randn(y.shape, generator=g(seed + 500)), "clean": y}

    strategy = RCL(ToyNet(1, 16))
    held = [pictures(1000 + i) for i in range(8)]

    def measure(net):
        with torch.no_grad():
            hits = [partner_hits(emd_matrix(residual(net, crop_pairs(b["degraded"], 24, generator=g(i))))).item() for i, b in enumerate(held)]
            errors = [(net(b["degraded"]) - b["clean"]).square().mean().item() for b in held]
        return np.mean(hits), np.mean(errors)

    before = measure(strategy.net)
    _loop(strategy, [pictures(i) for i in range(150)])
    after = measure(strategy.net)
    noise = np.mean([(b["degraded"] - b["clean"]).square().mean().item() for b in held])
    assert after[0] > .5 > 2 * before[0] and after[1] < noise < before[1], (before, after, noise)


# --- data: which pictures have labels, which are noisy

def tiles(folder, pictures, **options):
    return write_patches(pictures, folder, size=16, stride=16, **options)


def test_labelled_pictures_are_nested_and_no_more_than_there_are(tmp_path):
    patches = tiles(tmp_path / "p", {f"p{i}": torch.rand(3, 32, 32) for i in range(6)})
    sets = [set(few_pictures(patches, k, seed=3).sources) for k in range(1, 7)]
    assert [len(s) for s in sets] == list(range(1, 7)) and all(a < b for a, b in zip(sets, sets[1:]))
    for k in (0, 7):
        with pytest.raises(ValueError, match=rf"p\b.* {k}\b.*\b6\b"):
            few_pictures(patches, k)


def test_a_noisy_folder_of_mixed_sizes_and_depths_trains(tmp_path):
    for i, (bits, shape) in enumerate(((8, (3, 40, 52)), (16, (3, 64, 40)), (8, (1, 33, 47)), (16, (1, 50, 50)), (8, (3, 20, 90)))):
        write_image(tmp_path / f"n{i}.png", torch.rand(shape, generator=g(i)), bits=bits)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match="broken.*n4|n4.*broken"):
        corpus = scan(tmp_path, min_side=32)
    noisy = write_patches(corpus, tmp_path / "tiles", size=32, stride=16, dtype="float16")
    batch = NoisyLoader(noisy, batch=4, crop=32).batch(0)
    assert batch["degraded"].shape == (4, 3, 32, 32) and set(batch) == {"degraded"} and 0 <= batch["degraded"].min() < batch["degraded"].max() <= 1
    losses, _ = _loop(RCL(ToyNet(), crop=16), [NoisyLoader(noisy, batch=4, crop=32).batch(i) for i in range(3)])
    assert all(map(math.isfinite, losses))
    with pytest.raises(ValueError, match="batch=5.*4"):
        NoisyLoader(noisy, batch=5, crop=32)


def test_noise_is_drawn_once_per_picture_and_crops_find_their_partners(tmp_path):
    flat = {f"p{i}": torch.full((3, 96, 96), .5) for i in range(8)}
    made = noisy_pictures(flat, RawNoise(form="full"), seed=1)
    assert len({round(v.float().std().item(), 4) for v in made.values()}) == 8
    loader = NoisyLoader(write_patches(made, tmp_path / "n", size=64, stride=32, dtype="float16"), batch=8, crop=64)
    again = NoisyLoader(loader.patches, batch=8, crop=64)
    assert all(torch.equal(loader.batch(i)["degraded"], again.batch(i)["degraded"]) for i in range(2))
    D = emd_matrix(crop_pairs(loader.batch(0)["degraded"], 32, generator=g()) - .5)
    assert partner_hits(D) > .3  # chance is 1 in 15


# --- fine-tuning

def reference(net, train_names, batches):
    "The same by hand on a copy: flags off, a plain loop."
    net = copy.deepcopy(net)
    for name, p in net.named_parameters():
        p.requires_grad_(name in train_names)
    _loop(Supervised(net), batches)
    return net


@pytest.mark.parametrize("net, layers, names", [
    (ToyNet(), 1, ["layers.2.weight", "layers.2.bias"]), (ToyNet(), ["layers.1.*", "*.0.bias"], ["layers.0.bias", "layers.1.weight", "layers.1.bias"]),
    (build("NAFNet", preset="tiny"), 1, ["ending.weight", "ending.bias"]), (build("EDSR", preset="tiny", upscale=1), 1, None)], ids=["toy", "patterns", "nafnet", "edsr"])
def test_fine_tuning_a_part_equals_freezing_by_hand(net, layers, names):
    batches = [toy_batch(seed=i) for i in range(3)]
    names, before = names or chosen_parameters(net, layers), copy.deepcopy(net.state_dict())
    want, strategy = reference(net, names, batches), FineTune(net, layers=layers)
    assert [n.removeprefix("net.") for n, _ in strategy.named_parameters()] == names and len(list(strategy.parameters())) == len(names)
    _loop(strategy, batches)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), want.state_dict().values()))
    assert all(p.requires_grad for p in net.parameters()) and all(p.grad is None for n, p in net.named_parameters() if n not in names)
    assert all(torch.equal(v, before[n]) != (n in names) for n, v in net.state_dict().items())


def test_last_means_last_in_use():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.ending, self.start, self.shared, self.scale = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Parameter(torch.ones(()))
            self.unused = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.ending(self.shared(self.start(self.shared(x)))) * self.scale

    assert layers_by_use(Odd()) == ["start", "shared", "ending", ""]
    assert chosen_parameters(Odd(), 2) == ["scale", "ending.weight", "ending.bias"]
    net = Odd().train()
    layers_by_use(net)
    assert net.training and not any(m._forward_hooks for m in net.modules())
    assert FineTune(Odd(), layers=1)(toy_batch()).requires_grad
    tied = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1))
    tied[2].weight = tied[0].weight
    assert chosen_parameters(tied, 1) == ["0.weight", "2.bias"]


def test_normalisation_of_a_frozen_part_keeps_its_statistics():
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(.5)), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, padding=1))
    strategy = FineTune(net, layers=2).train()
    _loop(strategy, [toy_batch(seed=i) for i in range(3)])
    assert net[0][1].num_batches_tracked == 0 and net[1].num_batches_tracked == 3 and not net[0].training and not net[0][2].training and net[1].training and net.training
    assert not strategy.eval().net[1].training
    FineTune(net).train()
    assert net[0][1].training


def test_nothing_frozen_is_supervised_bit_for_bit():
    batches = [toy_batch(seed=i) for i in range(4)]
    a, b = FineTune(ToyNet(), "charbonnier"), Supervised(ToyNet(), "charbonnier")
    _loop(a, batches), _loop(b, batches)
    assert all(torch.equal(x, y) for x, y in zip(a.net.parameters(), b.net.parameters())) and a.frozen == frozenset()


@pytest.mark.parametrize("options", [{"layers": 1}, {"layers": 2, "loss": "mse"}, {}], ids=str)
def test_contract_of_fine_tuning(options):
    contract(lambda net: FineTune(net, **options), reduced=FineTune, options=options, processes=False)


def test_the_training_loop_holds_the_chosen_parameters_only():
    class Pairs:
        batch = staticmethod(lambda step: toy_batch(seed=step))

    net = ToyNet()
    before, other = copy.deepcopy(net.state_dict()), ToyNet(seed=0)
    strategy = FineTune(net, layers=1)
    result = train(strategy, Pairs(), TrainConfig(steps=5, warmup=0, weight_decay=.1, log_every=5), device="cpu", progress=False)
    assert [torch.equal(v, before[n]) for n, v in net.state_dict().items()] == [True] * 4 + [False] * 2
    assert all(torch.equal(v, before[n]) for n, v in list(result.restorer.state_dict().items())[:4]) and list(other.state_dict()) == list(strategy.restorer().state_dict())


@pytest.mark.parametrize("layers, message", [(0, "layers.*3.*0"), (4, "layers.*3.*4"), (["tail.*"], "tail.*layers.0.weight"),
                                             ([], "nothing"), ("layers.2", "patterns.*'layers.2'"), (True, "patterns.*True")])
def test_bad_layers(layers, message):
    with pytest.raises(ValueError, match=message):
        FineTune(ToyNet(), layers=layers)


def test_layers_by_use_takes_the_example_given():
    assert layers_by_use(ToyNet(1), (1, 8, 8)) == ["layers.0", "layers.1", "layers.2"]
    assert FineTune(ToyNet(4), layers=1, example=(4, 8, 8)).frozen == {f"layers.{i}.{n}" for i in (0, 1) for n in ("weight", "bias")}
    with pytest.raises(RuntimeError):
        FineTune(ToyNet(1), layers=1)


# --- transfer

def test_transfer_says_what_it_left():
    source, target = build("EDSR", preset="tiny", upscale=1), build("EDSR", preset="tiny", upscale=4)
    before = copy.deepcopy(target.state_dict())
    left = transfer(target, source)
    for name, value in target.state_dict().items():
        assert torch.equal(value, before[name] if name in left else source.state_dict()[name])
    assert left and len(left) < len(before) and all(n not in source.state_dict() for n in left)
    assert transfer(ToyNet(seed=1), ToyNet(seed=2).state_dict()) == []
    assert transfer(ToyNet(3, 8), ToyNet(3, 4)) == ["layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias", "layers.2.weight"]  # shapes count
    net = ToyNet(3, 8)
    assert transfer(net, ToyNet(3, 8, seed=3)) == [] and torch.equal(net.layers[0].weight, ToyNet(3, 8, seed=3).layers[0].weight) and net.layers[0].weight.requires_grad
    with pytest.raises(ValueError, match="layers.0.weight.* 0.weight"):
        transfer(ToyNet(), nn.Sequential(nn.Linear(2, 2)))


def test_counted_cost():
    assert rcl_cost(1e6, 8, 2, 1) == pytest.approx(1 + (4 * 64 * 7 + 6 * 64 * 7 + 4 * 64 * 2 * 2 * 2 * 13) / (3 * 4 * 1e6))
    assert rcl_cost(1e12, 48, 16) < 1.0001 < rcl_cost(1e6, 48, 16)


# --- the probe and the tables

def test_agreement_by_loop():
    D, law, photo = torch.rand(12, 12, generator=g(), dtype=torch.float64), torch.arange(12) % 3, torch.arange(12) // 3
    D = D + D.T
    want = np.mean([law[min((j for j in range(12) if photo[j] != photo[i]), key=lambda j: D[i, j])] == law[i] for i in range(12)])
    assert agreement(D, law, photo).item() == pytest.approx(want)
    assert agreement((law[:, None] != law).double(), law, photo) == 1 and agreement((law[:, None] == law).double(), law, photo) == 0
    with pytest.raises(ValueError, match="agreement.*others"):
        agreement(D, law, torch.zeros(12))


def test_label_efficiency_tables(tmp_path):
    assert read_label_efficiency(tmp_path) == [] and label_efficiency([]) == {}
    for name, text in (("rcl_a", "task,strategy,labelled,seed,psnr\njdd,rcl,4,0,30\njdd,rcl,4,1,32\njdd,rcl,1,0,28.5\n"), ("other", "task\n1\n"), ("rcl_b", "task,strategy,labelled,seed,psnr\nsr4,rcl,4,0,25\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "label_efficiency.csv").write_text(text)
    table = label_efficiency(read_label_efficiency(tmp_path))
    assert list(table) == [("jdd", "rcl"), ("sr4", "rcl")] and list(table["jdd", "rcl"]) == [1, 4]
    assert table["jdd", "rcl"][4] == pytest.approx((31, math.sqrt(2), 2)) and table["jdd", "rcl"][1][0] == 28.5 and math.isnan(table["jdd", "rcl"][1][1])
    (tmp_path / "rcl_b" / "label_efficiency.csv").write_text("task,strategy,seed,psnr\nsr4,rcl,0,25\n")
    with pytest.raises(ValueError, match="rcl_b.*labelled"):
        read_label_efficiency(tmp_path)
