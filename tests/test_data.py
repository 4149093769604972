"""irnb.data: photographs, corpora, splits, patches, batches, tasks and benchmarks; every bad input has a test."""
from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import warnings
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from irnb import data, degradations as deg
from irnb.images import dihedral, quantise


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("corpus") / "photographs"
    data.unpack_photographs(out)
    return out


@pytest.fixture(scope="module")
def corpus(photographs) -> data.Corpus:
    return data.scan(photographs)


@pytest.fixture(scope="module")
def patches(corpus, tmp_path_factory) -> data.PatchSet:
    return data.PatchSet.write(corpus.subset(["coffee", "grass", "page"]), tmp_path_factory.mktemp("patches") / "p",
                               size=48, stride=40)


def save(path: Path, seed: int = 0, size: tuple[int, ...] = (80, 90, 3)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)).save(path)
    return path


def fake(groups: list[int]) -> data.Corpus:
    "A corpus without files: picture i is in scene groups[i]."
    items = tuple(data.Item(f"i{i}", Path(f"i{i}.png"), 99, 99, 3, 8, f"hash{i}", f"g{g}") for i, g in enumerate(groups))
    return data.Corpus(Path("."), items)


def nothing_left(folder: Path) -> bool:
    return not [p for p in folder.iterdir() if p.name.endswith((".tmp", ".old"))]


@contextmanager
def small_disk(limit: int):
    "A disk that is full after `limit` bytes per file: the system refuses real writes."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ---------------------------------------------------------------- photographs

def test_photographs_are_the_wheels_bytes(photographs):
    import skimage.data as wheel

    assert np.array_equal(np.asarray(Image.open(photographs / "chelsea.png")), wheel.chelsea())
    provenance = json.loads((photographs / "provenance.json").read_text())
    assert provenance["package"] == "scikit-image" and len(provenance["files"]) == 17
    assert {p.name for p in photographs.iterdir()} == {f["file"] for f in provenance["files"]} | {"provenance.json"}
    assert np.isfinite(np.load(photographs / "motorcycle_disp.npz")["arr_0"]).any()


def test_hashes_agree_with_scikit_images_own_registry():
    from skimage.data import _registry

    for photo in (*data.PHOTOGRAPHS.values(), data.DISPARITY):
        assert _registry.registry[f"data/{photo.file}"] == photo.sha256


def test_unpacking_twice_gives_the_same_folder(photographs, tmp_path):
    first = {p.name: p.read_bytes() for p in photographs.iterdir()}
    for _ in range(2):
        data.unpack_photographs(tmp_path / "p")
    assert first == {p.name: p.read_bytes() for p in (tmp_path / "p").iterdir()}
    assert nothing_left(tmp_path)


def test_unpack_wrong_bytes(photographs, tmp_path):
    shutil.copytree(photographs, tmp_path / "wheel")
    with open(tmp_path / "wheel/coins.png", "ab") as file:
        file.write(b"\0")
    with pytest.raises(ValueError, match=rf"coins.png.*{data.PHOTOGRAPHS['coins'].sha256}.*pip install"):
        data.unpack_photographs(tmp_path / "out", source=tmp_path / "wheel")
    assert not (tmp_path / "out").exists() and nothing_left(tmp_path)


def test_unpack_missing_file_or_package(photographs, tmp_path, monkeypatch):
    shutil.copytree(photographs, tmp_path / "wheel")
    (tmp_path / "wheel/moon.png").unlink()
    with pytest.raises(FileNotFoundError, match="moon.png.*pip install"):
        data.unpack_photographs(tmp_path / "out", source=tmp_path / "wheel")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="scikit-image.*not installed"):
        data.unpack_photographs(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- folders that are complete or absent

def test_foreign_folder_is_not_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="/mine: .*provenance.json"):
        data.unpack_photographs(tmp_path / "mine")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="/file: .*not a folder"):
        data.unpack_photographs(tmp_path / "file")
    assert (tmp_path / "mine/thesis.tex").read_text() == "years of work" and (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("what", ["photographs", "patches", "benchmark"])
def test_disk_full_leaves_the_old_folder(what, corpus, tmp_path):
    small = corpus.subset(["coffee", "page"])
    make = {"photographs": lambda: data.unpack_photographs(tmp_path / "out"),
            "patches": lambda: data.PatchSet.write(small, tmp_path / "out", size=64),
            "benchmark": lambda: data.benchmark(small, "denoise", tmp_path / "out", crop=96)}[what]
    with small_disk(60_000), pytest.raises(OSError, match="/out: .*free some space"):
        make()
    assert not (tmp_path / "out").exists() and nothing_left(tmp_path)
    make()
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    with small_disk(60_000), pytest.raises(OSError) as error:
        make()
    assert error.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert before == {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} and nothing_left(tmp_path)


def test_interrupt_leaves_nothing(corpus, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr(data, "degrade_once", interrupt)
    with pytest.raises(KeyboardInterrupt):
        data.benchmark(corpus.subset(["page"]), "denoise", tmp_path / "out", crop=64)
    assert list(tmp_path.iterdir()) == []


def test_kill_between_the_two_moves_is_repaired(photographs, tmp_path):
    shutil.copytree(photographs, tmp_path / ".out.old")
    (tmp_path / ".out.tmp").mkdir()
    with pytest.raises(FileNotFoundError):   # fails before the folder is complete: the old one must come back
        data.unpack_photographs(tmp_path / "out", source=tmp_path)
    assert (tmp_path / "out/provenance.json").is_file() and nothing_left(tmp_path)


def test_failure_of_the_last_move_brings_the_old_folder_back(tmp_path, monkeypatch):
    images, move = {"x": torch.rand(3, 20, 20)}, os.replace
    data.PatchSet.write(images, tmp_path / "out", size=20)
    before = (tmp_path / "out/patches.npy").read_bytes()

    def refuse(source, target):
        if str(source).endswith(".tmp"):
            raise PermissionError(errno.EACCES, "Permission denied", str(target))
        move(source, target)
    monkeypatch.setattr(data.os, "replace", refuse)
    with pytest.raises(PermissionError):
        data.PatchSet.write({"x": torch.rand(3, 30, 30)}, tmp_path / "out", size=20)
    assert (tmp_path / "out/patches.npy").read_bytes() == before and nothing_left(tmp_path)


# ---------------------------------------------------------------- corpus

def test_scan_reports_every_bad_file(tmp_path):
    whole = save(tmp_path / "good/a.png").read_bytes()
    save(tmp_path / "good/deep/b.JPG", 1)
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "good/deep/b.JPG").read_bytes()[:2000])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("hello")
    save(tmp_path / "pixel.png", size=(1, 1, 3))
    save(tmp_path / "thin.png", size=(63, 500, 3))
    (tmp_path / "notes.txt").write_text("no picture, no claim to be one")
    (tmp_path / ".hidden").mkdir()
    save(tmp_path / ".hidden/c.png")
    with pytest.warns(UserWarning, match="6 of 8") as caught:
        corpus = data.scan(tmp_path)
    assert corpus.names == ["good/a", "good/deep/b"] and corpus.ignored == ("notes.txt",)
    assert {r.name for r in corpus.rejected} == {"cut.png", "cut.jpg", "empty.png", "text.png", "pixel.png", "thin.png"}
    message = str(caught[0].message)
    assert "\n" not in message and len(caught) == 1
    reasons = {r.name: r.reason for r in corpus.rejected}
    assert all(word in reasons["pixel.png"] for word in ("1x1", "min_side=64")) and all(reasons.values())
    assert not any(str(tmp_path) in reason for reason in reasons.values())
    with pytest.raises(ValueError, match="6 of 8.*strict=False"):
        data.scan(tmp_path, strict=True)


def test_scan_formats_and_depths(tmp_path):
    save(tmp_path / "rgb.tif"), save(tmp_path / "grey.bmp", size=(70, 80)), save(tmp_path / "rgba.webp", size=(70, 80, 4))
    Image.fromarray(np.full((70, 80), 40000, np.uint16)).save(tmp_path / "deep.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        corpus = data.scan(tmp_path)
    assert [(i.name, i.height, i.width, i.channels, i.bits) for i in corpus] == [
        ("deep", 70, 80, 1, 16), ("grey", 70, 80, 1, 8), ("rgb", 80, 90, 3, 8), ("rgba", 70, 80, 3, 8)]


def test_ambiguous_names_keep_their_suffix(tmp_path):
    for name in ("a.png", "a.bmp", "b.png"):
        save(tmp_path / name, seed=len(name) + ord(name[2]) + ord(name[0]))
    assert data.scan(tmp_path).names == ["a.bmp", "a.png", "b"]


def test_scan_nothing_usable(tmp_path):
    with pytest.raises(FileNotFoundError, match="/nowhere: "):
        data.scan(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=rf"/{tmp_path.name}: .* 0 "):
        data.scan(tmp_path)
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(ValueError, match=rf"/{tmp_path.name}: .* 1 .*a.png"):
        data.scan(tmp_path)


def test_duplicates_are_one_scene(tmp_path):
    save(tmp_path / "a_1.png", 1), save(tmp_path / "a_2.png", 2), save(tmp_path / "b_1.png", 3), save(tmp_path / "c_1.png", 4)
    shutil.copy(tmp_path / "a_2.png", tmp_path / "b_2.png")
    with pytest.warns(UserWarning, match="duplicate.*a_2.*b_2"):
        corpus = data.scan(tmp_path, groups=r"(.*)_\d+")
    assert corpus.duplicates == (("a_2", "b_2"),)
    scenes = {i.name: i.group for i in corpus}
    assert len({scenes[n] for n in ("a_1", "a_2", "b_1", "b_2")}) == 1 and scenes["c_1"] == "c"


@pytest.mark.parametrize("groups, expected", [
    (None, ["x/1_a", "x/1_b", "y"]), ("folder", ["x", "x", "y"]), (r"x/\d", ["x/1", "x/1", "y"]),
    (lambda name: name[-1], ["a", "b", "y"]), ({"y": "x/1_a"}, ["x/1_a", "x/1_b", "x/1_a"])])
def test_groups(tmp_path, groups, expected):
    for i, name in enumerate(("x/1_a.png", "x/1_b.png", "y.png")):
        save(tmp_path / name, i)
    assert [i.group for i in data.scan(tmp_path, groups=groups)] == expected
    with pytest.raises(ValueError, match=r"groups.*'\('"):
        data.scan(tmp_path, groups="(")


# ---------------------------------------------------------------- splits

def test_default_split_is_complete_and_disjoint(corpus):
    parts = data.split(corpus, data.PHOTOGRAPH_SPLIT)
    data.require_disjoint(**parts)
    assert sorted(n for c in parts.values() for n in c.names) == sorted(data.PHOTOGRAPHS)
    assert sum(i.channels == 3 for i in parts["test"]) == 4


@settings(deadline=None, max_examples=150)
@given(groups=st.lists(st.integers(0, 8), min_size=3, max_size=24), seed=st.integers(0, 9),
       val=st.one_of(st.integers(1, 5), st.floats(0.05, 0.4)), test=st.one_of(st.integers(1, 5), st.floats(0.05, 0.4)))
def test_no_scene_straddles(groups, seed, val, test):
    corpus = fake(groups)
    try:
        parts = data.split(corpus, {"train": "rest", "val": val, "test": test}, seed=seed)
    except ValueError as error:
        assert str(len(groups)) in str(error)
        return
    data.require_disjoint(**parts)
    assert sum(map(len, parts.values())) == len(groups) and all(map(len, parts.values()))
    for part, value in (("val", val), ("test", test)):
        if isinstance(value, int):
            assert len(parts[part]) == value
    again = data.split(data.Corpus(corpus.root, corpus.images[::-1]), {"train": "rest", "val": val, "test": test}, seed=seed)
    assert {p: set(c.names) for p, c in again.items()} == {p: set(c.names) for p, c in parts.items()}


def test_counts_are_met_where_scenes_allow():
    parts = data.split(fake([0, 0, 1, 1, 2]), {"test": 2, "val": 1, "train": 2})
    assert {p: len(c) for p, c in parts.items()} == {"test": 2, "val": 1, "train": 2}
    with pytest.raises(ValueError, match="test 0 of 1.* 4 .* 2 "):
        data.split(fake([0, 0, 1, 1]), {"test": 1, "train": "rest"})


def test_seeds_shuffle(corpus):
    tests = {tuple(data.split(corpus, {"train": "rest", "test": 4}, seed=s)["test"].names) for s in range(8)}
    assert len(tests) > 5


@pytest.mark.parametrize("parts, message", [
    ({"a": 1, "b": 1, "c": 1, "d": 1}, "fewer scenes.* 4 .* 3 "),
    ({}, "fewer scenes"),
    ({"a": 9, "b": "rest"}, r"a \d of 9"),
    ({"a": 4, "b": "rest"}, "nothing.* b.*a=4, b=rest"),
    ({"a": 0, "b": 1}, "a=0 .*>= 1"),
    ({"a": -0.5, "b": 1}, "a=-0.5 .*>= 1"),
    ({"a": True, "b": 1}, "a=True .*>= 1"),
    ({"a": 0.8, "b": 0.4}, "fractions.*a=0.8, b=0.4"),
    ({"a": "all", "b": 1}, "a='all' .*'rest'"),
    ({"a": "rest", "b": "rest"}, "one part.*'rest'"),
    ({"a": ["i0", "nope"], "b": "rest"}, "no picture nope"),
    ({"a": ["i0"], "b": ["i1"]}, "'g0'.*'a'.*'b'"),
    ({"a": ["i2"], "b": ["i2", "i3"]}, "'g1'.*'a'.*'b'")])
def test_bad_splits(parts, message):
    with pytest.raises(ValueError, match=message):
        data.split(fake([0, 0, 1, 2]), parts)


def test_rest_leaves_out_the_other_view():
    parts = data.split(fake([0, 0, 1, 2]), {"test": ["i0"], "train": "rest"})
    assert parts["test"].names == ["i0"] and parts["train"].names == ["i2", "i3"]


def test_require_disjoint_finds_copies(tmp_path):
    save(tmp_path / "train/a.png", 0), save(tmp_path / "train/b.png", 1)
    (tmp_path / "test").mkdir()
    shutil.copy(tmp_path / "train/b.png", tmp_path / "test/other.png")
    with pytest.raises(ValueError, match="test.*'other'.*train.*'b'"):
        data.require_disjoint(train=data.scan(tmp_path / "train"), test=data.scan(tmp_path / "test"))


# ---------------------------------------------------------------- patches

@settings(deadline=None, max_examples=60)
@given(length=st.integers(8, 200), size=st.integers(1, 8), stride=st.integers(1, 8))
def test_tiles_cover_everything(length, size, stride):
    starts = data._starts(length, size, min(stride, size))
    covered = np.unique(starts[:, None] + np.arange(size))
    assert np.array_equal(covered, np.arange(length)) and len(set(starts)) == len(starts)


def test_patches_against_plain_slicing(corpus, patches):
    import skimage.data as wheel

    pictures = {"coffee": wheel.coffee(), "grass": wheel.grass(), "page": wheel.page()}
    assert patches.pixels.dtype == np.uint8 and patches.pixels.shape[1:] == (48, 48, 3)
    assert isinstance(patches.pixels, np.memmap) and not patches.pixels.flags.writeable
    for i in range(0, len(patches), 7):
        top, left = patches.offsets[i]
        expected = pictures[patches.sources[patches.source[i]]][top:top + 48, left:left + 48]
        expected = expected if expected.ndim == 3 else np.repeat(expected[..., None], 3, 2)
        assert np.array_equal(patches.pixels[i], expected)
        assert torch.equal(patches[i], torch.from_numpy(expected).permute(2, 0, 1).float() / 255)
    assert len(patches) == sum(len(data._grid(i.height, i.width, 48, 40, None)) for i in corpus.subset(pictures))


def test_patch_bytes_repeat_and_thin(corpus, tmp_path):
    for name in ("a", "b"):
        data.PatchSet.write(corpus.subset(["page", "coins"]), tmp_path / name, size=64, per_image=5)
    assert (tmp_path / "a/patches.npy").read_bytes() == (tmp_path / "b/patches.npy").read_bytes()
    assert (tmp_path / "a/index.json").read_bytes() == (tmp_path / "b/index.json").read_bytes()
    patches = data.PatchSet.open(tmp_path / "a", verify=True)
    assert np.bincount(patches.source).tolist() == [5, 5]
    assert np.array_equal(np.load(tmp_path / "a/patches.npy"), patches.pixels)


def test_patches_from_tensors(tmp_path):
    grey, colour = torch.rand(1, 20, 30), torch.rand(3, 16, 16, dtype=torch.float64)
    patches = data.PatchSet.write({"g": grey, "c": colour}, tmp_path / "rgb", size=16, stride=16)
    assert patches.sources == ("g", "c") and patches.channels == 3 and len(patches) == 5
    assert torch.equal(patches[0], quantise(grey[:, :16, :16]).expand(3, -1, -1))
    single = data.PatchSet.write({"g": grey, "c": colour}, tmp_path / "grey", size=16, mode="gray")
    assert single.channels == 1 and torch.equal(single[0], quantise(grey[:, :16, :16]))


@pytest.mark.parametrize("images, options, message", [
    ({"x": torch.rand(4, 99, 99)}, {}, r"image 'x'.*32 \(4, 99, 99\)"),
    ({"x": torch.rand(2, 3, 99, 99)}, {}, r"image 'x'.*\(2, 3, 99, 99\)"),
    ({"x": torch.zeros(3, 99, 99, dtype=torch.uint8)}, {}, "image 'x'.*uint8"),
    ({}, {}, "no images"),
    ({"x": torch.rand(3, 99, 50)}, {}, r"x \(99x50\).*min_side=96"),
    ({"x": torch.rand(3, 99, 99)}, {"size": 0}, "size=0"), ({"x": torch.rand(3, 99, 99)}, {"stride": -1}, "stride=-1"),
    ({"x": torch.rand(3, 99, 99)}, {"per_image": 0}, "per_image=0"), ({"x": torch.rand(3, 99, 99)}, {"mode": "lab"}, "mode='lab'")])
def test_bad_patches(images, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        data.PatchSet.write(images, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def damaged(tmp_path, name):
    data.PatchSet.write({"x": torch.rand(3, 40, 40)}, tmp_path, size=20)
    return tmp_path / name


def test_open_damaged_patches(tmp_path):
    with pytest.raises(FileNotFoundError, match="index.json.*again"):
        data.PatchSet.open(tmp_path / "none")
    file = damaged(tmp_path / "a", "patches.npy")
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="patches.npy.*truncated.*again"):
        data.PatchSet.open(tmp_path / "a")
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="patches.npy.*truncated"):
        data.PatchSet.open(tmp_path / "a")
    file.unlink()
    with pytest.raises(FileNotFoundError, match="patches.npy"):
        data.PatchSet.open(tmp_path / "a")
    np.save(damaged(tmp_path / "b", "patches.npy"), np.zeros((9, 20, 20, 3), np.float32))
    with pytest.raises(ValueError, match="patches.npy.*float32.*uint8"):
        data.PatchSet.open(tmp_path / "b")
    np.save(damaged(tmp_path / "c", "patches.npy"), np.zeros((8, 20, 20, 3), np.uint8))
    with pytest.raises(ValueError, match=r"patches.npy.*\(8, 20.*\(9, 20"):
        data.PatchSet.open(tmp_path / "c")
    np.save(damaged(tmp_path / "d", "patches.npy"), np.zeros((9, 20, 20, 3), np.uint8))
    data.PatchSet.open(tmp_path / "d")
    with pytest.raises(ValueError, match="patches.npy.*SHA-256"):
        data.PatchSet.open(tmp_path / "d", verify=True)
    damaged(tmp_path / "e", "index.json").write_text('{"format": ')
    with pytest.raises(ValueError, match="index.json.*JSON"):
        data.PatchSet.open(tmp_path / "e")
    (tmp_path / "e/index.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="format.*'other'"):
        data.PatchSet.open(tmp_path / "e")
    np.save(damaged(tmp_path / "f", "patches.npy"), np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="patches.npy.*not an array"):   # pickled code is never run
        data.PatchSet.open(tmp_path / "f")


def test_patches_pickle_by_path(patches):
    text = pickle.dumps(patches)
    assert len(text) < 1000 and np.array_equal(pickle.loads(text).pixels, patches.pixels)


# ---------------------------------------------------------------- batches

@settings(deadline=None, max_examples=100)
@given(seed=st.integers(-2**40, 2**80), start=st.integers(0, 2**32 - 300))
def test_seeds_never_repeat_within_a_stream(seed, start):
    for stream in data.STREAMS:
        seeds = [data.batch_seed(seed, start + i, stream) for i in range(200)]
        assert len({s & 0xFFFFFFFF for s in seeds}) == 200 and all(0 <= s < 2**63 for s in seeds)
    assert len({data.batch_seed(seed, start, s) for s in data.STREAMS}) == 3


def test_mixers_have_their_published_values():
    "First output of SplitMix64 from state 0; MurmurHash3's 32-bit finaliser of 1."
    assert data._mix64(0) == 0xE220A8397B1DCDAF and data._mix32(1) == 0x514E28B7


def test_seed_values_are_frozen():
    "Changing the hash changes every experiment: do it knowingly."
    assert [data.batch_seed(0, 0), data.batch_seed(0, 1), data.batch_seed(7, 123, "real")] == FROZEN_SEEDS


FROZEN_SEEDS = [1534736264529491465, 1534736265687703270, 8835240933701957410]


@pytest.mark.parametrize("step, stream, message", [(-1, "clean", "step.*got -1"), (2**32, "clean", "step.*4294967296"),
                                                   (0, "noise", "stream.*'noise'.*degradation")])
def test_bad_seeds(step, stream, message):
    with pytest.raises(ValueError, match=message):
        data.batch_seed(0, step, stream)


@pytest.mark.parametrize("augment", [True, False])
def test_crops_against_a_loop(patches, augment):
    pixels = torch.from_numpy(np.array(patches.pixels))
    got = data.random_crops(pixels, 9, 20, generator=torch.Generator().manual_seed(3), augment=augment)
    g = torch.Generator().manual_seed(3)
    tile = torch.randint(len(pixels), (9,), generator=g)
    top, left = torch.randint(48 - 20 + 1, (2, 9), generator=g)
    turns = torch.randint(8, (9,), generator=g)
    for i in range(9):
        expected = pixels[tile[i], top[i]:top[i] + 20, left[i]:left[i] + 20].permute(2, 0, 1)
        assert torch.equal(got[i], dihedral(expected, int(turns[i])) if augment else expected)


def test_crops_reach_every_position_and_turn():
    pixels = torch.arange(2 * 9, dtype=torch.uint8).reshape(2, 3, 3, 1)
    crops = data.random_crops(pixels, 4000, 2, generator=torch.Generator().manual_seed(0))
    counts = np.unique(crops.reshape(4000, -1).numpy(), axis=0, return_counts=True)[1]
    assert len(counts) == 2 * 2 * 2 * 8 and 0.5 < counts.min() / 62.5 and counts.max() / 62.5 < 1.6


DEGRADATIONS = [deg.GaussianNoise(deg.Uniform(0, 55)), deg.GaussianBlur(deg.Choice((1.0, 2.0))), deg.Downsample(4),
                deg.RawNoise(form="packed"), deg.Compose(deg.Downsample(2), deg.GaussianNoise(5))]


@pytest.mark.parametrize("degradation", DEGRADATIONS, ids=repr)
def test_ranks_are_slices_of_the_global_batch(patches, degradation):
    options = dict(batch=6, crop=32, seed=5, real=patches)
    whole = data.Loader(patches, degradation, **options).batch(11)
    ranks = [data.Loader(patches, degradation, rank=r, world=3, **options).batch(11) for r in range(3)]
    for key, value in whole.items():
        assert torch.equal(torch.cat([rank[key] for rank in ranks]), value)
    assert whole["clean"].shape == (6, 3, 32, 32) and whole["real"].shape[-1] == whole["degraded"].shape[-1]


def test_batch_is_pure(patches):
    degradation = deg.GaussianNoise(25)
    loader = data.Loader(patches, degradation, batch=4, crop=32, seed=1)
    state = torch.get_rng_state()
    first = [loader.batch(step) for step in range(4)]
    for step in (3, 1, 2, 0, 2):
        again = data.Loader(patches, degradation, batch=4, crop=32, seed=1).batch(step)
        assert all(torch.equal(again[key], first[step][key]) for key in again)
    assert torch.equal(state, torch.get_rng_state())
    other = data.Loader(patches, degradation, batch=4, crop=32, seed=2).batch(0)
    for key in ("clean", "degraded"):
        assert not torch.equal(first[0][key], first[1][key]) and not torch.equal(first[0][key], other[key])
    assert all(torch.equal(a["clean"], b["clean"]) for a, b in zip(loader, first))
    assert len(loader) == len(patches) // 4 and sum(1 for _ in loader) == len(loader)


def test_batch_repeats_in_another_process(patches):
    code = ("import sys, hashlib; from irnb import data, degradations as deg;"
            "b = data.Loader(data.PatchSet.open(sys.argv[1]), deg.GaussianNoise(25), batch=4, crop=32, seed=1).batch(9);"
            "print(hashlib.sha256(b['degraded'].numpy().tobytes()).hexdigest())")
    import hashlib

    here = data.Loader(patches, deg.GaussianNoise(25), batch=4, crop=32, seed=1).batch(9)["degraded"]
    there = subprocess.run([sys.executable, "-c", code, str(patches.path)], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == hashlib.sha256(here.numpy().tobytes()).hexdigest()


def test_streams_are_separate(patches):
    make = lambda degradation, **o: data.Loader(patches, degradation, batch=4, crop=32, seed=1, **o).batch(2)
    plain, noisy, real = make(deg.Identity()), make(deg.GaussianNoise(9)), make(deg.GaussianNoise(9), real=patches)
    assert torch.equal(plain["clean"], plain["degraded"]) and torch.equal(plain["clean"], noisy["clean"])
    assert torch.equal(noisy["degraded"], real["degraded"]) and not torch.equal(real["real"], real["clean"])
    assert set(real) == {"degraded", "clean", "real"} and set(noisy) == {"degraded", "clean"}


def test_degradation_has_its_own_documented_seed(patches):
    degradation = deg.GaussianNoise(deg.Uniform(5, 50))
    loader = data.Loader(patches, degradation, batch=4, crop=32, seed=1)
    batch = loader.batch(6)
    assert loader.seeds(6)["degradation"] == data.batch_seed(1, 6, "degradation") != data.batch_seed(1, 6, "clean")
    generator = torch.Generator().manual_seed(loader.seeds(6)["degradation"])
    assert torch.equal(batch["degraded"], degradation(batch["clean"], generator=generator))


def test_loader_options(patches):
    target = data.Loader(patches, deg.GaussianNoise(9), batch=2, crop=32, target=lambda x: x.mean(1, keepdim=True)).batch(0)
    plain = data.Loader(patches, deg.GaussianNoise(9), batch=2, crop=32, preload=True).batch(0)
    assert torch.equal(target["clean"], plain["clean"].mean(1, keepdim=True))
    assert torch.equal(target["degraded"], plain["degraded"])
    assert plain["clean"].dtype == torch.float32 and plain["clean"].is_contiguous()
    assert data.Loader(patches, deg.Identity(), batch=2, crop=48, augment=False).batch(3)["clean"].shape == (2, 3, 48, 48)


@pytest.mark.parametrize("options, message", [
    (dict(crop=49), "crop 49 .*48"), (dict(crop=0), "crop=0"), (dict(batch=0), "batch=0"),
    (dict(batch=5, world=2), "world=2, batch=5"), (dict(rank=2, world=2), "rank=2"), (dict(world=0), "world=0")])
def test_bad_loader(patches, options, message):
    with pytest.raises(ValueError, match=message):
        data.Loader(patches, deg.Identity(), **{"crop": 32, "batch": 4} | options)


def test_bad_loader_scale_and_real(patches, tmp_path):
    with pytest.raises(ValueError, match="crop 30 .*scale 4"):
        data.Loader(patches, deg.Downsample(4), crop=30)
    small = data.PatchSet.write({"x": torch.rand(3, 20, 20)}, tmp_path / "small", size=16)
    with pytest.raises(ValueError, match="real.* 16 .* 32 "):
        data.Loader(patches, deg.Identity(), crop=32, real=small)
    data.Loader(patches, deg.Downsample(2), crop=32, real=small)
    grey = data.PatchSet.write({"x": torch.rand(1, 40, 40)}, tmp_path / "grey", size=32, mode="gray")
    with pytest.raises(ValueError, match="real.* 1 channel"):
        data.Loader(patches, deg.Identity(), crop=32, real=grey)


# ---------------------------------------------------------------- tasks

def test_task_list():
    assert set(data.TASKS) >= {"denoise", "deblur", "derain", "dehaze", "sr4", "jdd", "hybrid", "camera"}
    assert [d.sigma for d in data.task("denoise").seen.values()] == [5, 10, 15, 20]
    assert [d.sigma for d in data.task("denoise").unseen.values()] == [30, 40, 50]
    assert [d.sigma for d in data.task("deblur").unseen.values()] == [4.2, 4.4, 4.6, 4.8, 5.0]
    assert data.task("sr4").conventions == {"y_channel": True, "crop_border": 4, "quantise": True}
    assert data.task("camera").real is not None and data.task("denoise").real is None
    with pytest.raises(ValueError, match="task 'denoize'.*denoise"):
        data.task("denoize")


@pytest.mark.parametrize("name", list(data.TASKS))
def test_task_trains_and_tests(name, patches, corpus, tmp_path):
    "Every task gives training batches and a benchmark whose first picture has the training scale."
    task = data.task(name)
    batch = data.Loader(patches, task.train, batch=2, crop=48).batch(0)
    bench = data.benchmark(corpus.subset(["chelsea"]), task, tmp_path / "b", crop=100)
    assert list(bench.settings.values()) == [True] * len(task.seen) + [False] * len(task.unseen)
    for example in bench:
        assert example.degraded.shape[1] == batch["degraded"].shape[1] and example.clean.shape[1] == 3
        assert [s * task.scale for s in example.degraded.shape[-2:]] == list(example.clean.shape[-2:])
        assert torch.isfinite(example.degraded).all() and example.degraded.dtype == torch.float32
        assert not torch.equal(example.degraded, example.clean)
    assert torch.isfinite(batch["degraded"]).all()


def test_unseen_settings_differ_from_seen():
    for task in data.TASKS.values():
        assert not {repr(d) for d in task.seen.values()} & {repr(d) for d in task.unseen.values()}


def value_inside(part, whole):
    "Whether every value that a parameter can take lies in what another can take."
    if part == whole:
        return True
    if isinstance(whole, deg.Choice):
        return set(part.values if isinstance(part, deg.Choice) else [part]) <= set(whole.values)
    if not isinstance(whole, deg.Distribution):
        return False
    low, high = (part.low, part.high) if isinstance(part, deg.Distribution) else (part, part)
    return whole.low <= low and high <= whole.high


def inside(part, whole):
    "Whether a degradation is of a kind of another, every parameter within its range: compared field by field, nothing is drawn."
    if isinstance(part, deg.OneOf):
        return all(inside(kind, whole) for kind in part.kinds)
    if isinstance(whole, deg.OneOf):
        return any(inside(part, kind) for kind in whole.kinds)
    if type(part) is not type(whole):
        return False
    if isinstance(whole, deg.Compose):
        return len(part.steps) == len(whole.steps) and all(map(inside, part.steps, whole.steps))
    if isinstance(whole, deg.Hybrid):
        return set(deg.hybrid_bins(part.level, part.stratum, part.strata)) <= set(deg.hybrid_bins(whole.level, whole.stratum, whole.strata))
    return all(value_inside(getattr(part, f.name), getattr(whole, f.name)) for f in fields(whole))


def even_parts(values, whole):
    "Whether the even mixture of the values (numbers or distributions) is the distribution `whole`."
    if isinstance(whole, deg.Choice):
        return list(values) == list(whole.values)
    if isinstance(whole, deg.Squared):
        return all(isinstance(v, deg.Squared) for v in values) and even_parts([v.base for v in values], whole.base)
    if not isinstance(whole, deg.Uniform) or not all(isinstance(v, deg.Uniform) for v in values):
        return False
    edges = [(v.lo, v.hi) for v in values]
    joined = edges[0][0] == whole.lo and edges[-1][1] == whole.hi and all(a[1] == b[0] for a, b in zip(edges, edges[1:]))
    return joined and np.allclose([hi - lo for lo, hi in edges], (whole.hi - whole.lo) / len(edges), rtol=1e-12)


def mixture_is(parts, whole):
    "Whether the even mixture of the parts is the degradation `whole`."
    if isinstance(whole, deg.OneOf):
        return list(parts) == list(whole.kinds)
    if isinstance(whole, deg.Hybrid):
        bins = [deg.hybrid_bins(d.level, d.stratum, d.strata) for d in parts]
        whole_bins = deg.hybrid_bins(whole.level, whole.stratum, whole.strata)
        return sorted(sum(bins, ())) == sorted(whole_bins) and max(map(len, bins)) - min(map(len, bins)) <= 1
    if any(type(d) is not type(whole) for d in parts):
        return False
    differ = [f.name for f in fields(whole) if any(getattr(d, f.name) != getattr(whole, f.name) for d in parts)]
    return len(differ) == 1 and even_parts([getattr(d, differ[0]) for d in parts], getattr(whole, differ[0]))


SINGLE = ["derain", "sr4", "derain_domains"]   # they train on one setting


@pytest.mark.parametrize("name", list(data.TASKS))
def test_confounders_lie_inside_the_training_distribution_and_make_it_up(name):
    "No strategy of a table trains on what is scored as unseen, and all of them see one distribution."
    task = data.task(name)
    parts = list(task.confounders.values())
    assert all(inside(d, task.train) for d in [task.train, *task.seen.values(), *parts])
    assert not any(inside(d, task.train) for d in task.unseen.values())
    assert not any(inside(u, d) for u in task.unseen.values() for d in parts)
    if name in SINGLE:
        assert not parts
    else:
        assert len(parts) >= 3 and mixture_is(parts, task.train)
        assert all(d.scale == task.scale for d in parts) and not any(a == b for i, a in enumerate(parts) for b in parts[:i])


LEAKS = [("derain", deg.rain("heavy")), ("derain", deg.rain("rain14000")), ("sr4", deg.RealESRGAN(1)), ("sr4", deg.Downsample(2)),
         ("camera", deg.ColourNoise()), ("camera", deg.camera("smooth")), ("camera", deg.GaussianNoise(deg.Uniform(50, 56))),
         ("denoise", deg.GaussianNoise(30)), ("denoise", deg.GaussianNoise(7)), ("denoise", deg.GaussianNoise(5, clip=False)),
         ("denoise", deg.GaussianNoise(deg.Uniform(5, 20))), ("hybrid", deg.hybrid("moderate", 0, 4)), ("jdd", deg.RawNoise(0.16 ** 2, 0.07 ** 2)),
         ("dehaze", deg.Haze(1.2, airlight=0.5)), ("allinone", deg.OneOf(deg.JPEG(20), deg.JPEG(8))), ("sr4_mixed", deg.Compose(deg.Downsample(4), deg.JPEG(30))),
         ("sr4_mixed", deg.Compose(deg.GaussianBlur(1.0), deg.Downsample(4), deg.JPEG(70))), ("derain_mixed", deg.rain("rain12"))]


@pytest.mark.parametrize("name, leak", LEAKS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(LEAKS)])
def test_a_leaked_confounder_is_found(name, leak):
    task = data.task(name)
    assert not inside(leak, task.train)
    assert not mixture_is([*task.confounders.values(), leak], task.train)


def test_a_mixture_that_is_another_distribution_is_found():
    "Contained is not enough: some levels of an interval, unequal parts or a missing part are other data than the rival's."
    haze, white = deg.Haze(), data.task("camera").train
    assert not mixture_is([deg.Haze(b) for b in (0.6, 1.2, 1.8)], haze)
    assert not mixture_is([deg.GaussianNoise(deg.Uniform(0, 10)), deg.GaussianNoise(deg.Uniform(10, 55))], white)
    assert not mixture_is(list(data.task("camera").confounders.values())[:-1], white)
    assert not mixture_is(list(data.task("denoise").confounders.values())[1:], data.task("denoise").train)
    assert mixture_is([deg.GaussianNoise(deg.Uniform(0, 27.5)), deg.GaussianNoise(deg.Uniform(27.5, 55))], white)


def test_divided_draws_what_the_whole_draws():
    "The strengths of the parts, taken together, are uniform on the interval (the structure above, seen in numbers)."
    parts = [d.sigma for d in data.task("camera").confounders.values()]
    drawn = torch.cat([d.sample(5000, torch.Generator().manual_seed(i)) for i, d in enumerate(parts)]).sort().values
    expected = torch.linspace(0, 55, len(drawn))
    assert float((drawn - expected).abs().max()) < 55 * 0.01


@pytest.mark.parametrize("seen, unseen, message", [
    ({"a/b": deg.Identity()}, {}, "setting 'a/b'"), ({"clean": deg.Identity()}, {}, "setting 'clean'"),
    ({"": deg.Identity()}, {}, "setting ''"), ({"a": deg.Downsample(2)}, {}, "setting 'a'.*scale 2.*1"),
    ({"a": deg.Identity()}, {"a": deg.Identity()}, "seen.*unseen: a")])
def test_bad_tasks(seen, unseen, message):
    with pytest.raises(ValueError, match=message):
        data.Task("t", "T", "", deg.Identity(), seen, unseen)


def test_allinone_gives_each_sample_one_kind(patches):
    "The training mixture: per sample one kind, the batch in order, unlike samples of one seed; reported by kind."
    task = data.task("allinone")
    x = torch.rand(12, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    y = task.train(x, generator=torch.Generator().manual_seed(1))
    kinds = task.train.draw(12, generator=torch.Generator().manual_seed(1))
    assert len(set(kinds.tolist())) >= 4 and y.shape == x.shape
    jpeg = [i for i, k in enumerate(kinds) if isinstance(task.train.kinds[k], deg.JPEG)]
    blur = [i for i, k in enumerate(kinds) if isinstance(task.train.kinds[k], deg.GaussianBlur)]
    energy = lambda z: (z[..., 1:] - z[..., :-1]).square().mean((1, 2, 3))
    assert (energy(y)[blur] < .6 * energy(x)[blur]).all() and len(jpeg) + len(blur) >= 2
    assert [type(d).__name__ for d in task.seen.values()] == [type(d).__name__ for d in task.unseen.values()] == ["GaussianNoise", "GaussianBlur", "Haze", "Rain", "JPEG"]


def test_domains_have_a_target_that_is_not_the_source():
    for name, target in (("derain_domains", deg.Rain), ("deblur_domains", deg.MotionBlur), ("camera", deg.CameraNoise)):
        task = data.task(name)
        assert isinstance(task.real, target) and repr(task.real) != repr(task.train) and repr(task.real) in {repr(d) for d in task.unseen.values()}


def test_raw_tasks_are_known():
    assert [t.name for t in data.TASKS.values() if t.raw] == ["jdd"] and not data.task("denoise_raw").raw


# ---------------------------------------------------------------- depth and pairs

def test_depth_of_the_motorcycle_follows_its_disparity(corpus):
    depths = data.picture_depths(corpus)
    assert list(depths) == ["motorcycle_left"]
    import skimage.data
    left, _, disparity = skimage.data.stereo_motorcycle()
    known = np.isfinite(disparity)
    far = 994.978 * 193.001 / (disparity[known].astype(float) + 31.086)   # mm
    assert np.allclose(depths["motorcycle_left"][0].numpy()[known], far / (994.978 * 193.001 / (disparity[known].min() + 31.086)), atol=1e-6)
    assert (depths["motorcycle_left"][0].numpy()[~known] == 1).all() and depths["motorcycle_left"].shape[-2:] == left.shape[:2]


def test_haze_follows_a_known_depth_and_says_so(corpus, tmp_path):
    chosen = corpus.subset(["chelsea", "motorcycle_left"])
    depths = data.picture_depths(chosen)
    bench = data.benchmark(chosen, "dehaze", tmp_path / "b", crop=96, depths=depths)
    notes = {(e["image"], e["setting"]): e.get("depth") for e in bench.manifest["entries"]}
    assert {k[0] for k, v in notes.items() if v == "measured"} == {"motorcycle_left"} and sum(v == "measured" for v in notes.values()) == len(bench.settings)
    shown = next(bench.select(images=["motorcycle_left"], settings=["beta_1.8"]))
    depth = data.prepare_picture(depths["motorcycle_left"], data.task("dehaze"), 96)
    t = torch.exp(-1.8 * depth)
    airlight = ((shown.degraded[0] - shown.clean[0] * t) / (1 - t))
    assert airlight.std() < 1e-4 and .7 <= airlight.mean() <= 1   # Koschmieder with one airlight, transmission from the measured depth
    plain = data.benchmark(corpus.subset(["chelsea"]), "dehaze", tmp_path / "c", crop=96)
    assert all(torch.equal(a.degraded, b.degraded) for a, b in zip(plain, bench.select(images=["chelsea"]), strict=True))


def test_own_depth_files(tmp_path):
    from irnb.image_files import write_image
    write_image(tmp_path / "a.png", torch.rand(3, 70, 80))
    depth = np.linspace(1, 5, 70 * 80, dtype=np.float64).reshape(70, 80)
    depth[0, :3] = np.nan
    np.save(tmp_path / "a_depth.npy", depth)
    got = data.picture_depths(data.scan(tmp_path))["a"]
    assert got.shape == (1, 70, 80) and got.max() == 1 and (got[0, 0, :3] == 1).all() and abs(float(got[0, 0, 3]) - depth[0, 3] / 5) < 1e-6
    for bad in (np.ones((70, 79)), -np.ones((70, 80)), np.full((70, 80), np.nan)):
        np.save(tmp_path / "a_depth.npy", bad)
        with pytest.raises(ValueError, match=r"a_depth.npy.*\(70, 80\)"):
            data.picture_depths(data.scan(tmp_path))


@pytest.mark.parametrize("files, options, message", [
    ({"a_real": 8}, {}, "'a_real'.*'a_mean'"), ({"a": 8}, {}, "no picture.*_real"),
    ({"a_real": 8, "a_mean": 8}, {"degraded": "*_re*l"}, r"degraded.*_re\*l"), ({"a_real": 8, "a_mean": 8}, {"pick": ["b*"]}, r"no picture.*'b\*'")])
def test_bad_pairs(tmp_path, files, options, message):
    from irnb.image_files import write_image
    for name, side in files.items():
        write_image(tmp_path / f"{name}.png", torch.rand(3, side, side))
    with pytest.raises(ValueError, match=message):
        data.picture_pairs(tmp_path, **options)


def test_a_pair_has_one_size_and_a_name_of_its_own(corpus, tmp_path):
    from irnb.image_files import write_image
    write_image(tmp_path / "a_real.png", torch.rand(3, 70, 70)), write_image(tmp_path / "a_mean.png", torch.rand(3, 72, 70))
    with pytest.raises(ValueError, match="a_real.png.*70.*a_mean.png.*72"):
        data.benchmark(corpus.subset(["coins"]), "denoise", tmp_path / "b", pairs=data.picture_pairs(tmp_path))
    with pytest.raises(ValueError, match="pairs.*coins"):
        data.benchmark(corpus.subset(["coins"]), "denoise", tmp_path / "b", pairs={"coins": (tmp_path / "a_real.png",) * 2})
    assert not (tmp_path / "b").exists()


def test_scan_opens_only_what_is_picked(tmp_path, monkeypatch):
    from irnb.image_files import write_image
    for name in ("x_real", "x_mean", "y_real"):
        write_image(tmp_path / f"{name}.png", torch.rand(3, 70, 70))
    opened = []
    monkeypatch.setattr(data, "read_picture", lambda path, read=data.read_picture: (opened.append(path.name), read(path))[1])
    corpus = data.scan(tmp_path, pick=["*_real"])
    assert corpus.names == ["x_real", "y_real"] and sorted(opened) == ["x_real.png", "y_real.png"]
    assert data.scan(tmp_path, pick=["x_real.png"]).names == ["x_real"]
    with pytest.raises(ValueError, match="'z'.* 3 "):
        data.scan(tmp_path, pick=["x*", "z"])


def test_real_pictures_among_the_pairs_are_refused(tmp_path):
    import shutil
    from irnb.image_files import write_image
    for folder, name, seed in (("clean", "a", 0), ("clean", "b", 1), ("phone", "c", 2)):
        (tmp_path / folder).mkdir(exist_ok=True)
        write_image(tmp_path / folder / f"{name}.png", torch.rand(3, 70, 70, generator=torch.Generator().manual_seed(seed)))
    clean = data.scan(tmp_path / "clean")
    data.require_unpaired(data.scan(tmp_path / "phone"), train=clean)
    shutil.copy(tmp_path / "clean" / "b.png", tmp_path / "phone" / "holiday.png")
    with pytest.raises(ValueError, match="holiday.*'b'.*real.allow_shared"):
        data.require_unpaired(data.scan(tmp_path / "phone"), train=clean)


def test_few_pictures_are_nested_and_follow_the_seed(corpus, tmp_path):
    import pickle
    patches = data.PatchSet.write(corpus, tmp_path / "p", size=48, per_image=5)
    few = [data.few_pictures(patches, k, 3) for k in range(1, len(patches.sources) + 1)]
    assert [len(f.sources) for f in few] == list(range(1, len(patches.sources) + 1))
    assert all(set(a.sources) < set(b.sources) for a, b in zip(few, few[1:])) and len({data.few_pictures(patches, 1, s).sources for s in range(20)}) > 2
    kept = few[1]
    for i in range(len(kept)):
        name, place = kept.sources[kept.source[i]], kept.offsets[i]
        j = next(j for j in range(len(patches)) if patches.sources[patches.source[j]] == name and (patches.offsets[j] == place).all())
        assert np.array_equal(kept.pixels[i], patches.pixels[j])
    assert pickle.loads(pickle.dumps(kept)).sources == kept.sources and np.array_equal(pickle.loads(pickle.dumps(kept)).pixels, kept.pixels)
    for k in (0, len(patches.sources) + 1):
        with pytest.raises(ValueError, match=f" {k} labelled"):
            data.few_pictures(patches, k)


# ---------------------------------------------------------------- noisy pictures alone

@pytest.fixture(scope="module")
def noisy(corpus, tmp_path_factory):
    chosen, law = corpus.subset(["chelsea", "coins", "coffee", "rocket"]), deg.RawNoise()
    folder = tmp_path_factory.mktemp("noisy")
    return [data.PatchSet.write(data.noisy_pictures(chosen, law, view=view), folder / view, size=64, per_image=7, dtype="float16") for view in ("noisy", "noisy2")]


def test_a_picture_is_made_noisy_once_and_not_clipped(corpus, noisy):
    from irnb.image_files import read_image
    whole = data.degrade_once(read_image(corpus["chelsea"].path), deg.RawNoise(), image="chelsea", setting="noisy")
    patches = noisy[0]
    tiles = [i for i in range(len(patches)) if patches.sources[patches.source[i]] == "chelsea"]
    assert patches.pixels.dtype == np.float16 and len(tiles) == 7
    for i in tiles:
        top, left = patches.offsets[i]
        assert top % 2 == left % 2 == 0 and torch.equal(patches[i], whole[:, top:top + 64, left:left + 64].half().float())
    assert float(patches.pixels.min()) < 0 and not np.array_equal(noisy[0].pixels, noisy[1].pixels)


def test_noisy_batches_come_from_different_pictures_in_phase(noisy):
    loader = data.NoisyLoader(noisy[0], batch=4, crop=32, seed=3)
    batch = loader.batch(5)
    assert set(batch) == {"degraded"} and batch["degraded"].shape == (4, 3, 32, 32) and torch.equal(batch["degraded"], loader.batch(5)["degraded"])
    assert not torch.equal(batch["degraded"], loader.batch(6)["degraded"])
    red, green = batch["degraded"][:, 0], batch["degraded"][:, 1]
    assert (red[:, 1::2] == 0).all() and (red[:, :, 1::2] == 0).all() and (green[:, ::2, ::2] == 0).all()   # RGGB, masked
    place = lambda crop: next(int(noisy[0].source[i]) for i in range(len(noisy[0])) if (noisy[0][i].unfold(1, 32, 2).unfold(2, 32, 2) == crop[:, None, None]).flatten(3).all(-1).all(0).any())
    assert sorted(place(crop) for crop in batch["degraded"]) == [0, 1, 2, 3]


def test_two_noisy_views_show_the_same_place(noisy):
    law = data.NoisyLoader(noisy[0], batch=4, crop=32, seed=3, second=noisy[1])
    batch = law.batch(0)
    assert set(batch) == {"degraded", "degraded2"} and not torch.equal(*batch.values())
    assert torch.equal(batch["degraded"], data.NoisyLoader(noisy[0], batch=4, crop=32, seed=3).batch(0)["degraded"])
    mean = [v.mean((2, 3)) for v in batch.values()]
    assert (mean[0] - mean[1]).abs().max() < .02   # the same content: noise averages out
    halves = [data.NoisyLoader(noisy[0], batch=4, crop=32, seed=3, rank=r, world=2).batch(0)["degraded"] for r in (0, 1)]
    assert torch.equal(torch.cat(halves), batch["degraded"]) and len(list(iter(law))) == len(law) == 7


def test_noisy_loader_refuses_what_cannot_work(noisy, corpus, tmp_path):
    other = data.PatchSet.write(corpus.subset(["chelsea"]), tmp_path / "o", size=64, per_image=3)
    for options, message in (({"batch": 5}, "NoisyLoader: batch=5 "), ({"batch": 2, "crop": 65}, "crop 65 .*64"), ({"batch": 2, "second": other}, "NoisyLoader: .*/o .*tiles")):
        with pytest.raises(ValueError, match=message):
            data.NoisyLoader(noisy[0], **{"crop": 32} | options)
    with pytest.raises(ValueError, match="dtype='float8'"):
        data.PatchSet.write(corpus.subset(["chelsea"]), tmp_path / "p", size=64, dtype="float8")


# ---------------------------------------------------------------- benchmarks

def contents(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_benchmark_bytes(corpus, tmp_path):
    chosen = corpus.subset(["chelsea", "coins"])
    bench = data.benchmark(chosen, "denoise", tmp_path / "a", crop=64)
    data.benchmark(chosen, "denoise", tmp_path / "b", crop=64)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    alone = data.benchmark(corpus.subset(["coins"]), "denoise", tmp_path / "c", crop=64)
    for one, same in zip(alone, bench.select(images=["coins"]), strict=True):
        assert one[:3] == same[:3] and torch.equal(one.degraded, same.degraded)
    noises = torch.stack([e.degraded - e.clean for e in bench])
    assert len({n.numpy().tobytes() for n in noises}) == 14   # fresh noise per picture and setting
    other = data.benchmark(chosen, "denoise", tmp_path / "d", crop=64, seed=1)
    assert not torch.equal(next(iter(other)).degraded, next(iter(bench)).degraded)


def test_benchmark_noise_is_independent(tmp_path):
    flat = torch.full((3, 64, 64), 0.5)
    bench = data.benchmark({"a": flat, "b": flat}, "denoise", tmp_path / "x")
    noise = torch.stack([(e.degraded - e.clean).flatten() for e in bench])
    assert (torch.corrcoef(noise) - torch.eye(14)).abs().max() < 0.05


def test_benchmark_content(corpus, tmp_path):
    import skimage.data as wheel

    bench = data.benchmark(corpus.subset(["chelsea", "coins"]), "denoise", tmp_path / "a", crop=201)
    assert len(bench) == 14 and bench.images == ["chelsea", "coins"] and bench.task == "denoise"
    for example in bench:
        cat = torch.from_numpy(wheel.chelsea()[49:250, 125:326].copy()).permute(2, 0, 1)[None].float() / 255
        if example.image == "chelsea":
            assert torch.equal(example.clean, cat)
        noise = (example.degraded - example.clean)[(example.clean > 0.4) & (example.clean < 0.6)]
        sigma = int(example.setting.removeprefix("sigma_"))
        assert abs(noise.std() * 255 / sigma - 1) < 0.03 and example.seen == (sigma <= 20)
        assert example.degraded.min() >= 0 and example.degraded.max() <= 1
        assert not torch.equal(example.degraded, quantise(example.degraded))   # clipped, not rounded
    unseen = list(bench.select(seen=False, images=["coins"]))
    assert [e.setting for e in unseen] == ["sigma_30", "sigma_40", "sigma_50"]
    assert torch.equal(bench.clean("coins"), unseen[0].clean)
    bench.verify()


def test_benchmark_is_cropped_to_the_scale(corpus, tmp_path):
    bench = data.benchmark(corpus.subset(["chelsea"]), "sr4", tmp_path / "a")
    example = next(iter(bench))
    assert example.clean.shape[-2:] == (300, 448) and example.degraded.shape[-2:] == (75, 112)
    enlarged = data.benchmark({"x": torch.rand(3, 21, 30)}, "camera", tmp_path / "b")
    assert next(iter(enlarged)).clean.shape[-2:] == (42, 60)


def test_benchmark_nested_names_and_tensors(tmp_path):
    bench = data.benchmark({"a/b": torch.rand(1, 16, 16), "a": torch.rand(3, 18, 16)}, "denoise", tmp_path / "x")
    assert (tmp_path / "x/sigma_30/a/b.npy").is_file() and bench.images == ["a/b", "a"]
    assert next(bench.select(images=["a/b"])).clean.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("images, task, options, message", [
    ({"../x": torch.rand(3, 9, 9)}, "denoise", {}, r"image name '\.\./x'"),
    ({"/x": torch.rand(3, 9, 9)}, "denoise", {}, "image name '/x'"), ({"": torch.rand(3, 9, 9)}, "denoise", {}, "image name ''"),
    ({"x": torch.rand(3, 9, 9)}, "denoize", {}, "task 'denoize'"), ({"x": torch.rand(3, 9, 9)}, "denoise", {"crop": 0}, "crop.* 0"),
    ({"x": torch.rand(3, 3, 9)}, "sr4", {}, r"nothing.*\(3, 9\)"), ({"x": torch.rand(5, 9, 9)}, "denoise", {}, r"\(5, 9, 9\)"),
    ({}, "denoise", {}, "no images")])
def test_bad_benchmarks(images, task, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        data.benchmark(images, task, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_open_damaged_benchmark(tmp_path):
    with pytest.raises(FileNotFoundError, match="manifest.json.*again"):
        data.Benchmark.open(tmp_path / "none")
    path = tmp_path / "b"
    bench = data.benchmark({"x": torch.rand(3, 16, 16)}, "denoise", path)
    file = path / "sigma_30/x.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert len(list(data.Benchmark.open(path))) == 7
    with pytest.raises(ValueError, match="sigma_30/x.npy.*SHA-256"):
        data.Benchmark.open(path, verify=True)
    file.write_bytes(whole[:200])
    with pytest.raises(ValueError, match="sigma_30/x.npy.*truncated"):
        list(data.Benchmark.open(path))
    np.save(file, np.zeros((3, 16, 15), np.float32))
    with pytest.raises(ValueError, match="sigma_30/x.npy.*16, 15.*16, 16"):
        list(bench)
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="sigma_30/x.npy.*not an array"):   # pickled code is never run
        list(bench)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="sigma_30/x.npy"):
        data.Benchmark.open(path)
    for options, message in ((dict(images=["y"]), "picture y.* x"), (dict(settings="sigma_7"), "setting sigma_7.*sigma_30")):
        with pytest.raises(ValueError, match=message):
            bench.select(**options)
    (path / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="format None"):
        data.Benchmark.open(path)


def test_real_pictures(corpus):
    two = corpus.subset(["chelsea", "coins"])
    real = data.real_pictures(two, "camera_textured")
    assert list(real) == ["chelsea", "coins"] and real["chelsea"].shape == (3, 300, 451)
    assert torch.equal(data.real_pictures(two.subset(["coins"]), "camera_textured")["coins"], real["coins"])
    with pytest.raises(ValueError, match="task 'denoise'.*real"):
        data.real_pictures(two, "denoise")
    with pytest.raises(ValueError, match="task 'x'"):
        data.real_pictures(two, "x")


# ---------------------------------------------------------------- strange folders

SCAN = """
import sys, warnings
from irnb import data
warnings.simplefilter("ignore")
found = data.scan(sys.argv[1])
print(found.names, sorted(r.name for r in found.rejected))
"""


def test_a_pipe_in_a_folder_is_named_and_not_waited_for(corpus, tmp_path):
    "In a process of its own, since a reader of the pipe would wait for ever."
    shutil.copy(corpus["chelsea"].path, tmp_path / "cat.png")
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "notes.txt")
    done = subprocess.run([sys.executable, "-c", SCAN, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[0] == "['cat'] ['pipe.png']", done.stderr


def test_links_that_loop_or_lead_nowhere(corpus, tmp_path):
    shutil.copy(corpus["chelsea"].path, tmp_path / "cat.png")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "up").symlink_to(tmp_path)
    (tmp_path / "itself.png").symlink_to(tmp_path / "itself.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing.png")
    (tmp_path / "same.png").symlink_to(tmp_path / "cat.png")
    with pytest.warns(UserWarning, match="gone.png"):
        found = data.scan(tmp_path)
    assert found.names == ["cat", "same"] and found.duplicates == (("cat", "same"),)
    assert {r.name: "leads nowhere" in r.reason for r in found.rejected} == {"gone.png": True, "itself.png": True}


def test_names_with_control_characters_are_shown_as_escapes(corpus, tmp_path):
    "What reaches a terminal is one line without escape sequences; the names themselves stay."
    folder = tmp_path / "a\x1b[31m\nb"
    folder.mkdir()
    shutil.copy(corpus["chelsea"].path, folder / "c\x1b[2J\n.png")
    (folder / "bad\x1b[31m\n\udcff.png").write_text("no picture")
    with pytest.warns(UserWarning) as caught:
        found = data.scan(folder)
    with pytest.raises(ValueError) as strict:
        data.scan(folder, strict=True)
    with pytest.raises(FileNotFoundError) as missing:
        data.scan(folder / "c\x1b")
    with pytest.raises(ValueError) as wrong:
        data.scan(folder, pick=["x\n*"])
    with pytest.raises(ValueError) as unknown:
        found.subset(["d\x1b"])
    for text in (str(caught[0].message), *(str(e.value) for e in (strict, missing, wrong, unknown))):
        assert text.isprintable() and "\\x1b" in text
    assert found.names == ["c\x1b[2J\n"] and found.rejected[0].reason.isprintable()
