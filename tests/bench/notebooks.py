"""Seconds that "Run all" takes in each notebook. About eight minutes."""
from __future__ import annotations

import time

from tests.notebooks import ROOT, execute, notebooks

BOUND_S = 180


def ratios() -> list[dict]:
    "A row per notebook, in reading order."
    rows = []
    for path in notebooks():
        start = time.perf_counter()
        execute(path)
        seconds = time.perf_counter() - start
        rows.append({"name": str(path.relative_to(ROOT)), "ours_s": seconds, "bound": BOUND_S, "ok": seconds <= BOUND_S})
    return rows
