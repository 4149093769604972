"""Paired differences, intervals, tests and gains."""
import math

import numpy as np
import pytest

from irnb.results.statistics import _multiplicities, bootstrap, gains, gap_closed, holm, paired_bootstrap, paired_differences, seed_test, sign_flip
from irnb.results.table import TableError, summary
from tests.result_rows import row, table, without


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
    got = bootstrap(d, n, 11)
    assert np.allclose(got[:3], [d.mean(), *np.percentile(means, [2.5, 97.5])], atol=1e-12)
    assert (got.n_images, got.n_seeds) == (I, S)


def test_bootstrap_degenerate_cases():
    assert bootstrap(np.zeros((3, 4)))[:3] == (0, 0, 0)
    assert bootstrap([[0.7]]) == (0.7, 0.7, 0.7, 1, 1)
    mean, low, high, *_ = bootstrap(np.full((3, 7), 0.1))
    assert high - low < 1e-15 and abs(mean - 0.1) < 1e-15
    one_seed = bootstrap([[0.0, 1.0]])
    assert (one_seed.low, one_seed.high) == (0, 1)   # images alone are resampled


def test_bootstrap_is_seeded_and_leaves_the_global_generator_alone():
    d = np.random.default_rng(0).normal(size=(3, 9))
    state = np.random.get_state()[1].copy()
    assert bootstrap(d, seed=4) == bootstrap(d, seed=4) != bootstrap(d, seed=5)
    assert (np.random.get_state()[1] == state).all()
    assert bootstrap(d, 2500).mean == d.mean()   # more draws than one block
    wide, narrow = bootstrap(d, level=0.99), bootstrap(d, level=0.5)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_bootstrap_covers_a_known_effect():
    rng, mu, hits, naive, trials = np.random.default_rng(1), 0.3, 0, 0, 400
    for k in range(trials):
        d = mu + 0.2 * rng.normal(size=(15, 1)) + 0.2 * rng.normal(size=(1, 30)) + 0.1 * rng.normal(size=(15, 30))
        _, low, high, *_ = bootstrap(d, 400, k)
        hits += low <= mu <= high
        _, low, high, *_ = bootstrap(d.reshape(1, -1), 400, k)
        naive += low <= mu <= high
    assert 0.91 <= hits / trials <= 0.98
    assert naive / trials < 0.6   # the same test catches resampling seeds and images as one bag


@pytest.mark.parametrize("bad, options, message", [
    (np.zeros(3), {}, "shape"), (np.zeros((0, 3)), {}, "shape"), ([[np.nan]], {}, "finite"), ([[np.inf]], {}, "finite"),
    ([[1.0]], dict(n=0), "bootstrap: n .*0"), ([[1.0]], dict(level=1.0), "level.*1.0")])
def test_bootstrap_bad_input(bad, options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(bad, **options)


def test_paired_bootstrap_recovers_the_gain_and_ignores_row_order():
    rows = table(gain=0.5, noise=0.1)
    got = paired_bootstrap(rows, "ours", "supervised", "sigma_50")
    assert got.low < 0.5 < got.high and got.high - got.low < 0.4 and (got.n_images, got.n_seeds) == (4, 3)
    assert paired_bootstrap(rows[::-1], "ours", "supervised", "sigma_50") == got
    back = paired_bootstrap(rows, "supervised", "ours", "sigma_50")
    assert math.isclose(back.mean, -got.mean) and math.isclose(back.low, -got.high, abs_tol=1e-3)
    assert paired_bootstrap(rows, "ours", "ours", "sigma_50")[:3] == (0, 0, 0)


def test_crops_of_one_scene_count_once():
    rows = table(gain=0.5, noise=0.3)
    group = lambda image: "a" if image in ("img0", "img2", "img3") else "b"
    apart, joined = (paired_differences(rows, "ours", "supervised", "sigma_50", group=g) for g in (None, group))
    assert joined.images == ["a", "b"] and joined.seeds == apart.seeds
    assert np.allclose(joined.values, np.stack([apart.values[:, [0, 2, 3]].mean(1), apart.values[:, 1]], 1))
    got = paired_bootstrap(rows, "ours", "supervised", "sigma_50", group=group)
    assert got.n_images == 2 and math.isclose(got.mean, joined.values.mean()) and not math.isclose(got.mean, apart.values.mean())


def test_a_row_without_seed_pairs_with_every_seed():
    rows = table(gain=0.5)
    d = paired_differences(rows, "ours", "degraded", "sigma_15")
    assert d.seeds == [0, 1, 2] and d.images == [f"img{i}" for i in range(4)]
    want = {(r["seed"], r["image"]): r["value"] for r in rows if r["strategy"] == "ours" and r["setting"] == "sigma_15"}
    assert np.allclose(d.values, [[want[s, i] - 20 - int(i[3:]) for i in d.images] for s in d.seeds])
    assert np.allclose(paired_differences(rows, "degraded", "ours", "sigma_15").values, -d.values)
    assert paired_differences(rows, "degraded", "degraded", "sigma_15").seeds == ["-"]


def test_several_settings_are_averaged_per_seed_and_image():
    rows = table(noise=0.3)
    parts = [paired_differences(rows, "ours", "supervised", s).values for s in ("sigma_15", "sigma_50")]
    assert np.allclose(paired_differences(rows, "ours", "supervised", ["sigma_15", "sigma_50"]).values, sum(parts) / 2)


def test_missing_pairs_are_listed():
    rows = table()
    cut = without(rows, strategy="ours", setting="sigma_50", seed=1, image="img2")
    with pytest.raises(ValueError, match=r"sigma_50.*'ours' lacks \(seed 1, img2\)$"):
        paired_bootstrap(cut, "ours", "supervised", "sigma_50")
    with pytest.raises(ValueError, match=r"'supervised' lacks \(seed 2, img0\), .*\(seed 2, img3\)$"):
        paired_bootstrap(without(rows, strategy="supervised", seed=2), "ours", "supervised", "sigma_15")
    both = without(cut, strategy="supervised", setting="sigma_50", seed=1, image="img2")
    with pytest.raises(ValueError, match=r"missing \(seed 1, img2\)"):
        paired_bootstrap(both, "ours", "supervised", "sigma_50")
    many = without(table(I=40), strategy="ours", seed=0)
    with pytest.raises(ValueError, match="and 32 more"):
        paired_bootstrap(many, "ours", "supervised", "sigma_15")
    with pytest.raises(ValueError, match="'sigma_15'.*'sigma_50'"):
        fewer = [r for r in rows if not (r["setting"] == "sigma_50" and r["image"] == "img3")]
        paired_bootstrap(fewer, "ours", "supervised", ["sigma_15", "sigma_50"])


def test_wrong_names_infinite_values_and_mixed_tasks():
    rows = table()
    for names, options, message in ((("his", "supervised", "sigma_15"), {}, "strategy 'his'"),
                                    (("ours", "supervised", "sigma_99"), {}, "setting 'sigma_99'"),
                                    (("ours", "supervised", []), {}, "setting: "),
                                    (("ours", "supervised", "sigma_15"), dict(metric="lpips"), "metric 'lpips'"),
                                    (("ours", "supervised", "sigma_15"), dict(task="dehaze"), "task 'dehaze'")):
        with pytest.raises(ValueError, match=message):
            paired_bootstrap(rows, *names, **options)
    with pytest.raises(ValueError, match="no rows"):
        paired_bootstrap([], "a", "b", "c")
    endless = [r | {"value": math.inf} if (r["seed"], r["image"]) == (1, "img0") else r for r in rows]
    with pytest.raises(ValueError, match=r"infinite.*\(seed 1, img0\)"):
        paired_bootstrap(endless, "ours", "supervised", "sigma_15")
    two = rows + [r | {"task": "deblur"} for r in rows]
    with pytest.raises(ValueError, match="task="):
        paired_bootstrap(two, "ours", "supervised", "sigma_15")
    assert paired_bootstrap(two, "ours", "supervised", "sigma_15", task="deblur").n_images == 4
    with pytest.raises(TableError, match="repeats"):
        paired_bootstrap(rows + rows[:1], "ours", "supervised", "sigma_15")


def test_sign_flip_against_enumeration_and_holm_by_hand():
    import itertools
    d = np.random.default_rng(5).normal(0.3, 1, 7)
    sums = [abs(sum(s * x for s, x in zip(signs, d))) for signs in itertools.product((1, -1), repeat=7)]
    assert sign_flip(d) == np.mean([s >= abs(d.sum()) - 1e-12 for s in sums])
    assert sign_flip([0.3]) == 1 and sign_flip([0.1] * 6) == 2 / 64
    assert np.allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02]) and np.allclose(holm([0.9, 0.8]), [1, 1])
    for bad in ([], [[1.0]], [np.nan], [0.1] * 17):
        with pytest.raises(ValueError, match="sign_flip"):
            sign_flip(bad)
    for bad in ([1.1], [-0.1], [np.nan], [[0.1]]):
        with pytest.raises(ValueError, match="holm"):
            holm(bad)


def test_seed_test_against_scipy():
    from scipy import stats
    d = np.random.default_rng(2).normal(0.2, 0.5, (5, 8))
    got, want = seed_test(d), stats.ttest_1samp(d.mean(1), 0)
    assert np.allclose((got.low, got.high), want.confidence_interval(0.95)) and got.p == sign_flip(d.mean(1))
    assert got.per_seed == tuple(d.mean(1)) and got.positive == (d.mean(0) > 0).sum() and got.n_images == 8
    one = seed_test(d[:1])
    assert math.isnan(one.sd) and math.isnan(one.low) and one.p == 1
    assert math.isnan(seed_test(np.ones((17, 2))).p)
    for bad in (np.ones(3), np.ones((0, 2)), [[np.nan]]):
        with pytest.raises(ValueError, match="seed_test"):
            seed_test(bad)


def test_gains_are_the_paired_bootstrap():
    rows = table(noise=0.2)
    got = {(g["strategy"], g["setting"]): g for g in gains(rows, n=500)}
    assert set(got) == {(s, c) for s in ("supervised", "degraded", "ours") for c in ("sigma_15", "sigma_25", "seen", "sigma_50")}
    for name, which in (("sigma_50", "sigma_50"), ("seen", ["sigma_15", "sigma_25"])):
        want, have = paired_bootstrap(rows, "ours", "supervised", which, n=500), got["ours", name]
        assert (have["gain"], have["low"], have["high"], have["n_images"], have["n_seeds"]) == want
    assert math.isclose(got["ours", "seen"]["value"], summary(rows)[2]["seen"]) and got["supervised", "sigma_50"]["gain"] == 0
    assert len(gains(rows, n=10, means=False)) == 9


def gap_rows(share, noise=0.0, S=3, I=12):
    rng = np.random.default_rng(1)
    base, top = rng.normal(30, 2, (S, I)), rng.uniform(.5, 1.5, (S, I))
    values = {"v": base, "o": base + top, "n": base + share * top + noise * rng.normal(size=(S, I))}
    return [row(image=f"p{i // 3}_{i}", setting="x", seen=False, strategy=k, seed=s, value=v[s, i]) for k, v in values.items() for s in range(S) for i in range(I)]


@pytest.mark.parametrize("share", [-.5, 0., 1 / 3, 1., 1.7])
def test_a_constant_share_of_the_gap_is_certain(share):
    assert gap_closed(gap_rows(share), "n", "v", "o", "x", n=200)[:3] == pytest.approx((share,) * 3, abs=1e-9)


def test_gap_closed_resamples_numerator_and_denominator_together():
    "Against a plain loop with the same picks; independent resampling would give a wider interval."
    rows = gap_rows(.4, noise=.3)
    found = gap_closed(rows, "n", "v", "o", "x", n=400, seed=5)
    own, best = (paired_differences(rows, s, "v", "x").values for s in ("n", "o"))
    rng = np.random.default_rng(5)
    a, b = (_multiplicities(400, size, rng) for size in own.shape)
    ratios = [(u @ own @ v) / (u @ best @ v) for u, v in zip(a, b)]
    assert found == pytest.approx((own.mean() / best.mean(), *np.quantile(ratios, [.025, .975]), 12, 3))
    assert gap_closed(rows, "n", "v", "o", "x", n=50, group=lambda name: name.split("_")[0]).n_images == 4


def test_no_gap_to_close():
    rows = gap_rows(.5)
    with pytest.raises(ValueError, match="no gap"):
        gap_closed(rows, "n", "o", "v", "x", n=20)
    with pytest.raises(ValueError, match="strategy 'w'"):
        gap_closed(rows, "w", "v", "o", "x")
