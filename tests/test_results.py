"""The room of results as a whole: its numbers, its names, and what its modules import."""
import gzip
import json
import subprocess
import sys

import pytest

from irnb.results.statistics import gains
from irnb.results.table import read_table, summary
from tests.notebooks import ROOT

ROOMS = ("table", "folder", "measure", "baselines", "statistics", "comparison", "figures")
NUMBERS = json.loads((ROOT / "tests" / "results_numbers.json").read_text())


def assert_rows_equal(rows, wanted):
    "Same rows with the same names, the numbers to rounding: sums may be ordered otherwise on another machine."
    assert [list(r) for r in rows] == [list(r) for r in wanted]
    for row, want in zip(rows, wanted):
        for name, value in want.items():
            assert row[name] == (pytest.approx(value, rel=1e-12, abs=1e-12) if isinstance(value, float) else value)


@pytest.mark.parametrize("task, reference", [("denoise", "supervised"), ("camera", "source_only")])
def test_numbers_of_a_real_experiment_stay_as_they_were(tmp_path, task, reference):
    "Recorded before the room was divided, from the committed table of that day."
    (tmp_path / "table.csv").write_bytes(gzip.decompress((ROOT / "tests" / "results_table.csv.gz").read_bytes()))
    rows = read_table(tmp_path / "table.csv")
    assert_rows_equal(summary(rows, task=task), NUMBERS[task]["summary"])
    assert_rows_equal(gains(rows, reference, task=task, n=1500), NUMBERS[task]["gains"])


def loaded_by(module):
    code = f"import sys, {module}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize("module", ["irnb.results", *(f"irnb.results.{room}" for room in ROOMS)])
def test_import_is_light(module):
    heavy = {"matplotlib", "skimage", "scipy", "pywt", "IPython", "PIL", "fastcore", "pandas"}
    assert heavy & loaded_by(module) == set()


def test_each_room_knows_those_above_it_only():
    known = {"table": (), "folder": ("table",), "measure": ("table",), "baselines": ("measure", "table"), "statistics": ("table",),
             "comparison": ("statistics", "table"), "figures": ("statistics", "table")}
    for room, others in known.items():
        found = {name for name in loaded_by(f"irnb.results.{room}") if name.startswith("irnb.results.")}
        assert found == {f"irnb.results.{name}" for name in (room, *others)}


def test_all_public_names_are_offered_by_the_package():
    import importlib

    import irnb.results
    public = {name for room in ROOMS for name in importlib.import_module(f"irnb.results.{room}").__all__}
    assert public == set(irnb.results.__all__) and public <= set(dir(irnb.results))
    for name in irnb.results.__all__:
        getattr(irnb.results, name)
    with pytest.raises(AttributeError):
        irnb.results.nothing
