"""Uformer under ConStyle: counts, the block against slow references, the graph by hand, any size, and what must be refused."""
import copy
import itertools
import math
import pickle
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from irnb.networks import ConStyleNAFNet, ConStyleUformer, build, count_parameters, load_model, networks, save_model
from irnb.networks.uformer import LeFF, UformerBlock, _drop_rates
from irnb.strategies import Supervised
from irnb.strategies.strategy import contract
from tests.nets import awake

F64 = torch.float64
SITES = ("l1", "l2", "l3", "bottom", "r3", "r2", "r1")


def small(**options) -> ConStyleUformer:
    "Windows of 2 px, two blocks at most."
    return ConStyleUformer(**{**dict(dim=4, left=[2, 1, 1], bottom=2, right=[1, 1, 2], heads=[1, 2, 2, 4, 4, 2, 2], window=2, ratio=2.0, drop_path=0.0,
                                     encoder=dict(width=2, code_dim=6)), **options})


# --- counts, names, cost

def test_published_count_and_cost():
    with torch.device("meta"): net, plain = ConStyleUformer().eval(), ConStyleUformer(conditioned=False)
    assert count_parameters(net) == 4_142_893 and count_parameters(net.ConStyle) == 1_190_832
    assert count_parameters(build("ConStyleUformer", preset="paper")) == 4_142_893 and "ConStyleUformer" in networks()
    # Without the encoder: its adapters, 32 channels of each concatenation and the scaled copy at the bottom go; the down-convolutions make up the widths.
    adapters, wider, copied = 128*128 + 128 + 32*(32 + 64 + 128), 9*8*(32 + 64 + 96), 128*96
    assert count_parameters(plain) == 4_142_893 - 1_190_832 - adapters + wider - copied
    x = torch.rand(1, 3, 128, 128, device="meta")
    with FlopCounterMode(display=False) as whole, torch.no_grad(): net(x)
    with FlopCounterMode(display=False) as encoder, torch.no_grad(): net.encode(x)
    assert round((whole.get_total_flops() - encoder.get_total_flops()) / 2e9, 2) == 7.30 and round(encoder.get_total_flops() / 2e9, 2) == 0.35


@pytest.mark.parametrize("c, h, window, ratio", [(8, 2, 4, 4.0), (12, 3, 2, 2.0), (6, 1, 3, 1.5)])
def test_count_of_a_block(c, h, window, ratio):
    hidden = int(c * ratio)
    expected = 4*c + (2*window - 1)**2 * h + 4*c*c + 4*c + 2*c*hidden + hidden + 10*hidden + c
    assert count_parameters(UformerBlock(c, h, window, ratio=ratio)) == expected
    assert count_parameters(UformerBlock(c, h, window, ratio=ratio, modulated=True)) == expected + window**2 * c


def test_names_outside_the_blocks():
    "Those of the specification, in its order."
    with torch.device("meta"): state = ConStyleUformer().state_dict()
    tops = list(dict.fromkeys(k.split(".")[0] for k in state))
    assert tops == ["ConStyle", "Preprocess_Module", "Process_Module_l1", "DC1", "Process_Module_l2", "DC2", "Process_Module_l3", "DC3", "Process_Module_bottom", "local_fusion",
                    "UC3", "Process_Module_r3", "UC2", "Process_Module_r2", "UC1", "Process_Module_r1", "Finetune_Module", "mlp", "AffineTransform2", "AffineTransform1", "AffineTransform0"]
    shapes = {k: tuple(v.shape) for k, v in state.items()}
    for key, shape in {"ConStyle.encoder_q.stage1.0.0.weight": (16, 3, 3, 3), "Preprocess_Module.0.weight": (32, 3, 3, 3), "Preprocess_Module.0.bias": (32,), "local_fusion.fusion.weight": (96, 256, 1, 1),
                       "DC3.down.0.weight": (24, 96, 3, 3), "UC2.up.0.weight": (512, 128, 3, 3), "UC2.down.weight": (96, 192, 1, 1), "Finetune_Module.0.weight": (3, 64, 3, 3),
                       "Finetune_Module.0.bias": (3,), "mlp.0.bias": (128,), "AffineTransform2.0.weight": (32, 128, 1, 1), "Process_Module_r3.1.modulator.weight": (64, 128)}.items():
        assert shapes[key] == shape, key
    assert "DC1.down.0.bias" not in shapes and "UC1.up.0.bias" not in shapes and "local_fusion.fusion.bias" not in shapes


def test_settings_of_the_blocks():
    with torch.device("meta"): net = ConStyleUformer()
    for site, heads, width in zip(SITES, (1, 2, 4, 8, 8, 4, 2), (32, 64, 96, 128, 128, 96, 64)):
        blocks = list(net.get_submodule(f"Process_Module_{site}"))
        assert [b.shift for b in blocks] == [0, 4] and all(b.window == 8 and b.attn.num_heads == heads and b.norm1.normalized_shape == (width,) for b in blocks)
        assert all((b.modulator is not None) == (site[0] == "r") and b.mlp.linear1.out_features == 4 * width for b in blocks)
    assert isinstance(net.Preprocess_Module[1], nn.LeakyReLU) and net.Preprocess_Module[1].negative_slope == 0.01


def test_drop_rates():
    assert _drop_rates([2, 2, 2], 1, [1, 1, 1], 0.1) == {**{s: pytest.approx(r) for s, r in zip(("l1", "l2", "l3"), ([0, .02], [.04, .06], [.08, .1]))}, "bottom": [.1],
                                                         "r3": pytest.approx([.1]), "r2": pytest.approx([.05]), "r1": pytest.approx([0])}
    with torch.device("meta"): net = ConStyleUformer()
    rates = [b.drop_path for site in SITES for b in net.get_submodule(f"Process_Module_{site}")]
    assert max(rates) == pytest.approx(0.1) and rates == pytest.approx(rates[::-1]) and rates[6:8] == pytest.approx([.1, .1]) and rates[0] == 0
    assert all(b.drop_path == 0 for b in build("ConStyleUformer", preset="tiny").modules() if isinstance(b, UformerBlock))


# --- the block against slow references

def slow_attention(layer, tokens, allowed):
    "One window, token by token and head by head; `allowed(a, b)` says who may talk."
    n, dim = tokens.shape
    side, d = math.isqrt(n), dim // layer.num_heads
    qkv = tokens @ layer.qkv.weight.T + layer.qkv.bias
    out = torch.zeros_like(tokens)
    for h, a in itertools.product(range(layer.num_heads), range(n)):
        q, k, v = (qkv[:, part*dim + h*d:part*dim + (h + 1)*d] for part in range(3))
        logits = torch.full((n,), -math.inf, dtype=F64)
        for b in range(n):
            dr, dc = a // side - b // side, a % side - b % side
            if allowed(a, b): logits[b] = q[a] @ k[b] / d**0.5 + layer.relative_position_bias_table[(dr + side - 1)*(2*side - 1) + dc + side - 1, h]
        out[a, h*d:(h + 1)*d] = logits.softmax(0) @ v
    return out @ layer.proj.weight.T + layer.proj.bias


def slow_leff(layer, x):
    "Pixel by pixel."
    gelu = lambda v: 0.5 * v * (1 + torch.erf(v / 2**0.5))
    b, h, w, _ = x.shape
    y = gelu(x @ layer.linear1.weight.T + layer.linear1.bias)
    z = layer.dwconv.bias.expand_as(y).clone()
    for i, j, p, q in itertools.product(range(h), range(w), (-1, 0, 1), (-1, 0, 1)):
        if 0 <= i + p < h and 0 <= j + q < w: z[:, i, j] += y[:, i + p, j + q] * layer.dwconv.weight[:, 0, p + 1, q + 1]
    return gelu(z) @ layer.linear2.weight.T + layer.linear2.bias


def slow_block(block, x):
    "Window by window in the unrolled picture: those cut by the border are smaller, and nothing wraps round."
    x = x.permute(0, 2, 3, 1)
    b, h, w, c = x.shape
    s, n = block.shift, block.window
    y, normed = torch.zeros_like(x), F.layer_norm(x, (c,), block.norm1.weight, block.norm1.bias, 1e-5)
    for image, top, left in itertools.product(range(b), range(s - n if s else 0, h, n), range(s - n if s else 0, w, n)):
        tokens, inside = torch.zeros(n * n, c, dtype=x.dtype), []
        for k, (i, j) in enumerate(itertools.product(range(top, top + n), range(left, left + n))):
            if 0 <= i < h and 0 <= j < w: tokens[k] = normed[image, i, j]; inside.append((k, i, j))
        if block.modulator is not None: tokens = tokens + block.modulator.weight
        member = {k for k, _, _ in inside}
        attended = slow_attention(block.attn, tokens, lambda p, q: q in member)
        for k, i, j in inside: y[image, i, j] = attended[k]
    x = x + y
    return (x + slow_leff(block.mlp, F.layer_norm(x, (c,), block.norm2.weight, block.norm2.bias, 1e-5))).permute(0, 3, 1, 2)


@torch.no_grad()
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("shift", [0, 1, 2])
def test_block_equals_a_slow_reference(shift, modulated):
    block = awake(UformerBlock(4, 2, 4, shift, 2.0, modulated).double(), 0.5)
    x = torch.randn(2, 4, 8, 4, dtype=F64)
    torch.testing.assert_close(block(x), slow_block(block, x), rtol=0, atol=1e-11)


@torch.no_grad()
def test_perceptron_equals_a_slow_reference():
    layer, x = awake(LeFF(3, 7).double(), 0.6), torch.randn(2, 4, 5, 3, dtype=F64)
    torch.testing.assert_close(layer(x), slow_leff(layer, x), rtol=0, atol=1e-12)


@torch.no_grad()
def test_modulator_is_the_same_in_every_window():
    "On a map that repeats with the windows the result repeats; without the modulator a constant map stays constant inside."
    block = awake(UformerBlock(4, 2, 4, 0, 2.0, True).double(), 0.5)
    x = torch.randn(1, 4, 4, 4, dtype=F64).repeat(1, 1, 4, 4)
    y = block(x)
    torch.testing.assert_close(y[..., 4:8, 4:8], y[..., 8:12, 4:8], rtol=0, atol=1e-12)
    flat = torch.randn(1, 4, 1, 1, dtype=F64).expand(1, 4, 12, 12)
    assert block(flat)[..., 4:8, 4:8].std((2, 3)).min() > 1e-3
    block.modulator = None
    assert block(flat)[..., 4:8, 4:8].std((2, 3)).max() < 1e-12


@torch.no_grad()
def test_graph_by_hand():
    "The whole network in float64: padding, encoder, adapters, fusion, skips and order, first and last convolution."
    net = awake(small().double(), 0.35).eval()
    x = torch.rand(2, 3, 19, 30, dtype=F64)
    p = F.pad(x, (0, 2, 0, 13), mode="reflect")
    (_, code), feats = net.ConStyle.encoder_q(p)
    lrelu = lambda v, s: torch.where(v > 0, v, s * v)
    told = [lrelu(F.conv2d(f, net.get_submodule(f"AffineTransform{k}")[0].weight), 0.1) for k, f in enumerate(feats)]
    y = lrelu(F.conv2d(p, net.Preprocess_Module[0].weight, net.Preprocess_Module[0].bias, padding=1), 0.01)
    skips = []
    for k in (1, 2, 3):
        for block in net.get_submodule(f"Process_Module_l{k}"): y = slow_block(block, y)
        skips.append(y)
        y = torch.cat([F.pixel_unshuffle(F.conv2d(y, net.get_submodule(f"DC{k}").down[0].weight, padding=1), 2), told[k - 1]], 1)
    for block in net.Process_Module_bottom: y = slow_block(block, y)
    g = code @ net.mlp[0].weight.T + net.mlp[0].bias
    y = F.conv2d(torch.cat([y, g[:, :, None, None] * y], 1), net.local_fusion.fusion.weight)
    for k in (3, 2, 1):
        up = net.get_submodule(f"UC{k}")
        y = F.conv2d(torch.cat([F.pixel_shuffle(F.conv2d(y, up.up[0].weight, padding=1), 2), skips[k - 1]], 1), up.down.weight)
        for block in net.get_submodule(f"Process_Module_r{k}"): y = slow_block(block, y)
    out = p + F.conv2d(y, net.Finetune_Module[0].weight, net.Finetune_Module[0].bias, padding=1)
    torch.testing.assert_close(net(x), out[..., :19, :30], rtol=1e-9, atol=1e-9)


# --- sizes, batches, modes

@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (7, 5), (32, 32), (33, 64), (31, 70)])
def test_any_size(size):
    net, x = awake(build("ConStyleUformer", preset="tiny"), 0.1).eval(), torch.rand(2, 3, *size)
    before = x.clone()
    y = net(x)
    assert y.shape == x.shape and torch.equal(x, before) and y.isfinite().all() and net.multiple == 32 and ConStyleUformer(dim=4, heads=[1]*7).multiple == 64
    assert torch.equal(net.restore(x, net.encode(x)), y)
    torch.testing.assert_close(y, torch.cat([net(image[None]) for image in x]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padding_is_reflection_and_nothing_at_a_multiple():
    net = awake(small().double()).eval()
    x = torch.rand(1, 3, 20, 32, dtype=F64)
    torch.testing.assert_close(net(x), net(F.pad(x, (0, 0, 0, 12), mode="reflect"))[..., :20, :])
    assert not torch.equal(net(x), net(F.pad(x, (0, 0, 0, 12)))[..., :20, :])
    assert torch.equal(net(F.pad(x, (0, 0, 0, 12))), net._graph(F.pad(x, (0, 0, 0, 12)), net.encode(F.pad(x, (0, 0, 0, 12)))))


@torch.no_grad()
@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("conditioned", [True, False])
def test_black_and_white(value, conditioned):
    net, x = build("ConStyleUformer", preset="tiny", conditioned=conditioned), torch.full((2, 3, 32, 32), value)
    assert net.train()(x).isfinite().all() and net.eval()(x).isfinite().all()


def test_stochastic_depth():
    block = awake(UformerBlock(4, 2, 4, 2, 2.0, True, drop_path=0.5).double())
    x = torch.randn(1, 4, 8, 4, dtype=F64).expand(400, -1, -1, -1)
    torch.manual_seed(0)
    with torch.no_grad(): outcomes = ((block.train()(x) - x)**2).flatten(1).sum(1).round(decimals=9).unique()
    assert len(outcomes) == 4 and outcomes[0] == 0                                     # each branch of each sample: in or out
    assert torch.equal(block.eval()(x), block(x))
    net = awake(small(drop_path=0.5, encoder=dict(width=2, code_dim=6, norm="none")), 0.3).train()
    image = torch.rand(2, 3, 16, 16)
    assert not torch.equal(net(image), net(image)) and torch.equal(net.eval()(image), net(image))


def test_without_drop_path_nothing_is_drawn():
    net, x, state = build("ConStyleUformer", preset="tiny").train(), torch.rand(2, 3, 32, 32), torch.get_rng_state()
    net(x)
    assert torch.equal(torch.get_rng_state(), state)


# --- gradients, controls, copies, files, the contract

@pytest.mark.parametrize("conditioned", [True, False])
def test_gradients_reach_every_parameter(conditioned):
    net = awake(small(conditioned=conditioned), 0.5)
    net(torch.rand(3, 3, 32, 32)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in net.parameters())


def test_double_backward_is_exact():
    block = awake(UformerBlock(2, 1, 2, 1, 1.0, True).double(), 0.6)
    x = torch.randn(1, 2, 4, 2, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(block, x) and torch.autograd.gradgradcheck(block, x)


@torch.no_grad()
def test_controls():
    x = torch.rand(2, 3, 16, 16)
    net = awake(small(), 0.4).eval()
    other = net.encode(x.flip(0))
    assert not torch.allclose(net.restore(x, other), net(x))
    for use, deaf in [(("features",), "codes"), (("code",), "feats")]:
        net = awake(small(use=use), 0.4).eval()
        cond = net.encode(x)
        changed = cond._replace(**{deaf: tuple(t + 1 for t in getattr(cond, deaf))})
        assert torch.equal(net.restore(x, changed), net.restore(x, cond))
    plain = small(conditioned=False)
    assert not any("ConStyle" in k or "Affine" in k for k in plain.state_dict()) and plain(x).shape == x.shape
    assert [type(m) for m in plain.Process_Module_r1] == [UformerBlock] * 2 and plain.Process_Module_bottom[0].norm1.normalized_shape == (16,)
    with pytest.raises(ValueError, match="ConStyleUformer: conditioned=False"): plain.encode(x)


@torch.no_grad()
def test_initial_weights():
    torch.manual_seed(0)
    block = UformerBlock(96, 6, modulated=True)
    for module in block.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)): assert abs(float(module.weight.std()) - 0.02) < 1e-3
        if isinstance(module, nn.Linear): assert module.bias.abs().max() == 0
    assert abs(float(block.attn.relative_position_bias_table.std()) - 0.02) < 2e-3 and block.norm1.eps == block.norm2.eps == 1e-5


@pytest.mark.parametrize("config", [dict(), dict(conditioned=False, channels=1, encoder=None), dict(heads=[2, 4, 3, 8, 2, 1, 4], window=3, ratio=1.7), dict(encoder=dict(width=3, code_dim=5, norm="none"))], ids=str)
def test_options_are_read_off_a_state_dict(config):
    net = small(**config)
    found = ConStyleUformer.options_from_state_dict(net.state_dict())
    again = ConStyleUformer(**found)
    again.load_state_dict(net.state_dict())
    x = torch.rand(1, net.channels, 10, 17)
    with torch.no_grad(): assert torch.equal(again.eval()(x), net.eval()(x))
    assert found["left"] == [2, 1, 1] and found["right"] == [1, 1, 2] and found["window"] == config.get("window", 2) and found["ratio"] == config.get("ratio", 2.0)


def test_other_networks_are_not_recognised():
    for name in ("NAFNet", "SwinIR", "ConStyleNAFNet", "ConStyleKBNet"):
        with pytest.raises(ValueError, match="ConStyleUformer: the weights"): ConStyleUformer.options_from_state_dict(build(name, preset="tiny").state_dict())
    with pytest.raises(ValueError, match="ConStyleUformer: .*site.*heads"): ConStyleUformer.options_from_state_dict(small(right=[1, 0, 1]).state_dict())
    with pytest.raises(ValueError, match="ConStyleNAFNet: the weights"): ConStyleNAFNet.options_from_state_dict(small().state_dict())


@torch.no_grad()
def test_modes_copies_precisions_and_files(tmp_path):
    net, x = awake(build("ConStyleUformer", preset="tiny"), 0.05).eval(), torch.rand(1, 3, 20, 35)
    y = net(x)
    assert torch.equal(copy.deepcopy(net)(x), y) and torch.equal(pickle.loads(pickle.dumps(net))(x), y)
    with torch.autocast("cpu", torch.bfloat16): assert (net(x).float() - y).abs().max() < 0.1
    save_model(tmp_path / "m.safetensors", net, {"network": {"name": "ConStyleUformer", "options": {"preset": "tiny"}}})
    assert torch.equal(load_model(tmp_path / "m.safetensors")[0](x), y)
    assert copy.deepcopy(net).double()(x.double()).dtype == F64


def test_trains_under_the_contract():
    "With an encoder that keeps no running statistics: those of batch normalisation change in the forward pass."
    batches = [{k: torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(2*i + j)) for j, k in enumerate(("degraded", "clean"))} for i in range(6)]
    make = lambda: torch.manual_seed(0) and small(left=[1, 1, 1], bottom=2, right=[1, 1, 1], encoder=dict(width=2, code_dim=6, norm="layer"))
    assert contract(Supervised, nets=[make], batches=batches, processes=False)


# --- refused

@pytest.mark.parametrize("options, message", [
    (dict(heads=[1, 2, 4]), r"heads.*\[1, 2, 4\]"), (dict(heads=[3, 2, 2, 4, 4, 2, 2]), r"heads.*\[4, 8, 12, 16, 16, 12, 8\].*\[3,"),
    (dict(heads=[1, 2, 2, 4, 4, 2, 0]), r"heads.* 0\]"), (dict(window=1), ": window.* 1$"), (dict(ratio=0), "ratio"), (dict(ratio=float("nan")), "ratio.* nan"),
    (dict(drop_path=1.0), "drop_path.* 1.0$"), (dict(drop_path=-0.1), "drop_path.* -0.1"), (dict(dim=6, heads=[1] * 7), "ConStyleUformer: dim .* 6$"), (dict(dim=-4, heads=[1] * 7), ": dim .* -4"),
    (dict(left=[1, 1]), r"left.*\[1, 1\]"), (dict(bottom=-1), "counts.* -1,"), (dict(use=("colour",)), ": use .*colour"), (dict(encoder=dict(norm="group")), "norm .*'group'")])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message): small(**options)


def test_bad_images():
    net = small()
    with pytest.raises(ValueError, match=r"image.*\(B, 3,.*\(2, 1, 16, 16\)"): net(torch.rand(2, 1, 16, 16))
    with pytest.raises(ValueError, match="batch.*norm='layer'"): net.train()(torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match="feature map.*encode"): net.eval().restore(torch.rand(1, 3, 32, 32), net.encode(torch.rand(1, 3, 16, 16)))
