"""Untrained restorers and cheap rivals."""
import sys

import numpy as np
import pytest
import torch
from torch import nn

from irnb.results import baselines
from irnb.results.baselines import estimate_sigma, identity, non_local_means, post_controls, untrained, wavelet
from tests.result_rows import item, needs_wavelets


@needs_wavelets
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["non_local_means", "wavelet"])
def test_classical_denoisers_equal_scikit_image(name, channels):
    from skimage import data, restoration
    clean = torch.from_numpy(data.chelsea()[100:148, 100:164] / 255).permute(2, 0, 1)[None, :channels]
    noisy = (clean + 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).clamp(0, 1)
    image = noisy[0].permute(1, 2, 0).numpy()
    if name == "wavelet":
        want = restoration.denoise_wavelet(image if channels == 3 else image[..., 0], method="BayesShrink", rescale_sigma=True,
                                           convert2ycbcr=channels == 3, channel_axis=-1 if channels == 3 else None)
    else:
        sigma = np.mean(restoration.estimate_sigma(image, channel_axis=-1))
        want = restoration.denoise_nl_means(image if channels == 3 else image[..., 0], patch_size=5, patch_distance=6, h=0.8 * sigma,
                                            fast_mode=True, channel_axis=-1 if channels == 3 else None)
    got = getattr(baselines, name)(noisy.repeat(2, 1, 1, 1))
    assert got.shape == (2, channels, 48, 64) and got.dtype == torch.float64 and torch.equal(got[0], got[1])
    assert np.allclose(got[0].permute(1, 2, 0).numpy().squeeze(), want.squeeze(), atol=1e-12)
    assert ((got[:1] - clean) ** 2).mean() < 0.4 * ((noisy - clean) ** 2).mean()
    assert getattr(baselines, name)(noisy.float()).dtype == torch.float32


@needs_wavelets
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (1, 1, 1, 9), (1, 3, 2, 2), (1, 1, 5, 4), (1, 3, 7, 33)])
def test_classical_denoisers_take_tiny_and_flat_pictures(shape, recwarn):
    flat, noise = torch.full(shape, 0.3), torch.rand(shape, generator=torch.Generator().manual_seed(0))
    for restorer in (non_local_means, wavelet):
        assert torch.allclose(restorer(flat), flat, atol=1e-6)
        assert torch.isfinite(restorer(noise)).all() and restorer(noise).shape == shape
    assert torch.isfinite(estimate_sigma(noise)).all()


@needs_wavelets
def test_estimated_noise_level():
    x = 0.5 + 0.1 * torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert estimate_sigma(x).shape == (2,) and torch.allclose(estimate_sigma(x), torch.tensor(25.5), atol=1.5)


def test_missing_pywavelets_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "pywt", None)
    x = torch.rand(1, 3, 16, 16)
    for restorer in (non_local_means, wavelet, estimate_sigma):
        with pytest.raises(ImportError, match=r'pip install "irnb\[pipeline\]"'):
            restorer(x)


def test_identity_and_the_untrained_rows():
    x = torch.rand(1, 3, 8, 9)
    assert identity(x) is x and list(untrained()) == ["degraded", "non_local_means", "wavelet"]
    assert list(untrained(raw=True)) == ["degraded", "bilinear", "malvar"] and all(f(x).shape == x.shape for f in untrained(raw=True).values() if x.shape[-1] % 2 == 0)
    up = untrained(4)
    assert list(up) == ["degraded"]
    y = up["degraded"](x)
    from irnb.degradations.sampling import bicubic
    assert torch.equal(y, bicubic(x, 4).clamp(0, 1)) and y.shape == (1, 3, 32, 36)


def test_controls_refuse_an_enlarging_restorer_and_leave_its_modes():
    net = nn.Sequential(nn.Dropout(), nn.Identity()).train()
    found = post_controls(net, [item()], quantise=True)
    assert net.training and net[0].training and set(found) == {"blur", "scale"}
    with pytest.raises(ValueError, match="post_controls.*residual"):
        post_controls(lambda x: x.repeat_interleave(2, -1).repeat_interleave(2, -2), [item(scale=2)])


@needs_wavelets
@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value")
def test_wavelets_pass_pictures_without_detail_in_a_channel():
    "A JPEG of a grey picture has no colour at all: BayesShrink divides zero by zero there, and the picture passes unchanged."
    from skimage.restoration import denoise_wavelet
    grey = (torch.arange(32.) // 8 / 8).expand(1, 3, 32, 32).contiguous()
    with np.errstate(all="ignore"):
        plain = denoise_wavelet(grey[0].permute(1, 2, 0).double().numpy(), method="BayesShrink", mode="soft", rescale_sigma=True, convert2ycbcr=True, channel_axis=-1)
    assert np.isnan(plain).any()
    assert torch.equal(wavelet(grey), grey) and torch.isfinite(wavelet(grey[:, :1])).all()
