"""Batched degradations against a per-image NumPy / SciPy / scikit-image / Pillow loop that does the same thing.

Both sides start from what they would have in practice: a float32 tensor (16, 3, 128, 128), and a list of float32 arrays
(128, 128, 3). Times are medians of interleaved repeats in one process. Run: `python -m tests.bench.degradations`.
"""
import io
import math
import statistics
import time

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from skimage import util

from irnb import degradations as D

B, SIDE, BOUND = 16, 128, 5.0
f32 = np.float32


def photographs():
    """16 crops of real photographs, as a tensor and as arrays."""
    from skimage import data
    pictures = [getattr(data, n)() for n in ("astronaut", "chelsea", "coffee", "rocket")]
    crops = [p[y:y + SIDE, x:x + SIDE, :3] for p in pictures for y in (20, 150) for x in (60, 230)]
    arrays = [np.ascontiguousarray(c).astype(f32) / 255 for c in crops]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous(), arrays


SIGMAS = np.linspace(0.5, 4.0, B)
LENGTHS, ANGLES = np.linspace(5, 21, B), np.linspace(0, 170, B)
CFA = np.zeros((SIDE, SIDE, 3), f32)
CFA[::2, ::2, 0] = CFA[::2, 1::2, 1] = CFA[1::2, ::2, 1] = CFA[1::2, 1::2, 2] = 1
RB = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]], f32) / 4
GREEN = np.array([[0, 1, 0], [1, 4, 1], [0, 1, 0]], f32) / 4


def ref_noise(a, i, rng):
    return np.clip(a + rng.normal(0, 25 / 255, a.shape), 0, 1).astype(f32)


def ref_speckle(a, i, rng):
    return util.random_noise(a, "speckle", rng=rng, var=(25 / 255) ** 2).astype(f32)


def ref_salt_pepper(a, i, rng):
    return util.random_noise(a, "s&p", rng=rng, amount=0.05).astype(f32)


def ref_raw(a, i, rng):
    y = (a * CFA).sum(2)
    return ((y + np.sqrt(0.02 * y + 0.001) * rng.normal(size=y.shape))[..., None] * CFA).astype(f32)


def bilinear(masked):
    return np.stack([ndimage.convolve(masked[..., c], k, mode="mirror") for c, k in enumerate((RB, GREEN, RB))], -1)


def ref_camera(a, i, rng, blur=1.5, gamma=2.2):
    lin = a ** gamma
    y = (lin * CFA).sum(2)
    n = bilinear((np.sqrt(0.02 * y + 0.001) * rng.normal(size=y.shape))[..., None].astype(f32) * CFA)
    if blur: n = ndimage.gaussian_filter(n, (blur, blur, 0), mode="nearest", radius=(6, 6, 0))
    out = np.clip(lin + n, 0, 1) ** (1 / gamma)
    return (np.round(out * 255) / 255).astype(f32) if blur else out.astype(f32)


def ref_colour(a, i, rng):
    return ref_camera(a, i, rng, blur=0)


def ref_gaussian(a, i, rng):
    return ndimage.gaussian_filter(a, (SIGMAS[i], SIGMAS[i], 0), mode="nearest", radius=(10, 10, 0))


def convolve(a, k):
    return np.stack([ndimage.convolve(a[..., c], k.astype(f32), mode="nearest") for c in range(a.shape[-1])], -1)


def line(length, angle, size):
    t = np.arange(size) - size // 2
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    along, across = abs(t[None] * c - t[:, None] * s), abs(-t[:, None] * c - t[None] * s)
    return np.clip(1 - across, 0, 1) * np.clip(length / 2 + 0.5 - along, 0, 1)


def ref_motion(a, i, rng):
    k = line(LENGTHS[i], ANGLES[i], 23)
    return convolve(a, k / k.sum())


KERNELS = np.random.default_rng(0).random((B, 15, 15)).astype(f32)
KERNELS /= KERNELS.sum((1, 2), keepdims=True)


def ref_kernel(a, i, rng):
    return convolve(a, KERNELS[i])


def ref_jpeg(a, i, rng):
    buffer = io.BytesIO()
    Image.fromarray((a * 255 + 0.5).astype(np.uint8)).save(buffer, "JPEG", quality=40)
    return np.asarray(Image.open(buffer)).astype(f32) / 255


def ref_rain(a, i, rng):
    u = rng.random(a.shape[:2])
    drops = np.maximum(0.004 - u, 0) / 0.004
    streaks = np.clip(convolve(drops[..., None].astype(f32), line(17, 80, 21)), 0, 1)
    return np.clip(a + 0.6 * streaks, 0, 1)


DEPTH = np.linspace(0, 1, SIDE * SIDE, dtype=f32).reshape(SIDE, SIDE)


def ref_haze_given(a, i, rng):
    t = np.exp(-1.2 * DEPTH)[..., None]
    return a * t + 0.85 * (1 - t)


def ref_haze(a, i, rng):
    d = ndimage.zoom(rng.normal(size=(4, 4)) * 0.25 + np.linspace(1, 0, 4)[:, None], SIDE / 4, order=3)
    t = np.exp(-1.2 * (d - d.min()) / np.ptp(d)).astype(f32)[..., None]
    return a * t + f32(0.85) * (1 - t)


def pil_resize(a, side):
    planes = [Image.fromarray(a[..., c]).resize((side, side), Image.Resampling.BICUBIC) for c in range(3)]
    return np.stack([np.asarray(p) for p in planes], -1)


def ref_down(a, i, rng):
    return np.clip(pil_resize(a, SIDE // 4), 0, 1)


def ref_mosaic(a, i, rng):
    out = np.zeros_like(a)
    for y, x, c in ((0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 2)): out[y::2, x::2, c] = a[y::2, x::2, c]
    return out


def ref_hybrid(a, i, rng):
    return ref_jpeg(ref_noise(ndimage.gaussian_filter(a, (2, 2, 0), mode="nearest", radius=(10, 10, 0)), i, rng), i, rng)


def ref_stage(a, i, rng, side):
    k = line(9, 30, 21)  # any 21 x 21 kernel costs the same
    a = np.clip(pil_resize(convolve(a, k / k.sum()), side), 0, 1)
    return np.clip(a + rng.normal(0, 15 / 255, a.shape), 0, 1).astype(f32)


def ref_esrgan(a, i, rng):
    a = ref_jpeg(ref_stage(a, i, rng, 90), i, rng)
    a = pil_resize(ref_stage(a, i, rng, 26), SIDE // 4)
    k = line(9, 30, 21)
    return ref_jpeg(np.clip(convolve(a, k / k.sum()), 0, 1), i, rng)


def cases():
    """(name, degradation, reference for one image)."""
    t = torch.tensor
    return [
        ("GaussianNoise", D.GaussianNoise(25), ref_noise),
        ("Speckle", D.Speckle(25), ref_speckle),
        ("SaltPepper", D.SaltPepper(0.05), ref_salt_pepper),
        ("RawNoise", D.RawNoise(0.02, 0.001), ref_raw),
        ("CameraNoise", D.CameraNoise(0.02, 0.001), ref_camera),
        ("ColourNoise", D.ColourNoise(0.14, 0.03), ref_colour),
        ("GaussianBlur", D.GaussianBlur(t(SIGMAS)), ref_gaussian),
        ("KernelBlur", D.KernelBlur(torch.from_numpy(KERNELS)), ref_kernel),
        ("MotionBlur", D.MotionBlur(t(LENGTHS), t(ANGLES)), ref_motion),
        ("JPEG", D.JPEG(40), ref_jpeg),
        ("Rain", D.Rain(0.004, 17, 80, 0.6), ref_rain),
        ("Haze, given depth", D.Haze(1.2, 0.85, torch.from_numpy(DEPTH)[None, None]), ref_haze_given),
        ("Haze, random depth", D.Haze(1.2, 0.85), ref_haze),
        ("Downsample", D.Downsample(4), ref_down),
        ("Mosaic", D.Mosaic(), ref_mosaic),
        ("hybrid", D.hybrid("moderate"), ref_hybrid),
        ("RealESRGAN", D.RealESRGAN(order=2, scale=4), ref_esrgan),
    ]


def timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(degrade, reference, batch, arrays, repeats):
    """Median seconds of the batched call and of the loop, interleaved; the batched call with its better thread count.

    On a machine whose cores others keep busy, two threads that wait for each other can be slower than one.
    """
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    ours = lambda: degrade(batch, generator=generator)
    theirs = lambda: [reference(a, i, rng) for i, a in enumerate(arrays)]
    available, best, loop = torch.get_num_threads(), math.inf, []
    for threads in {1, available}:
        torch.set_num_threads(threads)
        timed(ours), timed(theirs)
        pairs = [(timed(ours), timed(theirs)) for _ in range(repeats)]
        best = min(best, statistics.median(p[0] for p in pairs))
        loop += [p[1] for p in pairs]
    torch.set_num_threads(available)
    return best, statistics.median(loop)


@torch.no_grad()
def ratios(repeats: int = 11) -> list[dict]:
    """One row per degradation (bound: not slower), then the arithmetic and geometric means (bound: 5)."""
    batch, arrays = photographs()
    torch.ones(6 << 20)  # a freed block of 24 MB, as any training step leaves: the allocator then keeps its pages
    rows = []
    for name, degrade, reference in cases():
        ours, theirs = compare(degrade, reference, batch, arrays, repeats)
        rows.append(dict(name=f"degrade 16 x 128 px: {name}", ours_s=ours, reference_s=theirs,
                         ratio=theirs / ours, bound=1.0, ok=theirs >= ours))
    values = [r["ratio"] for r in rows]
    total = {k: sum(r[k] for r in rows) for k in ("ours_s", "reference_s")}
    for name, mean in (("arithmetic mean", statistics.mean), ("geometric mean", statistics.geometric_mean)):
        rows.append(dict(name=f"degrade 16 x 128 px: {name}", **total, ratio=mean(values), bound=BOUND, ok=mean(values) >= BOUND))
    return rows


if __name__ == "__main__":
    torch.set_num_threads(min(2, torch.get_num_threads()))
    for r in ratios():
        times = f"ours {r['ours_s'] * 1e3:8.2f} ms  reference {r['reference_s'] * 1e3:8.2f} ms"
        print(f"{r['name']:<40} {times}  x{r['ratio']:6.2f}  {'ok' if r['ok'] else 'TOO SLOW'}")
