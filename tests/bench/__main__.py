"""All measured ratios, each computed in one process: `python -m tests.bench [--out FILE] [NAME...]` (degradations, imports, metrics, restore, training)."""
from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

import torch


def show(row: dict) -> str:
    "One line of the report."
    numbers = "  ".join(f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float) and k != "bound")
    return f"  {'ok    ' if row['ok'] else 'MISSED'} {row['name']}: {numbers}  (bound {row['bound']})"


def main(arguments: list[str]) -> int:
    "Print every row, and write them if asked; exit code 1 if one misses its bound."
    from irnb.training import environment
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    report = {"command": "python -m tests.bench " + " ".join(arguments), "environment": environment(), "rows": {}}
    print(" ".join(f"{k}={v}" for k, v in report["environment"].items()))
    for module in sorted(p.stem for p in Path(__file__).parent.glob("*.py") if not p.stem.startswith("_")):
        if not args.names or module in args.names:
            print(f"\n{module}")
            rows = report["rows"][module] = importlib.import_module(f"tests.bench.{module}").ratios()
            print("\n".join(map(show, rows)), flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return int(not all(row["ok"] for rows in report["rows"].values() for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
