"""Noise-DA: the properties of its specification, gradient routing, closed forms, the contract of every variant, its controls, and every refusal."""
import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import stats
from torch import nn
from torch.nn import functional as F

from irnb.degradations.blur import gaussian_blur
from irnb.degradations.noise import CameraNoise, GaussianNoise
from irnb.degradations.parameters import Uniform
from irnb.degradations.sampling import bicubic
from irnb.strategies.diffusion import LinearGammaSchedule, pick_denoiser
from irnb.data import Example
from irnb.results.baselines import GlobalBlur, ScaledResidual, post_controls
from irnb.metrics import high_frequency_ratio, laplacian_energy
from irnb.strategies.noise_da import (CONDITIONS, NOISE_DA_VARIANTS, RENOISED, AddInput, ConditionProbe, DiffusionLossError, LambdaRamp, NoiseDA, NoiseDALoss, Renoised,
                                      ResidualView, as_residual, check_ranges, estimate_noise, infer,
                                      noise_da_cost, residual_swap, swap_slots)
from irnb.strategies.strategy import Strategy, Supervised, ToyNet, _loop, contract, toy_batch
from irnb.training import NonFiniteError, TrainConfig, train
from tests.nets import awake

SMALL = {"name": "tiny", "base": 4, "embedding": 8}
EXACT = LinearGammaSchedule(dtype=torch.float64)


def make(net=None, **options):
    return NoiseDA(net or ToyNet(), **({"denoiser": SMALL, "length": 3} | options))


def small(n_cond=2, channels=3, seed=0, **options):
    return NoiseDALoss(pick_denoiser(SMALL, channels, n_cond, seed).double(), EXACT, **options)


def blocks(n=4, channels=3, size=8, count=5, seed=0, grad=False):
    g = torch.Generator().manual_seed(seed)
    return [torch.rand(n, channels, size, size, generator=g, dtype=torch.float64).requires_grad_(grad) for _ in range(count)]


def draws(n=4, channels=3, size=8, seed=0, **change):
    g = torch.Generator().manual_seed(seed)
    values = {"t": torch.randint(1, 1000, (n,), generator=g), "u": torch.rand(n, generator=g, dtype=torch.float64), "eps": torch.randn(n, channels, size, size, generator=g, dtype=torch.float64),
              "flags": torch.rand(n, generator=g) < .5, "neg_flags": torch.rand(n, generator=g) < .5}
    return values | change


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def same(a, b):
    a, b = (m.state_dict() for m in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


class Symmetric(nn.Module):
    "A denoiser that cannot tell its two slots apart."

    def __init__(self):
        super().__init__()
        self.net = pick_denoiser(SMALL, 3, 2).double()

    def forward(self, x, level):
        y, a, b = x.chunk(3, 1)
        return self.net(x, level) + self.net(torch.cat([y, b, a], 1), level)


class Tell(nn.Module):
    "A denoiser that notes what it is given and returns a multiple of the noised image."

    def __init__(self, n_cond=2):
        super().__init__()
        self.scale, self.seen, self.parts = nn.Parameter(torch.tensor(.5, dtype=torch.float64)), [], 1 + n_cond

    def forward(self, x, level):
        self.seen.append((x, level))
        return self.scale * x[:, :x.shape[1] // self.parts]


# --- property 4: slots

@settings(deadline=None, max_examples=30)
@given(flags=st.lists(st.booleans(), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_slots_are_exchanged_sample_by_sample(flags, seed):
    a, b = blocks(len(flags), count=2, seed=seed)
    A, B = swap_slots(a, b, torch.tensor(flags))
    for i, flag in enumerate(flags):  # whole images, channel order kept, no mixing of samples
        assert torch.equal(A[i], (b if flag else a)[i]) and torch.equal(B[i], (a if flag else b)[i])
    assert torch.equal(A + B, b + a) and all(torch.equal(x, y) for x, y in zip(swap_slots(A, B, torch.tensor(flags)), (a, b)))


def test_gradients_return_to_the_right_image():
    (a, b), (w, v) = blocks(count=2, grad=True), blocks(count=2, seed=1)
    flags = torch.tensor([True, False, True, False])
    A, B = swap_slots(a, b, flags)
    ((w * A).sum() + (v * B).sum()).backward()
    f = flags.view(-1, 1, 1, 1)
    assert torch.equal(a.grad, torch.where(f, v, w)) and torch.equal(b.grad, torch.where(f, w, v))


def seen_flags(loss, x_s, r_s, x_r, r_r, n, generator):
    "Which slot each sample's synthetic image is in, for the positive and the negative pass."
    tell = loss.denoiser
    tell.seen.clear()
    loss(x_s, r_s, x_r, r_r, x_s, generator=generator)
    given_, _ = tell.seen[0]
    first = given_[:, 3:6]
    return (first[:n] != x_s + r_s).flatten(1).any(1), (first[n:] != x_s + r_r).flatten(1).any(1)


def test_coins_are_fair_independent_and_fresh_for_the_negatives():
    n, rounds = 64, 60
    x_s, r_s, x_r, r_r = blocks(n, size=2, count=4)
    loss, g = NoiseDALoss(Tell(), EXACT), gen()
    pairs = [seen_flags(loss, x_s, r_s, x_r, r_r, n, g) for _ in range(rounds)]
    pos, neg = (torch.stack(v).double() for v in zip(*pairs))
    for flags in (pos, neg):
        assert stats.binomtest(int(flags.sum()), flags.numel()).pvalue > 1e-3
        per_batch = flags.sum(1)  # one coin per batch would give 0 or n
        assert per_batch.var().item() == pytest.approx(n / 4, rel=.6)
    assert abs(np.corrcoef(pos.flatten(), neg.flatten())[0, 1]) < .06 and abs(np.corrcoef(pos[:, :-1].flatten(), pos[:, 1:].flatten())[0, 1]) < .06


def test_without_shuffling_the_synthetic_image_comes_first():
    x_s, r_s, x_r, r_r, clean = blocks()
    loss = NoiseDALoss(Tell(), EXACT, shuffle=False)
    loss(x_s, r_s, x_r, r_r, clean, generator=gen())
    given_, level = loss.denoiser.seen[0]
    assert torch.equal(given_[:4, 3:], torch.cat([x_s + r_s, x_r + r_r], 1)) and torch.equal(given_[4:, 3:], torch.cat([x_s + r_r, x_r + r_s], 1))
    assert torch.equal(given_[:4, :3], given_[4:, :3]) and torch.equal(level[:4], level[4:])  # the same noised image and level


def test_noised_image_and_level_are_what_was_drawn():
    x_s, r_s, x_r, r_r, clean = blocks()
    d = draws()
    for kind in ("gamma", "logsnr"):
        loss = NoiseDALoss(Tell(), EXACT, condition_on=kind)
        out = loss(x_s, r_s, x_r, r_r, clean, **d)
        gamma = EXACT.sample(4, t=d["t"], u=d["u"])
        given_, level = loss.denoiser.seen[0]
        g = gamma.view(-1, 1, 1, 1)
        torch.testing.assert_close(given_[:4, :3], g.sqrt() * clean + (1 - g).sqrt() * d["eps"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(level[:4], gamma if kind == "gamma" else (gamma / (1 - gamma)).log(), rtol=1e-9, atol=1e-9)
        assert torch.equal(out["gamma"], gamma)


# --- property 5: residuals

def test_residual_swap():
    x_s, r_s, x_r, r_r = blocks(count=4)
    n_s, n_r = residual_swap(x_s, r_s, x_r, r_r)
    torch.testing.assert_close(n_s + n_r, (x_s + r_s) + (x_r + r_r), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(n_s - x_s, r_r, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(n_r - x_r, r_s, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("hinge", ["batch", "sample"])
def test_equal_residuals_make_the_margin_the_contrast(hinge):
    x_s, r_s, x_r, _, clean = blocks()
    d = draws()
    out = small(hinge=hinge, margin=.37)(x_s, r_s, x_r, r_s, clean, **d | {"neg_flags": d["flags"]})
    assert out["l_con"].item() == pytest.approx(.37, abs=1e-12) and out["active"] == 1 and torch.equal(out["eps_pos"], out["eps_neg"])


def test_identical_domains_give_equal_losses():
    x_s, r_s, _, _, clean = blocks()
    out = small()(x_s, r_s, x_s, r_s, clean, **draws())
    assert out["l_pos"].item() == pytest.approx(out["l_neg"].item(), rel=1e-12)


# --- property 6: closed forms

class Given(nn.Module):
    "Predicts the true noise plus a constant error of its own for each half of the stacked batch."

    def __init__(self, eps, pos, neg):
        super().__init__()
        self.eps, self.errors = eps, nn.Parameter(torch.tensor([pos, neg], dtype=torch.float64))

    def forward(self, x, level):
        n = len(self.eps)
        return torch.cat([self.eps + self.errors[0], self.eps + self.errors[1]])[:len(x)] if len(x) == 2 * n else self.eps + self.errors[0]


@pytest.mark.parametrize("pos, neg, active", [(.5, .5, True), (.5, .1, True), (.2, .3, True), (.2, .9, False), (0., 2., False)])
def test_both_regimes_of_the_hinge(pos, neg, active):
    d = draws()
    loss = NoiseDALoss(Given(d["eps"], pos, neg), EXACT)
    out = loss(*blocks(), **d)
    want = max(0., pos**2 - neg**2 + .1)
    assert out["l_pos"].item() == pytest.approx(pos**2) and out["l_neg"].item() == pytest.approx(neg**2) and out["l_con"].item() == pytest.approx(want, abs=1e-12)
    assert out["loss"].item() == pytest.approx(pos**2 - neg**2 / 2 + .05 if active else pos**2 / 2, abs=1e-12) and bool(out["active"]) == active
    out["loss"].backward()
    assert loss.denoiser.errors.grad.tolist() == pytest.approx([2 * pos * (1 if active else .5), -neg if active else 0.], abs=1e-12)


def test_batch_hinge_acts_on_means_and_sample_hinge_on_samples():
    class PerSample(nn.Module):
        def __init__(self, eps, errors):
            super().__init__()
            self.eps, self.errors = eps, errors

        def forward(self, x, level):
            return torch.cat([self.eps, self.eps]) + self.errors.view(-1, 1, 1, 1)
    d = draws(2)
    errors = torch.tensor([.5, .1, .1, .9], dtype=torch.float64)  # positives .25, .01; negatives .01, .81
    batch, sample = (NoiseDALoss(PerSample(d["eps"], errors), EXACT, hinge=h)(*blocks(2), **d) for h in ("batch", "sample"))
    assert batch["l_con"] == 0 and batch["active"] == 0
    assert sample["l_con"].item() == pytest.approx((.25 - .01 + .1) / 2) and sample["active"].item() == .5


def test_the_hinge_switches_itself_off_when_negatives_explode():
    d = draws()
    loss = NoiseDALoss(Given(d["eps"], .3, 1e6), EXACT)
    out = loss(*blocks(), **d)
    out["loss"].backward()
    assert out["l_con"] == 0 and loss.denoiser.errors.grad[1] == 0 and out["loss"].item() == pytest.approx(.045)


@pytest.mark.parametrize("options", [{"unpaired": True}, {"residual_swap": False}, {"unpaired": True, "residual_swap": True}])
def test_without_negatives_the_loss_is_the_positive_one(options):
    x = blocks()
    loss = small(**options)
    out = loss(*x, **draws())
    assert torch.equal(out["loss"], out["l_pos"]) and out["eps_neg"] is None and out["l_con"] == out["active"] == out["l_neg"] == 0
    torch.testing.assert_close(out["l_pos"], small()(*x, **draws())["l_pos"])


def test_charbonnier_of_a_perfect_result():
    net = nn.Identity()
    batch = toy_batch()
    batch["degraded"] = batch["clean"]
    strategy = NoiseDA(net, variant="vanilla")
    assert strategy(batch).item() == pytest.approx(1e-3, rel=1e-6)


@pytest.mark.parametrize("swap", [True, False])
@pytest.mark.parametrize("kind", CONDITIONS)
def test_reference_written_out(kind, swap):
    "The released algorithm, step by step and independently."
    x_s, r_s, x_r, r_r, clean = blocks()
    d = draws()
    loss = small(1 + (kind == "both"), conditions=kind, residual_swap=swap)
    out = loss(x_s, r_s, x_r, r_r, clean, **d)
    errors = []
    for first, second, flags in ((x_s + r_s, x_r + r_r, d["flags"]), (x_s + r_r, x_r + r_s, d["neg_flags"])):
        per_sample = []
        for i in range(4):
            high, low = EXACT.gammas[d["t"][i] - 1], EXACT.gammas[d["t"][i]]
            gamma = high + d["u"][i] * (low - high)
            y_t = gamma.sqrt() * clean[i] + (1 - gamma).sqrt() * d["eps"][i]
            pair = {"both": (second[i], first[i]) if flags[i] else (first[i], second[i]), "synthetic": (first[i],), "real": (second[i],)}[kind]
            predicted = loss.denoiser(torch.cat([y_t, *pair])[None], gamma[None])[0]
            per_sample.append((predicted - d["eps"][i]).square().mean())
        errors.append(sum(per_sample) / 4)
    con = max(0., errors[0].item() - errors[1].item() + .1)
    assert out["l_pos"].item() == pytest.approx(errors[0].item(), rel=1e-9)
    assert out["loss"].item() == pytest.approx((errors[0].item() + con) / 2 if swap else errors[0].item(), rel=1e-9)


def test_one_pass_equals_two():
    x, d = blocks(grad=True), draws()
    results = []
    for single in (True, False):
        loss = small(single_pass=single)
        out = loss(*x, **d)["loss"]
        results.append([out, *torch.autograd.grad(out, [*x[:4], *loss.parameters()])])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_losses_are_at_least_float32():
    x = [b.bfloat16() for b in blocks()]
    loss = NoiseDALoss(pick_denoiser(SMALL))
    with torch.autocast("cpu", torch.bfloat16):
        out = loss(*x, generator=gen())
    assert all(out[k].dtype == torch.float32 for k in ("loss", "l_pos", "l_neg", "l_con")) and torch.isfinite(out["loss"])


# --- property 7: routing of the gradients

def routes(loss_of, **options):
    "Which of network-by-synthetic, net-by-real and denoiser get a gradient from a term."
    net = ToyNet()
    inputs = {k: v.clone().requires_grad_() for k, v in toy_batch().items()}
    out_s, out_r = (net(inputs[k]) for k in ("degraded", "real"))
    (r_s, z_s), (r_r, _) = as_residual(out_s, inputs["degraded"]), as_residual(out_r, inputs["real"])
    loss = NoiseDALoss(pick_denoiser(SMALL), **options)
    terms = loss(inputs["degraded"], r_s, inputs["real"], r_r, inputs["clean"], generator=gen())
    rec = (torch.sqrt((z_s - inputs["clean"].detach()).square() + 1e-6)).mean()
    value = loss_of(rec, terms)
    grads = torch.autograd.grad(value, [out_s, out_r, *loss.parameters(), inputs["clean"]], allow_unused=True, retain_graph=True)
    moved = lambda g: g is not None and bool(g.abs().sum() > 0)
    return moved(grads[0]), moved(grads[1]), any(moved(g) for g in grads[2:-1]), moved(grads[-1])


def test_gradient_routing_table():
    assert routes(lambda rec, terms: rec) == (True, False, False, False)
    assert routes(lambda rec, terms: terms["l_pos"]) == (True, True, True, False)
    assert routes(lambda rec, terms: terms["l_neg"]) == (True, True, True, False)
    assert routes(lambda rec, terms: terms["loss"]) == (True, True, True, False)
    assert routes(lambda rec, terms: terms["loss"], unpaired=True) == (True, True, True, False)
    assert routes(lambda rec, terms: terms["l_con"], margin=0.) in ((True, True, True, False), (False, False, False, False))


def test_negatives_cross_the_residuals():
    "r_s reaches the real slot of the negative pair and r_r the synthetic one."
    x_s, r_s, x_r, r_r, clean = blocks(grad=True)
    loss = NoiseDALoss(Tell(), EXACT, shuffle=False)
    loss(x_s, r_s, x_r, r_r, clean, generator=gen())
    slots = loss.denoiser.seen[0][0][4:]
    assert torch.autograd.grad(slots[:, 6:].sum(), r_s, retain_graph=True)[0].sum() == r_s.numel() and torch.autograd.grad(slots[:, 3:6].sum(), r_r)[0].sum() == r_r.numel()


def test_a_detached_real_branch_gets_nothing():
    class Halves(nn.Module):
        "A network whose real branch is cut off."

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return x + (self.a(x) if self.calls % 2 else self.b(x).detach())
    strategy = make(Halves())
    strategy(toy_batch()).backward()
    assert strategy.net.b.weight.grad is None and strategy.net.a.weight.grad.abs().sum() > 0


def gradients_of(strategy, batch=None):
    strategy.zero_grad()
    strategy(batch or toy_batch()).backward()
    return [p.grad.clone() for p in strategy.net.parameters()]


def test_real_images_change_the_update_and_their_absence_is_the_pairs_alone():
    batch = toy_batch()
    first, other, plain = gradients_of(make(beta=5.), batch), gradients_of(make(beta=5.), batch | {"real": batch["real"].flip(-1) * .5}), gradients_of(make(beta=0.), batch)
    assert all(not torch.equal(a, b) for a, b in zip(first, other)) and all(not torch.equal(a, b) for a, b in zip(first, plain))
    alone = gradients_of(make(beta=5., variant="synthetic_only"), {k: batch[k] for k in ("degraded", "clean")})
    assert all(torch.isfinite(g).all() for g in alone)


# --- property 8: symmetry

def test_a_symmetric_denoiser_makes_the_coins_irrelevant():
    x, loss = blocks(), NoiseDALoss(Symmetric(), EXACT)
    values = [loss(*x, **draws(flags=torch.tensor(f)))["l_pos"].item() for f in ([True] * 4, [False] * 4, [True, False, False, True])]
    assert values == pytest.approx([values[0]] * 3, rel=1e-12)


def test_exchanging_domains_together_with_the_coins_changes_nothing():
    x_s, r_s, x_r, r_r, clean = blocks()
    d, loss = draws(), small()
    a, b = loss(x_s, r_s, x_r, r_r, clean, **d), loss(x_r, r_r, x_s, r_s, clean, **d | {"flags": ~d["flags"]})
    torch.testing.assert_close(a["l_pos"], b["l_pos"], rtol=1e-12, atol=0)
    assert abs(loss(x_s, r_s, x_r, r_r, clean, **d | {"flags": ~d["flags"]})["l_pos"] - a["l_pos"]) > 1e-6  # an ordinary one tells them apart


# --- property 9: weight 0

@pytest.mark.parametrize("loss", ["charbonnier", "l1", "mse"])
@pytest.mark.parametrize("options", [{"beta": 0.0}, {"variant": "vanilla"}, {"start": 99}, {"gamma": 0.0}], ids=str)
def test_without_weight_training_is_supervised_bit_for_bit(options, loss):
    class Normed(nn.Sequential):
        def __init__(self):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                super().__init__(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.LeakyReLU(), nn.Conv2d(8, 3, 3, padding=1))
    batches, state = [toy_batch(seed=i) for i in range(5)], torch.get_rng_state()
    ours, plain = make(Normed(), loss=loss, **options), Supervised(Normed(), loss)
    a, b = _loop(ours, batches)[0], _loop(plain, batches)[0]
    assert a == b and same(ours.net, plain.net) and torch.equal(state, torch.get_rng_state())  # BatchNorm's statistics are compared too


def test_default_loss_is_charbonnier():
    ours, plain = make(beta=0.), Supervised(ToyNet(), "charbonnier")
    _loop(ours, [toy_batch()] * 3), _loop(plain, [toy_batch()] * 3)
    assert same(ours.net, plain.net)


def test_the_diffusion_part_draws_from_its_own_stream():
    net, state = ToyNet(), torch.get_rng_state()
    first = make(net, denoiser={"name": "guided", "base": 8, "mults": (1, 2), "head_channels": 8, "dropout": .5})(toy_batch())
    assert torch.equal(state, torch.get_rng_state())
    again, other = (make(denoiser={"name": "guided", "base": 8, "mults": (1, 2), "head_channels": 8, "dropout": .5}, seed=s)(toy_batch()) for s in (0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_delayed_start_is_plain_training_and_then_not():
    batches = [toy_batch(seed=i) for i in range(5)]
    late, plain = make(start=3), Supervised(ToyNet(), "charbonnier")
    opts = None, None
    for i, batch in enumerate(batches):
        opts = _loop(late, [batch], opts[0])[1], _loop(plain, [batch], opts[1])[1]
        assert same(late.net, plain.net) == (i < 3), i
        assert (late.logs["lam"] > 0) == (i >= 3)


# --- property 10: the ramp

def test_published_ramp_values():
    ramp = LambdaRamp(length=300)
    assert [ramp(n) for n in (1, 60, 300)] == pytest.approx([.00166663, .0924234, .1973229], abs=5e-8)
    assert all(ramp(n) < ramp(n + 1) for n in range(300)) and ramp(300) == ramp(301) == ramp(10**6) < .2 and ramp(0) == 0


@settings(deadline=None, max_examples=40)
@given(beta=st.floats(0, 5), gamma=st.floats(0, 20), length=st.integers(1, 500), start=st.integers(0, 50), n=st.integers(0, 700))
def test_ramp_is_the_papers_formula(beta, gamma, length, start, n):
    p = min(max(n - start, 0) / length, 1)
    assert LambdaRamp(beta, gamma, length, start)(n) == pytest.approx(beta * (2 / (1 + math.exp(-gamma * p)) - 1), abs=1e-12)


@pytest.mark.parametrize("bad, text", [({"beta": -1}, "beta"), ({"beta": "1e-1"}, "beta"), ({"gamma": math.nan}, "gamma"), ({"length": 0}, "length"), ({"length": 2.5}, "length"), ({"start": -1}, "start"), ({"beta": True}, "beta")])
def test_bad_ramps_are_refused(bad, text):
    with pytest.raises(ValueError, match=text):
        LambdaRamp(**bad)


def test_strategy_takes_the_weight_of_the_step_that_it_does():
    strategy = make(length=10)
    for n in range(1, 14):
        strategy(toy_batch())
        assert strategy.logs["lam"].item() == pytest.approx(LambdaRamp(length=10)(n), rel=1e-6)
        strategy.after_step()


# --- property 11: the average of the weights (the training loop's)

def test_the_average_of_the_weights_is_used_and_holds_no_denoiser():
    class Batches:
        def batch(self, step):
            return toy_batch(seed=step)
    strategy, seen = make(), []
    config = TrainConfig(steps=6, lr=2e-3, warmup=0, ema=.5, log_every=1, clip=None)
    initial = copy.deepcopy(strategy.net.state_dict())
    result = train(strategy, Batches(), config, validate=lambda net: seen.append(copy.deepcopy(net.state_dict())) or {"v": 0.}, progress=False)
    raw, average = strategy.net.state_dict(), result.restorer.state_dict()
    assert average.keys() == raw.keys() == initial.keys() and not any("diffusion" in k for k in average)
    again, opt = make(), None
    from irnb.training import ema_decay, learning_rate
    want = {k: v.clone() for k, v in initial.items()}
    opt = torch.optim.AdamW(again.parameters(), lr=2e-3, betas=config.betas, weight_decay=0., fused=True)
    for step in range(6):
        opt.param_groups[0]["lr"] = learning_rate(step, config)
        opt.zero_grad(), again(toy_batch(seed=step)).backward(), opt.step(), again.after_step()
        decay = ema_decay(step, .5)
        want = {k: decay * want[k] + (1 - decay) * v for k, v in again.net.state_dict().items()}
    assert all(torch.equal(raw[k], v) for k, v in again.net.state_dict().items())
    for k in want:
        torch.testing.assert_close(average[k], want[k], rtol=1e-5, atol=1e-6)


# --- property 12: any module

class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return .1 * self.conv(x)


NETS = {"one convolution": (lambda: nn.Conv2d(3, 3, 3, padding=1), {}), "BatchNorm": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)), {}),
        "grey": (lambda: ToyNet(channels=1), {"channels": 1}), "residual": (Residual, {"predicts": "residual"}), "BatchNorm, one call": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)), {"joint": True})}


@pytest.mark.parametrize("name", NETS)
def test_any_module_is_trained_through_both_domains(name):
    build, options = NETS[name]
    strategy = make(build(), **options)
    batches = [toy_batch(seed=i, channels=options.get("channels", 3)) for i in range(3)]
    before = [p.clone() for p in strategy.parameters()]
    _loop(strategy, batches)
    assert all(not torch.equal(a, b) for a, b in zip(before, strategy.parameters()))
    assert strategy.restorer()(batches[0]["degraded"]).shape == batches[0]["clean"].shape


def test_one_call_equals_two_without_batch_statistics():
    a, b = (gradients_of(make(joint=j)) for j in (False, True))
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_batch_norm_sees_one_call_or_two():
    counts = []
    for joint in (False, True):
        net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1))
        make(net, joint=joint)(toy_batch())
        counts.append(net[1].num_batches_tracked.item())
    assert counts == [2, 1]


def test_a_network_of_residuals_ships_with_its_input():
    strategy = make(Residual(), predicts="residual")
    x = toy_batch()["degraded"]
    assert torch.equal(strategy.restorer()(x), x + strategy.net(x)) and isinstance(NoiseDA.restorer_for(Residual(), predicts="residual"), AddInput)
    residual, restored = ResidualView(strategy.net, "residual")(x)
    assert torch.equal(residual, strategy.net(x)) and torch.equal(restored, x + residual)
    residual, restored = ResidualView(ToyNet())(x)
    assert torch.equal(restored, ToyNet()(x)) and torch.equal(residual, restored - x)
    contract(lambda net: make(net, predicts="residual"), nets=[Residual4], processes=False, options={"predicts": "residual"})


class Residual4(Residual):
    def __init__(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            super().__init__()


def test_image_networks_ship_alone():
    strategy = make()
    assert strategy.restorer() is strategy.net is make(strategy.net).restorer() and list(strategy.restorer().state_dict()) == list(ToyNet().state_dict())
    assert any(k.startswith("diffusion.denoiser") for k in strategy.state_dict()) and not any(k.startswith("diffusion") for k in make(beta=0.).state_dict())


def test_the_range_of_the_denoiser():
    "centred: the loss on images in [-1, 1] and doubled residuals."
    batch, strategy = toy_batch(), make(centred=True, beta=5.)
    value = strategy(batch)
    net = strategy.net
    r = {k: net(batch[k]) - batch[k] for k in ("degraded", "real")}
    fresh = make(centred=True, beta=5.)
    terms = fresh.diffusion(2 * batch["degraded"] - 1, 2 * r["degraded"], 2 * batch["real"] - 1, 2 * r["real"], 2 * batch["clean"] - 1, generator=fresh.generator("cpu"))
    rec = torch.sqrt((net(batch["degraded"]) - batch["clean"]).square() + 1e-6).mean()
    torch.testing.assert_close(value, rec + LambdaRamp(5., length=3)(1) * terms["loss"])


# --- the strategy

def test_the_objective_written_out():
    batch, strategy = toy_batch(), make(beta=.7, length=2)
    value = strategy(batch)
    again = make(beta=.7, length=2)
    out = {k: again.net(batch[k]) for k in ("degraded", "real")}
    terms = again.diffusion(batch["degraded"], out["degraded"] - batch["degraded"], batch["real"], out["real"] - batch["real"], batch["clean"], generator=again.generator("cpu"))
    rec = torch.sqrt((out["degraded"] - batch["clean"]).square() + 1e-6).mean()
    torch.testing.assert_close(value, rec + .7 * math.tanh(5 / 2 / 2) * terms["loss"])
    assert strategy.logs["task_loss"].item() == pytest.approx(rec.item()) and strategy.logs["l_neg"].item() == pytest.approx(terms["l_neg"].item(), rel=1e-5)
    assert set(strategy.logs) == {"task_loss", "lam", "diffusion", "l_pos", "l_neg", "hinge"}


@pytest.mark.parametrize("variant", [v for v in NOISE_DA_VARIANTS if v != "vanilla"])
def test_every_variant_keeps_the_contract(variant):
    contract(lambda net: make(net, variant=variant), reduced=lambda net: make(net, loss="l1", variant=variant, beta=0.0), nets=[ToyNet], processes=False)


@pytest.mark.parametrize("options", [{"hinge": "sample", "joint": True}, {"condition_on": "logsnr", "single_pass": False}, {"centred": True, "start": 1}, {"loss": "mse", "t_range": [5, 50]},
                                     {"denoiser": {"name": "guided", "base": 8, "mults": [1, 2], "head_channels": 8, "dropout": .2}}], ids=str)
def test_options_keep_the_contract(options):
    contract(lambda net: make(net, **options), nets=[ToyNet], processes=False)


def test_contract_on_nafnet_and_vanilla():
    from irnb.strategies.strategy import _toy_nafnet
    contract(lambda net: make(net), reduced=lambda net: make(net, loss="l1", variant="vanilla"), nets=[_toy_nafnet], processes=False)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"start": 1, "variant": "unpaired"}], ids=str)
def test_two_processes_agree(options):
    "Each draws for its own slice, so they do not equal one process; with a delayed start the denoiser has no gradient at first."
    from irnb.strategies.strategy import _run_gloo
    first, second = _run_gloo(make(**options), [toy_batch(8, seed=i) for i in range(3)])
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(first["diffusion.denoiser.last.2.weight"], make().diffusion.denoiser.last[2].weight)


def test_variants_are_what_they_say():
    settings_ = {v: make(variant=v) for v in NOISE_DA_VARIANTS}
    d = {v: s.diffusion for v, s in settings_.items()}
    assert d["vanilla"] is None and (d["paired"].shuffle, d["paired"].swap, d["paired"].unpaired, d["paired"].t_range) == (True, True, False, (1, 999))
    assert (d["unpaired"].shuffle, d["unpaired"].swap, d["unpaired"].unpaired) == (True, False, True)
    assert (d["no_shuffle"].shuffle, d["no_shuffle"].swap) == (False, True) and (d["no_swap"].shuffle, d["no_swap"].swap) == (True, False)
    assert all((d[v].shuffle, d[v].swap) == (False, False) for v in ("plain", "low_noise", "high_noise", "synthetic_only", "real_only"))
    assert d["low_noise"].t_range == (1, 100) and d["high_noise"].t_range == (900, 999) and d["synthetic_only"].conditions == "synthetic" and d["real_only"].conditions == "real"
    needs = {v: s.needs for v, s in settings_.items()}
    assert all(("real" in n) == (v not in ("vanilla", "synthetic_only", "placebo")) for v, n in needs.items())
    assert make(variant="unpaired", reference="reference").needs == ("degraded", "clean", "real", "reference") and make(beta=0.).needs == ("degraded", "clean")
    over = make(variant="low_noise", shuffle=True, swap=True, t_range=(2, 9)).diffusion
    assert (over.shuffle, over.swap, over.t_range) == (True, True, (2, 9))


def given_to_the_denoiser(strategy, batch):
    tell = Tell(2 if strategy.diffusion.conditions == "both" else 1).float()
    strategy.diffusion.denoiser = tell
    strategy(batch)
    return tell.seen[0][0]


def test_the_placebo_gets_synthetic_images_of_other_content():
    batch, strategy = toy_batch(), make(variant="placebo", shuffle=False)
    x = given_to_the_denoiser(strategy, {k: batch[k] for k in ("degraded", "clean")})
    z = strategy.net(batch["degraded"])
    torch.testing.assert_close(x[:4, 3:6], z)
    torch.testing.assert_close(x[:4, 6:], z.roll(1, 0))
    torch.testing.assert_close(x[4:, 3:6], batch["degraded"] + (z - batch["degraded"]).roll(1, 0))


def test_a_single_condition_can_have_negatives_and_then_needs_the_other_branch():
    batch, strategy = toy_batch(), make(variant="synthetic_only", swap=True)
    assert strategy.needs == ("degraded", "clean", "real")
    x = given_to_the_denoiser(strategy, batch)
    r = {k: strategy.net(batch[k]) - batch[k] for k in ("degraded", "real")}
    torch.testing.assert_close(x[:4, 3:], batch["degraded"] + r["degraded"])
    torch.testing.assert_close(x[4:, 3:], batch["degraded"] + r["real"])


def test_the_unpaired_variant_noises_other_clean_images():
    batch = toy_batch()
    for extra, options, want in (({}, {}, batch["clean"].roll(2, 0)), ({"reference": batch["clean"].flip(-1)}, {"reference": "reference"}, batch["clean"].flip(-1))):
        strategy = make(variant="unpaired", **options)
        x = given_to_the_denoiser(strategy, batch | extra)
        g = make().generator("cpu")
        gamma = strategy.diffusion.schedule.sample(4, generator=g)
        eps = torch.randn(want.shape, generator=g)
        torch.testing.assert_close(x[:, :3], strategy.diffusion.schedule.q_sample(want, gamma, eps))


def test_a_denoiser_of_the_user():
    class Mine(nn.Module):
        multiple = 4

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(9, 3, 3, padding=1)

        def forward(self, x, level):
            return self.conv(x) * level.view(-1, 1, 1, 1)
    strategy = make(denoiser=Mine())
    assert torch.isfinite(strategy(toy_batch()))
    with pytest.raises(ValueError, match=r"22x22.*\b4\b.*crop"):
        strategy(toy_batch(size=22))


def test_resume_in_the_training_loop(tmp_path):
    class Batches:
        def batch(self, step):
            return toy_batch(seed=step)
    config = TrainConfig(steps=6, lr=2e-3, warmup=1, ema=.5, log_every=2, checkpoint_every=2, clip=None)
    whole = make(start=2)
    train(whole, Batches(), config, progress=False)

    class Stops(Batches):
        def batch(self, step):
            if step == 4:
                raise KeyboardInterrupt
            return super().batch(step)
    with pytest.raises(KeyboardInterrupt):
        train(make(start=2), Stops(), config, checkpoint=tmp_path / "c.pt", progress=False)
    resumed = make(start=2)
    result = train(resumed, Batches(), config, checkpoint=tmp_path / "c.pt", progress=False)
    assert result.resumed_at == 4 and same(resumed, whole)


def test_a_model_file_holds_the_network_alone(tmp_path):
    from irnb.networks import build, load_model, save_model
    net = build("UNet", width=4, depth=2)
    options = {"variant": "no_swap", "denoiser": {"name": "nano"}, "length": 20}
    strategy = NoiseDA(net, **options)
    save_model(tmp_path / "m.safetensors", strategy.restorer(), {"network": {"name": "UNet", "options": {"width": 4, "depth": 2}}, "strategy": {"class": "irnb.strategies.NoiseDA", "options": options}})
    loaded, _ = load_model(tmp_path / "m.safetensors")
    assert same(loaded, net)


# --- property 14: inference

def test_padding_changes_nothing_where_none_is_needed():
    net, x = ToyNet(), torch.rand(2, 3, 24, 40, generator=gen())
    assert torch.equal(infer(net, x), net(x).clamp(0, 1))
    padded = F.pad(x[..., :21, :37], (0, 3, 0, 3), mode="replicate")
    assert torch.equal(infer(net, x[..., :21, :37], clamp=False), net(padded)[..., :21, :37])


def test_tiles_equal_the_whole_picture():
    net, x = awake(ToyNet(width=4)), torch.rand(1, 3, 61, 83, generator=gen())
    whole, tiles = infer(net, x, clamp=False), infer(net, x, tile=32, overlap=16, clamp=False)
    assert (whole - tiles)[..., 8:-8, 8:-8].abs().median() < 1e-6
    exact = (whole - tiles).abs() < 1e-5
    assert exact.double().mean() > .5  # away from seams; the blended overlaps differ only near cut edges, where a tile knows less
    residual = Residual()
    torch.testing.assert_close(infer(residual, x, predicts="residual", clamp=False), AddInput(residual)(F.pad(x, (0, 5, 0, 3), mode="replicate"))[..., :61, :83])
    net.train()
    infer(net, x)
    assert net.training and infer(net, 3 * x - 1).min() >= 0


# --- probes

def trained(variant="paired", steps=3, **options):
    strategy = make(variant=variant, **options)
    _loop(strategy, [toy_batch(seed=i) for i in range(steps)])
    return strategy


def test_a_probe_changes_nothing_and_repeats_itself():
    strategy = trained()
    probe, before, rng = strategy.probe(toy_batch(seed=9), baseline=ToyNet()), copy.deepcopy(strategy.state_dict()), torch.get_rng_state()
    strategy.zero_grad(set_to_none=True)
    first = probe()
    assert first == probe() and strategy.training and strategy.net.training and all(p.grad is None for p in strategy.parameters())
    assert all(torch.equal(v, before[k]) for k, v in strategy.state_dict().items() if isinstance(v, torch.Tensor)) and torch.equal(rng, torch.get_rng_state())
    assert {"l_pos", "l_neg", "gap", "hinge", "real_other", "real_blurred", "real_zero", "synthetic_zero", "gradient_ratio", "high_real", "high_synthetic", "low_psnr", "drift", "psnr", "psnr_gain"} <= set(first)


class OneSlot(nn.Module):
    "A denoiser that looks at one of its slots only, with a perfect use of it."

    def __init__(self, slot):
        super().__init__()
        self.slot, self.w = slot, nn.Parameter(torch.ones(()))

    def forward(self, x, level):
        gamma = level.view(-1, 1, 1, 1)
        return self.w * (x[:, :3] - gamma.sqrt() * x[:, 3 * self.slot:3 * self.slot + 3]) / (1 - gamma).sqrt()


@pytest.mark.parametrize("slot, ignored", [(1, "real"), (2, "synthetic")])
def test_sensitivity_and_gradient_ratio_find_the_ignored_condition(slot, ignored):
    probe = ConditionProbe(ToyNet(), NoiseDALoss(OneSlot(slot), shuffle=False, residual_swap=False, t_range=(200, 999)), toy_batch(seed=3))
    v, other = probe(), "synthetic" if ignored == "real" else "real"
    assert all(abs(v[f"{ignored}_{how}"]) < 1e-6 for how in ("other", "blurred", "zero")) and abs(v[f"{other}_zero"]) > .1
    assert (v["gradient_ratio"] < 1e-6) == (ignored == "real") and (v["gradient_ratio"] > 1e6) == (ignored == "synthetic")
    assert ("the denoiser ignores the real condition" in probe.signs(v)) == (ignored == "real")


@pytest.mark.parametrize("shuffle", [True, False])
def test_sensitivities_are_relative_changes_under_the_same_draws(shuffle):
    batch, net, loss = toy_batch(seed=3), ToyNet(), NoiseDALoss(pick_denoiser(SMALL), shuffle=shuffle)
    probe = ConditionProbe(net, loss, batch, draws=3)
    v = probe()
    with torch.no_grad():
        z = {k: net(batch[k]) for k in ("degraded", "real")}
        draws_ = probe.draws if shuffle else probe.draws | {"flags": None, "neg_flags": None}
        error = lambda s, r: loss(*(b.repeat(3, 1, 1, 1) for b in (batch["degraded"], s - batch["degraded"], batch["real"], r - batch["real"], batch["clean"])), **draws_)["l_pos"].item()
        base = error(z["degraded"], z["real"])
        changes = {"other": lambda x: x.roll(1, 0), "blurred": lambda x: gaussian_blur(x, 2.), "zero": torch.zeros_like}
        for how, change in changes.items():
            assert v[f"real_{how}"] == pytest.approx(error(z["degraded"], change(z["real"])) / base - 1, abs=1e-5)
            assert v[f"synthetic_{how}"] == pytest.approx(error(change(z["degraded"]), z["real"]) / base - 1, abs=1e-5)
    assert v["l_pos"] == pytest.approx(base, rel=1e-5) and v["gap"] == pytest.approx(v["l_neg"] - v["l_pos"], abs=1e-5)
    levels = probe.draws["t"]
    assert len(levels) == 12 and levels.min() < 90 and levels.max() > 910  # spread over the whole range


class Fixed(nn.Module):
    "A network that does one thing to every image."

    def __init__(self, how):
        super().__init__()
        self.how, self.w = how, nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.how(x) * self.w


@pytest.mark.parametrize("how, sign", [(lambda x: gaussian_blur(x, 1.5), None), (lambda x: x + .3 * (x - gaussian_blur(x, 1.)), "more fine structure"), (lambda x: x * .7 + .3, "drift"), (lambda x: x, None)])
def test_image_diagnostics_see_what_a_network_does(how, sign):
    batch = toy_batch(seed=3)
    probe = ConditionProbe(Fixed(how), NoiseDALoss(pick_denoiser(SMALL)), batch)
    v = probe()
    found = [s for s in probe.signs(v) if "fine structure" in s or "drift" in s]
    assert (sign is None and not found) or (sign and len(found) == 1 and sign in found[0]), (found, v)
    z = how(batch["real"])
    assert v["high_real"] == pytest.approx((laplacian_energy(z) / laplacian_energy(batch["real"])).mean().item(), rel=1e-4)
    assert v["drift"] == pytest.approx((z.mean(dim=(0, 2, 3)) - batch["real"].mean(dim=(0, 2, 3))).abs().max().item(), abs=1e-6)
    assert v["psnr"] == pytest.approx((-10 * (how(batch["degraded"]).clamp(0, 1) - batch["clean"]).square().mean(dim=(1, 2, 3)).log10()).mean().item(), rel=1e-4)


def test_signs_in_words():
    probe = trained().probe(toy_batch(seed=9))
    fine = {"real_other": .2, "real_zero": .3, "gradient_ratio": .5, "high_real": .4, "high_synthetic_input": .5, "low_psnr": 40., "drift": .01, "gap": .2, "psnr_gain": .1}
    assert probe.signs(fine) == []
    for change, text in (({"real_other": 0., "real_zero": .001}, "ignores"), ({"gradient_ratio": .01}, "gradient"), ({"high_real": 1.1}, "more fine"), ({"high_real": .1}, "smoother"), ({"low_psnr": 20.}, "drift"),
                         ({"drift": .1}, "drift"), ({"gap": -.1}, "negatives"), ({"psnr_gain": -.4}, "0.3 dB")):
        assert [text in s for s in probe.signs(fine | change)] == [True], change
    assert isinstance(probe.signs(), list)


@pytest.mark.parametrize("variant", ["plain", "synthetic_only", "real_only", "no_swap", "unpaired", "placebo"])
def test_every_variant_can_be_probed(variant):
    v = trained(variant).probe(toy_batch(seed=9))()
    assert all(math.isfinite(x) or k == "gradient_ratio" for k, x in v.items())


def test_probes_need_something_to_probe():
    with pytest.raises(ValueError, match="vanilla"):
        make(variant="vanilla").probe(toy_batch())
    with pytest.raises(ValueError, match="ConditionProbe"):
        make().probe({k: v for k, v in toy_batch().items() if k != "real"})
    with pytest.raises(ValueError, match="ConditionProbe"):
        make().probe(toy_batch(1))


def test_high_frequency_ratio():
    g = gen()
    flat, x = torch.full((2, 3, 64, 64), .5), torch.rand(2, 3, 64, 64, generator=g)
    assert high_frequency_ratio(x, x).tolist() == pytest.approx([1, 1]) and high_frequency_ratio(flat, x).tolist() == [0, 0]
    assert (high_frequency_ratio(.5 + 2 * (x - .5), x) - 4).abs().max() < 1e-4 and high_frequency_ratio(gaussian_blur(x, 1.), x).max() < .2
    half = x.clone()
    half[..., 32:] = .5  # the untextured half does not count
    assert high_frequency_ratio(torch.cat([half[..., :32], x[..., 32:]], -1), half, share=.5).tolist() == pytest.approx([1, 1])
    from irnb.results.measure import evaluate
    rows = evaluate(nn.Identity(), _items(x), strategy="v", task="t", metrics={"high": high_frequency_ratio})
    assert rows[0]["value"] == pytest.approx(1)


def _items(x):
    return [Example("a", "s", True, x[:1], x[:1])]


def test_laplacian_energy_by_hand():
    x = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    x[..., 2, 2] = 1
    assert laplacian_energy(x).item() == pytest.approx((16 + 4) / 9) and laplacian_energy(torch.arange(25.).view(1, 1, 5, 5)).item() == 0  # a plane has none


# --- controls

def test_controls_after_training():
    net, x = ToyNet(), torch.rand(1, 3, 16, 16, generator=gen())
    assert torch.equal(GlobalBlur(net, 0.)(x), net(x)) and torch.equal(GlobalBlur(net, .7)(x), gaussian_blur(net(x), .7))
    torch.testing.assert_close(ScaledResidual(net, 1.)(x), net(x))
    torch.testing.assert_close(ScaledResidual(net, 0.)(x), x)


def test_oracle_tuned_controls_find_the_best_value():
    g = gen()
    clean = [gaussian_blur(torch.rand(1, 3, 32, 32, generator=g), 3.) for _ in range(3)]
    half = Fixed(lambda x: x - .5 * (x - truth[x.sum().item()]))
    items, truth = [], {}
    for y in clean:
        x = y + .1 * torch.randn(y.shape, generator=g)
        truth[x.sum().item()] = y
        items.append(Example(str(len(items)), "s", False, x, y))
    found = post_controls(half, items, factors=(1., 1.5, 2., 2.5), sigmas=(0., 1., 3.), quantise=True)
    restorer, factor, db = found["scale"]
    assert factor == 2. and isinstance(restorer, ScaledResidual) and db > 50  # it removed half of the noise
    assert found["blur"][1] > 0 and isinstance(found["blur"][0], GlobalBlur)
    with pytest.raises(ValueError, match="post_controls.*items"):
        post_controls(half, [])


@settings(deadline=None, max_examples=12)
@given(sigma=st.floats(1, 60), size=st.sampled_from([32, 48, 64]), seed=st.integers(0, 99))
def test_estimated_noise_level_of_white_noise(sigma, size, seed):
    g = gen(seed)
    line = torch.linspace(-.2, .2, size)
    smooth = (.5 + line + line[:, None] * .5).expand(4, 3, size, size)
    estimate = 255 * estimate_noise(smooth + sigma / 255 * torch.randn(smooth.shape, generator=g))
    assert estimate.shape == (4,) and estimate.mean().item() == pytest.approx(sigma, rel=.06)


def test_the_estimate_is_unbiased_for_white_noise():
    assert estimate_noise(torch.randn(24, 3, 96, 96, generator=gen())).mean().item() == pytest.approx(1, abs=.01)


def test_estimate_of_a_smooth_picture_is_nothing_and_of_correlated_noise_low():
    white = torch.randn(4, 3, 64, 64, generator=gen())
    blurred = gaussian_blur(white, 1.5)
    assert estimate_noise(torch.full((1, 3, 32, 32), .3)).item() < 1e-6
    assert .2 < (estimate_noise(.1 * blurred / blurred.std()) / .1).mean() < .8


@pytest.mark.parametrize("noise", ["matched", CameraNoise(shot=.1, read=.003), GaussianNoise(20)], ids=str)
def test_renoised_keeps_the_contract(noise):
    contract(lambda net: Renoised(net, "l1", noise=noise), nets=[ToyNet], processes=False)


def noted(strategy, batch):
    seen = []
    handle = strategy.net.register_forward_hook(lambda m, i, o: seen.append(i[0]))
    value = strategy(batch)
    handle.remove()
    return seen[0], value


def test_the_oracle_trains_on_the_targets_noise_and_enlargement():
    batch = toy_batch(8, 48)
    smooth, textured = (Renoised(ToyNet(), noise="target", task=t) for t in ("camera", "camera_textured"))
    assert isinstance(smooth.noise, CameraNoise) and (smooth.enlarge, textured.enlarge) == (2, 1)
    x, value = noted(smooth, batch)
    clean = bicubic(batch["clean"][..., :24, :24], 2).clamp(0, 1)
    degraded = smooth.noise(clean, generator=Renoised(ToyNet()).generator("cpu"))
    assert torch.equal(x, degraded)
    torch.testing.assert_close(value, torch.sqrt((smooth.net(x) - clean).square() + 1e-6).mean())
    assert smooth.needs == ("clean",) and noted(smooth, {"clean": batch["clean"][..., :47, :45]})[0].shape[-2:] == (47, 45)
    with pytest.raises(ValueError, match="task.*'denoise'"):
        Renoised(ToyNet(), task="denoise")


def test_matched_and_blurred_noise():
    batch = toy_batch(8, 48)
    batch["clean"] = torch.full_like(batch["clean"], .5)
    matched = Renoised(ToyNet(), noise="matched")
    x, _ = noted(matched, batch)
    wanted = estimate_noise(batch["real"])
    assert matched.needs == ("clean", "real") and ((x - .5).std(dim=(1, 2, 3)) / wanted - 1).abs().max() < .1
    x, _ = noted(Renoised(ToyNet(), noise="blurred", sigma=(20, 20), blur=(1.5, 1.5)), batch)
    noise = x - .5
    assert (255 * noise.square().mean(dim=(1, 2, 3)).sqrt() - 20).abs().max() < .5
    neighbours = (noise[..., 1:] * noise[..., :-1]).mean() / noise.square().mean()
    assert neighbours.item() == pytest.approx(math.exp(-1 / (4 * 1.5**2)), abs=.03)  # autocorrelation of blurred white noise


@pytest.mark.parametrize("bad", ["oracle", 3])
def test_unknown_noises_are_refused(bad):
    with pytest.raises(ValueError, match=f"Renoised.* noise.*{bad}"):
        Renoised(ToyNet(), noise=bad)
    assert set(RENOISED) == {"target", "matched", "blurred"}


# --- unpaired data: no ground truth is opened

def test_training_reads_the_real_patches_and_never_their_ground_truth(tmp_path, monkeypatch):
    import builtins
    from irnb.data import Loader, PatchSet, real_pictures, scan, task, write_patches
    from irnb.image_files import write_image
    g = gen()
    for folder in ("pairs", "truth"):
        for i in range(2):
            write_image(tmp_path / folder / f"{i}.png", torch.rand(3, 64, 64, generator=g)) if (tmp_path / folder).mkdir(exist_ok=True) is None else None
    the_task = task("camera")
    pictures = real_pictures(scan(tmp_path / "truth", min_side=32), the_task)
    write_patches(scan(tmp_path / "pairs", min_side=32), tmp_path / "patches", size=32)
    write_patches(pictures, tmp_path / "real", size=32)
    opened, original = [], builtins.open
    monkeypatch.setattr(builtins, "open", lambda file, *a, **k: opened.append(str(file)) or original(file, *a, **k))
    loader = Loader(PatchSet.open(tmp_path / "patches"), GaussianNoise(Uniform(0, 55)), batch=4, crop=24, real=PatchSet.open(tmp_path / "real"))
    strategy = make()
    for step in range(3):
        strategy(loader.batch(step)).backward()
        strategy.after_step()
    assert any("real" in f for f in opened) and not any("truth" in f for f in opened)
    other = Loader(PatchSet.open(tmp_path / "patches"), GaussianNoise(Uniform(0, 55)), batch=4, crop=24)
    assert torch.equal(other.batch(1)["clean"], loader.batch(1)["clean"]) and torch.equal(other.batch(1)["degraded"], loader.batch(1)["degraded"])  # an independent draw


# --- costs

def test_cost_counts():
    assert noise_da_cost(0., second=False) == 1 and noise_da_cost(2.) == 6 and noise_da_cost(2., swap=False) == 4 and noise_da_cost(2., second=False) == 5


def test_counted_operations_of_a_step():
    "Forward and backward of a step, counted: the network twice and the denoiser on two batches, at most what the formula says."
    from torch.utils.flop_counter import FlopCounterMode
    def flops(strategy):
        with FlopCounterMode(display=False) as counter:
            strategy(toy_batch()).backward()
        return counter.get_total_flops()
    net, strategy = ToyNet(), make()
    plain, ours = flops(Supervised(net)), flops(strategy)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        strategy.diffusion.denoiser(torch.zeros(4, 9, 24, 24), torch.zeros(4))
        denoiser = counter.get_total_flops()
        net(toy_batch()["degraded"])
        forward = counter.get_total_flops() - denoiser
    assert ours == pytest.approx(noise_da_cost(denoiser / forward) * plain, rel=.06)


# --- refusals

@pytest.mark.parametrize("real, text", [((4, 3, 16, 24), "16, 24"), ((4, 3, 24, 23), "24, 23"), ((2, 3, 24, 24), "2, 3, 24"), ((4, 1, 24, 24), "1 channel")])
def test_real_patches_that_do_not_fit(real, text):
    strategy = make()
    with pytest.raises(ValueError, match=f"batch.'real'.*{text}.*'degraded'"):
        strategy(toy_batch() | {"real": torch.rand(real)})
    with pytest.raises(ValueError, match=f"x_r.*{', '.join(map(str, real))}"):
        strategy.diffusion(*(torch.rand(4, 3, 24, 24) for _ in range(2)), *(torch.rand(real) for _ in range(2)), torch.rand(4, 3, 24, 24), generator=gen())


@pytest.mark.parametrize("key", ["degraded", "clean", "real"])
@pytest.mark.parametrize("change", [lambda x: 255 * x, lambda x: 2 * x - 1, lambda x: x * math.nan])
def test_other_ranges_are_refused(key, change):
    batch = toy_batch()
    with pytest.raises(ValueError, match=rf"batch.'{key}'.*\[0, 1\]"):
        make()(batch | {key: change(batch[key])})


def test_unclipped_noise_is_accepted():
    batch = toy_batch()
    for base in (batch["clean"], torch.zeros_like(batch["clean"])):
        check_ranges(degraded=base + 75 / 255 * torch.randn(base.shape, generator=gen()))


def test_ranges_are_looked_at_once_and_shapes_always():
    strategy, batch = make(), toy_batch()
    strategy(batch)
    strategy(batch | {"real": batch["real"] * 3})  # too late to notice
    with pytest.raises(ValueError, match="batch.'real'.*24, 16"):
        strategy(batch | {"real": batch["real"][..., :16]})


@pytest.mark.parametrize("key", ["degraded", "clean", "real", "reference"])
def test_missing_keys_are_named_even_before_the_start(key):
    strategy = make(variant="unpaired", reference="reference", start=10)
    batch = toy_batch() | {"reference": toy_batch(seed=2)["clean"]}
    with pytest.raises(ValueError, match=f"NoiseDA.*batch.'{key}'"):
        strategy({k: v for k, v in batch.items() if k != key})


@pytest.mark.parametrize("options, text", [
    ({"variant": "both"}, "variant.*both"), ({"hinge": "mean"}, "hinge"), ({"conditions": "none"}, "conditions"), ({"other": "synthetic"}, "other"), ({"predicts": "noise"}, "predicts"),
    ({"margin": -1}, "margin"), ({"margin": math.nan}, "margin"), ({"t_range": (0, 10)}, "t_min"), ({"condition_on": "t"}, "logsnr.*'t'"), ({"beta": -1}, "beta"), ({"length": 0}, "length"),
    ({"denoiser": "huge"}, "guided"), ({"reference": "clean"}, "unpaired"), ({"loss": "l7"}, "l7")])
def test_bad_options_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        make(**options)


def test_batches_too_small_to_have_other_content():
    with pytest.raises(ValueError, match="other='batch'"):
        make(variant="placebo")(toy_batch(1))
    with pytest.raises(ValueError, match="unpaired.*3.*reference="):
        make(variant="unpaired")(toy_batch(2))
    assert torch.isfinite(make()(toy_batch(1)))  # one sample is enough for the method itself


def test_super_resolution_is_refused_but_only_with_a_diffusion_loss():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 12, 1)

        def forward(self, x):
            return F.pixel_shuffle(self.conv(x), 2)
    batch = toy_batch()
    batch["clean"] = F.interpolate(batch["clean"], scale_factor=2)
    with pytest.raises(ValueError, match="48, 48.*24, 24"):
        make(Twice())(batch)
    assert torch.isfinite(make(Twice(), variant="vanilla")(batch))


def test_patches_that_the_denoiser_cannot_halve():
    with pytest.raises(ValueError, match=r"23x23.*\b2\b.*crop"):
        make()(toy_batch(size=23))


def test_draws_must_be_given_or_drawn():
    loss = small()
    full = draws()
    for missing in ("t", "eps", "flags", "neg_flags"):
        with pytest.raises(ValueError, match="generator"):
            loss(*blocks(), **{k: v for k, v in full.items() if k != missing})


@pytest.mark.parametrize("where", ["l_pos", "net"])
def test_a_diffusion_loss_that_is_not_finite_stops_before_the_step(where):
    strategy = make()
    if where == "l_pos":
        strategy.diffusion.denoiser.last[2].bias.data.fill_(math.inf)
    else:
        strategy.net.layers[0].weight.data.fill_(math.nan)
    strategy.step = 7
    with pytest.raises(DiffusionLossError, match="step 8") as error:
        strategy(toy_batch())
    assert error.value.step == 8


def test_training_on_a_loss_that_is_not_finite_ends_with_an_arithmetic_error(tmp_path):
    class Batches:
        def batch(self, step):
            if step == 3:
                strategy.diffusion.denoiser.stem.weight.data[0] = math.nan
            return toy_batch(seed=step)
    strategy = make()
    with pytest.raises((DiffusionLossError, NonFiniteError)):
        train(strategy, Batches(), TrainConfig(steps=6, log_every=2, warmup=1), progress=False)
    assert all(torch.isfinite(p).all() for p in strategy.net.parameters())


def test_on_other_devices_the_flag_is_read_every_fifty_steps():
    strategy = make()
    strategy._bad = torch.tensor(True)
    strategy.step = 47
    strategy.after_step()
    strategy.after_step()
    assert strategy.step == 49
    with pytest.raises(DiffusionLossError, match="step 50.*49"):
        strategy.after_step()
    assert strategy._bad is None
    strategy._bad = torch.tensor(False)
    strategy.step = 49
    strategy.after_step()


def test_the_class_is_found_by_its_dotted_name():
    from irnb.pipeline import find_class
    for name in ("NoiseDA", "Renoised"):
        assert issubclass(find_class(f"irnb.strategies.{name}"), Strategy)
