"""RRDB: counts and names, closed forms, a slow reference, reach, double backward, and what must be refused."""
import copy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from irnb.networks import ModelError, build, count_parameters, load_model, networks, receptive_radius, save_model
from irnb.networks.rrdb import RRDB, DenseBlock, RRDBBlock
from tests.nets import awake

F64 = torch.float64


# --- counts, names, shapes

def dense_count(c, g): return sum(9 * (c + k * g) * g + g for k in range(4)) + 9 * (c + 4 * g) * c + c


def test_published_count():
    with torch.device("meta"):
        assert count_parameters(RRDB()) == count_parameters(build("RRDB", preset="published")) == 16_624_131
        assert count_parameters(build("RRDB", preset="lite")) == 740_259
        assert 25_000 <= count_parameters(build("RRDB", preset="tiny")) <= 50_000
    assert "RRDB" in networks()


@given(c=st.integers(1, 9), g=st.integers(1, 7), n=st.integers(1, 3), i=st.integers(1, 4), o=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_count_formula_and_options(c, g, n, i, o):
    options = dict(in_channels=i, out_channels=o, num_feat=c, num_block=n, growth=g)
    with torch.device("meta"): net = RRDB(**options)
    assert count_parameters(net) == 9*i*c + c + 3*n*dense_count(c, g) + 2*(9*c*c + c) + 9*c*o + o
    assert RRDB.options_from_state_dict(net.state_dict()) == options


def test_state_dict_names_and_shapes():
    c, g, n = 5, 3, 2
    expected = [("conv_first", c, 3)]
    for i in range(n):
        for r in (1, 2, 3):
            expected += [(f"body.{i}.rdb{r}.conv{k + 1}", g if k < 4 else c, c + k * g) for k in range(5)]
    expected += [("conv_body", c, c), ("conv_hr", c, c), ("conv_last", 3, c)]
    wanted = [pair for name, o, i in expected for pair in ((f"{name}.weight", (o, i, 3, 3)), (f"{name}.bias", (o,)))]
    net = RRDB(num_feat=c, num_block=n, growth=g)
    assert [(k, tuple(v.shape)) for k, v in net.state_dict().items()] == wanted


def test_options_of_another_network_are_refused():
    for state in ({}, build("NAFNet", preset="tiny").state_dict(), {"conv_first.weight": torch.zeros(3)}, {"conv_first.weight": torch.zeros(4, 3, 3, 3)}):
        with pytest.raises(ValueError, match="RRDB: .*weight'$"): RRDB.options_from_state_dict(state)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 3), (17, 32)])
@pytest.mark.parametrize("channels", [(3, 3), (1, 3), (4, 1)])
def test_any_size(size, channels):
    net = RRDB(*channels, num_feat=4, num_block=1, growth=2)
    x = torch.rand(2, channels[0], *size)
    before = x.clone()
    assert net(x).shape == (2, channels[1], *size) and torch.equal(x, before)


# --- initial weights

def test_initial_weights():
    torch.manual_seed(0)
    net = RRDB(num_block=1)
    for name, conv in net.named_modules():
        if not isinstance(conv, nn.Conv2d): continue
        fan = conv.weight[0].numel()
        if name.startswith("body."):
            assert abs(float(conv.weight.detach().std()) / (0.1 * (2 / fan)**0.5) - 1) < 0.03, name   # normal, ten times smaller
            assert conv.weight.abs().max() > 3 * conv.weight.std()                            # and not uniform
        else:
            assert conv.weight.abs().max() <= fan**-0.5 and abs(float(conv.weight.detach().std()) * (3 * fan)**0.5 - 1) < 0.06, name  # uniform
        assert 0 < conv.bias.abs().max() <= fan**-0.5


# --- closed forms and a slow reference

def slow_conv(x, conv):
    "A 3x3 convolution with zero padding, as a sum of nine shifted products."
    p, (h, w) = F.pad(x, (1, 1, 1, 1)), x.shape[-2:]
    return conv.bias.view(1, -1, 1, 1) + sum(torch.einsum("oi,bihw->bohw", conv.weight[:, :, i, j], p[..., i:i + h, j:j + w]) for i in range(3) for j in range(3))


def lrelu(u): return torch.maximum(u, 0.2 * u)


def slow_dense(x, d):
    a = lrelu(slow_conv(x, d.conv1))
    b = lrelu(slow_conv(torch.cat([x, a], 1), d.conv2))
    c = lrelu(slow_conv(torch.cat([x, a, b], 1), d.conv3))
    e = lrelu(slow_conv(torch.cat([x, a, b, c], 1), d.conv4))
    return x + 0.2 * slow_conv(torch.cat([x, a, b, c, e], 1), d.conv5)


@torch.no_grad()
@pytest.mark.parametrize("skip", [False, True])
def test_equals_a_slow_reference(skip):
    net = awake(RRDB(3, 3, 4, 2, 3, image_skip=skip).double())
    x = torch.randn(2, 3, 5, 7, dtype=F64)
    first = f = slow_conv(x, net.conv_first)
    for block in net.body: f = f + 0.2 * slow_dense(slow_dense(slow_dense(f, block.rdb1), block.rdb2), block.rdb3)
    y = slow_conv(lrelu(slow_conv(first + slow_conv(f, net.conv_body), net.conv_hr)), net.conv_last)
    torch.testing.assert_close(net(x), y + x if skip else y, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 3])
def test_blocks_of_zeros_multiply_by_six_fifths(n):
    net = awake(RRDB(num_feat=4, num_block=n, growth=2).double())
    for p in net.body.parameters(): p.zero_()
    x = torch.randn(1, 3, 6, 6, dtype=F64)
    f = net.conv_first(x)
    torch.testing.assert_close(net.body(f), 1.2**n * f, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(net(x), net.conv_last(lrelu(net.conv_hr(f + net.conv_body(1.2**n * f)))), rtol=0, atol=1e-12)


@torch.no_grad()
def test_zero_weights_give_the_last_bias_or_the_image():
    for skip in (False, True):
        net = RRDB(num_feat=4, num_block=1, growth=2, image_skip=skip)
        for p in net.parameters(): p.zero_()
        net.conv_last.bias.copy_(torch.tensor([0.1, 0.2, 0.3]))
        x = torch.rand(1, 3, 4, 5)
        torch.testing.assert_close(net(x), x * skip + torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1).expand_as(x))


# --- upsampling

def upsampled(x, net, fold):
    "The enlarging network by hand: folding, trunk, two steps of repeated pixels and a convolution, the end."
    b, c, h, w = x.shape
    f = x.view(b, c, h // fold, fold, w // fold, fold).permute(0, 1, 3, 5, 2, 4).reshape(b, c * fold**2, h // fold, w // fold)
    first = f = slow_conv(f, net.conv_first)
    for block in net.body: f = f + 0.2 * slow_dense(slow_dense(slow_dense(f, block.rdb1), block.rdb2), block.rdb3)
    t = first + slow_conv(f, net.conv_body)
    for conv in (net.conv_up1, net.conv_up2): t = lrelu(slow_conv(t.repeat_interleave(2, 2).repeat_interleave(2, 3), conv))
    return slow_conv(lrelu(slow_conv(t, net.conv_hr)), net.conv_last)


@torch.no_grad()
@pytest.mark.parametrize("scale, fold", [(4, 1), (2, 2), (1, 4)])
def test_upsampling_equals_a_slow_reference(scale, fold):
    net = awake(RRDB(3, 3, 4, 2, 3, scale=scale).double())
    x = torch.randn(2, 3, 8, 12, dtype=F64)
    y = net(x)
    assert y.shape == (2, 3, 8 * scale, 12 * scale) and net.multiple == fold
    torch.testing.assert_close(y, upsampled(x, net, fold), rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("scale, fold", [(4, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 3), (9, 10)])
def test_upsampling_of_any_size(scale, fold, size):
    "A picture that the squares do not fill is continued by its last row and column, and the result cut."
    net = awake(RRDB(num_feat=4, num_block=1, growth=2, scale=scale).double())
    x = torch.rand(1, 3, *size, dtype=F64)
    rows, columns = (torch.arange(-(-n // fold) * fold).clamp(max=n - 1) for n in size)
    full = upsampled(x[..., rows, :][..., columns], net, fold)
    torch.testing.assert_close(net(x), full[..., :size[0] * scale, :size[1] * scale], rtol=0, atol=1e-10)


def official(num_block, inputs, c=6, g=4):
    "Names and shapes of an enlarging file as published: `inputs` channels after folding."
    convs = {"conv_first": (c, inputs), **{f"body.{i}.rdb{r}.conv{k + 1}": (g if k < 4 else c, c + k * g) for i in range(num_block) for r in (1, 2, 3) for k in range(5)},
             "conv_body": (c, c), "conv_up1": (c, c), "conv_up2": (c, c), "conv_hr": (c, c), "conv_last": (3, c)}
    draw = torch.Generator().manual_seed(0)
    return {f"{k}.{end}": 0.1 * torch.randn(*(shape + (3, 3) if end == "weight" else shape[:1]), generator=draw) for k, shape in convs.items() for end in ("weight", "bias")}


@torch.no_grad()
@pytest.mark.parametrize("section", [None, "params", "params_ema"])
@pytest.mark.parametrize("num_block, inputs, scale", [(3, 3, 4), (1, 3, 4), (2, 12, 2), (2, 48, 1)])
def test_published_layouts_enlarge(tmp_path, num_block, inputs, scale, section):
    "The layout of RealESRGAN_x4plus (23 blocks) and its 6-block sibling, of x2 and of x1: no tensor is left aside."
    state = official(num_block, inputs)
    torch.save(state if section is None else {section: state}, tmp_path / "x.pth")
    net, spec = load_model(tmp_path / "x.pth")
    assert spec["network"]["name"] == "RRDB" and spec["network"]["options"]["scale"] == scale
    assert set(net.state_dict()) == set(state) and all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    x = torch.rand(1, 3, 8, 4)
    y = net(x)
    assert y.shape == (1, 3, 8 * scale, 4 * scale)
    torch.testing.assert_close(y, upsampled(x, net, net.fold), rtol=0, atol=1e-5)
    save_model(tmp_path / "ours", net, spec)
    assert torch.equal(load_model(tmp_path / "ours")[0](x), y)


@pytest.mark.parametrize("change", [lambda s: s.pop("conv_up2.weight"), lambda s: s.pop("conv_up1.weight"), lambda s: s.pop("conv_up1.bias"),
                                    lambda s: s.update({"conv_up3.weight": torch.zeros(6, 6, 3, 3)}), lambda s: s.update({"conv_first.weight": torch.zeros(6, 5, 3, 3)})])
def test_half_of_the_upsampling_is_refused(tmp_path, change):
    state = official(1, 3)
    change(state)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ModelError, match="x.pth"): load_model(tmp_path / "x.pth")


@pytest.mark.parametrize("scale", [0, 3, 8, -4, 2.0, True, "4"])
def test_bad_scales(scale):
    with pytest.raises(ValueError, match=f"RRDB: scale .* {scale!r}$"): RRDB(num_feat=4, num_block=1, growth=2, scale=scale)


def test_image_skip_needs_the_same_size():
    x = torch.rand(1, 3, 5, 6)
    net = RRDB(num_feat=4, num_block=1, growth=2, image_skip=True, scale=1)
    y = net(x)
    net.image_skip = False
    assert torch.equal(y, net(x) + x)
    for scale in (2, 4):
        with pytest.raises(ValueError, match=f"image_skip=True.*scale={scale}"): RRDB(image_skip=True, scale=scale)


# --- reach

@pytest.mark.parametrize("n", [1, 2])
def test_receptive_radius(n): assert receptive_radius(RRDB(num_feat=4, num_block=n, growth=2)) == 15 * n + 4


@torch.no_grad()
def test_shifting_the_picture_shifts_the_result():
    net = RRDB(num_feat=4, num_block=1, growth=2).double()
    x, r = torch.rand(1, 3, 50, 51, dtype=F64), 19
    assert torch.allclose(net(x)[..., 1 + r:-r, 1 + r:-r], net(x[..., 1:, 1:])[..., r:-r, r:-r], atol=1e-12)
    assert not torch.allclose(net(x)[..., 1:5, 1:5], net(x[..., 1:, 1:])[..., :4, :4], atol=1e-12)


# --- gradients

def test_double_backward_is_exact():
    net = awake(RRDB(1, 1, 2, 1, 1).double(), 0.5)
    x = torch.randn(1, 1, 3, 3, dtype=F64, requires_grad=True)
    names = ("body.0.rdb1.conv1.weight", "body.0.rdb2.conv5.weight", "conv_last.weight")
    weights = [net.get_parameter(n).detach().clone().requires_grad_() for n in names]
    f = lambda x, *w: torch.func.functional_call(net, dict(zip(names, w)), (x,))
    assert torch.autograd.gradcheck(f, (x, *weights)) and torch.autograd.gradgradcheck(f, (x, *weights))


def test_hessian_vector_products_agree():
    "Reverse over reverse equals forward over reverse: nothing in place stands in the way of either."
    net = awake(RRDB(num_feat=3, num_block=1, growth=2).double())
    params = dict(net.named_parameters())
    x, y = torch.rand(2, 2, 3, 6, 6, dtype=F64)
    loss = lambda p: (torch.func.functional_call(net, p, (x,)) - y).square().mean()
    v = {k: torch.randn_like(p) for k, p in params.items()}
    forward = torch.func.jvp(torch.func.grad(loss), ({k: p.detach() for k, p in params.items()},), (v,))[1]
    g = torch.autograd.grad(loss(params), list(params.values()), create_graph=True)
    reverse = torch.autograd.grad(sum((a * b).sum() for a, b in zip(g, v.values())), list(params.values()), allow_unused=True, materialize_grads=True)
    for a, b in zip(forward.values(), reverse): torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    assert sum(float(b.abs().sum()) for b in reverse) > 0


def test_every_parameter_gets_a_gradient():
    net = build("RRDB", preset="tiny")
    net(torch.rand(1, 3, 8, 8)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in net.parameters())


def test_modes_copies_and_precisions():
    net, x = build("RRDB", preset="tiny"), torch.rand(1, 3, 9, 11)
    y = net(x)
    assert torch.equal(net.eval()(x), y) and torch.equal(copy.deepcopy(net)(x), y)
    with torch.autocast("cpu", torch.bfloat16): half = net(x)
    assert half.dtype == torch.bfloat16 and (half.float() - y).abs().max() < 0.05 * y.abs().max() + 0.02
    assert net.double()(x.double()).dtype == F64
    state = torch.get_rng_state()
    net.train()(x.double())
    assert torch.equal(torch.get_rng_state(), state)


def test_model_file(tmp_path):
    net, x = awake(build("RRDB", preset="tiny")), torch.rand(1, 3, 9, 11)
    save_model(tmp_path / "m.safetensors", net, {"network": {"name": "RRDB", "options": {"preset": "tiny"}}})
    assert torch.equal(load_model(tmp_path / "m.safetensors")[0](x), net(x))
    torch.save(net.state_dict(), tmp_path / "m.pth")
    again, spec = load_model(tmp_path / "m.pth")
    assert torch.equal(again(x), net(x)) and spec["network"]["name"] == "RRDB"


# --- refused

@pytest.mark.parametrize("options, message", [
    (dict(in_channels=0), "channels"), (dict(num_feat=0), "num_feat"), (dict(num_block=0), "num_block"), (dict(growth=-1), "growth"),
    (dict(out_channels=1, image_skip=True), "image_skip=True.*out_channels.*1 and 3.*image_skip=False")])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=f"RRDB: .*{message}"): RRDB(**options)
    with pytest.raises(ValueError, match=message): build("RRDB", preset="tiny", **options)


def test_wrong_channels_in_the_picture():
    with pytest.raises(RuntimeError, match="channels"): build("RRDB", preset="tiny")(torch.rand(1, 1, 8, 8))


@torch.no_grad()
def test_blocks_keep_their_shape():
    for block in (DenseBlock(5, 2), RRDBBlock(5, 2)):
        x = torch.rand(2, 5, 4, 3)
        assert block(x).shape == x.shape
