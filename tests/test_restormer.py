"""Restormer: counts and names, both normalisations and the attention against slow references, any size, options read off weights, and what must be refused."""
import copy
import pickle
import warnings
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from irnb.networks import NAFNet, Restormer, RestormerBlock, build, count_parameters, load_model, receptive_radius, save_model
from irnb.networks.checkpoints import guess_network, load_weights
from irnb.networks.restormer import ChannelNorm, GatedFeedForward, TransposedAttention, blocks_in, factor_behind
from tests.nets import awake

F64 = torch.float64
TINY = dict(dim=4, num_blocks=[1, 2, 1, 1], num_refinement_blocks=1, heads=[1, 2, 4, 4])


def small(**options) -> Restormer:
    "A network of four channels, in double precision, with random weights."
    return awake(Restormer(**{**TINY, **options}).double(), 0.3).eval()


def shapes(net): return {k: tuple(v.shape) for k, v in net.state_dict().items()}


# --- counts and names

@pytest.mark.parametrize("preset, count", [("deblur", 26_126_644), ("denoise", 26_111_668), ("denoise_grey", 26_109_076), ("dual_pixel", 26_132_548)])
def test_published_counts(preset, count):
    with torch.device("meta"): net = build("Restormer", preset=preset)
    assert count_parameters(net) == count and not any(net.buffers())


def test_cost_of_the_published_network():
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad(): Restormer()(torch.empty(1, 3, 128, 128))
    assert counter.get_total_flops() / 2 == pytest.approx(38.72e9, abs=0.005e9)


def conv(name, o, i, k, bias): return {f"{name}.weight": (o, i, k, k), **({f"{name}.bias": (o,)} if bias else {})}


def block_names(p, c, heads, factor, bias, kind):
    h = int(c * factor)
    norm = lambda n: {f"{p}{n}.body.weight": (c,), **({f"{p}{n}.body.bias": (c,)} if kind == "WithBias" else {})}
    return {**norm("norm1"), f"{p}attn.temperature": (heads, 1, 1), **conv(f"{p}attn.qkv", 3*c, c, 1, bias), **conv(f"{p}attn.qkv_dwconv", 3*c, 1, 3, bias),
            **conv(f"{p}attn.project_out", c, c, 1, bias), **norm("norm2"), **conv(f"{p}ffn.project_in", 2*h, c, 1, bias), **conv(f"{p}ffn.dwconv", 2*h, 1, 3, bias),
            **conv(f"{p}ffn.project_out", c, h, 1, bias)}


def published_names(inp=3, out=3, dim=48, blocks=(4, 6, 6, 8), refinement=4, heads=(1, 2, 4, 8), factor=2.66, bias=False, kind="WithBias", dual=False):
    "Names, order and shapes as listed in the specification."
    chain = lambda name, c, h, n: {k: v for i in range(n) for k, v in block_names(f"{name}.{i}.", c, h, factor, bias, kind).items()}
    names = conv("patch_embed.proj", dim, inp, 3, False)
    for i in range(3):
        names |= chain(f"encoder_level{i+1}", dim * 2**i, heads[i], blocks[i]) | conv(f"down{i+1}_{i+2}.body.0", dim * 2**i // 2, dim * 2**i, 3, False)
    names |= chain("latent", 8*dim, heads[3], blocks[3])
    names |= conv("up4_3.body.0", 16*dim, 8*dim, 3, False) | conv("reduce_chan_level3", 4*dim, 8*dim, 1, bias) | chain("decoder_level3", 4*dim, heads[2], blocks[2])
    names |= conv("up3_2.body.0", 8*dim, 4*dim, 3, False) | conv("reduce_chan_level2", 2*dim, 4*dim, 1, bias) | chain("decoder_level2", 2*dim, heads[1], blocks[1])
    names |= conv("up2_1.body.0", 4*dim, 2*dim, 3, False) | chain("decoder_level1", 2*dim, heads[0], blocks[0]) | chain("refinement", 2*dim, heads[0], refinement)
    if dual: names |= conv("skip_conv", 2*dim, dim, 1, bias)
    return names | conv("output", out, 2*dim, 3, bias)


@pytest.mark.parametrize("options, expected", [({}, {}), (dict(LayerNorm_type="BiasFree"), dict(kind="BiasFree")), (dict(bias=True), dict(bias=True)),
                                               (dict(inp_channels=6, dual_pixel_task=True), dict(inp=6, dual=True)), (dict(inp_channels=6, dual_pixel_task=True, bias=True), dict(inp=6, dual=True, bias=True)),
                                               (dict(inp_channels=1, out_channels=1, ffn_expansion_factor=2.0), dict(inp=1, out=1, factor=2.0))])
def test_names_order_and_shapes(options, expected):
    with torch.device("meta"): found = shapes(Restormer(**options))
    wanted = published_names(**expected)
    assert found == wanted and list(found) == list(wanted)


def test_names_of_a_small_network():
    names = published_names(dim=4, blocks=TINY["num_blocks"], refinement=1, heads=TINY["heads"])
    assert shapes(small()) == names and list(shapes(small())) == list(names)


# --- parts against slow references

@given(c=st.integers(1, 7), shift=st.floats(-5, 5), scale=st.floats(0, 10))
@settings(max_examples=25, deadline=None)
def test_normalisations_by_loops(c, shift, scale):
    x = (scale * torch.randn(2, c, 2, 3, generator=torch.Generator().manual_seed(c), dtype=F64) + shift)
    for kind in ("WithBias", "BiasFree"):
        norm = awake(ChannelNorm(c, kind).double(), 1.0)
        for n, i, j in ((0, 0, 0), (1, 1, 2)):
            pixel, w = x[n, :, i, j].tolist(), norm.body.weight.tolist()
            mean = sum(pixel) / c
            var = sum((p - mean)**2 for p in pixel) / c
            if kind == "WithBias": expected = [(p - mean) / (var + 1e-5)**0.5 * a + b for p, a, b in zip(pixel, w, norm.body.bias.tolist())]
            else: expected = [p / (var + 1e-5)**0.5 * a for p, a in zip(pixel, w)]
            torch.testing.assert_close(norm(x)[n, :, i, j], torch.tensor(expected, dtype=F64))


def test_bias_free_variance_is_about_the_mean_and_the_mean_stays():
    x = torch.full((1, 4, 1, 1), 0.5, dtype=F64)
    torch.testing.assert_close(ChannelNorm(4, "BiasFree").double()(x), x / 1e-5**0.5)          # the mean square would give about 1
    assert ChannelNorm(4)(x.float()).abs().max() == 0
    y = torch.tensor([3.0, 5.0]).view(1, 2, 1, 1)
    assert torch.allclose(ChannelNorm(2, "BiasFree")(y), y) and torch.allclose(ChannelNorm(2)(y), torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1), atol=1e-4)


def attention_by_loops(attn: TransposedAttention, x: torch.Tensor) -> torch.Tensor:
    "The formula, one pair of channels at a time."
    b, c, h, w = x.shape
    mixed = torch.einsum("oc,bchw->bohw", attn.qkv.weight[:, :, 0, 0], x)
    padded, k = F.pad(mixed, (1, 1, 1, 1)), attn.qkv_dwconv.weight[:, 0]
    mixed = sum(k[None, :, i, j, None, None] * padded[:, :, i:i + h, j:j + w] for i in range(3) for j in range(3))
    q, key, v = mixed[:, :c], mixed[:, c:2*c], mixed[:, 2*c:]
    out, per = torch.zeros_like(x), c // attn.num_heads
    for n in range(b):
        for head in range(attn.num_heads):
            for i in range(per):
                row = head * per + i
                cosine = lambda r, s: (q[n, r] * key[n, s]).sum() / (q[n, r]**2).sum().sqrt() / (key[n, s]**2).sum().sqrt()
                logits = torch.stack([cosine(row, head * per + j) * attn.temperature[head, 0, 0] for j in range(per)])
                share = logits.exp() / logits.exp().sum()
                out[n, row] = sum(share[j] * v[n, head * per + j] for j in range(per))
    return torch.einsum("oc,bchw->bohw", attn.project_out.weight[:, :, 0, 0], out)


@pytest.mark.parametrize("c, heads, size", [(4, 1, (3, 5)), (6, 2, (4, 4)), (8, 4, (1, 7)), (3, 3, (2, 2))])
def test_attention_by_loops(c, heads, size):
    attn = awake(TransposedAttention(c, heads).double(), 1.0)
    x = torch.randn(2, c, *size, dtype=F64)
    torch.testing.assert_close(attn(x), attention_by_loops(attn, x))
    assert attn(x).std() > 0.01


def test_attention_does_not_care_for_the_scale_of_its_logits_input():
    attn = awake(TransposedAttention(4, 2).double(), 1.0)
    q, k = torch.randn(2, 1, 2, 2, 9, dtype=F64)
    torch.testing.assert_close(attn.weights(7 * q, k / 3), attn.weights(q, k))
    torch.testing.assert_close(attn.weights(q, k).sum(-1), torch.ones(1, 2, 2, dtype=F64))
    still = attn.weights(torch.zeros_like(q), k)                                               # nothing to compare: all alike, and finite
    torch.testing.assert_close(still, torch.full_like(still, 0.5))
    with torch.no_grad(): attn.temperature.fill_(100.0)
    assert attn.weights(k, k).diagonal(dim1=-2, dim2=-1).min() > 0.9                           # temperature multiplies: large is sharp


def test_attention_moves_with_the_pixels():
    "No pixel's place enters after the convolutions: permuting pixels of q, k and v permutes the result."
    attn, order = awake(TransposedAttention(4, 2).double(), 1.0), torch.randperm(9)
    q, k, v = torch.randn(3, 1, 2, 2, 9, dtype=F64)
    torch.testing.assert_close(attn.weights(q[..., order], k[..., order]) @ v[..., order], (attn.weights(q, k) @ v)[..., order])


def feed_forward_by_loops(ffn: GatedFeedForward, x: torch.Tensor) -> torch.Tensor:
    from math import erf, sqrt
    h, w = x.shape[-2:]
    mixed = torch.einsum("oc,bchw->bohw", ffn.project_in.weight[:, :, 0, 0], x)
    padded, k = F.pad(mixed, (1, 1, 1, 1)), ffn.dwconv.weight[:, 0]
    mixed = sum(k[None, :, i, j, None, None] * padded[:, :, i:i + h, j:j + w] for i in range(3) for j in range(3))
    half = mixed.shape[1] // 2
    gelu = mixed[:, :half].clone().apply_(lambda a: 0.5 * a * (1 + erf(a / sqrt(2))))
    return torch.einsum("oc,bchw->bohw", ffn.project_out.weight[:, :, 0, 0], gelu * mixed[:, half:])


def test_feed_forward_by_loops():
    ffn, x = awake(GatedFeedForward(5).double(), 1.0), torch.randn(2, 5, 3, 4, dtype=F64)
    with torch.no_grad(): torch.testing.assert_close(ffn(x), feed_forward_by_loops(ffn, x))
    assert [GatedFeedForward(d).project_out.in_channels for d in (48, 96, 192, 384)] == [127, 255, 510, 1021]


def block_by_parts(block: RestormerBlock, x):
    x = x + attention_by_loops(block.attn, block.norm1(x))
    return x + feed_forward_by_loops(block.ffn, block.norm2(x))


def network_by_parts(net: Restormer, x: torch.Tensor) -> torch.Tensor:
    "The graph of the specification, written out; the sides of x are multiples of 8."
    run = lambda blocks, y: y if not len(blocks) else run(blocks[1:], block_by_parts(blocks[0], y))
    c = lambda y, m: F.conv2d(y, m.weight, m.bias, padding=m.weight.shape[-1] // 2)
    first = c(x, net.patch_embed.proj)
    e1 = run(net.encoder_level1, first)
    e2 = run(net.encoder_level2, F.pixel_unshuffle(c(e1, net.down1_2.body[0]), 2))
    e3 = run(net.encoder_level3, F.pixel_unshuffle(c(e2, net.down2_3.body[0]), 2))
    y = run(net.latent, F.pixel_unshuffle(c(e3, net.down3_4.body[0]), 2))
    y = run(net.decoder_level3, c(torch.cat([F.pixel_shuffle(c(y, net.up4_3.body[0]), 2), e3], 1), net.reduce_chan_level3))
    y = run(net.decoder_level2, c(torch.cat([F.pixel_shuffle(c(y, net.up3_2.body[0]), 2), e2], 1), net.reduce_chan_level2))
    y = run(net.refinement, run(net.decoder_level1, torch.cat([F.pixel_shuffle(c(y, net.up2_1.body[0]), 2), e1], 1)))
    return c(y + c(first, net.skip_conv), net.output) if net.dual_pixel_task else c(y, net.output) + x


@pytest.mark.parametrize("options", [{}, dict(LayerNorm_type="BiasFree"), dict(inp_channels=6, dual_pixel_task=True), dict(inp_channels=1, out_channels=1, num_blocks=[1, 0, 1, 2])])
def test_network_by_parts(options):
    net = small(**options)
    x = torch.rand(1, net.img_channel, 8, 16, dtype=F64)
    with torch.no_grad():
        torch.testing.assert_close(net(x), network_by_parts(net, x))
        assert not torch.allclose(net(x)[:, :1], x[:, :1], atol=0.01)


def test_all_biases_are_used():
    net = awake(Restormer(**TINY, bias=True).double(), 0.3).eval()
    x = torch.rand(1, 3, 8, 8, dtype=F64)
    net(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in net.named_parameters() if n.endswith("bias") and "qkv" not in n)


# --- sizes

@pytest.mark.parametrize("size", [(8, 8), (1, 1), (1, 9), (7, 8), (9, 23), (16, 5)])
def test_any_size(size):
    net = small()
    x = torch.rand(2, 3, *size, dtype=F64)
    with torch.no_grad(): y = net(x)
    assert y.shape == x.shape and y.isfinite().all()


def test_padding_is_reflection_at_the_right_and_the_bottom_then_repetition():
    net, x = small(), torch.rand(1, 3, 13, 9, dtype=F64)
    with torch.no_grad():
        torch.testing.assert_close(net(x), net(F.pad(x, (0, 7, 0, 3), mode="reflect"))[..., :13, :9])
        x = torch.rand(1, 3, 13, 4, dtype=F64)                                                 # four columns cannot be reflected into eight
        padded = F.pad(F.pad(x, (0, 0, 0, 3), mode="reflect"), (0, 4, 0, 0), mode="replicate")
        torch.testing.assert_close(net(x), net(padded)[..., :13, :4])


def test_dual_pixel_pairs_of_any_size():
    net = small(inp_channels=6, dual_pixel_task=True)
    with torch.no_grad(): assert net(torch.rand(1, 6, 11, 13, dtype=F64)).shape == (1, 3, 11, 13)


# --- behaviour

def test_batches_are_independent():
    net, x = small(), torch.rand(3, 3, 9, 16, dtype=F64)
    with torch.no_grad(): torch.testing.assert_close(net(x), torch.cat([net(i[None]) for i in x]))


@pytest.mark.parametrize("kind", ["WithBias", "BiasFree"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_black_and_white_are_finite(kind, value):
    torch.manual_seed(0)
    net = Restormer(**TINY, LayerNorm_type=kind)
    x = torch.full((2, 3, 16, 16), value)
    y = net(x)
    (y - 0.3).abs().mean().backward()
    assert y.isfinite().all() and all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("kind", ["WithBias", "BiasFree"])
def test_bf16_autocast(kind):
    torch.manual_seed(0)
    net, x = Restormer(**TINY, LayerNorm_type=kind), torch.rand(2, 3, 16, 24)
    with torch.autocast("cpu", torch.bfloat16): y = net(x)
    y.float().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    assert (y.float() - net(x)).abs().max() < 0.05


def test_double_stays_double_and_half_precision_normalises_safely():
    assert small()(torch.rand(1, 3, 8, 8, dtype=F64)).dtype == F64
    x = torch.full((1, 4, 2, 2), 1000.0, dtype=torch.float16)
    x[:, 0] = -1000                                                                            # the variance, 750,000, is beyond float16
    y = ChannelNorm(4, "BiasFree").half()(x)
    assert y.dtype == torch.float16 and y.isfinite().all() and y.abs().max() > 1


def test_copies_and_gradients():
    torch.manual_seed(0)
    net, x = Restormer(**TINY), torch.rand(1, 3, 9, 8)
    for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))): assert torch.equal(again(x), net(x))
    net(x).square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_radius_is_unbounded():
    with pytest.raises(ValueError, match="Restormer.*128"): receptive_radius(build("Restormer", preset="tiny"), largest=128)


# --- options from weights, files

OPTIONS = [dict(), dict(LayerNorm_type="BiasFree"), dict(bias=True), dict(inp_channels=6, dual_pixel_task=True), dict(inp_channels=1, out_channels=1), dict(ffn_expansion_factor=2.0),
           dict(num_blocks=[3, 1, 2, 12], num_refinement_blocks=11), dict(dim=8, heads=[2, 2, 8, 16])]


@pytest.mark.parametrize("options", OPTIONS)
def test_options_are_read_off_a_state_dict(options):
    with torch.device("meta"):
        net = Restormer(**{**TINY, **options})
        again = Restormer(**Restormer.options_from_state_dict(net.state_dict()))
    assert shapes(again) == shapes(net)
    found = Restormer.options_from_state_dict(net.state_dict())
    assert all(found[k] == v for k, v in {**TINY, **options}.items() if k != "ffn_expansion_factor")


@pytest.mark.parametrize("preset", list(Restormer.PRESETS))
def test_options_of_the_presets(preset):
    with torch.device("meta"): net = build("Restormer", preset=preset)
    found = Restormer.options_from_state_dict(net.state_dict())
    assert found["ffn_expansion_factor"] == 2.66
    assert all(found[k] == v for k, v in Restormer.PRESETS[preset].items())


@given(dim=st.sampled_from([2, 8, 48, 100]), factor=st.integers(50, 800).map(lambda n: n / 100))
@settings(max_examples=60, deadline=None)
def test_a_factor_that_gives_the_same_widths(dim, factor):
    pairs = [(dim * 2**level, int(dim * 2**level * factor)) for level in range(4)]
    found = factor_behind(pairs)
    assert [int(c * found) for c, _ in pairs] == [h for _, h in pairs]


def test_factors():
    assert factor_behind([(48, 127), (96, 255), (192, 510), (384, 1021)]) == 2.66 and factor_behind([(10, 25)]) == 2.5
    with pytest.raises(ValueError, match="expansion factor.*widths"): factor_behind([(48, 127), (96, 192)])


def test_blocks_in():
    state = dict.fromkeys(["a.0.x", "a.1.x", "a.1.y", "a.2.x", "a.4.x", "b.7", "a.10.z", "ab.0.x"])
    assert (blocks_in(state, "a."), blocks_in(state, "b."), blocks_in(state, "c.")) == (3, 0, 0)
    assert blocks_in({f"a.{i}.w": 0 for i in range(12)}, "a.") == 12


def test_files_there_and_back(tmp_path):
    net, x = small(LayerNorm_type="BiasFree").float(), torch.rand(1, 3, 9, 10)
    torch.save({"params": net.state_dict()}, tmp_path / "public.pth")
    again, spec = load_model(tmp_path / "public.pth")
    assert spec["network"]["name"] == "Restormer" and torch.equal(again(x), net(x))
    other = Restormer(**{**TINY, "LayerNorm_type": "BiasFree"}).eval()
    load_weights(other, tmp_path / "public.pth")
    assert torch.equal(other(x), net(x))
    save_model(tmp_path / "ours.safetensors", net, {"network": {"name": "Restormer", "options": {**TINY, "LayerNorm_type": "BiasFree"}}})
    assert torch.equal(load_model(tmp_path / "ours.safetensors")[0](x), net(x))


def test_the_other_normalisation_is_refused_with_the_remedy(tmp_path):
    torch.save({"params": small().float().state_dict()}, tmp_path / "biased.pth")
    wrong = Restormer(**{**TINY, "dim": 8, "heads": [1, 2, 4, 8]})
    with pytest.raises(ValueError, match="biased.pth.*build..Restormer"): load_weights(wrong, tmp_path / "biased.pth")
    assert guess_network(small().float().state_dict())[0] == "Restormer"


@pytest.mark.parametrize("name", ["NAFNet", "UNet", "SwinIR", "FFANet", "ConStyleRestormer", "ConStyleNAFNet"])
def test_other_networks_are_not_recognised(name):
    state = build(name, preset="tiny").state_dict()
    with pytest.raises(ValueError, match="Restormer: the weights"): Restormer.options_from_state_dict(state)
    with pytest.raises(ValueError): NAFNet.options_from_state_dict(small().state_dict())


# --- export

def shallow() -> Restormer:
    "One block at full size and one at the bottom: exporting takes time for each."
    return awake(Restormer(dim=4, num_blocks=[1, 0, 0, 1], num_refinement_blocks=0, heads=[2, 2, 4, 4]), 0.15).eval()


def test_export_agrees():
    net, x = shallow(), torch.rand(1, 3, 13, 22)
    with torch.no_grad(): torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), net(x))


def test_export_with_free_sides():
    net, side = shallow(), lambda name: 8 * torch.export.Dim(name, min=2, max=500)
    program = torch.export.export(net, (torch.rand(1, 3, 24, 32),), dynamic_shapes=({2: side("h"), 3: side("w")},)).module()
    with torch.no_grad():
        for size in ((16, 16), (40, 24)):
            x = torch.rand(1, 3, *size)
            torch.testing.assert_close(program(x), net(x))


def test_onnx_runtime_agrees(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net, x = awake(build("Restormer", preset="tiny"), 0.1).eval(), torch.rand(1, 3, 13, 22)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (x,), dynamo=True, verbose=False).save(tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    y = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    with torch.no_grad(): torch.testing.assert_close(y, net(x), atol=1e-5, rtol=1e-4)


# --- bad input

@pytest.mark.parametrize("options, message", [
    (dict(inp_channels=6), "inp_channels.* 6 and"), (dict(inp_channels=0), "inp_channels.* 0 and"), (dict(LayerNorm_type="biased"), "LayerNorm_type.*'biased'"),
    (dict(num_blocks=[1, 1, 1]), r"num_blocks.*\[1, 1, 1\]"), (dict(heads=[1, 2, 4]), r"heads.*\[1, 2, 4\]"), (dict(num_blocks=[1, -1, 1, 1]), r"num_blocks.*\[1, -1"),
    (dict(num_refinement_blocks=-1), "counts.* -1$"), (dict(dim=3, heads=[1, 1, 1, 1]), ": dim .* 3$"), (dict(dim=0), ": dim .* 0$"),
    (dict(heads=[1, 3, 4, 8]), r"heads.*\[4, 8, 16, 32\].*\[1, 3,"), (dict(heads=[0, 2, 4, 8]), r"heads.*\[0, 2,"), (dict(ffn_expansion_factor=0.1), "ffn_expansion_factor.* 0.1")])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message): Restormer(**{**TINY, **options})


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (1, 4, 8, 8), (3, 8, 8)])
def test_bad_images(shape):
    with pytest.raises(ValueError, match=r"image.*\(B, 3, H, W\)"): Restormer(**TINY)(torch.rand(shape))
