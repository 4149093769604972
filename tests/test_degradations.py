"""Degradations against independent references, moments, determinism, gradients, and bad input."""
import io
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage, signal
from skimage import data

import irnb.degradations as D
from irnb.degradations import compression, sampling
from irnb.degradations.base import Compose, Identity
from irnb.degradations.blur import CameraShake, GaussianBlur, KernelBlur, MotionBlur
from irnb.degradations.chains import Hybrid, RealESRGAN
from irnb.degradations.compression import JPEG
from irnb.degradations.noise import CameraNoise, ColourNoise, GaussianNoise, RawNoise, SaltPepper, Speckle
from irnb.degradations.parameters import Choice, LogUniform, Squared, Uniform
from irnb.degradations.sampling import BAYER, Downsample, Mosaic
from irnb.degradations.weather import Haze, Rain


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def photo(name, h=None, w=None):
    a = np.ascontiguousarray(getattr(data, name)()[:h, :w])
    a = a[..., None] if a.ndim == 2 else a[..., :3]
    return torch.from_numpy(a).permute(2, 0, 1)[None].float().div(255).contiguous()


def db(a, b):
    return -10 * math.log10(max(float(((a - b) ** 2).mean()), 1e-12))


RANDOM = [
    GaussianNoise(Uniform(5, 50)), Speckle(25), SaltPepper(Uniform(0.01, 0.2)), RawNoise(), RawNoise(form="packed"),
    RawNoise(form="plane"), RawNoise(form="full", clip=True), CameraNoise(), D.camera("textured"), ColourNoise(),
    ColourNoise(pattern=Choice(BAYER)), GaussianBlur(Uniform(0.5, 4)), MotionBlur(Uniform(2, 9)), CameraShake(),
    JPEG(Uniform(10, 95)), Rain(), D.rain("heavy"), Haze(), RealESRGAN(order=1, scale=2), RealESRGAN(order=2, scale=4),
    D.hybrid("mild"), D.hybrid("severe", 1, 4), Compose(GaussianBlur(2.0), GaussianNoise(25), JPEG(40)),
]
FIXED = [
    GaussianBlur(2.0), GaussianBlur(0.0), GaussianBlur(5.0, kernel_size=31), KernelBlur(torch.ones(3, 3)),
    MotionBlur(7.5, 30.0), JPEG(40), JPEG(80, "4:4:4"), Haze(1.0, 0.8, torch.rand(1, 1, 48, 32, generator=gen())),
    Downsample(4), Downsample(1), Mosaic(), Mosaic("GBRG", "packed"), Identity(), Compose(), Compose(GaussianBlur(1.0), JPEG(50)),
]


def ids(d): return d.name


# ---------------------------------------------------------------- the contract of every degradation

@pytest.mark.parametrize("d", RANDOM + FIXED, ids=ids)
def test_shape_dtype_input_untouched(d):
    for dtype in (torch.float32, torch.float64, torch.float16):
        x = torch.rand(2, 3, 48, 32, generator=gen()).to(dtype)
        before = x.clone()
        y = d(x, generator=gen(1))
        assert torch.equal(x, before) and y.dtype == dtype and y.isfinite().all()
        assert y.shape[0] == 2 and tuple(n * d.scale for n in y.shape[-2:]) == (48, 32)
        assert y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("d", RANDOM, ids=ids)
def test_random_ones_are_exact_and_need_a_generator(d):
    x = torch.rand(3, 3, 48, 32, generator=gen())
    state = torch.get_rng_state()
    a, b, c = d(x, generator=gen(5)), d(x, generator=gen(5)), d(x, generator=gen(6))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(state, torch.get_rng_state())  # the global generator was left alone
    assert d.stochastic
    with pytest.raises(ValueError, match="generator"):
        d(x)


@pytest.mark.parametrize("d", FIXED, ids=ids)
def test_deterministic_ones_ignore_the_generator_and_the_batch(d):
    x = torch.rand(3, 3, 48, 32, generator=gen(), dtype=torch.float64)
    g = gen(5)
    whole = d(x, generator=g)
    assert not d.stochastic and torch.equal(g.get_state(), gen(5).get_state())
    for i in range(3):
        torch.testing.assert_close(d(x[i:i + 1]), whole[i:i + 1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("d", RANDOM + FIXED, ids=ids)
def test_equal_parameters_equal_objects(d):
    again = pickle.loads(pickle.dumps(d))
    assert again == d and hash(again) == hash(d) and repr(again) == repr(d) and again.name == d.name
    assert d != GaussianNoise(77) and all(c.isalnum() or c in "._-+" for c in d.name)
    with pytest.raises(AttributeError):
        d.sigma = 3


@pytest.mark.parametrize("d", RANDOM + FIXED, ids=ids)
def test_strided_and_single_pixel_batches(d):
    x = torch.rand(2, 48, 32, 3, generator=gen()).permute(0, 3, 1, 2)
    torch.testing.assert_close(d(x, generator=gen(1)), d(x.contiguous(), generator=gen(1)), rtol=0, atol=1e-6)


def test_all_random_names_differ():
    names = [d.name for d in RANDOM + FIXED]
    assert len(set(names)) == len(names)
    assert MotionBlur(5, -30).name != MotionBlur(5, 30).name


def test_printing_and_composition():
    chain = Compose(GaussianBlur(2.0), Compose(GaussianNoise(25)))
    assert repr(chain) == "GaussianBlur(2.0) -> GaussianNoise(25)" and chain.name == "gaussian_blur_2.0+gaussian_noise_25"
    assert chain == Compose(GaussianBlur(2), GaussianNoise(25.0)) and chain != Compose(GaussianNoise(25), GaussianBlur(2.0))
    assert repr(GaussianNoise(Uniform(0, 55), clip=False)) == "GaussianNoise(Uniform(0, 55), clip=False)"
    assert repr(GaussianNoise(torch.tensor([5.0, 10.0]))) == "GaussianNoise([5.0, 10.0])"
    assert Compose(Downsample(2), Downsample(2)).scale == 4 and Mosaic(form="packed").scale == 2
    assert GaussianNoise(torch.tensor([5.0])) != GaussianNoise(torch.tensor([6.0])) and len({JPEG(40), JPEG(40), JPEG(41)}) == 2


def test_autocast_does_not_change_the_result():
    x = torch.rand(2, 3, 32, 32, generator=gen())
    for d in (GaussianBlur(2.0), JPEG(50), Downsample(4)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(d(x), d(x)) and d(x).dtype == torch.float32
            low = d(x)
        assert torch.equal(low, d(x))


def test_cached_constants_survive_inference_mode():
    sampling.resize_matrix.cache_clear(), compression._jpeg_constants.cache_clear()
    with torch.inference_mode():
        D.jpeg(D.bicubic(torch.rand(1, 3, 36, 36), 1 / 2).clamp(0, 1), 50)
    x = torch.rand(1, 3, 36, 36, requires_grad=True)
    D.jpeg(D.bicubic(x, 1 / 2), 50).sum().backward()
    assert x.grad.abs().sum() > 0


# ---------------------------------------------------------------- parameters

@given(st.floats(0, 5), st.floats(0.01, 5))
@settings(deadline=None, max_examples=20)
def test_distributions_stay_inside(lo, width):
    for dist in (Uniform(lo, lo + width), LogUniform(lo + 0.1, lo + 0.1 + width), Squared(Uniform(lo, lo + width))):
        v = dist.sample(500, gen())
        assert v.shape == (500,) and v.min() >= dist.low * (1 - 1e-5) and v.max() <= dist.high * (1 + 1e-5)
        assert torch.equal(v, dist.sample(500, gen())) and v.std() > 0


def test_distribution_shapes():
    u, lu, sq = (d.sample(200_000, gen()) for d in (Uniform(2, 4), LogUniform(0.01, 1), Squared(Uniform(0, 0.16))))
    assert abs(u.mean() - 3) < 0.01 and abs(u.var() - 4 / 12) < 0.01
    assert abs((lu < 0.1).float().mean() - 0.5) < 0.01
    assert abs(sq.mean() - 0.16**2 / 3) < 1e-4
    c = Choice((5, 10, 20)).sample(30_000, gen())
    assert all(abs((c == v).float().mean() - 1 / 3) < 0.02 for v in (5, 10, 20))


def test_per_sample_parameters():
    x = torch.full((4, 3, 96, 96), 0.5)
    sigma = torch.tensor([5.0, 10, 20, 30])
    std = (GaussianNoise(sigma)(x, generator=gen()) - x).std((1, 2, 3)) * 255
    torch.testing.assert_close(std, sigma, rtol=0.02, atol=0)
    real = torch.cat([photo("astronaut", 128, 128), photo("chelsea", 128, 128)]).double()
    pairs = [(GaussianBlur(torch.tensor([1.0, 3.0])), [GaussianBlur(1.0), GaussianBlur(3.0)]),
             (JPEG(torch.tensor([20, 80])), [JPEG(20), JPEG(80)]),
             (MotionBlur(torch.tensor([5.0, 11.0]), torch.tensor([0.0, 45.0])), [MotionBlur(5.0, 0.0), MotionBlur(11.0, 45.0)]),
             (Haze(torch.tensor([0.5, 1.5]), torch.tensor([0.7, 0.9]), torch.rand(2, 1, 128, 128, generator=gen())), None)]
    for batched, singles in pairs:
        if singles is None:
            singles = [Haze(b, a, batched.depth[i:i + 1]) for i, (b, a) in enumerate(zip((0.5, 1.5), (0.7, 0.9)))]
        want = torch.cat([d(real[i:i + 1]) for i, d in enumerate(singles)])
        torch.testing.assert_close(batched(real), want, rtol=0, atol=1e-6)


def test_parameter_tensor_of_the_wrong_length():
    for d in (GaussianNoise(torch.tensor([1.0, 2.0])), GaussianBlur(torch.tensor([1.0, 2.0])), JPEG(torch.tensor([10.0, 20.0]))):
        with pytest.raises(ValueError, match=" 2 .* 3"):
            d(torch.rand(3, 3, 16, 16), generator=gen())


# ---------------------------------------------------------------- noise laws

def test_gaussian_noise_is_the_stated_formula():
    x = photo("chelsea", 64, 64)
    z = torch.randn(x.shape, generator=gen(3))
    want = x + z * (25 / 255)
    for sigma in (25, torch.tensor([25.0])):
        torch.testing.assert_close(GaussianNoise(sigma)(x, generator=gen(3)), want.clamp(0, 1), rtol=0, atol=1e-6)
        torch.testing.assert_close(GaussianNoise(sigma, clip=False)(x, generator=gen(3)), want, rtol=0, atol=1e-6)
    assert GaussianNoise(50)(x, generator=gen()).max() <= 1 < GaussianNoise(50, clip=False)(x, generator=gen()).max()


@pytest.mark.parametrize("level", [0.1, 0.5, 0.9])
def test_variance_laws(level):
    x = torch.full((2, 3, 256, 256), level, dtype=torch.float64)
    a, b = 0.01, 0.0004
    for d, law in ((GaussianNoise(20, clip=False), (20 / 255) ** 2), (Speckle(20, clip=False), (level * 20 / 255) ** 2),
                   (RawNoise(a, b, form="full"), a * level + b), (RawNoise(a, b, form="plane"), a * level + b)):
        n = d(x, generator=gen()) - (x if "plane" not in repr(d) else x[:, :1])
        assert abs(float(n.var()) / law - 1) < 0.02 and abs(float(n.mean())) < 4 * math.sqrt(law / n.numel())


def test_salt_and_pepper_fractions():
    x = torch.full((1, 3, 256, 256), 0.5)
    y = SaltPepper(0.2)(x, generator=gen())
    for value, share in ((0, 0.1), (1, 0.1), (0.5, 0.8)):
        assert abs((y == value).float().mean() - share) < 0.005
    assert torch.equal(SaltPepper(0.0)(x, generator=gen()), x) and ((SaltPepper(1.0)(x, generator=gen()) - 0.5).abs() == 0.5).all()


def test_raw_noise_forms_agree():
    x = photo("coffee", 32, 40)
    for p in BAYER:
        plane, packed, masked = (RawNoise(0.02, 0.001, p, f)(x, generator=gen()) for f in ("plane", "packed", "masked"))
        assert torch.equal(D.unpack_bayer(packed, p), plane) and torch.equal(masked.sum(1, keepdim=True), plane)
        assert torch.equal((masked != 0).sum(1), torch.ones(1, 32, 40, dtype=torch.long))
    none = RawNoise(0.0, 0.0, clip=True)(x, generator=gen())
    torch.testing.assert_close(none, D.mosaic(x), rtol=0, atol=1e-8)


def test_default_raw_ranges():
    x = torch.full((64, 1, 64, 64), 0.5)
    var = RawNoise(form="full")(x, generator=gen()).var((1, 2, 3))
    assert var.max() < 1.15 * (0.16**2 * 0.5 + 0.06**2) and var.max() > 10 * var.min()


def camera_reference(a, z, shot, read, blur, gamma, pattern="RGGB"):
    """The formula on one (H, W, 3) array with SciPy."""
    h, w, _ = a.shape
    lin, noise = a**gamma, np.zeros_like(a)
    for i in range(h):
        for j in range(w):
            c = "RGB".index(pattern[2 * (i % 2) + j % 2])
            noise[i, j, c] = np.sqrt(shot * lin[i, j, c] + read) * z[i, j]
    rb, g = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 4, np.array([[0, 1, 0], [1, 4, 1], [0, 1, 0]]) / 4
    out = np.empty_like(a)
    for c, k in enumerate((rb, g, rb)):
        n = ndimage.convolve(noise[..., c], k, mode="mirror")
        if blur: n = ndimage.gaussian_filter(n, blur, mode="nearest", radius=6)
        out[..., c] = np.clip(lin[..., c] + n, 1e-8, 1) ** (1 / gamma)
    return out


@pytest.mark.parametrize("pattern", BAYER)
def test_camera_noise_against_scipy(pattern):
    x = photo("astronaut", 26, 33).double()
    z = torch.randn(1, 1, 26, 33, generator=gen(2), dtype=torch.float64)[0, 0].numpy()
    a = x[0].permute(1, 2, 0).numpy()
    got = CameraNoise(0.03, 0.001, blur=1.5, pattern=pattern, quantise=False)(x, generator=gen(2))
    np.testing.assert_allclose(got[0].permute(1, 2, 0).numpy(), camera_reference(a, z, 0.03, 0.001, 1.5, 2.2, pattern), atol=1e-10)
    got = ColourNoise(0.1, 0.03, pattern=pattern)(x, generator=gen(2))
    np.testing.assert_allclose(got[0].permute(1, 2, 0).numpy(), camera_reference(a, z, 0.01, 0.0009, 0, 2.2, pattern), atol=1e-10)


def test_camera_noise_is_8_bit_correlated_and_signal_dependent():
    x = torch.full((1, 3, 256, 256), 0.5)
    y = D.camera("smooth")(x, generator=gen())
    torch.testing.assert_close(y * 255, (y * 255).round(), rtol=0, atol=1e-4)
    n = (CameraNoise(0.02, 0.001)(x, generator=gen()) - x)[0]
    n = n - n.mean((1, 2), keepdim=True)
    assert (n[:, :, 1:] * n[:, :, :-1]).mean() / n.var() > 0.7  # neighbours in space
    linear = [CameraNoise(0.02, 0.0005, blur=0.0, gamma=1.0, quantise=False)(torch.full((1, 3, 256, 256), v), generator=gen()).var() for v in (0.2, 0.6)]
    assert abs(linear[1] / linear[0] - (0.02 * 0.6 + 0.0005) / (0.02 * 0.2 + 0.0005)) < 0.15


def test_per_sample_patterns():
    x = torch.full((32, 3, 16, 16), 0.5)
    y = ColourNoise(0.16, 0.06, pattern=Choice(BAYER))(x, generator=gen())
    assert y.isfinite().all() and len({ColourNoise(pattern=p) for p in BAYER}) == 4


# ---------------------------------------------------------------- mosaic

@pytest.mark.parametrize("pattern", BAYER)
@pytest.mark.parametrize("h,w", [(2, 2), (7, 9), (16, 10)])
def test_mosaic_by_loop_and_demosaic_by_scipy(pattern, h, w):
    x = torch.rand(1, 3, h, w, generator=gen(), dtype=torch.float64)
    masked, plane = D.mosaic(x, pattern), D.mosaic(x, pattern, "plane")
    for i in range(h):
        for j in range(w):
            c = "RGB".index(pattern[2 * (i % 2) + j % 2])
            assert plane[0, 0, i, j] == x[0, c, i, j] == masked[0, c, i, j] and masked[0, :, i, j].count_nonzero() == 1
    rb, g = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 4, np.array([[0, 1, 0], [1, 4, 1], [0, 1, 0]]) / 4
    for c, k in enumerate((rb, g, rb)):
        padded = np.pad(masked[0, c].numpy(), 1, mode="reflect")
        np.testing.assert_allclose(D.demosaic_bilinear(masked)[0, c].numpy(), signal.convolve2d(padded, k, mode="valid"), atol=1e-12)
    ones = torch.ones(1, 3, h, w, dtype=torch.float64)
    torch.testing.assert_close(D.demosaic_bilinear(D.mosaic(ones, pattern)), ones)
    torch.testing.assert_close(D.demosaic_bilinear(masked) * masked.ne(0), masked, rtol=0, atol=1e-12)  # samples are kept


@pytest.mark.parametrize("pattern", BAYER)
def test_packing_order_and_round_trip(pattern):
    plane = torch.rand(2, 1, 8, 6, generator=gen())
    packed = D.pack_bayer(plane, pattern)
    assert packed.shape == (2, 4, 4, 3) and torch.equal(D.unpack_bayer(packed, pattern), plane)
    colours = torch.stack([torch.full((8, 6), v) for v in (1.0, 2.0, 3.0)])[None]
    assert D.mosaic(colours, pattern, "packed").mean((0, 2, 3)).tolist() == [1, 2, 2, 3]
    row, col = divmod(pattern.index("R"), 2)  # channel 1 is the green in red's row, channel 2 the one in red's column
    assert torch.equal(packed[:, 1, 0, 0], plane[:, 0, row, 1 - col]) and torch.equal(packed[:, 2, 0, 0], plane[:, 0, 1 - row, col])


# ---------------------------------------------------------------- blur

@pytest.mark.parametrize("h,w", [(1, 1), (5, 40), (31, 33), (64, 64), (100, 71)])
@pytest.mark.parametrize("sigma,size", [(0.7, 21), (4.0, 21), (1.5, 13), (6.0, 61)])
def test_gaussian_blur_against_scipy(h, w, sigma, size):
    x = torch.rand(1, 2, h, w, generator=gen(), dtype=torch.float64)
    want = [ndimage.gaussian_filter(c.numpy(), sigma, mode="nearest", radius=size // 2) for c in x[0]]
    np.testing.assert_allclose(D.gaussian_blur(x, sigma, size)[0].numpy(), np.stack(want), atol=1e-12)


def test_gaussian_blur_21_is_the_normalised_2d_kernel():
    x = photo("coffee", 40, 50).double()
    t = np.arange(-10, 11)
    k = np.exp(-(t[:, None] ** 2 + t**2) / (2 * 5.0**2))
    want = ndimage.convolve(x[0, 1].numpy(), k / k.sum(), mode="nearest")
    np.testing.assert_allclose(D.gaussian_blur(x, 5.0)[0, 1].numpy(), want, atol=1e-12)
    assert torch.equal(D.gaussian_blur(x, 0.0), x)


@pytest.mark.parametrize("k", [1, 3, 9, 15])
@pytest.mark.parametrize("h,w", [(1, 1), (6, 31), (48, 37)])
def test_convolve_against_scipy(k, h, w):
    x = torch.rand(2, 3, h, w, generator=gen(), dtype=torch.float64)
    kernels = torch.rand(2, k, k, generator=gen(1), dtype=torch.float64)
    got = D.convolve(x, kernels)
    for i in range(2):
        for c in range(3):
            want = ndimage.convolve(x[i, c].numpy(), kernels[i].numpy(), mode="nearest")
            np.testing.assert_allclose(got[i, c].numpy(), want, atol=1e-10)
    torch.testing.assert_close(D.convolve(x.float(), kernels.float()), got.float(), rtol=1e-5, atol=1e-4)


def test_kernels_are_normalised_and_oriented():
    k = KernelBlur(torch.rand(4, 5, 5, generator=gen())).kernel
    torch.testing.assert_close(k.sum((1, 2)), torch.ones(4))
    horizontal, vertical, diagonal = D.line_kernel(torch.tensor([7.0] * 3), torch.tensor([0.0, 90.0, 45.0]), 9)
    assert horizontal[4].sum() == 7 and horizontal.sum() == 7
    torch.testing.assert_close(vertical, horizontal.T, atol=1e-5, rtol=0)
    assert diagonal[2, 6] > 0.9 and diagonal[6, 2] > 0.9 and diagonal[2, 2] == 0  # counter-clockwise: rises to the right
    shakes = D.shake_kernel(torch.tensor([6.0, 20.0]), 23, generator=gen())
    torch.testing.assert_close(shakes.sum((1, 2)), torch.ones(2))
    for kernel, extent in zip(shakes, (6, 20)):
        rows, cols = (kernel.sum(d).nonzero().flatten() for d in (1, 0))
        assert extent - 1 <= max(rows.max() - rows.min(), cols.max() - cols.min()) <= extent + 2
    torch.testing.assert_close(D.sinc_kernel(torch.tensor([1.5])).sum(), torch.tensor(1.0))
    assert torch.allclose(D.esrgan_kernels(torch.rand(64, 3, 8, 8), generator=gen()).sum((1, 2)), torch.ones(64), atol=1e-4)


@pytest.mark.parametrize("d", [MotionBlur(9.0, 20.0), KernelBlur(torch.rand(7, 7)), GaussianBlur(3.0), CameraShake(12.0)], ids=ids)
def test_blurs_keep_constants(d):
    x = torch.full((1, 3, 33, 20), 0.3)
    torch.testing.assert_close(d(x, generator=gen()), x, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- JPEG

def pillow(x, quality, subsampling):
    a = (x[0].permute(1, 2, 0).numpy() * 255 + 0.5).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(a.squeeze(-1) if a.shape[-1] == 1 else a).save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    y = torch.from_numpy(np.array(Image.open(buffer))).float() / 255
    return (y if y.ndim == 3 else y[..., None]).permute(2, 0, 1)[None]


@pytest.mark.parametrize("quality", [1, 10, 25, 40, 49, 50, 51, 75, 90, 95, 100])
@pytest.mark.parametrize("name,h,w", [("astronaut", 256, 256), ("chelsea", 299, 451), ("coffee", 167, 90), ("rocket", 127, 33), ("camera", 255, 129)])
def test_jpeg_matches_pillow(name, h, w, quality):
    x = photo(name, h, w)
    for code, sub in ((2, "4:2:0"), (0, "4:4:4")):
        theirs = pillow(x, quality, code)
        agreement = db(D.jpeg(x, quality, sub), theirs)
        assert agreement > 45
        assert quality > 90 or agreement > db(theirs, x) + 5  # far closer to libjpeg's output than to its input


@pytest.mark.parametrize("h", [1, 2, 3, 5, 8, 9, 16, 17])
@pytest.mark.parametrize("w", [1, 2, 3, 4, 5, 6, 7, 15, 17, 33])
def test_jpeg_matches_pillow_on_tiny_sizes(h, w):
    x = photo("astronaut")[..., 60:60 + h, 180:180 + w].contiguous()
    assert db(D.jpeg(x, 60), pillow(x, 60, 2)) > 40


def test_chroma_steps_against_libjpeg_integer_formulas():
    c = torch.randint(-128, 128, (1, 2, 6, 8), generator=gen()).float()
    got = compression._double(c)
    v = np.pad(c.numpy().astype(int) + 128, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    for i in range(12):
        for j in range(16):
            y, x = i // 2 + 1, j // 2 + 1
            sums = 3 * v[:, :, y] + v[:, :, y + (1 if i % 2 else -1)]
            want = (3 * sums[..., x] + sums[..., x + (1 if j % 2 else -1)] + (7 if j % 2 else 8)) >> 4
            assert (got[..., i, j].numpy() + 128 == want).all()
    full = torch.randint(-128, 128, (1, 2, 16, 16), generator=gen()).float()
    v = full.numpy().astype(int) + 128
    want = (v[..., ::2, ::2] + v[..., 1::2, ::2] + v[..., ::2, 1::2] + v[..., 1::2, 1::2] + np.array([1, 2] * 4)) >> 2
    assert (compression._halve(full).numpy() + 128 == want).all()


def test_quantisation_tables_against_pillow():
    for quality in range(1, 101, 3):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "JPEG", quality=quality)
        theirs = Image.open(buffer).quantization
        ours = D.quantisation_tables(torch.tensor([float(quality)]))[0].long()
        for i in (0, 1):
            assert ours[i].tolist() == list(theirs[i]) or sorted(ours[i].tolist()) == sorted(theirs[i])


def test_jpeg_is_on_the_8_bit_grid_and_rounds_quality():
    x = photo("chelsea", 64, 64)
    y = D.jpeg(x, 30)
    torch.testing.assert_close(y * 255, (y * 255).round(), rtol=0, atol=1e-4)
    assert torch.equal(y, D.jpeg(x, 30.4)) and not torch.equal(y, D.jpeg(x, 31))
    assert y.min() >= 0 and y.max() <= 1


@pytest.mark.parametrize("sub", ["4:2:0", "4:4:4"])
def test_jpeg_gradient_is_straight_through(sub):
    x = photo("chelsea", 40, 56).mul(0.6).add_(0.2).requires_grad_()
    y = D.jpeg(x, 50, sub)
    assert torch.equal(y.detach(), D.jpeg(x.detach(), 50, sub))  # the same bits with and without a gradient
    weight = torch.randn(y.shape, generator=gen())
    grad, = torch.autograd.grad((y * weight).sum(), x)
    assert grad.isfinite().all() and grad.abs().min() >= 0 and (grad != 0).float().mean() > 0.99
    if sub == "4:4:4":  # without its roundings the 4:4:4 codec is the identity
        assert db(grad, weight) > 40
    low, = torch.autograd.grad(D.jpeg(x, 50, sub).sum(), x)
    torch.testing.assert_close(low.mean(), torch.tensor(1.0), rtol=0, atol=1e-3)


# ---------------------------------------------------------------- resizing

def imresize(a, scale, antialias=True):
    """MATLAB's imresize of a 2-D array, bicubic, straight from its definition, one output sample at a time."""
    def h(t):
        t = abs(t)
        return 1.5 * t**3 - 2.5 * t**2 + 1 if t <= 1 else -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2 if t <= 2 else 0.0
    shrink = min(scale, 1) if antialias else 1

    def axis0(a):
        n = a.shape[0]
        out = np.zeros((math.ceil(n * scale), a.shape[1]))
        for j in range(1, len(out) + 1):
            u = j / scale + 0.5 * (1 - 1 / scale)  # 1-based, as in the definition
            left, total = math.floor(u - 2 / shrink), 0.0
            for i in range(left, left + math.ceil(4 / shrink) + 2):
                weight = h(shrink * (u - i))
                m = (i - 1) % (2 * n)
                out[j - 1] += weight * a[m if m < n else 2 * n - 1 - m]
                total += weight
            out[j - 1] /= total
        return out
    return axis0(axis0(a).T).T


@pytest.mark.parametrize("scale", [1 / 2, 1 / 3, 1 / 4, 0.4, 1.0, 1.5, 2, 3, 4])
@pytest.mark.parametrize("antialias", [True, False])
def test_bicubic_against_the_definition(scale, antialias):
    x = torch.rand(1, 1, 24, 36, generator=gen(), dtype=torch.float64)
    got = D.bicubic(x, scale, antialias)[0, 0].numpy()
    np.testing.assert_allclose(got, imresize(x[0, 0].numpy(), scale, antialias), atol=1e-12)


def test_bicubic_known_values():
    # rows of MATLAB's interpolation at half size: the 8-tap half-sample filter (-3 -9 29 111 111 29 -9 -3) / 256
    matrix = sampling.resize_matrix(64, 0.5, True, torch.float64, torch.device("cpu"))
    taps = torch.tensor([-3, -9, 29, 111, 111, 29, -9, -3], dtype=torch.float64) / 256
    torch.testing.assert_close(matrix[16, 29:37], taps)
    assert matrix[16].count_nonzero() == 8 and torch.allclose(matrix.sum(1), torch.ones(32, dtype=torch.float64))
    ramp = torch.arange(40, dtype=torch.float64).expand(1, 1, 40, 40)
    torch.testing.assert_close(D.bicubic(ramp, 0.5)[0, 0, 0, 3:-3], torch.arange(20, dtype=torch.float64)[3:-3] * 2 + 0.5)
    half = D.bicubic(photo("astronaut"), 0.5)
    pil = Image.fromarray(data.astronaut()).resize((256, 256), Image.Resampling.BICUBIC)
    pil = torch.from_numpy(np.array(pil)).permute(2, 0, 1)[None] / 255
    assert db(half[..., 8:-8, 8:-8].clamp(0, 1), pil[..., 8:-8, 8:-8]) > 50  # another antialiased bicubic, 8 bits


def test_downsample_clips_and_keeps_constants():
    x = torch.ones(1, 3, 32, 48)
    torch.testing.assert_close(Downsample(4)(x), torch.ones(1, 3, 8, 12))
    assert Downsample(2)((torch.rand(1, 3, 64, 64, generator=gen()) > 0.5).float()).max() <= 1


# ---------------------------------------------------------------- haze and rain

def test_koschmieder_by_hand():
    x, depth = torch.tensor([0.2, 0.8]).view(1, 1, 1, 2), torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    y = D.koschmieder(x, depth, 1.5, 0.9)
    t = math.exp(-1.5)
    torch.testing.assert_close(y.flatten(), torch.tensor([0.2, 0.8 * t + 0.9 * (1 - t)]))
    assert torch.allclose(D.koschmieder(x, depth, 0.0, 0.9), x)


def test_random_depth_is_smooth_and_scaled():
    d = D.random_depth(torch.zeros(16, 3, 64, 50), generator=gen())
    assert d.shape == (16, 1, 64, 50) and torch.allclose(d.amin((2, 3)), torch.zeros(16, 1)) and torch.allclose(d.amax((2, 3)), torch.ones(16, 1))
    assert (d[:, :, 1:] - d[:, :, :-1]).abs().max() < 0.12 and d[:, :, :20].mean() > d[:, :, -20:].mean()


def test_rain_brightens_along_its_angle():
    x = torch.full((1, 3, 128, 128), 0.2)
    y = Rain(0.002, 21, 90, 0.6)(x, generator=gen())[0, 0] - 0.2
    assert y.min() >= -1e-6 and y.mean() > 0.003 and torch.equal(y, Rain(0.002, 21, 90, 0.6)(x, generator=gen())[0, 2] - 0.2)
    along, across = (y[1:] * y[:-1]).sum(), (y[:, 1:] * y[:, :-1]).sum()
    assert along > 3 * across
    means = [float((D.rain(f)(x.expand(8, -1, -1, -1), generator=gen()) - 0.2).mean()) for f in ("rain100l", "rain14000", "heavy")]
    assert means == sorted(means) and means[0] > 0
    torch.testing.assert_close(Rain(0.0, 5, 90, 1.0)(x, generator=gen()), x)


# ---------------------------------------------------------------- hybrid and Real-ESRGAN

def test_hybrid_bins_partition_and_strata():
    levels = {k: D.hybrid_bins(k) for k in ("mild", "moderate", "severe")}
    assert sum(map(len, levels.values())) == len(set().union(*levels.values())) == 1000
    assert {sum(t) + 1 for t in levels["moderate"]} == set(range(12, 18))
    parts = [D.hybrid_bins("severe", i, 4) for i in range(4)]
    assert sum(parts, ()) == levels["severe"] and max(map(len, parts)) - min(map(len, parts)) <= 1
    lean = [np.mean([b - n for b, n, _ in p]) for p in parts]
    assert lean == sorted(lean) and lean[0] < -1 and lean[-1] > 1


def test_hybrid_values_lie_in_their_bins_and_get_worse():
    sigma, noise, quality = D.hybrid_parameters(D.hybrid("severe"), 4000, generator=gen())
    b, n = (sigma / 0.5).floor(), (noise / 5).floor()
    edges = torch.tensor([100.0, 80, 60, 50, 40, 35, 30, 25, 20, 15, 10])
    j = (quality[:, None] <= edges[:-1]).sum(1) - 1
    total = b + n + j + 1
    assert sigma.max() <= 5 and noise.max() <= 50 and 10 <= quality.min() and quality.max() <= 100
    assert total.min() >= 17 and total.max() <= 28 and (total >= 18).float().mean() > 0.99  # bins' ends may round over
    x = photo("astronaut", 128, 128).expand(16, -1, -1, -1)
    quality_db = [db(D.hybrid(k)(x, generator=gen()), x) for k in ("mild", "moderate", "severe")]
    assert quality_db == sorted(quality_db, reverse=True) and D.hybrid("mild") == Hybrid("mild")


def test_hybrid_is_the_chain():
    x, d = photo("chelsea", 64, 64), D.hybrid("moderate")
    g = gen(3)
    sigma, noise, quality = D.hybrid_parameters(d, 1, generator=g)
    want = D.jpeg(D.gaussian_noise(D.gaussian_blur(x, sigma), noise, generator=g), quality)
    assert torch.equal(d(x, generator=gen(3)), want)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("scale", [1, 2, 4])
def test_realesrgan(order, scale):
    x = photo("chelsea", 96, 128).expand(4, -1, -1, -1)
    for seed in range(4):
        y = RealESRGAN(order=order, scale=scale)(x, generator=gen(seed))
        assert y.shape == (4, 3, 96 // scale, 128 // scale) and y.min() >= 0 and y.max() <= 1
        torch.testing.assert_close(y * 255, (y * 255).round(), rtol=0, atol=1e-4)
        assert not torch.equal(y[0], y[1]) and 8 < db(y, D.bicubic(x, 1 / scale)) < 45


# ---------------------------------------------------------------- gradients

def _x(*shape): return (torch.rand(*shape, generator=gen(), dtype=torch.float64) * 0.8 + 0.1).requires_grad_()


@pytest.mark.parametrize("f", [
    lambda x: D.gaussian_blur(x, 1.5, 7), lambda x: D.convolve(x, torch.rand(2, 3, 3, generator=gen()).double()),
    lambda x: D.motion_blur(x, 4.0, 30.0), lambda x: D.bicubic(x, 0.5), lambda x: D.bicubic(x, 2), D.mosaic,
    lambda x: D.mosaic(x, "GRBG", "packed"), lambda x: D.demosaic_bilinear(x), Downsample(2),
    lambda x: D.koschmieder(x, torch.rand(2, 1, 6, 8, generator=gen()).double(), 1.1, 0.8),
    lambda x: D.raw_noise(x, 0.02, 0.001, generator=gen()), lambda x: D.gaussian_noise(x, 5, generator=gen(), clip=False),
    lambda x: CameraNoise(0.02, 0.001, quantise=False)(x, generator=gen()),
])
def test_gradcheck(f):
    assert torch.autograd.gradcheck(f, (_x(2, 3, 6, 8),), fast_mode=True)


def test_gradients_with_respect_to_parameters():
    x, depth = _x(2, 1, 6, 7), _x(2, 1, 6, 7)
    sigma, beta, light = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([1.0, 2.0], [0.5, 1.0], [0.7, 0.8]))
    assert torch.autograd.gradcheck(lambda s: D.gaussian_blur(x, s, 7), (sigma,))
    assert torch.autograd.gradcheck(lambda d, b, a: D.koschmieder(x, d, b, a), (depth, beta, light))
    assert torch.autograd.gradcheck(lambda k: D.convolve(x, k), (_x(2, 3, 3),), fast_mode=True)
    assert torch.autograd.gradcheck(lambda s: D.gaussian_noise(x, s, generator=gen(), clip=False), (sigma,))


@pytest.mark.parametrize("d", RANDOM + FIXED, ids=ids)
def test_gradients_are_finite_even_on_black_and_white(d):
    x = torch.cat([torch.zeros(1, 3, 48, 32), torch.ones(1, 3, 48, 32), torch.rand(1, 3, 48, 32, generator=gen())]).requires_grad_()
    d(x, generator=gen()).sum().backward()
    assert x.grad.isfinite().all() and x.grad[2].abs().sum() > 0


@pytest.mark.parametrize("d", [RawNoise(0.0, 0.0, form="full"), CameraNoise(0.0, 0.0), RawNoise(0.1, 0.0)], ids=ids)
def test_gradients_are_finite_without_noise(d):
    x = torch.zeros(1, 3, 16, 16, requires_grad=True)
    d(x, generator=gen()).sum().backward()
    assert x.grad.isfinite().all()


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("make,words", [
    (lambda: GaussianNoise(-3.0), "GaussianNoise.*sigma.*-3.0.*255"),
    (lambda: GaussianNoise(float("nan")), "sigma"), (lambda: GaussianNoise("25"), "sigma"), (lambda: GaussianNoise(True), "sigma"),
    (lambda: GaussianNoise(Uniform(-1, 5)), "sigma.*-1"), (lambda: GaussianNoise(torch.tensor([5.0, -2.0])), "sigma.*-2.0"),
    (lambda: GaussianNoise(torch.ones(2, 2)), "shape"), (lambda: Speckle(-1), "sigma"), (lambda: SaltPepper(1.5), "amount"),
    (lambda: RawNoise(-0.1), "shot"), (lambda: RawNoise(0.1, -0.1), "read"), (lambda: RawNoise(pattern="RGBG"), "pattern.*RGGB.*'RGBG'"),
    (lambda: RawNoise(form="rgb"), "form"), (lambda: CameraNoise(blur=-1), "blur"), (lambda: CameraNoise(pattern="x"), "pattern"),
    (lambda: CameraNoise(gamma=0), "gamma"), (lambda: D.camera("x"), "smooth.*textured.*'x'"), (lambda: ColourNoise(-1), "signal"),
    (lambda: ColourNoise(pattern=Choice(("RGGB", "x"))), "pattern"), (lambda: GaussianBlur(-1), "sigma"),
    (lambda: GaussianBlur(1, 20), "odd"), (lambda: KernelBlur(torch.ones(4, 4)), "odd"), (lambda: KernelBlur(torch.zeros(3, 3)), "non-zero sum"),
    (lambda: KernelBlur(torch.ones(3)), "shape"), (lambda: KernelBlur(torch.ones(3, 3) * float("nan")), "finite"),
    (lambda: MotionBlur(0.5), "length"), (lambda: MotionBlur(5, 1000.0), "angle"), (lambda: CameraShake(-1), "extent"),
    (lambda: JPEG(0), "quality.*100.*got 0"), (lambda: JPEG(101), "quality"), (lambda: JPEG(Uniform(0, 50)), "quality"),
    (lambda: JPEG(50, "4:2:2"), "subsampling"), (lambda: Rain(-0.1), "density"), (lambda: Rain(veil=2), "veil"), (lambda: D.rain("x"), "family"),
    (lambda: Haze(-1), "beta"), (lambda: Haze(1, 2), "airlight"), (lambda: Downsample(0), "scale"), (lambda: Downsample(2.5), "integer"),
    (lambda: Mosaic("GGRB"), "pattern"), (lambda: Mosaic(form="x"), "form"), (lambda: RealESRGAN(order=3), "order"),
    (lambda: RealESRGAN(order=1.5), "integers"), (lambda: RealESRGAN(sinc=2), "sinc"), (lambda: D.hybrid("hard"), "level.*'hard'"),
    (lambda: D.hybrid("mild", 4, 4), "stratum"), (lambda: Compose(GaussianNoise(5), "x"), "Compose"),
    (lambda: Uniform(3, 1), "lo <= hi"), (lambda: Uniform(0, math.inf), "finite"), (lambda: LogUniform(0, 1), "0 < lo"),
    (lambda: Squared(Uniform(-1, 1)), ">= 0"), (lambda: Choice(()), "at least one"),
])
def test_bad_parameters(make, words):
    with pytest.raises(ValueError, match=words):
        make()


X = torch.rand(1, 3, 16, 16)


@pytest.mark.parametrize("call,words", [
    (lambda: GaussianNoise(5)((X * 255).byte(), generator=gen()), "uint8.*255"),
    (lambda: GaussianNoise(5)(X.numpy(), generator=gen()), "floating point"),
    (lambda: GaussianNoise(5)(X[0], generator=gen()), "x\\[None\\]"), (lambda: GaussianBlur(1)(X[:0]), "batch"),
    (lambda: GaussianNoise(5)(X, generator=7), "generator"), (lambda: JPEG(50)(torch.rand(1, 2, 8, 8)), "1 or 3 channels"),
    (lambda: Mosaic()(X[:, :1]), "3 channels"), (lambda: CameraNoise()(X[:, :1], generator=gen()), "3 channels"),
    (lambda: RealESRGAN()(X[:, :1], generator=gen()), "3 channels"), (lambda: RealESRGAN(scale=4)(X, generator=gen()), "at least 32"),
    (lambda: Mosaic(form="packed")(X[..., :15]), "even"), (lambda: D.pack_bayer(X), "1 channels"), (lambda: D.unpack_bayer(X), "4 channels"),
    (lambda: D.demosaic_bilinear(X[..., :1]), ">= 2"), (lambda: Downsample(3)(X), "multiples of 3"),
    (lambda: KernelBlur(torch.ones(2, 3, 3))(X.expand(3, -1, -1, -1)), "2 kernels.* 3"),
    (lambda: D.koschmieder(X, torch.rand(1, 1, 8, 8), 1.0), "depth.*8, 8"), (lambda: D.bicubic(X, 0), "positive"),
    (lambda: D.gaussian_noise(X, -1, generator=gen()), "sigma"), (lambda: D.gaussian_noise(X, 1, generator=None), "generator"),
    (lambda: D.gaussian_blur(X, -1.0), "sigma"), (lambda: D.jpeg(X, 0), "quality"), (lambda: D.mosaic(X, "x"), "pattern"),
])
def test_bad_calls(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_cpu_generator_gives_the_same_bits_in_double():
    a = GaussianNoise(Choice((5, 10)))(X.double(), generator=gen())
    assert a.dtype == torch.float64 and torch.equal(a, GaussianNoise(Choice((5, 10)))(X.double(), generator=gen()))


# ---------------------------------------------------------------- mixtures

def test_one_of_gives_every_sample_its_own_kind():
    from irnb.degradations.base import Compose, Identity, OneOf
    from irnb.degradations.blur import GaussianBlur
    from irnb.degradations.noise import GaussianNoise
    from irnb.degradations.parameters import Uniform
    mix = OneOf(Identity(), GaussianBlur(2.0), GaussianNoise(Uniform(20, 50)))
    x = torch.rand(9, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    y, chosen = mix(x, generator=torch.Generator().manual_seed(5)), mix.draw(9, generator=torch.Generator().manual_seed(5))
    assert set(chosen.tolist()) == {0, 1, 2}
    assert torch.equal(y[chosen == 0], x[chosen == 0]) and torch.allclose(y[chosen == 1], GaussianBlur(2.0)(x[chosen == 1]))
    assert ((y - x)[chosen == 2].flatten(1).std(1) > .03).all()
    assert torch.equal(y, mix(x, generator=torch.Generator().manual_seed(5))) and not torch.equal(y, mix(x, generator=torch.Generator().manual_seed(6)))
    assert mix.scale == 1 and mix.stochastic and repr(mix).startswith("OneOf(Identity()") and "_or_" in mix.name
    assert Compose(mix, GaussianNoise(5))(x, generator=torch.Generator().manual_seed(0)).shape == x.shape


def test_one_of_draws_all_kinds_alike():
    from irnb.degradations.base import Identity, OneOf
    from irnb.degradations.noise import GaussianNoise
    counts = torch.bincount(OneOf(Identity(), GaussianNoise(5), Identity()).draw(6000, generator=torch.Generator().manual_seed(0)))
    assert len(counts) == 3 and (counts - 2000).abs().max() < 5 * 36.5   # five standard deviations of a binomial


def test_bad_mixtures():
    from irnb.degradations.base import Identity, OneOf
    from irnb.degradations.sampling import Downsample
    for kinds, message in (((), "OneOf.*scale"), ((Identity(), Downsample(2)), "OneOf.*scale.*scale 2"), ((Identity(), 3), "OneOf.*got 3")):
        with pytest.raises(ValueError, match=message):
            OneOf(*kinds)
    with pytest.raises(ValueError, match="generator"):
        OneOf(Identity())(torch.rand(1, 3, 8, 8))
