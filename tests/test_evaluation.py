"""Tables, statistics, restorers and figures of irnb.evaluation."""
import importlib.util
import io
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from irnb import evaluation as ev

needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
needs_wavelets = pytest.mark.skipif(importlib.util.find_spec("pywt") is None, reason="needs PyWavelets")


def row(**changes):
    return dict(image="a", task="denoise", setting="sigma_15", seen=True, strategy="s", seed=0, metric="psnr", value=30.0) | changes


def table(S=3, I=4, gain=0.5, noise=0.0, settings=(("sigma_15", True), ("sigma_25", True), ("sigma_50", False)), seed=0):
    "A degraded row without seeds, a reference and one strategy with a known gain."
    rng, rows = np.random.default_rng(seed), []
    base = rng.normal(30, 3, (len(settings), S, I))
    for k, (name, seen) in enumerate(settings):
        for i in range(I):
            common = dict(image=f"img{i}", setting=name, seen=seen)
            rows.append(row(**common, strategy="degraded", seed="-", value=20.0 + i))
            for s in range(S):
                rows.append(row(**common, strategy="supervised", seed=s, value=base[k, s, i]))
                rows.append(row(**common, strategy="ours", seed=s, value=base[k, s, i] + gain + noise * rng.normal()))
    return rows


def item(side=16, channels=3, scale=1, **changes):
    g = torch.Generator().manual_seed(0)
    clean = torch.rand(channels, side, side, generator=g)
    degraded = (clean + 0.1 * torch.randn(clean.shape, generator=g))[..., ::scale, ::scale].clamp(0, 1)
    return dict(image="a", setting="sigma_25", seen=True, degraded=degraded, clean=clean) | changes


# --- tables ---------------------------------------------------------------------------------------------------------

NAMES = st.text(st.sampled_from("ab0 ,;\"'|#-+=.\u00e9\u6f22"), min_size=1, max_size=8).filter(str.strip)


@settings(deadline=None, max_examples=60, database=None)
@given(st.lists(st.fixed_dictionaries(dict(
    image=NAMES, task=NAMES, setting=NAMES, strategy=NAMES, metric=NAMES, seed=st.one_of(st.just("-"), st.integers(0, 10**12)),
    seen=st.just(True), value=st.floats(allow_nan=False, width=32))), max_size=6, unique_by=lambda r: tuple(map(str, (
        r["image"], r["task"], r["setting"], r["strategy"], r["seed"], r["metric"])))))
def test_round_trip_is_exact_for_float32_and_byte_stable(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("t") / "t.csv"
    ev.write_table(path, rows)
    first = path.read_bytes()
    got = [r | {"value": float(np.float32(r["value"]))} for r in ev.read_table(path)]   # nine digits identify a float32
    assert got == [{c: r[c] for c in ev.COLUMNS} for r in rows]
    ev.write_table(path, ev.read_table(path))
    assert path.read_bytes() == first


def test_float64_values_are_stable_after_one_rounding(tmp_path):
    values = np.random.default_rng(0).normal(30, 5, 50)
    ev.write_table(tmp_path / "a.csv", [row(image=str(k), value=v) for k, v in enumerate(values)])
    again = ev.read_table(tmp_path / "a.csv")
    ev.write_table(tmp_path / "b.csv", again)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert max(abs(r["value"] - v) for r, v in zip(again, values)) < 1e-6


def test_file_format_is_what_the_docs_say(tmp_path):
    shuffled = dict(reversed(row(image='a,"b"', seed="-", value=np.float32(0.1)).items()))
    ev.write_table(tmp_path / "deep" / "t.csv", [shuffled])
    text = (tmp_path / "deep" / "t.csv").read_bytes().decode()
    assert text == 'image,task,setting,seen,strategy,seed,metric,value\n"a,""b""",denoise,sigma_15,true,s,-,psnr,0.100000001\n'


@pytest.mark.parametrize("change, message", [
    (dict(value=float("nan")), "value must be a number"), (dict(value="30"), "value must be a number"), (dict(value=True), "value"),
    (dict(seed=-1), "seed must be"), (dict(seed=1.0), "seed must be"), (dict(seed=True), "seed must be"), (dict(seed="x"), "seed must be"),
    (dict(seen="true"), "seen must be"), (dict(seen=1), "seen must be"), (dict(image=""), "image must be"), (dict(image="a\r"), "image must be"), (dict(metric="\ud800"), "metric must be"), (dict(strategy=3), "strategy must be"),
    (dict(setting="unseen"), "may not be called 'unseen'"), (dict(extra=1), "unknown ['extra']")])
def test_bad_rows_are_not_written(tmp_path, change, message):
    path = tmp_path / "t.csv"
    ev.write_table(path, [row()])
    before = path.read_bytes()
    with pytest.raises(ev.TableError) as error:
        ev.write_table(path, [row(image="b"), row(**change)])
    assert message in str(error.value) and "row 2" in str(error.value) and "t.csv" in str(error.value)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["t.csv"]


def test_missing_column_duplicates_and_contradictory_seen_flags(tmp_path):
    short = row()
    del short["metric"]
    for rows, message in (([short], r"missing \['metric'\]"), ([row(), row(value=1.0)], "row 2: repeats an earlier row"),
                          ([row(), row(image="b", seen=False)], "both seen and unseen")):
        with pytest.raises(ev.TableError, match=message):
            ev.write_table(tmp_path / "t.csv", rows)
    ev.write_table(tmp_path / "t.csv", [row(), row(task="deblur", seen=False)])   # another task may see it differently


GOOD = "image,task,setting,seen,strategy,seed,metric,value\na,denoise,s15,true,s,0,psnr,30\n"


@pytest.mark.parametrize("text, message", [
    ("", "line 1: the header must be"), ("image;task\n", "line 1: the header must be"), (GOOD.replace("seen,", "", 1), "line 1: the header"),
    (GOOD + "b,denoise,s15\n", "line 3: expected 8 fields, got 3"), (GOOD + GOOD.splitlines()[1] + ",9\n", "line 3: expected 8 fields, got 9"),
    (GOOD + GOOD.splitlines()[1] + "\n", "line 3: repeats"), (GOOD + "b,denoise,s15,True,s,0,psnr,30\n", "line 3: seen must be"),
    (GOOD + "b,denoise,s15,true,s,1.5,psnr,30\n", "line 3: seed must be"), (GOOD + "b,denoise,s15,true,s,-1,psnr,30\n", "line 3: seed must be"),
    (GOOD + "b,denoise,s15,true,s,0,psnr,abc\n", "line 3: value must be a number, got 'abc'"), (GOOD + "b,denoise,s15,true,s,0,psnr,nan\n", "line 3: value"),
    (GOOD + ",denoise,s15,true,s,0,psnr,1\n", "line 3: image must be"), (GOOD + '"b\nc",denoise,s15,true,s,0,psnr,1\n', "line 4: image must be"),
    (GOOD + '"b', "after line 2: not a CSV table")])
def test_bad_files_are_reported_by_line(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ev.TableError) as error:
        ev.read_table(tmp_path / "t.csv")
    assert message in str(error.value) and "t.csv" in str(error.value)


def test_binary_and_absent_files(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ev.TableError, match="UTF-8"):
        ev.read_table(tmp_path / "t.csv")
    with pytest.raises(FileNotFoundError):
        ev.read_table(tmp_path / "none.csv")
    ev.write_table(tmp_path / "empty.csv", [])
    assert ev.read_table(tmp_path / "empty.csv") == []


@pytest.mark.parametrize("broken", ["write", "replace"])
def test_a_full_disk_leaves_the_old_table(tmp_path, monkeypatch, broken):
    path = tmp_path / "t.csv"
    ev.write_table(path, [row()])
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")
    if broken == "replace":
        monkeypatch.setattr(ev.os, "replace", fail)
    else:
        monkeypatch.setattr(ev.os, "fsync", fail)
    with pytest.raises(ValueError, match="t.csv.*No space left"):
        ev.write_table(path, [row(value=1.0)])
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["t.csv"]


# --- statistics -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (4, 1), (3, 5)])
def test_bootstrap_equals_an_explicit_loop(shape):
    S, I, n = *shape, 300
    d = np.random.default_rng(3).normal(size=shape)
    rng = np.random.default_rng(11)
    seeds, images = rng.integers(S, size=(n, S)), rng.integers(I, size=(n, I))
    means = []
    for r in range(n):
        total = 0.0
        for s in seeds[r]:
            for i in images[r]:
                total += d[s, i]
        means.append(total / (S * I))
    got = ev.bootstrap(d, n, 11)
    assert np.allclose(got[:3], [d.mean(), *np.percentile(means, [2.5, 97.5])], atol=1e-12)
    assert (got.n_images, got.n_seeds) == (I, S)


def test_bootstrap_degenerate_cases():
    assert ev.bootstrap(np.zeros((3, 4)))[:3] == (0, 0, 0)
    assert ev.bootstrap([[0.7]]) == (0.7, 0.7, 0.7, 1, 1)
    mean, low, high, *_ = ev.bootstrap(np.full((3, 7), 0.1))
    assert high - low < 1e-15 and abs(mean - 0.1) < 1e-15
    one_seed = ev.bootstrap([[0.0, 1.0]])
    assert (one_seed.low, one_seed.high) == (0, 1)   # images alone are resampled


def test_bootstrap_is_seeded_and_leaves_the_global_generator_alone():
    d = np.random.default_rng(0).normal(size=(3, 9))
    state = np.random.get_state()[1].copy()
    assert ev.bootstrap(d, seed=4) == ev.bootstrap(d, seed=4) != ev.bootstrap(d, seed=5)
    assert (np.random.get_state()[1] == state).all()
    assert ev.bootstrap(d, 2500).mean == d.mean()   # more draws than one block
    wide, narrow = ev.bootstrap(d, level=0.99), ev.bootstrap(d, level=0.5)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_bootstrap_covers_a_known_effect():
    rng, mu, hits, naive, trials = np.random.default_rng(1), 0.3, 0, 0, 400
    for k in range(trials):
        d = mu + 0.2 * rng.normal(size=(15, 1)) + 0.2 * rng.normal(size=(1, 30)) + 0.1 * rng.normal(size=(15, 30))
        _, low, high, *_ = ev.bootstrap(d, 400, k)
        hits += low <= mu <= high
        _, low, high, *_ = ev.bootstrap(d.reshape(1, -1), 400, k)
        naive += low <= mu <= high
    assert 0.91 <= hits / trials <= 0.98
    assert naive / trials < 0.6   # the same test catches resampling seeds and images as one bag


@pytest.mark.parametrize("bad, options, message", [
    (np.zeros(3), {}, "shape"), (np.zeros((0, 3)), {}, "shape"), ([[np.nan]], {}, "finite"), ([[np.inf]], {}, "finite"),
    ([[1.0]], dict(n=0), "n must be"), ([[1.0]], dict(level=1.0), "level must")])
def test_bootstrap_bad_input(bad, options, message):
    with pytest.raises(ValueError, match=message):
        ev.bootstrap(bad, **options)


def test_paired_bootstrap_recovers_the_gain_and_ignores_row_order():
    rows = table(gain=0.5, noise=0.1)
    got = ev.paired_bootstrap(rows, "ours", "supervised", "sigma_50")
    assert got.low < 0.5 < got.high and got.high - got.low < 0.4 and (got.n_images, got.n_seeds) == (4, 3)
    assert ev.paired_bootstrap(rows[::-1], "ours", "supervised", "sigma_50") == got
    back = ev.paired_bootstrap(rows, "supervised", "ours", "sigma_50")
    assert math.isclose(back.mean, -got.mean) and math.isclose(back.low, -got.high, abs_tol=1e-3)
    assert ev.paired_bootstrap(rows, "ours", "ours", "sigma_50")[:3] == (0, 0, 0)


def test_crops_of_one_scene_count_once():
    rows = table(gain=0.5, noise=0.3)
    group = lambda image: "a" if image in ("img0", "img2", "img3") else "b"
    apart, joined = (ev.paired_differences(rows, "ours", "supervised", "sigma_50", group=g) for g in (None, group))
    assert joined.images == ["a", "b"] and joined.seeds == apart.seeds
    assert np.allclose(joined.values, np.stack([apart.values[:, [0, 2, 3]].mean(1), apart.values[:, 1]], 1))
    got = ev.paired_bootstrap(rows, "ours", "supervised", "sigma_50", group=group)
    assert got.n_images == 2 and math.isclose(got.mean, joined.values.mean()) and not math.isclose(got.mean, apart.values.mean())


def test_a_row_without_seed_pairs_with_every_seed():
    rows = table(gain=0.5)
    d = ev.paired_differences(rows, "ours", "degraded", "sigma_15")
    assert d.seeds == [0, 1, 2] and d.images == [f"img{i}" for i in range(4)]
    want = {(r["seed"], r["image"]): r["value"] for r in rows if r["strategy"] == "ours" and r["setting"] == "sigma_15"}
    assert np.allclose(d.values, [[want[s, i] - 20 - int(i[3:]) for i in d.images] for s in d.seeds])
    assert np.allclose(ev.paired_differences(rows, "degraded", "ours", "sigma_15").values, -d.values)
    assert ev.paired_differences(rows, "degraded", "degraded", "sigma_15").seeds == ["-"]


def test_several_settings_are_averaged_per_seed_and_image():
    rows = table(noise=0.3)
    parts = [ev.paired_differences(rows, "ours", "supervised", s).values for s in ("sigma_15", "sigma_50")]
    assert np.allclose(ev.paired_differences(rows, "ours", "supervised", ["sigma_15", "sigma_50"]).values, sum(parts) / 2)


def without(rows, **match):
    return [r for r in rows if any(r[k] != v for k, v in match.items())]


def test_missing_pairs_are_listed():
    rows = table()
    cut = without(rows, strategy="ours", setting="sigma_50", seed=1, image="img2")
    with pytest.raises(ValueError, match=r"sigma_50.*'ours' lacks \(seed 1, img2\)$"):
        ev.paired_bootstrap(cut, "ours", "supervised", "sigma_50")
    with pytest.raises(ValueError, match=r"'supervised' lacks \(seed 2, img0\), .*\(seed 2, img3\)$"):
        ev.paired_bootstrap(without(rows, strategy="supervised", seed=2), "ours", "supervised", "sigma_15")
    both = without(cut, strategy="supervised", setting="sigma_50", seed=1, image="img2")
    with pytest.raises(ValueError, match=r"every seed must cover every image; missing \(seed 1, img2\)"):
        ev.paired_bootstrap(both, "ours", "supervised", "sigma_50")
    many = without(table(I=40), strategy="ours", seed=0)
    with pytest.raises(ValueError, match="and 32 more"):
        ev.paired_bootstrap(many, "ours", "supervised", "sigma_15")
    with pytest.raises(ValueError, match="different seeds or images"):
        fewer = [r for r in rows if not (r["setting"] == "sigma_50" and r["image"] == "img3")]
        ev.paired_bootstrap(fewer, "ours", "supervised", ["sigma_15", "sigma_50"])


def test_wrong_names_infinite_values_and_mixed_tasks():
    rows = table()
    for names, options, message in ((("his", "supervised", "sigma_15"), {}, "no rows of strategy 'his'"),
                                    (("ours", "supervised", "sigma_99"), {}, "for setting 'sigma_99'"),
                                    (("ours", "supervised", []), {}, "at least one"),
                                    (("ours", "supervised", "sigma_15"), dict(metric="lpips"), "metric 'lpips'"),
                                    (("ours", "supervised", "sigma_15"), dict(task="dehaze"), "task 'dehaze'")):
        with pytest.raises(ValueError, match=message):
            ev.paired_bootstrap(rows, *names, **options)
    with pytest.raises(ValueError, match="no rows"):
        ev.paired_bootstrap([], "a", "b", "c")
    endless = [r | {"value": math.inf} if (r["seed"], r["image"]) == (1, "img0") else r for r in rows]
    with pytest.raises(ValueError, match=r"infinite values at \(seed 1, img0\)"):
        ev.paired_bootstrap(endless, "ours", "supervised", "sigma_15")
    two = rows + [r | {"task": "deblur"} for r in rows]
    with pytest.raises(ValueError, match="choose one by task="):
        ev.paired_bootstrap(two, "ours", "supervised", "sigma_15")
    assert ev.paired_bootstrap(two, "ours", "supervised", "sigma_15", task="deblur").n_images == 4
    with pytest.raises(ev.TableError, match="repeats"):
        ev.paired_bootstrap(rows + rows[:1], "ours", "supervised", "sigma_15")


def test_sign_flip_against_enumeration_and_holm_by_hand():
    import itertools
    d = np.random.default_rng(5).normal(0.3, 1, 7)
    sums = [abs(sum(s * x for s, x in zip(signs, d))) for signs in itertools.product((1, -1), repeat=7)]
    assert ev.sign_flip(d) == np.mean([s >= abs(d.sum()) - 1e-12 for s in sums])
    assert ev.sign_flip([0.3]) == 1 and ev.sign_flip([0.1] * 6) == 2 / 64
    assert np.allclose(ev.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02]) and np.allclose(ev.holm([0.9, 0.8]), [1, 1])
    for bad in ([], [[1.0]], [np.nan], [0.1] * 17):
        with pytest.raises(ValueError, match="sign_flip"):
            ev.sign_flip(bad)
    for bad in ([1.1], [-0.1], [np.nan], [[0.1]]):
        with pytest.raises(ValueError, match="holm"):
            ev.holm(bad)


def test_seed_test_against_scipy():
    from scipy import stats
    d = np.random.default_rng(2).normal(0.2, 0.5, (5, 8))
    got, want = ev.seed_test(d), stats.ttest_1samp(d.mean(1), 0)
    assert np.allclose((got.low, got.high), want.confidence_interval(0.95)) and got.p == ev.sign_flip(d.mean(1))
    assert got.per_seed == tuple(d.mean(1)) and got.positive == (d.mean(0) > 0).sum() and got.n_images == 8
    one = ev.seed_test(d[:1])
    assert math.isnan(one.sd) and math.isnan(one.low) and one.p == 1
    assert math.isnan(ev.seed_test(np.ones((17, 2))).p)
    for bad in (np.ones(3), np.ones((0, 2)), [[np.nan]]):
        with pytest.raises(ValueError, match="seed_test"):
            ev.seed_test(bad)


# --- summary --------------------------------------------------------------------------------------------------------

def test_summary_by_hand():
    rows = table(gain=0.5)
    degraded, reference, ours = ev.summary(rows)
    assert list(degraded) == ["strategy", "metric", "seeds", "sigma_15", "sigma_25", "sigma_50", "seen", "unseen"]
    assert degraded["seeds"] == 0 and degraded["seen"] == degraded["unseen"] == 21.5 and ours["seeds"] == 3
    values = [r["value"] for r in rows if r["strategy"] == "supervised" and r["setting"] == "sigma_50"]
    assert math.isclose(reference["sigma_50"], np.mean(values)) and math.isclose(ours["sigma_50"], np.mean(values) + 0.5)
    assert math.isclose(reference["seen"], (reference["sigma_15"] + reference["sigma_25"]) / 2)
    with_ssim = rows + [r | {"metric": "ssim", "value": 0.5} for r in rows]
    assert [r["metric"] for r in ev.summary(with_ssim)] == ["psnr"] * 3 + ["ssim"] * 3 and len(ev.summary(with_ssim, "ssim")) == 3


def test_summary_gaps_and_errors():
    rows = table()
    gap = ev.summary(without(rows, strategy="ours", setting="sigma_25"))[2]
    assert gap["sigma_25"] is None and gap["seen"] is None and gap["unseen"] is not None
    assert ev.summary([r for r in rows if r["seen"]])[0]["unseen"] is None
    with pytest.raises(ValueError, match=r"same images: 'ours' lacks \['img1'\]"):
        ev.summary(without(rows, strategy="ours", setting="sigma_25", image="img1"))
    with pytest.raises(ValueError, match=r"missing \(seed 1, img1\)"):
        ev.summary(without(rows, strategy="ours", setting="sigma_25", image="img1", seed=1))
    with pytest.raises(ValueError, match="no rows"):
        ev.summary([])


def test_markdown_table():
    text = ev.markdown_table([dict(strategy="a|b", metric="psnr", seeds=3, x=1.005, y=None), dict(strategy="c", metric="ssim", seeds=0, x=0.5, y=2.0)])
    assert text.splitlines() == ["| strategy | metric | seeds | x | y |", "| --- | --- | ---: | ---: | ---: |",
                                 "| a\\|b | psnr | 3 | 1.00 | - |", "| c | ssim | 0 | 0.5000 | 2.0000 |"]
    assert "| 1.0 |" in ev.markdown_table([dict(x=1.005)], 1) and "1.005" in ev.markdown_table([dict(metric="m", x=1.005)], {"m": 3})
    with pytest.raises(ValueError, match="no rows"):
        ev.markdown_table([])
    with pytest.raises(ValueError, match="row 2 has other columns"):
        ev.markdown_table([dict(a=1), dict(b=1)])


# --- restorers ------------------------------------------------------------------------------------------------------

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
    got = getattr(ev, name)(noisy.repeat(2, 1, 1, 1))
    assert got.shape == (2, channels, 48, 64) and got.dtype == torch.float64 and torch.equal(got[0], got[1])
    assert np.allclose(got[0].permute(1, 2, 0).numpy().squeeze(), want.squeeze(), atol=1e-12)
    assert ((got[:1] - clean) ** 2).mean() < 0.4 * ((noisy - clean) ** 2).mean()
    assert getattr(ev, name)(noisy.float()).dtype == torch.float32


@needs_wavelets
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (1, 1, 1, 9), (1, 3, 2, 2), (1, 1, 5, 4), (1, 3, 7, 33)])
def test_classical_denoisers_take_tiny_and_flat_pictures(shape, recwarn):
    flat, noise = torch.full(shape, 0.3), torch.rand(shape, generator=torch.Generator().manual_seed(0))
    for restorer in (ev.non_local_means, ev.wavelet):
        assert torch.allclose(restorer(flat), flat, atol=1e-6)
        assert torch.isfinite(restorer(noise)).all() and restorer(noise).shape == shape
    assert torch.isfinite(ev.estimate_sigma(noise)).all()


@needs_wavelets
def test_estimated_noise_level():
    x = 0.5 + 0.1 * torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert ev.estimate_sigma(x).shape == (2,) and torch.allclose(ev.estimate_sigma(x), torch.tensor(25.5), atol=1.5)


def test_missing_pywavelets_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "pywt", None)
    x = torch.rand(1, 3, 16, 16)
    for restorer in (ev.non_local_means, ev.wavelet, ev.estimate_sigma):
        with pytest.raises(ImportError, match=r'pip install "irnb\[pipeline\]"'):
            restorer(x)


def test_identity_and_the_untrained_rows():
    x = torch.rand(1, 3, 8, 9)
    assert ev.identity(x) is x and list(ev.untrained()) == ["degraded", "non_local_means", "wavelet"]
    assert list(ev.untrained(raw=True)) == ["degraded", "bilinear", "malvar"] and all(f(x).shape == x.shape for f in ev.untrained(raw=True).values() if x.shape[-1] % 2 == 0)
    up = ev.untrained(4)
    assert list(up) == ["degraded"]
    y = up["degraded"](x)
    from irnb.degradations import bicubic
    assert torch.equal(y, bicubic(x, 4).clamp(0, 1)) and y.shape == (1, 3, 32, 36)


# --- evaluate -------------------------------------------------------------------------------------------------------

def test_rows_and_conventions_are_those_of_the_metrics():
    from irnb.metrics import psnr, ssim
    one = item(24)
    rows = ev.evaluate(lambda x: x, [one], strategy="s", task="t", seed=3, y_channel=True, crop_border=2)
    args = (one["degraded"][None], one["clean"][None])
    conventions = dict(y_channel=True, crop_border=2, quantise=True)
    assert [r["value"] for r in rows] == [float(psnr(*args, **conventions)), float(ssim(*args, **conventions))]
    assert rows[0] | {"value": 0} == dict(image="a", task="t", setting="sigma_25", seen=True, strategy="s", seed=3, metric="psnr", value=0)
    loose = ev.evaluate(lambda x: x, [one], strategy="s", task="t", quantise=False, metrics="psnr")
    assert [r["metric"] for r in loose] == ["psnr"] and loose[0]["value"] == float(psnr(*args))
    own = ev.evaluate(lambda x: x, [one], strategy="s", task="t", metrics={"mae": lambda x, y, **k: (x - y).abs().mean()})
    assert own[0]["metric"] == "mae" and math.isclose(own[0]["value"], float((args[0] - args[1]).abs().mean()))


def test_items_may_be_objects_generators_or_batched():
    from irnb.data import Example
    one = item()
    batched = Example("a", "sigma_25", True, one["degraded"][None], one["clean"][None])
    want = ev.evaluate(lambda x: x, [one], strategy="s", task="t")
    assert ev.evaluate(lambda x: x, (i for i in [batched]), strategy="s", task="t", progress=True) == want


class Mixed(nn.Module):
    "A net with a frozen part that is in eval mode while the rest trains."
    def __init__(self):
        super().__init__()
        self.norm, self.frozen, self.seen = nn.BatchNorm2d(3), nn.BatchNorm2d(3).eval(), []

    def forward(self, x):
        self.seen.append((self.norm.training, self.frozen.training, torch.is_inference_mode_enabled()))
        return self.frozen(self.norm(x))


@pytest.mark.parametrize("broken", [False, True])
def test_module_is_left_as_it_was(broken):
    net = Mixed()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    items = [item(), item(image="b", degraded=torch.full((3, 16, 16), math.nan) if broken else torch.rand(3, 16, 16))]
    if broken:
        with pytest.raises(ValueError, match="'b'"):
            ev.evaluate(net, items, strategy="s", task="t")
    else:
        ev.evaluate(net, items, strategy="s", task="t")
    assert set(net.seen) == {(False, False, True)}
    assert (net.training, net.norm.training, net.frozen.training) == (True, True, False)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and not torch.is_inference_mode_enabled()
    net(torch.rand(2, 3, 4, 4)).sum().backward()   # parameters are no inference tensors


def test_device_is_used_and_given_back(monkeypatch):
    moves, net = [], nn.Conv2d(3, 3, 1)
    monkeypatch.setattr(net, "to", lambda device: moves.append(str(device)))
    with ev._evaluating(net, torch.device("meta")):
        assert moves == ["meta"]
    assert moves == ["meta", "cpu"]
    with ev._evaluating(net, torch.device("cpu")):
        pass
    assert moves == ["meta", "cpu"]


def test_tiles_equal_the_whole_picture():
    torch.manual_seed(0)
    net = nn.Conv2d(3, 3, 3, padding=1)
    one = item(96)
    whole = ev.evaluate(net, [one], strategy="s", task="t", quantise=False)
    tiled = ev.evaluate(net, [one], strategy="s", task="t", quantise=False, tile=48, overlap=16)
    assert np.allclose([r["value"] for r in whole], [r["value"] for r in tiled], atol=1e-2)
    up = ev.evaluate(ev.untrained(2)["degraded"], [item(96, scale=2)], strategy="s", task="t", tile=32, overlap=8)
    assert up[0]["value"] > 5


@pytest.mark.parametrize("restorer, message", [
    (lambda x: x / 0, "are NaN or infinite"), (lambda x: x * math.nan, "768 of 768 output values"), (lambda x: x[..., 1:], r"expected \(1, 3, 16, 16\)"),
    (lambda x: x[0], r"returned shape \(3, 16, 16\)"), (lambda x: x.numpy(), "returned ndarray, not a tensor"), (lambda x: None, "returned NoneType")])
def test_bad_restorers_are_named(restorer, message):
    with pytest.raises(ValueError, match=message) as error:
        ev.evaluate(restorer, [item()], strategy="mine", task="t")
    assert "strategy 'mine' on image 'a', setting 'sigma_25'" in str(error.value)


@pytest.mark.parametrize("bad, message", [
    (dict(image="a"), "missing setting, seen, degraded, clean"), (item(clean=None), "missing clean"),
    (item(degraded=torch.zeros(3, 4, 4, dtype=torch.uint8)), r"degraded of a, sigma_25 must be a float tensor.*uint8"),
    (item(clean=np.zeros((3, 4, 4))), "clean of a, sigma_25 must be"), (item(clean=torch.zeros(2, 3, 4, 4)), r"got \(2, 3, 4, 4\)"),
    (item(degraded=torch.zeros(4, 4)), r"got \(4, 4\)"), (item(degraded=torch.zeros(3, 0, 4)), r"got \(3, 0, 4\)")])
def test_bad_items(bad, message):
    with pytest.raises(ValueError, match=message):
        ev.evaluate(lambda x: x, [bad], strategy="s", task="t")


def test_bad_options_of_evaluate():
    for options, message in ((dict(metrics=("psnr", "vmaf")), r"unknown \['vmaf'\]"), (dict(seed=-1), "seed must be"), (dict(strategy=""), "strategy must be"),
                             (dict(task=""), "task must be")):
        with pytest.raises(ValueError, match=message):
            ev.evaluate(lambda x: x, [item()], **(dict(strategy="s", task="t") | options))
    with pytest.raises(ValueError, match="no items"):
        ev.evaluate(lambda x: x, [], strategy="s", task="t")
    with pytest.raises(ev.TableError, match="repeats"):
        ev.evaluate(lambda x: x, [item(), item()], strategy="s", task="t")


def test_a_perfect_restoration_is_infinite_in_the_table(tmp_path):
    one = item()
    rows = ev.evaluate(lambda x: x, [one | {"degraded": one["clean"]}], strategy="s", task="t")
    ev.write_table(tmp_path / "t.csv", rows)
    assert ev.read_table(tmp_path / "t.csv")[0]["value"] == math.inf


# --- figures --------------------------------------------------------------------------------------------------------

def texts(figure):
    import matplotlib.text
    return [t.get_text() for t in figure.findobj(matplotlib.text.Text)]


def test_gains_are_the_paired_bootstrap():
    rows = table(noise=0.2)
    got = {(g["strategy"], g["setting"]): g for g in ev.gains(rows, n=500)}
    assert set(got) == {(s, c) for s in ("supervised", "degraded", "ours") for c in ("sigma_15", "sigma_25", "seen", "sigma_50")}
    for name, which in (("sigma_50", "sigma_50"), ("seen", ["sigma_15", "sigma_25"])):
        want, have = ev.paired_bootstrap(rows, "ours", "supervised", which, n=500), got["ours", name]
        assert (have["gain"], have["low"], have["high"], have["n_images"], have["n_seeds"]) == want
    assert math.isclose(got["ours", "seen"]["value"], ev.summary(rows)[2]["seen"]) and got["supervised", "sigma_50"]["gain"] == 0
    assert len(ev.gains(rows, n=10, means=False)) == 9


@needs_matplotlib
def test_map_prints_every_number_and_marks_seen_and_unseen():
    figure = ev.generalisation_map(table(gain=0.5), n=50, title="A title")
    said = texts(figure)
    assert said.count("+0.50") == 4 and said.count("[+0.50, +0.50]") == 4 and {"seen in training", "unseen", "A title\n", "mean"} <= set(said)
    assert f"{ev.summary(table())[1]['sigma_50']:.2f}" in said   # the reference's absolute value
    assert any("4 images x 3 seeds" in t for t in said) and any("gain over supervised (dB)" in t for t in said)
    bold = [t for t in figure.findobj(lambda t: hasattr(t, "get_weight")) if t.get_text() == "+0.50"]
    assert all(t.get_weight() == "bold" for t in bold)


@needs_matplotlib
def test_map_colour_scale_is_symmetric_and_set_by_trained_rows():
    def limits(**options):
        bar = ev.generalisation_map(table(gain=0.5), n=20, **options).axes[-1]
        return bar.get_ylim()
    assert np.allclose(limits(), (-0.5, 0.5)) and np.allclose(limits(limit=2), (-2, 2))
    low, high = limits(reference="ours", strategies=["degraded"])
    assert high == -low > 5
    assert ev._signed(-0.004, 2) == "+0.00" and ev._signed(-0.006, 2) == "-0.01"


@needs_matplotlib
def test_map_with_gaps_one_group_and_other_metrics():
    rows = table()
    assert "mean" in texts(ev.generalisation_map(without(rows, strategy="ours", setting="sigma_25"), n=20))
    only = [r for r in rows if r["seen"]]
    assert "unseen" not in texts(ev.generalisation_map(only, n=20, means=False))
    ssim = [r | {"metric": "ssim", "value": r["value"] / 100} for r in rows]
    assert "+0.0050" in texts(ev.generalisation_map(ssim, metric="ssim", n=20))
    same = [r | {"value": 1.0} for r in rows]
    assert "+0.00" in texts(ev.generalisation_map(same, n=20))
    lone = [r for r in rows if r["strategy"] == "supervised"]
    ev.generalisation_map(lone, n=20)


@needs_matplotlib
def test_map_bad_input():
    rows = table()
    for options, message in ((dict(reference="x"), "reference 'x' is not in the table"), (dict(strategies=["x"]), r"\['x'\] not in the table"),
                             (dict(limit=0), "limit must be > 0"), (dict(limit=math.nan), "limit must be > 0"), (dict(metric="x"), "metric 'x'")):
        with pytest.raises(ValueError, match=message):
            ev.generalisation_map(rows, n=20, **options)
    with pytest.raises(ValueError, match="lacks"):
        ev.generalisation_map(rows[:-1], n=20)
    with pytest.raises(ValueError, match="no rows"):
        ev.generalisation_map([])


def panels(**changes):
    return [ev.panel(item(32) | changes, {"double": lambda x: x * 2, "net": nn.Conv2d(3, 3, 1)})]


@needs_matplotlib
@pytest.mark.parametrize("suffix", ["png", "svg"])
@pytest.mark.parametrize("draw", [lambda: ev.generalisation_map(table(noise=0.2), n=50), lambda: ev.curves(table(noise=0.2), n=50),
                                  lambda: (torch.manual_seed(0), ev.gallery(panels()))[1]], ids=["map", "curves", "gallery"])
def test_figures_are_saved_byte_for_byte_the_same(tmp_path, draw, suffix):
    figure = draw()
    for name in "ab":
        ev.save_figure(figure, tmp_path / "new" / f"{name}.{suffix}")
    drawn = draw()
    drawn.savefig(io.BytesIO(), dpi=50)   # shown before it is saved, as in a notebook
    ev.save_figure(drawn, tmp_path / f"c.{suffix}")
    first = (tmp_path / "new" / f"a.{suffix}").read_bytes()
    assert (tmp_path / "new" / f"b.{suffix}").read_bytes() == first == (tmp_path / f"c.{suffix}").read_bytes()
    assert first.startswith(b"\x89PNG" if suffix == "png" else b"<?xml") and b"dc:date" not in first


@needs_matplotlib
def test_save_figure_freezes_any_figure_and_fails_whole(tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    figure = Figure(layout="constrained")
    figure.add_subplot().set_ylabel("a")
    for name in ("a.svg", "b.svg"):
        ev.save_figure(figure, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    for name in ("a.jpg", "a"):
        with pytest.raises(ValueError, match="writes .png and .svg"):
            ev.save_figure(figure, tmp_path / name)

    def full(file, **options):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(figure, "savefig", full)
    with pytest.raises(ValueError, match="c.svg.*No space left"):
        ev.save_figure(figure, tmp_path / "c.svg")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.svg", "b.svg"]


@needs_matplotlib
def test_curves_numbers_positions_and_names():
    rows = table(gain=0.5)
    ax = ev.curves(rows, n=50).axes[0]
    assert [line.get_label() for line in ax.lines] == ["degraded", "supervised", "ours"] and "seen" in texts(ax.figure)
    means = ev.summary(rows)[2]
    assert np.allclose(ax.lines[2].get_data(), [[15, 25, 50], [means["sigma_15"], means["sigma_25"], means["sigma_50"]]])
    gain = ev.curves(rows, reference="supervised", strategies=["ours"], n=50).axes[0]
    assert np.allclose(gain.lines[0].get_ydata(), 0.5) and "gain over supervised" in gain.get_ylabel()
    placed = ev.curves(rows, positions={"sigma_15": 3, "sigma_25": 2, "sigma_50": 1}, n=50).axes[0]
    assert list(placed.lines[0].get_xdata()) == [1, 2, 3]
    named = ev.curves(table(settings=(("heavy", False), ("light", True), ("rain_2", True))), n=50).axes[0]
    assert [t.get_text() for t in named.get_xticklabels()] == ["light", "rain_2", "heavy"]


@needs_matplotlib
def test_curves_bad_input():
    for options, message in ((dict(reference="x"), r"\['x'\] not in"), (dict(strategies=["y"]), r"\['y'\] not in"),
                             (dict(positions={"sigma_15": 1}), r"no value for the settings \['sigma_25', 'sigma_50'\]"), (dict(metric="x"), "metric 'x'")):
        with pytest.raises(ValueError, match=message):
            ev.curves(table(), n=20, **options)


@needs_matplotlib
def test_gallery_labels_and_odd_pictures():
    from irnb.metrics import psnr
    one = panels()[0]
    said = texts(ev.gallery([one]))
    assert f"double\n{float(psnr(one['restored']['double'], one['clean'], quantise=True)):.2f} dB" in said and "a\nsigma_25\n(seen)" in said
    small = ev.panel(item(32, scale=2), {"up": ev.untrained(2)["degraded"]})
    packed = ev.panel(item(32, degraded=torch.rand(4, 16, 16), seen=False), {"flat": lambda x: torch.full((1, 3, 32, 32), 0.5)})
    grey = ev.panel(item(5, channels=1), {"same": lambda x: x})
    figure = ev.gallery([small, packed, grey], side=8)
    assert len(figure.axes) == 6 * 5 and "a\nsigma_25\n(unseen)" in texts(figure)
    figure.draw_without_rendering()
    with pytest.raises(ValueError, match="no panels"):
        ev.gallery([])
    with pytest.raises(ValueError, match="side must be >= 1"):
        ev.gallery([one], side=0)
    with pytest.raises(ValueError, match="strategy 'bad' on image 'a'"):
        ev.panel(item(), {"bad": lambda x: x[..., 1:]})


def test_textured_box_finds_the_texture():
    clean = torch.full((1, 3, 64, 96), 0.5)
    clean[..., 40:56, 64:80] = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    top, left, side = ev.textured_box(clean, 16)
    assert (top, left, side) == (40, 64, 16)
    assert ev.textured_box(clean[..., :3, :5], 48) == (0, 0, 3) and ev.textured_box(clean[..., :1, :1]) == (0, 0, 1)


def test_import_is_light():
    code = ("import sys, torch, irnb.evaluation; heavy = {'matplotlib', 'skimage', 'scipy', 'pywt', 'IPython', 'PIL', 'fastcore'}; "
            "print(sorted(heavy & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- cheap rivals, and how much of the way

def gap_rows(share, noise=0.0, S=3, I=12):
    rng = np.random.default_rng(1)
    base, top = rng.normal(30, 2, (S, I)), rng.uniform(.5, 1.5, (S, I))
    values = {"v": base, "o": base + top, "n": base + share * top + noise * rng.normal(size=(S, I))}
    return [row(image=f"p{i // 3}_{i}", setting="x", seen=False, strategy=k, seed=s, value=v[s, i]) for k, v in values.items() for s in range(S) for i in range(I)]


@pytest.mark.parametrize("share", [-.5, 0., 1 / 3, 1., 1.7])
def test_a_constant_share_of_the_gap_is_certain(share):
    assert ev.gap_closed(gap_rows(share), "n", "v", "o", "x", n=200)[:3] == pytest.approx((share,) * 3, abs=1e-9)


def test_gap_closed_resamples_numerator_and_denominator_together():
    "Against a plain loop with the same picks; independent resampling would give a wider interval."
    rows = gap_rows(.4, noise=.3)
    found = ev.gap_closed(rows, "n", "v", "o", "x", n=400, seed=5)
    own, best = (ev.paired_differences(rows, s, "v", "x").values for s in ("n", "o"))
    rng = np.random.default_rng(5)
    a, b = (ev._multiplicities(400, size, rng) for size in own.shape)
    ratios = [(u @ own @ v) / (u @ best @ v) for u, v in zip(a, b)]
    assert found == pytest.approx((own.mean() / best.mean(), *np.quantile(ratios, [.025, .975]), 12, 3))
    assert ev.gap_closed(rows, "n", "v", "o", "x", n=50, group=lambda name: name.split("_")[0]).n_images == 4


def test_no_gap_to_close():
    rows = gap_rows(.5)
    with pytest.raises(ValueError, match="no gap to close"):
        ev.gap_closed(rows, "n", "o", "v", "x", n=20)
    with pytest.raises(ValueError, match="no rows of strategy 'w'"):
        ev.gap_closed(rows, "w", "v", "o", "x")


def test_controls_refuse_an_enlarging_restorer_and_leave_its_modes():
    net = nn.Sequential(nn.Dropout(), nn.Identity()).train()
    found = ev.post_controls(net, [item()], quantise=True)
    assert net.training and net[0].training and set(found) == {"blur", "scale"}
    with pytest.raises(ValueError, match="no residual to scale"):
        ev.post_controls(lambda x: x.repeat_interleave(2, -1).repeat_interleave(2, -2), [item(scale=2)])


def test_high_frequency_ratio_is_a_metric_by_name():
    rows = ev.evaluate(nn.Identity(), [item(side=32)], strategy="s", task="t", metrics=("high_frequency_ratio", "psnr"))
    assert [r["metric"] for r in rows] == ["high_frequency_ratio", "psnr"] and rows[0]["value"] > 0


@needs_wavelets
@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value")
def test_wavelets_pass_pictures_without_detail_in_a_channel():
    "A JPEG of a grey picture has no colour at all: BayesShrink divides zero by zero there, and the picture passes unchanged."
    from skimage.restoration import denoise_wavelet
    grey = (torch.arange(32.) // 8 / 8).expand(1, 3, 32, 32).contiguous()
    with np.errstate(all="ignore"):
        plain = denoise_wavelet(grey[0].permute(1, 2, 0).double().numpy(), method="BayesShrink", mode="soft", rescale_sigma=True, convert2ycbcr=True, channel_axis=-1)
    assert np.isnan(plain).any()
    assert torch.equal(ev.wavelet(grey), grey) and torch.isfinite(ev.wavelet(grey[:, :1])).all()
