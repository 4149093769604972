"""The kill storm: training, report and `dvc repro` killed at chosen moments and started again end with the bytes of an undisturbed run."""
import concurrent.futures
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml

from tests.notebooks import ROOT

# `irnb` in a forked process, so that 150 runs do not load PyTorch 150 times. A moment to die is an event and its number:
# before the 4th batch, before the 1st file is flushed to the disk, before the 2nd file is renamed into its place.
SERVER = textwrap.dedent("""
    import importlib, json, os, signal, sys
    import dvclive, matplotlib, torch
    matplotlib.use("Agg")
    import matplotlib.pyplot
    for name in ("data", "degradations", "image_files", "images", "metrics", "networks", "results.figures", "restore", "strategies.dil", "strategies.spn",
                 "strategies.constyle", "strategies.noise_da", "strategies.rcl", "training"):
        importlib.import_module(f"irnb.{name}")
    from irnb import data, pipeline
    torch.set_num_threads(1)

    def watch(place, name, event, die, seen):
        plain = getattr(place, name)
        def call(*arguments, **options):
            seen[event] = seen.get(event, 0) + 1
            if die == [event, seen[event]]:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*arguments, **options)
        setattr(place, name, call)

    def work(job):
        os.chdir(job["folder"])
        log, seen = os.open("log.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND), {}
        os.dup2(log, 1), os.dup2(log, 2)
        for place, name, event in ((os, "fsync", "flush"), (os, "replace", "rename"), (data.Loader, "batch", "batch"), (data.NoisyLoader, "batch", "batch")):
            watch(place, name, event, job["die"], seen)
        code = pipeline.main(job["argv"])
        with open("seen.json", "w") as file:
            json.dump(seen, file)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)

    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                work(json.loads(line))
            finally:
                import traceback
                traceback.print_exc()
                os._exit(70)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
""")


class Server:
    "Runs `irnb` commands one after the other, each in a process of its own."

    def __init__(self):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.job = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
        assert self.job.stdout.readline().strip() == "ready"

    def __call__(self, folder, *argv, die=None):
        "The exit code; -9 if it met the moment to die."
        (folder / "log.txt").unlink(missing_ok=True)
        self.job.stdin.write(json.dumps({"folder": str(folder), "argv": list(map(str, argv)), "die": die}) + "\n")
        self.job.stdin.flush()
        code = int(self.job.stdout.readline())
        assert code in ((0, -signal.SIGKILL) if die else (0,)), f"{argv}: exit code {code}\n{(folder / 'log.txt').read_text()[-3000:]}"
        return code

    def close(self):
        self.job.stdin.close()
        self.job.wait()


@pytest.fixture(scope="module")
def server():
    made = Server()
    yield made
    made.close()


def tree(folder):
    "Relative name -> bytes of every file, without the drafts of killed writers, which .dvcignore names."
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(".irnb-")}


@pytest.fixture(scope="module")
def base(server, tmp_path_factory):
    "A working folder with the data of the smoke scale."
    folder = tmp_path_factory.mktemp("base")
    shutil.copy(ROOT / "scales" / "smoke.yaml", folder / "params.yaml")
    server(folder, "photographs")
    os.symlink(folder / "build" / "photographs", folder / "data")
    server(folder, "synthesize")
    return folder


def workplace(base, folder):
    "A folder with that data and nothing trained."
    (folder / "build").mkdir(parents=True)
    shutil.copy(base / "params.yaml", folder)
    for name in ("build/synthetic", "build/pretrained"):
        if (base / name).exists():
            os.symlink(base / name, folder / name)
    return folder


# Where a run is when each of these is due depends on the kills before it: at first nothing is saved, then the first checkpoint, then the last, then the model.
MOMENTS = [["batch", 4], ["flush", 1], ["rename", 1], ["batch", 23], ["flush", 1], ["rename", 1], ["flush", 2], ["rename", 2], ["rename", 1], ["flush", 2], ["rename", 2]]


def killed_run(server, base, folder, command, strategy, task, moments):
    "Train undisturbed, then killed at these moments until it is through; the number of kills, and of ends that were equal."
    argv = [command, "--task", task, "--strategy", strategy, "--seed", 0]
    out = Path("build/pretrained" if command == "pretrain" else "runs", task, f"{strategy}-0")
    whole, place = workplace(base, folder / "whole"), workplace(base, folder / "killed")
    if command == "pretrain":
        for home in (whole, place):
            (home / "build" / "pretrained").unlink(missing_ok=True)
    server(whole, *argv)
    wanted, kills, ends = tree(whole / out), 0, 0
    assert {"model.safetensors", "env.json", "live/plots/metrics/task_loss.tsv"} <= set(wanted)

    def end():
        assert tree(place / out) == wanted, (strategy, "other bytes", [k for k, v in wanted.items() if tree(place / out).get(k) != v])
        assert not [p for p in (place / "build" / "checkpoints").iterdir() if not p.name.startswith(".irnb-")]
        shutil.rmtree(place / out)
        return 1

    for moment in moments:
        if server(place, *argv, die=moment):
            kills += 1
            model = place / out / "model.safetensors"
            assert not model.exists() or model.read_bytes() == wanted["model.safetensors"]   # whole, or not there
        else:   # it was through before that moment
            ends += end()
    server(place, *argv)
    return kills, ends + end(), whole


@pytest.mark.slow
def test_sample_one_strategy_two_kills(server, base, tmp_path):
    kills, ends, _ = killed_run(server, base, tmp_path, "train", "supervised", "denoise", [["rename", 1], ["batch", 23]])
    assert (kills, ends) == (2, 1)


@pytest.mark.slow
@pytest.mark.storm
def test_every_strategy_killed_ends_with_the_same_bytes(server, base, tmp_path):
    params = yaml.safe_load((base / "params.yaml").read_text())["run"]
    kills, equal, whole = killed_run(server, base, tmp_path / "pretrain", "pretrain", "rcl", "denoise", MOMENTS)
    shutil.copytree(whole / "build" / "pretrained", base / "build" / "pretrained", dirs_exist_ok=True)   # others start from it
    runs = [(s, t) for matrix in (params, params["more"]) for t in matrix["tasks"] for s in matrix["strategies"]]
    servers = [server, Server()]

    def half(number):
        return [killed_run(servers[number], base, tmp_path / f"{t}-{s}", "train", s, t, MOMENTS)[:2] for s, t in runs[number::2]]

    try:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:   # two cores
            counts = [count for part in pool.map(half, range(2)) for count in part]
    finally:
        servers[1].close()
    kills, equal = kills + sum(k for k, _ in counts), equal + sum(e for _, e in counts)
    print(f"\nkill storm, training: {len(runs) + 1} runs, {kills} kills, {equal} ends equal, 0 lost")
    assert len(runs) >= 10 and kills >= 8 * len(runs)


# ---------------------------------------------------------------- report and dvc

def small(folder):
    "One strategy and one seed: every stage, in a minute."
    params = yaml.safe_load((ROOT / "scales" / "smoke.yaml").read_text())
    params["run"] |= {"strategies": ["supervised"], "seeds": [0], "more": {"tasks": [], "strategies": []}, "pretrain": {"tasks": [], "strategies": []}}
    params["train"] |= {"steps": 200}
    params["evaluation"] |= {"tuned": [], "bootstrap": 50}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))


@pytest.mark.slow
@pytest.mark.storm
def test_a_killed_report_is_complete_after_the_next_and_removes_nothing_else(server, base, tmp_path):
    place = workplace(base, tmp_path / "report")
    small(place)
    run = ("--task", "denoise", "--strategy", "supervised", "--seed", 0)
    for argv in (("sources",), ("train", *run), ("evaluate", *run), ("baselines", "--task", "denoise"), ("report",)):
        server(place, *argv)
    out, seen = place / "results" / "smoke", json.loads((place / "seen.json").read_text())
    wanted, foreign = tree(out), {"means.csv": b"by another notebook", "restored/mine.png": b"a picture of mine", "deep/er/notes.md": b"notes"}
    for name, content in foreign.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    moments = [[event, n] for event in ("flush", "rename") for n in sorted({1, 2, seen[event] // 3, seen[event] // 2, 2 * seen[event] // 3, seen[event]} - {0})]
    for number, moment in enumerate(moments):
        if number % 3 == 0:   # a report of which a part is missing, too
            (out / "table.csv").unlink(missing_ok=True)
        assert server(place, "report", die=moment) == -signal.SIGKILL
        assert {k: v for k, v in tree(out).items() if k in foreign} == foreign, moment
    server(place, "report")
    assert tree(out) == wanted | foreign
    assert [p.name for p in (place / "results").iterdir()] == ["smoke"], "something is left beside the report"
    print(f"\nkill storm, report: {len(moments)} kills, complete after the next, {len(foreign)} foreign files, 0 lost")


def dvc(folder):
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    log = open(folder.parent / f"{folder.name}.log", "w+")
    return subprocess.Popen(["dvc", "repro"], cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True), log


def repository(folder):
    "A checkout with the small scale."
    folder.mkdir()
    for name in ("dvc.yaml", "data.dvc", ".dvcignore", ".gitignore", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "irnb", folder / "irnb", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / ".dvc", folder / ".dvc", ignore=shutil.ignore_patterns("tmp", "cache", "config.local"))
    small(folder)
    author = ("-c", "user.name=t", "-c", "user.email=t@t")
    for command in (("init", "-q", "."), ("add", "-A"), (*author, "commit", "-qm", "smoke")):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


# A file that shows that a stage is at work or has just ended, in the order of the stages.
SIGNS = ["build/photographs/*", "build/synthetic/denoise/patches*", "build/synthetic/denoise/test/*", "build/checkpoints/*.pt", "runs/denoise/*/model.safetensors",
         "runs/denoise/*/table.csv", "results/smoke/*"]


@pytest.mark.slow
@pytest.mark.storm
def test_a_killed_dvc_repro_goes_on(tmp_path):
    pytest.importorskip("dvc")
    place, kills = repository(tmp_path / "killed"), 0
    for sign in SIGNS:
        job, _ = dvc(place)
        while not list(place.glob(sign)) and job.poll() is None:
            time.sleep(.005)
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)   # DVC and the stage that it runs
            kills += 1
        job.wait()
    job, log = dvc(place)
    assert job.wait() == 0, log.seek(0) or log.read()[-3000:]   # no lock is in the way
    whole = repository(tmp_path / "whole")
    job, log = dvc(whole)
    assert job.wait() == 0, log.seek(0) or log.read()[-3000:]
    for name in ("results", "runs"):
        assert tree(place / name) == tree(whole / name)
    out = lambda folder: {o["path"]: o["md5"] for s in yaml.safe_load((folder / "dvc.lock").read_text())["stages"].values() for o in s.get("outs", [])}
    assert out(place) == out(whole), "is .irnb-* in .dvcignore? A killed writer leaves its draft, which must not count"
    print(f"\nkill storm, dvc repro: {kills} kills, then the same results, outputs and hashes, 0 lost, no lock left")
    assert kills >= len(SIGNS) - 2
