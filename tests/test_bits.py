"""Ten steps of every strategy and variant give the committed numbers, whatever the processor."""
import json

import pytest
import torch

from tests.bits import cases, run
from tests.notebooks import ROOT

COMMITTED = json.loads((ROOT / "tests" / "bits.json").read_text())
TOLERANCE = 1e-6   # relative, in float64; another processor changes about 1e-8


def test_every_case_is_committed():
    assert set(COMMITTED) == set(cases())


@pytest.mark.parametrize("name", cases())
def test_numbers_are_those_committed(name):
    found = run(name, cases()[name], torch.float64)
    for key in ("losses", "gradient", "weights", "output"):
        a, b = (torch.tensor(rows[key], dtype=torch.float64) for rows in (found, COMMITTED[name]))
        assert (a - b).norm() <= TOLERANCE * b.norm(), f"{key}: {a.tolist()} instead of {b.tolist()}"
