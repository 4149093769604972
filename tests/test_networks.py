"""Networks: names, counts, shapes, slow references, model files and everything that must be refused."""
import copy, json, os, pickle, struct, subprocess, sys
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
import irnb.networks as networks
from irnb.networks import (ModelError, NAFNet, UNet, build, count_parameters, load_model, local_pooling, receptive_radius, save_model)
from irnb.networks.nafnet import LocalAverage, NAFBlock

TINY = NAFNet.PRESETS["tiny"]
SPEC = {"network": {"name": "NAFNet", "options": {"preset": "tiny"}}}


def awake(net: nn.Module, seed: int = 0) -> nn.Module:
    "The network with every parameter random, so that no block is the identity."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters(): p.copy_(0.3 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return net


# --- counts, names, shapes

@pytest.mark.parametrize("options, count", [
    (NAFNet.PRESETS["sidd32"], 29_159_715), (NAFNet.PRESETS["sidd64"], 115_982_915),
    (NAFNet.PRESETS["gopro32"], 17_111_907), (NAFNet.PRESETS["gopro64"], 67_888_835),
    (dict(width=64, enc_blk_nums=[5, 6, 7, 7], middle_blk_num=7, dec_blk_nums=[5, 6, 7, 7]), 87_404_483), (TINY, 73_331)])
def test_nafnet_counts(options, count):
    with torch.device("meta"): assert count_parameters(NAFNet(**options)) == count


@pytest.mark.parametrize("c", [1, 3, 16, 50])
def test_block_count(c): assert count_parameters(NAFBlock(c)) == 7 * c * c + 33 * c


def test_unet_counts():
    with torch.device("meta"):
        assert count_parameters(UNet()) == count_parameters(build("UNet", preset="noise_da")) == 8_559_171
        assert count_parameters(build("UNet", preset="tiny")) == 130_259


def block_names(prefix: str, c: int) -> list[tuple[str, tuple]]:
    "Names and shapes of one block in the published order."
    shapes = {"beta": (1, c, 1, 1), "gamma": (1, c, 1, 1)}
    for name, shape in [("conv1", (2*c, c, 1, 1)), ("conv2", (2*c, 1, 3, 3)), ("conv3", (c, c, 1, 1)), ("sca.1", (c, c, 1, 1)),
                        ("conv4", (2*c, c, 1, 1)), ("conv5", (c, c, 1, 1)), ("norm1", (c,)), ("norm2", (c,))]:
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return [(prefix + name, shape) for name, shape in shapes.items()]


def test_nafnet_state_dict_is_the_published_one():
    w, enc, mid, dec = 4, [1, 2], 3, [2, 1]
    expected = [("intro.weight", (w, 3, 3, 3)), ("intro.bias", (w,)), ("ending.weight", (3, w, 3, 3)), ("ending.bias", (3,))]
    for level, count in enumerate(enc):
        for i in range(count): expected += block_names(f"encoders.{level}.{i}.", w * 2**level)
    for level, count in enumerate(dec):
        for i in range(count): expected += block_names(f"decoders.{level}.{i}.", w * 2**(1 - level))
    for i in range(mid): expected += block_names(f"middle_blks.{i}.", 4 * w)
    expected += [("ups.0.0.weight", (8*w, 4*w, 1, 1)), ("ups.1.0.weight", (4*w, 2*w, 1, 1))]
    for level in (0, 1):
        c = w * 2**level
        expected += [(f"downs.{level}.weight", (2*c, c, 2, 2)), (f"downs.{level}.bias", (2*c,))]
    net = NAFNet(3, w, mid, enc, dec)
    assert [(name, tuple(v.shape)) for name, v in net.state_dict().items()] == expected


@given(width=st.integers(1, 6), middle=st.integers(0, 3), counts=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2)), max_size=3),
       channels=st.sampled_from([1, 3, 4]))
@settings(max_examples=25, deadline=None)
def test_options_are_read_off_a_state_dict(width, middle, counts, channels):
    options = dict(img_channel=channels, width=width, middle_blk_num=middle, enc_blk_nums=[e for e, _ in counts], dec_blk_nums=[d for _, d in counts])
    with torch.device("meta"): assert NAFNet.options_from_state_dict(NAFNet(**options).state_dict()) == options


# --- values

def slow_norm(x, weight, bias):
    "LayerNorm over channels, pixel by pixel."
    out = torch.empty_like(x)
    for b in range(x.shape[0]):
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                v = x[b, :, i, j]
                out[b, :, i, j] = (v - v.mean()) / torch.sqrt(((v - v.mean())**2).mean() + 1e-6) * weight + bias
    return out


def slow_dense(x, conv):
    "A 1x1 convolution, pixel by pixel."
    out = torch.empty(x.shape[0], conv.out_channels, *x.shape[2:], dtype=x.dtype)
    for i in range(x.shape[2]):
        for j in range(x.shape[3]): out[:, :, i, j] = x[:, :, i, j] @ conv.weight[:, :, 0, 0].T + conv.bias
    return out


def slow_depthwise(x, conv):
    "A depth-wise 3x3 convolution with zero padding, tap by tap."
    b, c, h, w = x.shape
    out = torch.zeros_like(x) + conv.bias.view(1, -1, 1, 1)
    for k in range(c):
        for i in range(h):
            for j in range(w):
                for di in (-1, 0, 1):
                    for dj in (-1, 0, 1):
                        if 0 <= i + di < h and 0 <= j + dj < w: out[:, k, i, j] += x[:, k, i + di, j + dj] * conv.weight[k, 0, di + 1, dj + 1]
    return out


@torch.no_grad()
def test_block_and_norm_equal_a_slow_reference():
    f, x = awake(NAFBlock(4).double()), torch.randn(2, 4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(f.norm1(x), slow_norm(x, f.norm1.weight, f.norm1.bias), rtol=0, atol=1e-12)
    u = slow_depthwise(slow_dense(slow_norm(x, f.norm1.weight, f.norm1.bias), f.conv1), f.conv2)
    u = u[:, :4] * u[:, 4:]
    u = u * slow_dense(u.sum((2, 3), keepdim=True) / 30, f.sca[1])
    y = x + f.beta * slow_dense(u, f.conv3)
    v = slow_dense(slow_norm(y, f.norm2.weight, f.norm2.bias), f.conv4)
    torch.testing.assert_close(f(x), y + f.gamma * slow_dense(v[:, :4] * v[:, 4:], f.conv5), rtol=0, atol=1e-10)


@torch.no_grad()
def test_graph_of_nafnet_by_hand():
    "Zero padding, skips by addition, global residual, crop: one level without blocks, written out."
    net = awake(NAFNet(1, 2, 0, [0], [0]).double())
    x = torch.rand(1, 1, 5, 7, dtype=torch.float64)
    p = F.pad(x, (0, 1, 0, 1))
    h = net.intro(p)
    up = F.pixel_shuffle(F.conv2d(F.conv2d(h, net.downs[0].weight, net.downs[0].bias, stride=2), net.ups[0][0].weight), 2)
    torch.testing.assert_close(net(x), (net.ending(up + h) + p)[..., :5, :7], rtol=0, atol=1e-12)


@torch.no_grad()
def test_graph_of_unet_by_hand():
    net = awake(UNet(1, 1, width=2, depth=2).double())
    x = torch.rand(1, 1, 5, 6, dtype=torch.float64)
    p = torch.cat([x, x[:, :, -1:]], 2)
    act = lambda t: torch.where(t > 0, t, 0.2 * t)
    double = lambda block, t: act(block[2](act(block[0](t))))
    a = double(net.downs[0], p)
    pooled = (a[..., ::2, ::2] + a[..., 1::2, ::2] + a[..., ::2, 1::2] + a[..., 1::2, 1::2]) / 4
    u = F.interpolate(double(net.downs[1], pooled), scale_factor=2, mode="bilinear", align_corners=True)
    out = net.last(double(net.ups[0].block, torch.cat([net.ups[0].up[1](u), a], 1)))
    torch.testing.assert_close(net(x), (out + p)[:, :, :5], rtol=0, atol=1e-12)
    net.residual = False
    torch.testing.assert_close(net(x), out[:, :, :5], rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 3), (17, 30)])
@pytest.mark.parametrize("make", [lambda: NAFNet(**TINY), lambda: NAFNet(1, 4, 1, [1, 1, 1], [1, 1, 1]), lambda: UNet(width=4),
                                  lambda: UNet(1, 1, width=4, depth=1), lambda: UNet(4, 3, width=4, residual=False, align_corners=False)])
def test_any_size_and_gradients_reach_everything(make, size):
    net = awake(make())
    channels = getattr(net, "img_channel", None) or net.downs[0][0].in_channels
    out = net(torch.rand(2, channels, *size))
    assert out.shape[0] == 2 and out.shape[2:] == size and out.isfinite().all()
    if min(size) > 4:
        out.square().mean().backward()
        assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_fresh_nafnet_maps_through_its_blocks_unchanged():
    block, x = NAFBlock(6), torch.randn(1, 6, 4, 4)
    assert torch.equal(block(x), x)
    net = NAFNet(**TINY)
    with torch.no_grad(): net.ending.weight.zero_(), net.ending.bias.zero_()
    assert torch.equal(net(torch.ones(1, 3, 6, 6)), torch.ones(1, 3, 6, 6))


def test_export_trace_and_pickle():
    net, x = awake(NAFNet(**TINY)).eval(), torch.rand(1, 3, 20, 28)
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), net(x))
    torch.testing.assert_close(torch.jit.trace(net, x)(x), net(x))
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), copy.deepcopy(net)(x))
    with torch.autocast("cpu", torch.bfloat16): assert net(x).isfinite().all()


@pytest.mark.parametrize("options, message", [
    (dict(enc_blk_nums=[1]), "enc_blk_nums"), (dict(width=0), "width"), (dict(middle_blk_num=-1), "counts.*-1"), (dict(img_channel=0), "img_channel")])
def test_nafnet_refuses(options, message):
    with pytest.raises(ValueError, match=message): NAFNet(**options)


@pytest.mark.parametrize("options, message", [(dict(in_channels=4), "residual=False"), (dict(depth=0), "depth")])
def test_unet_refuses(options, message):
    with pytest.raises(ValueError, match=message): UNet(**options)


# --- test-time local conversion

def slow_local(x, kh, kw):
    "Sliding means over complete windows, repeated at the border."
    h, w = x.shape[-2:]
    kh, kw = min(kh, h), min(kw, w)
    valid = torch.stack([torch.stack([x[..., i:i + kh, j:j + kw].mean((-2, -1)) for j in range(w - kw + 1)], -1) for i in range(h - kh + 1)], -2)
    rows = torch.tensor([min(max(i - (kh - 1) // 2, 0), h - kh) for i in range(h)])
    columns = torch.tensor([min(max(j - (kw - 1) // 2, 0), w - kw) for j in range(w)])
    return valid[..., rows, :][..., columns]


@given(h=st.integers(1, 14), w=st.integers(1, 14), kh=st.integers(1, 16), kw=st.integers(1, 16))
@settings(max_examples=40, deadline=None)
def test_local_average_equals_a_slow_loop(h, w, kh, kw):
    x = torch.rand(2, 3, h, w, dtype=torch.float64, generator=torch.Generator().manual_seed(h * w))
    got = LocalAverage((kh, kw))(x)
    if kh >= h and kw >= w: assert got.shape == (2, 3, 1, 1)
    torch.testing.assert_close(got.expand_as(x), slow_local(x, kh, kw), rtol=0, atol=1e-12)


def test_local_average_in_half_precision_keeps_its_digits():
    x = 1000 + torch.rand(1, 1, 200, 300, dtype=torch.float64)
    assert (LocalAverage((50, 60))(x.bfloat16()).double() - slow_local(x.bfloat16().double(), 50, 60)).abs().max() <= 4   # half a step of bfloat16 at 1000


def test_local_pooling_windows_and_weights():
    net = awake(NAFNet(3, 2, 1, [1, 1, 1, 1], [1, 1, 1, 1]))
    before, local = copy.deepcopy(net.state_dict()), local_pooling(net, 256)
    windows = {name: m.window for name, m in local.named_modules() if isinstance(m, LocalAverage)}
    assert {windows[f"encoders.{i}.0.sca.0"] for i in range(4)} == {(384, 384), (192, 192), (96, 96), (48, 48)}
    assert windows["middle_blks.0.sca.0"] == (24, 24) and windows["decoders.3.0.sca.0"] == (384, 384)
    assert not any(isinstance(m, LocalAverage) for m in net.modules()) and list(local.state_dict()) == list(before)
    assert all(torch.equal(local.state_dict()[k], v) and torch.equal(net.state_dict()[k], v) for k, v in before.items())
    x = torch.rand(1, 3, 64, 96)
    assert torch.equal(local(x), net(x))                                     # every window covers its map
    narrow = local_pooling(net, (32, 64))
    assert narrow.encoders[0][0].sca[0].window == (48, 96) and not torch.allclose(narrow(x), net(x))
    narrow.load_state_dict(net.state_dict())


def test_local_pooling_refuses():
    with pytest.raises(ValueError, match="UNet.*AdaptiveAvgPool2d"): local_pooling(UNet(width=2), 64)
    with pytest.raises(ValueError, match="train_size"): local_pooling(NAFNet(**TINY), 0)


# --- receptive radius

@pytest.mark.parametrize("layers, multiple, radius", [
    ([nn.Conv2d(1, 1, 3, padding=1)] * 4, 1, 4), ([nn.Conv2d(1, 1, (1, 7), padding=(0, 3))], 1, 3), ([nn.Conv2d(1, 1, (5, 1), padding=(2, 0))], 8, 2),
    ([nn.Conv2d(1, 1, 3, padding=4, dilation=4)], 1, 4), ([nn.Identity()], 8, 0),
    ([nn.AvgPool2d(4), nn.Conv2d(1, 1, 3, padding=1), nn.Upsample(scale_factor=4)], 4, 4),
    ([nn.Conv2d(1, 1, 201, padding=100)], 8, 100)])
def test_radius_of_known_stacks(layers, multiple, radius): assert receptive_radius(nn.Sequential(*layers), multiple, channels=1) == radius


def test_radius_of_nafnet_is_the_sum_of_its_levels_and_is_enough():
    with torch.random.fork_rng():
        torch.manual_seed(0)                                                     # the farthest influence is small; it must not be lost in rounding
        net = awake(NAFNet(3, 4, 2, [1, 2], [1, 3]).double()).eval()
    radius = receptive_radius(net)
    half = -(-(1 + 1) // 2) + 2                                              # intro and one block, then two at half size
    quarter = -(-half // 2) + 2                                              # rounded up to whole coarse pixels
    assert radius == 2 * (2 * quarter + 1) + 3 + 1                           # and up again: one block, three, ending
    for m in net.modules():
        if isinstance(m, nn.AdaptiveAvgPool2d): m.register_forward_hook(lambda m, i, o: torch.ones_like(o))
    x = torch.rand(1, 3, 96, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    net(x)[..., 40:44, 40:44].sum().backward()                               # a gradient is nonzero however small the influence is
    changed = (x.grad != 0)[0].any(0).any(0).nonzero().flatten()
    assert 40 - int(changed[0]) == radius or int(changed[-1]) - 43 == radius
    assert 40 - int(changed[0]) <= radius and int(changed[-1]) - 43 <= radius


def test_radius_leaves_the_network_alone_and_reports_the_unbounded():
    class Mean(nn.Module):
        def forward(self, x): return x - x.mean((2, 3), keepdim=True)
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)).train()
    before = copy.deepcopy(net.state_dict())
    assert receptive_radius(net, 1) == 1 and net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    with pytest.raises(ValueError, match="Mean.*100"): receptive_radius(Mean(), largest=100)


# --- rooms

@pytest.fixture
def package(tmp_path, monkeypatch):
    "A package with a room; `add(file, source)` furnishes it."
    name, folder = f"room_{tmp_path.name.replace('-', '_')}", None
    folder = tmp_path/name
    folder.mkdir()
    (folder/"__init__.py").write_text("from irnb.networks import room\nHERE = 1\n__getattr__, __dir__ = room(__name__)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    module = __import__(name)
    def add(file, source):
        (folder/f"{file}.py").write_text(source)
        __import__("importlib").invalidate_caches()
    return module, add


def test_room_is_lazy_and_needs_no_registry(package):
    module, add = package
    add("one", "__all__ = ['One']\nclass One: pass\nclass Hidden: pass\n")
    add("broken", "__all__ = ['Two']\nraise RuntimeError('imported')\n")
    add("plain", "import os\ndef three(): return 3\n_private = 4\n")
    names = dir(module)
    assert {"One", "Two", "three", "HERE"} <= set(names) and not {"Hidden", "_private", "os"} & set(names)
    assert f"{module.__name__}.one" not in sys.modules
    assert module.One.__module__ == f"{module.__name__}.one" and module.three() == 3
    assert f"{module.__name__}.broken" not in sys.modules
    with pytest.raises(RuntimeError, match="imported"): module.Two
    add("later", "__all__ = ['Later']\nLater = 5\n")
    assert module.Later == 5 and module.later.Later == 5


def test_room_refuses_unknown_and_ambiguous_names(package):
    module, add = package
    with pytest.raises(AttributeError, match="'One'.*nothing"): module.One
    add("a", "__all__ = ['Same']\nSame = 1\n"), add("b", "__all__ = ['Same', 'Other']\nSame = 2\nOther = 3\n")
    with pytest.raises(AttributeError, match="'Nothing'.*Other, Same"): module.Nothing
    with pytest.raises(AttributeError, match="Same.* a and b"): module.Same
    with pytest.raises(AttributeError): module.__wrapped__
    with pytest.raises(ImportError): exec(f"from {module.__name__} import Nothing")


def test_importing_the_room_imports_no_network():
    code = ("import sys, irnb.networks; assert 'irnb.networks.nafnet' not in sys.modules; from irnb.networks import UNet; "
            "assert 'irnb.networks.nafnet' not in sys.modules and not {'matplotlib', 'irnb.strategies', 'safetensors', 'skimage'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)


# --- build

def test_build(tmp_path):
    assert networks.networks() == sorted(networks.networks()) and {"NAFNet", "UNet"} <= set(networks.networks())
    assert "LayerNorm2d" not in networks.networks()
    net = build("NAFNet", preset="tiny", width=8)
    assert net.intro.out_channels == 8 and len(net.encoders) == 2
    assert isinstance(build("torch.nn.Conv2d", in_channels=1, out_channels=2, kernel_size=3), nn.Conv2d)


@pytest.mark.parametrize("name, options, message", [
    ("Nafnet", {}, "'Nafnet'.*NAFNet"), ("no.such.Net", {}, "'no.such.Net'"), ("torch.nn.Nothing", {}, "'torch.nn.Nothing'"),
    ("gate", {}, "'gate'.*Module"), ("os.system", {}, "'os.system'.*Module"), ("NAFNet", dict(preset="big"), "preset 'big'.*tiny"),
    ("NAFNet", dict(depth=2), "option 'depth'.*img_channel, width"), ("torch.nn.ReLU", dict(preset="x"), "preset 'x'.*none")])
def test_build_refuses(name, options, message):
    with pytest.raises(ValueError, match=message): build(name, **options)


# --- model files

def test_round_trip_and_equal_bytes(tmp_path):
    net = awake(build("NAFNet", preset="tiny"))
    save_model(tmp_path/"a.safetensors", net, {**SPEC, "seed": 3, "note": "naïve"})
    save_model(tmp_path/"new"/"b", net.to(memory_format=torch.channels_last), {"note": "naïve", "seed": 3, **SPEC})
    content = (tmp_path/"a.safetensors").read_bytes()
    assert content == (tmp_path/"new"/"b").read_bytes()
    header = json.loads(content[8:8 + struct.unpack("<Q", content[:8])[0]])
    assert list(header["__metadata__"]) == ["irnb"]
    state = torch.random.get_rng_state()
    again, spec = load_model(tmp_path/"a.safetensors")
    assert torch.equal(state, torch.random.get_rng_state())
    assert not again.training and all(torch.equal(v, net.state_dict()[k]) for k, v in again.state_dict().items())
    assert spec == {"network": {"name": "NAFNet", "options": TINY}, "seed": 3, "note": "naïve"}     # the preset is spelt out
    save_model(tmp_path/"c", again, spec)
    assert (tmp_path/"c").read_bytes() == content
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.safetensors", "b", "c", "new"]


class Doubled(nn.Module):
    "What the strategy below ships: twice the network's answer, and a weight of its own."
    def __init__(self, net, gain):
        super().__init__()
        self.net, self.gain = net, nn.Parameter(torch.tensor(float(gain)))

    def forward(self, x): return self.gain * self.net(x)


class Doubling:
    "A stand-in for a strategy."
    @classmethod
    def restorer_for(cls, net, gain=2): return Doubled(net, gain)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    "This module under an importable name."
    monkeypatch.setitem(sys.modules, "a_strategy", sys.modules[__name__])


def test_a_strategy_ships_its_own_module(tmp_path, installed):
    shipped = Doubling.restorer_for(awake(build("NAFNet", preset="tiny")), 3)
    spec = {**SPEC, "strategy": {"name": "doubling", "class": "a_strategy.Doubling", "options": {"gain": 5}}}
    save_model(tmp_path/"m", shipped, spec)
    with pytest.raises(ModelError, match="m: .*a_strategy.Doubling.*trust=True.*--trust"): load_model(tmp_path/"m")
    again, read = load_model(tmp_path/"m", trust=True)
    x = torch.rand(1, 3, 9, 9)
    assert isinstance(again, Doubled) and again.gain.item() == 3 and torch.equal(again(x), shipped(x)) and read["strategy"] == spec["strategy"]


def written(path, net=None, spec=SPEC, change=lambda tensors: tensors, metadata=None):
    "A safetensors file that `save_model` would not write."
    from safetensors.torch import save_file
    net = net or build("NAFNet", preset="tiny")
    save_file(change(dict(net.state_dict())), str(path), metadata={"irnb": json.dumps(spec)} if metadata is None else metadata)
    return path


def drop(key): return lambda tensors: {k: v for k, v in tensors.items() if k != key}
def put(key, value): return lambda tensors: {**tensors, key: value}


@pytest.mark.parametrize("make, message", [
    (lambda p: p, "cannot be read.*path"),
    (lambda p: p.mkdir() or p, "cannot be read"),
    (lambda p: p.write_bytes(b"") and p or p, "b''"),
    (lambda p: p.write_text("hello, world") and p, "b'hello, w'"),
    (lambda p: p.write_bytes(written(p).read_bytes()[:-10]) and p, "truncated"),
    (lambda p: p.write_bytes(written(p).read_bytes()[:100]) and p, "truncated"),
    (lambda p: p.write_bytes(struct.pack("<Q", 2**40) + b'{"') and p, "truncated"),
    (lambda p: written(p, metadata={}), "'irnb'"),
    (lambda p: written(p, metadata={"irnb": "{not json"}), "'irnb'.*not json"),
    (lambda p: written(p, metadata={"irnb": "[1]"}), r"'irnb'.*\[1\]"),
    (lambda p: written(p, spec={"network": "NAFNet"}), "no network.*'NAFNet'"),
    (lambda p: written(p, spec={}), "no network.*None"),
    (lambda p: written(p, spec={"network": {"name": "Nothing", "options": {}}}), "network 'Nothing'"),
    (lambda p: written(p, spec={"network": {"name": "NAFNet", "options": {"depth": 3}}}), "option 'depth'"),
    (lambda p: written(p, spec={"network": {"name": "NAFNet", "options": {"width": "wide"}}}), "'width'.*'wide'"),
    (lambda p: written(p, spec={"network": {"name": "UNet", "options": {"preset": "tiny"}}}), "'downs.0.0.weight'.*missing.*UNet"),
    (lambda p: written(p, spec={"network": {"name": "NAFNet", "options": {**TINY, "width": 8}}}), r"'intro.weight'.*\(16, .*\(8, "),
    (lambda p: written(p, change=drop("middle_blks.0.beta")), "'middle_blks.0.beta'.*missing"),
    (lambda p: written(p, change=put("extra", torch.zeros(1))), "'extra'"),
    (lambda p: written(p, change=put("intro.bias", torch.full((16,), float("nan")))), "'intro.bias'.*finite"),
    (lambda p: written(p, spec={**SPEC, "strategy": "supervised"}), "strategy.*'supervised'"),
    (lambda p: written(p, spec={**SPEC, "strategy": {"class": "no_such_package.Strategy"}}), "'no_such_package.Strategy'.*install"),
    (lambda p: written(p, spec={**SPEC, "strategy": {"class": "os.system"}}), "'os.system'.*restorer_for"),
    (lambda p: written(p, spec={**SPEC, "strategy": {"class": "a_strategy.Doubling", "options": {"loss": 1}}}), "built .*'loss'"),
])
def test_bad_model_files_are_refused(tmp_path, installed, make, message):
    path = make(tmp_path/"model.safetensors")
    foreign = any(name in message for name in ("no_such_package", "os.system", "'loss'"))
    with pytest.raises(ModelError, match=message) as caught: load_model(path, trust=foreign)
    assert str(path) in str(caught.value) and isinstance(caught.value, ValueError)
    if foreign:
        with pytest.raises(ModelError, match="trust=True.*--trust"): load_model(path)


# --- what a file may claim

@pytest.mark.parametrize("dotted", ["payload.Net", "payload.sub.Net", "os.system", "builtins.eval", "torch.nn.Linear", "tests.nets.Batches", "irnb_more.Net"])
@pytest.mark.parametrize("as_strategy", [False, True])
def test_no_foreign_module_is_imported(tmp_path, monkeypatch, dotted, as_strategy):
    (tmp_path/"payload.py").write_text("open('the payload has run', 'w')\nclass Net: pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = {**SPEC, "strategy": {"class": dotted}} if as_strategy else {"network": {"name": dotted, "options": {}}}
    with pytest.raises(ModelError, match=f"model: .*'{dotted}'.*trust=True"): load_model(written(tmp_path/"model", spec=spec))
    assert not (tmp_path/"the payload has run").exists() and "payload" not in sys.modules
    if dotted == "payload.Net":                                                        # the remedy does what it says
        with pytest.raises(ModelError): load_model(tmp_path/"model", trust=True)
        assert (tmp_path/"the payload has run").exists() and sys.modules.pop("payload")


@pytest.mark.parametrize("dotted", ["irnb.images.os.system", "irnb.networks.os", "irnb.networks.rrdb.F", "irnb.networks.checkpoints.Path", "irnb.networks.json.loads", "irnb..os", "irnb.", "irnb", ".", "irnb.networks.rrdb.nn.Linear",
                                    "irnb.networks.__loader__", "irnb.pipeline.main", "irnb.networks.\x00", "irnb.data.Path"])
@pytest.mark.parametrize("as_strategy", [False, True])
def test_dotted_tricks_are_refused(tmp_path, dotted, as_strategy):
    spec = {**SPEC, "strategy": {"class": dotted}} if as_strategy else {"network": {"name": dotted, "options": {}}}
    with pytest.raises(ModelError, match="model: "): load_model(written(tmp_path/"model", spec=spec))


@pytest.mark.parametrize("as_strategy", [False, True])
def test_a_class_that_irnb_merely_imported_is_foreign(tmp_path, monkeypatch, as_strategy):
    import irnb.networks.rrdb
    monkeypatch.setattr(irnb.networks.rrdb, "Linear", torch.nn.Linear, raising=False)
    spec = {**SPEC, "strategy": {"class": "irnb.networks.rrdb.Linear"}} if as_strategy else {"network": {"name": "irnb.networks.rrdb.Linear", "options": {"in_features": 2, "out_features": 2}}}
    with pytest.raises(ModelError, match="trust=True"): load_model(written(tmp_path/"model", torch.nn.Linear(2, 2), spec))


@pytest.mark.parametrize("options, message", [
    ({"middle_blk_num": 10**6}, "1000000.*65536"), ({"middle_blk_num": 60_000}, "layers.*100 tensors"), ({"enc_blk_nums": [50_000], "dec_blk_nums": [1]}, "layers.*100 tensors"),
    ({"width": 65_536}, r"'intro.weight'.*\(16, .*\(65536, "), ({"width": -10**30}, "NAFNet.*65536"), ({"width": 10**4000}, "NAFNet.*65536"), ({"width": "16"}, "'width'.*int.*'16'"),
    ({"width": 16.0}, "'width'.*int.*16.0"), ({"width": True}, "'width'.*int.*True"), ({"enc_blk_nums": [[[10**9]]]}, "NAFNet.*65536"), ({"width": None}, "'width'.*int.*None"), ([1], "cannot be built"), ("x", "cannot be built"), (None, "cannot be built")])
def test_options_are_bounded_before_anything_is_built(tmp_path, options, message):
    spec = {"network": {"name": "NAFNet", "options": {**TINY, **options} if isinstance(options, dict) else options}}
    with pytest.raises(ModelError, match=message): load_model(written(tmp_path/"model", spec=spec))


def test_wide_layers_are_compared_before_they_are_allocated(tmp_path, monkeypatch):
    "Nothing is built but on the meta device: a real build of this width would take hundreds of gigabytes."
    devices, before = set(), NAFNet.__init__
    def built(self, *a, **k):
        before(self, *a, **k)
        devices.update(p.device.type for p in self.parameters())
    path = written(tmp_path/"model", spec={"network": {"name": "NAFNet", "options": {**TINY, "width": 60_000}}})
    monkeypatch.setattr(NAFNet, "__init__", built)
    with pytest.raises(ModelError, match="'intro.weight'.*60000"): load_model(path)
    assert devices == {"meta"}


def test_the_limits_leave_no_trace(tmp_path):
    "After a rehearsal, finished or stopped, networks are built as before."
    from irnb.networks import _bounded
    with pytest.raises(ValueError, match="layers"), _bounded(1): NAFNet(middle_blk_num=500)
    net = NAFNet(**{**TINY, "middle_blk_num": 40})
    assert {p.device.type for p in net.parameters()} == {"cpu"}


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64, torch.uint8, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("key", ["intro.bias", "middle_blks.0.beta"])
def test_another_kind_of_number_is_refused(tmp_path, dtype, key):
    "Bytes read as another kind would restore a picture all the same."
    path = written(tmp_path/"model", change=lambda t: {**t, key: torch.ones_like(t[key]).to(dtype)})
    with pytest.raises(ModelError, match=f"'{key}'.*torch.float32"): load_model(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_precision_is_a_fraction(tmp_path, dtype):
    net = awake(build("NAFNet", preset="tiny"))
    loaded = load_model(written(tmp_path/"model", net, change=lambda t: {k: v.to(dtype) for k, v in t.items()}))[0]
    assert all(v.dtype == torch.float32 and torch.equal(v, net.state_dict()[k].to(dtype).float()) for k, v in loaded.state_dict().items())
    save_model(tmp_path/"b", net.to(dtype), SPEC)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in load_model(tmp_path/"b")[0].state_dict().items())


def test_a_fraction_that_the_network_cannot_hold(tmp_path):
    path = written(tmp_path/"model", change=lambda t: {**t, "intro.bias": torch.full((16,), 1e300, dtype=torch.float64)})
    with pytest.raises(ModelError, match="'intro.bias'.*finite"): load_model(path)


class Counting(nn.Module):
    "A network with a counter."
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x): return self.norm(x)


def test_counters_are_whole(tmp_path, installed):
    spec = {"network": {"name": "a_strategy.Counting", "options": {}}}
    assert load_model(written(tmp_path/"m", Counting(), spec), trust=True)[0].norm.num_batches_tracked == 0
    with pytest.raises(ModelError, match="num_batches_tracked'.*int64"):
        load_model(written(tmp_path/"m", Counting(), spec, lambda t: {**t, "norm.num_batches_tracked": torch.tensor(0.5)}), trust=True)


def header_of(path):
    "The header of a safetensors file."
    content = path.read_bytes()
    return json.loads(content[8:8 + struct.unpack("<Q", content[:8])[0]])


def test_every_flipped_bit_is_noticed(tmp_path):
    "In a weight, a name, an option, the checksum itself: refused, or the same network."
    net = awake(build("NAFNet", width=2, enc_blk_nums=[1], middle_blk_num=0, dec_blk_nums=[0]))
    spec = {"network": {"name": "NAFNet", "options": dict(width=2, enc_blk_nums=[1], middle_blk_num=0, dec_blk_nums=[0])}, "note": "a"}
    save_model(tmp_path/"m", net, spec)
    content, wanted = (tmp_path/"m").read_bytes(), load_model(tmp_path/"m")[1]
    for at in range(0, len(content), 17):
        damaged = bytearray(content); damaged[at] ^= 1 << at % 8
        (tmp_path/"n").write_bytes(damaged)
        try: again, read = load_model(tmp_path/"n")
        except ModelError as error: assert str(tmp_path/"n") in str(error); continue
        assert all(torch.equal(v, net.state_dict()[k]) for k, v in again.state_dict().items()) and {k: v for k, v in read.items() if "sha" not in k} == wanted, at
    weight = bytearray(content); weight[-5] ^= 1
    (tmp_path/"n").write_bytes(weight)
    with pytest.raises(ModelError, match="n: .*SHA-256"): load_model(tmp_path/"n")


def test_the_checksum_is_in_the_one_entry_and_does_not_depend_on_order(tmp_path):
    net = awake(build("NAFNet", preset="tiny"))
    save_model(tmp_path/"m", net, {**SPEC, "content_sha256": "of something else"})
    text = header_of(tmp_path/"m")["__metadata__"]
    spec = json.loads(text["irnb"])
    assert list(text) == ["irnb"] and len(spec.pop("content_sha256")) == 64 and load_model(tmp_path/"m")[1] == spec
    from safetensors.torch import save_file
    save_file(dict(reversed(net.state_dict().items())), str(tmp_path/"n"), metadata=text)
    assert load_model(tmp_path/"n")[1] == spec
    save_file({**net.state_dict(), "intro.bias": net.intro.bias + 1e-3}, str(tmp_path/"n"), metadata=text)
    with pytest.raises(ModelError, match="SHA-256"): load_model(tmp_path/"n")
    written(tmp_path/"old", net)                                                       # without a checksum: as before
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in load_model(tmp_path/"old")[0].state_dict().items())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path/"m")
    with pytest.raises(ModelError, match="m: .*regular file"): load_model(tmp_path/"m")


def test_every_network_and_every_shipped_module_can_be_rehearsed(tmp_path):
    from irnb.networks import networks
    for name in networks():
        spec = {"network": {"name": name, "options": {"preset": "tiny"}}}
        save_model(tmp_path/"m", awake(build(name, preset="tiny")), spec)
        assert load_model(tmp_path/"m")[1]["network"]["name"] == name


@pytest.mark.parametrize("net, spec, message", [
    (None, {}, "'network'"), (None, {"network": {"name": "NAFNet", "options": {"size": 1}}}, "option 'size'"),
    (None, {**SPEC, "when": object()}, "object .*JSON"), (None, {**SPEC, "psnr": float("nan")}, "float .*JSON"),
    (lambda: build("UNet", preset="tiny"), SPEC, "'intro.weight'.*missing"),
    (lambda: NAFNet(**{**TINY, "width": 8}), SPEC, "'intro.weight'.*shape")])
def test_save_refuses_what_could_not_be_loaded(tmp_path, net, spec, message):
    with pytest.raises(ModelError, match=message): save_model(tmp_path/"m", net() if net else NAFNet(**TINY), spec)
    assert list(tmp_path.iterdir()) == []


def test_save_refuses_weights_that_are_not_finite(tmp_path):
    net = NAFNet(**TINY)
    with torch.no_grad(): net.middle_blks[0].gamma[0, 2] = float("inf")
    with pytest.raises(ModelError, match="'middle_blks.0.gamma'.*finite"): save_model(tmp_path/"m", net, SPEC)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    net, path = NAFNet(**TINY), tmp_path/"m"
    save_model(path, net, SPEC)
    before = path.read_bytes()
    def full(descriptor):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ValueError, match="m: .*No space left.*free"): save_model(path, awake(net), SPEC)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["m"]


# --- public checkpoints

@pytest.mark.parametrize("wrap", [lambda state: {"params": state}, lambda state: state, lambda state: {"params": state, "epoch": 3}])
def test_public_checkpoint(tmp_path, wrap):
    net = awake(NAFNet(1, 6, 2, [1, 11], [2, 0]))
    torch.save(wrap(net.state_dict()), tmp_path/"public.pth")
    again, spec = load_model(tmp_path/"public.pth")
    x = torch.rand(1, 1, 9, 10)
    assert torch.equal(again(x), net(x)) and spec["network"]["options"]["enc_blk_nums"] == [1, 11] and spec["source"] == "public.pth"
    save_model(tmp_path/"ours", again, spec)
    assert torch.equal(load_model(tmp_path/"ours")[0](x), net(x))


def test_a_training_checkpoint_is_told_and_stripped(tmp_path):
    "A published file of another family, with the training's queue and key encoder inside: the network alone is rebuilt."
    net = awake(build("ConStyleNAFNet", preset="tiny").eval())
    state = net.state_dict()
    extra = {"ConStyle.queue": torch.randn(32, 7), "ConStyle.queue_ptr": torch.zeros(1)} | {k.replace("encoder_q", "encoder_k"): v + 1 for k, v in state.items() if "encoder_q" in k}
    torch.save({"params_ema": {**extra, **state}}, tmp_path/"constyle.pth")
    again, spec = load_model(tmp_path/"constyle.pth")
    x = torch.rand(1, 3, 24, 19)
    assert spec["network"]["name"] == "ConStyleNAFNet" and list(again.state_dict()) == list(state) and torch.equal(again(x), net(x))


class Malicious:
    "Unpickling this makes a file."
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)


@pytest.mark.parametrize("store", [lambda content, path: torch.save(content, path), lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2)),
                                   lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False)])
def test_pickled_code_is_refused_unrun(tmp_path, store):
    proof, path = tmp_path/"the code has run", tmp_path/"public.pth"
    store({"params": NAFNet(**TINY).state_dict(), "surprise": Malicious(proof)}, path)
    with pytest.raises(ModelError, match=": refused.*safetensors"): load_model(path)
    assert not proof.exists()


@pytest.mark.parametrize("content, message", [
    ({"params": {"conv.weight": torch.zeros(3)}}, "unknown network.*NAFNet"), ({"params": {}}, "no tensors.*params"), ([torch.zeros(2)], "no named.*list"),
    (torch.zeros(3), "no named.*Tensor"), ({"params": {"a": 3}}, "no tensors.*params"), ({"epoch": 3}, "no tensors.*epoch"),
    ({"params": drop("norm")({k: v for k, v in NAFNet(**TINY).state_dict().items() if "middle_blks.0.norm1" not in k})}, "2 of 100.*missing.*'middle_blks.0.norm1.weight'"),
    ({"params": put("intro.bias", torch.full((16,), float("inf")))(NAFNet(**TINY).state_dict())}, "'intro.bias'.*finite")])
def test_bad_checkpoints_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path/"c.pth")
    with pytest.raises(ModelError, match=message): load_model(tmp_path/"c.pth")


@pytest.mark.parametrize("keep", [5000, 30])
def test_truncated_checkpoint(tmp_path, keep):
    torch.save(NAFNet(**TINY).state_dict(), tmp_path/"c.pth")
    (tmp_path/"c.pth").write_bytes((tmp_path/"c.pth").read_bytes()[:keep])
    with pytest.raises(ModelError, match=": truncated"): load_model(tmp_path/"c.pth")


def test_any_network_becomes_a_super_resolver(tmp_path):
    from irnb.networks import UpscaleFirst
    spec = {"network": {"name": "NAFNet", "options": {**TINY, "upscale": 2}}, "scale": 2}
    net = build("NAFNet", **spec["network"]["options"])
    assert isinstance(net, UpscaleFirst) and net.scale == 2
    x = torch.rand(1, 3, 7, 9)
    assert net(x).shape == (1, 3, 14, 18)
    save_model(tmp_path / "m.safetensors", net, spec)
    again, read = load_model(tmp_path / "m.safetensors")
    assert read["scale"] == 2 and torch.equal(again(x), net.eval()(x))
    for bad in (0, -1, 1.5, "2"):
        with pytest.raises(ValueError, match="upscale"): build("NAFNet", **TINY, upscale=bad)
