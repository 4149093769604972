"""Metrics: against scikit-image, slow loops and hand-computed values; conventions; everything that must be refused."""
import math
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
import irnb.metrics
from irnb.metrics import psnr, ssim

CONVENTIONS = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=2)
METRICS = pytest.mark.parametrize("metric", [psnr, ssim])


def pair(h=64, w=48, channels=3, batch=2, seed=0, dtype=torch.float32, sigma=0.1):
    "A smooth random batch and a noisy version of it."
    g = torch.Generator().manual_seed(seed)
    clean = torch.nn.functional.avg_pool2d(torch.rand(batch, channels, h + 6, w + 6, generator=g, dtype=dtype), 7, 1)
    return clean + sigma * torch.randn(clean.shape, generator=g, dtype=dtype), clean


def arrays(x): return [image.permute(1, 2, 0).double().numpy() for image in x]


def skimage_psnr(x, y, data_range=1.):
    return torch.tensor([peak_signal_noise_ratio(a, b, data_range=data_range) for a, b in zip(arrays(x), arrays(y))], dtype=torch.float64)


def skimage_ssim(x, y, data_range=1.):
    return torch.tensor([structural_similarity(a, b, data_range=data_range, **CONVENTIONS) for a, b in zip(arrays(x), arrays(y))], dtype=torch.float64)


def slow_ssim(x, y, data_range=1.):
    "SSIM of two arrays (h, w), window by window."
    k = np.arange(11) - 5
    w = np.exp(-(k[:, None]**2 + k**2) / 4.5)
    w /= w.sum()
    c1, c2, values = (0.01 * data_range)**2, (0.03 * data_range)**2, []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i:i + 11, j:j + 11], y[i:i + 11, j:j + 11]
            ma, mb = (w * a).sum(), (w * b).sum()
            va, vb, cov = (w * (a - ma)**2).sum(), (w * (b - mb)**2).sum(), (w * (a - ma) * (b - mb)).sum()
            values.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return float(np.mean(values))


@given(h=st.integers(11, 90), w=st.integers(11, 90), channels=st.sampled_from([1, 3, 4]), batch=st.integers(1, 3), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_equals_skimage(h, w, channels, batch, seed):
    x, y = pair(h, w, channels, batch, seed)
    torch.testing.assert_close(psnr(x, y), skimage_psnr(x, y), rtol=0, atol=1e-6)
    torch.testing.assert_close(ssim(x, y), skimage_ssim(x, y), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(300, 700), (31, 1200), (900, 12), (245, 257), (11, 11)])
def test_pieces_cover_each_window_once(size):
    x, y = pair(*size, batch=1)
    torch.testing.assert_close(ssim(x, y), skimage_ssim(x, y), rtol=0, atol=1e-9)
    torch.testing.assert_close(psnr(x, y), skimage_psnr(x, y), rtol=0, atol=1e-6)


def test_pieces_of_any_size_give_the_same(monkeypatch):
    x, y = pair(150, 300, batch=3)
    expected, whole = ssim(x, y), irnb.metrics._pieces
    for pixels in (1000, 5000, 2**15, 2**24):
        monkeypatch.setattr(irnb.metrics, "_pieces", lambda planes, h, w, _: whole(planes, h, w, pixels))
        torch.testing.assert_close(ssim(x, y), expected, rtol=0, atol=1e-12)


def test_real_photographs_equal_skimage():
    for name in ("astronaut", "chelsea", "page", "moon"):
        image = getattr(data, name)()
        y = torch.tensor(image if image.ndim == 3 else image[..., None]).permute(2, 0, 1)[None] / 255
        x = (y + 0.1 * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
        torch.testing.assert_close(ssim(x, y), skimage_ssim(x, y), rtol=0, atol=1e-6)
        torch.testing.assert_close(psnr(x, y), skimage_psnr(x, y), rtol=0, atol=1e-6)


def test_equals_a_slow_loop():
    x, y = pair(14, 17, 2, 1, dtype=torch.float64)
    expected = np.mean([slow_ssim(x[0, c].numpy(), y[0, c].numpy()) for c in (0, 1)])
    assert abs(float(ssim(x, y)) - expected) < 1e-12
    assert abs(float(psnr(x, y)) - 10 * math.log10(1 / ((x - y)**2).mean())) < 1e-12


def test_flat_bright_images_keep_their_digits():
    "Where 32-bit variances would be rounding noise."
    y = torch.full((1, 1, 64, 64), 0.93)
    x = y + 1e-3 * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ssim(x, y), skimage_ssim(x, y), rtol=0, atol=1e-9)


def test_by_hand():
    zeros, point = torch.zeros(1, 1, 10, 10), torch.zeros(1, 1, 10, 10)
    point[0, 0, 2, 3] = 1
    assert abs(float(psnr(point, zeros)) - 20) < 1e-12
    assert abs(float(psnr(zeros + 0.5, zeros)) - 10 * math.log10(4)) < 1e-12
    assert float(psnr(zeros, zeros)) == math.inf and psnr(zeros, zeros).dtype == torch.float64
    a, b = 0.75, 0.25
    flat = torch.ones(1, 3, 12, 15, dtype=torch.float64)
    assert abs(float(ssim(a * flat, b * flat)) - (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)) < 1e-12
    assert abs(float(ssim(a * flat, a * flat)) - 1) < 1e-12
    wave = torch.tensor([0.25, 0.75]).repeat(8).expand(1, 1, 16, 16)
    assert float(ssim(wave, 1 - wave)) < -0.9


# --- conventions

@METRICS
def test_every_image_by_itself_and_symmetry(metric):
    x, y = pair(batch=4)
    torch.testing.assert_close(metric(x, y), torch.cat([metric(x[i:i+1], y[i:i+1]) for i in range(4)]), rtol=0, atol=1e-12)
    torch.testing.assert_close(metric(x, y), metric(y, x), rtol=0, atol=1e-12)
    torch.testing.assert_close(metric(x.to(memory_format=torch.channels_last), y.transpose(2, 3).contiguous().transpose(2, 3)), metric(x, y), rtol=0, atol=1e-7)
    assert metric(x, y).shape == (4,)


@METRICS
@pytest.mark.parametrize("crop", [1, 4, 9])
def test_crop_is_symmetric_and_first(metric, crop):
    x, y = pair()
    inner = (slice(None), slice(None), slice(crop, -crop), slice(crop, -crop))
    assert torch.equal(metric(x, y, crop_border=crop), metric(x[inner], y[inner]))
    x[:, :, :crop] = float("nan")                                            # what is cropped away does not matter
    assert metric(x, y, crop_border=crop, y_channel=True).isfinite().all()


@METRICS
def test_y_channel(metric):
    x, y = pair(dtype=torch.float64)
    luma = lambda t: ((16 + 65.481 * t[:, 0] + 128.553 * t[:, 1] + 24.966 * t[:, 2]) / 255)[:, None]
    torch.testing.assert_close(metric(x, y, y_channel=True), metric(luma(x), luma(y)), rtol=0, atol=1e-10)
    torch.testing.assert_close(metric(255 * x, 255 * y, y_channel=True, data_range=255), metric(x, y, y_channel=True), rtol=0, atol=1e-10)
    assert not torch.allclose(metric(x, y, y_channel=True), metric(x.flip(1), y.flip(1), y_channel=True))     # RGB, not BGR


@METRICS
def test_one_channel_is_a_luma_already(metric):
    "As in published evaluation code, which converts three channels only: a grey picture is compared as it is."
    x, y = (t[:, :1] for t in pair(dtype=torch.float64))
    assert torch.equal(metric(x, y, y_channel=True), metric(x, y))
    three = [t.expand(-1, 3, -1, -1) for t in (x, y)]
    gift = metric(*three, y_channel=True) - metric(x, y, y_channel=True)
    assert metric is not psnr or (gift - 20 * math.log10(255 / 219)).abs().max() < 1e-9     # 1.32 dB for repeated channels


@METRICS
def test_quantise(metric):
    x, y = pair(sigma=0.5)
    levels = lambda t: (t.clamp(0, 1) * 255).round() / 255
    torch.testing.assert_close(metric(x, y, quantise=True), metric(levels(x), levels(y)), rtol=0, atol=1e-6)
    torch.testing.assert_close(metric(255 * x, 255 * y, quantise=True, data_range=255), metric(x, y, quantise=True), rtol=0, atol=1e-5)
    assert psnr(levels(y) + 1e-4, levels(y), quantise=True).min() == math.inf


@METRICS
def test_data_range(metric):
    x, y = pair(dtype=torch.float64)
    torch.testing.assert_close(metric(255 * x, 255 * y, data_range=255), metric(x, y), rtol=0, atol=1e-10)
    torch.testing.assert_close(metric(255 * x, 255 * y, data_range=255), (skimage_psnr if metric is psnr else skimage_ssim)(255 * x, 255 * y, 255), rtol=0, atol=1e-9)


def test_noisy_input_of_known_strength():
    "Clipping and rounding: on a mid-grey image noise is not clipped, so the PSNR is 20 log10(255/sigma)."
    y = torch.full((2, 3, 200, 200), 0.5)
    for sigma in (5, 15, 25):
        x = y + sigma / 255 * torch.randn(y.shape, generator=torch.Generator().manual_seed(sigma))
        expected = -10 * math.log10((sigma**2 + 1 / 12) / 255**2)
        assert (psnr(x, y, quantise=True) - expected).abs().max() < 0.1


@METRICS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(metric, dtype):
    x, y = (t.to(dtype) for t in pair())
    torch.testing.assert_close(metric(x, y), metric(x.double(), y.double()), rtol=0, atol=1e-5)


@METRICS
@pytest.mark.parametrize("options", [{}, dict(crop_border=1), dict(y_channel=True)])
def test_gradients(metric, options):
    x, y = pair(14, 13, batch=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: metric(t, y, **options), x.requires_grad_(), eps=1e-6, atol=1e-5)
    with torch.no_grad(): assert not metric(x, y).requires_grad
    with torch.inference_mode(): metric(x, y)


def test_inputs_are_not_changed():
    x, y = pair()
    before = x.clone(), y.clone()
    for metric in (psnr, ssim): metric(x, y, crop_border=2, y_channel=True, quantise=True)
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])


# --- refusals

X = torch.rand(2, 3, 16, 16)
BAD = X.clone()
BAD[1, 2, 7, 7] = float("nan")
INFINITE = X.clone()
INFINITE[0, 0, 8, 8] = float("inf")

@METRICS
@pytest.mark.parametrize("x, y, options, message", [
    (X[0], X[0], {}, r"3, 16, 16.*image\[None\]"), (X.numpy(), X, {}, "ndarray"), (X[:0], X[:0], {}, "non-empty"),
    ((255 * X).byte(), X, {}, "torch.uint8"), (X, X.int(), {}, "second argument.*torch.int32"), (X, X[:1], {}, "shapes differ"),
    (X, X[:, :1], {}, "shapes differ"), (X, X[..., :15], {}, "shapes differ"), (X, X, dict(data_range=0), "data_range.* 0"),
    (X, X, dict(data_range=math.inf), "data_range"), (X, X, dict(data_range=math.nan), "data_range"), (X, X, dict(crop_border=-1), "crop_border"),
    (X, X, dict(crop_border=8), "crop_border.* 8"), (X, X, dict(crop_border=1.5), "crop_border"),
    (X[:, :2], X[:, :2], dict(y_channel=True), "y_channel.* 2 "), (BAD, X, {}, "image 1.*finite"),
    (X, BAD, dict(quantise=True), "image 1"), (INFINITE, X, {}, "image 0"), (INFINITE, X, dict(quantise=True), "image 0")])
def test_refusals(metric, x, y, options, message):
    with pytest.raises(ValueError, match=message) as caught: metric(x, y, **options)
    assert str(caught.value).startswith(metric.__name__)


def test_ssim_needs_a_window():
    with pytest.raises(ValueError, match="ssim.* 11 .*10, 10"): ssim(X, X, crop_border=3)
    assert psnr(X + 0.1, X, crop_border=3).shape == (2,)
