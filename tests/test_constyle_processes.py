"""ConStyle in two processes: one queue, one batch for the style term, one set of statistics, an encoder that stays frozen."""
import pytest
import torch

from irnb.strategies.constyle import IRConStyle, all_ranks
from irnb.strategies.strategy import ToyNet, _loop, _run_gloo
from tests.test_constyle import ALIVE, LAYER, SMALL, Flat, batches, make, told

pytestmark = pytest.mark.slow


def gloo(strategy, data):
    first, second = _run_gloo(strategy, data)
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key
    return first


@pytest.mark.parametrize("net, options", [(lambda: told(encoder=LAYER), {"preset": "official", "momentum": .5}),
                                          (ToyNet, {"weights": [1., 1., 50.], "momentum": .5, "enqueue": "degraded_key", "encoder": LAYER})], ids=["told", "wrapped"])
def test_two_processes_equal_one_on_the_whole_batch(net, options):
    build = lambda: make(net(), **options).double()
    data = batches(5, dtype=torch.float64)
    state, alone = gloo(build(), data), build()
    _loop(alone, data)
    for key, value in alone.state_dict().items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(state[key], value, rtol=1e-6, atol=1e-8, msg=lambda m, key=key: f"{key}: {m}")
    assert state["constyle.queue.ptr"] == 20 % 12 and any("encoder_k" in k for k in state)


def test_parts_of_unequal_size():
    data = [{k: v[:3] for k, v in b.items()} for b in batches(3, dtype=torch.float64)]  # 2 images and 1
    state = gloo(make(told(encoder=LAYER), queue_size=10).double(), data)
    assert state["constyle.queue.ptr"] == 9 and state["constyle.queue.filled"] == 9


def test_batch_statistics_are_the_mean_over_processes():
    strategy, data = make(told(encoder=ALIVE)), batches(1)
    state, mine = gloo(strategy, data), []
    for part in range(2):
        alone = make(told(encoder=ALIVE))
        alone({k: v.chunk(2)[part] for k, v in data[0].items()})
        alone.after_step()
        mine.append(alone.state_dict())
    for key in ("net.ConStyle.encoder_q.mlp1.1.running_var", "constyle.encoder_k.mlp2.1.running_mean"):
        torch.testing.assert_close(state[key], (mine[0][key] + mine[1][key]) / 2)
        assert not torch.equal(mine[0][key], mine[1][key])
    assert state["net.ConStyle.encoder_q.mlp1.1.num_batches_tracked"] == 1
    stored = torch.cat([m["constyle.queue.data"][:, :2] for m in mine], 1)
    torch.testing.assert_close(state["constyle.queue.data"][:, :4], stored)


class Remembers(IRConStyle):
    "Writes its encoder down when the contrastive phase ends, where the workers' states show it."

    def __init__(self, net, **options):
        super().__init__(net, **options)
        self.register_buffer("then", torch.zeros_like(self._flat()))

    def _flat(self):
        return torch.cat([t.detach().float().flatten() for t in self._encoder_tensors()])

    def after_step(self):
        super().after_step()
        if self.step == 2:
            self.then.copy_(self._flat())


def test_a_frozen_encoder_does_not_move_and_nothing_hangs():
    strategy = Remembers(Flat(), queue_size=12, contrastive_steps=2, encoder=SMALL)
    state = gloo(strategy, batches(5))
    strategy.load_state_dict(state | {"_extra_state": {"step": 5}})
    assert torch.equal(strategy._flat(), strategy.then) and strategy.then.abs().sum() > 0


def test_parts_that_a_network_does_not_use():
    gloo(make(told(use=["code"]), weights=0), batches(3))


def test_alone_nothing_is_exchanged():
    z = torch.rand(3, 2)
    assert all_ranks(z) is z
