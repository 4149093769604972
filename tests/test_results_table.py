"""Rows, their file, and their means."""
import math
import os
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from irnb.results.table import COLUMNS, TableError, markdown_table, read_table, summary, write_table
from tests.result_rows import row, table, without


NAMES = st.text(st.sampled_from("ab0 ,;\"'|#-+=.\u00e9\u6f22"), min_size=1, max_size=8).filter(str.strip)


@settings(deadline=None, max_examples=60, database=None)
@given(st.lists(st.fixed_dictionaries(dict(
    image=NAMES, task=NAMES, setting=NAMES, strategy=NAMES, metric=NAMES, seed=st.one_of(st.just("-"), st.integers(0, 10**12)),
    seen=st.just(True), value=st.floats(allow_nan=False, width=32))), max_size=6, unique_by=lambda r: tuple(map(str, (
        r["image"], r["task"], r["setting"], r["strategy"], r["seed"], r["metric"])))))
def test_round_trip_is_exact_for_float32_and_byte_stable(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("t") / "t.csv"
    write_table(path, rows)
    first = path.read_bytes()
    got = [r | {"value": float(np.float32(r["value"]))} for r in read_table(path)]   # nine digits identify a float32
    assert got == [{c: r[c] for c in COLUMNS} for r in rows]
    write_table(path, read_table(path))
    assert path.read_bytes() == first


def test_float64_values_are_stable_after_one_rounding(tmp_path):
    values = np.random.default_rng(0).normal(30, 5, 50)
    write_table(tmp_path / "a.csv", [row(image=str(k), value=v) for k, v in enumerate(values)])
    again = read_table(tmp_path / "a.csv")
    write_table(tmp_path / "b.csv", again)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert max(abs(r["value"] - v) for r, v in zip(again, values)) < 1e-6


def test_file_format_is_what_the_docs_say(tmp_path):
    shuffled = dict(reversed(row(image='a,"b"', seed="-", value=np.float32(0.1)).items()))
    write_table(tmp_path / "deep" / "t.csv", [shuffled])
    text = (tmp_path / "deep" / "t.csv").read_bytes().decode()
    assert text == 'image,task,setting,seen,strategy,seed,metric,value\n"a,""b""",denoise,sigma_15,true,s,-,psnr,0.100000001\n'


@pytest.mark.parametrize("change, message", [
    (dict(value=float("nan")), ": value "), (dict(value="30"), ": value "), (dict(value=True), ": value "),
    (dict(seed=-1), ": seed "), (dict(seed=1.0), ": seed "), (dict(seed=True), ": seed "), (dict(seed="x"), ": seed "),
    (dict(seen="true"), ": seen "), (dict(seen=1), ": seen "), (dict(image=""), ": image "), (dict(image="a\r"), ": image "), (dict(metric="\ud800"), ": metric "), (dict(strategy=3), ": strategy "),
    (dict(setting="unseen"), "called 'unseen'"), (dict(extra=1), "unknown ['extra']")])
def test_bad_rows_are_not_written(tmp_path, change, message):
    path = tmp_path / "t.csv"
    write_table(path, [row()])
    before = path.read_bytes()
    with pytest.raises(TableError) as error:
        write_table(path, [row(image="b"), row(**change)])
    assert message in str(error.value) and "row 2" in str(error.value) and "t.csv" in str(error.value)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["t.csv"]


def test_missing_column_duplicates_and_contradictory_seen_flags(tmp_path):
    short = row()
    del short["metric"]
    for rows, message in (([short], r"missing \['metric'\]"), ([row(), row(value=1.0)], "row 2: repeats"),
                          ([row(), row(image="b", seen=False)], "both seen")):
        with pytest.raises(TableError, match=message):
            write_table(tmp_path / "t.csv", rows)
    write_table(tmp_path / "t.csv", [row(), row(task="deblur", seen=False)])   # another task may see it differently


GOOD = "image,task,setting,seen,strategy,seed,metric,value\na,denoise,s15,true,s,0,psnr,30\n"


@pytest.mark.parametrize("text, message", [
    ("", "line 1: .*header"), ("image;task\n", "line 1: .*header"), (GOOD.replace("seen,", "", 1), "line 1: .*header"),
    (GOOD + "b,denoise,s15\n", "line 3: .*8 .*got 3"), (GOOD + GOOD.splitlines()[1] + ",9\n", "line 3: .*8 .*got 9"),
    (GOOD + GOOD.splitlines()[1] + "\n", "line 3: repeats"), (GOOD + "b,denoise,s15,True,s,0,psnr,30\n", "line 3: seen "),
    (GOOD + "b,denoise,s15,true,s,1.5,psnr,30\n", "line 3: seed "), (GOOD + "b,denoise,s15,true,s,-1,psnr,30\n", "line 3: seed "),
    (GOOD + "b,denoise,s15,true,s,0,psnr,abc\n", "line 3: value .*'abc'"), (GOOD + "b,denoise,s15,true,s,0,psnr,nan\n", "line 3: value "),
    (GOOD + ",denoise,s15,true,s,0,psnr,1\n", "line 3: image "), (GOOD + '"b\nc",denoise,s15,true,s,0,psnr,1\n', "line 4: image "),
    (GOOD + '"b', "after line 2: .*CSV")])
def test_bad_files_are_reported_by_line(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(TableError) as error:
        read_table(tmp_path / "t.csv")
    assert re.search(message, str(error.value)) and "t.csv" in str(error.value)


def test_binary_and_absent_files(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(TableError, match="UTF-8"):
        read_table(tmp_path / "t.csv")
    with pytest.raises(FileNotFoundError):
        read_table(tmp_path / "none.csv")
    write_table(tmp_path / "empty.csv", [])
    assert read_table(tmp_path / "empty.csv") == []


@pytest.mark.parametrize("broken", ["write", "replace"])
def test_a_full_disk_leaves_the_old_table(tmp_path, monkeypatch, broken):
    path = tmp_path / "t.csv"
    write_table(path, [row()])
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")
    if broken == "replace":
        monkeypatch.setattr(os, "replace", fail)
    else:
        monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ValueError, match="t.csv.*No space left"):
        write_table(path, [row(value=1.0)])
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["t.csv"]


def test_summary_by_hand():
    rows = table(gain=0.5)
    degraded, reference, ours = summary(rows)
    assert list(degraded) == ["strategy", "metric", "seeds", "sigma_15", "sigma_25", "sigma_50", "seen", "unseen"]
    assert degraded["seeds"] == 0 and degraded["seen"] == degraded["unseen"] == 21.5 and ours["seeds"] == 3
    values = [r["value"] for r in rows if r["strategy"] == "supervised" and r["setting"] == "sigma_50"]
    assert math.isclose(reference["sigma_50"], np.mean(values)) and math.isclose(ours["sigma_50"], np.mean(values) + 0.5)
    assert math.isclose(reference["seen"], (reference["sigma_15"] + reference["sigma_25"]) / 2)
    with_ssim = rows + [r | {"metric": "ssim", "value": 0.5} for r in rows]
    assert [r["metric"] for r in summary(with_ssim)] == ["psnr"] * 3 + ["ssim"] * 3 and len(summary(with_ssim, "ssim")) == 3


def test_summary_gaps_and_errors():
    rows = table()
    gap = summary(without(rows, strategy="ours", setting="sigma_25"))[2]
    assert gap["sigma_25"] is None and gap["seen"] is None and gap["unseen"] is not None
    assert summary([r for r in rows if r["seen"]])[0]["unseen"] is None
    with pytest.raises(ValueError, match=r"'ours' lacks \['img1'\]"):
        summary(without(rows, strategy="ours", setting="sigma_25", image="img1"))
    with pytest.raises(ValueError, match=r"missing \(seed 1, img1\)"):
        summary(without(rows, strategy="ours", setting="sigma_25", image="img1", seed=1))
    with pytest.raises(ValueError, match="no rows"):
        summary([])


def test_markdown_table():
    text = markdown_table([dict(strategy="a|b", metric="psnr", seeds=3, x=1.005, y=None), dict(strategy="c", metric="ssim", seeds=0, x=0.5, y=2.0)])
    assert text.splitlines() == ["| strategy | metric | seeds | x | y |", "| --- | --- | ---: | ---: | ---: |",
                                 "| a\\|b | psnr | 3 | 1.00 | - |", "| c | ssim | 0 | 0.5000 | 2.0000 |"]
    assert "| 1.0 |" in markdown_table([dict(x=1.005)], 1) and "1.005" in markdown_table([dict(metric="m", x=1.005)], {"m": 3})
    with pytest.raises(ValueError, match="no rows"):
        markdown_table([])
    with pytest.raises(ValueError, match="row 2 .*columns"):
        markdown_table([dict(a=1), dict(b=1)])


def test_a_marked_strategy_carries_a_dagger():
    plain, shown = summary(table()), summary(table(), marked=["ours", "absent"])
    assert [r["strategy"] for r in shown] == ["degraded", "supervised", "ours †"]
    assert [dict(r, strategy="") for r in shown] == [dict(r, strategy="") for r in plain]
