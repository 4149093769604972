"""Two results side by side."""
import math

import pytest

from irnb.results.comparison import compare, comparison_text
from irnb.results.statistics import bootstrap, paired_bootstrap
from irnb.results.table import TableError
from tests.result_rows import row, table, without


def test_a_result_equals_itself():
    for found in compare(table(noise=.3), table(noise=.3), n=50):
        assert (found["B - A"], found["low"], found["high"]) == (0, 0, 0) and found["A"] == found["B"]


def test_differences_are_the_paired_bootstrap():
    "B's strategy against A's is what `paired_bootstrap` says of two strategies in one table."
    rows = table(noise=.3)
    a = [r for r in rows if r["strategy"] == "supervised"]
    b = [r | {"strategy": "supervised"} for r in rows if r["strategy"] == "ours"]
    for found in compare(a, b, n=300, seed=4):
        want = paired_bootstrap(rows, "ours", "supervised", found["setting"], 300, 4)
        assert (found["B - A"], found["low"], found["high"], found["images"], found["seeds"]) == want
        assert found["B"] - found["A"] == pytest.approx(want.mean)
    assert [r["setting"] for r in compare(a, b, n=10)] == ["sigma_15", "sigma_25", "sigma_50"]
    assert list(compare(a, b, n=10)[0]) == ["task", "strategy", "setting", "A", "B", "B - A", "low", "high", "images", "seeds"]


def test_only_common_pairs_count_and_tasks_stay_apart():
    rows = table(noise=.3)
    fewer = without(without(rows, seed=2), image="img3")
    both = rows + [r | {"task": "deblur", "value": 1.0} for r in rows]
    found = {(r["task"], r["strategy"], r["setting"]): r for r in compare(both, fewer, n=20)}
    assert {task for task, _, _ in found} == {"denoise"} and len(found) == 9
    ours = found["denoise", "ours", "sigma_50"]
    assert (ours["images"], ours["seeds"], ours["B - A"]) == (3, 2, 0)
    assert found["denoise", "degraded", "sigma_50"]["seeds"] == 1


def test_the_text_names_what_only_one_has():
    rows = table()
    text = comparison_text(without(rows, strategy="ours"), [r | {"value": r["value"] + 1} for r in without(rows, strategy="degraded")],
                           names=("old", "new"), n=20)
    assert "| denoise | supervised | sigma_50 |" in text and "A: old, B: new" in text and "| 1.000 | 1.000 | 1.000 | 4 | 3 |" in text
    assert "Only in old: denoise degraded sigma_15, denoise degraded sigma_25, denoise degraded sigma_50." in text
    assert "Only in new: denoise ours sigma_15" in text
    other_seeds = [r | {"seed": 7} if r["strategy"] == "ours" else r for r in rows if r["seed"] in ("-", 0)]
    assert "Only in A: denoise ours sigma_15" in comparison_text(rows, other_seeds, n=20)


def test_nothing_in_common_and_bad_rows():
    for a, b, options in ((table(), [], {}), ([], [], {}), (table(), table(), dict(metric="ssim")), (table(), [row(image="z")], {})):
        with pytest.raises(ValueError, match="share no"):
            compare(a, b, **options)
    with pytest.raises(TableError, match="B, row 2"):
        compare([row()], [row(), row()])
    with pytest.raises(ValueError, match=r"infinite.*\(seed 0, a\)"):
        compare([row()], [row(value=math.inf)])
    hole = [row(seed=s, image=i) for s in (0, 1) for i in "ab"][:-1]
    with pytest.raises(ValueError, match=r"missing \(seed 1, b\)"):
        compare(hole, hole)
    assert bootstrap([[0.0]]).mean == compare([row()], [row()], n=5)[0]["B - A"]
