"""What did the pre-training learn? `python -m experiments.scripts.rcl_probes scales/rcl_denoise.yaml`, after `dvc repro` of that file.

Every pre-trained network, before any fine-tuning, on the seen settings of the test pictures: the PSNR of its output, the strength of its residual beside that of the noise, and the correlation of the two.
Writes results/<experiment>/probes.csv, one row per pre-training, seed and setting, with means over the pictures. Nothing was chosen by these numbers.
"""
import csv
import io
import sys
from pathlib import Path

import torch

from irnb import pipeline
from irnb.data import Benchmark
from irnb.image_files import replacing
from irnb.metrics import psnr
from irnb.networks import load_model


@torch.inference_mode()
def probe(net: torch.nn.Module, items: list) -> dict[str, float]:
    "Means over pictures; residual and noise in units of the picture's range."
    found = []
    for item in items:
        output, noise = net(item.degraded), item.degraded - item.clean
        r = item.degraded - output
        correlation = torch.nn.functional.cosine_similarity((r - r.mean()).flatten(), (noise - noise.mean()).flatten(), dim=0)
        found.append([psnr(output.clamp(0, 1), item.clean), r.std(), noise.std(), correlation])
    return dict(zip(("psnr", "residual", "noise", "correlation"), torch.tensor(found).mean(0).tolist()))


def main(path: str) -> None:
    params = pipeline.load_params(path)
    pipeline.prepare(params)
    (the_task,), names = params["run"]["pretrain"]["tasks"], params["run"]["pretrain"]["strategies"]
    settings: dict[str, list] = {}
    for item in Benchmark.open(Path("build/synthetic", the_task, "test")):
        if item.seen:
            settings.setdefault(item.setting, []).append(item)
    rows = []
    for name in names:
        for seed in params["run"]["seeds"]:
            net = load_model(pipeline.pretrained_file(the_task, name, seed))[0].eval()
            for setting, items in settings.items():
                rows.append({"pretraining": name, "seed": seed, "setting": setting} | {k: round(v, 4) for k, v in probe(net, items).items()})
                print(rows[-1], flush=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    out = Path("results", params["experiment"], "probes.csv")
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as file:
        file.write(text.getvalue().encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
