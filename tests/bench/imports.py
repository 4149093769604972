"""Start-up: importing the strategies beyond torch, and `irnb --help`."""
from __future__ import annotations

import statistics
import subprocess
import sys
import time


def _seconds(code: str, repeats: int = 5) -> float:
    "Median of what a fresh interpreter prints."
    return statistics.median(float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) for _ in range(repeats))


def _wall(arguments: list[str], repeats: int = 5) -> float:
    "Median wall time of a command."
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run(arguments, capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def ratios() -> list[dict]:
    "Rows with the seconds beside their bound."
    clock = "import torch, time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
    rows = [("import irnb.strategies (and its modules) beyond torch", _seconds(clock.format("irnb.strategies, irnb.strategies.strategy")), .2),
            ("irnb --help", _wall([sys.executable, "-m", "irnb.pipeline", "--help"]), .5)]
    return [{"name": name, "ours_s": seconds, "bound": bound, "ok": seconds <= bound} for name, seconds, bound in rows]
