"""Demosaicking against convolutions position by position in SciPy (float64), its exactness, its borders, its order on photographs, and refusals."""
import numpy as np
import pytest
import skimage.data
import torch
from hypothesis import given, settings, strategies as st
from scipy import ndimage

from irnb.degradations.noise import RawNoise
from irnb.degradations.sampling import BAYER, Mosaic, demosaic_bilinear, mosaic, pack_bayer, unpack_bayer
from irnb.demosaic import MALVAR, _malvar_weight, bilinear, malvar, to_masked, to_plane
from irnb.metrics import psnr

METHODS = {"bilinear": bilinear, "malvar": malvar}
# The specification's kernels, written down a second time: centre, distance-1 cross (horizontal, vertical), diagonals, distance-2 (horizontal, vertical).
PARTS = {"green": (4, 2, 2, 0, -1, -1), "row": (5, 4, 0, -1, -1, .5), "column": (5, 0, 4, -1, .5, -1), "opposite": (6, 0, 0, 2, -1.5, -1.5)}


def kernel(name):
    centre, across, along, diagonal, far_across, far_along = PARTS[name]
    k = np.zeros((5, 5))
    k[2, 2], k[2, 1], k[2, 3], k[1, 2], k[3, 2] = centre, across, across, along, along
    for i, j in ((1, 1), (1, 3), (3, 1), (3, 3)):
        k[i, j] = diagonal
    k[2, 0] = k[2, 4] = far_across
    k[0, 2] = k[4, 2] = far_along
    return k / 8


def slow_malvar(plane, pattern):
    "All kernels everywhere with SciPy, then the right one picked pixel by pixel."
    everywhere = {name: ndimage.correlate(plane, kernel(name), mode="mirror") for name in PARTS}
    out = np.zeros((3, *plane.shape))
    for i, j in np.ndindex(plane.shape):
        here, beside = pattern[2 * (i % 2) + j % 2], pattern[2 * (i % 2) + (j + 1) % 2]
        for c, colour in enumerate("RGB"):
            if here == colour: out[c, i, j] = plane[i, j]
            elif colour == "G": out[c, i, j] = everywhere["green"][i, j]
            elif here == "G": out[c, i, j] = everywhere["row" if beside == colour else "column"][i, j]
            else: out[c, i, j] = everywhere["opposite"][i, j]
    return out


def slow_bilinear(plane, pattern):
    "Means of the nearest samples of each colour by normalised correlation of the mirrored mosaic."
    weights, out = np.outer([1, 2, 1], [1, 2, 1]) / 4, np.zeros((3, *plane.shape))
    rows, columns = np.indices(plane.shape)
    colours = np.array(list(pattern))[2 * (rows % 2) + columns % 2]
    for c, colour in enumerate("RGB"):
        sampled = (colours == colour).astype(float)
        k = np.array([[0, 1, 0], [1, 4, 1], [0, 1, 0]]) / 4 if colour == "G" else weights
        out[c] = ndimage.correlate(plane * sampled, k, mode="mirror") / ndimage.correlate(sampled, k, mode="mirror")
    return out


def planes(batch, h, w, seed=0, dtype=torch.float64):
    return torch.rand(batch, 1, h, w, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("pattern", BAYER)
@pytest.mark.parametrize("h, w", [(8, 10), (4, 4), (5, 7), (9, 6)])
def test_against_scipy_position_by_position(pattern, h, w):
    plane = planes(2, h, w)
    for method, slow in ((malvar, slow_malvar), (bilinear, slow_bilinear)):
        got = method(plane, pattern)
        assert got.shape == (2, 3, h, w) and got.dtype == torch.float64
        for x, y in zip(plane, got):
            np.testing.assert_allclose(y.numpy(), slow(x[0].numpy(), pattern), atol=1e-12)


def test_published_kernels():
    assert list(MALVAR) == ["green at red or blue", "at green, same row", "at green, same column", "red at blue, blue at red", "measured"]
    for (name, published), part in zip(MALVAR.items(), PARTS):
        np.testing.assert_array_equal(np.array(published) / 8, kernel(part), err_msg=name)
    assert all(np.sum(k) == 8 for k in MALVAR.values())


@pytest.mark.parametrize("pattern", BAYER)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_all_forms_of_a_mosaic_give_the_same_bits(method, pattern):
    x = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(1))
    plane, masked, packed = (Mosaic(pattern, form)(x) for form in ("plane", "masked", "packed"))
    assert torch.equal(to_plane(masked, pattern), plane) and torch.equal(to_plane(packed, pattern), plane) and torch.equal(to_plane(plane, pattern), plane)
    assert torch.equal(to_masked(packed, pattern), masked) and torch.equal(to_masked(plane, pattern), masked) and torch.equal(to_masked(masked, pattern), masked)
    for form in (masked, packed):
        assert torch.equal(method(form, pattern), method(plane, pattern))
    assert torch.equal(unpack_bayer(pack_bayer(plane, pattern), pattern), plane)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@settings(deadline=None, max_examples=15)
@given(h=st.integers(4, 9), w=st.integers(4, 9), a=st.floats(-2, 2), b=st.floats(-2, 2), pattern=st.sampled_from(BAYER), seed=st.integers(0, 99))
def test_linear(method, h, w, a, b, pattern, seed):
    x, y = planes(2, h, w, seed)[:, None]
    torch.testing.assert_close(method(a * x + b * y, pattern), a * method(x, pattern) + b * method(y, pattern), rtol=0, atol=1e-12)


@pytest.mark.parametrize("pattern", BAYER)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_constant_colour_is_exact_and_samples_are_kept(method, pattern):
    colour = torch.tensor([.25, .5, .875]).view(1, 3, 1, 1).expand(1, 3, 7, 10)  # exact in binary, so every sum is
    assert torch.equal(method(Mosaic(pattern)(colour), pattern), colour)
    sampled = mosaic(torch.rand(1, 3, 9, 8), pattern)
    assert torch.equal(mosaic(method(sampled, pattern), pattern), sampled)


def test_a_linear_ramp_of_grey_is_exact_inside():
    rows, columns = torch.meshgrid(torch.arange(12.).double(), torch.arange(14.).double(), indexing="ij")
    ramp = (.03 * rows + .02 * columns).expand(1, 3, -1, -1)
    for method in METHODS.values():
        torch.testing.assert_close(method(mosaic(ramp))[..., 2:-2, 2:-2], ramp[..., 2:-2, 2:-2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "rocket"])
def test_malvar_is_better_than_bilinear_on_clean_photographs(name):
    x = torch.from_numpy(getattr(skimage.data, name)()[..., :3].copy()).permute(2, 0, 1)[None, :, :256, :256].float() / 255
    quality = {k: psnr(m(mosaic(x)), x, crop_border=2).item() for k, m in METHODS.items()}
    assert 26 < quality["bilinear"] < quality["malvar"] - .5 < 45, quality


def test_the_wrong_pattern_is_much_worse():
    x = torch.from_numpy(skimage.data.astronaut()[:128, 100:228].copy()).permute(2, 0, 1)[None].float() / 255
    right, wrong = (psnr(malvar(Mosaic("GRBG", "plane")(x), p), x, crop_border=2).item() for p in ("GRBG", "GBRG"))
    assert right > wrong + 8


def test_noise_passes_as_the_squares_of_the_kernels_say():
    noise = torch.randn(1, 1, 600, 600, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = malvar(noise)[0, :, 4:-4, 4:-4]
    variance = {"green": out[1, ::2, ::2], "row": out[0, ::2, 1::2], "column": out[0, 1::2, ::2], "opposite": out[0, 1::2, 1::2]}
    for name, values in variance.items():
        assert values.var().item() == pytest.approx((kernel(name) ** 2).sum(), rel=.03), name
    x = torch.full((1, 3, 400, 400), .5, dtype=torch.float64)
    residual = malvar(RawNoise(.01, .002)(x, generator=torch.Generator().manual_seed(1))) - x
    assert residual[0, 1, 4:-4:2, 4:-4:2].var().item() == pytest.approx((.01 * .5 + .002) * 36 / 64, rel=.05)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_gradients_types_and_nothing_written(method):
    raw = planes(1, 6, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda r: method(r, "BGGR"), raw)
    half = mosaic(torch.rand(1, 3, 8, 8)).bfloat16()
    before = half.clone()
    assert method(half).dtype == torch.bfloat16 and torch.equal(half, before)
    torch.testing.assert_close(malvar(half), malvar(half.float()).bfloat16())
    x = mosaic(torch.rand(1, 3, 8, 8))
    exact = method(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(method(x), exact)


def test_kernels_made_in_inference_mode_serve_training_later():
    _malvar_weight.cache_clear()
    with torch.inference_mode():
        malvar(planes(1, 4, 6, dtype=torch.float16), "GRBG")
    raw = planes(1, 4, 6, dtype=torch.float32).requires_grad_()
    malvar(raw, "GRBG").square().sum().backward()
    assert raw.grad.abs().sum() > 0


def test_bilinear_is_the_one_of_the_degradations():
    x = mosaic(torch.rand(1, 3, 10, 10), "GBRG")
    assert torch.equal(bilinear(x, "GBRG"), demosaic_bilinear(x))


@pytest.mark.parametrize("call, message", [
    (lambda: malvar(torch.rand(1, 2, 8, 8)), r"masked.*\(1, 2, 8, 8\)"), (lambda: malvar(torch.rand(3, 8, 8)), r"\(3, 8, 8\)"),
    (lambda: malvar(torch.ones(1, 1, 8, 8, dtype=torch.uint8)), "uint8"), (lambda: malvar(np.ones((1, 1, 8, 8))), "float64|ndarray"),
    (lambda: malvar(torch.rand(0, 1, 8, 8)), r"\(0, 1, 8, 8\)"), (lambda: malvar(torch.rand(1, 1, 3, 8)), r">= 4, got \(3, 8\)"),
    (lambda: malvar(torch.rand(1, 4, 1, 8)), r">= 4, got \(2, 16\)"), (lambda: bilinear(torch.rand(1, 1, 1, 8)), ">= 2"),
    (lambda: malvar(torch.rand(1, 1, 8, 8), "RGBG"), "RGGB.*'RGBG'"), (lambda: bilinear(torch.rand(1, 4, 8, 8), "rggb"), "'rggb'"),
    (lambda: to_masked(torch.rand(1, 5, 8, 8)), r"\(1, 5, 8, 8\)"),
    (lambda: Mosaic(form="packed")(torch.rand(1, 3, 7, 8)), "even"), (lambda: pack_bayer(torch.rand(1, 1, 8, 9)), "even.*crop"),
    (lambda: RawNoise(form="packed")(torch.rand(1, 3, 8, 7), generator=torch.Generator()), "even")])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
