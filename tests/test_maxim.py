"""MAXIM under ConStyle: counts, mixing and gating against slow references, the graph by hand, parameters that are never called, and what must be refused."""
import copy
import itertools
import math
import pickle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.utils.flop_counter import FlopCounterMode
from irnb.networks import ConStyleMAXIM, build, count_parameters, load_model, networks, receptive_radius, save_model
from irnb.networks.maxim import AxisMix, CrossGating, GatedMLP, MAXIMBlock, MultiAxisMLP, _Bottleneck, _ConvHalf, _DenseHalf, _every, _resized, grid_partition, grid_reverse
from irnb.strategies import Supervised
from irnb.strategies.strategy import contract
from tests.nets import awake

F64 = torch.float64
gelu = lambda v: 0.5 * v * (1 + torch.erf(v / 2**0.5))
norm = lambda m, v: F.layer_norm(v, m.weight.shape, m.weight, m.bias, 1e-5)
first = lambda v: v.permute(0, 3, 1, 2)
last = lambda v: v.permute(0, 2, 3, 1)


def small(**options) -> ConStyleMAXIM:
    "Sizes 4 and 2, one round of everything, nothing unused."
    return ConStyleMAXIM(**{**dict(dim=4, sizes=[4, 4, 2, 2], bottlenecks=1, groups=1, unused=False, encoder=dict(width=2, code_dim=6)), **options})


# --- counts, names, cost

def test_published_count_and_cost():
    with torch.device("meta"): net, lean, plain, x = build("ConStyleMAXIM", preset="paper").eval(), build("ConStyleMAXIM", preset="lean").eval(), ConStyleMAXIM(conditioned=False), torch.rand(1, 3, 128, 128)
    assert count_parameters(net) == count_parameters(ConStyleMAXIM()) == 8_101_664 and count_parameters(net.ConStyle) == 1_190_832 and "ConStyleMAXIM" in networks()
    never = [p for name, p in net.named_parameters() if "cross_gating" in name]
    assert sum(p.numel() for p in never) == 1_529_088 and not any(p.requires_grad for p in never)
    assert all(p.requires_grad for name, p in net.named_parameters() if "cross_gating" not in name) and all(p.requires_grad for p in lean.parameters())
    assert {k: v.shape for k, v in lean.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items() if "cross_gating" not in k}
    adapters, wider, copied = 128*128 + 128 + 32*(32 + 64 + 128), 9*8*(32 + 64 + 96), 128*96
    assert count_parameters(plain) == 8_101_664 - 1_190_832 - adapters + wider - copied
    for n in (net, lean):
        with FlopCounterMode(display=False) as whole, torch.no_grad(): n(x)
        with FlopCounterMode(display=False) as encoder, torch.no_grad(): n.encode(x)
        assert round((whole.get_total_flops() - encoder.get_total_flops()) / 2e9, 2) == 12.72


def test_widths_sizes_and_biases():
    with torch.device("meta"): net = ConStyleMAXIM()
    for site, inputs, dim, size in [("l1", 64, 32, 16), ("l2", 96, 64, 16), ("l3", 128, 96, 8), ("r3", 192, 96, 8), ("r2", 192, 64, 16), ("r1", 160, 64, 16)]:
        (block,) = net.get_submodule(f"Process_Module_{site}")
        assert block.enter.weight.shape == (dim, inputs, 1, 1) and [m.size for m in block.modules() if isinstance(m, AxisMix)] == [size] * 8, site
        assert [type(m) for m in block.body] == [MultiAxisMLP, _ConvHalf] * 2
    bottom = list(net.Process_Module_bottom)
    assert [type(m) for m in bottom] == [_Bottleneck] * 2 and [type(m) for m in bottom[0].body] == [MultiAxisMLP, _DenseHalf] * 2 and bottom[0].enter.weight.shape == (128, 128, 1, 1)
    assert [tuple(net.get_submodule(f"UC{k}")[0].weight.shape) for k in (3, 2, 1)] == [(384, 96, 3, 3), (384, 96, 3, 3), (256, 64, 3, 3)]
    assert [tuple(net.get_submodule(f"CrossGating{k}").up.weight.shape) for k in (3, 2, 1)] == [(96, 32, 2, 2), (32, 32, 2, 2), (32, 32, 2, 2)]
    assert [net.get_submodule(f"CrossGating{k}").gate_x.grid.size for k in (3, 2, 1)] == [8, 16, 16]
    with torch.device("meta"): net4 = ConStyleMAXIM(sizes=[32, 16, 4, 2])
    for site, size in [("l1", 32), ("l2", 16), ("l3", 4), ("bottom", 2), ("r3", 4), ("r2", 16), ("r1", 32)]:
        assert {m.size for m in net4.get_submodule(f"Process_Module_{site}").modules() if isinstance(m, AxisMix)} == {size}, site
    assert [net4.get_submodule(f"CrossGating{k}").gate_y.block.size for k in (3, 2, 1)] == [4, 16, 32]
    assert [_ConvHalf(c).body[3].weigh[1].out_channels for c in (4, 8, 32, 64)] == [8, 8, 8, 16]
    biased = {name for name, p in net.named_parameters() if name.endswith(".bias") and "norm" not in name and not name.startswith(("ConStyle", "mlp"))}
    assert {n for n in biased if not n.endswith((".mix.dense.bias", ".weigh.1.bias", ".weigh.3.bias"))} == {f"Process_Module_bottom.{k}.enter.bias" for k in (0, 1)}
    assert not any("weigh" in n and "bottom" in n for n in biased)
    assert sum(net.get_parameter(n).numel() for n in biased) == 6160 + 256


def test_names_of_the_specification():
    with torch.device("meta"): shapes = {k: tuple(v.shape) for k, v in ConStyleMAXIM().state_dict().items()}
    for key, shape in {"ConStyle.encoder_q.stage1.0.0.weight": (16, 3, 3, 3), "Preprocess_Module.0.weight": (32, 3, 3, 3), "Preprocess_Module.2.weight": (32, 3, 3, 3), "DC3.down.0.weight": (24, 96, 3, 3),
                       "local_fusion.weight": (96, 256, 1, 1), "Finetune_Module.0.weight": (3, 64, 3, 3), "mlp.0.weight": (128, 128), "AffineTransform2.0.weight": (32, 128, 1, 1)}.items():
        assert shapes[key] == shape, key


# --- partitions and mixing

@given(b=st.integers(1, 2), rows=st.integers(1, 3), columns=st.integers(1, 3), grid=st.integers(1, 4), c=st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_grids_are_cut_row_by_row(b, rows, columns, grid, c):
    h, w = rows * grid, columns * grid
    x = torch.arange(b * h * w * c).view(b, h, w, c)
    cells = grid_partition(x, grid)
    assert cells.shape == (b, grid**2, rows * columns, c) and torch.equal(grid_reverse(cells, grid, h, w), x)
    for n, i, j in itertools.product(range(b), range(grid), range(grid)):
        assert torch.equal(cells[n, i*grid + j], x[n, i*rows:(i + 1)*rows, j*columns:(j + 1)*columns].reshape(rows * columns, c))


def slow_mix(layer, x):
    "Position by position: partners are the pixels of the block, or those at the same place of every cell."
    n, (h, w) = layer.size, x.shape[1:3]
    y = torch.zeros_like(x)
    for i, j in itertools.product(range(h), range(w)):
        if layer.grid:
            fh, fw = h // n, w // n
            own, partners = (i // fh)*n + j // fw, [(p*fh + i % fh, q*fw + j % fw) for p in range(n) for q in range(n)]
        else: own, partners = (i % n)*n + j % n, [(i - i % n + p, j - j % n + q) for p in range(n) for q in range(n)]
        y[:, i, j] = sum(layer.dense.weight[own, k] * x[:, p, q] for k, (p, q) in enumerate(partners))
        if layer.dense.bias is not None: y[:, i, j] += layer.dense.bias[own]
    return y


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("size", [(4, 4), (8, 4), (4, 12), (12, 8)])
def test_mixing_equals_a_slow_reference(size, grid, bias):
    layer, x = awake(AxisMix(4, grid, bias).double(), 0.5), torch.randn(2, *size, 3, dtype=F64)
    torch.testing.assert_close(layer(x), slow_mix(layer, x), rtol=0, atol=1e-12)


@torch.no_grad()
def test_blocks_and_places_are_interchangeable():
    "Permuting whole blocks, or the places inside all cells alike, permutes the result; the other way round it does not."
    x = torch.randn(1, 8, 8, 2, dtype=F64)
    swap = [4, 5, 6, 7, 0, 1, 2, 3]                                                    # blocks of 4, and cells of a grid of 2
    shuffle = [1, 0, 3, 2, 5, 4, 7, 6]                                                 # places inside cells of 2 px
    block, grid = (awake(AxisMix(4, g).double(), 0.5) for g in (False, True))
    torch.testing.assert_close(block(x[:, swap]), block(x)[:, swap], rtol=0, atol=1e-12)
    torch.testing.assert_close(grid(x[:, shuffle]), grid(x)[:, shuffle], rtol=0, atol=1e-12)
    assert not torch.allclose(grid(x[:, swap]), grid(x)[:, swap]) and not torch.allclose(block(x[:, shuffle]), block(x)[:, shuffle])


# --- layers against slow references

def slow_gated(layer, x):
    w = gelu(norm(layer.norm, x) @ layer.widen.weight.T)
    c = x.shape[-1]
    return x + (w[..., :c] * (1 + slow_mix(layer.mix, norm(layer.gate_norm, w[..., c:])))) @ layer.project.weight.T


def slow_multi(layer, x):
    w = gelu(norm(layer.norm, x) @ layer.widen.weight.T)
    c = x.shape[-1]
    return x + torch.cat([slow_gated(layer.grid, w[..., :c]), slow_gated(layer.block, w[..., c:])], -1) @ layer.project.weight.T


def slow_weighed(layer, y):
    "(B, C, H, W): squeeze, ReLU, excite, sigmoid."
    conv = lambda m, v: v @ m.weight[:, :, 0, 0].T + (0 if m.bias is None else m.bias)
    s = conv(layer.weigh[3], conv(layer.weigh[1], y.mean((2, 3))).clamp(min=0))
    return y / (1 + (-s).exp())[:, :, None, None]


def slow_conv_half(layer, x):
    y = F.conv2d(first(norm(layer.norm, x)), layer.body[0].weight, padding=1)
    y = F.conv2d(torch.where(y > 0, y, 0.2 * y), layer.body[2].weight, padding=1)
    return x + last(slow_weighed(layer.body[3], y))


def slow_dense_half(layer, x):
    y = gelu(norm(layer.norm, x) @ layer.body[0].weight.T) @ layer.body[2].weight.T
    return x + last(slow_weighed(layer.attention, first(y)))


def slow_block(block, x):
    x = F.conv2d(x, block.enter.weight, block.enter.bias)
    y = last(x)
    for layer in block.body: y = {MultiAxisMLP: slow_multi, _ConvHalf: slow_conv_half, _DenseHalf: slow_dense_half}[type(layer)](layer, y)
    return x + first(y)


def slow_gate(layer, x):
    w = gelu(norm(layer.norm, x) @ layer.widen.weight.T)
    c = x.shape[-1]
    return torch.cat([slow_mix(layer.grid, w[..., :c]), slow_mix(layer.block, w[..., c:])], -1) @ layer.project.weight.T


def slow_cross(layer, x, y):
    "The formulas; the transposed convolution places a 2 x 2 stamp per pixel."
    if hasattr(layer.up, "weight"):
        b, _, h, w = y.shape
        up = torch.zeros(b, layer.up.weight.shape[1], 2*h, 2*w, dtype=y.dtype)
        for p, q in itertools.product(range(2), range(2)): up[:, :, p::2, q::2] = torch.einsum("bihw,io->bohw", y, layer.up.weight[:, :, p, q])
        y = up
    x, y = last(F.conv2d(x, layer.enter_x.weight)), last(F.conv2d(y, layer.enter_y.weight))
    u, v = gelu(norm(layer.norm_x, x) @ layer.in_x.weight.T), gelu(norm(layer.norm_y, y) @ layer.in_y.weight.T)
    out_y = y + (v * slow_gate(layer.gate_x, u)) @ layer.out_y.weight.T
    return first(x + out_y + (u * slow_gate(layer.gate_y, v)) @ layer.out_x.weight.T), first(out_y)


@torch.no_grad()
def test_layers_equal_slow_references():
    x = torch.randn(2, 4, 8, 4, dtype=F64)
    for layer, slow in [(GatedMLP(4, 4, True), slow_gated), (GatedMLP(4, 2, False), slow_gated), (MultiAxisMLP(4, 2), slow_multi), (_ConvHalf(4), slow_conv_half), (_DenseHalf(4), slow_dense_half)]:
        layer = awake(layer.double(), 0.6)
        torch.testing.assert_close(layer(x), slow(layer, x), rtol=1e-11, atol=1e-11)
    for block in (MAXIMBlock(4, 8, 2, 2), MAXIMBlock(4, 8, 4, 1, unused=True), _Bottleneck(4, 2, 2)):
        block = awake(block.double(), 0.3)
        torch.testing.assert_close(block(first(x)), slow_block(block, first(x)), rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("upsample", [True, False])
def test_cross_gating_equals_a_slow_reference(upsample):
    layer = awake(CrossGating(6, 5, 4, 2, upsample).double(), 0.6)
    x, y = torch.randn(2, 6, 4, 8, dtype=F64), torch.randn(2, 5, *((2, 4) if upsample else (4, 8)), dtype=F64)
    for a, b in zip(layer(x, y), slow_cross(layer, x, y)): torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_each_signal_gates_the_other():
    "With its output silenced, the skip no longer changes the gating signal; and the gate of a signal is made from it alone."
    layer = awake(CrossGating(3, 3, 4, 2, upsample=False).double(), 0.6)
    x, y, z = (torch.randn(1, 3, 4, 4, dtype=F64) for _ in range(3))
    assert not torch.allclose(layer(x, y)[1], layer(z, y)[1])
    layer.out_y.weight.zero_()
    assert torch.equal(layer(x, y)[1], layer(z, y)[1]) and not torch.allclose(layer(x, y)[0], layer(x, z)[0])


@torch.no_grad()
def test_resizing():
    x = torch.rand(2, 3, 8, 12, dtype=F64)
    assert torch.equal(_resized(x, 0), x) and torch.equal(_every(x, 2), x[..., 1::2, 1::2]) and torch.equal(_every(x, 4)[..., 1, 2], x[..., 6, 10])
    flat = torch.full((1, 1, 8, 8), 0.3, dtype=F64)
    for k in (-2, -1, 1, 2): torch.testing.assert_close(_resized(flat, k), torch.full((1, 1, int(8*2.0**k), int(8*2.0**k)), 0.3, dtype=F64))
    assert _resized(x.bfloat16(), -1).dtype == torch.bfloat16 and _resized(x.half(), 1).dtype == torch.float16
    # Halving with antialiasing: a triangle of width 4, sampled at 1/4, 3/4 on both sides.
    weights = torch.tensor([1, 3, 3, 1], dtype=F64) / 8
    inner = (x[..., 3:7, 5:9] * weights[:, None] * weights).sum((2, 3))
    torch.testing.assert_close(_resized(x, -1)[..., 2, 3], inner)
    # Doubling: a quarter of the next pixel but at the border.
    torch.testing.assert_close(_resized(x, 1)[..., 0, 4], 0.25 * x[..., 0, 1] + 0.75 * x[..., 0, 2])
    torch.testing.assert_close(_resized(x, 1)[..., 0, 0], x[..., 0, 0])


@torch.no_grad()
def test_graph_by_hand():
    "The whole network in float64: scales of the image, order of concatenations, gathering, gating, skips."
    net = awake(small(bottlenecks=2).double(), 0.35).eval()
    for k in (1, 2, 3): net.get_submodule(f"UC{k}")[0].weight.mul_(0.5)
    x = torch.rand(2, 3, 13, 20, dtype=F64)
    p = F.pad(x, (0, 12, 0, 3), mode="reflect")
    (_, code), feats = net.ConStyle.encoder_q(p)
    lrelu = lambda v: torch.where(v > 0, v, 0.1 * v)
    told = [lrelu(F.conv2d(f, net.get_submodule(f"AffineTransform{k}")[0].weight)) for k, f in enumerate(feats)]
    images = [p, p[..., 1::2, 1::2], p[..., 2::4, 2::4]]
    stems = [F.conv2d(i, net.Preprocess_Module[k].weight, padding=1) for k, i in enumerate(images)]
    e1 = slow_block(net.Process_Module_l1[0], torch.cat([stems[0], stems[0]], 1))
    down = lambda k, e: torch.cat([F.pixel_unshuffle(F.conv2d(e, net.get_submodule(f"DC{k}").down[0].weight, padding=1), 2), told[k - 1]], 1)
    e2 = slow_block(net.Process_Module_l2[0], torch.cat([down(1, e1), stems[1]], 1))
    e3 = slow_block(net.Process_Module_l3[0], torch.cat([down(2, e2), stems[2]], 1))
    b = slow_block(net.Process_Module_bottom[1], slow_block(net.Process_Module_bottom[0], down(3, e3)))
    g = code @ net.mlp[0].weight.T + net.mlp[0].bias
    bottom = gating = F.conv2d(torch.cat([b, g[:, :, None, None] * b], 1), net.local_fusion.weight)
    to = lambda v, like: v if v.shape[-2:] == like.shape[-2:] else F.interpolate(v, like.shape[-2:], mode="bilinear", antialias=True)
    skips = []
    for k, like in ((3, e3), (2, e2), (1, e1)):
        gather = net.get_submodule(f"Gather{k}")
        gathered = torch.cat([to(e1, like), F.conv2d(to(e2, like), gather[1].weight), F.conv2d(to(e3, like), gather[2].weight)], 1)
        skip, gating = slow_cross(net.get_submodule(f"CrossGating{k}"), gathered, gating)
        skips.append(skip)
    y = bottom
    for k, like in ((3, e3), (2, e2), (1, e1)):
        up = F.pixel_shuffle(F.conv2d(y, net.get_submodule(f"UC{k}")[0].weight, padding=1), 2)
        y = slow_block(net.get_submodule(f"Process_Module_r{k}")[0], torch.cat([up, *(to(s, like) for s in skips)], 1))
    out = p + F.conv2d(y, net.Finetune_Module[0].weight, padding=1)
    torch.testing.assert_close(net(x), out[..., :13, :20], rtol=1e-8, atol=1e-8)


# --- sizes, batches, modes

@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (7, 5), (32, 32), (33, 64)])
def test_any_size(size):
    net, x = awake(build("ConStyleMAXIM", preset="tiny"), 0.05).eval(), torch.rand(2, 3, *size)
    before = x.clone()
    y = net(x)
    assert y.shape == x.shape and torch.equal(x, before) and y.isfinite().all() and net.multiple == 32
    assert torch.equal(net.restore(x, net.encode(x)), y)
    torch.testing.assert_close(y, torch.cat([net(image[None]) for image in x]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes, multiple", [((16, 16, 8, 8), 64), ((8, 8, 4, 4), 32), ((1, 1, 1, 1), 8), ((3, 2, 2, 2), 48), ((32, 4, 4, 1), 32)])
def test_multiple(sizes, multiple):
    net = small(sizes=sizes)
    assert net.multiple == multiple == math.lcm(*(n * 2**k for k, n in enumerate(sizes)))
    with torch.no_grad(): assert net.eval()(torch.rand(1, 3, 10, 9)).shape == (1, 3, 10, 9)


@torch.no_grad()
def test_padding_is_reflection():
    net, x = awake(small().double(), 0.3).eval(), torch.rand(1, 3, 12, 16, dtype=F64)
    torch.testing.assert_close(net(x), net(F.pad(x, (0, 0, 0, 4), mode="reflect"))[..., :12, :])
    assert not torch.allclose(net(x), net(F.pad(x, (0, 0, 0, 4)))[..., :12, :])


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("conditioned", [True, False])
def test_black_and_white(value, conditioned):
    net, x = build("ConStyleMAXIM", preset="tiny", conditioned=conditioned), torch.full((2, 3, 32, 32), value)
    net(x).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    with torch.no_grad(): assert net.eval()(x).isfinite().all()


def test_the_grid_reaches_everywhere():
    with pytest.raises(ValueError, match="ConStyleMAXIM.*160"): receptive_radius(small(conditioned=False), largest=160)


# --- gradients, controls, copies, files, the contract

@pytest.mark.parametrize("conditioned", [True, False])
def test_gradients_reach_every_parameter(conditioned):
    net = awake(small(conditioned=conditioned, groups=2, bottlenecks=2), 0.3)
    net(torch.rand(3, 3, 32, 32)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in net.parameters())


def test_what_is_never_called_changes_nothing():
    "Same results with and without; frozen, so that neither gradients nor an optimiser's decay reach it; found again in files."
    net = awake(small(unused=True), 0.2)
    lean, x = small(), torch.rand(3, 3, 16, 16)
    assert lean.load_state_dict(net.state_dict(), strict=False).missing_keys == []
    never = {name: p.detach().clone() for name, p in net.named_parameters() if "cross_gating" in name}
    expected = sum(count_parameters(CrossGating(c, c, c, b, upsample=False)) for c, b in [(4, 4), (8, 4), (12, 2), (12, 2), (8, 4), (8, 4)])
    assert sum(p.numel() for p in never.values()) == expected
    assert torch.equal(net.eval()(x), lean.eval()(x))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.5)
    net.train()(x).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(net.get_parameter(name), p) and net.get_parameter(name).grad is None for name, p in never.items())
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


def test_double_backward_is_exact():
    x = torch.randn(1, 4, 4, 2, dtype=F64, requires_grad=True)
    layer = awake(MultiAxisMLP(2, 2).double(), 0.6)
    assert torch.autograd.gradcheck(layer, x) and torch.autograd.gradgradcheck(layer, x)
    y = torch.randn(1, 2, 4, 4, dtype=F64, requires_grad=True)
    for k in (-1, 1): assert torch.autograd.gradgradcheck(lambda v: _resized(v, k).square(), y)


@torch.no_grad()
def test_controls():
    x = torch.rand(2, 3, 16, 16)
    net = awake(small(), 0.3).eval()
    assert not torch.allclose(net.restore(x, net.encode(x.flip(0))), net(x))
    for use, deaf in [(("features",), "codes"), (("code",), "feats")]:
        net = awake(small(use=use), 0.3).eval()
        cond = net.encode(x)
        assert torch.equal(net.restore(x, cond._replace(**{deaf: tuple(t + 1 for t in getattr(cond, deaf))})), net.restore(x, cond))
    plain = small(conditioned=False)
    assert not any("ConStyle" in k or "Affine" in k for k in plain.state_dict()) and plain(x).shape == x.shape and plain.Process_Module_bottom[0].enter.weight.shape[0] == 16
    with pytest.raises(ValueError, match="ConStyleMAXIM: conditioned=False"): plain.encode(x)


CONFIGS = [dict(), dict(unused=True, groups=2), dict(conditioned=False, encoder=None, channels=1, bottlenecks=3), dict(sizes=[8, 4, 2, 2], dim=8), dict(encoder=dict(width=3, code_dim=5, norm="layer"))]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_options_are_read_off_a_state_dict(config):
    net = small(**config)
    found = ConStyleMAXIM.options_from_state_dict(net.state_dict())
    again = ConStyleMAXIM(**found)
    again.load_state_dict(net.state_dict())
    x = torch.rand(1, net.channels, 10, 17)
    with torch.no_grad(): assert torch.equal(again.eval()(x), net.eval()(x))


def test_other_networks_are_not_recognised():
    for name in ("NAFNet", "SwinIR", "ConStyleNAFNet", "ConStyleUformer", "ConStyleKBNet"):
        with pytest.raises(ValueError, match="ConStyleMAXIM: the weights"): ConStyleMAXIM.options_from_state_dict(build(name, preset="tiny").state_dict())
    for name in ("ConStyleNAFNet", "ConStyleUformer", "ConStyleKBNet"):
        import irnb.networks
        with pytest.raises(ValueError, match=f"{name}: the weights"): getattr(irnb.networks, name).options_from_state_dict(small().state_dict())


def test_modes_copies_precisions_and_files(tmp_path):
    net, x = awake(small(), 0.1).eval(), torch.rand(2, 3, 9, 20)
    with torch.no_grad():
        y = net(x)
        assert torch.equal(copy.deepcopy(net)(x), y) and torch.equal(pickle.loads(pickle.dumps(net))(x), y)
    net.train()
    with torch.autocast("cpu", torch.bfloat16): loss = net(x).float().square().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    tiny = build("ConStyleMAXIM", preset="tiny", unused=True).eval()
    save_model(tmp_path / "m.safetensors", tiny, {"network": {"name": "ConStyleMAXIM", "options": {"preset": "tiny", "unused": True}}})
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "m.safetensors")[0](x), tiny(x))
        assert tiny.double()(x.double()).dtype == F64


def test_nothing_is_drawn():
    net, x, state = small().train(), torch.rand(2, 3, 16, 16), torch.get_rng_state()
    net(x).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_trains_under_the_contract():
    "What is never called included, and with an encoder that keeps no running statistics: those of batch normalisation change in the forward pass."
    batches = [{k: torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(2*i + j)) for j, k in enumerate(("degraded", "clean"))} for i in range(6)]
    make = lambda: torch.manual_seed(0) and small(unused=True, encoder=dict(width=2, code_dim=6, norm="layer"))
    assert contract(Supervised, nets=[make], batches=batches, processes=False)


# --- refused

@pytest.mark.parametrize("options, message", [
    (dict(sizes=[4, 4, 2]), r"ConStyleMAXIM: sizes.*\[4, 4, 2\]"), (dict(sizes=[4, 4, 2, 0]), r"sizes.* 0\]"), (dict(bottlenecks=0), "bottlenecks.* 0 and 1"),
    (dict(groups=0), "groups.* 1 and 0"), (dict(dim=6), "ConStyleMAXIM: dim .* 6$"), (dict(dim=0), ": dim .* 0$"), (dict(dim=-4), ": dim .* -4"), (dict(use=("colour",)), ": use .*colour"),
    (dict(encoder=dict(norm="group")), "norm .*'group'")])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message): small(**options)


def test_bad_images():
    net = small()
    with pytest.raises(ValueError, match=r"image.*\(B, 3,.*\(2, 1, 16, 16\)"): net(torch.rand(2, 1, 16, 16))
    with pytest.raises(ValueError, match="batch.*norm='layer'"): net.train()(torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match="feature map.*encode"): net.eval().restore(torch.rand(1, 3, 32, 32), net.encode(torch.rand(1, 3, 16, 16)))
