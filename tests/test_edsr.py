"""EDSR: counts and names, pixel-shuffle order, a slow reference, the layout of 2017, and what must be refused."""
import copy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from irnb.networks import EDSR, ModelError, UpscaleFirst, build, count_parameters, load_model, networks, save_model
from irnb.networks.edsr import DIV2K_MEAN, EDSRBlock, mean_colour, shuffle_upsampler
from tests.nets import awake

F64 = torch.float64


def conv_names(pairs):
    "Names and shapes of 3x3 convolutions, from (name, out, in)."
    return [x for name, o, i in pairs for x in ((f"{name}.weight", (o, i, 3, 3)), (f"{name}.bias", (o,)))]


# --- counts and names

@pytest.mark.parametrize("upscale, count", [(2, 1_369_859), (3, 1_554_499), (4, 1_517_571)])
def test_published_counts(upscale, count):
    with torch.device("meta"):
        assert count_parameters(EDSR(num_feat=64, num_block=16, upscale=upscale)) == count
        assert count_parameters(build("EDSR", preset="baseline", upscale=upscale)) == count


def test_defaults_are_the_baseline_at_x4():
    with torch.device("meta"): assert count_parameters(EDSR()) == 1_517_571
    assert "EDSR" in networks() and "tiny" in EDSR.PRESETS


@pytest.mark.parametrize("upscale, up", [(1, []), (2, [("upsample.0", 20, 5)]), (3, [("upsample.0", 45, 5)]), (4, [("upsample.0", 20, 5), ("upsample.2", 20, 5)]),
                                         (8, [("upsample.0", 20, 5), ("upsample.2", 20, 5), ("upsample.4", 20, 5)])])
def test_state_dict_names_and_shapes(upscale, up):
    blocks = [(f"body.{i}.conv{k}", 5, 5) for i in range(3) for k in (1, 2)]
    expected = conv_names([("conv_first", 5, 3), *blocks, ("conv_after_body", 5, 5), *up, ("conv_last", 3, 5)])
    assert [(k, tuple(v.shape)) for k, v in EDSR(5, 3, upscale).state_dict().items()] == expected


@given(c=st.integers(1, 6), n=st.integers(1, 12), s=st.sampled_from([1, 2, 3, 4, 8]), channels=st.sampled_from([1, 3, 4]))
@settings(max_examples=20, deadline=None)
def test_options_are_read_off_a_state_dict(c, n, s, channels):
    options = dict(num_feat=c, num_block=n, upscale=s, channels=channels)
    with torch.device("meta"): assert EDSR.options_from_state_dict(EDSR(**options).state_dict()) == options


def test_the_large_one_is_recognised():
    with torch.device("meta"): net = build("EDSR", preset="large", upscale=2)
    options = EDSR.options_from_state_dict(net.state_dict())
    assert options["res_scale"] == 0.1 and all(m.res_scale == 0.1 for m in net.modules() if isinstance(m, EDSRBlock))


def test_other_networks_are_not_recognised():
    for name in ("NAFNet", "UNet", "RRDB"):
        with pytest.raises(ValueError, match="EDSR: .*weight'$"): EDSR.options_from_state_dict(build(name, preset="tiny").state_dict())
    with pytest.raises(ValueError, match="body.0.conv1.weight"):
        EDSR.options_from_state_dict({k: v for k, v in EDSR(4, 1, 2).state_dict().items() if not k.startswith("body")})


def old_layout(net: EDSR) -> dict:
    "The weights under the names of 2017."
    state, n = net.state_dict(), len(net.body)
    names = {"conv_first": "head.0", "conv_after_body": f"body.{n}", "conv_last": "tail.1"}
    names |= {f"body.{i}.conv{k + 1}": f"body.{i}.body.{2*k}" for i in range(n) for k in (0, 1)} | {f"upsample.{i}": f"tail.0.{i}" for i in (0, 2, 4)}
    old = {f"{names[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}": v for k, v in state.items()}
    shift = 255 * torch.tensor([0.4488, 0.4371, 0.4040])
    return {"sub_mean.weight": torch.eye(3).view(3, 3, 1, 1), "sub_mean.bias": -shift, **old, "add_mean.weight": torch.eye(3).view(3, 3, 1, 1), "add_mean.bias": shift}


@pytest.mark.parametrize("n, upscale", [(1, 3), (11, 4)])
def test_old_layout(n, upscale):
    net = awake(EDSR(4, n, upscale))
    old = old_layout(net)
    assert "body.0.body.2.weight" in old and f"body.{n}.weight" in old
    before = dict(old)
    new = EDSR.translate_state_dict(old)
    assert set(new) == set(net.state_dict()) and all(torch.equal(new[k], v) for k, v in net.state_dict().items())
    assert old.keys() == before.keys()
    assert EDSR.translate_state_dict(new) == new
    again = EDSR(**EDSR.options_from_state_dict(new)); again.load_state_dict(new)
    x = torch.rand(1, 3, 5, 6)
    assert torch.equal(again(x), net(x))


@pytest.mark.parametrize("change", [{"sub_mean.bias": torch.zeros(3)}, {"sub_mean.bias": -torch.tensor([0.4488, 0.4371, 0.4040])}, {"sub_mean.weight": 2 * torch.eye(3).view(3, 3, 1, 1)},
                                    {"add_mean.bias": torch.zeros(4)}, {"body.9.weight": torch.zeros(4, 4, 3, 3)}])
def test_another_mean_colour_is_not_lost(tmp_path, change):
    "What the network would not do by itself stays an entry, and a file whose network is inferred is refused for it."
    net = awake(EDSR(4, 1, 2))
    torch.save(old_layout(net), tmp_path / "old.pt")
    x = torch.rand(1, 3, 5, 6)
    assert torch.equal(load_model(tmp_path / "old.pt")[0](x), net.eval()(x))
    torch.save({k: v.half() for k, v in old_layout(net).items()}, tmp_path / "half.pt")
    assert load_model(tmp_path / "half.pt")[1]["network"]["name"] == "EDSR"
    torch.save({**old_layout(net), **change}, tmp_path / "other.pt")
    with pytest.raises(ModelError, match="other.pt"): load_model(tmp_path / "other.pt")


# --- values

@pytest.mark.parametrize("s", [2, 3])
def test_pixel_shuffle_order(s):
    "Channel k s^2 + s a + b of the convolution is sub-pixel (a, b) of output channel k."
    up = shuffle_upsampler(2, s).double()
    x = torch.randn(1, 2, 3, 4, dtype=F64)
    y, z = up(x), up[0](x)
    for k in range(2):
        for i in range(3):
            for j in range(4):
                for a in range(s):
                    for b in range(s): assert y[0, k, s*i + a, s*j + b] == z[0, k*s*s + s*a + b, i, j]


def slow_conv(x, conv):
    "A 3x3 convolution with zero padding, as a sum of nine shifted products."
    p, (h, w) = F.pad(x, (1, 1, 1, 1)), x.shape[-2:]
    return conv.bias.view(1, -1, 1, 1) + sum(torch.einsum("oi,bihw->bohw", conv.weight[:, :, i, j], p[..., i:i + h, j:j + w]) for i in range(3) for j in range(3))


def slow_shuffle(x, s):
    b, c, h, w = x.shape
    return x.reshape(b, c // s**2, s, s, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // s**2, h * s, w * s)


@torch.no_grad()
@pytest.mark.parametrize("upscale, channels, res_scale, img_range", [(1, 3, 1.0, 255.0), (2, 3, 0.5, 255.0), (3, 1, 1.0, 1.0), (4, 3, 0.1, 10.0)])
def test_equals_a_slow_reference(upscale, channels, res_scale, img_range):
    net = awake(EDSR(4, 2, upscale, res_scale, img_range, channels).double())
    x = torch.rand(2, channels, 5, 3, dtype=F64)
    mean = torch.tensor([0.4488, 0.4371, 0.4040] if channels == 3 else [0.0], dtype=torch.float32).double().view(1, -1, 1, 1)
    first = f = slow_conv((x - mean) * img_range, net.conv_first)
    for block in net.body: f = f + res_scale * slow_conv(slow_conv(f, block.conv1).clamp(min=0), block.conv2)
    f = first + slow_conv(f, net.conv_after_body)
    for layer, s in zip(list(net.upsample)[::2], [3] if upscale == 3 else [2, 2]): f = slow_shuffle(slow_conv(f, layer), s)
    torch.testing.assert_close(net(x), slow_conv(f, net.conv_last) / img_range + mean, rtol=0, atol=1e-9)


@torch.no_grad()
def test_a_network_that_repeats_pixels():
    "Weights set by hand: the shuffle copies every pixel to its sub-pixels, all else passes on."
    net = EDSR(3, 2, 4)
    for p in net.parameters(): p.zero_()
    for conv in (net.conv_first, net.conv_last):
        for k in range(3): conv.weight[k, k, 1, 1] = 1
    for conv in (net.upsample[0], net.upsample[2]):
        for k in range(3): conv.weight[4*k:4*k + 4, k, 1, 1] = 1
    x = torch.rand(2, 3, 5, 4)
    torch.testing.assert_close(net(x), F.interpolate(x, scale_factor=4, mode="nearest"))


@torch.no_grad()
def test_a_grey_picture_of_the_mean_colour_sees_only_biases():
    net = awake(EDSR(4, 1, 2))
    x = mean_colour(3).expand(1, 3, 9, 9)
    for name, p in net.named_parameters():
        if name.endswith("bias"): p.zero_()
    torch.testing.assert_close(net(x), mean_colour(3).expand(1, 3, 18, 18))
    assert tuple(round(float(v), 4) for v in mean_colour(3).flatten()) == DIV2K_MEAN and mean_colour(1).item() == 0


@torch.no_grad()
def test_shift_by_a_pixel_shifts_the_result_by_the_factor():
    net, s, r = EDSR(4, 1, 3).double(), 3, 6
    x = torch.rand(1, 3, 21, 22, dtype=F64)
    a, b = net(x)[..., s*(1 + r):-s*r, s*(1 + r):-s*r], net(x[..., 1:, 1:])[..., s*r:-s*r, s*r:-s*r]
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


# --- any size, gradients, precision, modes, files

@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 5), (16, 33)])
@pytest.mark.parametrize("upscale", [1, 2, 3, 4])
def test_any_size(size, upscale):
    net, x = build("EDSR", preset="tiny", upscale=upscale), torch.rand(2, 3, *size)
    before = x.clone()
    assert net(x).shape == (2, 3, upscale * size[0], upscale * size[1]) and torch.equal(x, before) and net.scale == upscale


def test_build_uses_it_natively(tmp_path):
    net = build("EDSR", preset="tiny", upscale=4)
    assert isinstance(net, EDSR) and not isinstance(net, UpscaleFirst)
    spec = {"network": {"name": "EDSR", "options": {"preset": "tiny", "upscale": 4}}, "scale": 4}
    save_model(tmp_path / "m.safetensors", awake(net), spec)
    x = torch.rand(1, 3, 5, 7)
    assert torch.equal(load_model(tmp_path / "m.safetensors")[0](x), net(x))
    torch.save({"params": net.state_dict()}, tmp_path / "m.pth")
    assert torch.equal(load_model(tmp_path / "m.pth")[0](x), net(x))


def test_gradients():
    net = build("EDSR", preset="tiny", upscale=2)
    net(torch.rand(1, 3, 8, 9)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in net.parameters())
    toy = awake(EDSR(2, 1, 2, img_range=1.0, channels=1).double(), 0.5)
    x = torch.randn(1, 1, 2, 2, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(toy, x) and torch.autograd.gradgradcheck(toy, x)


def test_modes_copies_and_precisions():
    net, x = build("EDSR", preset="tiny", upscale=2), torch.rand(1, 3, 9, 11)
    y = net(x)
    assert torch.equal(net.eval()(x), y) and torch.equal(copy.deepcopy(net)(x), y)
    with torch.autocast("cpu", torch.bfloat16): half = net(x)
    assert (half.float() - y).abs().max() < 0.03
    assert net.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert net.double()(x.double()).dtype == F64


def test_the_mean_is_no_weight_and_moves_along():
    net = EDSR(4, 1, 2)
    assert "mean" not in net.state_dict() and dict(net.named_buffers())["mean"].shape == (1, 3, 1, 1)
    assert net.to("meta").mean.device.type == "meta" and EDSR(4, 1, 2).double().mean.dtype == F64


# --- refused

@pytest.mark.parametrize("options, message", [
    (dict(num_feat=0), "num_feat"), (dict(channels=0), "channels"), (dict(num_block=-1), "num_block.* -1"), (dict(img_range=0), "img_range"),
    (dict(img_range=float("nan")), "img_range"), (dict(upscale=5), "upscale.* 5"), (dict(upscale=0), "upscale.* 0"), (dict(upscale=-2), "upscale.* -2"),
    (dict(upscale=2.0), "upscale.* 2.0"), (dict(upscale="4"), "upscale.* '4'")])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message): EDSR(**options)
    with pytest.raises(ValueError, match=message): build("EDSR", preset="tiny", **options)
