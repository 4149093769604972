"""SPN in two processes: one decision, one weight, one history, whatever data each process sees."""
import pytest
import torch

from irnb.strategies.spn import SPN, ResidualTrigger
from irnb.strategies.strategy import ToyNet, _loop, _run_gloo, toy_batch
from tests.test_spn import CONFIGURATIONS, make

pytestmark = pytest.mark.slow


class Told(SPN):
    "SPN that writes its weight where the workers' states show it, in the commit, after which nothing is broadcast."

    def __init__(self, net, **options):
        super().__init__(net, **options)
        self.register_buffer("told", torch.zeros(()))

    def after_step(self):
        super().after_step()
        self.told.fill_(self.objective.lam)


def test_the_weight_is_calibrated_on_all_data():
    clean = toy_batch(8)["clean"]
    shift = torch.rand(clean.shape, generator=torch.Generator().manual_seed(1)) * torch.tensor([.3] * 4 + [.001] * 4).view(8, 1, 1, 1)
    batch, options = {"degraded": clean.flip(-1) + shift, "clean": clean}, {"extractor": "bank", "rho": .1, "negatives": [{"interval": 2, "decay": .1}]}
    first, second = _run_gloo(Told(ToyNet(), **options), [batch] * 6)
    alone, part = (Told(ToyNet(), **options) for _ in range(2))
    _loop(alone, [batch] * 6), _loop(part, [{k: v[:4] for k, v in batch.items()}] * 6)
    assert first["told"] == second["told"] == pytest.approx(alone.objective.lam, rel=1e-3)
    assert abs(part.objective.lam / alone.objective.lam - 1) > .01  # half of the data would have given another


@pytest.mark.parametrize("name", ["calibrated", "adaptive", "mix"])
def test_two_processes_equal_one_on_the_whole_batch(name):
    batches, options = [toy_batch(seed=i) for i in range(9)], CONFIGURATIONS[name]
    first, second = _run_gloo(make(**options), batches)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    alone = make(**options)
    _loop(alone, batches)
    assert alone.objective.lam > 0 and "models.nets.1.net.layers.0.weight" in first  # calibrated on the way: the weight is part of the agreement
    for key, value in alone.state_dict().items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(first[key], value, rtol=1e-3, atol=2e-4, msg=key)


# The first process sees large residuals (statistic about 0.26), the second small ones (about 0.03): alone they would decide differently; the mean is about 0.14.
@pytest.mark.parametrize("tau, pushes", [(.05, 10), (.2, 0)])
def test_processes_take_one_decision_on_different_data(tau, pushes):
    clean = toy_batch(8)["clean"]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1)) * torch.tensor([.13] * 4 + [.013] * 4).view(8, 1, 1, 1)
    batch = {"degraded": clean + noise, "clean": clean}
    alone = [ResidualTrigger(tau)(ToyNet()(batch["degraded"][part]), clean[part]) for part in (slice(4), slice(4, 8))]
    assert alone == [True, False]
    first, second = _run_gloo(make(adaptive=tau, lam=.01), [batch] * 10)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert first["models.pushes"] == pushes
