"""Peak memory of `irnb restore` on 24 megapixels, in a process of its own. About 3 minutes on two cores."""
import json, subprocess, sys, tempfile
from pathlib import Path

import numpy as np
import skimage.data
import torch

from irnb.image_files import write_array
from irnb.networks import build, save_model

BOUND_GIB = 1.5
# VmHWM counts this process alone; ru_maxrss, the fallback, starts from the parent's peak after fork and exec.
CHILD = """
import json, re, resource, sys, time
from irnb.restore import main
start = time.perf_counter()
code = main(sys.argv[1:])
seconds = time.perf_counter() - start
kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
try:
    kib = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
except OSError:
    pass
print(json.dumps(dict(code=code, seconds=seconds, gib=kib / 2**20)))
"""


def make_model(path: Path) -> None:
    "The tiny NAFNet with weights that use every path: fresh ones would make it the identity."
    net, g = build("NAFNet", preset="tiny"), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith(("beta", "gamma")):
                p.copy_(0.3 * torch.randn(p.shape, generator=g))
            elif name.endswith("weight") and p.dim() == 4:
                p.copy_(torch.randn(p.shape, generator=g) / p[0].numel() ** 0.5)
        net.ending.weight.mul_(0.1)
    save_model(path, net, {"network": {"name": "NAFNet", "options": {"preset": "tiny"}}})


def make_photograph(path: Path, height: int, width: int) -> None:
    "A real photograph repeated to size, mirrored so that it has no seams."
    photo = skimage.data.coffee()
    pair = np.concatenate([photo, photo[::-1]])
    block = np.concatenate([pair, pair[:, ::-1]], 1)
    times = -(-height // block.shape[0]), -(-width // block.shape[1]), 1
    write_array(path, np.ascontiguousarray(np.tile(block, times)[:height, :width]))


def measure(*arguments: str) -> dict:
    "Run the command in a fresh process: exit code, seconds, peak GiB."
    command = [sys.executable, "-c", CHILD, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def ratios(height: int = 4000, width: int = 6000) -> list[dict]:
    "Peak memory in GiB against the bound, statistics of the whole image."
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_model(folder / "model.safetensors")
        make_photograph(folder / "photo.png", height, width)
        found = measure(folder / "photo.png", "-o", folder / "out", "--model", folder / "model.safetensors",
                        "--device", "cpu")
    return [dict(name=f"irnb restore, {height * width / 1e6:.0f} megapixels, peak GiB", ours_s=found["seconds"],
                 reference_s=None, ratio=found["gib"], bound=BOUND_GIB, ok=found["code"] == 0 and found["gib"] < BOUND_GIB)]


if __name__ == "__main__":
    for line in ratios():
        print(line)
