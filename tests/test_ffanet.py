"""FFANet: counts and names, attention in closed form, a slow reference, the published normalisation, and what must be refused."""
import copy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from irnb.networks import FFANet, build, count_parameters, load_model, local_pooling, networks, receptive_radius, save_model
from irnb.networks.ffanet import HAZE_MEAN, HAZE_STD, ChannelAttention, FFABlock, FFAGroup, PixelAttention
from tests.nets import awake

F64 = torch.float64


def zeroed(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in net.parameters(): p.zero_()
    return net


# --- counts and names

@pytest.mark.parametrize("blocks, count", [(19, 4_455_913), (2, 606_382)])
def test_published_counts(blocks, count):
    with torch.device("meta"): assert count_parameters(FFANet(gps=3, blocks=blocks)) == count
    assert "FFANet" in networks() and FFANet.PRESETS["published"] == dict(gps=3, blocks=19, dim=64) and "tiny" in FFANet.PRESETS


def named(pairs):
    "Names and shapes from (name, out, in, kernel)."
    return [x for name, o, i, k in pairs for x in ((f"{name}.weight", (o, i, k, k)), (f"{name}.bias", (o,)))]


@pytest.mark.parametrize("blocks", [0, 1, 11])
def test_state_dict_is_the_published_one(blocks):
    pairs = [("pre.0", 64, 3, 3)]
    for g in (1, 2, 3):
        for b in range(blocks):
            p = f"g{g}.gp.{b}"
            pairs += [(f"{p}.conv1", 64, 64, 3), (f"{p}.conv2", 64, 64, 3), (f"{p}.calayer.ca.0", 8, 64, 1), (f"{p}.calayer.ca.2", 64, 8, 1),
                      (f"{p}.palayer.pa.0", 8, 64, 1), (f"{p}.palayer.pa.2", 1, 8, 1)]
        pairs += [(f"g{g}.gp.{blocks}", 64, 64, 3)]
    pairs += [("ca.1", 4, 192, 1), ("ca.3", 192, 4, 1), ("palayer.pa.0", 8, 64, 1), ("palayer.pa.2", 1, 8, 1), ("post.0", 64, 64, 3), ("post.1", 3, 64, 3)]
    with torch.device("meta"): net = FFANet(3, blocks)
    assert [(k, tuple(v.shape)) for k, v in net.state_dict().items()] == named(pairs)


@given(gps=st.integers(1, 4), blocks=st.integers(0, 11), dim=st.sampled_from([16, 32]), channels=st.sampled_from([1, 3]))
@settings(max_examples=20, deadline=None)
def test_options_are_read_off_a_state_dict(gps, blocks, dim, channels):
    options = dict(gps=gps, blocks=blocks, dim=dim, channels=channels)
    with torch.device("meta"): state = FFANet(**options).state_dict()
    surprise = {"g1.la.gamma": torch.zeros(1), "g2.last.weight": torch.zeros(3), "g9.la.gamma": torch.zeros(1)}
    assert FFANet.options_from_state_dict(state) == FFANet.options_from_state_dict({**state, **surprise}) == options


def test_other_networks_are_not_recognised():
    for name in ("NAFNet", "UNet", "RRDB", "EDSR"):
        with pytest.raises(ValueError, match="FFANet: .*'pre.0.weight'"):
            FFANet.options_from_state_dict(build(name, preset="tiny").state_dict())


# --- values

def dense(x, conv):
    "A 1x1 convolution, pixel by pixel."
    return torch.einsum("oi,bihw->bohw", conv.weight[:, :, 0, 0], x) + conv.bias.view(1, -1, 1, 1)


def conv3(x, conv):
    "A 3x3 convolution with zero padding, as a sum of nine shifted products."
    p, (h, w) = F.pad(x, (1, 1, 1, 1)), x.shape[-2:]
    return conv.bias.view(1, -1, 1, 1) + sum(torch.einsum("oi,bihw->bohw", conv.weight[:, :, i, j], p[..., i:i + h, j:j + w]) for i in range(3) for j in range(3))


def squeeze(x, first, second): return 1 / (1 + torch.exp(-dense(dense(x, first).clamp(min=0), second)))
def channel(x, layer): return x * squeeze(x.sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3]), layer.ca[0], layer.ca[2])
def pixel(x, layer): return x * squeeze(x, layer.pa[0], layer.pa[2])


@torch.no_grad()
@pytest.mark.parametrize("size", [(4, 5), (1, 1)])
def test_equals_a_slow_reference(size):
    net = awake(FFANet(3, 2, 16).double())
    x = torch.rand(2, 3, *size, dtype=F64)
    n = (x - torch.tensor(HAZE_MEAN).double().view(1, 3, 1, 1)) / torch.tensor(HAZE_STD).double().view(1, 3, 1, 1)
    r, found = conv3(n, net.pre[0]), []
    for group in (net.g1, net.g2, net.g3):
        start = r
        for block in group.gp[:-1]:
            u = conv3(r, block.conv1).clamp(min=0) + r
            r = r + pixel(channel(conv3(u, block.conv2), block.calayer), block.palayer)
        r = start + conv3(r, group.gp[-1])
        found.append(r)
    w = squeeze(torch.cat(found, 1).mean((2, 3), keepdim=True), net.ca[1], net.ca[3])
    z = sum(w[:, 16*k:16*k + 16] * r for k, r in enumerate(found))
    expected = conv3(conv3(pixel(z, net.palayer), net.post[0]), net.post[1]) + n
    torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_channel_attention_closed_form():
    "Second layer reads only its bias: each channel is multiplied by the sigmoid of it; first layer's bias negative: the ReLU shuts."
    layer, x = zeroed(ChannelAttention(16).double()), torch.randn(2, 16, 3, 4, dtype=F64)
    torch.testing.assert_close(layer(x), x / 2)
    layer.ca[2].bias.copy_(torch.linspace(-3, 3, 16))
    torch.testing.assert_close(layer(x), x * torch.sigmoid(torch.linspace(-3, 3, 16).double()).view(1, -1, 1, 1))
    layer.ca[0].bias.fill_(-1); layer.ca[2].weight.fill_(7)
    torch.testing.assert_close(layer(x), x * torch.sigmoid(torch.linspace(-3, 3, 16).double()).view(1, -1, 1, 1))


@torch.no_grad()
def test_channel_attention_sees_means_only():
    layer, x = awake(ChannelAttention(16).double(), 1.0), torch.randn(1, 16, 6, 4, dtype=F64)
    order = torch.randperm(24)
    shuffled = x.flatten(2)[:, :, order].view_as(x)
    torch.testing.assert_close(layer(shuffled), layer(x).flatten(2)[:, :, order].view_as(x))
    ratio = (layer(x) / x).flatten(2)
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio))


@torch.no_grad()
def test_pixel_attention_is_one_map_and_local():
    layer, x = awake(PixelAttention(16).double(), 1.0), torch.randn(2, 16, 5, 4, dtype=F64)
    ratio = layer(x) / x
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    assert ratio.std() > 0.01
    other = x.clone(); other[..., 2, 3] += 1
    changed = (layer(other) != layer(x)).any(1)
    assert changed[:, 2, 3].all() and changed.sum() == 2


@torch.no_grad()
def test_zero_weights_return_the_normalised_input():
    net, x = zeroed(FFANet(3, 1, 16)), torch.rand(2, 3, 4, 5)
    mean, std = torch.tensor([.64, .60, .58]).view(1, 3, 1, 1), torch.tensor([.14, .15, .152]).view(1, 3, 1, 1)
    torch.testing.assert_close(net(x), (x - mean) / std)
    plain = zeroed(FFANet(3, 1, 16, normalise=False))
    assert torch.equal(plain(x), x)


@torch.no_grad()
def test_normalising_outside_is_the_same():
    net = awake(FFANet(3, 1, 16))
    outside = FFANet(3, 1, 16, normalise=False)
    outside.load_state_dict(net.state_dict())
    x = torch.rand(1, 3, 6, 7)
    torch.testing.assert_close(outside((x - net.mean) / net.std), net(x))


@torch.no_grad()
@pytest.mark.parametrize("k", [0, 1, 2])
def test_fusion_weights_go_to_their_own_group(k):
    "With the fusion's biases at +-100 only group k's feature passes."
    net = awake(FFANet(3, 1, 16).double())
    net.ca[3].weight.zero_()
    net.ca[3].bias.copy_(torch.tensor([100.0 if i // 16 == k else -100.0 for i in range(48)]))
    x = torch.rand(1, 3, 5, 5, dtype=F64)
    n = (x - net.mean) / net.std
    r = net.pre(n)
    for group in (net.g1, net.g2, net.g3)[:k + 1]: r = group(r)
    torch.testing.assert_close(net(x), net.post(net.palayer(r)) + n)


@torch.no_grad()
def test_block_and_group_shortcuts():
    x = torch.randn(1, 16, 4, 4)
    assert torch.equal(zeroed(FFABlock(16))(x), x) and torch.equal(zeroed(FFAGroup(16, 2))(x), x)
    group = zeroed(FFAGroup(16, 0)); group.gp[0].bias.fill_(1)
    assert torch.equal(group(x), x + 1)


@torch.no_grad()
def test_no_activation_in_the_tail():
    net = zeroed(FFANet(1, 0, 16, normalise=False))
    net.post[0].bias.fill_(-2); net.post[1].weight[:, :, 1, 1] = 0.25
    x = torch.rand(1, 3, 3, 3)
    torch.testing.assert_close(net(x), x - 8)


# --- reach, any size, gradients, precision, files

@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_receptive_radius(blocks): assert receptive_radius(FFANet(3, blocks, 16)) == 6 * blocks + 6


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 5), (16, 33)])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_size(size, channels):
    net, x = build("FFANet", preset="tiny", channels=channels), torch.rand(2, channels, *size)
    before = x.clone()
    assert net(x).shape == x.shape and torch.equal(x, before)


def test_test_time_conversion_finds_every_pool():
    net = FFANet(3, 2, 16)
    local = local_pooling(net, 32)
    assert sum(type(m).__name__ == "LocalAverage" for m in local.modules()) == 7
    x = torch.rand(1, 3, 20, 20)
    torch.testing.assert_close(local(x), net(x))                                       # the window covers the picture


def test_gradients():
    net = build("FFANet", preset="tiny")
    net(torch.rand(2, 3, 8, 9)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    silent = [n for n, p in net.named_parameters() if not p.grad.abs().sum() > 0]
    assert all(".ca." in n or ".pa." in n or n.startswith("ca.") for n in silent)      # a shut ReLU of a width-1 squeeze
    toy = awake(FFABlock(16).double(), 0.3)
    x = torch.randn(1, 16, 2, 2, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(toy, x) and torch.autograd.gradgradcheck(toy, x)


def test_modes_copies_and_precisions():
    net, x = build("FFANet", preset="tiny"), torch.rand(1, 3, 9, 11)
    y = net(x)
    assert torch.equal(net.eval()(x), y) and torch.equal(copy.deepcopy(net)(x), y)
    with torch.autocast("cpu", torch.bfloat16): half = net(x)
    assert (half.float() - y).abs().max() < 0.05
    assert net.bfloat16()(x.bfloat16()).dtype == torch.bfloat16 and net.double()(x.double()).dtype == F64
    assert not {"mean", "std"} & set(net.state_dict())


def test_model_file(tmp_path):
    net, x = awake(build("FFANet", preset="tiny")), torch.rand(1, 3, 9, 11)
    save_model(tmp_path / "m.safetensors", net, {"network": {"name": "FFANet", "options": {"preset": "tiny"}}})
    assert torch.equal(load_model(tmp_path / "m.safetensors")[0](x), net(x))
    torch.save({"params": net.state_dict()}, tmp_path / "m.pth")
    assert torch.equal(load_model(tmp_path / "m.pth")[0](x), net(x))


# --- refused

@pytest.mark.parametrize("options, message", [
    (dict(gps=0), "gps"), (dict(channels=0), "channels"), (dict(blocks=-1), "blocks.* -1"),
    (dict(dim=0), "dim .* 0$"), (dict(dim=40), "dim .* 40$"), (dict(dim=8), "dim .* 8$")])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=f"FFANet: .*({message})"): FFANet(**options)
    with pytest.raises(ValueError, match="FFANet"): build("FFANet", preset="tiny", **options)
