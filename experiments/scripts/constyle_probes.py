"""Is the code used, and does it survive pictures larger than the training crops? `python -m experiments.scripts.constyle_probes scales/constyle_mixture.yaml`, after `dvc repro` of that file.

Every trained network of the experiment restores the centre of each Kodak24 picture at several sizes (degraded anew per size, seeded by picture and setting): as it is; told the mean code of all
these pictures; told the code of the picture's centre of 32 px, the size of training; with maps of zeros; and with default statistics of BatchNorm (how the released code evaluates its average).
Writes results/<experiment>/probes.csv: arm, seed, size, treatment, PSNR per setting, and the standard deviation of the codes over the pictures.
"""
import csv
import io
import sys
import tempfile
from pathlib import Path

import torch

from irnb import pipeline
from irnb.data import Benchmark, benchmark
from irnb.image_files import replacing
from irnb.metrics import psnr
from irnb.networks import load_model
from irnb.strategies.constyle import FixedCode, default_statistics

SIZES, TRAINED = (32, 64, 96), 32  # px


def treated(net: torch.nn.Module, batches: dict) -> dict[str, dict]:
    "Restored pictures by treatment and setting; nets that are not conditioned have one treatment."
    plain = {"as it is": {k: net(x) for k, (x, _) in batches.items()}}
    if not hasattr(net, "ConStyle"):
        return plain
    with_codes = lambda x, codes: torch.cat([FixedCode(net, c)(p[None]) for p, c in zip(x, codes)])
    mean = torch.cat([net.encode(x).codes[1] for x, _ in batches.values()]).mean(0)
    twin, muted = default_statistics(net).eval(), FixedCode(net, features=False)
    return plain | {"mean code": {k: FixedCode(net, mean)(x) for k, (x, _) in batches.items()},
                    "code of 32 px": {k: with_codes(x, net.encode(centre(x)).codes[1]) for k, (x, _) in batches.items()},
                    "no maps": {k: muted(x) for k, (x, _) in batches.items()}, "default statistics": {k: twin(x) for k, (x, _) in batches.items()}}


def centre(x: torch.Tensor) -> torch.Tensor:
    "The middle of a batch of pictures, of the size of training."
    top, left = ((n - TRAINED) // 2 for n in x.shape[-2:])
    return x[..., top:top + TRAINED, left:left + TRAINED]


@torch.inference_mode()
def rows_of(params: dict, folder: Path) -> list[dict]:
    "All rows of an experiment."
    (the_task,), rows = params["run"]["tasks"], []
    corpus = pipeline.read_corpus(params)["test"]
    corpus = corpus.subset([n for n in corpus.names if n.startswith("kodak24/")])
    for size in SIZES:
        bench, batches = Benchmark.open(benchmark(corpus, the_task, folder / str(size), crop=size, seed=params["benchmark"]["seed"]).path), {}
        for item in bench:
            if item.seen:
                batches.setdefault(item.setting, []).append(item)
        batches = {k: tuple(torch.cat([getattr(i, part).reshape(1, 3, size, size) for i in v]) for part in ("degraded", "clean")) for k, v in batches.items()}
        for name in params["run"]["strategies"]:
            for seed in params["run"]["seeds"]:
                net = load_model(Path("runs", the_task, f"{name}-{seed}", "model.safetensors"))[0].eval()
                spread = torch.cat([net.encode(x).codes[1] for x, _ in batches.values()]).std(0).mean().item() if hasattr(net, "ConStyle") else ""
                for treatment, restored in treated(net, batches).items():
                    values = {k: round(psnr(z, batches[k][1], quantise=True).mean().item(), 4) for k, z in restored.items()}
                    rows.append({"arm": name, "seed": seed, "size": size, "treatment": treatment, "code_std": spread and round(spread, 5), **values})
                print(rows[-1], flush=True)
    return rows


def main(path: str) -> None:
    params = pipeline.load_params(path)
    pipeline.prepare(params)
    with tempfile.TemporaryDirectory() as folder:
        rows = rows_of(params, Path(folder))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with replacing(Path("results", params["experiment"], "probes.csv")) as file:
        file.write(text.getvalue().encode())


if __name__ == "__main__":
    main(sys.argv[1])
