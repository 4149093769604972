"""The contract: Supervised keeps it, and each broken promise is found by the check that guards it."""
import math

import pytest
import torch
from torch import nn

from irnb.strategies.strategy import (LOSSES, ContractError, Frozen, Strategy, Supervised, ToyNet, _run_gloo, charbonnier, contract, mix_seed, pack_state,
                                      pixel_loss, psnr_loss, surrogate, toy_batch, unpack_state)


@pytest.mark.slow
def test_supervised_keeps_the_contract_on_two_networks():
    passed = contract(Supervised, reduced=Supervised)
    assert len(passed) == 26 and len(set(passed)) == 26


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_every_loss_keeps_the_contract(loss):
    contract(lambda net: Supervised(net, loss=loss), nets=[ToyNet], processes=False)


class Helped(Supervised):
    "A correct strategy with everything that can go wrong: an auxiliary network, a history, own draws."

    def __init__(self, net, seed=0):
        super().__init__(net, seed=seed)
        self.helper, self.past = ToyNet(width=4), Frozen(net)

    def forward(self, batch):
        degraded, clean = self.take(batch, "degraded", "clean")
        noise = torch.randn(clean.shape, generator=self.generator()) * .05
        loss = super().forward(batch)
        task = self.logs
        value = loss + .1 * (self.helper(self.net(degraded)) - clean - noise).square().mean() - 1e-3 * (self.net(degraded) - self.past(degraded)).abs().mean()
        self.logs = task
        return value

    def after_step(self):
        super().after_step()
        if self.step % 2 == 0:
            self.past.follow(self.net, .5)


def test_a_strategy_with_helper_history_and_draws_keeps_the_contract():
    contract(Helped, nets=[ToyNet], processes=False)


class NoGradient(Supervised):
    def __init__(self, net):
        super().__init__(net)
        self.unused = nn.Parameter(torch.zeros(1))


class Climbs(Supervised):
    def forward(self, batch):
        return -super().forward(batch)


class GradientToFrozen(Supervised):
    def __init__(self, net):
        super().__init__(net)
        self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, batch):
        self.frozen.grad = torch.ones(1)
        return super().forward(batch)


class Unseeded(Supervised):
    def __init__(self, net):
        super().__init__(net)
        self.private = torch.Generator()
        self.private.seed()

    def forward(self, batch):
        return super().forward(batch | {"degraded": batch["degraded"] + .01 * torch.randn(batch["degraded"].shape, generator=self.private)})


class ForgetsCounter(Supervised):
    def get_extra_state(self):
        return pack_state(0)

    def forward(self, batch):
        return super().forward(batch) * (1 + self.step)


class NotReduced(Supervised):
    def forward(self, batch):
        return super().forward(batch) * 1.01


class Lasting(Supervised):
    def __init__(self, net):
        super().__init__(net)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, batch):
        self.seen += 1
        return super().forward(batch)


class GlobalDraws(Supervised):
    def forward(self, batch):
        torch.rand(1)
        return super().forward(batch)


class Writes(Supervised):
    def forward(self, batch):
        batch["degraded"].clamp_(.1, .9)
        return super().forward(batch)


class Unnamed(Supervised):
    def forward(self, batch):
        if "clean" not in batch or "degraded" not in batch:
            raise ValueError("something is missing")
        return super().forward(batch)


class Hooked(Supervised):
    def __init__(self, net):
        super().__init__(net)
        net.register_forward_hook(lambda *a: None)


class Edits(Supervised):
    def __init__(self, net):
        net.extra = nn.Linear(1, 1).requires_grad_(False)
        net.extra.weight.data.zero_(), net.extra.bias.data.zero_()
        super().__init__(net)


class Awake(Helped):
    def train(self, mode=True):
        super().train(mode)
        self.past.net.training = mode
        return self


class Cropping(Supervised):
    def restorer(self):
        return nn.Sequential(self.net, nn.AvgPool2d(2))


class BatchDependent(Supervised):
    class Centred(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            y = self.net(x)
            return y - y.mean()

    def restorer(self):
        return self.Centred(self.net)


class ShipsTooMuch(Helped):
    def restorer(self):
        return nn.Sequential(self.net, self.helper)


class Unpicklable(Supervised):
    def __init__(self, net):
        super().__init__(net)
        self.function = lambda x: x


class NotFiniteInHalf(Supervised):
    def forward(self, batch):
        value = super().forward(batch)
        return value * (math.nan if torch.is_autocast_enabled("cpu") else 1)


class StateOfWords(Supervised):
    def get_extra_state(self):
        return {"step": self.step}


class Masks(Supervised):
    "Leaves out what is not a number."

    def forward(self, batch):
        return super().forward({key: x.nan_to_num() for key, x in batch.items()})


class LooksAtACorner(Supervised):
    def forward(self, batch):
        return super().forward({key: x[..., :12, :12] for key, x in batch.items()})


MUTANTS = [(NoGradient, "gradients"), (Climbs, "loss falls"), (GradientToFrozen, "gradients"), (Unseeded, "same seed"), (ForgetsCounter, "resume"),
           (Lasting, "lasting"), (GlobalDraws, "lasting"), (Writes, "batch unchanged"), (Unnamed, "missing key"), (Hooked, "unedited"), (Edits, "unedited"),
           (Awake, "frozen"), (Cropping, "odd sizes"), (BatchDependent, "independent of the batch"), (ShipsTooMuch, "restorer_for"), (NotFiniteInHalf, "autocast"),
           (StateOfWords, "pack_state"), (Masks, "NaN noticed"), (LooksAtACorner, "NaN noticed")]


@pytest.mark.parametrize("mutant, check", MUTANTS, ids=lambda v: getattr(v, "__name__", v))
def test_a_broken_promise_is_found(mutant, check):
    with pytest.raises((ContractError, RuntimeError), match=check):
        contract(mutant, nets=[ToyNet], processes=False)


class Notices(LooksAtACorner):
    def forward(self, batch):
        return self.noticed(super().forward(batch), *self.take(batch, *self.needs))


def test_a_corner_that_is_noticed_keeps_the_contract_and_costs_no_bit():
    contract(Notices, nets=[ToyNet], processes=False)
    for dtype in (torch.float32, torch.float64):
        batch = {key: x.to(dtype) for key, x in toy_batch().items()}
        plain, noticing = LooksAtACorner(ToyNet()).to(dtype), Notices(ToyNet()).to(dtype)
        a, b = plain(batch), noticing(batch)
        a.backward(), b.backward()
        assert torch.equal(a, b) and a.dtype == b.dtype
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), noticing.parameters()))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_types_are_taken_as_float32_unless_the_network_is_of_that_type(half):
    batch = {key: x.to(half) for key, x in toy_batch().items()} | {"label": torch.arange(4), "exact": torch.ones(1, dtype=torch.float64)}
    taken = lambda net: [x.dtype for x in Supervised(net).take(batch, "degraded", "clean", "label", "exact")]
    assert taken(ToyNet()) == [torch.float32, torch.float32, torch.int64, torch.float64]
    assert taken(ToyNet().double())[0] == torch.float32 and taken(nn.Identity())[0] == torch.float32
    assert taken(ToyNet().to(half))[:2] == [half, half]
    assert torch.equal(Supervised(ToyNet()).take(batch, "clean")[0], batch["clean"].float())


def test_the_counter_is_a_tensor_and_an_old_dictionary_loads():
    strategy = Supervised(ToyNet())
    strategy.step = 2 ** 40 + 1
    state = strategy.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    for stored in (state, {**state, "_extra_state": {"step": 2 ** 40 + 1}}):
        fresh = Supervised(ToyNet())
        fresh.load_state_dict(stored)
        assert fresh.step == 2 ** 40 + 1 and isinstance(fresh.step, int)


@pytest.mark.parametrize("stored, named", [(pack_state(1, 2), r"\b2\b"), (pack_state(), r"\b0\b"), ({"steps": 3}, "'step'")], ids=["two", "none", "words"])
def test_a_foreign_counter_is_refused(stored, named):
    with pytest.raises(ValueError, match=f"Supervised.*{named}"):
        Supervised(ToyNet()).load_state_dict({**Supervised(ToyNet()).state_dict(), "_extra_state": stored})
    with pytest.raises(ValueError, match="here.*step"):
        unpack_state("here", stored, "step")


def test_a_wrong_reduction_is_found():
    with pytest.raises(ContractError, match="reduction"):
        contract(Supervised, reduced=lambda net: NotReduced(net, loss="mse"), nets=[ToyNet], processes=False)


def test_an_unpicklable_strategy_is_found():
    with pytest.raises(Exception, match="pickle|lambda"):
        contract(Unpicklable, nets=[ToyNet], processes=False)


class PerRank(Supervised):
    "Each rank adds its own noise to the weights: ranks drift apart."

    def after_step(self):
        super().after_step()
        if torch.distributed.is_initialized():
            self.net.layers[0].bias.data += 1e-3 * torch.distributed.get_rank()


@pytest.mark.slow
def test_ranks_that_drift_apart_are_found():
    first, second = _run_gloo(PerRank(ToyNet()), [toy_batch(seed=i) for i in range(2)])
    assert not torch.equal(first["net.layers.0.bias"], second["net.layers.0.bias"])
    with pytest.raises(ContractError, match="two ranks"):
        from irnb.strategies.strategy import _check_two_processes
        _check_two_processes(lambda: PerRank(ToyNet()), [toy_batch(seed=i) for i in range(3)], True)


def test_strategy_is_abstract_and_wants_a_module():
    with pytest.raises(TypeError):
        Strategy(ToyNet())
    with pytest.raises(ValueError, match="nn.Module"):
        Supervised(lambda x: x)


def test_own_draws_depend_on_step_and_call_only():
    a, b = Helped(ToyNet()), Helped(ToyNet())
    first = [torch.rand(3, generator=a.generator()) for _ in range(2)]
    assert not torch.equal(*first)
    a.after_step()
    a.load_state_dict(b.state_dict())
    assert torch.equal(torch.rand(3, generator=a.generator()), first[0])
    assert not torch.equal(torch.rand(3, generator=Helped(ToyNet(), seed=1).generator()), first[0])
    state = torch.get_rng_state()
    a.generator()
    assert torch.equal(state, torch.get_rng_state())


def test_losses_against_numpy_in_float64():
    import numpy as np
    g = torch.Generator().manual_seed(0)
    x, y = (torch.rand(3, 3, 9, 7, generator=g, dtype=torch.float64) for _ in range(2))
    d = (x - y).numpy()
    assert abs(LOSSES["l1"](x, y).item() - np.abs(d).mean()) < 1e-15
    assert abs(LOSSES["mse"](x, y).item() - (d ** 2).mean()) < 1e-15
    assert abs(charbonnier(x, y).item() - np.sqrt(d ** 2 + 1e-6).mean()) < 1e-15
    assert abs(psnr_loss(x, y).item() - np.mean([10 * np.log10((e ** 2).mean() + 1e-8) for e in d])) < 1e-12


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_loss_gradients(loss):
    g = torch.Generator().manual_seed(1)
    x, y = (torch.rand(2, 3, 4, 4, generator=g, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(lambda t: LOSSES[loss](t, y), x.requires_grad_(True))


def test_pixel_loss_leaves_autocast_and_checks_shapes():
    x = torch.full((1, 3, 64, 64), .5).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert pixel_loss(LOSSES["mse"], x, x.float() + 1e-2).dtype == torch.float32
    assert pixel_loss(LOSSES["l1"], x.double(), x.double()).dtype == torch.float64
    with pytest.raises(ValueError, match="64, 64.*'clean'.*32, 32"):
        pixel_loss(LOSSES["l1"], x, x[..., :32, :32])


def test_surrogate_drives_any_optimiser():
    w = nn.Parameter(torch.tensor([1., 2.]))
    opt = torch.optim.SGD([w], lr=.1)
    surrogate(torch.tensor(5.), [w], [torch.tensor([1., -1.])]).backward()
    opt.step()
    assert torch.allclose(w.detach(), torch.tensor([.9, 2.1]))
    with pytest.raises(ValueError):
        surrogate(torch.tensor(5.), [w], [])


def test_frozen_follows_parameters_and_buffers():
    source = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    copy = Frozen(source)
    source.train()
    source(torch.rand(4, 3, 8, 8))
    source[0].weight.data += 1
    before = copy.net[0].weight.clone()
    copy.follow(source, .25)
    assert torch.allclose(copy.net[0].weight, .25 * before + .75 * source[0].weight)
    assert torch.equal(copy.net[1].running_mean, source[1].running_mean) and copy.net[1].num_batches_tracked == 1
    copy.follow(source)
    source.eval()
    x = torch.rand(2, 3, 5, 5)
    assert torch.equal(copy(x), source(x)) and not copy(x).requires_grad
    assert not any(m.training for m in copy.train().modules())


def test_seeds_are_mixed():
    seeds = {mix_seed(a, b) for a in range(50) for b in range(50)}
    assert len(seeds) == 2500 and max(seeds) < 2 ** 63 and mix_seed(-1) != mix_seed(1)
