"""Choose DIL's step sizes on seen levels of the validation pictures only: `python -m experiments.scripts.dil_alpha CORPUS scales/dil_denoise.yaml [VARIANT...]`.

Every variant gets the same grid and one seed that no experiment uses. The rule was fixed before the runs: the largest alpha
whose validation PSNR on seen levels is within 0.1 dB of the grid's best (small steps are ERM, so "the best on seen levels" would always choose no effect).
Writes results/dil_alpha/<experiment>.csv; test pictures and unseen levels are not read.
"""
import csv
import io
import os
import sys
import tempfile
from pathlib import Path

from irnb import pipeline
from irnb.image_files import replacing
from tests.notebooks import ROOT

GRID = {"sf": (3e-3, 1e-2, 3e-2, 1e-1), "pf": (3e-3, 1e-2, 3e-2, 1e-1), "ps": (3e-3, 1e-2, 3e-2), "ss": (3e-3, 1e-2, 3e-2), "ps_mse": (3e-2, 1e-1, 3e-1), "sf_adam": (1e-4, 3e-4, 1e-3)}
SEED, TOLERANCE = 100, 0.1


def choose(rows: list[dict]) -> dict[str, float]:
    "The rule."
    best = {v: max(r["psnr_seen"] for r in rows if r["variant"] == v) for v in {r["variant"] for r in rows}}
    return {v: max(r["alpha"] for r in rows if r["variant"] == v and r["psnr_seen"] >= best[v] - TOLERANCE) for v in best}


def grid(params: dict, steps: int, variants: list[str]) -> list[dict]:
    "Train every variant at every alpha; the last validation PSNR on seen levels."
    params["train"] |= {"steps": steps}
    rows, (task_name,) = [], params["run"]["tasks"]
    for variant in variants:
        for alpha in GRID[variant]:
            name = f"{variant}_{alpha:g}"
            entry = params["strategies"][variant]
            params["strategies"][name] = {**entry, "options": {**entry["options"], "alpha": alpha}, "train": {}}
            try:
                psnr = pipeline.train_run(params, task_name, name, SEED, progress=False).history[-1]["psnr_seen"]
            except FloatingPointError as error:
                print(error)
                psnr = 0.0  # diverged
            rows.append({"variant": variant, "alpha": alpha, "psnr_seen": round(psnr, 4), "steps": steps, "seed": SEED})
            print(rows[-1], flush=True)
    return rows


def main(corpus: str, scale: str, *variants: str, steps: int = 300) -> None:
    params = pipeline.load_params(ROOT / scale)
    params["corpus"] |= {"directory": str(Path(corpus).resolve())}
    out = ROOT / "results" / "dil_alpha" / f"{params['experiment']}.csv"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        params["corpus"]["test"] = params["corpus"]["test"][:1]  # a benchmark needs some; nothing reads it
        pipeline.synthesize(params)
        rows = grid(params, steps, list(variants or GRID))
    if variants and out.exists():  # other variants keep their rows
        kept = [r for r in csv.DictReader(out.read_text().splitlines()) if r["variant"] not in variants]
        rows = [r | {"alpha": float(r["alpha"]), "psnr_seen": float(r["psnr_seen"])} for r in kept] + rows
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    table.writeheader()
    chosen = choose(rows)
    table.writerows(rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as file:
        file.write(text.getvalue().encode())
    print("chosen:", chosen)


if __name__ == "__main__":
    main(*sys.argv[1:])
