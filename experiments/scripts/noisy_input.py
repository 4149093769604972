"""PSNR of the noisy input itself on a folder of pictures, a calibration of noise and metric: `python -m experiments.scripts.noisy_input DIR [--out DIR]`.

Noise of sigma 15, 25 and 50 (255 scale) is added, clipped to [0, 1] and, as usual for published tables, rounded to 8 bits before it is measured.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

SIGMAS = (15, 25, 50)


def rows_of(directory: Path) -> list[dict]:
    "Tidy rows of the identity on every picture of a directory."
    from irnb.data import Example, degrade_once, scan
    from irnb.degradations.noise import GaussianNoise
    from irnb.results.baselines import identity
    from irnb.results.measure import evaluate
    from irnb.image_files import read_image
    corpus = scan(directory, min_side=11)
    items = (Example(item.name, f"sigma_{s}", False, degrade_once(clean, GaussianNoise(s), image=item.name, setting=f"sigma_{s}")[None], clean[None])
             for item in corpus for clean in [read_image(item.path)] for s in SIGMAS)
    return evaluate(identity, items, strategy="degraded", task="denoise", quantise=True)


def main(arguments: list[str]) -> int:
    "Print the means; with --out also write the table."
    from irnb.results.table import markdown_table, summary, write_table
    parser = argparse.ArgumentParser(prog="python -m experiments.scripts.noisy_input", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    rows = rows_of(args.directory)
    table = markdown_table(summary(rows))
    print(f"{len({r['image'] for r in rows})} pictures\n\n{table}")
    if args.out:
        write_table(args.out / "table.csv", rows)
        (args.out / "summary.md").write_text(f"Noisy input, {len({r['image'] for r in rows})} pictures, clipped, 8-bit, RGB. "
                                             f"Made by `python -m experiments.scripts.noisy_input DIR --out {args.out}`.\n\n{table}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
