"""The explorer: seconds until it stands, and from a slider's movement to the restored picture (the kernel's part)."""
from __future__ import annotations

import time

from irnb.explorer.view import explore
from irnb.networks import build
from tests.notebooks import ROOT


def ratios() -> list[dict]:
    "Rows with the seconds beside their bound."
    net = build("NAFNet", preset="tiny").eval()
    explore({"net": net}).close()
    start = time.perf_counter()
    view = explore({"net": net}, results=ROOT / "results")
    opened = time.perf_counter() - start
    moved = []
    for sigma in range(30, 42):
        view.degradation.sliders["sigma"].value = sigma
        moved.append(view.desk.seconds)
    view.close()
    median = sorted(moved)[len(moved) // 2]
    rows = [("explorer: open with the committed results", opened, 5), ("explorer: slider to restored picture", median, .15)]
    return [{"name": name, "ours_s": seconds, "bound": bound, "ok": seconds <= bound} for name, seconds, bound in rows]
