"""irnb.images: colour, padding, symmetries, figures, and tiling against the untiled net."""
import io

import numpy as np
import pytest
import skimage.color
import skimage.data
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import nn

from irnb.images import dihedral, pad_to_multiple, quantise, rgb_to_gray, rgb_to_y, show, show_crops, tiled

# ---- colour, levels, padding, symmetries -----------------------------------------------------------------------------

def test_lumas_against_references():
    photo = skimage.data.astronaut()
    x = torch.from_numpy(photo.copy()).permute(2, 0, 1).double() / 255
    want = skimage.color.rgb2ycbcr(photo)[..., 0] / 255
    assert np.abs(rgb_to_y(x)[0].numpy() - want).max() < 1e-6
    pillow = np.asarray(Image.fromarray(photo).convert("L")) / 255
    assert np.abs(rgb_to_gray(x)[0].numpy() - pillow).max() <= 1.01 / 255
    grey = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    assert rgb_to_gray(grey) is grey
    torch.testing.assert_close(rgb_to_y(grey), rgb_to_y(grey.expand(-1, 3, -1, -1)))
    for f in (rgb_to_gray, rgb_to_y):
        with pytest.raises(ValueError, match="expected"):
            f(torch.zeros(1, 4, 8, 8))


def test_quantise():
    x = torch.tensor([-1, 0.2, 2, 0.5])
    assert torch.equal(quantise(x) * 255, torch.tensor([0.0, 51, 255, 128]))
    assert len(quantise(torch.linspace(0, 1, 100), 1).unique()) == 2
    with pytest.raises(ValueError, match="bits"):
        quantise(x, 0)


@settings(deadline=None, max_examples=40)
@given(height=st.integers(1, 20), width=st.integers(1, 20), multiple=st.integers(1, 16))
def test_padding_against_numpy(height, width, multiple):
    x = torch.arange(height * width).view(1, 1, height, width)
    y = pad_to_multiple(x, multiple)
    want = x[0, 0].numpy()
    for axis in (0, 1):
        pad = [(0, 0), (0, 0)]
        pad[axis] = (0, -want.shape[axis] % multiple)
        want = np.pad(want, pad, mode="reflect" if pad[axis][1] < want.shape[axis] else "edge")
    np.testing.assert_array_equal(y[0, 0].numpy(), want)


def test_padding_refuses_nonsense():
    for args in ((0,), (2, "zeros")):
        with pytest.raises(ValueError, match="pad_to_multiple"):
            pad_to_multiple(torch.zeros(1, 1, 3, 3), *args)


def test_dihedral_is_the_group_of_the_square():
    x = torch.arange(16.0).view(1, 4, 4)
    all8 = {dihedral(x, k).numpy().tobytes() for k in range(8)}
    want = {np.rot90(np.fliplr(x[0]) if f else x[0].numpy(), r).copy().tobytes() for f in (0, 1) for r in range(4)}
    assert all8 == want and len(all8) == 8
    wide = torch.rand(2, 3, 4, 6)
    for k in range(8):
        assert torch.equal(dihedral(dihedral(wide, k), k, inverse=True), wide)
        square = torch.rand(8, 3, 5, 5)
        ks = torch.randperm(8)
        each = dihedral(square, ks)
        for i in range(8):
            assert torch.equal(each[i], dihedral(square[i], int(ks[i])))
        assert torch.equal(dihedral(each, ks, inverse=True), square)
    for bad in (lambda: dihedral(x, 8), lambda: dihedral(wide, torch.zeros(2, dtype=int)),
                lambda: dihedral(square, torch.zeros(3, dtype=int))):
        with pytest.raises(ValueError, match="dihedral"):
            bad()


# ---- tiling ----------------------------------------------------------------------------------------------------------

def conv_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 6, 5, padding=2), nn.Tanh(), nn.Conv2d(6, 3, 3, padding=1)).double()  # radius 3


@settings(deadline=None, max_examples=30)
@given(height=st.integers(1, 90), width=st.integers(1, 90), tile=st.integers(17, 48), overlap=st.integers(6, 16))
def test_tiled_equals_untiled(height, width, tile, overlap):
    net, x = conv_net(), torch.rand(2, 2, height, width, dtype=torch.float64)
    with torch.no_grad():
        want = net(x)
    torch.testing.assert_close(tiled(net, x, tile=tile, overlap=overlap, margin=3), want, rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(height=st.integers(1, 70), width=st.integers(1, 70), tile=st.integers(12, 40), overlap=st.integers(0, 11),
       multiple=st.sampled_from([1, 2, 4]), scale=st.integers(1, 3))
def test_identity_is_exact_at_any_size_and_scale(height, width, tile, overlap, multiple, scale):
    x = torch.rand(1, 3, height, width)
    enlarge = lambda t: t.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    if -(-tile // multiple) * multiple - overlap < multiple:
        return
    assert torch.equal(tiled(enlarge, x, tile=tile, overlap=overlap, multiple=multiple, scale=scale), enlarge(x))


class Attention(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.pool, self.mix = nn.AdaptiveAvgPool2d(1), nn.Conv2d(n, n, 1)

    def forward(self, x):
        return x * self.mix(self.pool(x)).sigmoid()


def pooled_net(scale=1):
    torch.manual_seed(0)
    shared = Attention(8)  # called twice: calls are counted, not modules
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), shared, nn.Conv2d(8, 8, 3, padding=1), shared,
                         nn.Conv2d(8, 16, 2, 2), nn.GELU(), Attention(16), nn.Conv2d(16, 12 * scale**2, 3, padding=1),
                         nn.PixelShuffle(2 * scale)).double()


@settings(deadline=None, max_examples=20)
@given(height=st.integers(1, 80), width=st.integers(1, 80), tile=st.integers(30, 50), scale=st.integers(1, 2))
def test_global_averages_are_those_of_the_whole_picture(height, width, tile, scale):
    net, x = pooled_net(scale), torch.rand(2, 3, height, width, dtype=torch.float64)
    with torch.no_grad():
        want = net(pad_to_multiple(x, 2))[..., : height * scale, : width * scale]
    y = tiled(net, x, tile=tile, overlap=14, margin=5, multiple=2, scale=scale)
    torch.testing.assert_close(y, want, rtol=0, atol=1e-10)


def test_statistics_of_tiles_differ_and_hooks_go_away():
    net, x = pooled_net(), torch.rand(1, 3, 90, 90, dtype=torch.float64)
    x[..., :45, :] *= 0.2
    calls = []
    net[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        want = net(x)
    a = tiled(net, x, tile=40, overlap=12, margin=5, multiple=2, statistics="tile")
    passes_one = len(calls) - 1
    b = tiled(net, x, tile=40, overlap=12, margin=5, multiple=2)
    assert len(calls) - 1 - passes_one == 4 * passes_one  # three averages: four passes
    assert (a - want).abs().max() > 1e-4 and (b - want).abs().max() < 1e-10
    assert not any(m._forward_hooks for m in net.modules() if isinstance(m, nn.AdaptiveAvgPool2d))

    def explode(*_):
        raise RuntimeError("boom")
    handle = net[-2].register_forward_hook(explode)
    with pytest.raises(RuntimeError, match="boom"):
        tiled(net, x, tile=40, overlap=12, margin=5, multiple=2)
    handle.remove()
    assert not any(m._forward_hooks for m in net.modules() if isinstance(m, nn.AdaptiveAvgPool2d))


def test_tiled_bounds_what_the_net_sees_and_takes_bytes():
    seen = []
    net = lambda t: (seen.append(tuple(t.shape)), t.float() / 255)[1]
    x = torch.randint(0, 256, (1, 3, 130, 70), dtype=torch.uint8)
    assert torch.equal(tiled(net, x, tile=32, overlap=8), x.float() / 255)
    assert set(seen) == {(1, 3, 32, 32)}
    seen.clear()
    tiled(net, x, tile=256)
    assert seen == [(1, 3, 130, 70)]


def test_small_pictures_are_one_plain_call_and_take_no_gradient():
    net = conv_net()
    y = tiled(net, torch.rand(1, 2, 5, 7, dtype=torch.float64), multiple=8)
    assert y.shape == (1, 3, 5, 7) and not y.requires_grad


@pytest.mark.parametrize("options, words", [
    (dict(tile=0), "tile"), (dict(overlap=-1), "overlap"), (dict(scale=0), "scale"),
    (dict(statistics="none"), "statistics"),
    (dict(overlap=9, margin=5), "overlap >= 10"), (dict(overlap=10, margin=5, multiple=4), "overlap >= 16"),
    (dict(tile=16, overlap=16), "tile >= 17"), (dict(scale=2), "2 times")])
def test_tiled_refuses_what_cannot_work(options, words):
    with pytest.raises(ValueError, match=words):
        tiled(nn.Identity(), torch.zeros(1, 3, 40, 40), **{"tile": 32, "overlap": 8, **options})


def test_tiled_names_other_problems():
    with pytest.raises(ValueError, match="expected"):
        tiled(nn.Identity(), torch.zeros(3, 40, 40))
    with pytest.warns(UserWarning, match="InstanceNorm2d"):
        tiled(nn.InstanceNorm2d(3), torch.rand(1, 3, 80, 80), tile=32, overlap=8)
    net = nn.Sequential(nn.Conv2d(3, 3, 4, 4), Attention(3), nn.PixelShuffle(1), nn.Upsample(scale_factor=4))
    with pytest.raises(ValueError, match="multiple"):
        tiled(net, torch.rand(1, 3, 80, 80), tile=36, overlap=10, multiple=1)


# ---- figures ---------------------------------------------------------------------------------------------------------

def test_figures_show_what_they_are_given():
    figure = show(torch.rand(5, 3, 8, 8), [str(i) for i in range(5)], ncols=3)
    drawn = [ax for ax in figure.axes if ax.images]
    assert len(drawn) == 5 and drawn[3].get_title() == "3"
    x = torch.rand(3, 20, 30)
    figure = show_crops({"a": x, "b": x * 0.5}, (2, 3, 10, 12), reference=x)
    assert len([ax for ax in figure.axes if ax.images]) == 5
    assert figure.axes[-1].get_ylabel() == "|error| (1/255)"
    figure.savefig(io.BytesIO())
    with pytest.raises(ValueError, match="box"):
        show_crops({"a": x}, (15, 0, 10, 10))
    with pytest.raises(ValueError, match="no images"):
        show([])
    with pytest.raises(ValueError, match="one image"):
        show([torch.zeros(2, 4, 4)])
