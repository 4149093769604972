"""PSNR and SSIM against a per-image loop over scikit-image, two threads: `python -m tests.bench.metrics`."""
import statistics
import time
import numpy as np
import torch
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from irnb.metrics import psnr, ssim

CONVENTIONS = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=2)
METRICS = [("psnr", psnr, peak_signal_noise_ratio, {}), ("ssim", ssim, structural_similarity, CONVENTIONS)]
CASES = [(1, 256, 1.0), (1, 512, 1.0), (16, 128, 3.0), (16, 256, 3.0)]       # images, side in px, how many times faster we must be


def _batch(count: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    "Noisy and clean crops of photographs (count, 3, side, side)."
    photographs = [data.astronaut(), data.immunohistochemistry(), data.retina()[300:1100, 300:1100]]
    crops = [np.roll(photographs[i % 3], 7 * i, 0)[:side, :side] for i in range(count)]
    clean = torch.stack([torch.tensor(crop).permute(2, 0, 1) / 255 for crop in crops]).contiguous()
    return (clean + 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1), clean


def _interleaved(ours, theirs, seconds: float = 4.0, least: int = 11) -> tuple[float, float]:
    "Median times of two calls taken in turns."
    times, started = ([], []), time.perf_counter()
    while len(times[0]) < least + 2 or (time.perf_counter() - started < seconds and len(times[0]) < 201):
        for call, kept in zip((ours, theirs), times):
            before = time.perf_counter()
            call()
            kept.append(time.perf_counter() - before)
    return tuple(statistics.median(kept[2:]) for kept in times)


def ratios() -> list[dict]:
    "One row per metric and batch; the ratio is scikit-image's time over ours."
    threads, rows = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        for count, side, bound in CASES:
            x, y = _batch(count, side)
            arrays = [tuple(t.permute(1, 2, 0).numpy() for t in images) for images in zip(x, y)]  # views, no copies
            for name, ours, theirs, options in METRICS:
                with torch.no_grad():
                    a, b = _interleaved(lambda: ours(x, y),
                                        lambda: [theirs(*pair, data_range=1.0, **options) for pair in arrays])
                rows.append(dict(name=f"{name}, {count} x {side} px", ours_s=a, reference_s=b, ratio=b / a,
                                 bound=bound, ok=b / a >= bound))
    finally: torch.set_num_threads(threads)
    return rows


if __name__ == "__main__":
    line = "{name:20} {ours_s:9.5f} s  scikit-image {reference_s:9.5f} s  ratio {ratio:5.2f}  bound {bound}  {ok}"
    for row in ratios(): print(line.format(**row))
