"""The self-supervised peers: masks, sub-samplings and features against slow references and scikit-image, what each loss is in closed form, noisy pictures only, refusals."""
import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from skimage.filters import gaussian
from skimage.restoration import calibrate_denoiser, denoise_invariant
from torch import nn

from irnb.networks import build
from irnb.strategies.rcl import RCL, crop_pairs, low_frequency_distance, nt_xent, partner_hits
from irnb.strategies.selfsupervised import (LowFrequency, Neighbor2Neighbor, Noise2Noise, Noise2Self, Noise2Void, SimCLR, at_spots, blind_spots, changed_views, cross_mean,
                                            grid_masked, j_invariant, masked_mse, neighbour_cells, pooled_features, random_neighbours, sub_sampled)
from irnb.strategies.strategy import ToyNet, _loop, contract, toy_batch
from irnb.degradations.blur import gaussian_blur
from tests.test_rcl import Fixed, NoisyOnly, noisy_batch

ALL = {"n2n": Noise2Noise, "noisier": lambda net, **o: Noise2Noise(net, extra=20, **o), "n2v": Noise2Void, "n2s": Noise2Self, "nb2nb": Neighbor2Neighbor, "simclr": SimCLR,
       "low": LowFrequency}


def g(seed=0):
    return torch.Generator().manual_seed(seed)


def two_views(seed=0, batch=4, size=24, channels=3):
    toy = toy_batch(batch, size, channels, seed)
    y = toy["clean"]
    return {"degraded": y + .1 * torch.randn(y.shape, generator=g(seed)), "degraded2": y + .1 * torch.randn(y.shape, generator=g(seed + 99)), "clean": y}


class Recorder(nn.Module):
    "The identity (scaled by a parameter that is 1) that remembers its inputs."

    def __init__(self):
        super().__init__()
        self.w, self.seen = nn.Parameter(torch.ones(())), []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return x * self.w


# --- all of them

@pytest.mark.parametrize("name", ALL)
def test_contract(name):
    assert len(contract(ALL[name], batches=[two_views(i) for i in range(6)], nets=[ToyNet], options={}, processes=False)) == 11


@pytest.mark.parametrize("name", ["n2s", "nb2nb", "simclr"])
def test_contract_with_nafnet(name):
    from irnb.strategies.strategy import _toy_nafnet
    contract(ALL[name], batches=[two_views(i) for i in range(6)], nets=[_toy_nafnet], options={}, processes=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["n2s", "simclr"])
def test_two_processes(name):
    contract(ALL[name], batches=[two_views(i, batch=8) for i in range(6)], nets=[ToyNet], same_as_one=False)


@pytest.mark.parametrize("name", ALL)
def test_clean_pictures_are_never_read(name):
    strategy, batch = ALL[name](ToyNet()), two_views()
    value = strategy(NoisyOnly(batch)).item()
    del batch["clean"]
    assert value == ALL[name](ToyNet())(batch).item() and "clean" not in strategy.needs
    assert strategy.restorer() is strategy.net and "task_loss" in strategy.logs


@pytest.mark.parametrize("name", [n for n in ALL if n not in ("low", "n2n")])
def test_draws_are_the_seeds_and_change_from_step_to_step(name):
    batch = two_views()
    values = []
    for seed in (0, 0, 1):
        strategy = ALL[name](ToyNet(), seed=seed)
        row = []
        for _ in range(4):
            row.append(strategy(batch).item())
            strategy.after_step()
        values.append(row)
    assert values[0] == values[1] and len(set(values[0])) > 2 and values[0] != values[2]


@pytest.mark.parametrize("name", ["n2n", "n2v", "n2s", "nb2nb"])
def test_the_regressing_ones_denoise_without_a_clean_picture(name):
    strategy = ALL[name](ToyNet(1, 16))
    opt = torch.optim.Adam(strategy.parameters(), lr=3e-3)
    for i in range(150):
        opt.zero_grad()
        strategy(two_views(i, 8, 32, 1)).backward()
        opt.step()
        strategy.after_step()
    held = two_views(1000, 8, 32, 1)
    with torch.no_grad():
        restored = j_invariant(strategy.net, held["degraded"]) if name == "n2s" else strategy.net(held["degraded"])  # trained on masked inputs, it wants them
        error = (restored - held["clean"]).square().mean().item()
    assert error < .6 * .01, error


@pytest.mark.parametrize("name", ["n2n", "n2v", "n2s", "nb2nb", "low"])
def test_other_shapes_are_refused(name):
    with pytest.raises(ValueError, match="scale 1"):
        ALL[name](nn.Sequential(nn.Conv2d(3, 3, 1), nn.Upsample(scale_factor=2)))(two_views())


@pytest.mark.parametrize("name", ["n2v", "n2s", "nb2nb", "low", "simclr"])
def test_a_packed_mosaic_is_a_picture_of_four_channels(name):
    options = {"example": (4, 16, 16)} if name == "simclr" else {}
    x = {"degraded": torch.rand(3, 4, 24, 18, generator=g())}
    losses, _ = _loop(ALL[name](ToyNet(4), **options), [x] * 3)
    assert all(map(math.isfinite, losses))


# --- Noise2Noise

def test_noise2noise_is_supervised_plus_the_noise():
    y = torch.full((1, 1, 500, 500), .5, dtype=torch.float64)
    x = {k: y + .1 * torch.randn(y.shape, generator=g(i), dtype=torch.float64) for i, k in enumerate(("degraded", "degraded2"))}
    for f, error in ((lambda v: torch.full_like(v, .7), .04), (lambda v: .5 + .3 * (v - .5), .0009), (lambda v: v, .01)):
        assert Noise2Noise(Fixed(f).double())(x).item() == pytest.approx(error + .01, rel=.02)


def test_the_noisier_view_is_the_input_and_the_given_one_the_target():
    net, x = Recorder(), torch.rand(2, 3, 200, 200, generator=g())
    strategy = Noise2Noise(net, extra=30)
    value = strategy({"degraded": x})
    added = net.seen[0] - x
    assert added.std().item() == pytest.approx(30 / 255, rel=.02) and abs(added.mean().item()) < 2e-3
    torch.testing.assert_close(value, added.square().mean())
    assert Noise2Noise(ToyNet(), "l1", extra=30)({"degraded": x}).item() != Noise2Noise(ToyNet(), extra=30)({"degraded": x}).item()


@pytest.mark.parametrize("extra", [0, -5, "10", math.nan, True])
def test_bad_extra(extra):
    with pytest.raises(ValueError, match="extra"):
        Noise2Noise(ToyNet(), extra=extra)


def test_the_second_view_is_asked_for():
    with pytest.raises(ValueError, match="Noise2Noise.*degraded2"):
        Noise2Noise(ToyNet())({"degraded": torch.rand(1, 3, 8, 8)})


# --- Noise2Void

@settings(deadline=None, max_examples=20)
@given(b=st.integers(1, 4), h=st.integers(1, 20), w=st.integers(1, 20), share=st.floats(1e-4, 1), seed=st.integers(0, 99))
def test_blind_spots_are_distinct_and_as_many_in_every_picture(b, h, w, share, seed):
    spots = blind_spots((b, 3, h, w), share, generator=g(seed))
    assert spots.shape == (b, max(1, round(share * h * w)))
    assert all(len(set(row)) == len(row) and 0 <= min(row) and max(row) < h * w for row in spots.tolist())


def test_blind_spots_are_uniform():
    counts = torch.bincount(blind_spots((4000, 1, 6, 5), .1, generator=g()).flatten(), minlength=30)
    assert counts.min() > 330 and counts.max() < 470


@settings(deadline=None, max_examples=20)
@given(h=st.integers(5, 12), w=st.integers(5, 12), radius=st.integers(1, 2), seed=st.integers(0, 99))
def test_neighbours_are_others_of_a_window_inside(h, w, radius, seed):
    spots = torch.arange(h * w).repeat(2, 1)
    near = random_neighbours(spots, (h, w), radius, generator=g(seed))
    rows, columns = (near // w - spots // w).abs(), (near % w - spots % w).abs()
    assert (near != spots).all() and near.min() >= 0 and near.max() < h * w
    inner = ((spots // w >= radius) & (spots // w < h - radius) & (spots % w >= radius) & (spots % w < w - radius))
    assert (torch.maximum(rows, columns)[inner] <= radius).all() and torch.maximum(rows, columns).max() <= 2 * radius


def test_neighbours_are_uniform():
    near = random_neighbours(torch.full((1, 24000), 5 * 11 + 5), (11, 11), 2, generator=g())
    counts = torch.bincount(near.flatten(), minlength=121).view(11, 11)
    window = counts[3:8, 3:8]
    assert counts.sum() == window.sum() and window[2, 2] == 0 and window.flatten()[torch.arange(25) != 12].min() > 860 and window.max() < 1140


def test_noise2void_hides_and_measures_the_same_pixels():
    net, x = Recorder(), torch.rand(3, 2, 20, 20, generator=g())
    strategy = Noise2Void(net, share=.05)
    value = strategy({"degraded": x})
    changed = (net.seen[0] != x)
    assert torch.equal(changed.any(1), changed.all(1)) and changed.any(1).flatten(1).sum(1).tolist() == [20] * 3  # both channels together
    torch.testing.assert_close(value, (net.seen[0] - x)[changed].square().mean())
    for i in range(3):
        hidden = changed[i, 0].nonzero()
        for r, c in hidden.tolist():
            window = x[i, :, max(0, min(r - 2, 15)):max(0, min(r - 2, 15)) + 5, max(0, min(c - 2, 15)):max(0, min(c - 2, 15)) + 5].flatten(1)
            assert (window == net.seen[0][i, :, r, c, None]).all(0).any()  # a colour of the window, all channels from one pixel


def test_noise2void_of_the_identity_pays_twice_the_variance():
    x = .5 + .1 * torch.randn(4, 1, 128, 128, generator=g())
    assert Noise2Void(Fixed(lambda v: v), share=.1)({"degraded": x}).item() == pytest.approx(.02, rel=.08)
    assert Noise2Void(Fixed(lambda v: torch.full_like(v, .5)), share=.1)({"degraded": x}).item() == pytest.approx(.01, rel=.08)


@pytest.mark.parametrize("options, message", [({"share": 0}, "share"), ({"share": 1.}, "share"),
                                              ({"share": "1e-2"}, "share.*1.0e-3"), ({"radius": 0}, "radius"), ({"radius": 1.5}, "radius")])
def test_bad_noise2void(options, message):
    with pytest.raises(ValueError, match=message):
        Noise2Void(ToyNet(), **options)


def test_pictures_smaller_than_the_window_are_refused():
    with pytest.raises(ValueError, match="4x9"):
        Noise2Void(ToyNet())({"degraded": torch.rand(1, 3, 4, 9)})
    with pytest.raises(ValueError, match="radius 0"):
        random_neighbours(torch.zeros(1, 1, dtype=torch.int64), (9, 9), 0, generator=g())


# --- Noise2Self

FUNCTIONS = {"blur": (lambda v: gaussian_blur(v, 1.2, 31), lambda im, **kw: gaussian(im, sigma=1.2, mode="nearest", truncate=12.6)),
             "identity": (lambda v: v, lambda im, **kw: im), "square": (lambda v: v ** 2 + .1 * v.flip(-1), lambda im, **kw: im ** 2 + .1 * im[:, ::-1])}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("h, w, stride", [(20, 24, 4), (19, 13, 4), (12, 10, 3)])
def test_against_scikit_image(name, h, w, stride):
    ours, theirs = FUNCTIONS[name]
    x = torch.rand(1, 1, h, w, generator=g(), dtype=torch.float64)
    np.testing.assert_allclose(j_invariant(ours, x, stride)[0, 0].numpy(), denoise_invariant(x[0, 0].numpy(), theirs, stride=stride), atol=1e-9)


def test_colour_pictures_against_scikit_image():
    x = torch.rand(1, 3, 16, 18, generator=g(), dtype=torch.float64)
    theirs = denoise_invariant(x[0].permute(1, 2, 0).numpy(), lambda im, **kw: im ** 2, stride=4, denoiser_kwargs={"channel_axis": -1})
    np.testing.assert_allclose(j_invariant(lambda v: v ** 2, x)[0].permute(1, 2, 0).numpy(), theirs, atol=1e-12)


def test_the_same_parameter_is_chosen_as_by_scikit_image():
    y = toy_batch(1, 48, 1)["clean"].double()
    x, sigmas = y + .15 * torch.randn(y.shape, generator=g(), dtype=torch.float64), [.4, .8, 1.2, 1.6, 2.4, 3.6]
    _, (tested, losses) = calibrate_denoiser(x[0, 0].numpy(), lambda im, sigma=1., **kw: gaussian(im, sigma=sigma, mode="nearest", truncate=30 / sigma), {"sigma": sigmas}, stride=4,
                                             approximate_loss=False, extra_output=True)
    ours = [masked_mse(lambda v: gaussian_blur(v, s, 61), x).item() for s in sigmas]
    np.testing.assert_allclose(ours, losses, rtol=1e-6)
    assert [t["sigma"] for t in tested] == sigmas and 0 < int(np.argmin(ours)) < 5


@pytest.mark.parametrize("phase", [0, 6, 15])
def test_the_masked_pixels_are_not_seen(phase):
    x = torch.rand(1, 1, 12, 12, generator=g(), dtype=torch.float64, requires_grad=True)
    row, column = divmod(phase, 4)
    gaussian_blur(grid_masked(x, phase), 2., 13)[..., row::4, column::4].sum().backward()
    assert not x.grad[..., row::4, column::4].any() and x.grad.abs().sum() > 0
    masked = grid_masked(x, phase)
    changed = masked != x
    assert changed.sum() == 9 and changed[..., row::4, column::4].all() and torch.equal(masked[changed], cross_mean(x)[changed])


def test_cross_mean_by_hand():
    x = torch.arange(9.).view(1, 1, 3, 3)
    assert cross_mean(x)[0, 0].tolist() == [[2, 2.5, 3], [3.5, 4, 4.5], [5, 5.5, 6]]
    with pytest.raises(ValueError, match=r"\(1, 5\)"):
        cross_mean(torch.rand(1, 1, 1, 5))


def test_noise2self_loss_is_error_plus_noise_for_functions_that_do_not_see():
    y = .5 + .3 * torch.sin(torch.arange(400.) / 40).view(1, 1, 1, 400).expand(1, 1, 400, 400)
    x = y + .1 * torch.randn(y.shape, generator=g())
    strategy = Noise2Self(Fixed(lambda v: gaussian_blur(v, 1.5, 13)))
    value, (row, column) = strategy({"degraded": x}).item(), divmod(int(torch.randint(16, (), generator=Noise2Self(ToyNet()).generator())), 4)
    error = (gaussian_blur(grid_masked(x, 4 * row + column), 1.5, 13) - y)[..., row::4, column::4].square().mean().item()
    assert value == pytest.approx(error + .01, rel=.04) and masked_mse(Fixed(lambda v: v), x).item() == pytest.approx(.01 * 1.25, rel=.03)


def test_all_phases_are_drawn():
    x, seen = torch.rand(1, 1, 16, 16, generator=g()), set()
    strategy = Noise2Self(Recorder())
    for _ in range(150):
        strategy({"degraded": x})
        strategy.after_step()
        seen.add(tuple((strategy.net.seen[-1] != x)[0, 0].nonzero()[0].tolist()))
    assert len(seen) == 16


@pytest.mark.parametrize("stride", [1, 0, 2.0, True])
def test_bad_stride(stride):
    with pytest.raises(ValueError, match="stride"):
        Noise2Self(ToyNet(), stride=stride)


def test_pictures_smaller_than_the_grid_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 8\).*4"):
        Noise2Self(ToyNet())({"degraded": torch.rand(1, 3, 3, 8)})


# --- Neighbor2Neighbor

@settings(deadline=None, max_examples=15)
@given(h=st.integers(2, 9), w=st.integers(2, 9), seed=st.integers(0, 99))
def test_sub_sampling_by_loop(h, w, seed):
    x, cells = torch.rand(2, 3, h, w, generator=g(seed)), neighbour_cells((2, 3, h, w), generator=g(seed))
    for which in cells:
        got = sub_sampled(x, which)
        assert got.shape == (2, 3, h // 2, w // 2)
        for b, i, j in np.ndindex(2, h // 2, w // 2):
            r, c = divmod(int(which[b, i, j]), 2)
            assert torch.equal(got[b, :, i, j], x[b, :, 2 * i + r, 2 * j + c])


def test_pairs_are_adjacent_and_all_eight_equally_likely():
    one, two = neighbour_cells((1, 1, 400, 400), generator=g())
    pairs = torch.bincount((4 * one + two).flatten(), minlength=16)
    assert sorted(pairs.nonzero().flatten().tolist()) == sorted(4 * a + b for a, b in ((0, 1), (1, 0), (0, 2), (2, 0), (1, 3), (3, 1), (2, 3), (3, 2)))
    assert pairs[pairs > 0].min() > 4700 and pairs.max() < 5300


@pytest.mark.parametrize("gamma", [0, 1.0, 2.0])
def test_neighbour_loss_and_its_gradient_by_hand(gamma):
    x, net = torch.rand(2, 3, 15, 12, generator=g()), ToyNet()
    strategy = Neighbor2Neighbor(net, gamma=gamma)
    value = strategy({"degraded": x})
    value.backward()
    got = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    one, two = neighbour_cells(x.shape, generator=Neighbor2Neighbor(net).generator())
    out, whole = net(sub_sampled(x, one)), net(x).detach()
    difference = out - sub_sampled(x, two)
    want = difference.square().mean() + gamma * (difference - sub_sampled(whole, one) + sub_sampled(whole, two)).square().mean()
    torch.testing.assert_close(value, want)
    want.backward()
    for a, p in zip(got, net.parameters()):
        torch.testing.assert_close(a, p.grad)
    torch.testing.assert_close(strategy.logs["task_loss"], difference.detach().square().mean())


def test_the_correction_vanishes_where_restoring_commutes():
    x = torch.rand(2, 1, 16, 16, generator=g())
    strategy, net = Neighbor2Neighbor(Fixed(lambda v: v)), Recorder()
    strategy({"degraded": x})
    assert strategy.logs["correction"].item() < 1e-12 and strategy.logs["task_loss"] > .05
    Neighbor2Neighbor(net, gamma=0)({"degraded": x})
    assert [s.shape[-1] for s in net.seen] == [8]
    Neighbor2Neighbor(net)({"degraded": x})
    assert [s.shape[-1] for s in net.seen] == [8, 8, 16]


def test_bad_neighbours():
    with pytest.raises(ValueError, match="gamma"):
        Neighbor2Neighbor(ToyNet(), gamma=-1)
    with pytest.raises(ValueError, match=r"\(1, 8\)"):
        Neighbor2Neighbor(ToyNet())({"degraded": torch.rand(1, 3, 1, 8)})


# --- SimCLR

def test_features_of_any_network():
    x, net = torch.rand(2, 3, 16, 16, generator=g()), ToyNet()
    h = x
    for layer in net.layers[:-1]:
        h = nn.functional.leaky_relu(layer(h), .2)
    features, out = pooled_features(net, x, "layers.2", inside=True)
    torch.testing.assert_close(features, h.mean((2, 3)))
    assert torch.equal(out, net(x)) and SimCLR(net).layer == "layers.2" and SimCLR(net).inside
    torch.testing.assert_close(pooled_features(net, x, "layers.0")[0], net.layers[0](x).mean((2, 3)))
    torch.testing.assert_close(pooled_features(net, x)[0], net(x).mean((2, 3)))
    single = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1))
    assert SimCLR(single).layer is None and SimCLR(single)(two_views()).requires_grad
    assert SimCLR(build("NAFNet", preset="tiny")).layer == "ending" and SimCLR(net, layer="layers.0").projection[0].in_features == 8
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_tokens_and_vectors_are_features_too():
    class Tokens(nn.Module):
        def __init__(self, end):
            super().__init__()
            self.a, self.end = nn.Conv2d(3, 5, 1), end

        def forward(self, x):
            return self.end(self.a(x))

    x = torch.rand(2, 3, 4, 4, generator=g())
    tokens = Tokens(lambda h: h.flatten(2).mT)
    torch.testing.assert_close(pooled_features(tokens, x)[0], tokens.a(x).mean((2, 3)))
    vector = Tokens(lambda h: h.mean((2, 3)))
    torch.testing.assert_close(pooled_features(vector, x)[0], vector.a(x).mean((2, 3)))


def test_hooks_go_even_when_the_network_fails():
    class Broken(ToyNet):
        def forward(self, x):
            super().forward(x)
            raise RuntimeError("broken")

    net = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        pooled_features(net, torch.rand(1, 3, 8, 8), "layers.1")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_layers_that_give_nothing_are_refused():
    net = ToyNet()
    net.spare = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match="'spare'.*used"):
        SimCLR(net, layer="spare")
    with pytest.raises(AttributeError):
        SimCLR(net, layer="none")

    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.c = Pair(), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.c(self.pair(x)[0])

    with pytest.raises(ValueError, match="'pair'.*tensor"):
        SimCLR(Outer(), layer="pair")


def test_loss_of_image_discrimination_by_hand():
    batch, net = two_views(), ToyNet()
    strategy = SimCLR(net, tau=.3, w_contrast=.7, w_consistency=2, sigma=1.5, crop=10, jitter=.1, overlap=False)
    value, generator = strategy(batch), SimCLR(net).generator()
    views = changed_views(crop_pairs(batch["degraded"], 10, generator=generator), .1, generator=generator)
    features, restored = pooled_features(net, views, "layers.2", True)
    z = strategy.projection(features)
    D = torch.stack([1 - torch.cosine_similarity(z, row[None]) for row in z])
    torch.testing.assert_close(value, .7 * nt_xent(D, .3) + 2 * low_frequency_distance(restored, views, 1.5))
    torch.testing.assert_close(strategy.logs["hits"], partner_hits(D))
    assert torch.equal(strategy.logs["task_loss"], value.detach())


def test_projection_is_seeded_and_the_global_generator_left():
    net, before = ToyNet(), torch.get_rng_state()
    a, b, c = (SimCLR(net, seed=s).projection[0].weight for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(before, torch.get_rng_state())


def test_without_the_low_frequencies_the_last_layer_learns_nothing():
    for weight, moved in ((0, False), (1, True)):
        strategy = SimCLR(ToyNet(), w_consistency=weight)
        strategy(two_views()).backward()
        grads = [p.grad is not None and bool(p.grad.any()) for p in strategy.net.parameters()]
        assert grads == [True] * 4 + [moved] * 2


def test_views_are_flips_and_brightness():
    x = torch.rand(400, 1, 5, 6, generator=g())
    views = changed_views(x, .2, generator=g(1))
    gain, flips = (views.mean((1, 2, 3)) / x.mean((1, 2, 3))), []
    assert .8 <= gain.min() < .83 and 1.17 < gain.max() <= 1.2
    for v, y, k in zip(views, x, gain):
        matches = [torch.allclose(v / k, f, atol=1e-5) for f in (y, y.flip(-1), y.flip(-2), y.flip(-1, -2))]
        assert sum(matches) == 1
        flips.append(matches.index(True))
    assert all(70 < flips.count(i) < 130 for i in range(4))
    assert torch.equal(changed_views(x, 0, generator=g(1)).flatten(1).sort(1).values, x.flatten(1).sort(1).values)


@pytest.mark.parametrize("options", [{"tau": 0}, {"w_contrast": -1}, {"sigma": 0}, {"jitter": 1.}, {"jitter": -.1}, {"w_consistency": "1"}])
def test_bad_image_discrimination(options):
    with pytest.raises(ValueError, match=f"SimCLR: {next(iter(options))}"):
        SimCLR(ToyNet(), **options)


def test_one_picture_has_no_negatives():
    with pytest.raises(ValueError, match="negatives.*accumulate"):
        SimCLR(ToyNet())({"degraded": torch.rand(1, 3, 24, 24)})


# --- low frequencies

def test_low_frequencies_are_rcl_without_contrast():
    batches = [noisy_batch(i) for i in range(3)]
    rcl, low = RCL(ToyNet(), w_contrast=0), LowFrequency(ToyNet())
    opts = [torch.optim.SGD(s.parameters(), lr=.1) for s in (rcl, low)]
    for b in batches:
        source = RCL(ToyNet())
        source.step = rcl.step
        crop = {"degraded": crop_pairs(b["degraded"], generator=source.generator())}
        for strategy, batch, opt in ((rcl, b, opts[0]), (low, crop, opts[1])):
            opt.zero_grad()
            strategy(batch).backward()
            opt.step()
            strategy.after_step()
    assert all(torch.equal(a, b) for a, b in zip(rcl.net.parameters(), low.net.parameters()))


@pytest.mark.parametrize("options", [{"weight": 0}, {"sigma": -1.}])
def test_bad_low_frequencies(options):
    with pytest.raises(ValueError, match="LowFrequency"):
        LowFrequency(ToyNet(), **options)


def test_strategies_copy_with_their_network():
    strategy = SimCLR(ToyNet())
    other = copy.deepcopy(strategy)
    assert other.net is not strategy.net and other(two_views()).item() == SimCLR(ToyNet())(two_views()).item()
    assert at_spots(torch.arange(6.).view(1, 1, 2, 3), torch.tensor([[4, 0]])).flatten().tolist() == [4, 0]
