"""KBNet under ConStyle: counts, kernel mixing against explicit loops, gradients without a backward pass of its own, and what must be refused."""
import copy
import itertools
import pickle
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from irnb.networks import ConStyleKBNet, ConStyleNAFNet, build, count_parameters, load_model, networks, save_model
from irnb.networks.kbnet import KBBlock, kernel_basis_attention
from irnb.networks.nafnet import LocalAverage, local_pooling
from irnb.strategies import Supervised
from irnb.strategies.strategy import contract
from tests.nets import awake

F64 = torch.float64


def small(**options) -> ConStyleKBNet:
    "Three bases, one block a site."
    return ConStyleKBNet(**{**dict(dim=4, left=[1, 1, 1], bottom=1, right=[1, 1, 1], bases=3, encoder=dict(width=2, code_dim=6)), **options})


# --- counts, names, cost

@pytest.mark.parametrize("preset, count, gmacs", [("paper", 7_094_128, 16.32), ("v2", 5_074_928, 11.33)])
def test_published_counts_and_costs(preset, count, gmacs):
    "The published cost has 36 c multiplications per pixel and block more, since it applies a kernel to each pixel."
    with torch.device("meta"): net, plain, x = build("ConStyleKBNet", preset=preset).eval(), build("ConStyleKBNet", preset=preset, conditioned=False), torch.rand(1, 3, 128, 128)
    assert count_parameters(net) == count and count_parameters(net.ConStyle) == 1_190_832 and "ConStyleKBNet" in networks()
    adapters, wider, copied = 128*128 + 128 + 32*(32 + 64 + 128), 9*8*(32 + 64 + 96), 128*96
    assert count_parameters(plain) == count - 1_190_832 - adapters + wider - copied
    with FlopCounterMode(display=False) as whole, torch.no_grad(): net(x)
    with FlopCounterMode(display=False) as encoder, torch.no_grad(): net.encode(x)
    sizes = {"l1": 128, "l2": 64, "l3": 32, "bottom": 16, "r3": 32, "r2": 64, "r1": 128}
    applied = sum(36 * b.b.shape[-1] * side**2 for site, side in sizes.items() for b in net.get_submodule(f"Process_Module_{site}"))
    assert round((whole.get_total_flops() - encoder.get_total_flops()) / 2e9 + applied / 1e9, 2) == gmacs


def test_default_is_the_first_release():
    with torch.device("meta"): net = ConStyleKBNet()
    assert count_parameters(net) == 7_094_128 and all(b.lean for b in net.modules() if isinstance(b, KBBlock))
    blocks = [(len(m), m[0].b.shape) for m in (net.get_submodule(f"Process_Module_{s}") for s in ("l1", "l2", "l3", "bottom", "r3", "r2", "r1"))]
    assert blocks == [(n, (1, 32, c)) for n, c in zip((3, 3, 4, 4, 4, 3, 3), (32, 64, 96, 128, 128, 96, 64))]


@pytest.mark.parametrize("c, bases, inner", [(4, 3, 4), (8, 32, 8), (24, 5, 24), (32, 32, 32), (36, 2, 18), (48, 32, 24), (64, 32, 32), (96, 32, 32), (128, 8, 32)])
def test_count_of_a_block(c, bases, inner):
    "Term by term; 7 c^2 + 1350 c + 640 for 32 bases and widths that 32 divides."
    basis, selection = bases*37*c, 9*c + inner + inner//2*bases + bases + c*bases + bases
    branches = (c*c + c + 10*c) + (c*c + c + 101*c) + (c*c + c)
    expected = bases + 3*c + 4*c + basis + selection + branches + (c*c + c) + (2*c*c + 2*c) + (c*c + c)
    assert count_parameters(KBBlock(c, bases)) == expected
    if inner == 32 and bases == 32: assert expected == 7*c*c + 1350*c + 640


def test_names():
    with torch.device("meta"): shapes = {k: tuple(v.shape) for k, v in ConStyleKBNet().state_dict().items()}
    p = "Process_Module_l2.0."
    for key, shape in {p + "attgamma": (1, 32, 1, 1), p + "ga1": (1, 64, 1, 1), p + "beta": (1, 64, 1, 1), p + "gamma": (1, 64, 1, 1), p + "w": (1, 32, 64*36), p + "b": (1, 32, 64),
                       "Preprocess_Module.0.bias": (32,), "Finetune_Module.0.weight": (3, 64, 3, 3), "local_fusion.weight": (96, 256, 1, 1), "AffineTransform1.0.weight": (32, 64, 1, 1)}.items():
        assert shapes[key] == shape, key
    assert "Finetune_Module.0.bias" not in shapes and "local_fusion.bias" not in shapes


# --- mixing against explicit loops

def slow_mixing(x, a, w, b):
    "For each pixel its kernel, c/4 groups of 4 outputs by 4 inputs by 9 taps, and then its value."
    batch, c, h, wd = x.shape
    padded, y = F.pad(x, (1, 1, 1, 1)), torch.zeros_like(x)
    for n, i, j in itertools.product(range(batch), range(h), range(wd)):
        kernel = sum(a[n, k, i, j] * w[0, k] for k in range(w.shape[1])).view(c // 4, 4, 4, 9)
        bias = sum(a[n, k, i, j] * b[0, k] for k in range(w.shape[1]))
        for g, o in itertools.product(range(c // 4), range(4)):
            total = bias[4*g + o]
            for s, tap in itertools.product(range(4), range(9)):
                total = total + kernel[g, o, s, tap] * padded[n, 4*g + s, i + tap // 3, j + tap % 3]
            y[n, 4*g + o, i, j] = total
    return y


def basis(c=12, n=3, size=(3, 4), batch=2, requires_grad=False):
    g = torch.Generator().manual_seed(0)
    shapes = (batch, c, *size), (batch, n, *size), (1, n, 36*c), (1, n, c)
    return [torch.randn(s, generator=g, dtype=F64).requires_grad_(requires_grad) for s in shapes]


@torch.no_grad()
@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("c", [4, 8, 12])
def test_mixing_equals_explicit_loops(lean, c):
    inputs = basis(c)
    torch.testing.assert_close(kernel_basis_attention(*inputs, lean=lean), slow_mixing(*inputs), rtol=0, atol=1e-11)


def test_gradients_are_those_of_the_loops():
    "Of first order, lean or not; no hand-written backward pass exists."
    inputs = basis(8, 2, (2, 3), requires_grad=True)
    v = torch.randn(2, 8, 2, 3, dtype=F64)
    expected = torch.autograd.grad((slow_mixing(*inputs) * v).sum(), inputs)
    for lean in (True, False):
        for p, q in zip(torch.autograd.grad((kernel_basis_attention(*inputs, lean=lean) * v).sum(), inputs), expected):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-10)


@pytest.mark.parametrize("lean", [True, False])
def test_double_backward_is_exact(lean):
    inputs = basis(4, 2, (2, 2), 1, True)
    f = lambda x, a, w, b: kernel_basis_attention(x, a, w, b, lean=lean).square()
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def kept(call) -> int:
    "Numbers kept for the backward pass, inputs included."
    seen = {}
    def note(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t): y = call()
    return sum(seen.values()) + 0 * y.numel()


def test_lean_keeps_little():
    inputs = [torch.randn(s, requires_grad=True) for s in ((1, 32, 16, 16), (1, 32, 16, 16), (1, 32, 36*32), (1, 32, 32))]
    own = sum(t.numel() for t in inputs)
    assert kept(lambda: kernel_basis_attention(*inputs, lean=True)) <= own
    assert kept(lambda: kernel_basis_attention(*inputs, lean=False)) > 32 * inputs[0].numel()
    net, full, x = small(dim=16, bases=32), small(dim=16, bases=32, lean=False), torch.rand(2, 3, 32, 32)
    assert kept(lambda: net(x)) * 2 < kept(lambda: full(x))


@torch.no_grad()
def test_one_kernel_is_a_convolution_and_mixing_is_linear():
    x, a, w, b = basis()
    one = torch.zeros_like(a); one[:, 1] = 1
    torch.testing.assert_close(kernel_basis_attention(x, one, w, b), F.conv2d(x, w[0, 1].view(12, 4, 3, 3), b[0, 1], padding=1, groups=3))
    y = lambda p: kernel_basis_attention(x, p, w, b)
    torch.testing.assert_close(y(a - 2*one), y(a) - 2*y(one), rtol=0, atol=1e-11)
    order = [2, 0, 1]
    torch.testing.assert_close(kernel_basis_attention(x, a[:, order], w[:, order], b[:, order]), y(a), rtol=0, atol=1e-11)


def slow_block(block, x):
    "The formulas of the specification, step by step."
    norm = lambda m, v: F.layer_norm(v.permute(0, 2, 3, 1), m.weight.shape, m.weight, m.bias, 1e-6).permute(0, 3, 1, 2)
    gated = lambda v: v[:, :v.shape[1]//2] * v[:, v.shape[1]//2:]
    conv = lambda m, v, groups=1: F.conv2d(v, m.weight, m.bias, padding=m.weight.shape[-1] // 2, groups=groups)
    c, n = x.shape[1], block.select1.out_channels
    u = norm(block.norm1, x)
    a = block.attgamma * conv(block.select2, gated(conv(block.select1, u, n))) + conv(block.select0, u)
    t = conv(block.value[1], conv(block.value[0], u), c)
    y = block.ga1 * slow_mixing(t, a, block.w, block.b) + t
    y = y * conv(block.local[1], conv(block.local[0], u), c // 4) * conv(block.channel[1], u.mean((2, 3), keepdim=True))
    y = x + block.beta * conv(block.conv3, y)
    return y + block.gamma * conv(block.conv5, gated(conv(block.conv4, norm(block.norm2, y))))


@torch.no_grad()
@pytest.mark.parametrize("lean", [True, False])
def test_block_equals_a_slow_reference(lean):
    block = awake(KBBlock(8, 3, lean).double(), 0.6)
    x = torch.randn(2, 8, 4, 5, dtype=F64)
    torch.testing.assert_close(block(x), slow_block(block, x), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_fresh_values():
    torch.manual_seed(0)
    block = KBBlock(32)
    assert all((getattr(block, name) == 0.01).all() for name in ("attgamma", "ga1", "beta", "gamma")) and (block.b == 0).all()
    assert block.w.abs().max() <= 1/6 and abs(float(block.w.std()) - 1/6/3**0.5) < 1e-3 and block.norm1.eps == block.norm2.eps == 1e-6


@torch.no_grad()
def test_graph_by_hand():
    "The whole network in float64: padding, encoder, adapters, fusion, skips and order, first and last convolution."
    net = awake(small().double(), 0.5).eval()
    x = torch.rand(2, 3, 7, 12, dtype=F64)
    p = F.pad(x, (0, 4, 0, 1), mode="reflect")
    (_, code), feats = net.ConStyle.encoder_q(p)
    lrelu = lambda v: torch.where(v > 0, v, 0.1 * v)
    told = [lrelu(F.conv2d(f, net.get_submodule(f"AffineTransform{k}")[0].weight)) for k, f in enumerate(feats)]
    y, skips = F.conv2d(p, net.Preprocess_Module[0].weight, net.Preprocess_Module[0].bias, padding=1), []
    for k in (1, 2, 3):
        skips.append(slow_block(net.get_submodule(f"Process_Module_l{k}")[0], y))
        y = torch.cat([F.pixel_unshuffle(F.conv2d(skips[-1], net.get_submodule(f"DC{k}").down[0].weight, padding=1), 2), told[k - 1]], 1)
    y = slow_block(net.Process_Module_bottom[0], y)
    g = code @ net.mlp[0].weight.T + net.mlp[0].bias
    y = F.conv2d(torch.cat([y, g[:, :, None, None] * y], 1), net.local_fusion.weight)
    for k in (3, 2, 1):
        up = net.get_submodule(f"UC{k}")
        y = F.conv2d(torch.cat([F.pixel_shuffle(F.conv2d(y, up.up[0].weight, padding=1), 2), skips[k - 1]], 1), up.down.weight)
        y = slow_block(net.get_submodule(f"Process_Module_r{k}")[0], y)
    out = p + F.conv2d(y, net.Finetune_Module[0].weight, padding=1)
    torch.testing.assert_close(net(x), out[..., :7, :12], rtol=1e-8, atol=1e-8)


# --- sizes, batches, modes

@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (1, 20), (7, 5), (16, 24), (33, 18)])
def test_any_size(size):
    net, x = awake(build("ConStyleKBNet", preset="tiny"), 0.1).eval(), torch.rand(2, 3, *size)
    before = x.clone()
    y = net(x)
    assert y.shape == x.shape and torch.equal(x, before) and y.isfinite().all() and net.multiple == 8
    assert torch.equal(net.restore(x, net.encode(x)), y)
    torch.testing.assert_close(y, torch.cat([net(image[None]) for image in x]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("conditioned", [True, False])
def test_black_and_white(value, conditioned):
    net, x = build("ConStyleKBNet", preset="tiny", conditioned=conditioned), torch.full((2, 3, 16, 16), value)
    net(x).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    with torch.no_grad(): assert net.eval()(x).isfinite().all()


# --- gradients, controls, copies, files, the contract

@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("conditioned", [True, False])
def test_gradients_reach_every_parameter(conditioned, lean):
    net = awake(small(conditioned=conditioned, lean=lean), 0.5)
    net(torch.rand(3, 3, 16, 16)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in net.parameters())


def test_fresh_networks_have_gradients_everywhere():
    "No scale is zero, but three of 0.01 stand before the short path to the proportions: it starts slowly."
    torch.manual_seed(0)
    net = small(encoder=dict(width=2, code_dim=6, norm="layer"))
    net(torch.rand(3, 3, 16, 16)).square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())
    slow, straight = (float(net.Process_Module_r1[0].get_parameter(n).grad.norm()) for n in ("select2.weight", "select0.weight"))
    assert slow < 0.05 * straight


def test_lean_changes_nothing_but_memory():
    layer = dict(encoder=dict(width=2, code_dim=6, norm="layer"))                      # a bias before batch normalisation has no gradient but noise
    net = awake(small(**layer).double(), 0.4)
    other = small(lean=False, **layer).double()
    other.load_state_dict(net.state_dict())
    x, grads = torch.rand(3, 3, 16, 16, dtype=F64), []
    for n in (net, other):
        n(x).square().mean().backward()
        grads.append([p.grad for p in n.parameters()])
    torch.testing.assert_close(net.eval()(x), other.eval()(x))
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-9)


@torch.no_grad()
def test_controls():
    x = torch.rand(2, 3, 16, 16)
    net = awake(small(), 0.5).eval()
    assert not torch.allclose(net.restore(x, net.encode(x.flip(0))), net(x))
    for use, deaf in [(("features",), "codes"), (("code",), "feats")]:
        net = awake(small(use=use), 0.4).eval()
        cond = net.encode(x)
        assert torch.equal(net.restore(x, cond._replace(**{deaf: tuple(t + 1 for t in getattr(cond, deaf))})), net.restore(x, cond))
    plain = small(conditioned=False)
    assert not any("ConStyle" in k or "Affine" in k for k in plain.state_dict()) and plain(x).shape == x.shape and plain.Process_Module_bottom[0].b.shape[-1] == 16
    with pytest.raises(ValueError, match="ConStyleKBNet: conditioned=False"): plain.encode(x)


@torch.no_grad()
def test_local_pooling_finds_the_averages():
    net = awake(small(conditioned=False), 0.3).eval()
    local = local_pooling(net, 16)
    assert sum(isinstance(m, LocalAverage) for m in local.modules()) == 7
    x = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(local(x), net(x))
    assert not torch.allclose(local(torch.rand(1, 3, 64, 64)), net(torch.rand(1, 3, 64, 64)))


@pytest.mark.parametrize("config", [dict(), dict(conditioned=False, channels=1, encoder=None), dict(bases=7, left=[1, 2, 1], right=[3, 1, 1]), dict(encoder=dict(width=3, code_dim=5, norm="none"))], ids=str)
def test_options_are_read_off_a_state_dict(config):
    net = small(**config)
    found = ConStyleKBNet.options_from_state_dict(net.state_dict())
    again = ConStyleKBNet(**found)
    again.load_state_dict(net.state_dict())
    x = torch.rand(1, net.channels, 10, 17)
    with torch.no_grad(): assert torch.equal(again.eval()(x), net.eval()(x))
    assert found["bases"] == config.get("bases", 3) and found["right"] == config.get("right", [1, 1, 1])


def test_other_networks_are_not_recognised():
    for name in ("NAFNet", "SwinIR", "ConStyleNAFNet", "ConStyleUformer"):
        with pytest.raises(ValueError, match="ConStyleKBNet: the weights"): ConStyleKBNet.options_from_state_dict(build(name, preset="tiny").state_dict())
    with pytest.raises(ValueError, match="ConStyleNAFNet: .*blocks"): ConStyleNAFNet.options_from_state_dict(small().state_dict())


def test_modes_copies_precisions_and_files(tmp_path):
    net, x = awake(small(), 0.1).eval(), torch.rand(2, 3, 9, 20)
    y = net(x)
    assert y.requires_grad
    assert torch.equal(copy.deepcopy(net)(x), y) and torch.equal(pickle.loads(pickle.dumps(net))(x), y)
    with torch.no_grad(): assert torch.equal(net(x), y)
    net.train()
    with torch.autocast("cpu", torch.bfloat16): loss = net(x).float().square().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    tiny = build("ConStyleKBNet", preset="tiny").eval()
    save_model(tmp_path / "m.safetensors", tiny, {"network": {"name": "ConStyleKBNet", "options": {"preset": "tiny"}}})
    assert torch.equal(load_model(tmp_path / "m.safetensors")[0](x), tiny(x))
    assert tiny.double()(x.double()).dtype == F64


def test_nothing_is_drawn():
    net, x, state = small().train(), torch.rand(2, 3, 8, 8), torch.get_rng_state()
    net(x).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_trains_under_the_contract():
    "With an encoder that keeps no running statistics: those of batch normalisation change in the forward pass."
    batches = [{k: torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(2*i + j)) for j, k in enumerate(("degraded", "clean"))} for i in range(6)]
    make = lambda: torch.manual_seed(0) and small(encoder=dict(width=2, code_dim=6, norm="layer"))
    assert contract(Supervised, nets=[make], batches=batches, processes=False)


# --- refused

@pytest.mark.parametrize("options, message", [
    (dict(bases=0), "ConStyleKBNet: bases.* 0$"), (dict(dim=6), "ConStyleKBNet: dim .* 6$"), (dict(dim=0), ": dim .* 0$"), (dict(dim=-4), ": dim .* -4"),
    (dict(left=[1, 1]), r"left.*\[1, 1\]"), (dict(bottom=-1), "counts.* -1,"), (dict(use=("colour",)), ": use .*colour"), (dict(encoder=dict(norm="group")), "norm .*'group'")])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message): small(**options)


def test_bad_blocks_and_images():
    for c, bases in [(6, 3), (0, 3), (2, 3), (8, 0)]:
        with pytest.raises(ValueError, match=f"channels.*bases.* {c} and {bases}$"): KBBlock(c, bases)
    with pytest.raises(ValueError, match=r"image.*\(B, 3,.*\(2, 1, 16, 16\)"): small()(torch.rand(2, 1, 16, 16))
    with pytest.raises(ValueError, match="batch.*norm='layer'"): small().train()(torch.rand(1, 3, 16, 16))
