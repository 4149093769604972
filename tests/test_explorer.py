"""The explorer without a browser: state, pictures, parameters, restorers, map, widgets; curves of runs that are being written; the style of figures."""
import io
import platform
import shutil
import subprocess
import sys
import threading
import time
from datetime import datetime, timezone

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from irnb import degradations as deg
from irnb.data import TASKS, benchmark, task
from irnb.results.baselines import identity
from irnb.results.measure import evaluate
from irnb.results.table import write_table
from irnb.explorer.cells import experiments, open_cell, result_map
from irnb.explorer.curves import PALETTE, curves_figure, curves_text, quantities, read_curves
from irnb.explorer.darkroom import trained_models
from irnb.explorer.dials import kinds, parameters, with_parameters
from irnb.explorer.figure import described, explorer_figure
from irnb.explorer.pictures import (MIN_SIDE, ExplorerError, error_map, marked, open_picture, photograph_files, picture_files, png_bytes, read_upload, residual_map,
                                    to_pixels)
from irnb.explorer.state import Explorer
from irnb.explorer.view import explore, map_buttons
from irnb.explorer.watching import TrainingView, watch
from irnb.explorer.widgets import control
from irnb.image_files import ImageError, write_image
from irnb.networks import build, save_model
from tests.notebooks import ROOT

RESULTS = ROOT / "results" / "default"


def picture(height=40, width=48, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.nn.functional.interpolate(torch.rand(1, 3, 5, 6, generator=g), size=(height, width), mode="bicubic").clamp(0, 1)[0]


@pytest.fixture
def explorer():
    return Explorer({"copy": lambda x: x.clone(), "blur": torch.nn.AvgPool2d(3, 1, 1, count_include_pad=False)}, {"a": picture(), "b": picture(64, 64, 1)}, side=64)


@pytest.fixture
def runs(tmp_path):
    "A folder of runs with one trained model, as the pipeline leaves it."
    spec = {"network": {"name": "UNet", "options": {"preset": "tiny"}}}
    save_model(tmp_path / "runs" / "denoise" / "supervised-0" / "model.safetensors", build("UNet", preset="tiny"), spec)
    return tmp_path / "runs"


# ------------------------------------------------------------------ the module

def test_import_is_light():
    heavy = ["matplotlib", "ipywidgets", "IPython", "traitlets", "nbdev", "dvc", "dvclive", "skimage", "scipy", "PIL"]
    code = f"import irnb.explorer.view, irnb.explorer.watching, sys; print(sorted(set({heavy!r}) & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_package_offers_the_names_of_its_rooms():
    import irnb.explorer
    from irnb.explorer import explore as offered
    assert offered is explore
    assert all(getattr(irnb.explorer, name).__module__.startswith("irnb.explorer.") for name in irnb.explorer.__all__ if name not in ("MIN_SIDE", "PALETTE"))


def test_without_ipywidgets_the_message_names_the_remedy(explorer, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    for make in (lambda: explore(explorer), lambda: watch(RESULTS)):
        with pytest.raises(ExplorerError, match=r"pip.*irnb\[notebooks\]"):
            make()
    assert explorer_figure(explorer).figure.axes


# ------------------------------------------------------------------ pictures

def test_pictures_from_folder_file_mapping(tmp_path):
    write_image(tmp_path / "x" / "one.png", picture())
    write_image(tmp_path / "x" / "deep" / "two.jpg", picture())
    assert list(picture_files(tmp_path / "x")) == ["deep/two.jpg", "one.png"]
    assert list(picture_files(tmp_path / "x" / "one.png")) == ["one.png"]
    assert "astronaut" in picture_files() and len(photograph_files()) == 16
    with pytest.raises(ExplorerError, match="/nothing: "):
        picture_files(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExplorerError, match="/empty: .*no picture"):
        picture_files(tmp_path / "empty")
    with pytest.raises(ExplorerError, match="no picture"):
        picture_files({})


def test_open_picture_takes_grey_and_16_bits_and_refuses_the_rest(tmp_path):
    write_image(tmp_path / "grey16.png", picture()[:1], bits=16)
    x = open_picture(tmp_path / "grey16.png")
    assert x.shape == (3, 40, 48) and torch.equal(x[0], x[1])
    with pytest.raises(ExplorerError, match="icon: 15 x 40 .*16"):
        open_picture(torch.rand(3, 40, MIN_SIDE - 1), "icon")
    with pytest.raises(ExplorerError, match="NaN"):
        open_picture(torch.full((3, 20, 20), float("nan")))
    for wrong in (torch.zeros(3, 20, 20, dtype=torch.uint8), torch.rand(2, 20, 20), torch.rand(1, 3, 20, 20)):
        with pytest.raises(ExplorerError, match="float tensor"):
            open_picture(wrong)
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(ImageError, match="bad.png"):
        open_picture(tmp_path / "bad.png")


def test_upload_is_read_by_its_own_name():
    assert torch.equal((read_upload("cat.PNG", png_bytes(to_pixels(picture()))) * 255).round(), (picture() * 255).round())
    for name, content in (("cat.png", b"no picture"), ("cat.gif", b"GIF89a"), ("cat", b"")):
        with pytest.raises(ExplorerError) as caught:
            read_upload(name, content)
        assert name in str(caught.value) and "/tmp" not in str(caught.value)


# ------------------------------------------------------------------ parameters

EVERY = [pytest.param(d, id=name) for name, d in kinds().items()] + [pytest.param(d, id=f"{t.name}-{s}") for t in TASKS.values() for s, d in t.settings.items()]


@pytest.mark.parametrize("degradation", EVERY)
def test_what_a_slider_can_say_is_legal(degradation):
    pytest.importorskip("ipywidgets")
    assert with_parameters(degradation, {}) == degradation
    for p in parameters(degradation):
        assert p.low <= p.value <= p.high if not p.choices and not isinstance(p.value, bool) else True
        widget = control(p)
        assert widget.description and widget.tooltip and widget.value == pytest.approx(p.value) if not isinstance(p.value, str) else widget.value == p.value
        for value in p.choices or ((True, False) if isinstance(p.value, bool) else (widget.min, widget.max)):
            changed = with_parameters(degradation, {p.key: value})
            back = next(q for q in parameters(changed) if q.key == p.key)
            assert back.value == pytest.approx(value) if isinstance(value, float) else back.value == value


def test_a_degradation_of_ones_own_gets_sliders():
    from dataclasses import dataclass

    @dataclass(frozen=True, eq=False, repr=False)
    class Fog(deg.Degradation):
        thickness: float = 0.2
        _bounds = {"thickness": (0, float("inf"), "of the air")}

    p, = parameters(Fog())
    assert (p.key, p.low, p.high, p.unit) == ("thickness", 0, 0.8, "of the air")
    assert parameters(deg.KernelBlur(torch.ones(3, 3))) == [] and parameters(deg.OneOf(deg.JPEG(20), deg.Identity())) == []


def test_wrong_parameters_change_nothing(explorer):
    explorer.choose(task="denoise", setting="sigma_20")
    for key, value, text in (("sigma", -1.0, "sigma.*-1"), ("gamma", 2.0, "'gamma'")):
        with pytest.raises(ValueError, match=text):
            explorer.move(key, value)
    assert explorer.values == {} and explorer.seen
    explorer.move("sigma", 21)
    assert explorer.degradation == deg.GaussianNoise(21) and not explorer.seen


# ------------------------------------------------------------------ pixels

@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_png_is_exact(height, width, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    image = Image.open(io.BytesIO(png_bytes(pixels)))
    assert image.format == "PNG" and np.array_equal(np.array(image), pixels)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="how other C libraries keep memory is theirs")
def test_memory_of_layers_is_used_again():
    code = """
import resource, torch
from irnb.explorer.widgets import reuse_memory
net = torch.nn.Sequential(*[torch.nn.Conv2d(16, 16, 1) for _ in range(8)]).eval()
x = torch.rand(1, 16, 256, 256)   # 4 MiB
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    with torch.no_grad(): list(map(net, [x] * 4))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
reuse_memory(); faults()
print(min(faults() for _ in range(5)))   # where the first blocks come to lie is chance
"""
    before, after = map(int, subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    print(f"page faults of four restorations: {before} before, {after} after")
    assert after < 200 and after < before / 5


def test_maps_say_what_they_should():
    from matplotlib import colormaps
    x, clean = picture(seed=1), picture()
    grey = residual_map(x, x)
    assert (grey == 128).all()
    assert np.abs(residual_map(clean, x, 1.0).astype(float) - 255 * (0.5 + clean - x).clamp(0, 1).permute(1, 2, 0).numpy()).max() <= 0.51
    level = ((x - clean).abs().amax(0) * 255 / 64).clamp(0, 1).numpy()
    shown = np.array(Image.open(io.BytesIO(png_bytes(error_map(x, clean, 64)))).convert("RGB"))
    assert np.abs(shown / 255 - colormaps["cividis"](level)[..., :3]).max() < 0.05
    assert to_pixels(torch.rand(4, 5, 6)).shape == (5, 6, 3)
    pixels = to_pixels(clean)
    framed = marked(pixels, (4, 6, 10))
    changed = (framed != pixels).any(-1)
    assert changed[4:14, 6:16].sum() == changed.sum() <= 36 and np.array_equal(pixels, to_pixels(clean))


# ------------------------------------------------------------------ state

@pytest.mark.parametrize("name", ["denoise", "sr4", "jdd", "hybrid", "camera"])
def test_a_setting_shows_the_bytes_of_the_benchmark(name, tmp_path):
    images = {"a": picture(50, 70), "b": picture(64, 48, 1)}
    made = benchmark(images, task(name), tmp_path / "out", crop=32)
    e = Explorer({}, images, side=32)
    for item in made:
        e.choose(picture=item.image, task=name, setting=item.setting)
        assert torch.equal(e.degraded(), item.degraded[0]) and torch.equal(e.clean(), item.clean[0]) and e.seen == item.seen
        row, = evaluate(lambda x: identity(x, item.clean.shape[-1] // x.shape[-1]), [item], strategy="degraded", task=name, metrics="psnr", **task(name).conventions)
        assert e.panel("degraded").psnr == pytest.approx(row["value"], abs=1e-4)


def test_same_state_same_bytes_and_other_seed_other_bytes():
    def look(seed):
        e = Explorer({}, {"a": picture()}, side=64)
        e.choose(task="denoise", setting="sigma_50", seed=seed, shown=["wavelet"])
        return [png_bytes(x) for p in e.panels() for x in p.pictures.values()]
    before = torch.get_rng_state()
    first = look(3)
    assert first == look(3) and first != look(4) and torch.equal(before, torch.get_rng_state())


def test_all_kinds_and_settings_can_be_shown(explorer):
    for name in ("", *TASKS):
        for setting in (TASKS[name].settings if name else kinds()):
            panels = explorer.choose(picture="b", task=name, setting=setting, shown=[]).panels()
            assert not any(p.message for p in panels) and all(set(p.pictures) == {"picture", "zoom", "residual", "error"} for p in panels), (name, setting)
            assert panels[0].caption == "truth" and len({x.shape[:2] for p in panels for k, x in p.pictures.items() if k != "zoom"}) == 1


@pytest.mark.parametrize("state, text", [({"picture": "c"}, "picture: 'c'.*'a', 'b'"), ({"task": "fly"}, "task: 'fly'"), ({"setting": "sigma_5"}, "setting: 'sigma_5'"),
                                         ({"task": "denoise", "setting": "blur_1"}, "'blur_1'"), ({"seed": -1}, "seed: -1"), ({"colour": 1}, "no 'colour'")])
def test_wrong_choices_change_nothing(explorer, state, text):
    before = dict(explorer.__dict__)
    with pytest.raises(ExplorerError, match=text):
        explorer.choose(**{"picture": "b", **state})
    assert {k: v for k, v in explorer.__dict__.items() if k != "_kept"} == {k: v for k, v in before.items() if k != "_kept"}


@given(st.integers(-100, 200), st.integers(-100, 200), st.integers(1, 300))
@settings(max_examples=30, deadline=None)
def test_the_zoom_stays_inside(top, left, side):
    e = Explorer({}, {"a": picture(40, 48)}, side=64)
    e.box = (top, left, side)
    t, l, s = e.box
    assert 0 <= t <= t + s <= 40 and 0 <= l <= l + s <= 48 and s == min(side, 40)
    assert e.panel("clean").pictures["zoom"].shape == (s, s, 3)


def test_another_picture_begins_at_its_own_texture(explorer):
    explorer.choose(picture="b")
    start = explorer.box
    explorer.box = (0, 0, 20)
    assert explorer.box == (0, 0, 20) != explorer.choose(picture="a").box and explorer.choose(picture="b").box == start


def test_wrong_zoom_side_and_size():
    e = Explorer({}, {"a": picture()})
    for box in ((0, 0, 0), (0, 0)):
        with pytest.raises(ExplorerError, match="box: .*side"):
            e.box = box
    with pytest.raises(ExplorerError, match="side.*16.* 8"):
        Explorer({}, {"a": picture()}, side=8)
    with pytest.raises(ExplorerError, match="'degraded'"):
        Explorer({"degraded": identity})


# ------------------------------------------------------------------ restorers

class Odd(torch.nn.Module):
    def forward(self, x):
        return x[..., 1:]


@pytest.mark.parametrize("restorer, text", [
    (Odd(), r"returned shape \(1, 3, 40, 47\), expected \(1, 3, 40, 48\)"), (lambda x: x / 0 * 0, "NaN or infinite"), (lambda x: None, "NoneType"),
    (lambda x: {}["weights"], "KeyError: 'weights'"), (torch.nn.Conv2d(4, 4, 1), "RuntimeError: .*channels"), ("nowhere/model.safetensors", "nowhere")])
def test_a_bad_restorer_is_a_message_and_the_others_are_shown(restorer, text):
    import re
    e = Explorer({"bad": restorer, "copy": lambda x: x.clone()}, {"a": picture()}, side=64)
    panels = e.choose(shown=["bad", "copy", "none"]).panels()
    assert re.search(text, panels[2].message) and panels[2].caption == "not shown" and not panels[2].pictures
    assert not panels[3].message and "no restorer 'none'" in panels[4].message


def test_model_files_are_found_and_opened_when_first_shown(runs, monkeypatch):
    import irnb.explorer.darkroom as darkroom
    opened, load = [], darkroom.load_model
    monkeypatch.setattr(darkroom, "load_model", lambda path: opened.append(path) or load(path))
    e = Explorer({}, {"a": picture()}, runs=runs, side=64)
    assert list(trained_models(runs)) == ["denoise/supervised-0"] and trained_models(None) == trained_models(runs / "no") == {}
    assert e.names[0] == "denoise/supervised-0" and e.shown == ["denoise/supervised-0"] and not opened
    for setting in ("GaussianNoise", "JPEG"):
        assert not e.choose(setting=setting).panels()[2].message
    assert len(opened) == 1


def test_a_damaged_model_file_is_a_message(runs):
    file = next(iter(trained_models(runs).values()))
    file.write_bytes(file.read_bytes()[:200])
    p = Explorer({}, {"a": picture()}, runs=runs, side=64).panels()[2]
    assert "model.safetensors" in p.message and "damaged" in p.message


def test_a_network_is_used_in_eval_mode_and_given_back_as_it_was(explorer):
    net = torch.nn.Sequential(torch.nn.Dropout(0.5)).train()
    e = Explorer({"drop": net}, {"a": picture()}, side=64)
    assert torch.equal(e.restored("drop"), e.degraded()) and net.training
    assert e.restored("drop") is e.restored("drop")
    e.forget()
    assert e.panels()[2].psnr == e.panels()[1].psnr


def test_super_resolution_and_raw_have_their_own_rows(explorer):
    assert explorer.choose(task="sr4").names == ["copy", "blur"]
    assert "returned shape" in explorer.choose(picture="b", shown=["copy"]).panels()[2].message   # a denoiser does not enlarge
    assert explorer.choose(task="jdd").names[2:] == ["bilinear", "malvar"]
    assert not explorer.choose(shown=["malvar"]).panels()[2].message


# ------------------------------------------------------------------ figure

def test_figure_with_its_text(explorer):
    shown = explorer_figure(explorer.choose(picture="b", task="denoise", setting="sigma_20", shown=["blur", "none"]))
    text = shown._repr_html_()
    assert text.startswith('<img alt="Columns of pictures of b, denoise, sigma_20 (seen).') and "blur: " in shown.alt and "no restorer" in shown.alt
    assert any(ax.get_ylabel() == "|error| (1/255)" for ax in shown.figure.axes)
    assert 'alt="a &lt;b&gt; &quot;c&quot;"' in described(shown.figure, 'a <b>  "c"')._repr_html_()
    with pytest.raises(ExplorerError, match="alternative text"):
        described(shown.figure, "")


# ------------------------------------------------------------------ map

def test_every_cell_of_the_committed_map_opens():
    table = result_map(RESULTS, n=100)
    e = Explorer({"copy": identity}, results=RESULTS.parent, side=256)
    for (strategy, setting), cell in table.cells.items():
        text = open_cell(e, table, strategy, setting)
        assert f"{strategy}, {setting} ({'seen' if cell['seen'] else 'unseen'}): {cell['value']:.2f} dB" in text
        assert (e.task, e.setting, e.seen) == (table.task, setting, cell["seen"]) and e.picture in photograph_files()
        stored = (RESULTS / "restored" / f"denoise_{e.picture}_{setting}_{strategy}.png").is_file()
        assert ("make it with dvc repro" in text) == (strategy not in ("degraded", "non_local_means", "wavelet") and not stored)
        assert e.shown == ([] if "dvc repro" in text or strategy == "degraded" else [f"{strategy} (stored picture)" if stored else strategy])


def test_stored_pictures_stand_in_for_a_model_that_is_not_here():
    table, e = result_map(RESULTS, n=10), Explorer({})
    kept = next(iter(sorted((RESULTS / "restored").glob("denoise_*_sigma_50_dil_sf.png"))))
    image = kept.name.split("_")[1]
    assert f"or open {image}" in open_cell(e, table, "dil_sf", "sigma_50", next(r["image"] for r in table.rows if r["image"] not in str(sorted((RESULTS / "restored").glob("*")))))
    open_cell(e, table, "dil_sf", "sigma_50", image)
    p = e.panels()[2]
    own = [r["value"] for r in table.rows if (r["strategy"], r["setting"], r["image"], r["seed"]) == ("dil_sf", "sigma_50", image, 0)]
    assert p.name == "dil_sf (stored picture)" and p.psnr == pytest.approx(own[0], abs=0.01)
    e.move("sigma", 30)
    assert "run dvc repro for the model itself" in e.panels()[2].message


def test_a_trained_model_stands_behind_its_cell(runs):
    e = Explorer({}, runs=runs, results=RESULTS, side=64)
    assert "dvc repro" not in open_cell(e, result_map(RESULTS, n=10), "supervised", "sigma_20") and e.shown == ["denoise/supervised-0"]


def test_the_picture_of_a_cell(tmp_path):
    gain = {"a": 1.0, "b": -2.0, "c": 0.25}
    rows = [{"image": i, "task": "denoise", "setting": "sigma_5", "seen": True, "strategy": s, "seed": 0, "metric": "psnr", "value": 30 + (gain[i] if s == "mine" else 0)}
            for s in ("supervised", "mine") for i in gain]
    write_table(tmp_path / "x" / "table.csv", rows)
    table = result_map(tmp_path / "x")
    assert [table.picture("mine", "sigma_5", w) for w in ("median", "best", "worst", "a")] == ["c", "a", "b", "a"]
    for wrong in (("mine", "sigma_6", "best"), ("mine", "sigma_5", "nicest")):
        with pytest.raises(ExplorerError):
            table.picture(*wrong)
    assert "the picture c is not here" in open_cell(Explorer({"mine": identity}, {"z": picture()}), table, "mine", "sigma_5")
    (tmp_path / "x" / "params.yaml").write_text("evaluation: {reference: mine}")
    assert result_map(tmp_path / "x").reference == "mine" and list(experiments(tmp_path)) == ["x"]
    (tmp_path / "x" / "params.yaml").write_text("evaluation: {reference: {denoise: mine, camera: other}}")   # one per task
    assert result_map(tmp_path / "x").reference == "mine"
    (tmp_path / "x" / "params.yaml").unlink()
    write_table(tmp_path / "x" / "table.csv", [r | {"strategy": "degraded", "seed": "-"} for r in rows[:3]] + [r | {"strategy": "first"} for r in rows[:3]])
    assert result_map(tmp_path / "x").reference == "first"   # no `supervised`: the first trained one
    with pytest.raises(ExplorerError, match="task 'deblur'.*denoise"):
        result_map(tmp_path / "x", "deblur")
    with pytest.raises(ExplorerError, match="/nothing: .*dvc repro"):
        experiments(tmp_path / "nothing")


@pytest.mark.parametrize("name", sorted(p.parent.name for p in (ROOT / "results").glob("*/*.csv") if p.name in ("table.csv", "psnr-0.csv")))
def test_committed_experiments_have_maps(name):
    pytest.importorskip("ipywidgets")
    table = result_map(ROOT / "results" / name, n=2)
    assert table.reference in table.strategies and table.settings and map_buttons(table, print).children


# ------------------------------------------------------------------ widgets

def widgets_of(box):
    yield box
    for child in getattr(box, "children", ()):
        yield from widgets_of(child)


@pytest.fixture
def view(explorer):
    pytest.importorskip("ipywidgets")
    view = explore(explorer)
    yield view
    view.close()


def pngs(view):
    return [[image.value for image in column.images.values()] for column in view.desk.shown()]


def test_a_slider_changes_what_depends_on_it(view):
    view.look.shown.value = ("blur",)
    before = pngs(view)
    view.degradation.sliders["sigma"].value = 60
    after = pngs(view)
    assert before[0][:2] == after[0][:2] and before[0][2] != after[0][2]   # the truth stays, its residual does not
    assert all(a != b for a, b in zip(before[2], after[2])) and view.explorer.values == {"sigma": 60}
    view.look.zoom["x"].value = view.look.zoom["x"].value + (1 if view.look.zoom["x"].value < view.look.zoom["x"].max else -1)
    moved = pngs(view)
    assert moved[2][:2] != after[2][:2] and moved[2][2:] == after[2][2:] and "dB" in view.desk.shown()[2].head.value


def test_everything_has_a_label_and_a_title(view):
    import ipywidgets as w
    view.explorer.results = RESULTS
    view.map.open.value = True
    assert not view.desk.note.value
    controls = [x for x in widgets_of(view.box) if isinstance(x, (w.ValueWidget, w.Button)) and not isinstance(x, (w.HTML, w.Image))]
    assert len(controls) > 80
    assert all(x.description for x in controls if not isinstance(x, w.Button)) and all(x.description and x.tooltip for x in controls if isinstance(x, w.Button))
    assert all(x.tooltip for x in controls)
    images = [x for x in widgets_of(view.box) if isinstance(x, w.Image)]
    assert {x.tooltip for x in images} == {f"{row}: {name}" for row in ("picture", "zoom", "residual", "|error|") for name in ("clean", "degraded", "copy")}


def test_changing_task_picture_and_restorers(view):
    view.degradation.task.value = "sr4"
    assert view.degradation.setting.options[-1] == ("blur_2_bicubic (unseen)", "blur_2_bicubic") and set(view.degradation.sliders) == {"scale"} and view.look.shown.value == ("copy",)
    assert "returned shape" in view.desk.shown()[2].head.value and view.desk.shown()[2].body.layout.display == "none"   # a denoiser does not enlarge
    view.degradation.setting.value = "bicubic_jpeg_40"
    assert set(view.degradation.sliders) == {"1.scale", "2.quality", "2.subsampling"}
    view.degradation.sliders["1.scale"].value = 2
    assert view.explorer.degraded().shape == (3, 20, 24) and not view.desk.note.value
    view.degradation.task.value, view.picture.picture.value = "", "b"
    view.look.shown.value = ("copy", "blur", "wavelet")
    assert len(view.desk.columns.children) == 5 and view.look.zoom["side"].max == 64
    view.look.shown.value = ()
    assert len(view.desk.columns.children) == 2


def test_bad_input_is_a_sentence_in_the_widget(view, tmp_path, explorer):
    def said(*words):
        assert 'role="alert"' in view.desk.note.value and all(word in view.desk.note.value for word in words), view.desk.note.value
    view.picture.path.value = str(tmp_path / "nowhere.png")
    said("nowhere.png", "no such file")
    assert len(view.desk.columns.children) == 3   # the state before
    (tmp_path / "bad.png").write_bytes(b"bad")
    view.picture.path.value = str(tmp_path / "bad.png")
    said("bad.png")
    write_image(tmp_path / "tiny.png", picture(5, 9))
    view.picture.path.value = str(tmp_path / "tiny.png")
    said("tiny.png", "9 x 5")
    view.picture.upload.value = ({"name": "notes.txt", "type": "text/plain", "size": 2, "content": memoryview(b"hi"), "last_modified": datetime.now(timezone.utc)},)
    said("notes.txt")
    view.map.open.value = True
    said("results=")
    explorer.results = tmp_path
    view.map.open.value = False
    view.map.open.value = True
    said("dvc repro")
    explorer.pictures["gone"] = tmp_path / "gone.png"
    view.desk.sync()
    view.picture.picture.value = "gone"
    said("gone.png")
    assert not view.desk.columns.children   # nothing stale beside the message
    view.picture.picture.value = "a"
    assert not view.desk.note.value and len(view.desk.columns.children) == 3


def test_own_pictures_by_upload_and_path(view, tmp_path):
    upload = {"name": "cat.png", "type": "image/png", "size": 1, "content": memoryview(png_bytes(to_pixels(picture(30, 31, 5)))), "last_modified": datetime.now(timezone.utc)}
    view.picture.upload.value = (upload,)
    assert view.picture.picture.value == "cat.png" and view.explorer.clean().shape == (3, 30, 31)
    view.picture.upload.value = ({**upload, "size": 2},)
    assert view.picture.picture.value == "cat.png (2)"
    write_image(tmp_path / "d" / "p.png", picture())
    write_image(tmp_path / "d" / "q.png", picture())
    view.picture.path.value = str(tmp_path / "d")
    assert view.picture.picture.value == "p.png" and "q.png" in view.picture.picture.options and "2 pictures" in view.desk.note.value


def test_a_cell_of_the_map_opens_in_the_widget(tmp_path):
    pytest.importorskip("ipywidgets")
    view = explore({"copy": identity}, results=ROOT / "results", side=64)
    view.map.open.value = True
    assert view.map.experiment.value == "default" and not view.desk.note.value
    button = next(x for x in widgets_of(view.map.box) if (x.tooltip or "").startswith("wavelet, sigma_50") and hasattr(x, "click"))
    button.click()
    assert (view.degradation.task.value, view.degradation.setting.value, view.look.shown.value) == ("denoise", "sigma_50", ("wavelet",)) and "wavelet, sigma_50 (unseen)" in view.desk.note.value
    view.close()


# ------------------------------------------------------------------ curves

def write_run(folder, **series):
    metrics = folder / "live" / "plots" / "metrics"
    for name, values in series.items():
        (metrics / name).parent.mkdir(parents=True, exist_ok=True)
        (metrics / f"{name}.tsv").write_text(f"step\t{name.split('/')[-1]}\n" + "".join(f"{s}\t{v}\n" for s, v in values.items()))
    return metrics


def test_curves_of_dvclive_while_it_writes(tmp_path):
    Live = pytest.importorskip("dvclive").Live
    with Live(dir=str(tmp_path / "denoise" / "dil-1" / "live"), save_dvc_exp=False, dvcyaml=None, report=None) as live:
        for step in (10, 20, 30):
            live.step = step
            live.log_metric("task_loss", 1 / step)
            live.log_metric("probe/cosine", step / 100)
            assert read_curves(tmp_path)[-1] == {"run": "denoise/dil-1", "strategy": "dil", "step": step, "task_loss": pytest.approx(1 / step), "probe/cosine": step / 100}
    assert quantities(read_curves(tmp_path)) == {"loss terms": ["task_loss"], "probes": ["probe/cosine"]}


def test_half_a_line_is_never_a_wrong_point(tmp_path):
    metrics = write_run(tmp_path / "s-0", task_loss={10: 0.512345, 200: 1e-05, 30: 12.75})
    file = metrics / "task_loss.tsv"
    text, whole = file.read_bytes(), {10: 0.512345, 200: 1e-05, 30: 12.75}
    write_run(tmp_path / "s-0", other={5: 1.0})
    for k in range(len(text) + 1):
        file.write_bytes(text[:k])
        found = {r["step"]: r["task_loss"] for r in read_curves(tmp_path) if "task_loss" in r}
        assert found.items() <= whole.items() and (k < len(text) or found == whole)
    for damaged in (b"", b"\n", b"\xff\xfe\x00", b"step\n1\n", b"a\tb\n1\t2\n", b"step\ttask_loss\nx\ty\n1\n\n2\t3\t4\n7\t0.5\n"):
        file.write_bytes(damaged)
        assert [(r["step"], r["task_loss"]) for r in read_curves(tmp_path) if "task_loss" in r] == ([(7, 0.5)] if b"7\t" in damaged else [])


def test_a_resumed_run_counts_its_last_word(tmp_path):
    metrics = write_run(tmp_path / "s-0", task_loss={10: 1.0, 20: 2.0})
    with open(metrics / "task_loss.tsv", "a") as f:
        f.write("20\t0.5\n30\t0.25\n")
    assert [(r["step"], r["task_loss"]) for r in read_curves(tmp_path)] == [(10, 1.0), (20, 0.5), (30, 0.25)]


def test_names_of_runs_and_strategies(tmp_path):
    write_run(tmp_path / "denoise" / "dil_ps-12", task_loss={1: 1.0})
    write_run(tmp_path / "mine", task_loss={1: 1.0})
    assert [(r["run"], r["strategy"]) for r in read_curves(tmp_path)] == [("denoise/dil_ps-12", "dil_ps"), ("mine", "mine")]
    assert [(r["run"], r["strategy"]) for r in read_curves(tmp_path / "denoise" / "dil_ps-12")] == [("dil_ps-12", "dil_ps")]
    for empty in (tmp_path / "no", tmp_path / "denoise" / "dil_ps-12" / "live" / "plots" / "none"):
        with pytest.raises(ExplorerError, match="no training curves"):
            read_curves(empty)


def test_an_evaluated_run_ends_with_its_test(tmp_path):
    write_run(tmp_path / "s-0", psnr_seen={10: 30.0, 20: 31.0})
    row = {"image": "a", "task": "denoise", "strategy": "s", "seed": 0, "metric": "psnr"}
    write_table(tmp_path / "s-0" / "table.csv", [row | {"setting": f"sigma_{s}", "seen": s < 30, "value": v} for s, v in ((5, 36.0), (20, 30.0), (50, 24.0))])
    rows = read_curves(tmp_path)
    assert rows[-1]["psnr_test_seen"] == 33.0 and rows[-1]["psnr_test_unseen"] == 24.0 and "psnr_test_seen" not in rows[0]
    assert quantities(rows)["PSNR"] == ["psnr_seen", "psnr_test_seen", "psnr_test_unseen"] and "psnr test unseen 24" in curves_text(rows)


def test_curves_of_the_committed_results():
    rows = read_curves(RESULTS)
    assert {r["strategy"] for r in rows} >= {"supervised", "dil_sf"} and set(quantities(rows)) == {"PSNR", "loss terms", "probes", "optimiser"}
    figure = curves_figure(rows, ["task_loss", "psnr_seen", "cos_erm", "lr"])
    used = [ax for ax in figure.axes if ax.has_data()]
    assert [ax.get_ylabel() for ax in used] == ["task loss", "psnr seen (dB)", "cos erm", "lr"] and all(ax.get_xlabel() == "step" for ax in used)
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in used[0].lines}
    assert len(looks) == len(used[0].lines) == len({r["run"] for r in rows if r.get("task_loss") is not None})   # no two runs look the same
    with pytest.raises(ExplorerError, match="'x'.*task_loss"):
        curves_figure(rows, ["x"])


def watchers():
    return [t for t in threading.enumerate() if t.name == "irnb-watch"]


def test_the_watch_follows_a_run_and_stops_cleanly(tmp_path):
    pytest.importorskip("ipywidgets")
    view = watch(tmp_path, every=0.05)
    assert 'role="alert"' in view.status.value and "no training curves" in view.status.value and not watchers()
    view.timer.value = True
    view.start()
    assert len(watchers()) == 1

    def until(text):
        deadline = time.monotonic() + 20
        while text not in view.status.value:
            assert time.monotonic() < deadline, view.status.value
            time.sleep(0.01)
    metrics = write_run(tmp_path / "s-0", task_loss={10: 1.0}, cosine={10: 0.5})
    until("step 10")
    first = view.image.value
    with open(metrics / "task_loss.tsv", "a") as f:
        f.write("20\t0.5\n30\t0.2")
        f.flush()
    until("step 20")
    assert view.image.value != first and "training curves: s-0: step 20" in view.image.tooltip
    shutil.rmtree(tmp_path / "s-0")   # as DVC does before it runs a stage again
    until("no training curves")
    view.timer.value = False
    assert not watchers()   # at once: by itself it would end after 120 looks
    view.stop()
    view.close()


def test_the_watch_ends_by_itself_without_news(tmp_path):
    pytest.importorskip("ipywidgets")
    write_run(tmp_path / "s-0", task_loss={10: 1.0})
    view = TrainingView(tmp_path, every=0.01, patience=3)
    view.start()
    deadline = time.monotonic() + 20
    while watchers():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert view.timer.value is False
    view.start()   # and can be started again
    view.close()
    assert not watchers()
    with pytest.raises(ExplorerError, match="every.* 0"):
        watch(tmp_path, every=0)


def test_the_watch_reads_only_what_has_changed_and_shows_groups(tmp_path):
    pytest.importorskip("ipywidgets")
    write_run(tmp_path / "s-0", task_loss={10: 1.0}, cosine={10: 0.5})
    view = watch(tmp_path)
    assert not view.refresh() and view.refresh(force=True)
    assert view.group.options == ("PSNR and loss", "loss terms", "probes")
    before = view.image.value
    view.group.value = "probes"
    assert view.image.value != before
    view.button.click()
    view.close()


def test_the_chosen_group_stays_when_a_new_one_comes(tmp_path):
    pytest.importorskip("ipywidgets")
    write_run(tmp_path / "s-0", task_loss={10: 1.0}, cosine={10: 0.5})
    view = watch(tmp_path)
    view.group.value = "probes"
    write_run(tmp_path / "s-0", psnr_seen={10: 30.0})
    assert view.refresh() and view.group.options == ("PSNR and loss", "PSNR", "loss terms", "probes") and view.group.value == "probes"
    shutil.rmtree(tmp_path / "s-0")
    write_run(tmp_path / "s-0", task_loss={10: 1.0})
    assert view.refresh() and view.group.value == "PSNR and loss"
    view.close()


# ------------------------------------------------------------------ style

def test_the_style_of_figures():
    import matplotlib
    import matplotlib.style
    with matplotlib.style.context("irnb.irnb"):
        cycle = list(matplotlib.rcParams["axes.prop_cycle"])
        assert matplotlib.rcParams["image.cmap"] == "cividis" and matplotlib.rcParams["font.size"] >= 9
    assert tuple(f"#{c['color'].lstrip('#')}".upper() for c in cycle) == tuple(c.upper() for c in PALETTE)
    assert len({(str(c["linestyle"]), c["marker"]) for c in cycle}) == len({c["marker"] for c in cycle}) == 8   # told apart in grey


@pytest.mark.parametrize("matrix", [[[.152286, 1.052583, -.204868], [.114503, .786281, .099216], [-.003882, -.048116, 1.051998]],     # protanopia
                                    [[.367322, .860646, -.227968], [.280085, .672501, .047413], [-.011820, .042940, .968881]]])   # deuteranopia (Machado et al., 2009)
def test_colours_are_told_apart_without_red_or_green(matrix):
    from skimage.color import rgb2lab
    rgb = np.array([[int(c[k:k + 2], 16) / 255 for k in (1, 3, 5)] for c in PALETTE])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ np.array(matrix).T
    seen = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.clip(linear, 0, None) ** (1 / 2.4) - 0.055).clip(0, 1)
    lab = rgb2lab(seen[None])[0]
    distance = np.linalg.norm(lab[:, None] - lab, axis=-1) + 100 * np.eye(len(lab))
    assert distance.min() > 8, distance.round()
