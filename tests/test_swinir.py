"""SwinIR: counts and names, windows, masks and attention against slow references, any size, and what must be refused."""
import copy
import itertools
import math
import pickle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from irnb.networks import SwinIR, UpscaleFirst, build, count_parameters, load_model, networks, receptive_radius, save_model
from irnb.networks.swinir import (UPSAMPLERS, SwinBlock, WindowAttention, relative_position_index, shift_mask, shift_regions, window_partition,
                                  window_reverse)
from tests.nets import awake

F64 = torch.float64


def small(**options) -> SwinIR:
    "A network of windows of 4 px, two groups of two and three blocks."
    return SwinIR(**{**dict(upscale=1, img_size=8, window_size=4, depths=[2, 3], embed_dim=8, num_heads=[2, 4], drop_path_rate=0.0, num_feat=4), **options})


# --- counts and names

@pytest.mark.parametrize("preset, upscale, count", [("lightweight", 2, 910_152), ("lightweight", 3, 918_267), ("lightweight", 4, 929_628), ("classical", 4, 11_900_199)])
def test_published_counts(preset, upscale, count):
    with torch.device("meta"): assert count_parameters(build("SwinIR", preset=preset, upscale=upscale)) == count
    assert "SwinIR" in networks() and {"tiny", "real", "real_large", "denoise"} < set(SwinIR.PRESETS)


def test_defaults_are_lightweight_at_x4():
    with torch.device("meta"):
        assert count_parameters(SwinIR()) == 929_628
        assert {k: v.shape for k, v in SwinIR().state_dict().items()} == {k: v.shape for k, v in build("SwinIR", preset="lightweight").state_dict().items()}


def linear(name, o, i): return {f"{name}.weight": (o, i), f"{name}.bias": (o,)}
def norm(name, c): return {f"{name}.weight": (c,), f"{name}.bias": (c,)}
def conv(name, o, i, k=3): return {f"{name}.weight": (o, i, k, k), f"{name}.bias": (o,)}


def published_names(c, depths, heads, windows, side, head, residual):
    "Names and shapes of the tables in the specification, for windows of side `side`."
    names, n = {**conv("conv_first", c, 3), **norm("patch_embed.norm", c)}, side * side
    for i, (depth, h) in enumerate(zip(depths, heads)):
        for k in range(depth):
            p = f"layers.{i}.residual_group.blocks.{k}"
            if k % 2: names[f"{p}.attn_mask"] = (windows, n, n)
            names |= {**norm(f"{p}.norm1", c), f"{p}.attn.relative_position_bias_table": ((2*side - 1)**2, h), f"{p}.attn.relative_position_index": (n, n),
                      **linear(f"{p}.attn.qkv", 3*c, c), **linear(f"{p}.attn.proj", c, c), **norm(f"{p}.norm2", c), **linear(f"{p}.mlp.fc1", 2*c, c), **linear(f"{p}.mlp.fc2", c, 2*c)}
        names |= residual(f"layers.{i}.conv")
    return {**names, **norm("norm", c), **residual("conv_after_body"), **head}


def shapes(net): return {k: tuple(v.shape) for k, v in net.state_dict().items()}


@pytest.mark.parametrize("upscale", [2, 3, 4])
def test_state_dict_of_the_lightweight_network(upscale):
    expected = published_names(60, [6] * 4, [6] * 4, 64, 8, conv("upsample.0", 3 * upscale**2, 60), lambda name: conv(name, 60, 60))
    with torch.device("meta"): net = build("SwinIR", preset="lightweight", upscale=upscale)
    assert shapes(net) == expected
    assert net.state_dict()["layers.0.residual_group.blocks.0.attn.relative_position_index"].dtype == torch.int64


def test_state_dicts_of_the_siblings():
    before, one = conv("conv_before_upsample.0", 64, 180), lambda name: conv(name, 180, 180)
    heads = {"classical": {**before, **conv("upsample.0", 256, 64), **conv("upsample.2", 256, 64), **conv("conv_last", 3, 64)},
             "real": {**before, **conv("conv_up1", 64, 64), **conv("conv_up2", 64, 64), **conv("conv_hr", 64, 64), **conv("conv_last", 3, 64)},
             "denoise": conv("conv_last", 3, 180)}
    for preset, head in heads.items():
        with torch.device("meta"): net = build("SwinIR", preset=preset, img_size=16)
        assert shapes(net) == published_names(180, [6] * 6, [6] * 6, 4, 8, head, one), preset
    three = lambda name: {**conv(f"{name}.0", 60, 240), **conv(f"{name}.2", 60, 60, 1), **conv(f"{name}.4", 240, 60)}
    with torch.device("meta"): net = build("SwinIR", preset="real_large", img_size=16)
    head = {**conv("conv_before_upsample.0", 64, 240), **conv("conv_up1", 64, 64), **conv("conv_up2", 64, 64), **conv("conv_hr", 64, 64), **conv("conv_last", 3, 64)}
    assert shapes(net) == published_names(240, [6] * 9, [8] * 9, 4, 8, head, three)


CONFIGS = [dict(upscale=s, upsampler=u, resi_connection=r) for u in UPSAMPLERS for r in ("1conv", "3conv") for s in ((1,) if u == "" else (2, 4) if u == "nearest+conv" else (1, 2, 3, 4))]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: "-".join(map(str, c.values())))
def test_options_are_read_off_a_state_dict(config):
    options = dict(img_size=12, window_size=4, depths=[2, 3], embed_dim=8, num_heads=[2, 4], mlp_ratio=1.5, channels=1, **config)
    net = SwinIR(**options, num_feat=5)
    found = SwinIR.options_from_state_dict(net.state_dict())
    assert found == {**options, **({"num_feat": 5} if "shuffle" in config["upsampler"] and "direct" not in config["upsampler"] or "nearest" in config["upsampler"] else {})}
    again = SwinIR(**found)
    again.load_state_dict(net.state_dict())
    x = torch.rand(1, 1, 5, 9)
    assert torch.equal(again.eval()(x), net.eval()(x)) and again(x).shape == (1, 1, 5 * config["upscale"], 9 * config["upscale"])


def test_training_sizes_in_files():
    "A rectangle comes back as some rectangle with as many windows; a single window as the window."
    for size, again in [((8, 12), (8, 12)), ((20, 12), (12, 20)), (16, 16), (4, 4), (3, 3)]:
        found = SwinIR.options_from_state_dict(small(img_size=size).state_dict())
        assert found["img_size"] == again
        assert shapes(SwinIR(**found)) == shapes(small(img_size=size))


def test_other_networks_are_not_recognised():
    for name in ("NAFNet", "UNet", "RRDB", "EDSR", "FFANet"):
        with pytest.raises(ValueError, match="SwinIR: the weights"): SwinIR.options_from_state_dict(build(name, preset="tiny").state_dict())


# --- windows, index, mask

@given(b=st.integers(1, 3), rows=st.integers(1, 3), columns=st.integers(1, 3), window=st.integers(1, 4), c=st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_windows_are_cut_row_by_row(b, rows, columns, window, c):
    h, w = rows * window, columns * window
    x = torch.arange(b * h * w * c).view(b, h, w, c)
    tokens = window_partition(x, window)
    assert torch.equal(window_reverse(tokens, window, h, w), x)
    for n, i, j in itertools.product(range(b), range(rows), range(columns)):
        expected = x[n, i*window:(i + 1)*window, j*window:(j + 1)*window].reshape(window**2, c)
        assert torch.equal(tokens[(n * rows + i) * columns + j], expected)


@pytest.mark.parametrize("window", [1, 2, 7, 8])
def test_index_by_the_formula(window):
    index = relative_position_index(window)
    for a, b in itertools.product(range(window**2), repeat=2):
        (ra, ca), (rb, cb) = divmod(a, window), divmod(b, window)
        assert index[a, b] == (ra - rb + window - 1) * (2*window - 1) + (ca - cb + window - 1)
    assert index.dtype == torch.int64 and index.max() == (2*window - 1)**2 - 1


@pytest.mark.parametrize("h, w, window, shift", [(8, 8, 4, 2), (4, 4, 4, 2), (12, 4, 4, 2), (7, 14, 7, 3), (16, 24, 8, 4)])
def test_mask_by_geometry(h, w, window, shift):
    "Tokens of a rolled window may talk exactly if they lie in the same shifted window of the unrolled picture, without wrapping round."
    mask = shift_mask(h, w, window, shift)
    home = lambda r, c: (math.floor((r - shift) / window), math.floor((c - shift) / window))
    for k, (i, j) in enumerate(itertools.product(range(h // window), range(w // window))):
        at = [((i*window + r + shift) % h, (j*window + c + shift) % w) for r in range(window) for c in range(window)]
        for a, b in itertools.product(range(0, window**2, 3), range(window**2)):
            assert mask[k, a, b] == (0 if home(*at[a]) == home(*at[b]) else -100), (k, a, b)
    assert mask.shape == (h // window * (w // window), window**2, window**2)


def test_regions():
    expected = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2]] * 4 + [[3, 3, 3, 3, 4, 4, 5, 5]] * 2 + [[6, 6, 6, 6, 7, 7, 8, 8]] * 2)
    assert torch.equal(shift_regions(8, 8, 4, 2), expected)


# --- attention and the whole network against slow references

def slow_attention(layer, tokens, allowed):
    "One window, token by token and head by head; `allowed(a, b)` says who may talk."
    n, dim = tokens.shape
    heads, side = layer.num_heads, math.isqrt(n)
    d = dim // heads
    qkv = tokens @ layer.qkv.weight.T + layer.qkv.bias
    out = torch.zeros_like(tokens)
    for h in range(heads):
        q, k, v = (qkv[:, part*dim + h*d:part*dim + (h + 1)*d] for part in range(3))
        for a in range(n):
            logits = []
            for b in range(n):
                dr, dc = a // side - b // side, a % side - b % side
                bias = layer.relative_position_bias_table[(dr + side - 1) * (2*side - 1) + dc + side - 1, h]
                logits.append((q[a] * k[b]).sum() / d**0.5 + bias - (0 if allowed(a, b) else 100))
            weights = torch.stack(logits).exp()
            out[a, h*d:(h + 1)*d] = sum(w * v[b] for b, w in enumerate(weights / weights.sum()))
    return out @ layer.proj.weight.T + layer.proj.bias


@torch.no_grad()
def test_attention_equals_a_slow_reference():
    layer = awake(WindowAttention(6, 3, 2).double(), 0.7)
    x = torch.randn(4, 9, 6, dtype=F64)
    mask = torch.where(torch.rand(2, 9, 9) < 0.3, -100.0, 0.0)
    mask[:, range(9), range(9)] = 0
    for i in range(4):
        torch.testing.assert_close(layer(x)[i], slow_attention(layer, x[i], lambda a, b: True), rtol=0, atol=1e-12)
        torch.testing.assert_close(layer(x, mask)[i], slow_attention(layer, x[i], lambda a, b: mask[i % 2, a, b] == 0), rtol=0, atol=1e-12)


def slow_block(block, x):
    "Window by window in the unrolled picture: those cut by the border are smaller, and nothing wraps round."
    b, h, w, c = x.shape
    s, n = block.shift, block.window
    y, normed = torch.zeros_like(x), F.layer_norm(x, (c,), block.norm1.weight, block.norm1.bias, 1e-5)
    for image in range(b):
        for top, left in itertools.product(range(s - n if s else 0, h, n), range(s - n if s else 0, w, n)):
            tokens, inside = torch.zeros(n * n, c, dtype=x.dtype), []
            for k, (i, j) in enumerate(itertools.product(range(top, top + n), range(left, left + n))):
                if 0 <= i < h and 0 <= j < w: tokens[k] = normed[image, i, j]; inside.append((k, i, j))
            member = {k for k, _, _ in inside}
            attended = slow_attention(block.attn, tokens, lambda p, q: q in member)
            for k, i, j in inside: y[image, i, j] = attended[k]
    x = x + y
    z = F.layer_norm(x, (c,), block.norm2.weight, block.norm2.bias, 1e-5) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
    return x + (z * 0.5 * (1 + torch.erf(z / 2**0.5))) @ block.mlp.fc2.weight.T + block.mlp.fc2.bias


@torch.no_grad()
@pytest.mark.parametrize("shift", [0, 1, 2])
def test_block_equals_a_slow_reference(shift):
    block = awake(SwinBlock(4, (6, 6), 3, 2, shift).double(), 0.5)
    x = torch.randn(2, 6, 9, 4, dtype=F64)
    torch.testing.assert_close(block(x, shift_mask(6, 9, 3, shift) if shift else None), slow_block(block, x), rtol=0, atol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize("config", [dict(), dict(upscale=3), dict(upscale=2, upsampler="pixelshuffle"), dict(upscale=4, upsampler="nearest+conv", img_range=255.0),
                                    dict(upscale=2, upsampler="nearest+conv", resi_connection="3conv", img_range=2.0)])
def test_graph_by_hand(config):
    "Everything around the blocks, in float64: normalisation, padding, shortcuts, residual convolutions, heads, cropping."
    net = awake(small(**config).double())
    s, r = net.scale, net.img_range
    x = torch.rand(2, 3, 9, 6, dtype=F64)
    mean = net.mean if r else 0
    p = (F.pad(x, (0, 2, 0, 3), mode="reflect") - mean) * r
    first = net.conv_first(p)
    t = F.layer_norm(first.permute(0, 2, 3, 1), (8,), net.patch_embed["norm"].weight, net.patch_embed["norm"].bias)
    mask = shift_mask(12, 8, 4, 2)
    for layer in net.layers:
        u = t
        for k, block in enumerate(layer.residual_group["blocks"]): u = block(u, mask if k % 2 else None)
        t = t + layer.conv(u.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    f = first + net.conv_after_body(F.layer_norm(t, (8,), net.norm.weight, net.norm.bias).permute(0, 3, 1, 2))
    if net.upsampler == "": y = p + net.conv_last(f)
    elif net.upsampler == "pixelshuffledirect": y = F.pixel_shuffle(net.upsample[0](f), s)
    else:
        f = net.conv_before_upsample[0](f)
        f = torch.where(f > 0, f, 0.01 * f)
        if net.upsampler == "pixelshuffle": y = net.conv_last(F.pixel_shuffle(net.upsample[0](f), 2))
        else:
            lrelu = lambda v: torch.where(v > 0, v, 0.2 * v)
            for up in [net.conv_up1] + ([net.conv_up2] if s == 4 else []): f = lrelu(up(f.repeat_interleave(2, 2).repeat_interleave(2, 3)))
            y = net.conv_last(lrelu(net.conv_hr(f)))
    torch.testing.assert_close(net(x), (y / r + mean)[..., :9*s, :6*s], rtol=0, atol=1e-9)


@torch.no_grad()
def test_three_convolutions_by_hand():
    net = awake(small(resi_connection="3conv").double())
    c, x = net.layers[0].conv, torch.randn(1, 8, 5, 5, dtype=F64)
    lrelu = lambda v: torch.where(v > 0, v, 0.2 * v)
    torch.testing.assert_close(c(x), c[4](lrelu(c[2](lrelu(c[0](x))))))
    assert c[0].weight.shape == (2, 8, 3, 3) and c[2].weight.shape == (2, 2, 1, 1) and c[4].weight.shape == (8, 2, 3, 3)


# --- symmetries

@torch.no_grad()
def test_tokens_are_a_set_but_for_the_bias():
    "Without the bias table, permuting the tokens of a window permutes the result; with it, it does not."
    layer, x = awake(WindowAttention(6, 3, 2).double(), 0.7), torch.randn(2, 9, 6, dtype=F64)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    assert (layer(x[:, order]) - layer(x)[:, order]).abs().max() > 1e-3
    layer.relative_position_bias_table.zero_()
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order], rtol=0, atol=1e-12)


@torch.no_grad()
def test_windows_do_not_talk_without_shift():
    block = awake(SwinBlock(4, (8, 8), 4, 2, 0).double())
    x = torch.randn(1, 8, 8, 4, dtype=F64)
    y = x.clone(); y[0, 5, 2] += torch.randn(4, dtype=F64)
    changed = (block(x) != block(y)).any(-1)[0]
    assert changed[4:, :4].all() and changed.sum() == 16


@torch.no_grad()
def test_shift_of_the_picture_by_a_window():
    "Moving the picture by whole windows moves the result, away from the borders; by less it does not."
    net = awake(small(depths=[2], num_heads=[2], upscale=2).double())
    x = torch.rand(1, 3, 40, 44, dtype=F64)
    inside = (Ellipsis, slice(32, 48), slice(32, 48))
    torch.testing.assert_close(net(x[..., 4:])[inside], net(x)[..., 8:][inside], rtol=0, atol=1e-10)
    assert (net(x[..., 1:])[inside] - net(x)[..., 2:][inside]).abs().max() > 1e-4


@torch.no_grad()
def test_batch_members_are_independent():
    net, x = awake(small()).eval(), torch.rand(3, 3, 8, 12)
    torch.testing.assert_close(net(x), torch.cat([net(image[None]) for image in x]))


def test_reach_is_bounded_and_tiles_agree():
    net = awake(small(depths=[2], num_heads=[2]))
    r = receptive_radius(net)
    assert 8 <= r <= 24
    net, x = net.double(), torch.rand(1, 3, 80, 80, dtype=F64)
    pad = -(-r // 4) * 4
    with torch.no_grad(): whole, tile = net(x), net(x[..., 40 - pad:44 + pad, 40 - pad:44 + pad])
    torch.testing.assert_close(whole[..., 40:44, 40:44], tile[..., pad:pad + 4, pad:pad + 4], rtol=0, atol=1e-10)


# --- any size, files of any mask size

@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 5), (8, 8), (17, 32), (3, 40)])
@pytest.mark.parametrize("upscale", [1, 2, 3, 4])
def test_any_size(size, upscale):
    net, x = build("SwinIR", preset="tiny", upscale=upscale), torch.rand(2, 3, *size)
    before = x.clone()
    assert net(x).shape == (2, 3, upscale * size[0], upscale * size[1]) and torch.equal(x, before) and net.scale == upscale and net.multiple == 8
    assert net(x).isfinite().all()


@torch.no_grad()
def test_padding_reflects_or_repeats():
    net = awake(small().double())
    x = torch.rand(1, 3, 6, 7, dtype=F64)
    assert torch.equal(net(x), net(F.pad(x, (0, 1, 0, 2), mode="reflect"))[..., :6, :7])
    x = torch.rand(1, 3, 1, 1, dtype=F64)
    torch.testing.assert_close(net(x), net(x.expand(1, 3, 4, 4))[..., :1, :1])


@torch.no_grad()
def test_a_file_of_another_training_size_loads_and_means_the_same():
    source, x = awake(small(img_size=8)), torch.rand(1, 3, 16, 20)
    for size in (12, 16, (8, 20)):
        net = small(img_size=size)
        masks = {k: v.clone() for k, v in net.state_dict().items() if "attn_mask" in k}
        state = source.state_dict()
        keys = list(state)
        assert str(net.load_state_dict(state)) == "<All keys matched successfully>" and list(state) == keys
        assert torch.equal(net(x), source(x)) and all(torch.equal(net.state_dict()[k], v) for k, v in masks.items())
        assert torch.equal(net(x), net.load_state_dict({k: v for k, v in state.items() if "attn_mask" not in k and "index" not in k}) and net(x))


def test_a_spoilt_index_in_a_file_is_ignored():
    net, state = small(), small().state_dict()
    key = "layers.0.residual_group.blocks.0.attn.relative_position_index"
    net.load_state_dict({**state, key: torch.full_like(state[key], 99)})
    assert torch.equal(net.state_dict()[key], relative_position_index(4))
    with pytest.raises(RuntimeError, match="Unexpected.*surprise"): net.load_state_dict({**state, "layers.0.surprise": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="Missing.*qkv"): net.load_state_dict({k: v for k, v in state.items() if k != "layers.1.residual_group.blocks.2.attn.qkv.bias"})


@torch.no_grad()
def test_a_training_size_not_larger_than_the_window_means_no_shift():
    for size in (4, 3, (3, 8)):
        net = small(img_size=size)
        window = 4 if size == 4 else 3
        assert net.multiple == window and not any("attn_mask" in k for k in net.state_dict())
        assert all(b.shift == 0 for b in net.modules() if isinstance(b, SwinBlock)) and net(torch.rand(1, 3, 11, 10)).shape == (1, 3, 11, 10)
    large = awake(small(img_size=8))
    net = small(img_size=4)
    net.load_state_dict(large.state_dict())                                            # its masks are not wanted
    x = torch.rand(1, 3, 12, 12)
    assert not torch.equal(net(x), large(x))


# --- training mode, initial weights, gradients, precision, files

def test_stochastic_depth():
    net = small(drop_path_rate=0.4)
    rates = [b.drop_path for b in net.modules() if isinstance(b, SwinBlock)]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.4, 5))
    x = torch.rand(64, 3, 4, 4)
    awake(net)
    assert not torch.equal(net(x), net(x)) and torch.equal(net.eval()(x), net(x))
    block = awake(SwinBlock(4, (4, 4), 4, 2, 0, drop_path=0.5).double())
    t = torch.randn(1, 4, 4, 4, dtype=F64).expand(4000, -1, -1, -1)
    torch.manual_seed(0)
    outcomes = ((block(t) - t) ** 2).flatten(1).sum(1).round(decimals=9).unique()
    assert len(outcomes) == 4 and outcomes[0] == 0                                     # each branch of each sample: in or out
    assert SwinIR.PRESETS["tiny"]["drop_path_rate"] == 0 and [b.drop_path for b in SwinIR().modules() if isinstance(b, SwinBlock)][-1] == pytest.approx(0.1)
    with torch.no_grad():                                                              # the mean over the drops is the full branch
        one = SwinBlock(4, (4, 4), 4, 2, 0, drop_path=0.5).double()
        for p in (*one.mlp.parameters(),): p.zero_()
        awake(one.attn)
        mean = (one.train()(t) - t).mean(0)
        torch.testing.assert_close(mean, (one.eval()(t) - t)[0], rtol=0.1, atol=0)


def test_fresh_networks_of_the_tiny_preset_draw_nothing_in_training():
    net, x = build("SwinIR", preset="tiny", upscale=1), torch.rand(1, 3, 8, 8)
    state = torch.get_rng_state()
    assert torch.equal(net.train()(x), net.eval()(x)) and torch.equal(torch.get_rng_state(), state)


def test_initial_weights():
    torch.manual_seed(0)
    net = SwinIR(img_size=8, depths=[2], num_heads=[6])
    for module in net.modules():
        if isinstance(module, nn.Linear):
            assert abs(float(module.weight.detach().std()) - 0.02) < 1e-3 and module.bias.abs().max() == 0
        if isinstance(module, WindowAttention): assert abs(float(module.relative_position_bias_table.detach().std()) - 0.02) < 2e-3
        if isinstance(module, nn.LayerNorm): assert module.eps == 1e-5 and (module.weight == 1).all() and (module.bias == 0).all()
        if isinstance(module, nn.Conv2d): assert module.weight.abs().max() <= module.weight[0].numel()**-0.5


@pytest.mark.parametrize("config", [dict(), dict(upscale=2, upsampler="pixelshuffle"), dict(upscale=4, upsampler="nearest+conv", resi_connection="3conv"), dict(upscale=3)])
def test_gradients(config):
    net = small(**config)
    net(torch.rand(1, 3, 9, 8)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in net.parameters())


def test_double_backward_is_exact():
    net = awake(SwinIR(1, 4, 2, 1.0, [2], 4, [2], 1.0, channels=1, drop_path_rate=0).double(), 0.4)
    x = torch.randn(1, 1, 3, 4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(net, x) and torch.autograd.gradgradcheck(net, x)


def test_modes_copies_and_precisions():
    net, x = build("SwinIR", preset="tiny", upscale=2), torch.rand(1, 3, 9, 11)
    y = net.eval()(x)
    assert torch.equal(net(x), y) and torch.equal(copy.deepcopy(net)(x), y) and torch.equal(pickle.loads(pickle.dumps(net))(x), y)
    copied = copy.deepcopy(net)
    copied.load_state_dict(build("SwinIR", preset="tiny", upscale=2, img_size=32).state_dict())
    assert copied.state_dict()["layers.0.residual_group.blocks.1.attn_mask"].shape == (4, 64, 64)
    with torch.autocast("cpu", torch.bfloat16): half = net(x)
    assert (half.float() - y).abs().max() < 0.05
    mean = net.mean.clone()
    assert net.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert net.double()(x.double()).dtype == F64
    assert "mean" not in net.state_dict()
    other = build("SwinIR", preset="tiny", upscale=2)
    with torch.autocast("cpu", torch.bfloat16): other(x)
    assert torch.equal(other.mean, mean)                                               # a half-precision pass leaves the mean alone


def test_build_uses_it_natively_and_files_work(tmp_path):
    for upscale in (1, 4):
        net = awake(build("SwinIR", preset="tiny", upscale=upscale))
        assert isinstance(net, SwinIR) and not isinstance(net, UpscaleFirst)
        save_model(tmp_path / "m.safetensors", net, {"network": {"name": "SwinIR", "options": {"preset": "tiny", "upscale": upscale}}})
        x = torch.rand(1, 3, 5, 7)
        assert torch.equal(load_model(tmp_path / "m.safetensors")[0](x), net.eval()(x))
        torch.save({"params": net.state_dict()}, tmp_path / "m.pth")
        assert torch.equal(load_model(tmp_path / "m.pth")[0](x), net(x))


# --- refused

@pytest.mark.parametrize("options, message", [
    (dict(window_size=0), "window_size"), (dict(img_size=0), "img_size"), (dict(embed_dim=0), "embed_dim.* 0$"),
    (dict(img_size=10), r"img_size.*window_size.*\(10, 10\)"), (dict(img_size=(8, 9)), r"img_size.*window_size.*\(8, 9\)"),
    (dict(depths=[2]), r"depths.*\[2\] and \[2, 4\]"), (dict(depths=[], num_heads=[]), r"depths.*\[\]"), (dict(depths=[2, 0]), r"depths.*\[2, 0\]"),
    (dict(num_heads=[2, 3]), r"num_heads.*embed_dim.*\[2, 3\], 8"), (dict(num_heads=[0, 2]), r"num_heads.*\[0, 2\]"),
    (dict(upsampler="bicubic"), "upsampler.*'bicubic'"), (dict(resi_connection="2conv"), "resi_connection.*'2conv'"),
    (dict(upscale=0), "upscale.* 0"), (dict(upscale=2.0), "upscale.* 2.0"), (dict(upscale="x4"), "upscale.* 'x4'"),
    (dict(upscale=2, upsampler=""), "upsampler ''.* 2"), (dict(upscale=3, upsampler="nearest+conv"), r"upsampler 'nearest\+conv'.* 3"),
    (dict(upscale=5, upsampler="pixelshuffle"), "upscale.* 5"),
    (dict(img_range=0), "img_range"), (dict(img_range=float("nan")), "img_range"), (dict(mlp_ratio=0), "mlp_ratio"), (dict(drop_path_rate=1.0), "drop_path_rate.* 1.0$"),
    (dict(drop_path_rate=-0.1), "drop_path_rate.* -0.1"), (dict(channels=0), "channels"), (dict(num_feat=0), "num_feat")])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message): small(**options)
