"""The encoder and the general restoration network: counts and names, the graph against the specification written out, sizes, controls, options read off weights, export, and what must be refused."""
import copy
import pickle
import warnings
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from irnb.images import tiled
from irnb.networks import ConStyleConv, ConStyleEncoder, ConStyleNAFNet, ConStyleRestormer, Conditioning, GeneralRestorationNet, NAFNet, build, count_macs, count_parameters, load_model, networks, \
    receptive_radius, save_model
from irnb.networks.checkpoints import load_weights
from tests.nets import awake

F64 = torch.float64
FAMILIES = [ConStyleNAFNet, ConStyleRestormer, ConStyleConv]
SMALL = dict(dim=4, left=[1, 2, 1], bottom=1, right=[2, 1, 1], encoder=dict(width=2, code_dim=6))


def small(cls=ConStyleNAFNet, **options) -> GeneralRestorationNet:
    "A network of four channels, in double precision, with random weights and running statistics."
    extra = dict(num_refinement_blocks=1, heads=[1, 2, 2, 4]) if cls is ConStyleRestormer else {}
    net = awake(cls(**{**SMALL, **extra, **options}).double(), 0.3)
    g = torch.Generator().manual_seed(1)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm1d):
            m.running_mean.copy_(0.1 * torch.randn(m.num_features, generator=g))
            m.running_var.copy_(0.5 + torch.rand(m.num_features, generator=g))
    return net.eval()


def image(*size, batch=2, channels=3, seed=0): return torch.rand(batch, channels, *size, dtype=F64, generator=torch.Generator().manual_seed(seed))
def shapes(net): return {k: tuple(v.shape) for k, v in net.state_dict().items()}


# --- counts, names, cost

@pytest.mark.parametrize("cls, count", [(ConStyleNAFNet, 12_739_872), (ConStyleRestormer, 15_574_960), (ConStyleConv, 6_782_499), (ConStyleEncoder, 1_190_832)])
def test_published_counts(cls, count):
    with torch.device("meta"): assert count_parameters(cls()) == count
    if cls is ConStyleEncoder: return
    with torch.device("meta"): assert shapes(build(cls.__name__, preset="paper")) == shapes(cls())
    assert cls.__name__ in networks() and cls.multiple == 8


@pytest.mark.parametrize("cls, gmacs", [(ConStyleNAFNet, 23.46 + 0.347), (ConStyleRestormer, 41.11 + 0.347), (ConStyleConv, 12.94 + 0.347), (ConStyleEncoder, 0.347)])
def test_published_cost(cls, gmacs):
    with torch.device("meta"): assert count_macs(cls()) / 1e9 == pytest.approx(gmacs, abs=0.006)


def test_cost_is_that_of_one_picture_by_hand():
    net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 3, 1))
    assert count_macs(net, (6, 7)) == 6 * 7 * (9 * 15 + 15) and not any(p.is_meta for p in net.parameters())
    assert count_macs(NAFNet(img_channel=1, width=4), (8, 8)) > 0


def test_tiny_presets_are_small():
    for cls in FAMILIES:
        net = build(cls.__name__, preset="tiny")
        assert count_parameters(net) < 250_000 and count_macs(net, (64, 64)) < 120e6


def encoder_names(prefix="ConStyle.encoder_q.", w=16, code=128, channels=3):
    sizes = {"stage1": [(w, channels), (w, w), (2*w, w)], "stage2": [(2*w, 2*w), (4*w, 2*w)], "stage3": [(8*w, 4*w), (8*w, 8*w)], "stage4": [(16*w, 8*w), (16*w, 16*w)]}
    names = {f"{prefix}{stage}.{i}.0.weight": (o, c, 3, 3) for stage, convs in sizes.items() for i, (o, c) in enumerate(convs)}
    for k, inputs in (("mlp1", 16*w), ("mlp2", code)):
        names |= {f"{prefix}{k}.0.weight": (code, inputs), f"{prefix}{k}.0.bias": (code,), f"{prefix}{k}.1.weight": (code,), f"{prefix}{k}.1.bias": (code,),
                  f"{prefix}{k}.1.running_mean": (code,), f"{prefix}{k}.1.running_var": (code,), f"{prefix}{k}.1.num_batches_tracked": ()}
    return names


def naf_names(p, c):
    conv = lambda n, o, i, k: {f"{p}{n}.weight": (o, i, k, k), f"{p}{n}.bias": (o,)}
    return {f"{p}beta": (1, c, 1, 1), f"{p}gamma": (1, c, 1, 1), **conv("conv1", 2*c, c, 1), **conv("conv2", 2*c, 1, 3), **conv("conv3", c, c, 1), **conv("sca.1", c, c, 1),
            **conv("conv4", 2*c, c, 1), **conv("conv5", c, c, 1), f"{p}norm1.weight": (c,), f"{p}norm1.bias": (c,), f"{p}norm2.weight": (c,), f"{p}norm2.bias": (c,)}


def restormer_names(p, c, heads):
    h = int(c * 2.66)
    norm = lambda n: {f"{p}{n}.body.weight": (c,), f"{p}{n}.body.bias": (c,)}
    return {**norm("norm1"), f"{p}attn.temperature": (heads, 1, 1), f"{p}attn.qkv.weight": (3*c, c, 1, 1), f"{p}attn.qkv_dwconv.weight": (3*c, 1, 3, 3), f"{p}attn.project_out.weight": (c, c, 1, 1),
            **norm("norm2"), f"{p}ffn.project_in.weight": (2*h, c, 1, 1), f"{p}ffn.dwconv.weight": (2*h, 1, 3, 3), f"{p}ffn.project_out.weight": (c, h, 1, 1)}


def graph_names(d, block, counts, head, tail, act=False):
    "Order, names and shapes of section 3; `block(prefix, width, level)` lists one block."
    site = lambda s, k, level: {n: v for i in range(counts[s]) for n, v in block(f"Process_Module_{s}.{i}.", k * d, level).items()}
    names = dict(head)
    for k in (1, 2, 3): names |= site(f"l{k}", k, k - 1) | {f"DC{k}.down.0.weight": (k * d // 4, k * d, 3, 3)}
    names |= site("bottom", 4, 3) | {"local_fusion.weight": (3*d, 8*d, 1, 1)}
    for k, n, total, out in ((3, 3, 6, 4), (2, 4, 6, 3), (1, 3, 4, 2)):
        names |= {f"UC{k}.up.0.weight": (4*n*d, n*d, 3, 3), f"UC{k}.down.weight": (out*d, total*d, 1, 1)} | site(f"r{k}", out, k - 1)
    names |= tail | {"mlp.0.weight": (4*d, 128), "mlp.0.bias": (4*d,)}
    for k, c in ((2, 128), (1, 64), (0, 32)): names |= {f"AffineTransform{k}.0.weight": (d, c, 1, 1), **({f"AffineTransform{k}.1.weight": (d,)} if act else {})}
    return names


def test_names_order_and_shapes_of_nafnet():
    counts = dict(l1=7, l2=8, l3=9, bottom=9, r3=9, r2=8, r1=7)
    wanted = encoder_names() | graph_names(48, lambda p, c, level: naf_names(p, c), counts, {"Preprocess_Module.0.weight": (48, 3, 3, 3)}, {"Finetune_Module.0.weight": (3, 96, 3, 3)})
    with torch.device("meta"): found = shapes(ConStyleNAFNet())
    assert found == wanted and list(found) == list(wanted)


def test_names_order_and_shapes_of_restormer():
    counts = dict(l1=4, l2=6, l3=6, bottom=8, r3=6, r2=6, r1=4)
    tail = {k: v for i in range(4) for k, v in restormer_names(f"Finetune_Module.{i}.", 96, 1).items()} | {"Finetune_Module.4.weight": (3, 96, 3, 3)}
    wanted = encoder_names() | graph_names(48, lambda p, c, level: restormer_names(p, c, 2**level), counts, {"Preprocess_Module.proj.weight": (48, 3, 3, 3)}, tail, act=True)
    with torch.device("meta"): found = shapes(ConStyleRestormer())
    assert found == wanted and list(found) == list(wanted)


def test_names_of_plain_convolutions():
    block = lambda p, c, level: {f"{p[:-2]}{i}.weight": shape for i, shape in enumerate([(c, c, 3, 3), (c,)] * 2)}
    head = {"Preprocess_Module.0.weight": (48, 3, 3, 3), "Preprocess_Module.1.weight": (48,)}
    tail = {"Finetune_Module.0.weight": (48, 96, 3, 3), "Finetune_Module.1.weight": (48,), "Finetune_Module.2.weight": (3, 48, 3, 3), "Finetune_Module.3.weight": (3,)}
    wanted = encoder_names() | graph_names(48, block, dict.fromkeys(("l1", "l2", "l3", "bottom", "r3", "r2", "r1"), 1), head, tail, act=True)
    with torch.device("meta"): found = shapes(ConStyleConv())
    assert found == wanted and list(found) == list(wanted)


@pytest.mark.parametrize("cls", [ConStyleRestormer, ConStyleConv])
def test_slopes_of_the_adapters(cls):
    net = cls(dim=8, left=[1, 1, 1], bottom=1, right=[1, 1, 1], encoder=dict(width=2))
    assert all(isinstance(net.get_submodule(f"AffineTransform{k}")[1], nn.PReLU) and torch.equal(net.get_submodule(f"AffineTransform{k}")[1].weight, torch.full((8,), 0.25)) for k in range(3))
    act = small().AffineTransform1[1]
    assert isinstance(act, nn.LeakyReLU) and act.negative_slope == 0.1


# --- the graph written out

def conv(x, weight, bias=None, stride=1): return F.conv2d(x, weight, bias, stride=stride, padding=weight.shape[-1] // 2, groups=1)
def leaky(x, slope=0.1): return torch.where(x > 0, x, slope * x)
def gelu(x): return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def encode_by_parts(s: dict, x: torch.Tensor):
    "Section 2.1, in evaluation mode."
    for name, stride in (("stage1.0", 1), ("stage1.1", 1), ("stage1.2", 2)): x = leaky(conv(x, s[f"{name}.0.weight"], stride=stride))
    f0 = x
    for name, stride in (("stage2.0", 1), ("stage2.1", 2)): x = leaky(conv(x, s[f"{name}.0.weight"], stride=stride))
    f1 = x
    for name, stride in (("stage3.0", 1), ("stage3.1", 2)): x = leaky(conv(x, s[f"{name}.0.weight"], stride=stride))
    f2 = x
    for name, stride in (("stage4.0", 1), ("stage4.1", 2)): x = leaky(conv(x, s[f"{name}.0.weight"], stride=stride))
    codes, c = [], x.sum((2, 3)) / (x.shape[2] * x.shape[3])
    for k in ("mlp1", "mlp2"):
        c = c @ s[f"{k}.0.weight"].T + s[f"{k}.0.bias"]
        c = (c - s[f"{k}.1.running_mean"]) / (s[f"{k}.1.running_var"] + 1e-5).sqrt() * s[f"{k}.1.weight"] + s[f"{k}.1.bias"]
        c = gelu(c)
        codes.append(c)
    return codes, (f0, f1, f2)


def naf_block(s, x):
    norm = lambda x, n: ((x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-6).sqrt()) * s[f"{n}.weight"].view(1, -1, 1, 1) + s[f"{n}.bias"].view(1, -1, 1, 1)
    gate = lambda x: x[:, :x.shape[1] // 2] * x[:, x.shape[1] // 2:]
    one = lambda x, n: conv(x, s[f"{n}.weight"], s[f"{n}.bias"])
    u = F.conv2d(one(norm(x, "norm1"), "conv1"), s["conv2.weight"], s["conv2.bias"], padding=1, groups=s["conv2.weight"].shape[0])
    u = gate(u)
    u = u * one(u.mean((2, 3), keepdim=True), "sca.1")
    y = x + s["beta"] * one(u, "conv3")
    return y + s["gamma"] * one(gate(one(norm(y, "norm2"), "conv4")), "conv5")


def part(s, prefix): return {k[len(prefix):]: v for k, v in s.items() if k.startswith(prefix)}


def graph_by_parts(s, x, code, feats, process, head, tail, act):
    "Section 3: the sides of x are multiples of 8."
    adapt = lambda k: act(conv(feats[k], s[f"AffineTransform{k}.0.weight"]), k)
    down = lambda y, k: torch.cat([F.pixel_unshuffle(conv(y, s[f"DC{k}.down.0.weight"]), 2), adapt(k - 1)], 1)
    up = lambda y, skip, k: conv(torch.cat([F.pixel_shuffle(conv(y, s[f"UC{k}.up.0.weight"]), 2), skip], 1), s[f"UC{k}.down.weight"])
    g = (code @ s["mlp.0.weight"].T + s["mlp.0.bias"])[:, :, None, None]
    l1 = process("l1", head(x))
    l2 = process("l2", down(l1, 1))
    l3 = process("l3", down(l2, 2))
    b = process("bottom", down(l3, 3))
    b = conv(torch.cat([b, g * b], 1), s["local_fusion.weight"])
    y = process("r3", up(b, l3, 3))
    y = process("r2", up(y, l2, 2))
    y = process("r1", up(y, l1, 1))
    return tail(y) + x


@pytest.mark.parametrize("size", [(16, 24), (8, 8), (5, 7), (33, 18)])
def test_encoder_by_parts(size):
    net, x = small().ConStyle.encoder_q, image(*size)
    codes, feats = net(x)
    wanted = encode_by_parts(net.state_dict(), x)
    for found, other in zip((*codes, *feats), (*wanted[0], *wanted[1])): torch.testing.assert_close(found, other)
    up = lambda n, k: -(-n // k)
    assert [tuple(f.shape[-2:]) for f in feats] == [tuple(up(n, k) for n in size) for k in (2, 4, 8)] and [c.shape for c in codes] == [(2, 6)] * 2
    assert all(c.std(0).min() > 1e-6 for c in codes)


def test_nafnet_by_parts():
    net, x = small(), image(16, 24)
    s = net.state_dict()
    def process(site, y):
        for i in range(len(net.get_submodule(f"Process_Module_{site}"))): y = naf_block(part(s, f"Process_Module_{site}.{i}."), y)
        return y
    codes, feats = encode_by_parts(part(s, "ConStyle.encoder_q."), x)
    head, tail = (lambda x: conv(x, s["Preprocess_Module.0.weight"])), (lambda y: conv(y, s["Finetune_Module.0.weight"]))
    wanted = graph_by_parts(s, x, codes[1], feats, process, head, tail, lambda f, k: leaky(f))
    with torch.no_grad():
        torch.testing.assert_close(net(x), wanted)
        assert (net(x) - x).std() > 0.01


def test_restormer_by_parts():
    net, x = small(ConStyleRestormer), image(16, 24)
    s = net.state_dict()
    prelu = lambda f, slopes: torch.where(f > 0, f, slopes.view(1, -1, 1, 1) * f)
    codes, feats = encode_by_parts(part(s, "ConStyle.encoder_q."), x)
    process = lambda site, y: net.get_submodule(f"Process_Module_{site}")(y)                 # the block itself is tested in test_restormer.py
    tail = lambda y: conv(net.Finetune_Module[0](y), s["Finetune_Module.1.weight"])
    with torch.no_grad():
        wanted = graph_by_parts(s, x, codes[1], feats, process, lambda x: conv(x, s["Preprocess_Module.proj.weight"]), tail, lambda f, k: prelu(f, s[f"AffineTransform{k}.1.weight"]))
        torch.testing.assert_close(net(x), wanted)
    assert [net.get_submodule(f"Process_Module_{site}")[0].attn.num_heads for site in ("l1", "l2", "l3", "bottom", "r3", "r2", "r1")] == [1, 2, 2, 4, 2, 2, 1]
    assert net.Finetune_Module[0].attn.num_heads == 1


def test_heads_of_the_published_restormer():
    with torch.device("meta"): net = ConStyleRestormer()
    assert [net.get_submodule(f"Process_Module_{site}")[0].attn.num_heads for site in ("l1", "l2", "l3", "bottom", "r3", "r2", "r1")] == [1, 2, 4, 8, 4, 2, 1]


def test_plain_convolutions_by_parts():
    net, x = small(ConStyleConv), image(16, 8)
    s = net.state_dict()
    prelu = lambda f, name: torch.where(f > 0, f, s[name].view(1, -1, 1, 1) * f)
    layer = lambda y, p, i: prelu(conv(y, s[f"{p}.{2*i}.weight"]), f"{p}.{2*i + 1}.weight")
    def process(site, y):
        z = y
        for i in range(len(net.get_submodule(f"Process_Module_{site}")) // 2): z = layer(z, f"Process_Module_{site}", i)
        return y + z
    assert [len(net.get_submodule(f"Process_Module_{site}")) for site in ("l1", "l2", "r3")] == [4, 8, 8]
    codes, feats = encode_by_parts(part(s, "ConStyle.encoder_q."), x)
    tail = lambda y: layer(layer(y, "Finetune_Module", 0), "Finetune_Module", 1)
    wanted = graph_by_parts(s, x, codes[1], feats, process, lambda x: layer(x, "Preprocess_Module", 0), tail, lambda f, k: prelu(f, f"AffineTransform{k}.1.weight"))
    with torch.no_grad(): torch.testing.assert_close(net(x), wanted)


# --- any factory of blocks

class Site(nn.Module):
    def __init__(self, width, level, seen):
        super().__init__()
        self.level = level
        self.seen = seen
        seen.append((width, level))
    def forward(self, x):
        self.seen.append((x.shape[1], x.shape[-1]))
        return x


def test_factories_get_widths_and_levels_and_blocks_get_them():
    seen = []
    net = GeneralRestorationNet(lambda width, level: Site(width, level, seen), dim=8, left=(1, 2, 1), bottom=2, right=(1, 1, 2), encoder=dict(width=2))
    sites = [(8, 0), (16, 1), (16, 1), (24, 2), (32, 3), (32, 3), (32, 2), (24, 1), (16, 0), (16, 0)]
    assert seen == sites
    seen.clear()
    net.eval()(torch.rand(1, 3, 20, 30))
    assert seen == [(width, 32 // 2**level) for width, level in sites]
    seen.clear()
    bare = GeneralRestorationNet(lambda width, level: Site(width, level, seen), dim=8, left=(1, 2, 1), bottom=2, right=(1, 1, 2), conditioned=False)
    bare(torch.rand(1, 3, 20, 30))
    assert seen == sites + [(width, 32 // 2**level) for width, level in sites]


def test_own_head_and_tail():
    head, tail = nn.Conv2d(1, 4, 1), nn.Sequential(nn.Conv2d(8, 1, 5, padding=2), nn.Tanh())
    net = GeneralRestorationNet(lambda width, level: nn.Identity(), dim=4, channels=1, head=head, tail=tail, encoder=dict(width=1, code_dim=3))
    assert net.Preprocess_Module is head and net.Finetune_Module is tail and net.eval()(torch.rand(2, 1, 9, 9)).shape == (2, 1, 9, 9)
    assert (net(torch.rand(2, 1, 9, 9)) - torch.rand(2, 1, 9, 9)).abs().max() < 2.1
    empty = nn.Sequential()
    assert GeneralRestorationNet(lambda width, level: nn.Identity(), dim=4, channels=4, head=empty, encoder=dict(width=1)).Preprocess_Module is empty


# --- sizes

@pytest.mark.parametrize("cls", FAMILIES)
@pytest.mark.parametrize("size", [(8, 16), (1, 1), (9, 2), (15, 17), (24, 31)])
def test_any_size(cls, size):
    net, x = small(cls), image(*size)
    with torch.no_grad():
        y = net(x)
        assert y.shape == x.shape and y.isfinite().all() and torch.equal(net.restore(x, net.encode(x)), y) and torch.equal(net(x, net.encode(x)), y)


def test_multiples_of_eight_are_not_padded():
    net, x = small(), image(8, 24)
    with torch.no_grad(): torch.testing.assert_close(net(x), net._graph(x, net.ConStyle.encoder_q(x)), rtol=0, atol=0)


def test_the_encoder_sees_the_padded_image():
    net, x = small(), image(13, 4)
    padded = F.pad(F.pad(x, (0, 0, 0, 3), mode="reflect"), (0, 4, 0, 0), mode="replicate")   # four columns cannot be reflected into eight
    with torch.no_grad():
        torch.testing.assert_close(net(x), net(padded)[..., :13, :4])
        for found, wanted in zip(net.encode(x).feats, net.ConStyle.encoder_q(padded).feats): torch.testing.assert_close(found, wanted)
        assert not torch.allclose(net.encode(x).codes[1], net.ConStyle.encoder_q(x).codes[1])
        for found, wanted in zip(net.encode(image(13, 11)).feats, net.ConStyle.encoder_q(F.pad(image(13, 11), (0, 5, 0, 3), mode="reflect")).feats): torch.testing.assert_close(found, wanted)


def test_padding_by_repetition_can_be_chosen():
    net = GeneralRestorationNet(lambda width, level: nn.Identity(), dim=4, encoder=dict(width=1), pad_mode="replicate").double().eval()
    x = image(13, 11)
    torch.testing.assert_close(net(x), net(F.pad(x, (0, 5, 0, 3), mode="replicate"))[..., :13, :11])


def test_the_result_is_cropped_not_squeezed():
    net, x = small(), image(13, 11)
    with torch.no_grad(): assert torch.equal(net(x), net._graph(net._padded(x), net.encode(x))[..., :13, :11])


# --- evaluation, training, precision

@pytest.mark.parametrize("cls", FAMILIES)
def test_batches_are_independent_in_evaluation(cls):
    net, x = small(cls), image(9, 16, batch=3)
    with torch.no_grad(): torch.testing.assert_close(net(x), torch.cat([net(i[None]) for i in x]))
    assert torch.equal(net(x), net(x))


def test_training_uses_the_batch_and_moves_the_statistics_only():
    net = small().train()
    before = copy.deepcopy(net.state_dict())
    net(image(16, 16))
    moved = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {f"ConStyle.encoder_q.mlp{k}.1.{n}" for k in (1, 2) for n in ("running_mean", "running_var", "num_batches_tracked")}


@pytest.mark.parametrize("cls", FAMILIES)
def test_everything_learns_from_the_picture_alone(cls):
    "Nothing is detached: L1 reaches code 2 and so code 1, all maps, and every other weight."
    net = small(cls).train()
    net(image(16, 16)).square().mean().backward()
    cancelled = {f"ConStyle.encoder_q.mlp{k}.0.bias" for k in (1, 2)}   # BatchNorm follows: their gradient is 0 but for rounding
    assert cancelled <= set(dict(net.named_parameters()))
    assert [n for n, p in net.named_parameters() if p.grad is None or n not in cancelled and not p.grad.abs().sum() > 0] == []


def test_a_detached_description_leaves_the_encoder_alone():
    net, x = small().train(), image(16, 16)
    net.restore(x, net.encode(x).detach()).square().mean().backward()
    told = {n for n, p in net.named_parameters() if p.grad is None}
    assert told == {n for n, _ in net.named_parameters() if n.startswith("ConStyle.")}
    cond = net.encode(x).detach()
    assert isinstance(cond, Conditioning) and not any(t.requires_grad for t in (*cond.codes, *cond.feats)) and len(cond.feats) == 3


def test_the_second_code_is_the_one_that_enters():
    net, x = small(), image(16, 16)
    with torch.no_grad():
        cond, y = net.encode(x), net(x)
        assert torch.equal(net.restore(x, cond._replace(codes=(cond.codes[0] + 1, cond.codes[1]))), y)
        assert not torch.allclose(net.restore(x, cond._replace(codes=(cond.codes[0], cond.codes[1] + 1))), y)
        for k in range(3):
            feats = tuple(f + 1 if i == k else f for i, f in enumerate(cond.feats))
            assert not torch.allclose(net.restore(x, cond._replace(feats=feats)), y), k
        one = net.restore(x, cond._replace(codes=(cond.codes[0], cond.codes[1][:1])))                # one code for all, as for tiles
        torch.testing.assert_close(one[:1], y[:1])


@pytest.mark.parametrize("cls", FAMILIES)
@pytest.mark.parametrize("init", ["torch", "kaiming"])
def test_black_and_white_are_finite(cls, init):
    for value in (0.0, 1.0):
        torch.manual_seed(0)
        net = cls(dim=8, left=[1, 1, 1], bottom=1, right=[1, 1, 1], encoder=dict(width=2, code_dim=8, init=init))
        y = net(torch.full((2, 3, 16, 16), value))
        (y - 0.3).abs().mean().backward()
        assert y.isfinite().all() and all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
        assert net.eval()(torch.full((1, 3, 9, 9), value)).isfinite().all()


@pytest.mark.parametrize("cls", FAMILIES)
def test_bf16_autocast(cls):
    torch.manual_seed(0)
    net, x = build(cls.__name__, preset="tiny").eval(), torch.rand(2, 3, 16, 24)
    with torch.autocast("cpu", torch.bfloat16): y = net(x)
    y.float().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    with torch.no_grad(): assert (y.float() - net(x)).abs().max() < 0.05


@pytest.mark.parametrize("cls", FAMILIES)
def test_copies(cls):
    net, x = build(cls.__name__, preset="tiny").eval(), torch.rand(1, 3, 9, 8)
    for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))): assert torch.equal(again(x), net(x))


def test_an_average_with_its_buffers_is_the_network_itself():
    "Decay 0: the evaluated copy keeps the trained statistics, which the published one lost."
    from torch.optim.swa_utils import AveragedModel
    net = small().train()
    average = AveragedModel(net, avg_fn=lambda mean, new, n: new, use_buffers=True)
    net(image(16, 16))
    average.update_parameters(net)
    with torch.no_grad(): assert torch.equal(average.module.eval()(image(9, 9)), net.eval()(image(9, 9)))


# --- controls

@pytest.mark.parametrize("cls", FAMILIES)
def test_the_control_without_an_encoder_keeps_every_other_shape(cls):
    told, bare = shapes(small(cls)), shapes(small(cls, conditioned=False))
    changed = {"DC1.down.0.weight": (2, 4, 3, 3), "DC2.down.0.weight": (3, 8, 3, 3), "DC3.down.0.weight": (4, 12, 3, 3), "local_fusion.weight": (12, 16, 1, 1)}
    gone = ("ConStyle.", "mlp.", "AffineTransform")
    assert bare == {k: changed.get(k, v) for k, v in told.items() if not k.startswith(gone)}
    net, x = small(cls, conditioned=False), image(13, 10)
    with torch.no_grad(): assert net(x).shape == x.shape
    assert not net.conditioned and small(cls).conditioned
    net(image(16, 16)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_use_of_one_path():
    x, both = image(16, 16), small()
    only = {use: small(use=use) for use in (("features",), ("code",), ())}
    with torch.no_grad():
        cond = both.encode(x)
        for use, net in only.items():
            net.load_state_dict(both.state_dict())
            assert shapes(net) == shapes(both) and not torch.allclose(net(x), both(x))
            other = cond._replace(codes=tuple(c + 1 for c in cond.codes)), cond._replace(feats=tuple(f + 1 for f in cond.feats))
            assert torch.equal(net.restore(x, other[0]), net(x)) == ("code" not in use)
            assert torch.equal(net.restore(x, other[1]), net(x)) == ("features" not in use)
        # g = 1: the same as a code layer that always says one; no maps: the same as adapters of zeros
        silent = copy.deepcopy(both)
        silent.mlp[0].weight.zero_(), silent.mlp[0].bias.fill_(1)
        torch.testing.assert_close(silent(x), only[("features",)](x))
        for k in range(3): silent.get_submodule(f"AffineTransform{k}")[0].weight.zero_()
        torch.testing.assert_close(silent(x), only[()](x))
        deaf = copy.deepcopy(both)
        for k in range(3): deaf.get_submodule(f"AffineTransform{k}")[0].weight.zero_()
        torch.testing.assert_close(deaf(x), only[("code",)](x))
    assert set(ConStyleNAFNet(**SMALL, use=["code", "features"]).use) == {"features", "code"}


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
def test_normalisations_of_the_codes(norm):
    net = ConStyleEncoder(width=2, code_dim=6, norm=norm)
    kinds = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "none": nn.Identity}
    assert type(net.mlp1[1]) is type(net.mlp2[1]) is kinds[norm] and net.mlp1[2].approximate == "none"
    if norm == "batch":
        with pytest.raises(ValueError, match="batch.*norm='layer'"): net(torch.rand(1, 3, 16, 16))
    else:
        x = torch.rand(3, 3, 16, 16)
        for found, alone in zip(net(x).codes, net(x[:1]).codes): torch.testing.assert_close(found[:1], alone)
    assert net.eval()(torch.rand(1, 3, 16, 16)).codes[0].shape == (1, 6)


def test_initialisations_of_the_encoder():
    torch.manual_seed(0)
    plain, strong = ConStyleEncoder(), ConStyleEncoder(init="kaiming")
    x = torch.rand(4, 3, 64, 64)
    size = lambda net: float(net.stage4(net(x).feats[2]).square().mean())
    with torch.no_grad(): assert size(plain) < 1e-4 * size(strong) and 0.01 < size(strong) < 100
    assert all(m.bias.abs().sum() == 0 for m in strong.modules() if isinstance(m, nn.Linear))
    for slope, gain in ((0.1, 2 / 1.01), (1.0, 1.0)):
        w = ConStyleEncoder(slope=slope, init="kaiming").stage4[1][0].weight.detach()
        assert float(w.std()) == pytest.approx((gain / (256 * 9))**0.5, rel=0.01)


def test_slope_and_width_of_the_encoder():
    net = ConStyleEncoder(width=3, slope=0.3)
    assert {m.negative_slope for m in net.modules() if isinstance(m, nn.LeakyReLU)} == {0.3} and net.channels == (6, 12, 24) and shapes(net) == encoder_names("", 3)
    assert [m.shape[1] for m in net(torch.rand(2, 3, 16, 16)).feats] == [6, 12, 24]


# --- tiles

def test_tiles_with_the_code_of_the_whole_picture():
    net, x = small().float(), image(192, 176, batch=1).float()
    radius, multiple = receptive_radius(net), net.ConStyle.encoder_q.multiple
    overlap = -(-2 * radius // multiple) * multiple
    with torch.no_grad():
        whole = net(x)
        pieces = {s: tiled(net, x, tile=144, overlap=overlap, margin=radius, multiple=multiple, statistics=s) for s in ("image", "tile")}
    torch.testing.assert_close(pieces["image"], whole, atol=1e-4 * float(whole.std()), rtol=0)
    assert multiple == 16 and overlap < 144 and (pieces["tile"] - whole).abs().max() > 1e-3 * whole.std()
    with pytest.raises(ValueError, match="tiled: .*multiple"), torch.no_grad(): tiled(net, x[..., :170], tile=136, overlap=overlap, margin=radius, multiple=8)


# --- options from weights, files

OPTIONS = [dict(), dict(conditioned=False), dict(channels=1), dict(encoder=dict(width=3, code_dim=5, norm="layer")), dict(encoder=dict(width=3, code_dim=5, norm="none")),
           dict(left=[2, 1, 3], bottom=11, right=[3, 1, 2]), dict(dim=8)]


@pytest.mark.parametrize("cls", FAMILIES)
@pytest.mark.parametrize("options", OPTIONS)
def test_options_are_read_off_a_state_dict(cls, options):
    options = {k: v for k, v in {**SMALL, **options}.items() if not (k == "encoder" and options.get("conditioned") is False)}
    if cls is ConStyleRestormer: options = {**options, "heads": [2, 2, 2, 4], "num_refinement_blocks": 3, "LayerNorm_type": "BiasFree"}
    with torch.device("meta"): net = cls(**options)
    found = cls.options_from_state_dict(net.state_dict())
    with torch.device("meta"): assert shapes(cls(**found)) == shapes(net)
    for key, value in options.items():
        if key == "encoder": assert {**found[key], **value} == found[key]
        else: assert found[key] == value


@pytest.mark.parametrize("cls", FAMILIES)
def test_options_of_the_presets(cls):
    for preset in cls.PRESETS:
        with torch.device("meta"): net = build(cls.__name__, preset=preset)
        found = cls.options_from_state_dict(net.state_dict())
        with torch.device("meta"): assert shapes(cls(**found)) == shapes(net)


def test_foreign_weights_are_not_recognised():
    states = {name: build(name, preset="tiny").state_dict() for name in ("NAFNet", "Restormer", "UNet", "SwinIR", *(c.__name__ for c in FAMILIES))}
    for cls in FAMILIES:
        for name, state in states.items():
            if name == cls.__name__: continue
            with pytest.raises(ValueError, match=f"{cls.__name__}: the weights"): cls.options_from_state_dict(state)
    cousin = {**states["ConStyleNAFNet"], "Process_Module_l1.0.attgamma": torch.zeros(1, 8, 1, 1)}
    with pytest.raises(ValueError, match="ConStyleNAFNet: .*blocks"): ConStyleNAFNet.options_from_state_dict(cousin)
    with pytest.raises(ValueError, match="ConStyleEncoder: .*stage1.0.0"): ConStyleEncoder.options_from_state_dict(states["NAFNet"])
    headless = {k: v for k, v in states["ConStyleRestormer"].items() if not k.startswith("Process_Module_bottom")}
    with pytest.raises(ValueError, match="ConStyleRestormer: .*level.*heads"): ConStyleRestormer.options_from_state_dict(headless)


@pytest.mark.parametrize("cls", FAMILIES)
def test_files_there_and_back(cls, tmp_path):
    net, x = small(cls).float(), torch.rand(1, 3, 9, 10)
    torch.save({"params": net.state_dict()}, tmp_path / "public.pth")
    again, spec = load_model(tmp_path / "public.pth")
    assert spec["network"]["name"] == cls.__name__ and torch.equal(again(x), net(x))
    save_model(tmp_path / "ours.safetensors", net, {"network": {"name": cls.__name__, "options": spec["network"]["options"]}})
    assert torch.equal(load_model(tmp_path / "ours.safetensors")[0](x), net(x))


def test_what_only_training_needs_is_left_out(tmp_path):
    "Published training checkpoints hold the queue and the momentum encoder."
    net, x = small().float(), torch.rand(1, 3, 9, 10)
    state = {"ConStyle.queue": torch.randn(6, 50), "ConStyle.queue_ptr": torch.zeros(1, dtype=torch.int64), **net.state_dict()}
    state |= {k.replace("encoder_q", "encoder_k"): v for k, v in net.state_dict().items() if "encoder_q" in k}
    torch.save({"params_ema": state}, tmp_path / "trained.pth")
    other = ConStyleNAFNet(**ConStyleNAFNet.options_from_state_dict(state)).eval()
    report = load_weights(other, tmp_path / "trained.pth")
    assert torch.equal(other(x), net(x)) and "ConStyle.queue" in report.skipped and len(report.loaded) == len(net.state_dict())


def test_a_checkpoint_of_another_family_is_refused(tmp_path):
    torch.save({"params": small(ConStyleConv).float().state_dict()}, tmp_path / "conv.pth")
    net = small().float()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="conv.pth.*build..ConStyleConv"): load_weights(net, tmp_path / "conv.pth")
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


# --- export

def shallow(cls) -> nn.Module:
    "As many kinds of operations as in the paper's network, few of each: exporting takes time for every one."
    extra = dict(num_refinement_blocks=0, heads=[1, 2, 2, 4]) if cls is ConStyleRestormer else {}
    return awake(cls(dim=4, left=[1, 0, 0], bottom=1, right=[0, 0, 1], encoder=dict(width=2, code_dim=6), **extra), 0.2).eval()


@pytest.mark.parametrize("cls", FAMILIES)
def test_export_agrees(cls):
    net, x = shallow(cls), torch.rand(1, 3, 13, 22)
    with torch.no_grad(): torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), net(x))


@pytest.mark.parametrize("cls", [ConStyleNAFNet, ConStyleRestormer])
def test_export_with_free_sides(cls):
    net, side = shallow(cls), lambda name: 8 * torch.export.Dim(name, min=3, max=500)
    program = torch.export.export(net, (torch.rand(1, 3, 32, 40),), dynamic_shapes=({2: side("h"), 3: side("w")},)).module()
    with torch.no_grad():
        for size in ((24, 24), (56, 32)):
            x = torch.rand(1, 3, *size)
            torch.testing.assert_close(program(x), net(x))


def run_onnx(path, x):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize("cls", [ConStyleNAFNet, ConStyleRestormer])
def test_onnx_runtime_agrees(cls, tmp_path):
    for package in ("onnx", "onnxruntime", "onnxscript"): pytest.importorskip(package)
    net, x = awake(build(cls.__name__, preset="tiny"), 0.1).eval(), torch.rand(1, 3, 29, 18)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (x,), dynamo=True, verbose=False).save(tmp_path / "net.onnx")
    with torch.no_grad(): torch.testing.assert_close(run_onnx(tmp_path / "net.onnx", x), net(x), atol=1e-5, rtol=1e-4)


def test_onnx_runtime_with_free_sides(tmp_path):
    for package in ("onnx", "onnxruntime", "onnxscript"): pytest.importorskip(package)
    net, side = shallow(ConStyleNAFNet), lambda name: 8 * torch.export.Dim(name, min=3, max=500)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (torch.rand(1, 3, 32, 40),), dynamo=True, verbose=False, dynamic_shapes=({2: side("h"), 3: side("w")},)).save(tmp_path / "net.onnx")
    for size in ((24, 24), (56, 32)):
        x = torch.rand(1, 3, *size)
        with torch.no_grad(): torch.testing.assert_close(run_onnx(tmp_path / "net.onnx", x), net(x), atol=1e-5, rtol=1e-4)


# --- bad input

@pytest.mark.parametrize("options, message", [
    (dict(dim=6), ": dim .* 6$"), (dict(dim=0), ": dim .* 0$"), (dict(left=[1, 1]), r"left.*\[1, 1\]"),
    (dict(right=[1, 1, 1, 1]), r"right.*\[1, 1, 1, 1\]"), (dict(bottom=-1), "counts.* -1,"), (dict(left=[1, -1, 1]), r"left.*\[1, -1, 1\]"),
    (dict(use="code"), ": use .* 'code'$"), (dict(use=["codes"]), ": use .*'codes'"), (dict(encoder=dict(width=0)), "ConStyleEncoder: .*width"),
    (dict(encoder=dict(norm="group")), "norm .*'group'"), (dict(encoder=dict(init="xavier")), "init .*'xavier'"),
    (dict(encoder=dict(slope=2.0)), "slope .* 2.0"), (dict(encoder=dict(code_dim=0)), "ConStyleEncoder: .*code_dim")])
@pytest.mark.parametrize("cls", FAMILIES)
def test_bad_options(cls, options, message):
    with pytest.raises(ValueError, match=message): cls(**{**SMALL, **options, **(dict(heads=[1, 1, 1, 1]) if cls is ConStyleRestormer else {})})


def test_bad_options_of_one_family():
    for heads in ([1, 2, 4], [1, 2, 4, 0], [1, 3, 4, 8], [16, 2, 4, 8]):
        with pytest.raises(ValueError, match="ConStyleRestormer: heads"): ConStyleRestormer(dim=8, heads=heads)
    with pytest.raises(ValueError, match="adapter_act .*'relu'"): GeneralRestorationNet(lambda w, l: nn.Identity(), adapter_act="relu")


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (1, 4, 8, 8), (3, 8, 8)])
@pytest.mark.parametrize("conditioned", [True, False])
def test_bad_images(shape, conditioned):
    with pytest.raises(ValueError, match=r"ConStyleNAFNet: .*\(B, 3, H, W\)"): small(conditioned=conditioned)(torch.rand(shape))


def test_descriptions_of_another_size_and_of_nothing():
    net, bare = small(), small(conditioned=False)
    with pytest.raises(ValueError, match=r"feature map.*\(8, 12\).*\(12, 8\)"): net.restore(image(16, 24), net.encode(image(24, 16)))
    with pytest.raises(ValueError, match="conditioned=False.*encoder"): bare.encode(image(8, 8))
    with pytest.raises(ValueError, match="conditioned=False"): bare.restore(image(8, 8), net.encode(image(8, 8)))
    with pytest.raises(ValueError, match="conditioned=False"): bare(image(8, 8), net.encode(image(8, 8)))


@pytest.mark.parametrize("cls", FAMILIES)
def test_a_batch_of_one_in_training(cls):
    with pytest.raises(ValueError, match="batch.*norm='layer'.*eval"): small(cls).train()(image(8, 8, batch=1))
    assert small(cls, encoder=dict(width=2, norm="layer")).train()(image(8, 8, batch=1)).shape == (1, 3, 8, 8)
    assert small(cls, conditioned=False).train()(image(8, 8, batch=1)).shape == (1, 3, 8, 8)
