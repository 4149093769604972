"""SPN: histories to the step, the loss to the sign, the controls, agreement of processes, resume, and every refusal."""
import copy
import io
import json
import math
import warnings

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from irnb.strategies.features import FeatureDistance, PixelFeatures, RandomTrunk
from irnb.strategies.spn import (AGAINST, CR, RELEASED_NEGATIVES, RELEASED_TRAINING, SPN, SPN_PRESETS, CalibratedWeight, GradientRatioError, LatencyModels,
                                 NegativeSpec, ResidualTrigger, SPNObjective, as_negatives, released_lr, spn_cost, stranger, unwrap)
from irnb.strategies.strategy import Frozen, Strategy, Supervised, ToyNet, _loop, contract, toy_batch
from irnb.training import TrainConfig, train
from tests.nets import Batches

PAST = [{"interval": 2, "decay": .1}, {"interval": 3, "decay": .5}]


def make(net=None, **options):
    return SPN(net or ToyNet(), **({"extractor": "random", "negatives": PAST} | ({} if "lam" in options else {"rho": .1}) | options))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Scalar(nn.Module):
    "One number as a network."

    def __init__(self, value=0.):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([value], dtype=torch.float64))

    def reset_parameters(self):
        self.w.data.fill_(5)

    def forward(self, x):
        return x * self.w


def followed(specs, steps, **options):
    "Values of each negative after each step, for the target theta(t) = t, and the indices refreshed."
    theta, values, due = Scalar(), [], []
    models = LatencyModels(theta, specs, **options)
    for t in range(1, steps + 1):
        theta.w.data.fill_(t)
        due.append(models.update(theta, t))
        values.append([net.net.w.item() for net in models.nets])
    return values, due, models


# --- the mechanics of one pixel (section 1 of the specification)

@pytest.mark.parametrize("lam", [.1, .5, .9])
@pytest.mark.parametrize("g, n", [(.4, .7), (.7, .4), (.5, .5 + 1e-9)])
def test_slopes_and_minimiser_of_one_pixel(lam, g, n):
    objective = SPNObjective("l1", FeatureDistance(PixelFeatures()).double(), lam)
    pixel = lambda v: torch.full((1, 1, 1, 1), v, dtype=torch.float64)

    def at(v):
        o = pixel(v).requires_grad_()
        total = objective(o, pixel(g), [pixel(n)]).total
        return total.item(), torch.autograd.grad(total, o)[0].item()

    low, high, toward = min(g, n), max(g, n), 1 if n > g else -1
    assert at(low - .2)[1] == pytest.approx(-(1 - lam), abs=1e-12) and at(high + .2)[1] == pytest.approx(1 - lam, abs=1e-12)
    assert at((g + n) / 2)[1] == pytest.approx(toward * (1 + lam), abs=1e-12)
    values = {v: at(v)[0] for v in [g, n, low - .3, high + .3, (g + n) / 2] + [i / 50 for i in range(51)]}
    assert min(values, key=values.get) == pytest.approx(g, abs=1e-12)


def test_published_sanity_values_of_the_objective():
    objective = SPNObjective("l1", FeatureDistance(PixelFeatures()), .5)
    one = lambda v: torch.full((1, 1, 1, 1), v, dtype=torch.float64)
    values = [objective(one(o), one(.4), [one(.7)]).total.item() for o in (.2, .4, .5, .7, .9)]
    assert values == pytest.approx([-.05, -.15, 0, .3, .4], abs=1e-12)


@pytest.mark.parametrize("sign, factor", [("-", 1.3), ("+", .7)])
def test_the_sign_moves_an_output_between_negative_and_truth(sign, factor):
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.v = nn.Parameter(torch.tensor(.2))

        def forward(self, x):
            return self.v.expand(x.shape)

    net = Constant()
    strategy = SPN(net, extractor="pixels", negatives=[{"interval": None}], lam=.3, sign=sign)
    net.v.data.fill_(.5)
    strategy({"degraded": torch.zeros(1, 3, 4, 4), "clean": torch.full((1, 3, 4, 4), .9)}).backward()
    assert net.v.grad.item() == pytest.approx(-factor, rel=1e-6)


# --- latency models

def test_published_recurrence_mix_and_pairing_values():
    values, due, _ = followed([NegativeSpec(2, .1)], 6)
    assert [v[0] for v in values] == pytest.approx([0, 1.8, 1.8, 3.78, 3.78, 5.778], abs=1e-12) and due == [[], [0]] * 3
    mixed = LatencyModels(Scalar(1.), [NegativeSpec(2, .1, .1)], init="mix")
    assert mixed.nets[0].net.w.item() == pytest.approx(1.4, abs=1e-12)
    specs = [NegativeSpec(2, .5), NegativeSpec(3, .9)]
    values, due, models = followed(specs, 6, pairing="reversed")
    assert due == [[], [1], [0], [1], [], [0, 1]] and models.intervals == [3, 2] and models.decays == [.5, .9]
    assert values[2][0] == pytest.approx(1.5) and values[1][1] == pytest.approx(.2)
    assert followed(specs, 6)[1] == [[], [0], [1], [0], [], [0, 1]]


@settings(deadline=None, max_examples=25)
@given(s=st.integers(1, 9), alpha=st.floats(0, .99), steps=st.integers(0, 40), start=st.floats(-3, 3))
def test_constant_target_closed_form_and_number_of_refreshes(s, alpha, steps, start):
    models, target = LatencyModels(Scalar(start), [NegativeSpec(s, alpha)]), Scalar(2.)
    count = sum(len(models.update(target, t)) for t in range(1, steps + 1))
    assert count == steps // s
    assert models.nets[0].net.w.item() - 2 == pytest.approx(alpha ** count * (start - 2), abs=1e-9)


def test_age_of_the_weights():
    values, _, models = followed([NegativeSpec(10, .1), NegativeSpec(7, .5), NegativeSpec(None, .1)], 133)
    assert models.ages(133) == pytest.approx([3 + 10 * .1 / .9, 0 + 7 * 1, 133], abs=1e-3)
    assert models.ages(133)[:2] == pytest.approx([133 - v for v in values[-1][:2]], abs=1e-3)  # theta(t) = t, so the lag is the age
    assert models.ages(140) == pytest.approx([a + 7 for a in models.ages(133)])


def test_fractions_of_the_schedule():
    assert LatencyModels(Scalar(), [NegativeSpec(.01), NegativeSpec(.1), {"interval": 3}], schedule=300).intervals == [3, 30, 3]
    with pytest.raises(ValueError, match="schedule"):
        LatencyModels(Scalar(), [NegativeSpec(.01)])


class Normed(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(.5), nn.Conv2d(4, 3, 3, padding=1))


@pytest.mark.parametrize("policy", ["copy", "ema", "ignore"])
@pytest.mark.parametrize("how", ["update", "push"])
def test_batch_norm_statistics_follow_the_policy(policy, how):
    target = Normed().train()
    models = LatencyModels(target, [NegativeSpec(1, .25)], buffers=policy)
    own, target[1].running_mean[:], target[1].num_batches_tracked[...] = models.nets[0].net[1], 4., 7
    target(torch.rand(2, 3, 8, 8))
    mean, count = target[1].running_mean.clone(), target[1].num_batches_tracked.item()
    models.update(target, 1) if how == "update" else models.push(target, .25)
    want = {"copy": mean, "ema": .75 * mean, "ignore": 0 * mean}[policy]
    torch.testing.assert_close(own.running_mean, want)
    assert own.num_batches_tracked.item() == (0 if policy == "ignore" else count)
    assert target.training and target[1].training and not any(m.training for m in models.nets[0].modules())
    models.train()
    assert not any(m.training for m in models.nets[0].modules()) and torch.equal(models(x := torch.rand(1, 3, 8, 8))[0], models(x)[0])


def test_wrapped_targets_follow_by_name():
    plain = ToyNet(seed=1)
    for wrapped in (nn.DataParallel(plain), torch.compile(plain, backend="eager"), nn.DataParallel(torch.compile(plain, backend="eager"))):
        models = LatencyModels(wrapped, [NegativeSpec(1, 0.)])
        assert unwrap(wrapped) is plain and list(models.nets[0].net.state_dict()) == list(plain.state_dict())
        plain.layers[0].weight.data += 1
        models.update(wrapped, 1)
        assert same(models.nets[0].net, plain)
    part = ToyNet(seed=1)
    models = LatencyModels(part, [NegativeSpec(1, 0.)])
    part.layers[1] = torch.compile(part.layers[1], backend="eager")  # compiled in part: the name gains _orig_mod
    part.layers[1]._orig_mod.weight.data += 1
    models.update(part, 1)
    assert torch.equal(models.nets[0].net.layers[1].weight, part.layers[1]._orig_mod.weight)


@pytest.mark.parametrize("other, name", [(ToyNet(width=4), "layers.0.weight"), (Normed(), "layers.0.weight"), (nn.Sequential(*Normed(), nn.ReLU()), "layers.0.weight")])
def test_another_architecture_is_refused(other, name):
    models = LatencyModels(ToyNet(), [NegativeSpec(1)])
    with pytest.raises(ValueError, match=name):
        models.update(other, 1)
    with pytest.raises(ValueError, match=name):
        LatencyModels(ToyNet(), [NegativeSpec(1)], init="load", states=[other.state_dict()])


def test_a_missing_buffer_is_refused():
    target = Normed()
    models, target[1].running_mean = LatencyModels(target, [NegativeSpec(1)]), torch.zeros(5)
    with pytest.raises(ValueError, match="1.running_mean"):
        models.update(target, 1)


def test_load_starts_from_given_states():
    states = [ToyNet(seed=i).state_dict() for i in (3, 4)]
    models = LatencyModels(ToyNet(), PAST, init="load", states=states)
    assert all(torch.equal(a, b) for net, s in zip(models.nets, states) for a, b in zip(net.net.state_dict().values(), s.values()))


def test_strangers_are_seeded_different_and_leave_the_global_generator():
    net, before = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Linear(2, 2)), torch.get_rng_state()
    net[1].running_mean += 3
    a, b, c = stranger(net, 1), stranger(net, 1), stranger(net, 2)
    assert same(a, b) and not torch.equal(a[0].weight, c[0].weight) and not torch.equal(a[0].weight, net[0].weight) and not a[1].running_mean.any()
    mixed = [LatencyModels(net, [NegativeSpec(2, 0, .1)] * 2, init="mix", generator=torch.Generator().manual_seed(s), buffers=policy) for s, policy in ((0, "copy"), (0, "ignore"), (1, "copy"))]
    assert torch.equal(before, torch.get_rng_state())
    first, second = (m.net[0].weight for m in mixed[0].nets)
    assert not torch.equal(first, second) and torch.equal(first, mixed[1].nets[0].net[0].weight) and not torch.equal(first, mixed[2].nets[0].net[0].weight)
    assert mixed[0].nets[0].net[1].running_mean.tolist() == [3] * 3 and mixed[1].nets[0].net[1].running_mean.tolist() == [0] * 3
    share = (first - net[0].weight).norm() / net[0].weight.norm()
    assert .05 < share < .3  # a tenth of an unrelated network


def test_storage_is_at_least_float32_and_low_precision_is_refused_where_increments_vanish():
    target = ToyNet().bfloat16()
    models = LatencyModels(target, [NegativeSpec(1, .999)])
    assert next(models.parameters()).dtype == torch.float32 and models(torch.rand(1, 3, 8, 8).bfloat16())[0].dtype == torch.float32
    target.layers[0].weight.data += 1
    models.update(target, 1)
    moved = (models.nets[0].net.layers[0].weight - ToyNet().bfloat16().float().layers[0].weight).mean().item()
    assert moved == pytest.approx(1e-3, rel=.02)
    assert next(LatencyModels(ToyNet().double(), PAST).parameters()).dtype == torch.float64
    assert next(LatencyModels(ToyNet(), [NegativeSpec(1, .1)], storage_dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="bfloat16.*0.999"):
        LatencyModels(ToyNet(), [NegativeSpec(1, .999)], storage_dtype=torch.bfloat16)


class Many(ToyNet):
    def forward(self, x):
        y = super().forward(x)
        return {"image": y, "features": [x]}


def test_output_adapter():
    with pytest.raises(ValueError, match="dict.*output="):
        LatencyModels(Many(), PAST)(torch.rand(1, 3, 8, 8))
    outs = LatencyModels(Many(), PAST, output=lambda d: d["image"])(torch.rand(1, 3, 8, 8))
    assert [o.shape for o in outs] == [(1, 3, 8, 8)] * 2 and not any(o.requires_grad for o in outs)


@pytest.mark.parametrize("options, message", [({"init": "zeros"}, "zeros"), ({"buffers": "sum"}, "sum"), ({"pairing": "odd"}, "odd"), ({"init": "load"}, "states"),
                                              ({"states": [{}]}, "init='load'"), ({"init": "load", "states": [{}]}, "2")])
def test_bad_latency_options(options, message):
    with pytest.raises(ValueError, match=message):
        LatencyModels(ToyNet(), PAST, **options)


@pytest.mark.parametrize("spec, message", [({"interval": 0}, "interval"), ({"interval": -1}, "interval"), ({"interval": 2.5}, "interval.*2.5"), ({"interval": True}, "interval"),
                                           ({"interval": "100"}, "interval"), ({"interval": math.inf}, "null"), ({"decay": 1.0}, "null"), ({"decay": -.1}, "decay"),
                                           ({"decay": "1e-3"}, "1.0e-3"), ({"start_mix": 2}, "start_mix"), ({"start_mix": math.nan}, "start_mix"), ({"every": 3}, "every"), (100, "100")])
def test_bad_negatives(spec, message):
    with pytest.raises(ValueError, match=message):
        as_negatives([spec])
    if isinstance(spec, dict) and set(spec) <= {"start_mix"}:
        with pytest.raises(ValueError, match="mix"):
            LatencyModels(ToyNet(), [NegativeSpec(start_mix=.1)])


def test_start_mix_without_mix_is_refused():
    with pytest.raises(ValueError, match="init='mix'"):
        LatencyModels(ToyNet(), [NegativeSpec(2, .1, .1)])


# --- the adaptive rule

def test_trigger_by_hand():
    g = torch.Generator().manual_seed(0)
    out, gt = torch.rand(3, 2, 5, 4, generator=g), torch.rand(3, 2, 5, 4, generator=g)
    by_hand = sum(float((2 * (o - t)).double().flatten().numpy().std(ddof=1)) for o, t in zip(out, gt)) / 3
    measured = ResidualTrigger().measure(out, gt)
    assert (measured[0] / measured[1]).item() == pytest.approx(by_hand, rel=1e-6)
    assert ResidualTrigger(by_hand * .999)(out, gt) and not ResidualTrigger(by_hand * 1.001)(out, gt)
    flat = torch.zeros(1, 3, 4, 4)
    assert not ResidualTrigger(0.)(flat, flat)  # strictly above
    assert ResidualTrigger().measure(out.bfloat16(), gt)[0].dtype == torch.float32


@pytest.mark.parametrize("pixels", [2, 12, 48])
def test_published_trigger_value(pixels):
    residual = torch.tensor([.02, -.02], dtype=torch.float64).repeat(pixels // 2).view(1, 1, 1, pixels)
    measured = ResidualTrigger().measure(residual, torch.zeros_like(residual))
    assert measured[0].item() == pytest.approx(.04 * math.sqrt(pixels / (pixels - 1)), rel=1e-12)


def test_ring_order_and_exactness_of_no_refresh():
    theta, ring = Scalar(), LatencyModels(Scalar(), [NegativeSpec()] * 3)
    fires, slots = [True, True, False, True, True, False, True], []
    for t, fire in enumerate(fires, 1):
        theta.w.data.fill_(t)
        before = copy.deepcopy(ring.state_dict())
        slots.append(ring.push(theta, .001, when=torch.tensor(fire), step=t).item())
        if not fire:
            assert all(torch.equal(a, b) for a, b in zip(before.values(), ring.state_dict().values()))
    assert slots == [0, 1, -1, 2, 0, -1, 1] and ring.pushes.item() == 5
    assert [n.net.w.item() for n in ring.nets] == pytest.approx([.999 * 5 + .001 * .999, .999 * 7 + .001 * .999 * 2, .999 * 4], rel=1e-12)
    assert ring.ages(7) == pytest.approx([7 - n.net.w.item() for n in ring.nets], abs=1e-5)
    hard = LatencyModels(ToyNet(), [NegativeSpec()])
    hard.push(other := ToyNet(seed=5), 0.)
    assert same(hard.nets[0].net, other)


def test_the_ring_takes_the_weights_before_the_optimiser_step():
    strategy = make(adaptive={"tau": 0., "decay": 0.}, lam=.01)
    seen, opt = [], torch.optim.SGD(strategy.net.parameters(), lr=.1)
    for i in range(5):
        seen.append(copy.deepcopy(strategy.net.state_dict()))
        strategy(toy_batch(seed=i)).backward()
        opt.step(), strategy.after_step()
        newest = strategy.models.nets[i % 2].net.state_dict()
        assert all(torch.equal(newest[k], seen[-1][k]) for k in newest) and strategy.models.pushes.item() == i + 1
        assert not torch.equal(newest["layers.0.weight"], strategy.net.layers[0].weight)
    assert strategy.models.ages(5) == pytest.approx([1, 2])


def test_the_ring_freezes_below_tau():
    strategy = make(adaptive=10., lam=.01)
    _loop(strategy, [toy_batch(seed=i) for i in range(3)])
    assert strategy.models.pushes.item() == 0 and all(same(n.net, ToyNet()) for n in strategy.models.nets)


# --- the objective

def triple(seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.rand(2, 3, 12, 12, generator=g, dtype=torch.float64) for _ in range(6)]


def objective(lam=.3, **options):
    return SPNObjective("l1", FeatureDistance(RandomTrunk().double()), lam, **options)


def test_total_is_the_loss_minus_the_mean_distance():
    out, gt, *negatives = triple()
    terms = objective()(out, gt, negatives)
    by_hand = [FeatureDistance(RandomTrunk().double())(out, [n])[0] for n in negatives]
    torch.testing.assert_close(terms.per_negative, torch.stack(by_hand), rtol=1e-12, atol=0)
    torch.testing.assert_close(terms.total, (out - gt).abs().mean() - .3 * sum(by_hand) / 4, rtol=1e-12, atol=0)
    torch.testing.assert_close(objective(sign=1)(out, gt, negatives).total, (out - gt).abs().mean() + .3 * sum(by_hand) / 4, rtol=1e-12, atol=0)
    assert terms.total < terms.rec and terms.neg > 0 and terms.squares is None


def test_identical_negatives_equal_one_and_order_is_irrelevant():
    out, gt, *negatives = triple()
    one, four = objective()(out, gt, negatives[:1]), objective()(out, gt, negatives[:1] * 4)
    torch.testing.assert_close(four.total, one.total, rtol=1e-13, atol=0)
    torch.testing.assert_close(objective()(out, gt, negatives).total, objective()(out, gt, negatives[::-1]).total, rtol=1e-13, atol=0)


def test_gradient_reaches_the_output_only():
    tensors = [t.requires_grad_() for t in triple()]
    out, gt, *negatives = tensors
    objective()(out, gt.detach(), negatives).total.backward()
    assert out.grad.abs().sum() > 0 and all(n.grad is None for n in negatives)


def test_weight_zero_or_no_negatives_is_the_loss_itself():
    out, gt, *negatives = triple()
    for terms in (objective(0.)(out, gt, negatives), objective()(out, gt, []), objective()(out, gt, [out])):
        assert torch.equal(terms.total, (out - gt).abs().mean()) and terms.skipped == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_negatives_that_are_not_finite_are_left_out(bad):
    out, gt, *negatives = triple()
    out.requires_grad_()
    fine = objective()(out, gt, negatives[:3])
    broken = negatives[3].clone()
    broken[0, 1, 2, 3] = bad
    terms = objective()(out, gt, [*negatives[:3], broken], measure=True)
    assert terms.skipped == 1 and terms.per_negative[3] == 0 and torch.isfinite(terms.squares).all()
    torch.testing.assert_close(terms.total, fine.rec - .3 * .75 * fine.neg, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(t, out)[0] for t in (terms.total, fine.rec - .3 * .75 * fine.neg)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-15)


def test_a_network_history_that_explodes_does_not_stop_training():
    strategy = make(lam=.01)
    strategy.models.nets[1].net.layers[0].weight.data.fill_(math.inf)
    loss = strategy(toy_batch())
    loss.backward()
    assert torch.isfinite(loss) and strategy.logs["skipped"] == 1 and all(torch.isfinite(p.grad).all() for p in strategy.net.parameters())


def test_random_gradient_has_the_norm_of_the_contrastive_one_and_another_direction():
    out, gt, *negatives = triple()
    out.requires_grad_()
    gradient = lambda **o: torch.autograd.grad(objective()(out, gt, negatives, **o).total - (out - gt).abs().mean(), out)[0]
    real, random, again, other = gradient(), *(gradient(noise=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert random.norm() == pytest.approx(real.norm().item(), rel=1e-9) and torch.equal(random, again) and not torch.equal(random, other)
    assert abs(F.cosine_similarity(random.flatten(), real.flatten(), dim=0)) < .15
    value = objective()(out, gt, negatives, noise=torch.Generator().manual_seed(1)).total
    torch.testing.assert_close(value, objective()(out, gt, negatives).total)
    with torch.no_grad():
        objective()(out, gt, negatives, noise=torch.Generator().manual_seed(1))


def test_measured_ratio_is_that_of_the_gradients_at_the_output():
    out, gt, *negatives = triple()
    out.requires_grad_()
    terms = objective()(out, gt, negatives, measure=True)
    rec, neg = (torch.autograd.grad(t, out)[0].norm() for t in ((out - gt).abs().mean(), objective()(out, gt, negatives).neg))
    assert math.sqrt(terms.squares[1] / terms.squares[0]) == pytest.approx((neg / rec).item(), rel=1e-9)
    terms.total.backward()  # the graph is still there


def test_measured_squares_of_unequal_parts_add_up_to_those_of_the_whole():
    out, gt, negative, *_ = triple()
    out = torch.cat([out, gt.flip(0) * .3])
    gt, negative = torch.cat([gt, negative]), torch.cat([negative, gt * .9])
    uneven = SPNObjective("charbonnier", FeatureDistance(PixelFeatures(), criterion="l2"))
    squares = lambda part: uneven(out[part].detach().requires_grad_(), gt[part], [negative[part]], measure=True).squares
    ratio = lambda s: (s[1] / s[0]).item()
    assert ratio(squares(slice(0, 3)) + squares(slice(3, 4))) == pytest.approx(ratio(squares(slice(0, 4))), rel=1e-9)


# --- the weight

def ratio_squares(ratio):
    return torch.tensor([4., 4 * ratio ** 2])


def test_calibration_takes_the_median_after_the_warmup_and_then_freezes():
    weight = CalibratedWeight(rho=.1, warmup=3, check_every=20)
    assert [weight.measures(s) for s in (1, 3, 4)] == [False, False, True] and weight.lam == 0
    for step, ratio in enumerate([5., 0., 1., 2., 100., 3.], 4):  # a ratio of 0 (negative = output) does not count
        assert weight.lam == 0 and weight.measures(step)
        weight.observe(step, ratio_squares(ratio))
    assert weight.lam == pytest.approx(.1 / 3) and weight.ratio == .1
    assert [s for s in range(1, 61) if weight.measures(s)] == [2, 10, 20, 40, 60]
    weight.observe(20, ratio_squares(4.))
    assert weight.lam == pytest.approx(.1 / 3) and weight.ratio == pytest.approx(.4 / 3)


def test_state_of_the_weight_resumes_and_does_not_override_a_fixed_one():
    half = CalibratedWeight(rho=.1)
    for ratio in (1., 2., 3.):
        half.observe(1, ratio_squares(ratio))
    state = half.state_dict()
    again = CalibratedWeight(rho=.1)
    again.load_state_dict(state)
    for ratio in (4., 5.):
        again.observe(1, ratio_squares(ratio))
    assert again.lam == pytest.approx(.1 / 3)
    fixed = CalibratedWeight(.5)
    fixed.load_state_dict(again.state_dict())
    assert fixed.lam == .5


def test_warning_above_one_half_and_stop_above_one():
    weight = CalibratedWeight(.1)
    with pytest.warns(UserWarning, match="0.60.*lam"):
        weight.observe(2, ratio_squares(6.))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weight.observe(3, ratio_squares(7.))  # said once
        weight.observe(4, ratio_squares(5.))  # exactly one half is fine
        weight.observe(5, ratio_squares(float("nan")))
    with pytest.raises(GradientRatioError, match=r"lam.*0\.0067.*rho") as error:
        weight.observe(6, ratio_squares(15.))
    assert (error.value.step, error.value.lam) == (6, .1) and error.value.ratio == pytest.approx(1.5) and isinstance(error.value, ValueError)


def test_a_lambda_that_is_too_large_stops_training_early():
    strategy = SPN(ToyNet(), extractor="random", negatives=PAST, lam=5.)
    with pytest.raises(GradientRatioError):
        _loop(strategy, [toy_batch(seed=i) for i in range(12)])
    assert strategy.step <= 10


@pytest.mark.parametrize("options, message", [({"lam": -1.}, "lam"), ({"lam": "1e-3"}, "1.0e-3"), ({"lam": math.nan}, "lam"), ({"rho": 0.}, "rho"), ({"rho": 1.5}, "rho"),
                                              ({"warmup": -1}, "warmup"), ({"warmup": 1.5}, "warmup"), ({"batches": 0}, "batches"), ({"check_every": 0}, "check_every")])
def test_bad_weights(options, message):
    with pytest.raises(ValueError, match=message):
        CalibratedWeight(**options)
    with pytest.raises(ValueError, match="sign"):
        SPNObjective("l1", FeatureDistance(PixelFeatures()), sign=0)


# --- the strategy

CONFIGURATIONS = {"calibrated": {}, "fixed": {"lam": .02}, "adaptive": {"adaptive": .001}, "mix": {"negatives": [{"interval": 2, "decay": .1, "start_mix": .1}] * 2},
                  "warm": {"warmup": 2, "against": "random"}} | {name: {"preset": name} for name in ("other", "degraded", "positive", "plus", "random")}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_configuration_keeps_the_contract(name):
    options = CONFIGURATIONS[name]
    off = {k: v for k, v in options.items() if k != "lam"}
    contract(lambda net: make(net, **options), reduced=lambda net: make(net, lam=0.0, **off), nets=[ToyNet], processes=False)


def test_contract_on_nafnet_and_without_negatives():
    contract(lambda net: make(net), reduced=lambda net: make(net, negatives=[]), processes=False, options={"extractor": "random", "lam": .1})


def reference_run(batches, intervals, decays, lam, against="history"):
    "The released algorithm in plain steps, written independently: lists, deep copies, autograd."
    net, trunk, weights = ToyNet().double(), RandomTrunk().double(), (.2, .3, .5)
    past = [copy.deepcopy(net) for _ in intervals]
    opt = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for t, batch in enumerate(batches, 1):
        out = net(batch["degraded"])
        with torch.no_grad():
            negatives = [p(batch["degraded"]) for p in past]
        distances = [sum(w * F.l1_loss(a, b.detach()) for w, a, b in zip(weights, trunk(out), trunk(n))) for n in negatives]
        loss = F.l1_loss(out, batch["clean"]) - lam * sum(distances) / len(distances)
        opt.zero_grad(), loss.backward(), opt.step()
        with torch.no_grad():
            for p, s, a in zip(past, intervals, decays):
                if t % s == 0:
                    for mine, theirs in zip(p.parameters(), net.parameters()):
                        mine.copy_(a * mine + (1 - a) * theirs)
    return net, past


def test_ten_steps_equal_the_algorithm_written_by_hand():
    batches = [{key: x.double() for key, x in toy_batch(seed=i).items()} for i in range(10)]  # in float32 ten steps drift apart with the processor's order of sums
    net, past = reference_run(batches, (2, 3), (.1, .5), .05)
    strategy = make(lam=.05).double()
    _loop(strategy, batches)
    for mine, reference in zip([strategy.net, *(n.net for n in strategy.models.nets)], [net, *past]):
        for a, b in zip(mine.parameters(), reference.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    plain = ToyNet().double()
    _loop(Supervised(plain), batches)
    assert (plain.layers[1].weight - strategy.net.layers[1].weight).abs().max() > 1e-3  # the agreement above means something


def test_update_sees_the_weights_after_the_step_and_the_source_is_the_raw_network():
    strategy = make(negatives=[{"interval": 1, "decay": 0.}], lam=.01)
    _loop(strategy, [toy_batch()])
    assert same(strategy.models.nets[0].net, strategy.net) and not same(strategy.net, ToyNet())


def differences(strategy, batch):
    "Gradient of the contrastive part at the weights: that of the strategy minus that of the plain loss."
    gradients = []
    for s in (strategy, Supervised(strategy.net)):
        strategy.net.zero_grad()
        s(batch).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in strategy.net.parameters()]))
    return gradients[0] - gradients[1]


@pytest.mark.parametrize("against", AGAINST)
@pytest.mark.parametrize("sign", ["-", "+"])
def test_each_control_pushes_as_defined(against, sign):
    strategy, batch = make(against=against, sign=sign, lam=.2, negatives=[{"interval": None}]), toy_batch()
    for p in strategy.net.parameters():
        p.data += .02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
    found = differences(strategy, batch)
    past = strategy.models(batch["degraded"])[0] if against in ("history", "other") else None
    negative = {"history": past, "other": None if past is None else torch.cat([past[-1:], past[:-1]]), "degraded": batch["degraded"], "clean": batch["clean"]}.get(against)
    out = strategy.net(batch["degraded"])
    if against == "random":
        return assert_random(strategy, batch, found)
    distance = FeatureDistance(RandomTrunk())(out, [negative])[0]
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad((1 if sign == "+" else -1) * .2 * distance, list(strategy.net.parameters()))])
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)


def assert_random(strategy, batch, found):
    assert found.norm() > 0 and (strategy(batch) - Supervised(strategy.net)(batch)).abs() > 0
    real = differences(make(copy.deepcopy(strategy.net), lam=.2, negatives=[{"interval": None}]), batch)
    assert not torch.allclose(found, real, rtol=.1)


@pytest.mark.parametrize("name, expected", [("frozen", {"against": "history", "sign": -1, "intervals": [None]}), ("other", {"against": "other", "sign": -1, "intervals": [100, 200, 500, 1000]}),
                                            ("degraded", {"against": "degraded", "sign": -1, "intervals": []}), ("positive", {"against": "clean", "sign": 1, "intervals": []}),
                                            ("plus", {"against": "history", "sign": 1, "intervals": [100, 200, 500, 1000]}), ("random", {"against": "random", "sign": -1, "intervals": [100, 200, 500, 1000]})])
def test_presets_of_the_controls(name, expected):
    strategy = SPN(ToyNet(), extractor="random", preset=name)
    assert {"against": strategy.against, "sign": strategy.objective.sign, "intervals": strategy.models.intervals} == expected
    assert strategy.models.decays == [.1] * len(expected["intervals"]) and strategy.objective.lam == 1e-3


def test_adaptive_preset():
    strategy = SPN(ToyNet(), extractor="random", preset="adaptive")
    assert (strategy.trigger.tau, strategy.keep, len(strategy.models)) == (.022, .001, 4)


def test_released_preset_is_the_released_configuration(tmp_path):
    from tests.test_spn_features import made_up
    torch.save(made_up(last=14), tmp_path / "v.pth")
    strategy = SPN(ToyNet(), preset="released", extractor={"name": "vgg16", "weights": tmp_path / "v.pth"})
    distance = strategy.objective.distance
    assert distance.extractor.names == ("relu1_2", "relu2_2", "relu3_3") and distance.weights == (.2, .3, .5) and distance.criterion == "l1"
    assert strategy.objective.lam == 1e-3 and strategy.objective.sign == -1 and strategy.label == "SPN (VGG16)"
    assert sorted(strategy.models.intervals) == [100, 200, 500, 1000] and strategy.models.decays == [.1] * 4 and strategy.models.policy == "ignore"
    assert strategy.models.intervals == [1000, 500, 200, 100]  # the release walks the intervals backwards
    first = ToyNet().layers[0].weight
    lag = [(n.net.layers[0].weight - first).norm() / first.norm() for n in strategy.models.nets]
    assert all(.05 < v < .4 for v in lag) and SPN_PRESETS["released"]["extractor"]["layers"] == ["relu1_2", "relu2_2", "relu3_3"]
    assert RELEASED_TRAINING | {"batch": 4} == RELEASED_TRAINING and RELEASED_TRAINING["betas"] == (.9, .9) and RELEASED_TRAINING["clip"] is None
    TrainConfig.from_dict({k: v for k, v in RELEASED_TRAINING.items() if k not in ("batch", "crop")})
    assert [released_lr(t) for t in (1, 50_001, 100_001, 200_001, 500_001)] == pytest.approx([2e-4, 1.00005e-4, 1e-8, 2e-4, 1e-8], rel=1e-9)
    json.dumps(SPN_PRESETS)  # fits a parameter file


def test_cost_count():
    assert spn_cost(0) == 1 and spn_cost(4, .042) == pytest.approx(2.417, abs=1e-3) and spn_cost(1, 2.6) == pytest.approx(3.93, abs=.01)


class Up2(nn.Module):
    "x2 super-resolution."

    def __init__(self):
        super().__init__()
        self.conv = nn.utils.skip_init(nn.Conv2d, 3, 12, 3, padding=1)
        self.conv.weight.data.normal_(0, .1, generator=torch.Generator().manual_seed(0)), self.conv.bias.data.zero_()

    def forward(self, x):
        return F.interpolate(x, scale_factor=2) + F.pixel_shuffle(self.conv(x), 2)


@pytest.mark.parametrize("against", AGAINST)
def test_super_resolution(against):
    g = torch.Generator().manual_seed(0)
    clean = F.interpolate(torch.rand(4, 3, 4, 4, generator=g), size=24, mode="bicubic").clamp(0, 1)
    batches = [{"degraded": F.interpolate(clean.roll(i, 0), size=12, mode="area"), "clean": clean.roll(i, 0)} for i in range(6)]
    strategy = make(Up2(), against=against)
    losses, _ = _loop(strategy, batches * 4)
    assert losses[-1] < losses[0] and strategy.objective.lam > 0 and strategy.logs["negative"] > 0
    losses, _ = _loop(CR(Up2(), extractor="random", weight=1e-3), batches * 4)
    assert losses[-1] < losses[0]


class Reads(TorchFunctionMode):
    "Counts the calls that make the host wait for the device: reading a value, or an operation whose size depends on one."
    NAMES = {"item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "allclose"}

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.NAMES:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{"lam": .02}, {"lam": .02, "adaptive": .001}, {"lam": .02, "against": "random"}, {"preset": "degraded", "lam": .02}], ids=str)
def test_the_step_does_not_wait_for_the_device(options):
    strategy, batch, reads = make(check_every=11, **options), toy_batch(), {}
    for step in range(1, 14):
        with Reads() as mode:
            strategy(batch).backward()
            strategy.after_step()
        reads[step] = mode.found
    assert {s: n for s, n in reads.items() if n} == {2: ["tolist"], 10: ["tolist"], 11: ["tolist"]}
    with Reads() as mode:
        float(torch.ones(1)), bool(torch.ones(1) > 0)
    assert len(mode.found) == 2


def test_features_of_the_output_once_and_negatives_without_a_graph():
    strategy, calls, nets = make(lam=.02, negatives=PAST * 2), [], []
    strategy.objective.distance.extractor.register_forward_hook(lambda m, a, o: calls.append(torch.is_grad_enabled()))
    for net in strategy.models.nets:
        net.net.register_forward_hook(lambda m, a, o: nets.append((torch.is_grad_enabled(), m.training)))
    strategy(toy_batch())
    assert calls == [False] * 4 + [True] and nets == [(False, False)] * 4


def test_nothing_is_computed_while_the_term_is_off():
    strategy, calls = make(warmup=3), []
    strategy.objective.distance.extractor.register_forward_hook(lambda *a: calls.append(strategy.step))
    plain = Supervised(ToyNet())
    batches = [toy_batch(seed=i) for i in range(3)]
    _loop(strategy, batches), _loop(plain, batches)
    assert not calls and same(strategy.net, plain.net) and set(strategy.logs) == {"task_loss", "negative", "lam", "grad_ratio", "skipped"}
    _loop(strategy, batches * 4)
    assert calls and strategy.objective.lam > 0


def test_autocast_is_the_same_for_network_and_history():
    strategy, dtypes = make(lam=.02), []
    for net in (strategy.net, *(n.net for n in strategy.models.nets)):
        net.register_forward_hook(lambda m, a, out: dtypes.append(out.dtype))
    strategy.models.nets[0].net.layers[0].weight.data += .1
    with torch.autocast("cpu", torch.bfloat16):
        loss = strategy({k: v for k, v in toy_batch().items()})
    assert len(set(dtypes)) == 1 and loss.dtype == torch.float32 and strategy.logs["negative"].dtype == torch.float32
    assert next(strategy.models.parameters()).dtype == torch.float32


@pytest.mark.parametrize("options", [{"adaptive": .196}, {}], ids=str)
def test_a_batch_in_two_parts_is_one_step(options):
    whole, parts, batches = make(**options), make(**options), [toy_batch(seed=i) for i in range(8)]
    for strategy, count in ((whole, 1), (parts, 2)):
        opt = torch.optim.SGD(strategy.net.parameters(), lr=.2)
        for batch in batches:
            opt.zero_grad()
            for part in range(count):
                (strategy({k: v.chunk(count)[part] for k, v in batch.items()}) / count).backward()
            opt.step(), strategy.after_step()
    assert whole.step == parts.step == 8 and torch.equal(whole.models.pushes, parts.models.pushes)
    assert parts.objective.lam == pytest.approx(whole.objective.lam, rel=1e-4) and whole.objective.lam > 0
    for (name, a), b in zip(whole.named_parameters(), parts.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)
    if options:
        assert 0 < whole.models.pushes < 8  # the decision was not always the same, so the agreement means something


def test_a_look_in_eval_mode_or_without_gradients_leaves_nothing_pending():
    strategy = make(adaptive=.001)
    strategy.eval()
    strategy(toy_batch())
    strategy.train()
    with torch.no_grad():
        strategy(toy_batch())
    assert strategy._squares is None and strategy._before is None and strategy._residual is None
    strategy.after_step()
    assert strategy.models.pushes == 0


@pytest.mark.parametrize("options", [{"warmup": 5}, {"adaptive": .09, "lam": .01}, {"against": "random"}, {"negatives": [{"interval": .05, "decay": .3, "start_mix": .1}], "schedule": 60}], ids=str)
def test_killed_and_resumed_training_ends_in_the_same_bits(options, tmp_path):
    config = TrainConfig(steps=24, warmup=3, lr=2e-3, log_every=2, checkpoint_every=4)
    run = lambda strategy, batches, **more: train(strategy, batches, config, progress=False, **more)
    whole, first, again = make(**options), make(**options), make(**options)
    history = run(whole, Batches()).history
    for stop in (7, 14):
        with pytest.raises(RuntimeError):
            run(first, Batches(stop=stop), checkpoint=tmp_path / "c.pt")
        first = make(**options)
    result = run(again, Batches(), checkpoint=tmp_path / "c.pt")
    assert result.resumed_at == 12 and result.history == history
    assert same(again, whole) and again.objective.lam == whole.objective.lam and again.step == whole.step == 24
    assert any(not same(net.net, ToyNet()) for net in whole.models.nets)


def test_saved_state_holds_negatives_counters_and_weight():
    strategy = make()
    _loop(strategy, [toy_batch(seed=i) for i in range(9)])
    buffer = io.BytesIO()
    torch.save(strategy.state_dict(), buffer)
    state = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    assert state["objective.weight._extra_state"][0] == strategy.objective.lam > 0 and state["_extra_state"].tolist() == [9]
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert state["models.mean_step"].tolist() == pytest.approx(strategy.models.mean_step.tolist()) and "models.nets.1.net.layers.0.weight" in state
    with pytest.raises(RuntimeError, match="models.nets.1"):  # a state with fewer negatives is not taken quietly
        make(negatives=PAST[:1]).load_state_dict(state)


def test_an_unfinished_calibration_is_stored_and_dictionaries_of_earlier_versions_load():
    weight, again, old = (CalibratedWeight(rho=.1) for _ in range(3))
    for step, ratio in ((1, 2.), (2, 3.)):
        weight.observe(step, torch.tensor([1., ratio ** 2]))
    again.load_state_dict(weight.state_dict())
    old.load_state_dict({"_extra_state": {"lam": 0., "ratio": 0., "found": [2., 3.]}})
    assert weight._found == again._found == old._found == [2., 3.] and again.lam == old.lam == 0
    for step in (3, 4, 5):
        weight.observe(step, torch.tensor([1., 16.])), again.observe(step, torch.tensor([1., 16.])), old.observe(step, torch.tensor([1., 16.]))
    assert weight.lam == again.lam == old.lam == .1 / 4 and same(weight, again) and weight._found == []
    with pytest.raises(ValueError, match=r"SPN.*weight.*\b3\b"):
        again.load_state_dict({"_extra_state": torch.zeros(3, dtype=torch.float64)})


def test_the_global_generator_is_never_used():
    nets, before = [ToyNet(), ToyNet()], torch.get_rng_state()  # building a network draws
    for net, options in zip(nets, (CONFIGURATIONS["mix"], CONFIGURATIONS["random"])):
        _loop(make(net, **options), [toy_batch(seed=i) for i in range(8)])
    assert torch.equal(before, torch.get_rng_state())


def test_seeds_matter_where_something_is_drawn():
    one, two = (make(preset="random", lam=.05, seed=s) for s in (0, 1))
    batches = [toy_batch(seed=i) for i in range(5)]
    _loop(one, batches), _loop(two, batches)
    assert not same(one.net, two.net)
    mixes = [make(seed=s, **CONFIGURATIONS["mix"]).models.nets[0].net for s in (0, 0, 1)]
    assert same(mixes[0], mixes[1]) and not same(mixes[0], mixes[2])


@pytest.mark.parametrize("extractor, label", [("random", "SPN-random"), ("bank", "SPN-bank"), ("pixels", "SPN-pixels")])
def test_labels_of_stand_ins_never_look_like_the_paper(extractor, label):
    assert make(extractor=extractor).label == label


@pytest.mark.parametrize("options, message", [
    ({"preset": "relaesed"}, "relaesed"), ({"against": "future"}, "future"), ({"sign": 1}, "sign"), ({"lam": .1, "rho": .1}, "lam.*rho"), ({"rho": 2.}, "rho"), ({"lam": "1e-3"}, "1.0e-3"),
    ({"extractor": "vgg13"}, "extractor.*vgg13"), ({"negatives": [{"interval": .5}]}, "schedule"), ({"negatives": [{"intervall": 5}]}, "intervall"), ({"adaptive": {"tao": 1}}, "tao"),
    ({"adaptive": -1.}, "tau"), ({"adaptive": {"decay": 1.}}, "decay"), ({"weights": (1., 2.)}, r"3.*weights.*2\.0"), ({"criterion": "cosine"}, "cosine"), ({"loss": "huber"}, "huber"),
    ({"buffers": "sum"}, "sum"), ({"pairing": "odd"}, "odd"), ({"check_every": 0}, "check_every"), ({"warmup": -1}, "warmup")])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SPN(ToyNet(), **({"extractor": "random"} | options))


def test_missing_vgg_file_is_an_error_of_the_default(monkeypatch, tmp_path):
    monkeypatch.delenv("SPN_VGG_PATH", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for build in (lambda: SPN(ToyNet()), lambda: SPN(ToyNet(), preset="released"), lambda: SPN(ToyNet(), lam=0.0), lambda: CR(ToyNet())):
        with pytest.raises(ValueError, match="vgg1[69].*'random'"):
            build()


def test_bad_batches():
    batch = toy_batch()
    with pytest.raises(ValueError, match="against='other'.*2"):
        make(against="other", lam=.1)({k: v[:1] for k, v in batch.items()})
    with pytest.raises(ValueError, match="relu3_2.*4.*3 x 3"):
        make(lam=.1)({k: v[..., :3, :3] for k, v in batch.items()})
    with pytest.raises(ValueError, match="degraded.*4"):
        packed = nn.Conv2d(4, 3, 1)
        SPN(packed, extractor="random", preset="degraded")({"degraded": torch.rand(2, 4, 8, 8), "clean": torch.rand(2, 3, 8, 8)})
    with pytest.raises(ValueError, match=r"SPN.*batch\['clean'\]"):
        make()({"degraded": batch["degraded"]})
    with pytest.raises(ValueError, match="nn.Module"):
        SPN(lambda x: x, extractor="random")


def test_restorer_is_the_network_and_the_options_open_a_saved_model(tmp_path):
    from irnb.networks import build, load_model, save_model
    options = {"extractor": "random", "rho": .1, "negatives": [{"interval": .01, "decay": .1}], "schedule": 100}
    net = build("NAFNet", width=4, enc_blk_nums=[1], middle_blk_num=1, dec_blk_nums=[1])
    strategy = SPN(net, **options)
    assert strategy.restorer() is net
    spec = {"network": {"name": "NAFNet", "options": {"width": 4, "enc_blk_nums": [1], "middle_blk_num": 1, "dec_blk_nums": [1]}},
            "strategy": {"name": "spn", "class": "irnb.strategies.SPN", "options": options}}
    save_model(tmp_path / "m.safetensors", strategy.restorer(), spec)
    loaded, _ = load_model(tmp_path / "m.safetensors")
    assert same(loaded, net)


# --- contrastive regularisation

@pytest.mark.parametrize("extractor", ["random", "bank"])
def test_cr_keeps_the_contract(extractor):
    contract(lambda net: CR(net, extractor=extractor, weight=1e-3), reduced=lambda net: CR(net, extractor=extractor, weight=0.0), nets=[ToyNet], processes=False)


def test_cr_by_hand():
    batch, net, trunk = toy_batch(), ToyNet(seed=2), RandomTrunk()
    out = net(batch["degraded"])
    ratio = sum(w * F.l1_loss(o, y) / (F.l1_loss(o, x) + 1e-7) for w, o, y, x in zip((.2, .3, .5), trunk(out), trunk(batch["clean"]), trunk(batch["degraded"])))
    strategy = CR(net, extractor="random")
    torch.testing.assert_close(strategy(batch), F.l1_loss(out, batch["clean"]) + .1 * ratio)
    wanted = torch.autograd.grad(F.l1_loss(out, batch["clean"]) + .1 * ratio, list(net.parameters()))
    strategy(batch).backward()
    for p, g in zip(net.parameters(), wanted):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6)


def test_cr_of_an_image_with_itself_as_the_negative_explodes():
    batch, strategy = toy_batch(), CR(ToyNet(), extractor="random")
    assert strategy.ratio(batch["real"], batch["clean"], batch["real"]) > 1e4


@pytest.mark.parametrize("options, message", [({"weight": -1}, "weight"), ({"weight": "1e-1"}, "1.0e-3"), ({"eps": 0}, "eps"), ({"extractor": "vgg"}, "extractor.*'vgg'")])
def test_cr_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        CR(ToyNet(), **({"extractor": "random"} | options))


def test_strategies_are_found_by_name():
    import irnb.strategies
    assert irnb.strategies.SPN is SPN and irnb.strategies.CR is CR and issubclass(SPN, Strategy) and not isinstance(SPN, Frozen)
    assert [s["interval"] for s in RELEASED_NEGATIVES] == [100, 200, 500, 1000]


@pytest.mark.parametrize("schedule", [0, -1, "1000"])
def test_a_schedule_is_a_number_of_steps(schedule):
    with pytest.raises(ValueError, match="schedule"):
        SPN(ToyNet(), extractor="random", negatives=[{"interval": .5}], schedule=schedule)
