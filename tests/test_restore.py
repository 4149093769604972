"""irnb.restore: kinds of pictures and networks, originals safe, one failure does not cost the others, exit codes."""
import errno, os, pickle, re, subprocess, sys

import numpy as np
import pytest
import skimage.data
import torch
from torch import nn

import irnb.images as images
from irnb.image_files import printable, read_array, write_array
from irnb.images import pad_to_multiple, rgb_to_gray
from irnb.networks import build, load_model, save_model
from irnb.restore import RestoreError, main, restore_files
from tests.notebooks import ROOT

TINY = {"network": {"name": "NAFNet", "options": {"preset": "tiny", "width": 8}}}
GREY = {"network": {"name": "NAFNet", "options": {"preset": "tiny", "width": 8, "img_channel": 1}}}


class Enlarge(nn.Module):
    "Twice as large; found by its dotted path."
    multiple = 1

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x): return nn.functional.interpolate(x + 0.1 * self.conv(x), scale_factor=2)


class Packed(Enlarge):
    "Takes four channels, as a network for raw mosaics does."
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x): return self.conv(x)


def saved(path, spec, infect=None):
    "A model file with weights that use every path."
    torch.manual_seed(0)
    net = build(spec["network"]["name"], **spec["network"].get("options", {})).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith(("beta", "gamma")):
                p.copy_(0.3 * torch.randn_like(p))
    if infect is not None:
        infect(net)
    save_model(path, net, spec)
    return net


@pytest.fixture
def model(tmp_path):
    saved(tmp_path / "model.safetensors", TINY)
    return tmp_path / "model.safetensors"


PHOTO = skimage.data.chelsea()[40:137, 60:191]
RGB16 = (PHOTO.astype(np.uint16) * 257) ^ np.random.default_rng(0).integers(0, 256, PHOTO.shape, dtype=np.uint16)
ALPHA = np.random.default_rng(1).integers(0, 256, (*PHOTO.shape[:2], 1), dtype=np.uint8)


def expected(net, array):
    "The untiled result, the obvious way."
    peak, colours = np.iinfo(array.dtype).max, array.shape[2] - (array.shape[2] in (2, 4))
    x = torch.from_numpy(array[..., :colours].astype(np.float32) / peak).permute(2, 0, 1)[None]
    height, width = x.shape[-2:]
    x = pad_to_multiple(x, getattr(net, "multiple", 1))
    with torch.no_grad():
        if net.img_channel == 3:
            y = net(x.expand(-1, 3, -1, -1))
            y = rgb_to_gray(y) if colours == 1 else y
        else:
            y = torch.cat([net(c[None]) for c in x.split(1, 1)[0:colours] for c in [c[0]]], 1)
    return (y[0, :, :height, :width].clamp(0, 1) * peak).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("spec", [TINY, GREY], ids=["rgb net", "grey net"])
@pytest.mark.parametrize("kind", ["L", "LA", "RGB", "RGBA", "L16", "LA16", "RGB16", "RGBA16"])
@pytest.mark.parametrize("tile", [64, 512])
def test_every_kind_through_every_net(tmp_path, spec, kind, tile):
    net = saved(tmp_path / "m", spec)
    colour, alpha = (RGB16, ALPHA.astype(np.uint16) * 251) if "16" in kind else (PHOTO, ALPHA)
    array = np.concatenate([colour[..., : 3 if "RGB" in kind else 1]] + [alpha] * ("A" in kind), 2)
    write_array(tmp_path / "a.png", array, icc=b"profile")
    (result,) = restore_files([tmp_path / "a.png"], tmp_path / "out", tmp_path / "m", tile=tile, progress=False)
    assert result.error is None and result.target == tmp_path / "out" / "a.png"
    back, icc = read_array(result.target)
    assert back.dtype == array.dtype and back.shape == array.shape and icc == b"profile"
    if "A" in kind:
        np.testing.assert_array_equal(back[..., -1:], alpha)
    want = expected(net, array)
    got = back[..., : want.shape[2]].astype(np.float64)
    assert np.abs(want - array[..., : want.shape[2]]).mean() > (250 if "16" in kind else 1)  # the net does something
    assert np.abs(got - want).max() < (8 if "16" in kind else 0.51)


@pytest.mark.parametrize("name", ["a.jpg", "a.tif", "a.bmp", "a.webp", "B.JPEG"])
def test_formats_are_kept(tmp_path, model, name):
    write_array(tmp_path / name, PHOTO)
    (result,) = restore_files([tmp_path / name], tmp_path / "out", model, progress=False)
    assert result.error is None and os.listdir(tmp_path / "out") == [name]
    assert (tmp_path / "out" / name).read_bytes()[:4] == (tmp_path / name).read_bytes()[:4]


def test_sizes_from_one_pixel_up(tmp_path, model):
    for h, w in ((1, 1), (1, 90), (90, 1), (33, 131)):
        write_array(tmp_path / f"{h}x{w}.png", PHOTO[:h, :w])
    results = restore_files(sorted(tmp_path.glob("*.png")), tmp_path / "out", model, tile=64, progress=False)
    assert not any(r.error for r in results)
    assert read_array(tmp_path / "out/33x131.png")[0].shape == (33, 131, 3)


def test_enlarging_networks(tmp_path):
    spec = {"network": {"name": "tests.test_restore.Enlarge"}}
    saved(tmp_path / "m", spec)
    net, _ = load_model(tmp_path / "m", trust=True)
    write_array(tmp_path / "a.png", np.concatenate([PHOTO, ALPHA], 2))
    (result,) = restore_files([tmp_path / "a.png"], tmp_path / "out", tmp_path / "m", tile=64, trust=True, progress=False)
    assert result.error is None
    back, _ = read_array(result.target)
    with torch.no_grad():
        want = net(torch.from_numpy(PHOTO.copy()).permute(2, 0, 1)[None].float() / 255)[0].clamp(0, 1) * 255
    assert np.abs(back[..., :3] - want.permute(1, 2, 0).numpy()).max() < 0.51
    np.testing.assert_array_equal(back[::2, 1::2, 3:], ALPHA)


def test_folders_keep_their_structure_and_results_are_not_inputs(tmp_path, model):
    for name in ("in/a.png", "in/d/b.png", "in/d/e/c.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_array(tmp_path / name, PHOTO[:40, :40])
    (tmp_path / "in/notes.txt").write_text("x")
    for _ in range(2):  # the second time, in/out holds the results of the first
        results = restore_files([tmp_path / "in"], tmp_path / "in/out", model, overwrite=True, progress=False)
        targets = [str(r.target.relative_to(tmp_path)) for r in results]
        assert targets == ["in/out/a.png", "in/out/d/b.png", "in/out/d/e/c.jpg"]
        assert not any(r.error for r in results)


# ---- originals -------------------------------------------------------------------------------------------------------

def snapshot(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("how", ["same folder", "dots", "symlink to folder", "symlink as target", "hardlink as target"])
def test_an_input_is_never_overwritten(tmp_path, model, how):
    (tmp_path / "in").mkdir()
    write_array(tmp_path / "in/a.png", PHOTO[:40, :40])
    out = {"same folder": "in", "dots": "in/../in", "symlink to folder": "link"}.get(how, "out")
    if how == "symlink to folder":
        os.symlink(tmp_path / "in", tmp_path / "link")
    if out == "out":
        (tmp_path / "out").mkdir()
        (os.symlink if "symlink" in how else os.link)(tmp_path / "in/a.png", tmp_path / "out/a.png")
    before = snapshot(tmp_path)
    (result,) = restore_files([tmp_path / "in/a.png"], tmp_path / out, model, overwrite=True, progress=False)
    assert "inputs" in result.error and snapshot(tmp_path) == before
    if out == "in":  # the folder as input and as output
        results = restore_files([tmp_path / "in"], tmp_path / out, model, overwrite=True, progress=False)
        assert "inputs" in results[0].error and snapshot(tmp_path) == before


def test_another_input_is_not_overwritten_either(tmp_path, model):
    for name in ("a/x.png", "b/x.png"):
        (tmp_path / name).parent.mkdir()
        write_array(tmp_path / name, PHOTO[:40, :40])
    before = snapshot(tmp_path)
    with pytest.raises(RestoreError, match="a/x.png.*b/x.png"):
        restore_files([tmp_path / "a/x.png", tmp_path / "b/x.png"], tmp_path / "b", model, overwrite=True,
                      progress=False)
    assert snapshot(tmp_path) == before


def test_a_case_insensitive_disk(tmp_path, model, monkeypatch):
    "Simulated: on such a disk A.png and a.png are one file, as two names of one inode are here."
    for name in ("1/A.png", "2/a.png"):
        (tmp_path / name).parent.mkdir()
        write_array(tmp_path / name, PHOTO[:40, :40])
    import irnb.restore as restore
    real = restore._restore_file

    def fold(opened, job, *rest):
        real(opened, job, *rest)
        os.link(job.target, job.target.with_name("a.png")) if job.target.name == "A.png" else None
    monkeypatch.setattr(restore, "_restore_file", fold)
    first, second = restore_files([tmp_path / "1/A.png", tmp_path / "2/a.png"], tmp_path / "out", model, overwrite=True,
                                  progress=False)
    assert first.error is None and "was just written" in second.error


def test_existing_results_need_overwrite(tmp_path, model):
    write_array(tmp_path / "a.png", PHOTO[:40, :40])
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.png").write_bytes(b"precious")
    (result,) = restore_files([tmp_path / "a.png"], tmp_path / "out", model, progress=False)
    assert "--overwrite" in result.error and (tmp_path / "out/a.png").read_bytes() == b"precious"
    (result,) = restore_files([tmp_path / "a.png"], tmp_path / "out", model, overwrite=True, progress=False)
    assert result.error is None and read_array(tmp_path / "out/a.png")[0].shape == (40, 40, 3)


@pytest.mark.parametrize("where", ["sub", "sub/deeper"])
@pytest.mark.parametrize("leads", ["to a folder", "nowhere", "to itself", "back into the results"])
def test_results_do_not_leave_the_output_folder_through_a_link(tmp_path, model, where, leads):
    for name in ("in/sub/deeper/a.png", "foreign/a.png", "foreign/deeper/a.png", "out/mine/a.png", "out/mine/deeper/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_array(tmp_path / name, PHOTO[:40, :40] if name.startswith("in") else PHOTO[40:60, :20])
    write_array(tmp_path / "in/b.png", PHOTO[:40, :40])
    (tmp_path / "out" / where).parent.mkdir(exist_ok=True)
    to = {"to a folder": "foreign", "nowhere": "none", "to itself": f"out/{where}", "back into the results": "out/mine"}[leads]
    os.symlink(tmp_path / to, tmp_path / "out" / where)
    before = snapshot(tmp_path)
    first, second = restore_files([tmp_path / "in"], tmp_path / "out", model, overwrite=True, progress=False)
    assert first.error is None and str(tmp_path / "out/sub/deeper/a.png") in second.error and "link" in second.error
    (tmp_path / "out/b.png").unlink()
    assert snapshot(tmp_path) == before and not (tmp_path / "none").exists()


def test_a_link_in_place_of_a_result_is_replaced_not_followed(tmp_path, model):
    write_array(tmp_path / "a.png", PHOTO[:40, :40])
    (tmp_path / "foreign.png").write_bytes(b"foreign")
    (tmp_path / "out").mkdir()
    os.symlink(tmp_path / "foreign.png", tmp_path / "out/a.png")
    for how in ({}, dict(skip_existing=True)):      # a link is not what an earlier run left
        (result,) = restore_files([tmp_path / "a.png"], tmp_path / "out", model, progress=False, **how)
        assert "exists already" in result.error
    (result,) = restore_files([tmp_path / "a.png"], tmp_path / "out", model, progress=False, overwrite=True)
    assert result.error is None and (tmp_path / "foreign.png").read_bytes() == b"foreign"


def test_links_that_point_at_each_other_do_not_stop_the_run(tmp_path, model, capsys):
    (tmp_path / "in/sub").mkdir(parents=True)
    for one, other in (("a.png", "b.png"), ("b.png", "a.png"), ("self.png", "self.png"), ("sub/up", "..")):
        os.symlink(other, tmp_path / "in" / one)
    write_array(tmp_path / "in/sub/z.png", PHOTO[:40, :40])
    code = main([str(tmp_path / "in"), str(tmp_path / "in/self.png"), "-o", str(tmp_path / "out"), "--model", str(model)])
    said = capsys.readouterr()
    assert code == 1 and "restored 1 of 4 pictures" in said.out and len(said.err.splitlines()) == 3
    assert all(any(name in line for line in said.err.splitlines()) for name in ("a.png", "b.png", "self.png"))
    os.symlink("round", tmp_path / "round")
    with pytest.raises(RestoreError, match="/round: .*link"):
        restore_files([tmp_path / "in"], tmp_path / "round", model, progress=False)


def test_an_interrupted_folder_goes_on(tmp_path, model, monkeypatch, capsys):
    for name in "abc":
        write_array(tmp_path / f"{name}.png", PHOTO[:40, :40])
    import irnb.restore as restore
    real, arguments = restore._restore_file, [str(tmp_path), "-o", str(tmp_path / "out"), "--model", str(model)]

    def stop(opened, job, *rest):
        if job.source.name == "c.png":
            raise KeyboardInterrupt
        real(opened, job, *rest)
    monkeypatch.setattr(restore, "_restore_file", stop)
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    monkeypatch.setattr(restore, "_restore_file", real)
    before = snapshot(tmp_path)
    capsys.readouterr()
    assert main([*arguments, "--skip-existing"]) == 0
    assert "restored 1 of 3 pictures" in (said := capsys.readouterr()).out and "already there: 2" in said.out and not said.err
    after = snapshot(tmp_path)
    assert after.pop(tmp_path / "out/c.png") == before[tmp_path / "out/a.png"] and after == before
    results = restore_files([tmp_path], tmp_path / "out", model, skip_existing=True, progress=False)
    assert [(r.error, r.skipped) for r in results] == [(None, True)] * 3
    assert main([*arguments, "--skip-existing"]) == 0 and "restored 0 of 3 pictures" in capsys.readouterr().out


def test_skipping_keeps_to_what_is_finished_and_is_no_input(tmp_path, model):
    write_array(tmp_path / "a.png", PHOTO[:40, :40])
    (result,) = restore_files([tmp_path / "a.png"], tmp_path, model, skip_existing=True, progress=False)
    assert "inputs" in result.error and not result.skipped
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.png").touch()
    (result,) = restore_files([tmp_path / "a.png"], tmp_path / "out", model, skip_existing=True, progress=False)
    assert "exists already" in result.error and not result.skipped
    with pytest.raises(RestoreError, match="overwrite.*skip_existing"):
        restore_files([tmp_path / "a.png"], tmp_path / "out", model, skip_existing=True, overwrite=True, progress=False)


def test_the_same_picture_twice_is_restored_once(tmp_path, model):
    write_array(tmp_path / "a.png", PHOTO[:40, :40])
    assert len(restore_files([tmp_path, tmp_path / "a.png"], tmp_path / "out", model, progress=False)) == 1


# ---- failures of one file --------------------------------------------------------------------------------------------

def test_one_failure_does_not_cost_the_others(tmp_path, model, capsys):
    for name in ("a.png", "z.png"):
        write_array(tmp_path / name, PHOTO[:40, :40])
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:500])
    (tmp_path / "c.png").write_bytes(b"")
    (tmp_path / "d.png").write_text("text")
    write_array(tmp_path / "rgba.png", np.concatenate([PHOTO, ALPHA], 2)[:40, :40])
    os.rename(tmp_path / "rgba.png", tmp_path / "e.jpg")  # a PNG with alpha named .jpg
    (tmp_path / "empty").mkdir()
    names = ["a.png", "b.png", "c.png", "d.png", "e.jpg", "missing.png", "empty", "z.png"]
    before = snapshot(tmp_path)
    code = main([str(tmp_path / n) for n in names] + ["-o", str(tmp_path / "out"), "--model", str(model)])
    said = capsys.readouterr()
    assert code == 1 and sorted(os.listdir(tmp_path / "out")) == ["a.png", "z.png"] and "restored 2 of 8" in said.out
    for name, words in [("b.png", "truncated"), ("c.png", "zero bytes"), ("d.png", "not a readable"),
                        ("e.jpg", "alpha"),
                        ("missing.png", "no such file"), ("empty", "no pictures")]:
        assert any(name in line and words in line and ";" in line for line in said.err.splitlines()), (name, said.err)
    assert {p: b for p, b in snapshot(tmp_path).items() if "out" not in p.parts} == before


def test_what_the_format_cannot_hold_is_refused_before_the_work(tmp_path, model, monkeypatch):
    write_array(tmp_path / "a.png", np.concatenate([PHOTO, ALPHA], 2))
    os.rename(tmp_path / "a.png", tmp_path / "a.jpg")
    monkeypatch.setattr(images, "tiled", lambda *_, **__: pytest.fail("the network ran"))
    (result,) = restore_files([tmp_path / "a.jpg"], tmp_path / "out", model, progress=False)
    assert "alpha" in result.error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk(tmp_path, model, monkeypatch, capsys, call):
    write_array(tmp_path / "a.png", PHOTO[:40, :40])
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.png").write_bytes(b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, call, full)
    code = main([str(tmp_path / "a.png"), "-o", str(tmp_path / "out"), "--model", str(model), "--overwrite"])
    assert code == 1 and "free space" in capsys.readouterr().err
    assert os.listdir(tmp_path / "out") == ["a.png"] and (tmp_path / "out/a.png").read_bytes() == b"old"


def test_a_full_disk_without_a_folder_names_the_picture(tmp_path, model, monkeypatch, capsys):
    write_array(tmp_path / "a.png", PHOTO[:40, :40])

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")
    monkeypatch.setattr(os, "mkdir", full)
    code = main([str(tmp_path / "a.png"), "-o", str(tmp_path / "out"), "--model", str(model)])
    (said,) = capsys.readouterr().err.splitlines()
    assert code == 1 and str(tmp_path / "out/a.png") in said and "No space left" in said and "free space" in said


def test_out_of_memory_names_the_remedy(tmp_path, model, monkeypatch):
    write_array(tmp_path / "a.png", PHOTO[:40, :40])

    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
    monkeypatch.setattr(images, "tiled", full)
    (result,) = restore_files([tmp_path / "a.png"], tmp_path / "out", model, progress=False)
    assert "a.png: " in result.error and "--tile" in result.error and not (tmp_path / "out").exists()


def test_a_network_that_returns_nan_writes_nothing(tmp_path, monkeypatch):
    saved(tmp_path / "m", TINY, lambda net: net.ending.bias.data.fill_(3e38))  # finite weights, infinite output
    write_array(tmp_path / "a.png", PHOTO[:40, :40])
    real = images.tiled
    monkeypatch.setattr(images, "tiled", lambda net, x, **k: real(net, x, **k) * 1e6)
    (result,) = restore_files([tmp_path / "a.png"], tmp_path / "out", tmp_path / "m", progress=False)
    assert "NaN" in result.error and not (tmp_path / "out").exists()


# ---- what concerns all: exit 2, nothing touched ----------------------------------------------------------------------

class Evil:
    def __reduce__(self):
        return os.system, ("touch owned",)


def bad_models(folder, model):
    whole = model.read_bytes()
    (folder / "truncated").write_bytes(whole[: len(whole) // 2])
    (folder / "empty").write_bytes(b"")
    (folder / "text").write_text("weights")
    (folder / "pickle").write_bytes(pickle.dumps(Evil()))
    torch.save({"params": {"intro.weight": torch.zeros(8, 3, 3, 3)}, "evil": Evil()}, folder / "evil.pth")
    torch.save({"params": {"conv_first.weight": torch.zeros(64, 3, 3, 3)}}, folder / "other.pth")
    saved(folder / "packed", {"network": {"name": "tests.test_restore.Packed"}})


@pytest.mark.parametrize("name", ["missing", "truncated", "empty", "text", "pickle", "evil.pth", "other.pth", "packed"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_unusable_models(tmp_path, model, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    bad_models(tmp_path, model)
    write_array(tmp_path / "a.png", PHOTO[:40, :40])
    before = snapshot(tmp_path)
    code = main([str(tmp_path / "a.png"), "-o", str(tmp_path / "out"), "--model", str(tmp_path / name), "--trust"])
    said = capsys.readouterr().err
    assert code == 2 and str(tmp_path / name) in said and ";" in said and "Traceback" not in said
    assert snapshot(tmp_path) == before and not (tmp_path / "out").exists() and not (tmp_path / "owned").exists()


@pytest.mark.parametrize("options, words", [
    (["--tile", "8"], "tile.*32.* 8"), (["--overlap", "300"], "overlap.*256.*300"),
    (["--overlap", "-1"], "overlap.*-1"),
    (["--device", "abacus"], "'abacus'.*--device cpu"), (["--device", "meta:9x"], "'meta:9x'.*--device cpu")])
def test_unusable_settings(tmp_path, model, capsys, options, words):
    write_array(tmp_path / "a.png", PHOTO[:40, :40])
    code = main([str(tmp_path / "a.png"), "-o", str(tmp_path / "out"), "--model", str(model), *options])
    assert code == 2 and re.search(words, capsys.readouterr().err) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("which", ["an input", "outdir", "model"])
def test_an_empty_name_is_not_the_current_folder(tmp_path, model, monkeypatch, capsys, which):
    monkeypatch.chdir(tmp_path)
    write_array(tmp_path / "a.png", PHOTO[:40, :40])
    before = snapshot(tmp_path)
    given = {"an input": "a.png", "outdir": "out", "model": str(model), which: ""}
    assert main([given["an input"], "-o", given["outdir"], "--model", given["model"]]) == 2
    said = capsys.readouterr()
    assert f"{which} is empty" in said.err and not said.out and snapshot(tmp_path) == before


# ---- names -----------------------------------------------------------------------------------------------------------

ODD = ["line\nbreak", "back\rwards", "esc\x1b[31mred", "bell\x07", "c1\x9b31m", os.fsdecode(b"latin-\xe9"), "tab\t"]


@pytest.mark.parametrize("odd", ODD, ids=ascii)
@pytest.mark.parametrize("fate", ["restored", "refused", "noted"])
def test_odd_names_are_restored_and_printed_as_escapes(tmp_path, model, capsys, odd, fate):
    (tmp_path / odd).mkdir()
    picture = tmp_path / odd / f"{odd}.png"
    write_array(picture, PHOTO if fate == "noted" else PHOTO[:40, :40])
    if fate == "refused":
        os.truncate(picture, 100)
    code = main([str(picture), "-o", str(tmp_path / f"out {odd}"), "--model", str(model),
                 *(["--tile", "64", "--overlap", "0"] if fate == "noted" else [])])
    said = capsys.readouterr()
    assert code == (fate == "refused") and (tmp_path / f"out {odd}" / picture.name).is_file() == (fate != "refused")
    assert all(c.isprintable() for text in said for c in text.replace("\n", ""))
    assert printable(tmp_path / f"out {odd}") in said.out and said.out.count("\n") == 1
    assert printable(picture) in said.err and "; " in said.err if fate != "restored" else not said.err
    assert said.err.count("\n") == (fate != "restored")


def test_a_terminal_that_cannot_show_a_name_does_not_fail_the_run(tmp_path, model):
    picture, out = tmp_path / "m\xfcde.png", tmp_path / os.fsdecode(b"\xff")
    write_array(picture, PHOTO[:40, :40])
    done = subprocess.run([sys.executable, "-m", "irnb.restore", picture, "-o", out, "--model", model], capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii:strict"})
    assert done.returncode == 0 and rb"\udcff" in done.stdout and done.stderr == b"" and (out / picture.name).is_file()


def test_an_output_folder_that_is_a_file_or_no_inputs(tmp_path, model):
    (tmp_path / "out").write_text("")
    with pytest.raises(RestoreError, match="/out: .*file"):
        restore_files([tmp_path], tmp_path / "out", model)
    with pytest.raises(RestoreError, match="no pictures"):
        restore_files([], tmp_path / "new", model)
    with pytest.raises(RestoreError, match="statistics"):
        restore_files([tmp_path], tmp_path / "new", model, statistics="none")


# ---- tiles -----------------------------------------------------------------------------------------------------------

def test_deep_networks_are_blended_with_a_note(tmp_path, capsys):
    deep = dict(width=4, enc_blk_nums=[1, 1, 1], middle_blk_num=4, dec_blk_nums=[1, 1, 1])
    saved(tmp_path / "m", {"network": {"name": "NAFNet", "options": deep}})
    write_array(tmp_path / "a.png", PHOTO)
    (result,) = restore_files([tmp_path / "a.png"], tmp_path / "out", tmp_path / "m", tile=64, progress=False)
    said = capsys.readouterr().err
    assert result.error is None and "not exact" in said
    assert int(said.split("--tile ")[1].split()[0]) > 64


def test_overlap_zero_and_statistics_of_tiles_still_work(tmp_path, model):
    write_array(tmp_path / "a.png", PHOTO)
    outs = []
    for i, how in enumerate((dict(), dict(overlap=0), dict(statistics="tile"))):
        (result,) = restore_files([tmp_path / "a.png"], tmp_path / f"out{i}", model, tile=64, progress=False, **how)
        assert result.error is None
        outs.append(read_array(result.target)[0].astype(int))
    assert np.abs(outs[0] - outs[1]).max() > 0 and np.abs(outs[0] - outs[2]).max() > 0


def test_memory_is_measured_and_tiles_agree(tmp_path):
    "The benchmark's own machinery: peak memory of a process of its own, small against large tiles at 16 bits."
    from tests.bench import restore as bench
    bench.make_model(tmp_path / "m")
    write_array(tmp_path / "p.png", np.tile(RGB16, (2, 2, 1)))
    for tile in (96, 144):
        found = bench.measure(tmp_path / "p.png", "-o", tmp_path / f"{tile}", "--model", tmp_path / "m", "--tile", tile)
        assert found["code"] == 0 and 0.1 < found["gib"] < 1.2
    a, b = (read_array(tmp_path / f"{tile}/p.png")[0].astype(int) for tile in (96, 144))
    assert np.abs(a - b).max() / 65535 < 1e-4


def test_importing_and_help_do_not_import_torch():
    code = ("import argparse, sys, irnb.restore as r; p = argparse.ArgumentParser(); "
            "r.add_arguments(p); p.format_help(); "
            "sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'PIL', 'tqdm', 'matplotlib')))")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    done = subprocess.run([sys.executable, "-m", "irnb.restore", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--model FILE" in done.stdout


def test_a_class_of_another_package_needs_trust(tmp_path):
    (tmp_path / "mine.py").write_text("import torch\nfrom torch import nn\nopen('it ran', 'w').close()\n\n\n"
                                      "class Half(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
                                      "        self.scale = nn.Parameter(torch.tensor(.5))\n    def forward(self, x): return self.scale * x\n")
    make = "import mine\nfrom irnb.networks import save_model\nsave_model('m', mine.Half(), {'network': {'name': 'mine.Half', 'options': {}}})\n"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    subprocess.run([sys.executable, "-c", make], cwd=tmp_path, env=environment, check=True)
    (tmp_path / "it ran").unlink()
    write_array(tmp_path / "a.png", PHOTO)
    command = [sys.executable, "-m", "irnb.restore", "a.png", "-o", "out", "--model", "m", "--device", "cpu"]
    refused = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2 and "--trust" in refused.stderr and not (tmp_path / "it ran").exists()
    done = subprocess.run([*command, "--trust"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.abs(read_array(tmp_path / "out" / "a.png")[0] - PHOTO / 2).max() <= 1
