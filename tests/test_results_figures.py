"""The map, curves, the gallery, trainings."""
import io
import math

import numpy as np
import pytest
import torch
from torch import nn

from irnb.results.baselines import untrained
from irnb.results.figures import _signed, curves, gallery, generalisation_map, save_figure, textured_box, training_figure
from irnb.results.measure import panel
from irnb.results.table import summary
from tests.result_rows import item, needs_matplotlib, table, without


def texts(figure):
    import matplotlib.text
    return [t.get_text() for t in figure.findobj(matplotlib.text.Text)]


@needs_matplotlib
def test_map_prints_every_number_and_marks_seen_and_unseen():
    figure = generalisation_map(table(gain=0.5), n=50, title="A title")
    said = texts(figure)
    assert said.count("+0.50") == 4 and said.count("[+0.50, +0.50]") == 4 and {"seen in training", "unseen", "A title\n", "mean"} <= set(said)
    assert f"{summary(table())[1]['sigma_50']:.2f}" in said   # the reference's absolute value
    assert any("4 images x 3 seeds" in t for t in said) and any("gain over supervised (dB)" in t for t in said)
    bold = [t for t in figure.findobj(lambda t: hasattr(t, "get_weight")) if t.get_text() == "+0.50"]
    assert all(t.get_weight() == "bold" for t in bold)


@needs_matplotlib
def test_map_colour_scale_is_symmetric_and_set_by_trained_rows():
    def limits(**options):
        bar = generalisation_map(table(gain=0.5), n=20, **options).axes[-1]
        return bar.get_ylim()
    assert np.allclose(limits(), (-0.5, 0.5)) and np.allclose(limits(limit=2), (-2, 2))
    low, high = limits(reference="ours", strategies=["degraded"])
    assert high == -low > 5
    assert _signed(-0.004, 2) == "+0.00" and _signed(-0.006, 2) == "-0.01"


@needs_matplotlib
def test_map_with_gaps_one_group_and_other_metrics():
    rows = table()
    assert "mean" in texts(generalisation_map(without(rows, strategy="ours", setting="sigma_25"), n=20))
    only = [r for r in rows if r["seen"]]
    assert "unseen" not in texts(generalisation_map(only, n=20, means=False))
    ssim = [r | {"metric": "ssim", "value": r["value"] / 100} for r in rows]
    assert "+0.0050" in texts(generalisation_map(ssim, metric="ssim", n=20))
    same = [r | {"value": 1.0} for r in rows]
    assert "+0.00" in texts(generalisation_map(same, n=20))
    lone = [r for r in rows if r["strategy"] == "supervised"]
    generalisation_map(lone, n=20)


@needs_matplotlib
def test_map_bad_input():
    rows = table()
    for options, message in ((dict(reference="x"), "reference 'x'"), (dict(strategies=["x"]), r"strategies.*\['x'\]"),
                             (dict(limit=0), "limit.*got 0"), (dict(limit=math.nan), "limit.*nan"), (dict(metric="x"), "metric 'x'")):
        with pytest.raises(ValueError, match=message):
            generalisation_map(rows, n=20, **options)
    with pytest.raises(ValueError, match="lacks"):
        generalisation_map(rows[:-1], n=20)
    with pytest.raises(ValueError, match="no rows"):
        generalisation_map([])


def panels(**changes):
    return [panel(item(32) | changes, {"double": lambda x: x * 2, "net": nn.Conv2d(3, 3, 1)})]


@needs_matplotlib
@pytest.mark.parametrize("suffix", ["png", "svg"])
@pytest.mark.parametrize("draw", [lambda: generalisation_map(table(noise=0.2), n=50), lambda: curves(table(noise=0.2), n=50),
                                  lambda: (torch.manual_seed(0), gallery(panels()))[1]], ids=["map", "curves", "gallery"])
def test_figures_are_saved_byte_for_byte_the_same(tmp_path, draw, suffix):
    figure = draw()
    for name in "ab":
        save_figure(figure, tmp_path / "new" / f"{name}.{suffix}")
    drawn = draw()
    drawn.savefig(io.BytesIO(), dpi=50)   # shown before it is saved, as in a notebook
    save_figure(drawn, tmp_path / f"c.{suffix}")
    first = (tmp_path / "new" / f"a.{suffix}").read_bytes()
    assert (tmp_path / "new" / f"b.{suffix}").read_bytes() == first == (tmp_path / f"c.{suffix}").read_bytes()
    assert first.startswith(b"\x89PNG" if suffix == "png" else b"<?xml") and b"dc:date" not in first


@needs_matplotlib
def test_save_figure_freezes_any_figure_and_fails_whole(tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    figure = Figure(layout="constrained")
    figure.add_subplot().set_ylabel("a")
    for name in ("a.svg", "b.svg"):
        save_figure(figure, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    for name in ("a.jpg", "a"):
        with pytest.raises(ValueError, match=f"/{name}: .*png.*svg"):
            save_figure(figure, tmp_path / name)

    def full(file, **options):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(figure, "savefig", full)
    with pytest.raises(ValueError, match="c.svg.*No space left"):
        save_figure(figure, tmp_path / "c.svg")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.svg", "b.svg"]


@needs_matplotlib
def test_curves_numbers_positions_and_names():
    rows = table(gain=0.5)
    ax = curves(rows, n=50).axes[0]
    assert [line.get_label() for line in ax.lines] == ["degraded", "supervised", "ours"] and "seen" in texts(ax.figure)
    means = summary(rows)[2]
    assert np.allclose(ax.lines[2].get_data(), [[15, 25, 50], [means["sigma_15"], means["sigma_25"], means["sigma_50"]]])
    gain = curves(rows, reference="supervised", strategies=["ours"], n=50).axes[0]
    assert np.allclose(gain.lines[0].get_ydata(), 0.5) and "gain over supervised" in gain.get_ylabel()
    placed = curves(rows, positions={"sigma_15": 3, "sigma_25": 2, "sigma_50": 1}, n=50).axes[0]
    assert list(placed.lines[0].get_xdata()) == [1, 2, 3]
    named = curves(table(settings=(("heavy", False), ("light", True), ("rain_2", True))), n=50).axes[0]
    assert [t.get_text() for t in named.get_xticklabels()] == ["light", "rain_2", "heavy"]


@needs_matplotlib
def test_curves_bad_input():
    for options, message in ((dict(reference="x"), r"\['x'\]"), (dict(strategies=["y"]), r"\['y'\]"),
                             (dict(positions={"sigma_15": 1}), r"positions.*\['sigma_25', 'sigma_50'\]"), (dict(metric="x"), "metric 'x'")):
        with pytest.raises(ValueError, match=message):
            curves(table(), n=20, **options)


@needs_matplotlib
def test_gallery_labels_and_odd_pictures():
    from irnb.metrics import psnr
    one = panels()[0]
    said = texts(gallery([one]))
    assert f"double\n{float(psnr(one['restored']['double'], one['clean'], quantise=True)):.2f} dB" in said and "a\nsigma_25\n(seen)" in said
    small = panel(item(32, scale=2), {"up": untrained(2)["degraded"]})
    packed = panel(item(32, degraded=torch.rand(4, 16, 16), seen=False), {"flat": lambda x: torch.full((1, 3, 32, 32), 0.5)})
    grey = panel(item(5, channels=1), {"same": lambda x: x})
    figure = gallery([small, packed, grey], side=8)
    assert len(figure.axes) == 6 * 5 and "a\nsigma_25\n(unseen)" in texts(figure)
    figure.draw_without_rendering()
    with pytest.raises(ValueError, match="no panels"):
        gallery([])
    with pytest.raises(ValueError, match="side.*got 0"):
        gallery([one], side=0)
    with pytest.raises(ValueError, match="strategy 'bad' on image 'a'"):
        panel(item(), {"bad": lambda x: x[..., 1:]})


def test_textured_box_finds_the_texture():
    clean = torch.full((1, 3, 64, 96), 0.5)
    clean[..., 40:56, 64:80] = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    top, left, side = textured_box(clean, 16)
    assert (top, left, side) == (40, 64, 16)
    assert textured_box(clean[..., :3, :5], 48) == (0, 0, 3) and textured_box(clean[..., :1, :1]) == (0, 0, 1)


@needs_matplotlib
def test_marked_strategies_carry_a_dagger_and_a_note():
    note = "† saw the unseen settings in training"
    drawn = generalisation_map(table(), n=20, marked=["ours"])
    assert [t.get_text() for t in drawn.axes[0].get_yticklabels()] == ["supervised\n(dB, absolute)", "degraded", "ours †"]
    assert any(note in t for t in texts(drawn)) and any(note in t for t in texts(curves(table(), n=20, marked=["ours"])))
    assert [line.get_label() for line in curves(table(), n=20, marked=["ours"]).axes[0].lines] == ["degraded", "supervised", "ours †"]
    for figure in (generalisation_map(table(), n=20), curves(table(), n=20, marked=["absent"]), generalisation_map(table(), n=20, marked=["absent"])):
        assert not any("†" in t for t in texts(figure))
    reference = generalisation_map(table(), n=20, marked=["supervised"])
    assert reference.axes[0].get_yticklabels()[0].get_text() == "supervised †\n(dB, absolute)"


@needs_matplotlib
def test_runs_of_one_strategy_look_alike():
    logged = [dict(run=run, strategy=run[0], step=str(s), task_loss=str(1 / s)) for run in ("a0", "b0", "a1") for s in (1, 2)]
    ax = training_figure(logged, {"task_loss": "loss"}).axes[0]
    first, second, third = ax.lines
    assert first.get_color() == third.get_color() != second.get_color() and list(third.get_xdata()) == [1, 2]
    assert len(training_figure(logged).axes[1].lines) == 0   # nobody logged the second quantity
