"""All measured ratios, each computed in one process: `python -m tests.bench [NAME...]` (degradations, metrics, training, restore)."""
from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch


def main(names: list[str]) -> int:
    "Print every row; exit code 1 if one misses its bound."
    torch.set_num_threads(min(2, torch.get_num_threads()))
    modules = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if not p.stem.startswith("_"))
    missed = 0
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for module in [m for m in modules if not names or m in names]:
        print(f"\n{module}")
        for row in importlib.import_module(f"tests.bench.{module}").ratios():
            numbers = "  ".join(f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float) and k != "bound")
            print(f"  {'ok    ' if row['ok'] else 'MISSED'} {row['name']}: {numbers}  (bound {row['bound']})", flush=True)
            missed += not row["ok"]
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
