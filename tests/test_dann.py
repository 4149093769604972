"""DANN: the reversal, features of any network without a trace, the objective, the contract, and every refusal."""
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from irnb.strategies.dann import DANN, DomainClassifier, captured, feature_layers, pick_layer, reverse_gradient
from irnb.strategies.strategy import Supervised, ToyNet, _loop, _run_gloo, contract, toy_batch


def make(net=None, **options):
    return DANN(net or ToyNet(), **({"length": 3, "beta": .1} | options))


def hooks(net):
    return sum(len(m._forward_hooks) for m in net.modules())


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# --- parts

@pytest.mark.parametrize("factor", [0., .3, 2.])
def test_reversal(factor):
    x = torch.randn(3, 4, requires_grad=True, dtype=torch.float64)
    w = torch.randn(3, 4, dtype=torch.float64)
    y = reverse_gradient(x, factor)
    assert torch.equal(y, x)
    (w * y).sum().backward()
    torch.testing.assert_close(x.grad, -factor * w)


def test_captured_features_are_those_of_the_module_and_carry_gradients():
    net, x = ToyNet(), toy_batch()["degraded"]
    with captured(net, "layers.1") as notes:
        assert hooks(net) == 1
        net(x), net(x.flip(-1))
    assert hooks(net) == 0 and len(notes) == 2
    want = net.layers[1](F.leaky_relu(net.layers[0](x), .2))
    assert torch.equal(notes[0], want) and notes[0].requires_grad
    with pytest.raises(RuntimeError):
        with captured(net, "layers.1"):
            raise RuntimeError
    assert hooks(net) == 0


class Bottom(nn.Module):
    "A net with a bottom, a pooled weight beside it, and an output that is no tensor."

    def __init__(self):
        super().__init__()
        self.first, self.low, self.wide = nn.Conv2d(3, 4, 3, padding=1), nn.Sequential(nn.Conv2d(4, 6, 1), nn.ReLU()), nn.Conv2d(6, 9, 1)
        self.weight, self.pair, self.last, self.unused = nn.AdaptiveAvgPool2d(1), Pair(), nn.Conv2d(4, 3, 1), nn.Conv2d(3, 99, 1)

    def forward(self, x):
        f = self.first(x)
        low = self.low(F.avg_pool2d(f, 2))
        self.wide(low)
        return x + self.last(self.pair(f)[0] * self.weight(f))


class Pair(nn.Module):
    def forward(self, x):
        return x, x


def test_which_layer_is_found():
    assert pick_layer(ToyNet()) == ("layers.1", 8) and pick_layer(nn.Identity()) == ("", 3) and pick_layer(nn.Conv2d(1, 1, 1), channels=1) == ("", 1)
    net = Bottom()
    assert pick_layer(net) == ("low", 6)  # the lowest resolution above a pixel; a block before a single layer, though that is wider
    shapes = feature_layers(net, size=16)
    assert shapes["low.0"] == (1, 6, 8, 8) and shapes["weight"] == (1, 4, 1, 1) and "pair" not in shapes and "unused" not in shapes and hooks(net) == 0
    assert pick_layer(net, "wide") == ("wide", 9)
    for bad in ("pair", "unused", "nowhere"):
        with pytest.raises(ValueError, match=f"'{bad}'.*low"):
            pick_layer(net, bad)


@pytest.mark.parametrize("name, layer", [("UNet", "downs.2"), ("NAFNet", "middle_blks")])
def test_in_networks_with_a_bottom_the_bottom_is_found(name, layer):
    from irnb.networks import build
    assert pick_layer(build(name, preset="tiny"))[0].startswith(layer)


def test_looking_for_layers_leaves_no_trace():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 3, 1)).train()
    net[2].eval()
    state, rng = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    feature_layers(net)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items()) and torch.equal(rng, torch.get_rng_state())
    assert net.training and net[1].training and not net[2].training and all(p.grad is None for p in net.parameters())


# --- the strategy

def test_contract():
    contract(make, reduced=lambda net: make(net, loss="l1", beta=0.0), processes=False)


@pytest.mark.parametrize("options", [{"layer": "layers.2", "start": 2, "beta": .01}, {"layer": "layers.0", "width": 4, "loss": "mse"}], ids=str)
def test_options_keep_the_contract(options):
    contract(lambda net: make(net, **options), nets=[ToyNet], processes=False)


@pytest.mark.slow
@pytest.mark.parametrize("start", [0, 1])
def test_two_processes_equal_one_on_the_whole_batch(start):
    batches = [toy_batch(8, seed=i) for i in range(3)]
    first, second = _run_gloo(make(start=start), batches)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    if not start:  # zeros for the classifier are gradients to a second process, not to one alone
        alone = make()
        _loop(alone, batches)
        for key, value in alone.state_dict().items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(first[key], value, rtol=1e-3, atol=2e-4, msg=key)


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"start": 99}], ids=str)
@pytest.mark.parametrize("loss", ["charbonnier", "l1"])
def test_without_weight_training_is_supervised_bit_for_bit(loss, options):
    ours, plain, state = make(loss=loss, **options), Supervised(ToyNet(), loss), torch.get_rng_state()
    batches = [toy_batch(seed=i) for i in range(4)]
    assert _loop(ours, batches)[0] == _loop(plain, batches)[0] and same(ours.net, plain.net) and torch.equal(state, torch.get_rng_state())


def test_the_objective_written_out():
    batch, strategy = toy_batch(), make(beta=.4)
    strategy.after_step()
    value = strategy(batch)
    lam = .4 * math.tanh(10 * (2 / 3) / 2)
    net = strategy.net
    features = lambda x: net.layers[1](F.leaky_relu(net.layers[0](x), .2))
    rec = torch.sqrt((net(batch["degraded"]) - batch["clean"]).square() + 1e-6).mean()
    fs, fr = features(batch["degraded"]), features(batch["real"])
    zs, zr = strategy.classifier(fs), strategy.classifier(fr)
    domain = -(torch.log(1 - zs.sigmoid()).mean() + torch.log(zr.sigmoid()).mean()) / 2
    torch.testing.assert_close(value, rec + domain)
    assert strategy.logs["lam"].item() == pytest.approx(lam) and strategy.logs["accuracy"].item() == pytest.approx(((zs < 0).float().mean() + (zr > 0).float().mean()).item() / 2)
    mine = torch.autograd.grad(value, [*net.parameters(), *strategy.classifier.parameters()])
    of_rec = torch.autograd.grad(rec, list(net.parameters()))
    of_domain = torch.autograd.grad(domain, [*net.parameters(), *strategy.classifier.parameters()], allow_unused=True)
    for i, g in enumerate(mine):
        d = of_domain[i]
        want = d if i >= len(of_rec) else of_rec[i] - lam * d if d is not None else of_rec[i]
        torch.testing.assert_close(g, want, rtol=1e-4, atol=1e-6)


def test_the_classifier_learns_and_the_network_hides():
    "Two plainly different domains: without reversal they are told apart; with a strong one less."
    batch = toy_batch(8)
    batch["real"] = batch["real"] * .4 + .5
    accuracies = []
    for beta in (1e-9, 20.):
        strategy = make(beta=beta, length=1)
        opt = torch.optim.Adam(strategy.parameters(), lr=5e-3)
        seen = []
        for _ in range(60):
            opt.zero_grad(), strategy(batch).backward(), opt.step()
            seen.append(strategy.logs["accuracy"].item())
        accuracies.append(sum(seen[-20:]) / 20)
    assert accuracies[0] > .75 and accuracies[1] < accuracies[0] - .05, accuracies


def test_what_ships_is_the_network():
    strategy = make()
    assert strategy.restorer() is strategy.net and any(k.startswith("classifier") for k in strategy.state_dict()) and make(beta=0.).classifier is None
    assert make(beta=0.).needs == ("degraded", "clean") and strategy.needs == ("degraded", "clean", "real")
    a, b, c = (make(seed=s).classifier[0].weight for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    state = torch.get_rng_state()
    net = strategy.net
    DANN(net)
    assert torch.equal(state, torch.get_rng_state())


def test_the_classifier_judges_places():
    assert DomainClassifier(5, 4)(torch.zeros(2, 5, 6, 7)).shape == (2, 1, 6, 7)


def test_super_resolution_networks_can_be_adapted():
    from irnb.networks import build
    net = build("EDSR", preset="tiny", upscale=2)
    strategy = make(net, layer=None)
    batch = toy_batch(2)
    assert torch.isfinite(strategy(batch | {"clean": F.interpolate(batch["clean"], scale_factor=2)}))


# --- refusals

@pytest.mark.parametrize("real, text", [((4, 3, 16, 24), "16, 24"), ((2, 3, 24, 24), "2, 3, 24"), ((4, 1, 24, 24), "1 channel")])
def test_real_patches_that_do_not_fit(real, text):
    with pytest.raises(ValueError, match=f"batch.'real'.*{text}"):
        make()(toy_batch() | {"real": torch.rand(real)})


def test_other_ranges_are_refused():
    with pytest.raises(ValueError, match=r"batch.'real'.*\[0, 1\]"):
        make()(toy_batch() | {"real": 255 * toy_batch()["real"]})


def test_a_layer_that_runs_twice_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(self.conv(x))
    with pytest.raises(ValueError, match="layer.*'conv'.*4"):
        make(Twice(), layer="conv")(toy_batch())


@pytest.mark.parametrize("options, text", [({"layer": "nowhere"}, "nowhere"), ({"beta": -1}, "beta"), ({"length": 0}, "length"), ({"loss": "l7"}, "l7")])
def test_bad_options_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        make(**options)


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("key", ["degraded", "clean", "real"])
def test_missing_keys_are_named(key, start):
    with pytest.raises(ValueError, match=f"DANN.*batch.'{key}'"):
        make(start=start)({k: v for k, v in toy_batch().items() if k != key})
