"""ConStyle: queue, losses and steps by number, freezing, statistics, the wrapper, the controls, the probes, and every refusal."""
import copy
import io
import itertools
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from irnb.networks import build, load_model, save_model
from irnb.networks.general import Conditioning, ConStyleEncoder
from irnb.strategies.constyle import (CONSTYLE_PRESETS, CONSTYLE_TRAINING, ConStyle, ConStyleLoss, ConStylePretraining, ConStyleWrapper, ContrastOutput, FeatureQueue, FixedCode,
                                      IRConStyle, PretextHead, RunningStatistics, all_ranks, conditioned, content_loss, default_statistics, distillation, gram, info_nce, load_encoder,
                                      nce_logits, pick_sites, places, probe, style_loss, told_psnr)
from irnb.strategies.strategy import Frozen, Strategy, Supervised, ToyNet, _loop, contract, toy_batch
from irnb.training import TrainConfig, train
from tests.nets import Batches, awake
from tests.test_spn import Reads

SMALL = {"width": 2, "code_dim": 8}
ALIVE = SMALL | {"init": "kaiming"}  # a code that varies with the picture
LAYER = ALIVE | {"norm": "layer"}


def told(seed=0, **options):
    "A small conditioned network that is far from the identity."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = build("ConStyleNAFNet", **({"dim": 4, "left": [1, 1, 1], "bottom": 1, "right": [1, 1, 1], "encoder": SMALL} | options))
        for name, p in net.named_parameters():
            if name.endswith(("beta", "gamma")):
                p.data.normal_(0, .3)
    return net


def make(net=None, **options):
    return IRConStyle(net or told(), **({"queue_size": 12} | options))


def same(a, b):
    a, b = ({k: v for k, v in m.state_dict().items() if isinstance(v, torch.Tensor)} for m in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def batches(count=6, size=16, images=4, dtype=torch.float32):
    return [{k: v.to(dtype) for k, v in toy_batch(images, size, seed=i).items()} for i in range(count)]


def codes(rows, dim=8, seed=0):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flat(module):
    return torch.cat([t.detach().double().flatten() for t in module.state_dict().values() if isinstance(t, torch.Tensor)])


class Flat(nn.Module):
    "A user's own network without levels, with a normalisation of its own."

    def __init__(self, scale=1, channels=3):
        super().__init__()
        self.head, self.norm, self.body = nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.tail, self.up = nn.Conv2d(8, channels * scale ** 2, 3, padding=1), nn.PixelShuffle(scale)

    def forward(self, x):
        return self.up(self.tail(F.relu(self.body(F.relu(self.norm(self.head(x)))))))


class Levels(nn.Module):
    "A user's own U-Net: pooling down, interpolation up, sides must be multiples of 8."

    def __init__(self):
        super().__init__()
        self.first, self.pool = nn.Conv2d(3, 6, 3, padding=1), nn.MaxPool2d(2)
        self.down = nn.ModuleList(nn.Conv2d(6 * 2 ** k, 12 * 2 ** k, 3, padding=1) for k in range(3))
        self.up = nn.ModuleList(nn.Conv2d(12 * 2 ** k, 6 * 2 ** k, 3, padding=1) for k in (2, 1, 0))
        self.last = nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x):
        if x.shape[-1] % 8 or x.shape[-2] % 8:
            raise RuntimeError("sides must be multiples of 8")
        h, skips = F.relu(self.first(x)), []
        for down in self.down:
            skips.append(h)
            h = F.relu(down(self.pool(h)))
        for up in self.up:
            h = F.relu(up(F.interpolate(h, scale_factor=2))) + skips.pop()
        return x + self.last(h)


# --- the queue

@pytest.mark.parametrize("size, rows", [(10, [4, 4, 4, 4]), (7, [7, 1, 7]), (12, [5, 1, 3, 5, 5]), (9, [1] * 11)])
def test_the_queue_is_a_ring_for_any_batch(size, rows):
    queue, expected, ptr = FeatureQueue(3, size), None, 0
    start = queue.data.clone()
    expected = start.clone()
    for i, n in enumerate(rows):
        z = codes(n, 3, seed=i).float()
        before = queue.data.clone()
        oldest, following = queue.oldest(n), queue.oldest(n, n)
        queue.push(z)
        for row in z:
            expected[:, ptr] = row
            ptr = (ptr + 1) % size
        assert torch.equal(queue.data, expected) and queue.ptr.item() == ptr and queue.filled.item() == min(size, sum(rows[:i + 1]))
        columns = [(ptr - n + j) % size for j in range(n)]
        assert torch.equal(oldest, before[:, columns].T) and torch.equal(following, before[:, [(c + n) % size for c in columns]].T)
        torch.testing.assert_close(queue.norms, queue.data.norm(dim=0))
    assert abs(start.mean()) < 1 and .5 < start.std() < 1.6  # N(0, 1)


def test_unfilled_columns_can_be_left_out():
    queue = FeatureQueue(2, 10, mask_unfilled=True)
    q, k = codes(3, 2).float(), codes(3, 2, 1).float()
    logits = nce_logits(q, k, queue.data, valid=queue.valid())
    assert queue.valid().sum() == 0 and info_nce(logits) == 0
    queue.push(torch.ones(4, 2)), queue.push(torch.full((4, 2), 2.))
    assert queue.valid().tolist() == [True] * 8 + [False] * 2 and torch.equal(queue.oldest(4), torch.ones(4, 2)) and torch.equal(queue.oldest(4, 4), torch.full((4, 2), 2.))
    logits = nce_logits(q, k, queue.data, valid=queue.valid())
    torch.testing.assert_close(info_nce(logits), info_nce(nce_logits(q, k, queue.data[:, :8])))
    queue.push(torch.full((3, 2), 3.))
    assert queue.valid().all() and queue.oldest(3)[:, 0].tolist() == [1, 1, 1] and queue.oldest(9)[:, 0].tolist() == pytest.approx([1] * 3 + [2] * 4 + [3] * 2)
    assert FeatureQueue(2, 10).valid() is None


def test_a_queue_is_stored_and_one_of_another_size_is_dropped():
    queue = FeatureQueue(4, 10, seed=1)
    queue.push(codes(7, 4).float())
    other = FeatureQueue(4, 10, seed=2)
    other.load_state_dict(queue.state_dict())
    assert same(queue, other)
    for target in (queue, other):
        target.push(codes(7, 4, 3).float())
    assert same(queue, other)
    smaller = FeatureQueue(4, 6, seed=2)
    fresh = copy.deepcopy(smaller)
    with pytest.warns(UserWarning, match="FeatureQueue.*10.*6"):
        smaller.load_state_dict(queue.state_dict())
    assert same(smaller, fresh) and smaller.ptr == 0
    strategy, stored = make(queue_size=20), make(queue_size=12)
    _loop(stored, batches(3))
    with pytest.warns(UserWarning, match="FeatureQueue.*12.*20"):
        strategy.load_state_dict(stored.state_dict())
    assert same(strategy.net, stored.net) and same(strategy.constyle.encoder_k, stored.constyle.encoder_k) and strategy.step == 3 and strategy.constyle.queue.filled == 0
    _loop(strategy, batches(1))
    with pytest.raises(RuntimeError, match="data"):  # another length of the code is another encoder
        FeatureQueue(5, 10).load_state_dict(queue.state_dict())


def test_the_released_queue():
    queue = FeatureQueue()
    assert queue.data.shape == (128, 65760) and queue.data.numel() * 4 == 33_669_120 and CONSTYLE_PRESETS["official"]["queue_size"] == 65760
    assert torch.equal(queue.data, FeatureQueue().data) and not torch.equal(queue.data, FeatureQueue(seed=1).data)


def test_one_process_is_all_ranks():
    z = codes(3)
    assert all_ranks(z) is z


# --- the losses

@pytest.mark.parametrize("normalize", [False, True])
def test_info_nce_is_cross_entropy_of_explicit_logits(normalize):
    q, k, u = codes(5), codes(5, seed=1), codes(30, seed=2).T
    logits = nce_logits(q, k, u, .07, normalize=normalize)
    a, b, c = (F.normalize(q), F.normalize(k), F.normalize(u, dim=0)) if normalize else (q, k, u)
    explicit = torch.stack([torch.cat([(a[i] @ b[i])[None], torch.stack([a[i] @ c[:, j] for j in range(30)])]) / .07 for i in range(5)])
    torch.testing.assert_close(logits, explicit)
    torch.testing.assert_close(info_nce(logits), F.cross_entropy(explicit, torch.zeros(5, dtype=torch.int64)))
    shuffled = nce_logits(q, k, u[:, torch.randperm(30, generator=torch.Generator().manual_seed(0))], .07, normalize=normalize)
    torch.testing.assert_close(info_nce(shuffled), info_nce(logits))
    assert (torch.allclose(info_nce(nce_logits(3 * q, 5 * k, 7 * u, normalize=normalize)), info_nce(logits))) == normalize


def test_stored_norms_are_those_of_the_columns():
    queue, q, k = FeatureQueue(8, 9), codes(3).float(), codes(3, seed=1).float()
    queue.push(4 * codes(5, seed=2).float())
    torch.testing.assert_close(nce_logits(q, k, queue.data, normalize=True, norms=queue.norms), nce_logits(q, k, queue.data, normalize=True))


def test_content_is_zero_for_equal_codes_only():
    q, k = codes(4), codes(4, seed=1)
    assert content_loss(q, q) == 0 < content_loss(q, k) == pytest.approx(((q - k) ** 2).sum().item() / 32)


def test_style_by_hand():
    q1, q2, n0, n1 = (codes(4, 6, seed=i) for i in range(4))
    by_hand = 0.
    for q, n in ((q1, n0), (q2, n1)):
        for i in range(4):
            for j in range(4):
                by_hand -= ((q[i] @ q[j] / 24 - n[i] @ n[j] / 24) ** 2 / 16).item()
    assert style_loss((q1, q2), (n0, n1)).item() == pytest.approx(by_hand, rel=1e-9) and by_hand < 0
    assert gram(q1, "channel").shape == (6, 6) and gram(q1, "channel")[1, 2].item() == pytest.approx((q1[:, 1] @ q1[:, 2] / 24).item())
    order = [2, 0, 3, 1]
    assert style_loss((q1[order], q2), (n0, n1)).item() != pytest.approx(by_hand, rel=1e-3)  # pairs matter ...
    torch.testing.assert_close(style_loss((q1[order], q2), (n0, n1), "channel"), style_loss((q1, q2), (n0, n1), "channel"))  # ... but not between channels
    rotation = torch.linalg.qr(codes(6, 6, seed=9))[0]
    assert style_loss((q1, q2), (q1 @ rotation, q2 @ rotation)).item() == pytest.approx(0, abs=1e-20)  # equal Gram matrices


def out_of(seed=0, k=20, ready=True, scale=1.):
    q1, q2, key, n0, n1 = (scale * codes(4, seed=seed + i) for i in range(5))
    return ContrastOutput((q1, q2), key, nce_logits(q2, key, codes(k, seed=9).T), (q1, q2), (n0, n1), torch.tensor(ready), q2)


def test_the_loss_weighs_its_terms():
    terms = ConStyleLoss()(out_of())
    assert set(terms) == {"nce", "content", "style", "total"} and terms["total"].item() == pytest.approx((terms["nce"] + terms["content"] + terms["style"]).item())
    for i, name in enumerate(("w_nce", "w_content", "w_style")):
        one = ConStyleLoss(**{n: float(n == name) * 3 for n in ("w_nce", "w_content", "w_style")})(out_of())
        assert one["total"].item() == pytest.approx(3 * terms[("nce", "content", "style")[i]].item())
    assert ConStyleLoss(0, 0, 0)(out_of())["total"] == 0
    assert ConStyleLoss(style_clip=1e-3)(out_of())["style"] == -1e-3 and ConStyleLoss(style_clip=1e9)(out_of())["style"] == terms["style"]
    assert ConStyleLoss()(out_of(ready=False))["style"] == 0
    assert ConStyleLoss(gram="channel")(out_of())["style"] != terms["style"] < 0


def test_codes_of_any_size_give_finite_losses():
    for scale in (0., 1e-12, 1e4):
        leaf = (scale * codes(4)).float().requires_grad_()
        queue = codes(20, seed=9).T.float()
        for normalize in (False, True):
            loss = info_nce(nce_logits(leaf, leaf.detach(), queue, normalize=normalize))
            gradient, = torch.autograd.grad(loss, leaf)
            assert loss.isfinite() and gradient.isfinite().all()


# --- the released step, by an independent account of it in float64

class Released:
    "Section 2.2, in its order, with plain tensors; the encoders and the network are only called."

    def __init__(self, net, size, momentum, temperature=.07):
        self.net, self.k = net, copy.deepcopy(net.ConStyle.encoder_q).requires_grad_(False)
        self.q = net.ConStyle.encoder_q
        self.queue, self.ptr, self.m, self.t = None, 0, momentum, temperature
        self.size = size

    def loss(self, x, y, weights):
        c1, c2 = (cond := self.net.encode(x)).codes                                   # (1)
        with torch.no_grad():
            for own, source in zip(self.k.parameters(), self.q.parameters()):          # (2)
                own.copy_(self.m * own + (1 - self.m) * source)
            k2 = self.k(y).codes[1]                                                     # (3)
        b, d = c2.shape
        old = self.queue.clone()
        nce = 0.
        for i in range(b):                                                              # (4)
            scores = torch.cat([(c2[i] @ k2[i])[None], c2[i] @ old]) / self.t
            nce = nce - (scores[0] - scores.logsumexp(0)) / b
        n1 = old[:, self.ptr:self.ptr + b].T                                            # (5)
        n0 = old[:, (self.ptr + b) % self.size:(self.ptr + b) % self.size + b].T
        style = sum(-((c @ c.T / (b * d) - n @ n.T / (b * d)) ** 2).mean() for c, n in ((c1, n0), (c2, n1)))
        self.queue[:, self.ptr:self.ptr + b] = c2.detach().T                            # (6)
        self.ptr = (self.ptr + b) % self.size                                           # (7)
        out = self.net.restore(x, cond)
        return (out - y).abs().mean() + weights[0] * nce + weights[1] * ((c2 - k2) ** 2).mean() + weights[2] * style


@pytest.mark.parametrize("weights", [(1., 1., 1.), (0., 0., 40.), (0., 5., 0.)])
def test_the_official_step_is_the_released_one(weights):
    net, strategy = told().double(), make(told(), preset="official", momentum=.8, weights=weights).double()
    reference = Released(net, 12, .8)
    reference.queue = strategy.constyle.queue.data.clone()
    first = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=.9, weight_decay=.01)
    second = torch.optim.SGD([p for p in strategy.parameters() if p.requires_grad], lr=1e-3, momentum=.9, weight_decay=.01)
    for i, batch in enumerate(batches(8, dtype=torch.float64)):
        wanted, loss = reference.loss(batch["degraded"], batch["clean"], weights), strategy(batch)
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-9, abs=1e-12), i
        for opt, value in ((first, wanted), (second, loss)):
            opt.zero_grad()
            value.backward()
            opt.step()
        strategy.after_step()
        torch.testing.assert_close(flat(strategy.net), flat(net), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(strategy.constyle.queue.data, reference.queue, rtol=1e-8, atol=1e-10)
        assert strategy.constyle.queue.ptr.item() == reference.ptr
    with torch.no_grad():  # the strategy has made the momentum update of the next step
        for own, source in zip(reference.k.parameters(), reference.q.parameters()):
            own.copy_(.8 * own + .2 * source)
    torch.testing.assert_close(flat(strategy.constyle.encoder_k), flat(reference.k), rtol=1e-8, atol=1e-10)


def test_contrast_in_one_call_is_the_released_order_too():
    encoder = awake(ConStyleEncoder(**SMALL)).double()
    module, (batch, *_) = ConStyle(encoder, FeatureQueue(8, 10), momentum=.9).double(), batches(1, dtype=torch.float64)
    with torch.no_grad():
        for p in module.encoder_k.parameters():
            p.mul_(1.1)
    key, query, queue = flat(nn.ParameterList(module.encoder_k.parameters())), flat(nn.ParameterList(encoder.parameters())), copy.deepcopy(module.queue)
    module.queue.ptr.fill_(8), queue.ptr.fill_(8)
    out = module.contrast(batch["degraded"], batch["clean"])
    torch.testing.assert_close(flat(nn.ParameterList(module.encoder_k.parameters())), key + .1 * (query - key))
    assert torch.equal(flat(nn.ParameterList(encoder.parameters())), query)
    assert module.queue.ptr.item() == 2 and torch.equal(module.queue.data[:, 2:8], queue.data[:, 2:8]) and torch.equal(module.queue.data[:, [8, 9, 0, 1]].T, out.codes[1].detach())
    torch.testing.assert_close(out.logits, nce_logits(out.codes[1], out.key, queue.data))  # the queue before, the key encoder after its update
    with torch.no_grad():
        torch.testing.assert_close(out.key, module.encoder_k(batch["clean"]).codes[1])
    assert torch.equal(out.negatives[1], queue.oldest(4)) and torch.equal(out.negatives[0], queue.oldest(4, 4))
    ConStyleLoss()(out)["total"].backward()  # the queue has been overwritten meanwhile
    assert all(p.grad is None and not p.requires_grad for p in module.encoder_k.parameters()) and all(p.grad is not None for p in module.trainable_parameters())
    assert not any(t.requires_grad for t in (out.key, *out.negatives, out.stored, module.queue.data))
    assert list(module.state_dict())[:4] == ["queue.data", "queue.norms", "queue.ptr", "queue.filled"] and "encoder_q.stage1.0.0.weight" in module.state_dict()


@pytest.mark.parametrize("enqueue", ["query", "key", "degraded_key"])
def test_what_is_stored(enqueue):
    strategy, batch = make(enqueue=enqueue, momentum=.5), batches(1)[0]
    with torch.no_grad():
        for p in strategy.constyle.encoder_k.parameters():
            p.mul_(1.2)
    with torch.no_grad(), RunningStatistics(strategy.net, strategy.constyle.encoder_k).held(False):
        wanted = {"query": strategy.query(batch["degraded"]), "key": strategy.constyle.encoder_k(batch["clean"]), "degraded_key": strategy.constyle.encoder_k(batch["degraded"])}[enqueue].codes[1]
    strategy(batch)
    strategy.after_step()
    torch.testing.assert_close(strategy.constyle.queue.data[:, :4].T, wanted)  # raw codes, normalised mode or not


def test_the_corrected_mode_uses_cosines_and_masks():
    strategy, batch = make(), batches(1)[0]
    for _ in range(2):
        strategy(batch), strategy.after_step()
        assert strategy.logs["style"] == 0  # n0 and n1 would be noise
    strategy(batch)
    assert strategy.logs["style"] < 0
    strategy._stored, strategy._statistics.pending = [], None
    with torch.no_grad(), strategy._statistics.held(False):
        compared = strategy.constyle.compare(strategy.encode(batch["degraded"]), batch["degraded"], batch["clean"])
    assert compared.logits[:, 1:9].abs().max() <= 1 / .07 + 1e-4 and (compared.logits[:, 9:] == -math.inf).all() and compared.ready
    assert float(strategy.logs["nce"]) <= math.log(9) + 2 / .07
    assert make(mask_unfilled=False, normalize=False).constyle.queue.mask_unfilled is False


# --- who learns what

def test_contrast_trains_the_encoder_alone_and_the_pixel_loss_trains_both():
    batch = batches(1)[0]

    def moved(**options):
        strategy = make(**options)
        strategy(batch).backward()
        encoder = {id(p) for p in strategy.query.parameters()}
        grads = {True: [], False: []}
        for p in strategy.net.parameters():
            grads[id(p) in encoder].append(0. if p.grad is None else p.grad.abs().sum().item())
        assert all(p.grad is None for p in strategy.constyle.encoder_k.parameters())
        return sum(grads[True]), sum(grads[False])

    zero = lambda restored, clean: 0 * restored.sum()
    for weights in ((1, 0, 0), (0, 1, 0), (0, 0, 1e3)):
        encoder, rest = moved(loss=zero, weights=weights, mask_unfilled=False)
        assert encoder > 0 == rest
    encoder, rest = moved(weights=0)
    assert encoder > 0 < rest
    encoder, rest = moved(weights=0, detach=True)
    assert encoder == 0 < rest
    encoder, rest = moved(detach=True)
    assert encoder > 0 < rest


def test_maps_and_code_both_carry_the_pixel_gradient():
    for use in (["features"], ["code"]):
        strategy = make(told(use=use), weights=0)
        strategy(batches(1)[0]).backward()
        last, first = strategy.query.mlp2[0].weight.grad, strategy.query.stage1[0][0].weight.grad
        assert first.abs().sum() > 0 and (last is None) == (use == ["features"])


# --- reductions

@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("options", [{"weights": 0}, {"weights": 0, "preset": "official", "enqueue": "key"}, {"weights": [0, 0, 0], "contrastive_steps": 100}])
def test_weight_0_is_supervised_on_the_conditioned_network(options, autocast):
    strategy, plain = make(**options), Supervised(told())
    _loop(strategy, batches(), autocast=autocast), _loop(plain, batches(), autocast=autocast)
    assert same(strategy.net, plain.net) and plain.net.ConStyle.encoder_q.mlp1[1].num_batches_tracked == 6
    changed = make()
    _loop(changed, batches(), autocast=autocast)
    assert not same(changed.net, plain.net)


def test_weight_0_on_a_wrapped_network_is_supervised_on_the_wrapper():
    strategy, plain = make(Flat(), weights=0, encoder=SMALL), None
    plain = Supervised(copy.deepcopy(strategy.restorer()))
    _loop(strategy, batches()), _loop(plain, batches())
    assert same(strategy.restorer(), plain.net)


@pytest.mark.parametrize("weights", [0, 1])
def test_a_network_that_is_told_nothing_trains_as_supervised(weights):
    net = Flat()
    strategy, plain = make(copy.deepcopy(net), condition=False, encoder=SMALL, weights=weights), Supervised(copy.deepcopy(net))
    start = flat(strategy.query)
    _loop(strategy, batches()), _loop(plain, batches())
    assert same(strategy.net, plain.net) and strategy.restorer() is strategy.net and torch.equal(flat(strategy.query), start) == (weights == 0)


# --- normalisation

def test_forward_leaves_statistics_alone_and_the_step_commits_them():
    strategy, batch = make(Flat(), encoder=SMALL), batches(1)[0]
    norms = {"net": strategy.net.norm, "query": strategy.query.mlp1[1], "key": strategy.constyle.encoder_k.mlp2[1]}
    own = {k: m.running_mean for k, m in norms.items()}
    before = {k: v.clone() for k, v in own.items()}
    strategy(batch).backward()
    assert all(torch.equal(m.running_mean, before[k]) and m.num_batches_tracked == 0 for k, m in norms.items())
    strategy.after_step()
    assert all(m.running_mean is own[k] and not torch.equal(m.running_mean, before[k]) and m.num_batches_tracked == 1 for k, m in norms.items())


@pytest.mark.parametrize("look", ["eval", "no_grad"])
def test_a_look_leaves_nothing_pending(look):
    strategy, batch = make(), batches(1)[0]
    strategy.train(look != "eval")
    with torch.set_grad_enabled(look != "no_grad"):
        strategy(batch)
    assert strategy._statistics.pending is None and not strategy._stored
    state = copy.deepcopy(strategy.constyle.state_dict())
    strategy.train().after_step()
    assert all(torch.equal(v, state[k]) for k, v in strategy.constyle.state_dict().items()) and strategy.query.mlp1[1].num_batches_tracked == 0


def test_parts_of_a_batch_are_one_step():
    strategy, sequential = make(momentum=.9), told()
    start = flat(strategy.constyle.encoder_k)
    parts = batches(3)
    for part in parts:
        (strategy(part) / 3).backward()
        sequential(part["degraded"])
    torch.optim.SGD(strategy.net.parameters(), lr=.1).step()
    strategy.after_step()
    assert torch.equal(strategy.query.mlp1[1].running_var, sequential.ConStyle.encoder_q.mlp1[1].running_var) and strategy.query.mlp1[1].num_batches_tracked == 3
    assert strategy.constyle.queue.filled == 12 and strategy.step == 1 and not torch.equal(flat(strategy.constyle.encoder_k), start)
    want = [.9 * k + .1 * q for k, q in zip(make().constyle.encoder_k.parameters(), strategy.query.parameters())]  # one momentum update, not three
    for own, value in zip(strategy.constyle.encoder_k.parameters(), want):
        torch.testing.assert_close(own, value)


def test_an_error_inside_gives_the_statistics_back():
    norm = nn.BatchNorm1d(2)
    statistics, own = RunningStatistics(norm), norm.running_mean
    with pytest.raises(RuntimeError, match="stop"), statistics.held(True):
        norm(torch.ones(3, 2))
        raise RuntimeError("stop")
    assert norm.running_mean is own and own.abs().sum() == 0 and statistics.pending is None


@pytest.mark.parametrize("kind", ["told", "wrapped"])
def test_the_average_evaluates_with_trained_statistics(kind):
    "The released average keeps the statistics of the construction: its code is that of an untrained normalisation."
    class Batches:
        def batch(self, step):
            return {k: 3 * v if k == "degraded" else v for k, v in toy_batch(4, 16, seed=step).items()}
    strategy = make() if kind == "told" else make(Flat(), encoder=SMALL)
    result = train(strategy, Batches(), TrainConfig(steps=6, warmup=1, lr=2e-3, ema=0.0, log_every=2), progress=False)
    x = toy_batch(4, 16, seed=9)["degraded"]
    own = copy.deepcopy(strategy.restorer()).eval()
    with torch.no_grad():
        assert same(result.restorer, own) and torch.equal(result.restorer(x), own(x))
        assert not torch.equal(default_statistics(own).encode(x).codes[1], own.encode(x).codes[1])
    averaged = make() if kind == "told" else make(Flat(), encoder=SMALL)
    result = train(averaged, Batches(), TrainConfig(steps=6, warmup=1, lr=2e-3, ema=0.9, log_every=2), progress=False)
    trained, kept = dict(averaged.restorer().named_buffers()), dict(result.restorer.named_buffers())
    assert trained and all(torch.equal(trained[k], kept[k]) for k in trained) and not same(result.restorer, averaged.restorer())


@pytest.mark.parametrize("net", [told, lambda: ConStyleWrapper(Flat(), SMALL), lambda: ConStyleWrapper(awake(Levels()), SMALL, pad=8)], ids=["told", "flat", "levels"])
def test_eval_output_is_deterministic_and_independent_of_the_batch(net):
    strategy = make(net()) if conditioned(n := net()) else None
    restorer = strategy.restorer() if strategy else n
    restorer.train()
    for batch in batches(3):
        restorer(batch["degraded"])
    restorer.eval()
    x = toy_batch(2, 32)["degraded"]
    with torch.no_grad():
        both = restorer(x)
        torch.testing.assert_close(torch.cat([restorer(x[:1]), restorer(x[1:])]), both, atol=2e-4, rtol=1e-4)
        assert torch.equal(restorer(x), both)


# --- freezing

@pytest.mark.parametrize("frozen", ["eval", "batch"])
@pytest.mark.parametrize("opt", [lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=.3), lambda p: torch.optim.SGD(p, lr=1e-2, momentum=.9, weight_decay=.3)], ids=["adamw", "sgd"])
@pytest.mark.parametrize("to_none", [True, False])
def test_a_frozen_encoder_does_not_move(frozen, opt, to_none):
    strategy = make(contrastive_steps=3, frozen=frozen)
    opt = opt([p for p in strategy.parameters() if p.requires_grad])
    states = []
    for batch in batches(8):
        opt.zero_grad(set_to_none=to_none)
        strategy(batch).backward()
        opt.step()
        strategy.after_step()
        states.append((flat(strategy.query), flat(strategy.constyle), flat(strategy.net.Finetune_Module)))
    for i in range(1, 8):
        assert torch.equal(states[i][0], states[i - 1][0]) == torch.equal(states[i][1], states[i - 1][1]) == (i >= 3)
        assert not torch.equal(states[i][2], states[i - 1][2])
    assert strategy.phase == "frozen" and strategy.logs["nce"] == 0 and strategy.query.training


def test_freezing_when_gradients_go_through_the_encoder_all_the_same():
    strategy = make(contrastive_steps=2, weights=0)
    opt = torch.optim.AdamW(strategy.net.parameters(), lr=1e-2)
    for i, batch in enumerate(batches(6)):
        opt.zero_grad()
        loss = strategy(batch) + sum(p.square().sum() for p in strategy.query.parameters())  # somebody else's loss
        loss.backward()
        opt.step()
        strategy.after_step()
        if i == 1:
            kept = flat(strategy.query)
    assert torch.equal(flat(strategy.query), kept)


def test_a_frozen_encoder_speaks_with_running_statistics_or_those_of_the_batch():
    batch = batches(1)[0]
    for frozen, train_mode in (("eval", False), ("batch", True)):
        strategy = make(contrastive_steps=0, frozen=frozen)
        strategy(batch)
        with torch.no_grad():
            reference = told().train(train_mode)
            expected = reference.encode(batch["degraded"]).codes[1].std(0, correction=0).mean()
        assert float(strategy.logs["code_std"]) == pytest.approx(expected.item(), rel=1e-4)


def test_a_frozen_random_encoder_stays_random():
    strategy, start = make(contrastive_steps=0), flat(told().ConStyle)
    _loop(strategy, batches())
    assert torch.equal(flat(strategy.net.ConStyle), start) and strategy.constyle.queue.filled == 0 and not same(strategy.net, told())


def test_fractions_of_the_schedule():
    assert make(contrastive_steps=.25, schedule=40).contrastive_steps == 10 and make(contrastive_steps=7).contrastive_steps == 7 and make().contrastive_steps == math.inf
    assert make(contrastive_steps=CONSTYLE_TRAINING["contrastive_steps"] / CONSTYLE_TRAINING["steps"], schedule=CONSTYLE_TRAINING["steps"]).contrastive_steps == 250_000


def test_weights_loaded_while_frozen_are_kept():
    first, second = make(contrastive_steps=2), make(told(seed=1), contrastive_steps=2)
    _loop(first, batches(4)), _loop(second, batches(4))
    second.load_state_dict(first.state_dict())
    _loop(second, batches(2))
    assert torch.equal(flat(second.query), flat(first.query))


# --- the protocol

@pytest.mark.parametrize("preset", list(CONSTYLE_PRESETS))
def test_contract_of_the_conditioned_network(preset):
    contract(lambda net: make(net, preset=preset, contrastive_steps=4), reduced=lambda net: make(net, preset=preset, weights=0), nets=[told], processes=False, options={"preset": preset})


def test_contract_of_plain_networks():
    options = {"encoder": SMALL, "preset": "corrected"}
    contract(lambda net: make(net, **options), reduced=lambda net: make(net, weights=0, condition=False, **options), processes=False, options=options)


def test_contract_with_a_normalised_user_network():
    def user():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Flat()
    options = {"encoder": LAYER, "fuse": "concat", "use": ["features"]}
    contract(lambda net: make(net, **options), nets=[user], processes=False, options=options)


@pytest.mark.parametrize("kind", ["told", "wrapped"])
def test_killed_and_resumed_training_ends_in_the_same_bits(kind, tmp_path):
    build_one = lambda: make(contrastive_steps=9) if kind == "told" else make(ToyNet(), contrastive_steps=9, encoder=SMALL)
    config = TrainConfig(steps=16, warmup=2, lr=2e-3, log_every=2, checkpoint_every=4, weight_decay=.1)
    whole, again = build_one(), build_one()
    history = train(whole, Batches(4, 16), config, progress=False).history
    for stop in (6, 11):  # before and after the freezing
        with pytest.raises(RuntimeError):
            train(build_one(), Batches(4, 16, stop=stop), config, progress=False, checkpoint=tmp_path / "c.pt")
    result = train(again, Batches(4, 16), config, progress=False, checkpoint=tmp_path / "c.pt")
    assert result.resumed_at == 8 and result.history == history and same(again, whole)
    assert {"nce", "content", "style", "positive", "negative", "code_std", "queue_norm"} <= set(history[0])


def test_the_state_names_everything_once():
    strategy = make()
    buffer = io.BytesIO()
    torch.save(strategy.state_dict(), buffer)
    state = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    assert {k.split(".")[0] for k in state if "." in k} == {"net", "constyle", "objective"} - {"objective"} and not any("encoder_q" in k for k in state if k.startswith("constyle"))
    wrapped = make(ToyNet(), encoder=SMALL)
    assert {k.split(".")[0] for k in wrapped.state_dict() if k != "_extra_state"} == {"net", "conditioner", "constyle"}
    assert not any("constyle" in k or "encoder_k" in k or "queue" in k for k in [*strategy.restorer().state_dict(), *wrapped.restorer().state_dict()])


def test_what_ships_needs_no_queue_and_opens_from_a_file(tmp_path):
    options = {"queue_size": 12, "encoder": {"width": 2, "code_dim": 8}, "use": ["code"], "weights": [1, 0, 0], "contrastive_steps": .5, "schedule": 10, "seed": 3}
    net = build("NAFNet", width=4, enc_blk_nums=[1], middle_blk_num=1, dec_blk_nums=[1])
    strategy, x = IRConStyle(net, **options), toy_batch(2, 20)["degraded"]
    _loop(strategy, batches(3))
    network = {"name": "NAFNet", "options": {"width": 4, "enc_blk_nums": [1], "middle_blk_num": 1, "dec_blk_nums": [1]}}
    spec = {"network": network, "strategy": {"name": "constyle", "class": "irnb.strategies.IRConStyle", "options": options}}
    save_model(tmp_path / "m.safetensors", strategy.restorer(), spec)
    loaded, _ = load_model(tmp_path / "m.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(x), strategy.restorer().eval()(x)) and isinstance(loaded, ConStyleWrapper)
    own = {"dim": 4, "left": [1, 1, 1], "bottom": 1, "right": [1, 1, 1], "encoder": SMALL}
    strategy = make()
    save_model(tmp_path / "n.safetensors", strategy.restorer(), {"network": {"name": "ConStyleNAFNet", "options": own}, "strategy": {"name": "c", "class": "irnb.strategies.IRConStyle", "options": {"queue_size": 12}}})
    assert same(load_model(tmp_path / "n.safetensors")[0], strategy.net) and strategy.restorer() is strategy.net
    with pytest.raises(ValueError, match="m.safetensors"):  # a file of another network
        save_model(tmp_path / "m.safetensors", ToyNet(), spec)


@pytest.mark.parametrize("options", [{"preset": "official"}, {"preset": "corrected"}, {"contrastive_steps": 2}, {"weights": 0}, {"enqueue": "degraded_key", "gram": "channel", "style_clip": .1}], ids=str)
def test_the_step_does_not_wait_for_the_device(options):
    strategy, batch = make(**options), batches(1)[0]
    for _ in range(4):
        with Reads() as mode:
            strategy(batch).backward()
            strategy.after_step()
        assert mode.found == []


def test_the_global_generator_is_never_used():
    net, before = ToyNet(), torch.get_rng_state()
    _loop(make(net, encoder=SMALL), batches(3))
    assert torch.equal(before, torch.get_rng_state())


def test_seeds():
    one, again, other = (make(ToyNet(), encoder=SMALL, seed=s) for s in (0, 0, 1))
    assert same(one, again) and not torch.equal(one.constyle.queue.data, other.constyle.queue.data) and not torch.equal(flat(one.query), flat(other.query))


def test_autocast_keeps_the_contrastive_part_in_full_precision():
    strategy, seen = make(), []
    strategy.query.register_forward_hook(lambda m, a, out: seen.append([t.dtype for t in (*out.codes, *out.feats)]))
    strategy.constyle.encoder_k.register_forward_hook(lambda m, a, out: seen.append([t.dtype for t in out.codes]))
    blocks = []
    strategy.net.Process_Module_l1[0].conv1.register_forward_hook(lambda m, a, out: blocks.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = strategy(batches(1)[0])
        terms = ConStyleLoss()(out_of(scale=100.))
        huge = ConStyleLoss()(ContrastOutput(*[t.bfloat16() if isinstance(t, torch.Tensor) and t.is_floating_point() else tuple(u.bfloat16() for u in t) if isinstance(t, tuple) else t for t in out_of()]))
    assert all(d == torch.float32 for found in seen for d in found) and blocks == [torch.bfloat16] and loss.dtype == torch.float32
    assert all(v.dtype == torch.float64 for v in terms.values()) and all(v.dtype == torch.float32 for v in huge.values())


@pytest.mark.parametrize("preset", list(CONSTYLE_PRESETS))
@pytest.mark.parametrize("value", [0., 1.])
@pytest.mark.parametrize("autocast", [False, True])
def test_black_and_white_images(preset, value, autocast):
    strategy = make(preset=preset)
    batch = {"degraded": torch.full((4, 3, 16, 16), value), "clean": torch.full((4, 3, 16, 16), value)}
    losses, _ = _loop(strategy, [batch] * 4, autocast=autocast)
    assert all(map(math.isfinite, losses)) and all(p.isfinite().all() for p in strategy.parameters()) and all(v.isfinite() for v in strategy.logs.values())


def test_super_resolution_and_grey():
    torch.manual_seed(0)
    batch = {"degraded": torch.rand(4, 3, 12, 12), "clean": torch.rand(4, 3, 24, 24)}
    strategy = make(Flat(2), encoder=SMALL)
    losses, _ = _loop(strategy, [batch] * 5)
    assert losses[-1] < losses[0] and strategy.restorer().eval()(torch.rand(1, 3, 13, 9)).shape == (1, 3, 26, 18)
    grey = make(Flat(channels=1), encoder=SMALL | {"in_channels": 1})
    _loop(grey, [{k: v[:, :1] for k, v in batches(1)[0].items()}] * 2)
    assert grey.restorer().eval()(torch.rand(1, 1, 9, 9)).shape == (1, 1, 9, 9)


@pytest.mark.parametrize("size", [(16, 16), (17, 23), (40, 64), (65, 30), (9, 8), (3, 5)])
def test_sides_of_any_size(size):
    g = torch.Generator().manual_seed(0)
    batch = {k: torch.rand(2, 3, *size, generator=g) for k in ("degraded", "clean")}
    for strategy in (make(), make(ToyNet(), encoder=SMALL), make(build("NAFNet", width=4, enc_blk_nums=[1, 1], middle_blk_num=1, dec_blk_nums=[1, 1]), encoder=SMALL)):
        strategy(batch).backward()
        strategy.after_step()
        assert strategy.restorer().eval()(batch["degraded"]).shape == batch["degraded"].shape


# --- the wrapper

def example_nets():
    yield "NAFNet", build("NAFNet", width=4, enc_blk_nums=[1, 1, 1], middle_blk_num=1, dec_blk_nums=[1, 1, 1])
    yield "UNet", build("UNet", preset="tiny")
    yield "Restormer", build("Restormer", preset="tiny")
    yield "SwinIR", build("SwinIR", preset="tiny", upscale=1)
    yield "toy", ToyNet()
    yield "flat", Flat()
    yield "levels", Levels()


@pytest.mark.parametrize("name, net", list(example_nets()), ids=[n for n, _ in example_nets()])
def test_a_wrapped_network_equals_the_bare_one_and_stays_as_it_is(name, net):
    awake(net, .1)
    keys, modes = list(net.state_dict()), [m.training for m in net.modules()]
    state = flat(net)
    wrapper = ConStyleWrapper(net, SMALL)
    assert list(net.state_dict()) == keys and torch.equal(flat(net), state) and [m.training for m in net.modules()] == modes and wrapper.backbone is net
    assert len(wrapper.conditioner.fusions) == 4
    wrapper.eval()
    for size in ((16, 24), (32, 32)) if name == "levels" else ((16, 24), (17, 23), (33, 40)):
        x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            bare = net(x)
            assert torch.equal(wrapper(x), bare) and torch.equal(net(x), bare)
            for key, fusion in wrapper.conditioner.fusions.items():  # each of the four is heard once it speaks
                fusion.mix.weight.fill_(.05)
                assert not torch.equal(wrapper(x), bare), key
                fusion.mix.weight.zero_()
            assert torch.equal(net(x), bare)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in wrapper.modules()) == 0


def test_sites_are_chosen_by_size():
    nafnet = build("NAFNet", width=4, enc_blk_nums=[1, 1, 1], middle_blk_num=2, dec_blk_nums=[1, 1, 1])
    assert pick_sites(places(nafnet)) == {"f0": "downs.0", "f1": "downs.1", "f2": "downs.2", "code": "middle_blks"}
    shallow = build("NAFNet", width=4, enc_blk_nums=[1, 1], middle_blk_num=2, dec_blk_nums=[1, 1])
    assert pick_sites(places(shallow)) == {"f0": "downs.0", "f1": "downs.1", "f2": "middle_blks.1", "code": "middle_blks"}  # links of the chain, not parts of a block
    assert pick_sites(places(nn.Sequential(Flat()))) == {"f0": "0.head", "f1": "0.norm", "f2": "0.body", "code": "0.body"}  # unless there are no others
    assert pick_sites(places(Levels())) == {"f0": "down.0", "f1": "down.1", "f2": "down.2", "code": "down.2"}  # the pool runs three times, so the convolutions after it
    assert pick_sites(places(Flat())) == {"f0": "head", "f1": "norm", "f2": "body", "code": "body"}
    restormer = pick_sites(places(build("Restormer", preset="tiny")))
    assert [restormer[k].split(".")[0] for k in ("f0", "f1", "f2", "code")] == ["down1_2", "down2_3", "down3_4", "latent"]


def test_gradients_of_the_wrapper_start_at_the_mixing_weights():
    strategy, batch = make(ToyNet(), encoder=SMALL, weights=0), batches(1)[0]
    strategy(batch).backward()
    assert all(f.mix.weight.grad.abs().sum() > 0 for f in strategy.conditioner.fusions.values())
    assert all(p.grad.abs().sum() == 0 for p in strategy.query.parameters())  # zero weights pass nothing back
    _loop(strategy, [batch] * 2)
    strategy.zero_grad()
    strategy(batch).backward()
    assert all(p.grad.abs().sum() > 0 for p in strategy.restorer().parameters())


def test_maps_reach_their_places_aligned():
    "An impulse in a map comes out where it is, in networks with levels and in flat ones, padded or not."
    class Silent(nn.Module):
        def __init__(self, stride, own):
            super().__init__()
            self.own = own
            self.first, self.last = nn.Conv2d(3, 4, stride, stride, bias=False), nn.Conv2d(4, 3, 1, bias=False)

        def forward(self, x):
            return self.last(self.first(F.pad(x, (0, -x.shape[-1] % self.own, 0, -x.shape[-2] % self.own))))

    cases = ((2, "f0", 2), (1, "f0", 2), (1, "f2", 8), (4, "f1", 4), (4, "f0", 2))
    for (stride, key, cell), own in itertools.product(cases, (4, 64)):  # smaller maps than the encoder's at some sizes, larger ones at others
        wrapper = ConStyleWrapper(Silent(stride, own), SMALL, {key: "first"}).eval()
        for p in wrapper.parameters():
            p.data.fill_(1.)
        x = torch.zeros(1, 3, 40, 48)
        cond = wrapper.encode(x)
        feats = [torch.zeros_like(f) for f in cond.feats]
        feats[int(key[1])][..., 16 // cell, 24 // cell] = 1.
        with torch.no_grad():
            y = wrapper.restore(x, Conditioning(cond.codes, tuple(feats)))[0, 0]
        rows, columns = (y > .2 * y.max()).nonzero().T
        unit = max(cell, stride)  # in input pixels
        centre = torch.stack([rows, columns]).double().mean(1) * stride + (stride - 1) / 2
        assert (centre - torch.tensor([16., 24.]) - (cell - 1) / 2).abs().max() < unit / 2 + .01, (stride, key, own)


def test_what_the_code_and_the_maps_do_by_hand():
    torch.manual_seed(0)
    wrapper, x = ConStyleWrapper(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)), ALIVE, {"f0": "0", "code": "0"}).eval(), torch.rand(2, 3, 17, 23)
    told, code = (awake(wrapper.conditioner.fusions[k]) for k in ("f0", "code"))
    with torch.no_grad():
        cond = wrapper.encode(x)
        padded = wrapper.conditioner.encoder_q(F.pad(x, (0, 9, 0, 15), mode="reflect"))  # to multiples of 16
        assert all(torch.equal(a, b) for a, b in zip((*cond.codes, *cond.feats), (*padded.codes, *padded.feats)))
        y = wrapper.backbone[0](x)
        f = F.interpolate(F.leaky_relu(told.adapter[0](cond.feats[0]), .1), scale_factor=2, mode="bilinear")[..., :17, :23]
        y = y + told.mix(f)
        y = y + code.mix(y * code.adapter(cond.codes[1])[:, :, None, None])
        torch.testing.assert_close(wrapper(x), wrapper.backbone[1](y))


def test_fuse_by_concatenation():
    x = torch.rand(2, 3, 16, 16)
    torch.manual_seed(0)
    wrapper = ConStyleWrapper(ToyNet(), SMALL, fuse="concat").eval()
    mix = wrapper.conditioner.fusions["f0"].mix
    assert mix.weight.shape == (8, 16, 1, 1) and torch.equal(mix.weight[:, :8, 0, 0], torch.eye(8)) and mix.weight[:, 8:].abs().sum() > 0
    with torch.no_grad():
        assert not torch.equal(wrapper(x), ToyNet()(x))
        for fusion in wrapper.conditioner.fusions.values():
            fusion.mix.weight[:, 8:] = 0
        torch.testing.assert_close(wrapper(x), ToyNet()(x))


def test_use_and_sites_choose_what_is_told():
    assert set(ConStyleWrapper(ToyNet(), SMALL, use=["features"]).conditioner.fusions) == {"f0", "f1", "f2"}
    assert set(ConStyleWrapper(ToyNet(), SMALL, use=["code"]).conditioner.fusions) == {"code"}
    assert ConStyleWrapper(ToyNet(), SMALL, {"f1": "layers.1", "code": "layers.0"}).conditioner.names == {"f1": "layers.1", "code": "layers.0"}
    strategy = make(Levels(), encoder=SMALL, sites={"f2": "down.2"})
    assert list(strategy.conditioner.fusions) == ["f2"] and IRConStyle.restorer_for(Levels(), encoder=SMALL, sites={"f2": "down.2"}).conditioner.names == {"f2": "down.2"}


def test_copies_pickle_and_export():
    torch.manual_seed(0)
    wrapper = ConStyleWrapper(awake(build("NAFNet", width=4, enc_blk_nums=[1, 1], middle_blk_num=1, dec_blk_nums=[1, 1])), SMALL).eval()
    for fusion in wrapper.conditioner.fusions.values():
        fusion.mix.weight.data.normal_(0, .1)
    x, y = torch.rand(1, 3, 24, 33), torch.rand(1, 3, 24, 33)
    with torch.no_grad():
        wanted = wrapper(y)
        assert torch.equal(copy.deepcopy(wrapper)(y), wanted) and torch.equal(pickle.loads(pickle.dumps(wrapper))(y), wanted)
        exported = torch.export.export(wrapper, (x,))
        torch.testing.assert_close(exported.module()(y), wanted)
    twin = copy.deepcopy(wrapper)
    twin.backbone.intro.weight.data.zero_()
    assert torch.equal(wrapper(y), wanted)


def test_tiles_share_the_code_of_the_picture():
    from irnb.images import pad_to_multiple, tiled
    net = awake(build("NAFNet", width=4, enc_blk_nums=[1], middle_blk_num=1, dec_blk_nums=[1]))
    wrapper = ConStyleWrapper(net, ALIVE).eval()
    for fusion in wrapper.conditioner.fusions.values():
        awake(fusion.mix)
    x = torch.rand(1, 3, 150, 168, generator=torch.Generator().manual_seed(0))
    padded = pad_to_multiple(x, wrapper.multiple)
    with torch.no_grad():
        whole = wrapper(padded)[..., :150, :168]
        for restorer in (wrapper, FixedCode(wrapper, wrapper.encode(padded).codes[1])):
            torch.testing.assert_close(tiled(restorer, x, tile=96, overlap=64, margin=32, multiple=wrapper.multiple), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_compiled_networks_hear_what_they_are_told():
    torch.manual_seed(0)
    net = build("NAFNet", width=4, enc_blk_nums=[1], middle_blk_num=1, dec_blk_nums=[1])
    wrapper, xs = ConStyleWrapper(net, SMALL).eval(), [torch.rand(1, 3, 16, 16) for _ in range(3)]
    for fusion in wrapper.conditioner.fusions.values():
        fusion.mix.weight.data.normal_(0, .3)
    with torch.no_grad():
        wanted = [wrapper(x) for x in xs]
        net.compile(backend="eager")
        net(xs[0])  # compiled once without being told
        for x, y in zip(xs, wanted):
            torch.testing.assert_close(wrapper(x), y)
        net._compiled_call_impl = None
        wrapper.compile(backend="eager")
        for x, y in zip(xs, wanted):
            torch.testing.assert_close(wrapper(x), y)


def test_an_error_in_the_network_takes_the_hooks_off():
    wrapper = ConStyleWrapper(Levels(), SMALL)
    with pytest.raises(RuntimeError, match="multiples of 8"):
        wrapper(torch.rand(2, 3, 17, 16))
    assert sum(len(m._forward_hooks) for m in wrapper.modules()) == 0
    padded = ConStyleWrapper(wrapper.backbone, SMALL, pad=8).eval()
    x = torch.rand(1, 3, 17, 30)
    with torch.no_grad():
        assert torch.equal(padded(x), wrapper.backbone(torch.nn.functional.pad(x, (0, 2, 0, 7), mode="reflect"))[..., :17, :30])


def test_a_given_encoder_is_used_itself():
    encoder = ConStyleEncoder(**SMALL)
    assert ConStyleWrapper(ToyNet(), encoder).conditioner.encoder_q is encoder and make(ToyNet(), encoder=encoder).query is encoder and make(ToyNet(), condition=False, encoder=encoder).query is encoder


def test_presets_choose_the_initialisation():
    official, corrected = (make(ToyNet(), preset=p, encoder={"width": 4}) for p in ("official", "corrected"))
    x = toy_batch(8)["degraded"]
    spread = lambda s: s.encode(x).codes[1].std(0).mean()
    for s in (official, corrected):
        s.eval()
    assert spread(corrected) > 100 * spread(official)
    assert not official.constyle.normalize and corrected.constyle.normalize and CONSTYLE_PRESETS["official"]["temperature"] == .07


# --- a pre-trained encoder

def test_encoders_load_from_files_of_several_kinds(tmp_path):
    source = awake(ConStyleEncoder(**SMALL))
    state = source.state_dict()
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"params": {"other": torch.zeros(1)}, "params_ema": {f"ConStyle.encoder_q.{k}": v for k, v in state.items()} | {"ConStyle.queue": torch.zeros(3), "ConStyle.encoder_k.mlp1.0.bias": torch.ones(8)}}, tmp_path / "released.pth")
    from safetensors.torch import save_file
    save_file({f"encoder_q.{k}": v for k, v in state.items()} | {"head.out.weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    for given in (tmp_path / "plain.pt", str(tmp_path / "released.pth"), tmp_path / "a.safetensors", state, source):
        assert same(load_encoder(ConStyleEncoder(**SMALL), given), source)
    strategy = make(ToyNet(), encoder=SMALL, encoder_weights=str(tmp_path / "plain.pt"), contrastive_steps=0)
    _loop(strategy, batches(2))
    assert same(strategy.query, source)
    shipped = IRConStyle.restorer_for(ToyNet(), encoder=SMALL, encoder_weights="gone.pt", contrastive_steps=0)  # opening a model needs no such file
    shipped.load_state_dict(strategy.restorer().state_dict())


def test_weights_of_another_family_are_refused(tmp_path):
    torch.save({"params": build("NAFNet", preset="tiny").state_dict()}, tmp_path / "nafnet.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match="nafnet.pth.*stage1.*intro"):
        load_encoder(ConStyleEncoder(**SMALL), tmp_path / "nafnet.pth")
    with pytest.raises(ValueError, match="stage1.*2, 3, 3, 3.*4, 3, 3, 3"):
        load_encoder(ConStyleEncoder(**SMALL), ConStyleEncoder(width=4, code_dim=8))
    for name in ("text.pth", "absent.pth"):
        with pytest.raises(ValueError, match=name):
            load_encoder(ConStyleEncoder(**SMALL), tmp_path / name)
    with pytest.raises(ValueError, match="absent.pth"):
        make(ToyNet(), encoder=SMALL, encoder_weights=str(tmp_path / "absent.pth"))


# --- controls and probes

def test_fixed_code_and_no_maps():
    net, x = told(encoder=ALIVE).eval(), toy_batch(3, 21)["degraded"]
    with torch.no_grad():
        assert torch.equal(FixedCode(net)(x), net(x))
        cond = net.encode(x)
        fixed = FixedCode(net, cond.codes[1][0])
        torch.testing.assert_close(fixed(x)[:1], net(x)[:1])
        assert not torch.allclose(fixed(x)[1:], net(x)[1:], atol=1e-7)
        silent = FixedCode(net, features=False)(x)
        torch.testing.assert_close(silent, net.restore(x, Conditioning(cond.codes, tuple(0 * f for f in cond.feats))))
        assert not torch.allclose(silent, net(x), atol=1e-5)
    assert "code" in fixed.state_dict() and conditioned(net)


def test_default_statistics_is_the_released_evaluation():
    strategy = make()
    _loop(strategy, batches())
    twin = default_statistics(strategy.restorer())
    assert twin.ConStyle.encoder_q.mlp1[1].running_mean.abs().sum() == 0 != strategy.query.mlp1[1].running_mean.abs().sum()
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), strategy.net.parameters()))


@pytest.mark.parametrize("kind", ["told", "wrapped", "beside", "frozen", "weights 0"])
def test_the_probe_looks_and_leaves(kind):
    strategy = {"told": lambda: make(told(encoder=ALIVE)), "wrapped": lambda: make(Flat(), encoder=SMALL), "beside": lambda: make(ToyNet(), condition=False, encoder=SMALL), "frozen": lambda: make(contrastive_steps=1),
                "weights 0": lambda: make(weights=0)}[kind]()
    _loop(strategy, batches(3))
    strategy.net.eval()
    state, rng, modes, logs = copy.deepcopy(strategy.state_dict()), torch.get_rng_state(), [m.training for m in strategy.modules()], strategy.logs
    grads = [p.grad for p in strategy.parameters()]
    seen = probe(strategy, batches(1)[0])
    assert all(torch.equal(v, state[k]) for k, v in strategy.state_dict().items() if isinstance(v, torch.Tensor)) and torch.equal(rng, torch.get_rng_state())
    assert [m.training for m in strategy.modules()] == modes and strategy.logs is logs and all(a is p.grad for a, p in zip(grads, strategy.parameters())) and strategy._statistics.pending is None
    assert all(isinstance(v, float) and (math.isfinite(v) or k == "pixel_share") for k, v in seen.items()) and ("psnr" in seen) == (kind != "beside")
    assert (seen["grad_pixel"] > 0) == (kind != "beside")
    assert seen["grad_nce"] > 0 if kind != "weights 0" else seen["pixel_share"] == 1
    if kind == "told":
        assert seen["nce_of_guessing"] == pytest.approx(math.log(13)) and 0 < seen["pixel_share"] < 1
        assert len({round(seen[k], 7) for k in ("psnr", "psnr_mean_code", "psnr_no_maps", "psnr_untold")}) == 4


def test_the_probe_reports_what_the_step_does():
    strategy, batch = make(preset="official", weights=[2., 1., 1.]), batches(1)[0]
    _loop(strategy, batches(2))
    strategy(batch)
    seen = probe(strategy, batch)
    for name in ("nce", "content", "style", "positive", "negative", "queue_norm"):
        assert seen[name] == pytest.approx(float(strategy.logs[name]), rel=1e-4), name
    assert seen["code_std_train"] == pytest.approx(float(strategy.logs["code_std"]), rel=1e-4)
    strategy.zero_grad()
    (strategy(batch) - strategy.logs["task_loss"]).backward()
    total = math.sqrt(sum(p.grad.square().sum().item() for p in strategy.query.parameters()))
    assert abs(total - seen["grad_nce"]) <= seen["grad_pixel"] + seen["grad_content"] + seen["grad_style"] + 1e-4 * total


def test_told_psnr_of_a_plain_conditioned_network():
    net, batch = told(), batches(1)[0]
    seen = told_psnr(net, batch["degraded"], batch["clean"])
    assert set(seen) == {"psnr", "psnr_mean_code", "psnr_no_maps", "psnr_untold", "psnr_default_statistics"} and net.training
    assert seen["psnr"] == pytest.approx(seen["psnr_default_statistics"])  # untrained: the same


# --- ConStyle v2

@pytest.mark.parametrize("options", [{}, {"pretext": "label", "classes": 5}, {"pretext": "kind", "views": "independent", "crop": 16}, {"preset": "official", "crop": 16}], ids=str)
def test_pretraining_is_a_strategy(options):
    from irnb.degradations.blur import GaussianBlur
    from irnb.degradations.noise import GaussianNoise
    kinds = [GaussianNoise(30), GaussianBlur(2.0), GaussianNoise(5)]
    first, second = (ConStylePretraining(awake(ConStyleEncoder(**SMALL)), kinds, queue_size=16, **options) for _ in range(2))
    data = [{"clean": toy_batch(8, 24, seed=i)["clean"], "label": torch.arange(8) % 5} for i in range(4)]
    state, rng = copy.deepcopy(first.state_dict()), torch.get_rng_state()
    first(data[0])
    assert all(torch.equal(v, state[k]) for k, v in first.state_dict().items() if isinstance(v, torch.Tensor)) and torch.equal(rng, torch.get_rng_state())
    first._calls, first._stored, first._statistics.pending = 0, [], None
    _loop(first, data), _loop(second, data)
    assert same(first, second) and first.constyle.queue.filled == 16 and first.restorer() is first.net and math.isfinite(first.logs["task_loss"])
    assert not torch.equal(flat(first.net), flat(awake(ConStyleEncoder(**SMALL))))
    if "pretext" in options:
        assert first.head.out.out_features == (5 if options["pretext"] == "label" else 3) and first.logs["distilled"] >= 0 and first.logs["pretext"] > 0
        assert not torch.equal(first.head_k.out.weight, first.head.out.weight) and first.head_k.out.weight.grad is None
    strategy = make(ToyNet(), encoder=SMALL, encoder_weights=first.restorer().state_dict(), contrastive_steps=0)
    _loop(strategy, batches(2))
    assert same(strategy.query, first.net)


def test_pretraining_by_default_is_the_chain_of_real_esrgan_and_the_classifier_ends():
    assert [(d.order, d.scale) for d in ConStylePretraining(ConStyleEncoder(**SMALL), queue_size=8).degradations] == [(2, 1)]
    from irnb.degradations.chains import RealESRGAN
    from irnb.degradations.compression import JPEG
    strategy = ConStylePretraining(ConStyleEncoder(**SMALL), [RealESRGAN(order=2, scale=1), JPEG(20)], queue_size=8, pretext="kind", class_steps=1)
    data = {"clean": toy_batch(4, 32)["clean"]}
    _loop(strategy, [data])
    assert strategy.logs["pretext"] > 0 and strategy.step == 1
    strategy(data)
    assert strategy.logs["pretext"] == 0


def test_the_head_and_the_distillation():
    head, x = PretextHead(256, 1000), torch.rand(64, 256)
    assert sum(p.numel() for p in head.parameters()) == 644_584
    dropped = [head(x, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(dropped[0], dropped[1]) and not torch.equal(dropped[0], dropped[2]) and torch.equal(head(x), head(x))
    many = torch.stack([head(x[:1], torch.Generator().manual_seed(s)) for s in range(400)]).mean(0)
    torch.testing.assert_close(many, head(x[:1]), atol=.05, rtol=0)
    p, q = torch.tensor([[.7, .3]]).log(), torch.tensor([[.2, .8]]).log()
    assert distillation(p, q).item() == pytest.approx(.7 * math.log(3.5) + .3 * math.log(.375)) and distillation(p, p) == pytest.approx(0, abs=1e-7)


def test_views():
    strategy = ConStylePretraining(ConStyleEncoder(**SMALL), [lambda x, generator: x], queue_size=8, crop=12)
    clean = toy_batch(4, 24)["clean"]
    a, b, kinds = strategy._views(clean, torch.Generator())
    assert torch.equal(a, b) and a.shape[-1] == 12 and kinds.tolist() == [0] * 4
    strategy.views = "independent"
    assert any(not torch.equal(*strategy._views(clean, torch.Generator())[:2]) for strategy.step in range(3))
    marks = ConStylePretraining(ConStyleEncoder(**SMALL), [lambda x, generator, k=k: x + k for k in range(3)], queue_size=8)
    degraded, same_view, kinds = marks._views(clean, torch.Generator())
    torch.testing.assert_close(degraded - same_view, kinds.view(-1, 1, 1, 1).expand_as(clean).float())


# --- refusals

@pytest.mark.parametrize("options, message", [
    ({"preset": "offical"}, "offical"), ({"weights": [1, 2]}, "weights"), ({"weights": {"ncee": 1}}, "ncee"), ({"weights": -1}, "w_nce"), ({"weights": "1"}, "weights"), ({"weights": [1, 1, "1e-3"]}, "1.0e-3"),
    ({"queue_size": 0}, "size"), ({"queue_size": 8.0}, "size"), ({"momentum": 1.5}, "momentum"), ({"temperature": 0}, "temperature"), ({"enqueue": "both"}, "enqueue"), ({"gram": "pixel"}, "gram"),
    ({"style_clip": 0}, "style_clip"), ({"style_clip": "1e-3"}, "1.0e-3"), ({"frozen": "train"}, "frozen"), ({"contrastive_steps": .5}, "schedule"), ({"contrastive_steps": -1}, "contrastive_steps"), ({"contrastive_steps": 2.0}, "contrastive_steps"),
    ({"loss": "huber"}, "huber"), ({"fuse": "sum"}, "fuse"), ({"use": "code"}, "use"), ({"use": []}, "use"), ({"sites": {"f3": "layers.0"}}, "f3"), ({"sites": {"f0": "layers.9"}}, "layers.9"),
    ({"sites": {"f0": "layers.0"}, "use": ["code"]}, "nothing"), ({"encoder": {"norm": "group"}}, "norm")], ids=str)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        IRConStyle(ToyNet(), **({"queue_size": 8, "encoder": SMALL} | options))


@pytest.mark.parametrize("options", [{"encoder": SMALL}, {"use": ["code"]}, {"sites": {"f0": "DC1"}}, {"condition": False}, {"fuse": "concat"}, {"encoder_weights": {}}], ids=str)
def test_options_of_the_wrapper_do_not_go_with_a_conditioned_network(options):
    with pytest.raises(ValueError, match=f"ConStyleNAFNet.*{next(iter(options))}"):
        make(**options)


def test_bad_batches_and_networks():
    batch = batches(1)[0]
    with pytest.raises(ValueError, match="queue_size.*4"):
        make(queue_size=3)(batch)
    make(queue_size=4)(batch).backward()
    one = {k: v[:1] for k, v in batch.items()}
    for kind in (make(), make(weights=0), make(contrastive_steps=0, frozen="batch")):
        with pytest.raises(ValueError, match="2.*norm='layer'"):
            kind(one)
    make(contrastive_steps=0)(one), make(told(encoder=LAYER))(one), make().eval()(one)
    with pytest.raises(ValueError, match="channels"):
        make(nn.Conv2d(3, 1, 3, padding=1), encoder=SMALL, condition=False)({"degraded": batch["degraded"], "clean": batch["clean"][:, :1]})
    with pytest.raises(ValueError, match=r"IRConStyle.*batch\['clean'\]"):
        make()({"degraded": batch["degraded"]})
    with pytest.raises(ValueError, match="nn.Module"):
        IRConStyle(lambda x: x)
    with pytest.raises(ValueError, match="UpscaleFirst.*'net'"):
        make(build("ConStyleNAFNet", preset="tiny", upscale=2))
    with pytest.raises(ValueError, match="ConStyleWrapper.*sites"):
        ConStyleWrapper(nn.Conv2d(3, 3, 1), SMALL)
    with pytest.raises(ValueError, match="Flat.*example="):
        ConStyleWrapper(Flat(channels=4), SMALL)
    assert ConStyleWrapper(Flat(channels=4), SMALL | {"in_channels": 4})
    shared = nn.Conv2d(8, 8, 1)
    with pytest.raises(ValueError, match="'1'.*'0'"):
        ConStyleWrapper(nn.Sequential(nn.Conv2d(3, 8, 1), shared, shared, nn.Conv2d(8, 3, 1)), SMALL, {"f0": "1"})
    with pytest.raises(ValueError, match="pretext"):
        ConStylePretraining(ConStyleEncoder(**SMALL), pretext="class")
    with pytest.raises(ValueError, match="views"):
        ConStylePretraining(ConStyleEncoder(**SMALL), views="independent")
    with pytest.raises(ValueError, match="crop.*99"):
        ConStylePretraining(ConStyleEncoder(**SMALL), queue_size=8, crop=99)(batch)


def test_unconditioned_graph_is_wrapped_like_any_network():
    strategy = make(told(conditioned=False, encoder=None), encoder=SMALL)
    assert strategy.told and isinstance(strategy.restorer(), ConStyleWrapper) and not conditioned(strategy.net)
    _loop(strategy, batches(2))
    beside = make(told(conditioned=False, encoder=None), encoder=SMALL, condition=False)
    _loop(beside, batches(2))
    assert beside.restorer() is beside.net


def test_strategies_are_found_by_name():
    import irnb.strategies
    assert irnb.strategies.IRConStyle is IRConStyle and issubclass(IRConStyle, Strategy) and not isinstance(make().constyle.encoder_k, Frozen)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make().load_state_dict(make().state_dict())
