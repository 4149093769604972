"""The diffusion parts: the schedule against Bayes' rule, denoisers against their published layout and a slow reference, and the error as a judge of the condition."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import integrate, stats
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from irnb.strategies.diffusion import (DENOISERS, LEVELS, GuidedUNet, LinearGammaSchedule, TinyUNet, _Attention, _Block, _dropout, _Norm, initialise, level_embedding,
                                       noise_error, noise_level, pick_denoiser, predict_noise, takes_generator)
from tests.nets import awake

EXACT = LinearGammaSchedule(dtype=torch.float64)
SMALL = {"name": "tiny", "base": 4, "embedding": 8}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- the schedule

def test_gammas_against_exact_fractions():
    from fractions import Fraction
    betas = [float(b) for b in torch.linspace(1e-6, 1e-2, 1000, dtype=torch.float64)]
    product, exact = Fraction(1), {}
    for i, b in enumerate(betas):
        product *= 1 - Fraction(b)
        product = Fraction(round(product * 10**40), 10**40)  # 40 digits are plenty
        exact[i] = float(product)
    np.testing.assert_allclose(EXACT.gammas.numpy(), list(exact.values()), rtol=1e-12)


def test_published_reference_points():
    points = {0: .999999, 99: .951552, 250: .730120, 500: .284726, 750: .059212, 899: .017210, 999: .00662264}
    for schedule, tolerance in ((EXACT, 0), (LinearGammaSchedule(), 2e-7)):
        for index, value in points.items():
            assert schedule.gammas[index].item() == pytest.approx(value, abs=5.1e-7 + tolerance)
    assert EXACT.gammas[0].item() == 1 - 1e-6 and EXACT.gammas[999].item() == pytest.approx(.00662264, rel=1e-6)
    assert (EXACT.gammas > .73).sum() == pytest.approx(250, abs=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gamma_falls_strictly(dtype):
    gammas = LinearGammaSchedule(dtype=dtype).gammas
    assert gammas.dtype == dtype and (gammas[1:] < gammas[:-1]).all() and gammas.max() < 1 and gammas.min() > 0


@settings(deadline=None, max_examples=60)
@given(t=st.integers(1, 999), u=st.floats(0, 1, exclude_max=True))
def test_sampled_level_lies_between_its_neighbours(t, u):
    for schedule in (EXACT, LinearGammaSchedule()):
        g = schedule.sample(1, t=torch.tensor([t]), u=torch.tensor([u], dtype=torch.float64)).item()
        low, high = schedule.gammas[t].item(), schedule.gammas[t - 1].item()
        assert low <= g <= high
        assert (high - g) / (high - low) == pytest.approx(u, abs=1e-9 if schedule is EXACT else .1)


def test_levels_are_uniform_over_steps_and_within_them():
    g = EXACT.sample(200_000, generator=torch.Generator().manual_seed(0)).numpy()
    assert g.min() > EXACT.gammas[999] - 1e-12 and g.max() <= EXACT.gammas[0]
    edges = EXACT.gammas.numpy()[::-1]
    place = np.searchsorted(edges, g)  # 1..999 from the noisy end
    counts = np.bincount(place, minlength=1000)[1:1000]
    assert stats.chisquare(counts).pvalue > 1e-3 and len(counts) == 999
    inside = (g - edges[place - 1]) / (edges[place] - edges[place - 1])
    assert stats.kstest(inside, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("low, high", [(1, 100), (900, 999), (500, 500)])
def test_a_restricted_range_stays_inside_and_reaches_both_ends(low, high):
    g = EXACT.sample(20_000, low, high, generator=torch.Generator().manual_seed(1))
    assert g.max() <= EXACT.gammas[low - 1] and g.min() >= EXACT.gammas[high]
    span = EXACT.gammas[low - 1] - EXACT.gammas[high]
    assert EXACT.gammas[low - 1] - g.max() < .02 * span and g.min() - EXACT.gammas[high] < .02 * span


@pytest.mark.parametrize("low, high", [(0, 9), (5, 4), (1, 1000), (-3, 4), (1.5, 9), ("1", 9)])
def test_bad_ranges_are_refused(low, high):
    with pytest.raises(ValueError, match=f"t_min.*t_max.*999.*{low}.*{high}"):
        EXACT.sample(2, low, high, generator=torch.Generator())


@pytest.mark.parametrize("bad", [dict(T=1), dict(beta_start=0.), dict(beta_end=1.), dict(beta_start=.5, beta_end=.1)])
def test_bad_schedules_are_refused(bad):
    with pytest.raises(ValueError, match="LinearGammaSchedule"):
        LinearGammaSchedule(**bad)


def test_draws_need_a_generator():
    for given_ in ({}, {"t": torch.tensor([3])}, {"u": torch.tensor([.3])}):
        with pytest.raises(ValueError, match="generator"):
            EXACT.sample(1, **given_)


def test_the_schedule_has_nothing_to_save_and_follows_moves():
    schedule = LinearGammaSchedule()
    assert not schedule.state_dict() and schedule.to(torch.float64).gammas.dtype == torch.float64


def test_mixing_is_linear_and_has_the_right_ends():
    x, y, e, f = (normal(3, 2, 4, 4, seed=i) for i in range(4))
    gamma = torch.tensor([0., .3, 1.], dtype=torch.float64)
    q = EXACT.q_sample
    assert torch.equal(q(x, gamma, e)[2], x[2]) and torch.equal(q(x, gamma, e)[0], e[0])
    torch.testing.assert_close(q(2 * x + 3 * y, gamma, 2 * e + 3 * f), 2 * q(x, gamma, e) + 3 * q(y, gamma, f))
    torch.testing.assert_close(EXACT.estimate(q(x, gamma, e)[1:], gamma[1:], e[1:]), x[1:])


def test_mixing_keeps_unit_variance():
    x, e = normal(1000, 1, 10, 10, seed=1), normal(1000, 1, 10, 10, seed=2)
    for gamma in (.01, .5, .99):
        assert EXACT.q_sample(x, torch.full((1000,), gamma), e).var().item() == pytest.approx(1, abs=.02)


def test_low_noise_survives_half_precision_inputs():
    x, e = torch.zeros(1, 1, 8, 8, dtype=torch.bfloat16), normal(1, 1, 8, 8, dtype=torch.float32)
    noised = LinearGammaSchedule().q_sample(x, torch.tensor([.999999]), e)
    assert noised.dtype == torch.float32 and (noised / e).mean().item() == pytest.approx(1e-3, rel=.05)


@pytest.mark.parametrize("t", [1, 2, 100, 500, 999])
def test_posterior_is_bayes_rule_by_numeric_integration(t):
    "p(y_{t-1} | y_t, x0) from the forward transition and the marginal, integrated on a line."
    before, now, x0 = EXACT.gammas[t - 1].item(), EXACT.gammas[t].item(), .7
    alpha, y = now / before, math.sqrt(now) * x0 + .5 * math.sqrt(1 - now)
    density = lambda v: stats.norm.pdf(y, math.sqrt(alpha) * v, math.sqrt(1 - alpha)) * stats.norm.pdf(v, math.sqrt(before) * x0, math.sqrt(1 - before))
    mean, log_variance = (v.item() for v in EXACT.posterior(torch.full((1, 1, 1, 1), x0, dtype=torch.float64), torch.full((1, 1, 1, 1), y, dtype=torch.float64), torch.tensor([t])))
    width = math.exp(log_variance / 2)
    moments = [integrate.quad(lambda s: s**k * density(mean + s * width), -12, 12, points=[0], limit=200)[0] for k in range(3)]  # in units of the claimed deviation
    first, second = moments[1] / moments[0], moments[2] / moments[0]
    assert first == pytest.approx(0, abs=1e-4) and second - first**2 == pytest.approx(1, rel=1e-4)


def test_posterior_identities():
    before = torch.cat([torch.ones(1, dtype=torch.float64), EXACT.gammas[:-1]])
    torch.testing.assert_close(EXACT.coef_clean + EXACT.coef_noisy * EXACT.gammas.sqrt(), before.sqrt(), rtol=1e-9, atol=1e-9)
    assert EXACT.log_variance[0].item() == math.log(1e-20)
    mean, _ = EXACT.posterior(normal(1, 3, 2, 2), normal(1, 3, 2, 2, seed=1), torch.tensor([0]))
    torch.testing.assert_close(mean, normal(1, 3, 2, 2), rtol=1e-9, atol=1e-9)  # before the first step there is the picture itself


# --- the level

def test_levels():
    g = torch.tensor([.2, .5, .9], dtype=torch.float64)
    assert torch.equal(noise_level(g), g)
    np.testing.assert_allclose(noise_level(g, "logsnr").numpy(), np.log(g.numpy() / (1 - g.numpy())), rtol=1e-12)
    with pytest.raises(ValueError, match="logsnr.*'snr'"):
        noise_level(g, "snr")


@pytest.mark.parametrize("dim", [2, 16, 64])
def test_embedding_by_a_loop(dim):
    levels = torch.tensor([.01, .5, .999], dtype=torch.float64)
    half = dim // 2
    want = [[math.cos(v * math.exp(-math.log(1e4) * k / half)) for k in range(half)] + [math.sin(v * math.exp(-math.log(1e4) * k / half)) for k in range(half)] for v in levels.tolist()]
    np.testing.assert_allclose(level_embedding(levels, dim).numpy(), want, rtol=1e-12, atol=1e-15)


# --- denoisers

def test_the_released_layout_and_its_cost():
    with torch.device("meta"):
        net = GuidedUNet().eval()
        x, level = torch.empty(1, 9, 128, 128), torch.empty(1)
    assert sum(p.numel() for p in net.parameters()) == 62_643_075
    with FlopCounterMode(display=False) as counter:
        assert net(x, level).shape == (1, 3, 128, 128)
    assert counter.get_total_flops() / 2e9 == pytest.approx(51.4, abs=.15)
    convolutions = [tuple(m.weight.shape) for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert convolutions[0] == (64, 9, 3, 3) and convolutions[-1] == (3, 64, 3, 3)
    attentions = [m for m in net.modules() if isinstance(m, _Attention)]
    assert len(attentions) == 1 and attentions[0].heads == 16 and attentions[0].qkv.in_channels == 512
    blocks = [m for m in net.modules() if isinstance(m, _Block)]
    assert len(blocks) == 8 + 3 + 2 + 12 + 3 and all(b.dropout == .2 and b.norm1.num_groups == 32 for b in blocks)
    assert [b.resize for b in net.downs] == ["", "", "down"] * 3 + ["", ""] and [len(s) for s in net.ups] == [1, 1, 2] * 3 + [1, 1, 1]


def test_decoder_takes_the_stored_features_in_reverse():
    "Widths of what each decoder block takes: decoder feature first, then the newest stored one."
    with torch.device("meta"):
        net = GuidedUNet()
    stored = [64, 64, 64, 64, 128, 128, 128, 256, 256, 256, 512, 512]
    now = 512
    for stage, skip in zip(net.ups, stored[::-1], strict=True):
        assert stage[0].norm1.num_channels == now + skip
        now = stage[0].conv2.out_channels


def slow_norm(x, norm):
    b, c, h, w = x.shape
    out = torch.empty_like(x)
    size = c // norm.num_groups
    for i in range(b):
        for g in range(norm.num_groups):
            part = x[i, g * size:(g + 1) * size]
            part = (part - part.mean()) / (part.var(unbiased=False) + norm.eps).sqrt()
            out[i, g * size:(g + 1) * size] = part * norm.weight[g * size:(g + 1) * size, None, None] + norm.bias[g * size:(g + 1) * size, None, None]
    return out


def slow_conv(x, conv):
    return F.conv2d(x, conv.weight, conv.bias, padding=conv.weight.shape[-1] // 2)


def slow_resize(x, how):
    if how == "down":
        return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    return x.repeat_interleave(2, -1).repeat_interleave(2, -2) if how == "up" else x


def silu(x):
    return x / (1 + (-x).exp())


def slow_block(block, x, emb):
    h = slow_conv(slow_resize(silu(slow_norm(x, block.norm1)), block.resize), block.conv1)
    both = silu(emb) @ block.level.weight.T + block.level.bias
    half = both.shape[1] // 2
    h = slow_norm(h, block.norm2) * (1 + both[:, :half, None, None]) + both[:, half:, None, None]
    skip = slow_resize(x, block.resize)
    return (skip if isinstance(block.skip, nn.Identity) else slow_conv(skip, block.skip)) + slow_conv(silu(h), block.conv2)


def slow_attention(layer, x):
    b, c, h, w = x.shape
    d, flat, out = c // layer.heads, slow_norm(x, layer.norm).reshape(b, c, h * w), torch.zeros(b, c, h * w, dtype=x.dtype)
    for i in range(b):
        mixed = layer.qkv.weight[:, :, 0] @ flat[i] + layer.qkv.bias[:, None]
        for head in range(layer.heads):
            rows = mixed[3 * d * head:3 * d * (head + 1)]
            q, k, v = rows[:d] * d**-.25, rows[d:2 * d] * d**-.25, rows[2 * d:]
            for place in range(h * w):
                scores = torch.stack([q[:, place] @ k[:, other] for other in range(h * w)]).exp()
                out[i, head * d:(head + 1) * d, place] = (v * (scores / scores.sum())).sum(1)
    return x + (layer.proj.weight[:, :, 0] @ out + layer.proj.bias[:, None]).reshape(b, c, h, w)


@pytest.mark.parametrize("resize", ["", "down", "up"])
@pytest.mark.parametrize("inputs, outputs", [(8, 8), (8, 12)])
def test_block_equals_a_slow_reference(inputs, outputs, resize):
    block = awake(_Block(inputs, outputs, 10, 4, resize=resize).double(), .5)
    x, emb = normal(2, inputs, 4, 6), normal(2, 10, seed=1)
    torch.testing.assert_close(block(x, emb), slow_block(block, x, emb), rtol=1e-9, atol=1e-9)


def test_attention_equals_a_loop():
    layer = awake(_Attention(12, 4, 4).double(), .5)
    x = normal(2, 12, 2, 3)
    torch.testing.assert_close(layer(x), slow_attention(layer, x), rtol=1e-9, atol=1e-9)
    assert (layer(x) - x).abs().max() > .1


def test_guided_unet_equals_a_slow_reference():
    net = awake(GuidedUNet(base=8, mults=(1, 2), blocks=1, groups=4, head_channels=8, dropout=0.).double(), .3)
    x, level = normal(1, 9, 4, 4), torch.tensor([.3], dtype=torch.float64)
    emb = level_embedding(level, 8) @ net.embed[0].weight.T + net.embed[0].bias
    emb = silu(emb) @ net.embed[2].weight.T + net.embed[2].bias
    features = [slow_conv(x, net.stem)]
    for block in net.downs:
        features.append(slow_block(block, features[-1], emb))
    h = slow_block(net.middle[2], slow_attention(net.middle[1], slow_block(net.middle[0], features[-1], emb)), emb)
    for stage in net.ups:
        for i, block in enumerate(stage):
            h = slow_block(block, h if i else torch.cat([h, features.pop()], 1), emb)
    assert not features
    torch.testing.assert_close(net(x, level), slow_conv(silu(slow_norm(h, net.last[0])), net.last[2]), rtol=1e-8, atol=1e-8)


def test_tiny_unet_equals_a_slow_reference():
    net = awake(TinyUNet(base=4, mults=(1, 2, 3), embedding=6, groups=4).double(), .3)
    x, level = normal(2, 9, 8, 4), torch.tensor([.3, .9], dtype=torch.float64)
    emb = silu(level_embedding(level) @ net.embed[0].weight.T + net.embed[0].bias) @ net.embed[2].weight.T + net.embed[2].bias
    full = slow_block(net.downs[0], slow_conv(x, net.stem), emb)
    half = slow_block(net.downs[1], slow_resize(full, "down"), emb)
    quarter = slow_block(net.downs[2], slow_resize(half, "down"), emb)
    h = slow_block(net.ups[0], torch.cat([slow_block(net.middle, quarter, emb), quarter], 1), emb)
    h = slow_block(net.ups[1], torch.cat([slow_resize(h, "up"), half], 1), emb)
    h = slow_block(net.ups[2], torch.cat([slow_resize(h, "up"), full], 1), emb)
    torch.testing.assert_close(net(x, level), slow_conv(silu(slow_norm(h, net.last[0])), net.last[2]), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name, low, high", [("tiny", 2e5, 3e5), ("nano", 4e4, 8e4)])
def test_small_presets_are_small(name, low, high):
    assert low < sum(p.numel() for p in pick_denoiser(name).parameters()) < high


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("n_cond", [0, 1, 2])
@pytest.mark.parametrize("name", ["tiny", "guided"])
def test_any_number_of_channels_and_conditions(name, channels, n_cond):
    options = {"base": 8, "mults": (1, 2)} | ({"dropout": 0., "head_channels": 8} if name == "guided" else {})
    net = pick_denoiser({"name": name, **options}, channels, n_cond)
    assert net(torch.zeros(2, channels * (1 + n_cond), 8, 12), torch.zeros(2)).shape == (2, channels, 8, 12)


@pytest.mark.parametrize("base, groups", [(5, 8), (6, 8), (12, 8), (24, 8), (64, 32)])
def test_groups_are_the_greatest_common_divisor(base, groups):
    assert _Norm(base, groups).num_groups == math.gcd(base, groups)
    TinyUNet(base=base, groups=groups)(torch.zeros(1, 9, 4, 4), torch.zeros(1))


@pytest.mark.parametrize("net", [TinyUNet(base=4), GuidedUNet(base=8, mults=(1, 2, 2), head_channels=8, dropout=0.)], ids=lambda n: type(n).__name__)
def test_bad_inputs_are_refused(net):
    name = type(net).__name__
    with pytest.raises(ValueError, match=f"{name}.*9.*1, 6, 8, 8"):
        net(torch.zeros(1, 6, 8, 8), torch.zeros(1))
    with pytest.raises(ValueError, match=f"{name}.*9.*9, 8, 8"):
        net(torch.zeros(9, 8, 8), torch.zeros(1))
    with pytest.raises(ValueError, match=f"{name}.*{net.multiple}.*8x7"):
        net(torch.zeros(1, 9, 8, 7), torch.zeros(1))


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match="head_channels.*32"):
        GuidedUNet(base=4, mults=(1, 2))


def test_samples_do_not_mix():
    for net in (pick_denoiser(SMALL), pick_denoiser({"name": "guided_small", "base": 8, "head_channels": 8, "mults": (1, 2)}).eval()):
        x, level = normal(3, 9, 8, 8, dtype=torch.float32), torch.tensor([.1, .5, .9])
        whole = net(x, level)
        torch.testing.assert_close(whole[1:2], net(x[1:2], level[1:2]), rtol=1e-4, atol=1e-5)
        assert (net(x, level.flip(0)) - whole).abs().max() > 1e-3  # and the level matters


def test_dropout_draws_from_its_generator_only():
    net = pick_denoiser({"name": "guided", "base": 8, "mults": (1, 2), "head_channels": 8, "dropout": .5})
    x, level, state = normal(2, 9, 8, 8, dtype=torch.float32), torch.tensor([.2, .8]), torch.get_rng_state()
    run = lambda seed: net(x, level, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2)) and torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match="generator"):
        net(x, level)
    assert torch.equal(net.eval()(x, level), net(x, level, generator=torch.Generator()))
    assert takes_generator(net) and not takes_generator(pick_denoiser(SMALL))


def test_dropout_keeps_the_mean():
    x = torch.ones(100_000)
    y = _dropout(x, .2, True, torch.Generator().manual_seed(0))
    assert (y == 0).float().mean().item() == pytest.approx(.2, abs=.005) and y.mean().item() == pytest.approx(1, abs=.005) and set(y.unique().tolist()) == {0., 1.25}
    assert _dropout(x, .2, False, None) is x and _dropout(x, 0., True, None) is x


def test_first_weights():
    state = torch.get_rng_state()
    net = pick_denoiser("nano", seed=3)
    assert torch.equal(state, torch.get_rng_state())
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            assert not module.bias.any()
            wanted = math.sqrt(2 / module.weight[0].numel())
            assert module.weight.std().item() == pytest.approx(wanted, rel=.25 if module.weight.numel() < 500 else .12)
    assert net(normal(4, 9, 32, 32, dtype=torch.float32), torch.full((4,), .5)).std() > .3  # not the zero start of diffusion networks
    same, other = pick_denoiser("nano", seed=3), pick_denoiser("nano", seed=4)
    assert torch.equal(net.last[2].weight, same.last[2].weight) and not torch.equal(net.last[2].weight, other.last[2].weight)


def test_released_start_has_the_measured_spread():
    net = pick_denoiser("guided", seed=0).eval()
    with torch.no_grad():
        out = net(normal(1, 9, 16, 16, dtype=torch.float32), torch.tensor([.5]))
    assert out.std().item() == pytest.approx(.7, abs=.25)


def test_a_module_of_the_user_is_taken_as_it_is():
    mine = nn.Conv2d(9, 3, 1)
    assert pick_denoiser(mine) is mine and initialise(mine, 0) is mine


@pytest.mark.parametrize("bad, text", [("huge", "guided"), ({"name": "tiny", "width": 3}, "'width'"), ({"base": 3}, "denoiser.*None"), ({"name": "tiny", "channels": 3}, "'channels'"), (None, "denoiser.*None")])
def test_unknown_denoisers_are_refused(bad, text):
    with pytest.raises((ValueError, TypeError), match=text):
        pick_denoiser(bad)


def test_every_name_builds():
    for name in DENOISERS:
        with torch.device("meta"):
            DENOISERS[name][0](**DENOISERS[name][1])


def test_norm_runs_in_float32_under_bfloat16():
    norm, x = _Norm(8, 4), 300 + normal(1, 8, 16, 16, dtype=torch.float32)
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x.bfloat16()).float(), norm(x.bfloat16().float()), rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(pick_denoiser(SMALL)(normal(1, 9, 8, 8, dtype=torch.float32), torch.tensor([.5]))).all()
    assert norm(x.double()).dtype == torch.float64


# --- the error as a judge

def test_a_perfect_denoiser_has_error_zero_and_a_silent_one_error_one():
    class Silent(nn.Module):
        def forward(self, x, level):
            return torch.zeros_like(x[:, :3])

    class Oracle(nn.Module):
        "Solves for the noise with a clean condition."
        def forward(self, x, level):
            gamma = level.view(-1, 1, 1, 1)
            return (x[:, :3] - gamma.sqrt() * x[:, 3:]) / (1 - gamma).sqrt()
    clean, eps = normal(8, 3, 16, 16), normal(8, 3, 16, 16, seed=1)
    gamma = EXACT.sample(8, 100, 999, generator=torch.Generator().manual_seed(0))
    error = lambda net, condition: noise_error(net, EXACT, clean, [condition], gamma, eps)
    assert error(Oracle(), clean).max() < 1e-20
    torch.testing.assert_close(error(Silent(), clean), eps.square().mean(dim=(1, 2, 3)))
    extra = .1 * normal(8, 3, 16, 16, seed=2)
    torch.testing.assert_close(error(Oracle(), clean + extra), gamma / (1 - gamma) * extra.square().mean(dim=(1, 2, 3)))  # and the damage of the condition counts by the SNR


def test_a_denoiser_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="denoiser.*1, 6, 4, 4"):
        predict_noise(_Wrong(), torch.zeros(1, 3, 4, 4), [torch.zeros(1, 3, 4, 4)], torch.zeros(1))


class _Wrong(nn.Module):
    def forward(self, x, level):
        return x


@pytest.mark.parametrize("kind", LEVELS)
def test_noise_prediction_error_rises_with_the_degradation_of_the_condition(kind):
    "The condition evaluation of the paper (Fig. 1a) as a test: short training, held-out pictures."
    from skimage import data
    g, schedule = torch.Generator().manual_seed(0), LinearGammaSchedule()
    photos = [torch.from_numpy(p[..., :3] / 255).permute(2, 0, 1).float() for p in (data.coffee(), data.rocket(), data.astronaut())]

    def crops(images, count, size=24):
        found = []
        for image in images:
            for _ in range(count):
                y, x = (int(torch.randint(0, n - size, (1,), generator=g)) for n in image.shape[1:])
                found.append(image[:, y:y + size, x:x + size])
        return torch.stack(found)
    pool, held = crops(photos[:2], 100), crops(photos[2:], 32)
    noisy = lambda x, sigma: x + torch.as_tensor(sigma).view(-1, 1, 1, 1) / 255 * torch.randn(x.shape, generator=g)
    net = pick_denoiser({"name": "nano", "base": 8}, n_cond=1)
    opt = torch.optim.Adam(net.parameters(), lr=3e-3)
    for step in range(300):
        clean = pool[torch.randint(len(pool), (8,), generator=g)]
        loss = noise_error(net, schedule, clean, [noisy(clean, 80 * torch.rand(8, generator=g))], schedule.sample(8, generator=g), torch.randn(clean.shape, generator=g), condition_on=kind).mean()
        opt.zero_grad(), loss.backward(), opt.step()
        opt.param_groups[0]["lr"] = 3e-3 * (1 - step / 300)
    gammas = schedule.sample(len(held), generator=g)
    eps, damage = torch.randn(held.shape, generator=g), torch.randn(held.shape, generator=g)
    with torch.no_grad():
        errors = [noise_error(net, schedule, held, [held + sigma / 255 * damage], gammas, eps, condition_on=kind).mean().item() for sigma in (0, 10, 25, 50)]
    assert errors == sorted(errors) and errors[-1] > 1.02 * errors[0], errors
