"""The one form of an experiment's results."""
import json
import math
import sys

import numpy as np
import pytest

from irnb.results.folder import KEYS, picture_means, read_results, write_results
from irnb.results.table import TableError, read_table, write_table
from tests.result_rows import row, table

pytest.importorskip("pandas")
MADE = {"function": "f", "commit": "unknown: made up", "command": "make"}
HERE = {"python": "3.12"}


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_what_is_written_is_read(tmp_path):
    rows = table(noise=.3)
    write_results(tmp_path / "deep" / "a", rows, HERE, MADE)
    found = read_results(tmp_path / "deep" / "a")
    assert found.rows == [r | {"value": round(r["value"], 4)} for r in rows] and found.about == {**MADE, "environment": HERE}
    assert [list(r) for r in found.means] == [[*KEYS, "images", "value"]] * len(found.means)
    for mean in found.means:
        own = [r["value"] for r in rows if all(r[k] == mean[k] for k in KEYS)]
        assert mean["images"] == len(own) == 4 and mean["value"] == round(np.mean(own), 4)
    assert len(found.means) == 3 * (1 + 3 + 3)   # settings x (degraded, two strategies of three seeds)


def test_same_rows_same_bytes_and_other_files_stay(tmp_path):
    for name in "ab":
        write_results(tmp_path / name, table(), HERE, MADE)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    (tmp_path / "a" / "map.png").write_text("x")
    write_results(tmp_path / "a", table(), "unknown: the machine is gone", MADE)
    assert set(contents(tmp_path / "a")) == {"pictures.csv", "means.csv", "about.json", "map.png"}
    assert read_results(tmp_path / "a").about["environment"] == "unknown: the machine is gone"


def test_the_pictures_are_a_tidy_table_and_the_means_have_few_digits(tmp_path):
    write_results(tmp_path, [row(value=1 / 3), row(image="b", value=2.0), row(image="c", seed="-", strategy="first", value=math.inf)], HERE, MADE)
    assert [r["value"] for r in read_table(tmp_path / "pictures.csv")] == [.3333, 2.0, math.inf]
    assert (tmp_path / "means.csv").read_text().splitlines() == [
        "task,strategy,seed,setting,seen,metric,images,value", "denoise,s,0,sigma_15,true,psnr,2,1.1667", "denoise,first,-,sigma_15,true,psnr,1,inf"]
    assert [r["seed"] for r in read_results(tmp_path).means] == [0, "-"]


def test_names_that_look_like_numbers_stay_names(tmp_path):
    write_results(tmp_path, [row(strategy="1", setting="007", task="NA")], HERE, MADE)
    mean, = read_results(tmp_path).means
    assert (mean["strategy"], mean["setting"], mean["task"], mean["seed"], mean["seen"]) == ("1", "007", "NA", 0, True)


@pytest.mark.parametrize("name", ["function", "commit", "command", "environment"])
@pytest.mark.parametrize("value", [None, "", "unknown"])
def test_what_made_them_must_be_said(tmp_path, name, value):
    made = {**MADE, "environment": HERE, name: value}
    with pytest.raises(ValueError, match=name):
        write_results(tmp_path / "a", [row()], made.pop("environment"), made)
    assert not (tmp_path / "a").exists()


def test_bad_rows_are_refused_before_the_first_write(tmp_path):
    write_results(tmp_path, [row()], HERE, MADE)
    before = contents(tmp_path)
    for rows in ([row(), row()], [row(value="x")], [{"image": "a"}]):
        with pytest.raises(TableError):
            write_results(tmp_path, rows, HERE, MADE)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"function": "f"}', json.dumps({**MADE, "environment": ""})])
def test_a_bad_account_is_refused(tmp_path, text):
    write_results(tmp_path, [row()], HERE, MADE)
    (tmp_path / "about.json").write_text(text)
    with pytest.raises(ValueError, match="about.json"):
        read_results(tmp_path)


def test_bad_means_and_absent_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_results(tmp_path)
    write_results(tmp_path, [row()], HERE, MADE)
    (tmp_path / "means.csv").write_text("a,b\n1,2\n")
    with pytest.raises(TableError, match="means.csv"):
        read_results(tmp_path)
    (tmp_path / "pictures.csv").unlink()
    with pytest.raises(FileNotFoundError):
        read_results(tmp_path)


def test_without_pandas_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r'pip install "irnb\[pipeline\]"'):
        picture_means([row()])
    write_table(tmp_path / "t.csv", [row()])   # the core works without it
