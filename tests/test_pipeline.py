"""The pipeline: smoke scale under DVC in a clone, honest dependencies, a sixth strategy by one entry, kills and bad input."""
import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from irnb import pipeline
from irnb.pipeline import ParameterError, arms, load_params, main, pick_pictures, run_settings
from irnb.training import imported_modules, module_closure
from irnb.strategies.features import VGGFileError
from tests.notebooks import ROOT

SCALES = [ROOT / "params.yaml", *sorted((ROOT / "scales").glob("*.yaml"))]


def sh(*command, cwd, check=True, **options):
    environment = os.environ | {"PYTHONPATH": str(cwd), "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, env=environment, **options)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def repro(cwd, *arguments):
    "The stages that ran, in order."
    text = sh("dvc", "repro", *arguments, cwd=cwd).stdout
    return [line.split("'")[1] for line in text.splitlines() if line.startswith("Running stage")]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    "A checkout as git would give it, at the smoke scale, after the first `dvc repro`."
    pytest.importorskip("dvc")
    folder = tmp_path_factory.mktemp("clone")
    for name in ("params.yaml", "dvc.yaml", "data.dvc", ".dvcignore", ".gitignore", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for name in ("irnb", "scales"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / ".dvc", folder / ".dvc", ignore=shutil.ignore_patterns("tmp", "cache", "config.local"))
    shutil.copy(folder / "scales" / "smoke.yaml", folder / "params.yaml")
    sh("git", "init", "-q", ".", cwd=folder)
    sh("git", "add", "-A", cwd=folder)
    sh("git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "smoke", cwd=folder)
    repro(folder)
    return folder


def outs(clone):
    "Stage output -> hash, from dvc.lock."
    lock = yaml.safe_load((clone / "dvc.lock").read_text())["stages"]
    return {out["path"]: out["md5"] for stage in lock.values() for out in stage.get("outs", [])}


@pytest.mark.slow
def test_repro_ends_with_table_figures_and_pictures(clone):
    results = clone / "results" / "smoke"
    assert {p.name for p in results.iterdir()} >= {"table.csv", "summary.md", "metrics.json", "env.json", "denoise_map.png", "denoise_map.svg",
                                                   "denoise_gallery.png", "denoise_curves.png", "denoise_training.png", "training.csv", "settings.csv"}
    from irnb.results.table import read_table
    rows, trained = read_table(results / "table.csv"), load_params(ROOT / "scales" / "smoke.yaml")["run"]["strategies"]
    assert {"supervised", "dil_sf", "dil_ps", "spn_random", "constyle", "constyle_l1", "rcl_k2"} <= set(trained)
    of = lambda name: [r for r in rows if r["task"] == name]
    tuned = {"supervised_tuned_blur", "supervised_tuned_scale"}  # on unseen settings: 3 of 7, and 1 of 4
    assert {r["strategy"] for r in of("denoise")} == {"degraded", "non_local_means", "wavelet", *trained} | tuned
    assert len(of("denoise")) == ((3 + 2 * len(trained)) * 7 + 2 * 2 * 3) * 2 * 2  # untrained and two seeds each, by settings; images; metrics
    assert {r["strategy"] for r in of("camera")} == {"degraded", "non_local_means", "wavelet", "supervised", "noise_da"} | tuned and len(of("camera")) == ((3 + 2 * 2) * 4 + 2 * 2 * 1) * 2 * 2
    assert (results / "label_efficiency.csv").read_text().splitlines()[0] == "task,strategy,labelled,seed,psnr" and len((results / "label_efficiency.csv").read_text().splitlines()) == 5
    from irnb.image_files import read_image
    pictures = sorted((results / "restored").glob("*.png"))
    assert len(pictures) == 2 * (1 + len(trained)) + 2 * (1 + 2) and all(read_image(p).shape == (3, 64, 64) for p in pictures)
    metrics = json.loads((results / "metrics.json").read_text())
    by_hand = [r["value"] for r in of("denoise") if r["strategy"] == "degraded" and r["metric"] == "psnr" and r["seen"]]
    assert abs(metrics["denoise"]["degraded"]["psnr_seen"] - sum(by_hand) / len(by_hand)) < 1e-3


@pytest.mark.slow
def test_second_repro_runs_no_stage(clone):
    before = outs(clone)
    assert repro(clone) == [] and outs(clone) == before


def test_figures_are_a_dependency_of_the_report_alone():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert [name for name, stage in stages.items() if "irnb/results/figures.py" in stage["deps"]] == ["report"]


@pytest.mark.slow
def test_a_forced_report_keeps_what_it_did_not_write(clone):
    "DVC empties the folder of an output before a stage, unless that is told to persist."
    results = clone / "results" / "smoke"
    (results / "means.csv").write_text("of a notebook")
    (results / "restored" / "mine.png").write_bytes(b"of the user")
    before = {p: p.read_bytes() for p in results.rglob("*") if p.is_file()}
    assert repro(clone, "-f", "-s", "report") == ["report"]
    after = {p: p.read_bytes() for p in results.rglob("*") if p.is_file()}
    assert after == before and "means.csv" not in json.loads((results / "manifest.json").read_text())
    (results / "means.csv").unlink(), (results / "restored" / "mine.png").unlink()
    repro(clone, "-s", "report")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["..", "", "."])
def test_no_experiment_name_loses_a_file(clone, name):
    copy = clone / "params.smoke"
    shutil.copy(clone / "params.yaml", copy)
    change(clone / "params.yaml", experiment=name)
    before = {p for p in clone.rglob("*") if p.is_file() and not {".dvc", ".git", "__pycache__"} & set(p.parts)}
    try:
        assert sh("dvc", "repro", cwd=clone, check=False).returncode != 0
        assert {p for p in clone.rglob("*") if p.is_file() and not {".dvc", ".git", "__pycache__"} & set(p.parts)} >= before
    finally:
        copy.replace(clone / "params.yaml")


@pytest.mark.slow
def test_compare_tells_what_is_committed_from_what_is_not(clone):
    results = clone / "results" / "smoke"
    irnb = lambda *more: sh(sys.executable, "-m", "irnb.pipeline", "compare", *more, cwd=clone, check=False)
    missing = irnb()
    assert missing.returncode == 1 and "no metrics.json" in missing.stderr and "Traceback" not in missing.stderr
    sh("git", "add", "-f", "results", cwd=clone)
    sh("git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "results", cwd=clone)
    same = irnb()
    assert same.returncode == 0 and "the same bytes" in same.stdout
    metrics = json.loads((results / "metrics.json").read_text())
    text = (results / "metrics.json").read_bytes()
    for change_by, words, code in ((.05, "within the tolerance of 0.1 dB", 0), (.2, "differs", 1)):
        metrics["denoise"]["supervised"]["psnr_unseen"] += change_by
        (results / "metrics.json").write_text(json.dumps(metrics))
        told = irnb()
        assert told.returncode == code and words in told.stdout and "denoise, unseen: supervised differs most" in told.stdout
    assert irnb("results/smoke").returncode == 0 and "the same bytes" in irnb("results/smoke").stdout
    (results / "metrics.json").write_bytes(text)


@pytest.mark.slow
def test_metrics_and_plots_show(clone):
    shown = json.loads(sh("dvc", "metrics", "show", "--json", cwd=clone).stdout)
    assert "psnr_seen" in json.dumps(shown)
    plots = json.loads(sh("dvc", "plots", "show", "--json", cwd=clone).stdout)
    text = json.dumps(plots)
    assert "PSNR per setting" in text and "Training" in text and not plots.get("errors"), text[:500]


@pytest.mark.slow
def test_training_again_gives_the_same_bytes(clone):
    before = outs(clone)
    sh("dvc", "repro", "-f", "--no-run-cache", "-s", "train@denoise-supervised-1", "evaluate@denoise-supervised-1", cwd=clone)
    after = outs(clone)
    changed = [k for k in before if before[k] != after[k]]
    assert not changed, changed


@pytest.mark.slow
def test_a_killed_training_resumes_to_the_same_bytes(clone, tmp_path):
    for name in ("build", "params.yaml"):
        os.symlink(clone / name, tmp_path / name) if name == "params.yaml" else shutil.copytree(clone / name, tmp_path / name)
    arguments = [sys.executable, "-m", "irnb.pipeline", "train", "--task", "denoise", "--strategy", "supervised", "--seed", "0"]
    environment = os.environ | {"PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(arguments, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "build" / "checkpoints" / "runs-denoise-supervised-0.pt"
    while not checkpoint.exists() and job.poll() is None:
        time.sleep(.002)
    os.kill(job.pid, signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL, "it had finished before it could be killed: slow the smoke scale down"
    assert checkpoint.exists() and not (tmp_path / "runs/denoise/supervised-0/model.safetensors").exists()
    subprocess.run(arguments, cwd=tmp_path, env=environment, check=True, capture_output=True)
    for name in ("model.safetensors", "live/plots/metrics/task_loss.tsv"):
        assert (tmp_path / "runs/denoise/supervised-0" / name).read_bytes() == (clone / "runs/denoise/supervised-0" / name).read_bytes()
    assert not checkpoint.exists()


NEW_STRATEGY = '''
from irnb.strategies.strategy import Supervised

__all__ = ["Brighter"]


class Brighter(Supervised):
    "Supervised on images of random brightness."

    def __init__(self, net, low=.5, *, seed=0):
        super().__init__(net, "charbonnier", seed=seed)
        self.low = low

    def forward(self, batch):
        import torch
        degraded, clean = self.take(batch, "degraded", "clean")
        scale = self.low + (1 - self.low) * torch.rand(len(clean), 1, 1, 1, generator=self.generator(clean.device))
        return super().forward({"degraded": degraded * scale, "clean": clean * scale})
'''


@pytest.mark.slow
def test_a_new_strategy_is_one_module_and_one_entry(clone):
    before = outs(clone)
    (clone / "irnb" / "strategies" / "brighter.py").write_text(NEW_STRATEGY)
    params = yaml.safe_load((clone / "params.yaml").read_text())
    params["strategies"]["brighter"] = {"class": "irnb.strategies.Brighter", "options": {"low": .7}, "train": {"steps": 30}}
    params["run"]["strategies"].append("brighter")
    (clone / "params.yaml").write_text(yaml.safe_dump(params))
    ran = repro(clone)
    assert sorted(ran) == sorted(["sources", "starts", "report", *(f"{s}@denoise-brighter-{k}" for s in ("train", "evaluate") for k in (0, 1))])
    after = outs(clone)
    assert all(after[k] == v for k, v in before.items() if "supervised" in k or "synthetic" in k)
    rows = (clone / "results/smoke/summary.md").read_text()
    assert "| brighter | psnr |" in rows


# ---------------------------------------------------------------- dependencies

def stage_imports(function: str) -> set[str]:
    "The irnb modules that a pipeline function imports, through the helpers of its own module."
    tree = ast.parse((ROOT / "irnb" / "pipeline.py").read_text())
    functions = {n.name: n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    seen, waiting, found = set(), [function], set()
    while waiting:
        name = waiting.pop()
        if name in seen or name not in functions:
            continue
        seen.add(name)
        found |= imported_modules(ast.unparse(functions[name]), "irnb.pipeline")
        waiting += [n.id for n in ast.walk(functions[name]) if isinstance(n, ast.Name)]
    return found | {"irnb.pipeline"}


def missing_deps(stage: dict, function: str) -> list[str]:
    "The modules, followed through their own imports, that a stage uses and does not name."
    deps = stage.get("deps", [])
    closure = module_closure(sorted(stage_imports(function) - {"irnb.pipeline", "irnb"}))
    files = {str(f.resolve().relative_to(ROOT)) for f in closure.values() if f.name != "__init__.py" or f.parent.name != "irnb"} | {"irnb/pipeline.py"}
    return sorted(f for f in files if not {f, *(p.as_posix() for p in Path(f).parents)} & set(deps))


STAGES = {"photographs": "photographs", "synthesize": "synthesize", "sources": "sources", "pretrain": "pretrain_run", "starts": "starts",
          "train": "train_run", "train_more": "train_run", "evaluate": "evaluate_run", "evaluate_more": "evaluate_run",
          "baselines": "baselines", "baselines_more": "baselines", "report": "report"}


@pytest.mark.parametrize("stage", STAGES)
def test_stage_names_the_modules_that_it_imports(stage):
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert set(stages) == set(STAGES)
    assert missing_deps(stages[stage], STAGES[stage]) == []


def test_a_forgotten_dependency_is_found():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    train = stages["train"] | {"deps": [d for d in stages["train"]["deps"] if d != "irnb/metrics.py"]}
    assert missing_deps(train, "train_run") == ["irnb/metrics.py"]


def test_imports_are_followed_through_functions_and_relative_forms():
    source = "from .images import show\ndef f():\n    from irnb import metrics\n    import irnb.data\n"
    assert imported_modules(source, "irnb.restore") == {"irnb.images", "irnb", "irnb.metrics", "irnb.data"}
    assert "irnb.metrics" in module_closure(["irnb.results.measure"])


@pytest.mark.parametrize("source", ["from irnb.degradations import Haze", "from irnb import degradations as deg\ndeg.Haze()", "import irnb.degradations as deg\nx = deg.Haze"])
def test_names_on_demand_are_followed_to_their_module(source):
    assert imported_modules(source, "irnb.data") - {"irnb"} == {"irnb.degradations", "irnb.degradations.weather"}


def test_sources_change_with_the_strategy_and_not_with_its_neighbour(tmp_path, monkeypatch):
    package = tmp_path / "mypackage"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for name in ("one", "two"):
        (package / f"{name}.py").write_text(f"from irnb.strategies import Supervised\nclass {name.title()}(Supervised):\n    'x'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    params = load_params(ROOT / "scales" / "smoke.yaml")
    params |= {"plugins": ["mypackage"], "strategies": {name: {"class": f"mypackage.{name}.{name.title()}"} for name in ("one", "two")}}
    params["run"] |= {"strategies": ["one", "two"], "more": {"tasks": [], "strategies": []}, "pretrain": {"tasks": [], "strategies": []}}
    pipeline.sources(params, tmp_path / "a")
    (package / "two.py").write_text((package / "two.py").read_text() + "\nX = 1\n")
    pipeline.sources(params, tmp_path / "b")
    read = lambda folder, name: (tmp_path / folder / f"{name}.json").read_bytes()
    assert read("a", "one") == read("b", "one") and read("a", "two") != read("b", "two")


# ---------------------------------------------------------------- parameters

@pytest.mark.parametrize("path", SCALES, ids=lambda p: p.parent.name + "-" + p.stem)
def test_scales_load_and_name_what_exists(path):
    from irnb import networks
    from irnb.data import task
    params = load_params(path)
    for name in [*arms(params), *params["run"]["pretrain"]["tasks"]]:
        task(name)
    for name in params["strategies"]:
        settings = run_settings(params, name)
        networks.build(**settings["network"])
        assert settings["config"].steps > 0 and settings["crop"] <= params["patches"]["size"]
    form = lambda values: {k: sorted(set(v) - {"real", "pairs", "groups", "unpaired"}) for k, v in values.items() if k in ("corpus", "patches", "benchmark", "run", "evaluation", "compute")}
    assert form(params) == form(load_params(SCALES[0]))


@pytest.mark.parametrize("path", SCALES, ids=lambda p: p.parent.name + "-" + p.stem)
def test_every_strategy_can_be_made_for_every_task_of_its_scale(path):
    "Options are checked by the constructor: a wrong name would otherwise show after hours."
    from irnb.data import task
    params = load_params(path)
    pretrained = {name: params["run"]["pretrain"]["strategies"] for name in params["run"]["pretrain"]["tasks"]}
    for task_name, names in [*arms(params).items(), *pretrained.items()]:
        for name in names:
            settings = run_settings(params, name, task_name)
            own = {"name": settings["network"]["name"], "preset": "tiny"} if "network" in params["strategies"][name] else {"name": "UNet", "preset": "tiny"}
            network = own | ({"upscale": task(task_name).scale} if task(task_name).scale > 1 else {})
            try:
                settings["class"](pipeline.initial_network(network, 0), seed=0, **settings["options"])
            except VGGFileError:  # the user's own file, which is not here; the bench scale says where to put it
                assert path.stem == "bench" and name in ("spn", "spn_n1", "cr")


@pytest.mark.parametrize("name, scale, size", [("EDSR", 1, 16), ("EDSR", 4, 64), ("SwinIR", 1, 16), ("NAFNet", 4, 64), ("NAFNet", 1, 16)])
def test_a_network_follows_the_scale_of_the_task(name, scale, size):
    import torch
    spec = pipeline.scaled({"name": name, "preset": "tiny"}, scale)
    assert ("upscale" in spec) == (scale > 1 or name != "NAFNet")
    assert pipeline.initial_network(spec, 0)(torch.rand(1, 3, 16, 16)).shape[-1] == size


def test_the_task_takes_its_place_in_the_options():
    params = load_params(ROOT / "scales" / "smoke.yaml")
    params["strategies"]["dil_sf"]["options"] = {"confounders": "$task", "x": ["$task", {"y": "$task"}], "z": "a $task"}
    assert run_settings(params, "dil_sf", "deblur")["options"] == {"confounders": "deblur", "x": ["deblur", {"y": "deblur"}], "z": "a $task"}
    assert run_settings(params, "dil_sf")["options"]["confounders"] == "$task"


@pytest.fixture
def here(tmp_path, monkeypatch):
    "An empty working folder with the smoke parameters."
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "scales" / "smoke.yaml", tmp_path / "params.yaml")
    return tmp_path


def change(path, **changes):
    params = yaml.safe_load(path.read_text())
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            params[section][name] = value
        else:
            params[section] = value
    path.write_text(yaml.safe_dump(params))


@pytest.mark.parametrize("changes, words", [
    ({"experimnt": "x"}, "experimnt.*'experiment'"), ({"corpus__dirctory": "x"}, "corpus.*dirctory.*'directory'"),
    ({"patches__sise": 3}, "patches.*sise.*'size'"), ({"run__strategies": ["dill"]}, "dill"), ({"run": [1]}, "mapping"),
    ({"strategies__supervised": {"klass": "x"}}, "strategies.supervised.*klass"), ({"train__stepss": 10}, "stepss.*'steps'"),
    ({"train__lr": -1}, "train.lr"), ({"strategies__supervised": {"class": "irnb.strategies.Supervized"}}, "import.*Supervized"),
    ({"strategies__supervised": {"class": "irnb.strategies.Supervised", "options": {"loss": "l7"}}}, "loss.*'l7'"),
    ({"network": {"name": "NAFNot"}}, "NAFNot"), ({"network": {"name": "NAFNet", "widht": 3}}, "widht"), ({"run__tasks": ["denoize"]}, "denoize")])
def test_wrong_parameters_are_refused_by_the_command(here, capsys, changes, words):
    change(here / "params.yaml", **changes)
    task = yaml.safe_load((here / "params.yaml").read_text())
    name = task["run"]["tasks"][0] if isinstance(task["run"], dict) else "denoise"
    assert main(["train", "--task", name, "--strategy", "supervised", "--seed", "0"]) == 1
    assert re.search(words, capsys.readouterr().err.replace("\n", " "))
    assert not (here / "runs").exists() or not list((here / "runs").rglob("model*"))


def test_missing_and_broken_parameter_files(here, capsys):
    assert main(["report", "--params", "none.yaml"]) == 1 and "none.yaml: " in capsys.readouterr().err
    (here / "bad.yaml").write_text("a: [1\nb: }")
    assert main(["report", "--params", "bad.yaml"]) == 1 and "not valid YAML" in capsys.readouterr().err
    (here / "few.yaml").write_text("experiment: x\n")
    assert main(["report", "--params", "few.yaml"]) == 1 and "is missing" in capsys.readouterr().err
    (here / "empty.yaml").write_text("")
    assert main(["report", "--params", "empty.yaml"]) == 1 and "mapping" in capsys.readouterr().err


def test_results_before_a_report(here, capsys):
    assert main(["results"]) == 1 and "dvc repro" in capsys.readouterr().err


def test_wrong_usage_exits_with_two(capsys):
    for arguments in ([], ["trian"], ["train", "--task", "denoise"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2


# ---------------------------------------------------------------- corpora

def picture(path, size=(96, 96), seed=0):
    import torch
    from irnb.image_files import write_image
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, torch.rand(3, *size, generator=torch.Generator().manual_seed(seed)))


def corpus_params(here, **corpus):
    change(here / "params.yaml", corpus={"directory": "mine", "min_side": 64, "train": ["train/*"], "validation": ["val/*"], "test": ["test/*"]} | corpus)


def test_a_folder_of_own_pictures_is_one_parameter(here, capsys):
    for i, part in enumerate(("train", "train", "val", "test")):
        picture(here / "mine" / part / f"{i}.png", seed=i)
    (here / "mine" / "train" / "text.png").write_text("no picture")
    (here / "mine" / "train" / "empty.png").write_bytes(b"")
    picture(here / "mine" / "train" / "one_pixel.png", (1, 1))
    corpus_params(here)
    with pytest.warns(UserWarning, match="text.png|text"):
        assert main(["synthesize"]) == 0
    assert (here / "build/synthetic/denoise/patches/index.json").exists()


@pytest.mark.parametrize("prepare, words", [
    (lambda here: None, "mine"), (lambda here: (here / "mine").mkdir(), "mine"),
    (lambda here: [picture(here / "mine" / "train" / "a.png"), picture(here / "mine" / "val" / "b.png", seed=1)], "corpus.test.*'test/\\*'"),
    (lambda here: [picture(here / "mine" / p / "a.png") for p in ("train", "val", "test")], "same content"),
    (lambda here: [picture(here / "mine" / p / "a.png", (70, 70), i) for i, p in enumerate(("train", "val", "test"))], "size|patch|tile")],
    ids=["missing", "empty", "fewer than splits", "same file twice", "smaller than a patch"])
def test_bad_corpora_are_refused_and_leave_nothing(here, capsys, prepare, words):
    prepare(here)
    corpus_params(here)
    assert main(["synthesize"]) == 1
    assert re.search(words, capsys.readouterr().err)
    assert not list(here.glob("build/synthetic/denoise/*/index.json"))


def test_unpaired_task_gets_real_patches_from_other_scenes(here):
    from irnb.data import PatchSet
    for i in range(4):
        picture(here / "mine" / "train" / f"{i}.png", seed=i)
    picture(here / "mine" / "val" / "v.png", seed=8), picture(here / "mine" / "test" / "t.png", seed=9)
    corpus_params(here)
    change(here / "params.yaml", run__tasks=["camera"], run__strategies=["supervised"])
    assert main(["synthesize"]) == 0
    pairs, real = (PatchSet.open(here / "build/synthetic/camera" / name) for name in ("patches", "real"))
    assert not set(pairs.sources) & set(real.sources) and len(pairs.sources) == len(real.sources) == 2


def named_scenes(here, **corpus):
    for i in range(4):
        picture(here / "mine" / "train" / f"s{i % 3}_{i}.png", seed=i)
    picture(here / "mine" / "val" / "v.png", seed=8), picture(here / "mine" / "test" / "t.png", seed=9)
    corpus_params(here, groups=r"train/(s\d)_", **corpus)
    change(here / "params.yaml", run__tasks=["camera"], run__strategies=["supervised"])


def test_the_scenes_of_the_target_domain_can_be_named_and_are_taken_whole(here):
    from irnb.data import PatchSet
    named_scenes(here, unpaired=["train/s0_0"])
    assert main(["synthesize"]) == 0
    pairs, real = (sorted(Path(s).stem for s in PatchSet.open(here / "build/synthetic/camera" / name).sources) for name in ("patches", "real"))
    assert pairs == ["s1_1", "s2_2"] and real == ["s0_0", "s0_3"]


@pytest.mark.parametrize("corpus, words", [({"unpaired": ["train/*"]}, "corpus.unpaired.* 3 of the 3 "),
                                           ({"unpaired": ["train/s9*"]}, "corpus.unpaired.*'train/s9\\*'"), ({"unpaired": []}, "corpus.unpaired.* 0 of the 3 "),
                                           ({"unpaired": ["train/s0_0"], "real": {"directory": "phone"}}, "corpus.unpaired.*corpus.real")])
def test_bad_scenes_of_the_target_domain(here, capsys, corpus, words):
    named_scenes(here, **corpus)
    assert main(["synthesize"]) == 1
    assert re.search(words, capsys.readouterr().err)


def test_every_task_has_its_reference(here, capsys):
    change(here / "params.yaml", run__more={"tasks": ["camera"], "strategies": ["dil_sf"]})
    for reference in ("supervised", {"denoise": "supervised"}, {"denoise": "supervised", "camera": "supervised"}):
        change(here / "params.yaml", evaluation__reference=reference)
        assert main(["synthesize"]) == 1
        assert re.search("evaluation.reference.*'camera'.*'dil_sf'", capsys.readouterr().err)
    change(here / "params.yaml", evaluation__reference={"denoise": "supervised", "camera": "degraded"})
    params = pipeline.load_params(here / "params.yaml")
    assert [pipeline.reference_of(params, t) for t in ("denoise", "camera")] == ["supervised", "degraded"]


def real_folder(here, **real):
    "A corpus of four training pictures, and a folder of noisy pictures with their ground truth beside them."
    for i in range(4):
        picture(here / "mine" / "train" / f"{i}.png", seed=i)
    picture(here / "mine" / "val" / "v.png", seed=8), picture(here / "mine" / "test" / "t.png", seed=9)
    for i in range(3):
        picture(here / "phone" / f"scene{i}_real.png", seed=20 + i), picture(here / "phone" / f"scene{i}_mean.png", seed=30 + i)
    corpus_params(here, real={"directory": "phone", "pictures": ["scene[01]_real"]} | real)


def test_real_pictures_come_from_their_own_folder_and_their_ground_truth_is_not_opened(here, monkeypatch):
    from irnb import data
    real_folder(here)
    opened = []
    monkeypatch.setattr(data, "read_picture", lambda path, read=data.read_picture: (opened.append(Path(path).name), read(path))[1])
    monkeypatch.setattr(data, "read_image", lambda path, read=data.read_image, **o: (opened.append(Path(path).name), read(path, **o))[1])
    monkeypatch.setattr(data, "_sha256", lambda path, read=data._sha256: (opened.append(Path(path).name), read(path))[1])
    assert main(["synthesize"]) == 0
    assert {"scene0_real.png", "scene1_real.png"} <= set(opened) and not {n for n in opened if "mean" in n or "scene2" in n}
    pairs, real = (data.PatchSet.open(here / "build/synthetic/denoise" / name) for name in ("patches", "real"))
    assert real.sources == ("scene0_real", "scene1_real") and len(pairs.sources) == 4


@pytest.mark.parametrize("prepare, real, words", [
    (lambda here: None, {"directory": "nowhere"}, "corpus.real: nowhere: "),
    (lambda here: (here / "void").mkdir(), {"directory": "void", "pictures": None}, "corpus.real: void: "),
    (lambda here: None, {"pictures": ["*_fake"]}, r"corpus.real: phone: '\*_fake'.* 6 "),
    (lambda here: picture(here / "small" / "a.png", (40, 40)), {"directory": "small", "pictures": None}, "corpus.real.*(at least|smaller)"),
    (lambda here: shutil.copy(here / "mine/train/2.png", here / "phone/scene7_real.png"), {"pictures": ["*_real"]}, "'train/2'.*corpus.real.allow_shared"),
    (lambda here: None, {"pictrues": ["*"]}, "corpus.real: .*'pictrues'")],
    ids=["missing", "empty", "pattern", "smaller than the patch", "shared", "misspelt"])
def test_bad_real_folders_are_refused(here, capsys, prepare, real, words):
    real_folder(here, **real)
    prepare(here)
    assert main(["synthesize"]) == 1
    assert re.search(words, capsys.readouterr().err.replace("\n", " "))
    assert not list(here.glob("build/synthetic/denoise/*/index.json"))


def test_shared_real_pictures_can_be_allowed(here):
    real_folder(here, pictures=["*_real"], allow_shared=True)
    shutil.copy(here / "mine/train/2.png", here / "phone/scene7_real.png")
    assert main(["synthesize"]) == 0


def test_pairs_of_files_become_the_unseen_setting_real(here):
    import torch
    from irnb.data import Benchmark
    from irnb.image_files import read_image
    real_folder(here)
    change(here / "params.yaml", corpus=load_params(here / "params.yaml")["corpus"] | {"pairs": {"directory": "phone", "pictures": ["scene[02]"]}}, benchmark={"crop": None, "seed": 0})
    assert main(["synthesize"]) == 0
    bench = Benchmark.open(here / "build/synthetic/denoise/test", verify=True)
    assert bench.settings["real"] is False and "real" not in Benchmark.open(here / "build/synthetic/denoise/validation").settings
    shown = list(bench.select(settings=["real"]))
    assert [e.image for e in shown] == ["scene0", "scene2"]
    assert torch.equal(shown[1].degraded[0], read_image(here / "phone/scene2_real.png")) and torch.equal(shown[1].clean[0], read_image(here / "phone/scene2_mean.png"))
    assert len(list(bench)) == 7 + 2


@pytest.mark.parametrize("pairs, words", [({"directory": "phone", "clean": "*_truth"}, "'scene0_truth'"), ({"directory": "phone", "degraded": "real"}, "'real'"),
                                          ({"directory": "phone", "pictures": ["z*"]}, "['z*']"), ({"directory": "nowhere"}, "nowhere: ")])
def test_bad_pairs_are_refused(here, capsys, pairs, words):
    real_folder(here)
    change(here / "params.yaml", corpus=load_params(here / "params.yaml")["corpus"] | {"pairs": pairs})
    assert main(["synthesize"]) == 1
    error = capsys.readouterr().err
    assert "corpus.pairs" in error and words in error


def test_a_strategy_that_needs_real_pictures_says_so_on_a_task_without(here):
    import types
    from irnb.data import task
    for i, part in enumerate(("train", "train", "val", "test")):
        picture(here / "mine" / part / f"{i}.png", seed=i)
    corpus_params(here)
    assert main(["synthesize"]) == 0
    settings = run_settings(load_params(here / "params.yaml"), "supervised", "denoise")
    with pytest.raises(ParameterError, match="Supervised.*'real'.*'denoise'"):
        pipeline.open_loader(here / "build/synthetic/denoise", task("denoise"), settings, types.SimpleNamespace(needs=("degraded", "clean", "real")), 0)


# ---------------------------------------------------------------- a second matrix, pre-training, few labels

def test_arms_are_the_two_matrices():
    params = load_params(ROOT / "scales" / "smoke.yaml")
    params["run"] |= {"tasks": ["denoise", "deblur"], "strategies": ["a", "b"], "more": {"tasks": ["camera", "deblur"], "strategies": ["b", "c"]}}
    assert arms(params) == {"denoise": ["a", "b"], "deblur": ["a", "b", "c"], "camera": ["b", "c"]}


@pytest.mark.parametrize("part", ["more", "pretrain"])
def test_a_second_matrix_names_what_exists(here, capsys, part):
    change(here / "params.yaml", **{f"run__{part}": {"tasks": ["denoise"], "strategies": ["dill"]}})
    assert main(["report"]) == 1 and re.search(f"run.{part}.strategies.*'dill'", capsys.readouterr().err)


def test_a_strategy_is_not_called_like_an_untrained_row(here, capsys):
    from irnb.results.baselines import untrained
    assert set(pipeline.UNTRAINED) == {*untrained(), *untrained(4), *untrained(raw=True)}
    params = load_params(here / "params.yaml")
    change(here / "params.yaml", strategies=params["strategies"] | {"degraded": params["strategies"]["supervised"]}, run__strategies=["supervised", "degraded"])
    assert main(["report"]) == 1 and "called 'degraded'" in capsys.readouterr().err


def with_pretraining(here, **entry):
    "Smoke pictures, a short pre-training and a run that starts from it."
    for i, part in enumerate(("train", "train", "train", "val", "test")):
        picture(here / "mine" / part / f"{i}.png", seed=i)
    corpus_params(here)
    params = yaml.safe_load((here / "params.yaml").read_text())
    short = {"steps": 4, "warmup": 0, "log_every": 2, "validate_every": 0, "checkpoint_every": 2, "ema": 0}
    params["train"] |= short
    params["strategies"] |= {"before": {"class": "irnb.strategies.Supervised"}, "after": {"class": "irnb.strategies.Supervised", "start": "before", "train": {"lr": 1e-12, "final_lr": 1e-12}, **entry}}
    params["run"] |= {"tasks": ["denoise"], "strategies": ["after"], "seeds": [0], "pretrain": {"tasks": ["denoise"], "strategies": ["before"]}}
    params["evaluation"]["reference"] = "degraded"  # what every task has
    (here / "params.yaml").write_text(yaml.safe_dump(params))
    assert main(["synthesize"]) == 0 and main(["sources"]) == 0


RUN = ["--task", "denoise", "--seed", "0", "--strategy"]


def test_a_run_starts_from_pretrained_weights(here):
    import torch
    from irnb.networks import load_model
    with_pretraining(here)
    assert main(["pretrain", *RUN, "before"]) == 0 and main(["starts"]) == 0 and main(["train", *RUN, "after"]) == 0
    before, after = (load_model(f)[0].state_dict() for f in ("build/pretrained/denoise/before-0/model.safetensors", "runs/denoise/after-0/model.safetensors"))
    fresh = pipeline.initial_network(load_params()["network"], 0).state_dict()
    assert all(torch.allclose(before[k], after[k], atol=1e-7) for k in before) and any(not torch.allclose(before[k], fresh[k], atol=1e-5) for k in before)
    noted = json.loads((here / "build/starts/denoise/after-0.json").read_text())
    import hashlib
    assert noted == {"file": "build/pretrained/denoise/before-0/model.safetensors", "sha256": hashlib.sha256(Path("build/pretrained/denoise/before-0/model.safetensors").read_bytes()).hexdigest()}


def test_pretrained_weights_of_another_network_are_refused(here, capsys):
    with_pretraining(here, network={"name": "UNet", "preset": "tiny"})
    assert main(["pretrain", *RUN, "before"]) == 0
    assert main(["train", *RUN, "after"]) == 1 and re.search("before-0/model.safetensors: .*network", capsys.readouterr().err)


@pytest.mark.parametrize("start, words", [("nothing", "after.start: 'nothing'.*'denoise'"), ({"strategy": "before", "task": "sr4"}, "after.start: 'before'.*'sr4'"),
                                          ({"strategi": "before"}, "strategi'.*'strategy'")])
def test_wrong_starts_are_refused(here, capsys, start, words):
    with_pretraining(here)
    change(here / "params.yaml", strategies=load_params()["strategies"] | {"after": {"class": "irnb.strategies.Supervised", "start": start}})
    assert main(["synthesize"]) == 1 and re.search(words, capsys.readouterr().err)


def test_pretrained_weights_go_into_the_network_below_an_enlargement(here):
    import torch
    from irnb.networks import load_model
    with_pretraining(here, start={"strategy": "before", "task": "denoise"})
    assert main(["pretrain", *RUN, "before"]) == 0
    net = pipeline.begin_from(pipeline.initial_network({**load_params()["network"], "upscale": 4}, 0), ("denoise", "before"), 0)
    weights = load_model("build/pretrained/denoise/before-0/model.safetensors")[0].state_dict()
    assert all(torch.equal(net.net.state_dict()[k], v) for k, v in weights.items())


def test_pretraining_from_noisy_pictures_opens_no_clean_file(here, monkeypatch):
    "RCL's promise, at the level of files: neither patches of clean pictures nor the validation pictures are read."
    from irnb import data
    with_pretraining(here)
    params = yaml.safe_load((here / "params.yaml").read_text())
    params["strategies"]["before"] = {"class": "irnb.strategies.RCL", "train": {"batch": 3, "crop": 48, "validate_every": 2}}
    (here / "params.yaml").write_text(yaml.safe_dump(params))
    opened = []
    monkeypatch.setattr(data, "_load_npy", lambda path, *a, read=data._load_npy, **k: (opened.append(str(path)), read(path, *a, **k))[1])
    monkeypatch.setattr(data, "read_image", lambda *a, **k: pytest.fail("a picture was read"))
    assert main(["pretrain", *RUN, "before"]) == 0
    assert opened == ["build/synthetic/denoise/noisy/patches.npy"]


def test_a_strategy_without_clean_pictures_needs_a_pretraining_task(here, capsys):
    with_pretraining(here)
    params = yaml.safe_load((here / "params.yaml").read_text())
    params["strategies"]["before"] = {"class": "irnb.strategies.RCL"}
    shutil.rmtree(here / "build/synthetic/denoise/noisy")
    (here / "params.yaml").write_text(yaml.safe_dump(params))
    assert main(["pretrain", *RUN, "before"]) == 1 and re.search("RCL.*run.pretrain.tasks", capsys.readouterr().err)


def noisy_folder(here, **noisy):
    "Pre-training pictures of mixed sizes, bit depths and channels, with a broken one among them."
    from skimage.io import imsave
    with_pretraining(here)
    rng = np.random.default_rng(0)
    (here / "night" / "deep").mkdir(parents=True)
    imsave(here / "night/a.tif", rng.integers(0, 2**16, (110, 100, 3), dtype=np.uint16), check_contrast=False)
    imsave(here / "night/deep/b.tif", rng.integers(0, 2**8, (96, 150), dtype=np.uint8), check_contrast=False)
    picture(here / "night/c.png", seed=40), picture(here / "night/c_truth.png", seed=41)
    (here / "night/d_broken.png").write_bytes(b"no picture")
    corpus_params(here, noisy={"directory": "night", "pictures": ["a", "deep/b", "c", "d_*"]} | noisy)


def test_own_noisy_pictures_of_any_size_and_depth_are_used_as_they_are(here, capsys):
    from irnb.data import PatchSet
    from irnb.image_files import read_image
    noisy_folder(here)
    with pytest.warns(UserWarning, match="d_broken"):
        assert main(["synthesize"]) == 0
    folder = here / "build/synthetic/denoise"
    patches = PatchSet.open(folder / "noisy")
    assert patches.sources == ("a", "c", "b") or set(patches.sources) == {"a", "c", "deep/b"}
    assert not (folder / "noisy2").exists() and patches.pixels.dtype == np.float16
    first, size = np.asarray(patches.pixels)[list(patches.source).index(patches.sources.index("a"))], patches.size
    whole = read_image(here / "night/a.tif").half().permute(1, 2, 0).numpy()
    windows = np.lib.stride_tricks.sliding_window_view(whole, (size, size, 3))
    assert (windows == first).all(axis=(-1, -2, -3)).any()  # 16 bits are kept as far as half precision goes: a tile is a window of the file's numbers
    params = yaml.safe_load((here / "params.yaml").read_text())
    params["strategies"]["before"] = {"class": "irnb.strategies.RCL", "train": {"batch": 3, "crop": 48}}
    (here / "params.yaml").write_text(yaml.safe_dump(params))
    assert main(["pretrain", *RUN, "before"]) == 0
    params["strategies"]["before"] = {"class": "irnb.strategies.Noise2Noise"}
    (here / "params.yaml").write_text(yaml.safe_dump(params))
    assert main(["pretrain", *RUN, "before"]) == 1 and re.search("Noise2Noise.*corpus.noisy", capsys.readouterr().err)


@pytest.mark.filterwarnings("ignore:.*d_broken")
@pytest.mark.parametrize("prepare, noisy, words", [
    (lambda here: None, {"directory": "nowhere"}, "corpus.noisy: nowhere: "),
    (lambda here: None, {"pictures": ["z*"]}, r"corpus.noisy: night: 'z\*'"),
    (lambda here: shutil.copy(here / "mine/test/4.png", here / "night/c.png"), {}, "test.*'test/4'.*corpus.noisy.allow_shared"),
    (lambda here: change(here / "params.yaml", run__pretrain={"tasks": ["denoise", "jdd"], "strategies": ["before"]}), {}, "corpus.noisy.*'jdd'")],
    ids=["missing", "pattern", "shared", "raw"])
def test_bad_noisy_folders_are_refused(here, capsys, prepare, noisy, words):
    noisy_folder(here, **noisy)
    prepare(here)
    assert main(["synthesize"]) == 1
    assert re.search(words, capsys.readouterr().err.replace("\n", " "))


def test_tuned_rivals_stand_beside_their_strategy_on_unseen_settings(here):
    from irnb.results.table import read_table
    with_pretraining(here)
    change(here / "params.yaml", evaluation__tuned=["before"], evaluation__metrics=["psnr", "high_frequency_ratio"], run__strategies=["before"])
    assert main(["train", *RUN, "before"]) == 0 and main(["evaluate", *RUN, "before"]) == 0
    rows = read_table(here / "runs/denoise/before-0/table.csv")
    mean = {}
    for r in rows:
        if r["metric"] == "psnr" and not r["seen"]:
            mean.setdefault((r["strategy"], r["setting"]), []).append(r["value"])
    mean = {k: sum(v) / len(v) for k, v in mean.items()}
    settings = {s for _, s in mean}
    assert {s for s, _ in mean} == {"before", "before_tuned_blur", "before_tuned_scale"} and {r["metric"] for r in rows} == {"psnr", "high_frequency_ratio"}
    assert all(mean[f"before_tuned_{k}", s] >= mean["before", s] - 1e-9 for k in ("blur", "scale") for s in settings)  # 0 px and factor 1 are among the candidates
    assert {r["strategy"] for r in rows if r["seen"]} == {"before"}
    change(here / "params.yaml", evaluation__tuned=["befor"])
    assert main(["evaluate", *RUN, "before"]) == 1


def test_pictures_that_a_degradation_did_not_touch_are_left_out_by_name():
    rows = [{"image": i, "setting": k, "value": v} for i, k, v in (("a", "rain", 30.), ("a", "haze", 20.), ("b", "rain", float("inf")), ("b", "haze", 21.))]
    assert pipeline.without_perfect(rows) == (rows[:2], ["b"]) and pipeline.without_perfect(rows[:2]) == (rows[:2], [])
    with pytest.raises(ValueError, match="infinite.*'b'"):
        pipeline.without_perfect(rows[2:])


def test_label_rows_are_means_over_seen_settings():
    params = {"strategies": {"rcl_k4": {"labels": 4}, "rcl": {}}}
    row = lambda **k: {"task": "t", "strategy": "rcl_k4", "seed": 1, "metric": "psnr", "seen": True, "value": 30.0} | k
    rows = [row(), row(value=32.0), row(seen=False, value=0.0), row(metric="ssim", value=.9), row(strategy="rcl"), row(seed=2, value=29.0)]
    assert pipeline.label_rows(params, rows) == [{"task": "t", "strategy": "rcl", "labelled": 4, "seed": 1, "psnr": 31.0}, {"task": "t", "strategy": "rcl", "labelled": 4, "seed": 2, "psnr": 29.0}]


def test_labels_limit_the_training_pictures(here, capsys):
    from irnb.data import task
    with_pretraining(here, labels=2)
    params = load_params()
    strategy = run_settings(params, "before")["class"](pipeline.initial_network(params["network"], 0))
    chosen = [pipeline.open_loader(here / "build/synthetic/denoise", task("denoise"), run_settings(params, "after", "denoise") | {"labels": k}, strategy, 5).patches for k in (1, 2, None)]
    assert [len(p.sources) for p in chosen] == [1, 2, 3] and set(chosen[0].sources) < set(chosen[1].sources)
    change(here / "params.yaml", strategies=params["strategies"] | {"after": params["strategies"]["after"] | {"labels": 9}})
    assert main(["pretrain", *RUN, "before"]) == 0
    assert main(["train", *RUN, "after"]) == 1 and re.search(" 9 labelled.* 3;", capsys.readouterr().err)


def test_damaged_model_and_benchmark(here, capsys):
    run = ["evaluate", "--task", "denoise", "--strategy", "supervised", "--seed", "0"]
    assert main(run) == 1 and "model.safetensors" in capsys.readouterr().err
    (here / "runs/denoise/supervised-0").mkdir(parents=True)
    (here / "runs/denoise/supervised-0/model.safetensors").write_bytes(b"\x00" * 40)
    assert main(run) == 1 and "model.safetensors" in capsys.readouterr().err
    assert main(["baselines", "--task", "denoise"]) == 1 and "build" in capsys.readouterr().err


def test_disk_full_leaves_no_half_report(here, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ValueError, match="No space left"):
        pipeline._write_json(here / "out" / "x.json", {"a": 1})
    assert list((here / "out").iterdir()) == []


def test_pick_pictures():
    names = ["a/1", "a/2", "b/1"]
    assert pick_pictures(names, ["b/*", "a/2"], "train") == ["a/2", "b/1"]
    with pytest.raises(ParameterError, match=r"corpus\.test: 'c/\*'"):
        pick_pictures(names, ["c/*"], "test")


def test_curves_in_a_repository_without_dvc_are_written_without_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    log, close = pipeline._curves(tmp_path / "live")
    for step in (3, 6):
        log({"step": step, "task_loss": step / 10})
    close()
    assert not (tmp_path / ".dvc").exists() and not (tmp_path / ".dvcignore").exists()
    assert (tmp_path / "live/plots/metrics/task_loss.tsv").read_text() == "step\ttask_loss\n3\t0.3\n6\t0.6\n"
    assert json.loads((tmp_path / "live/metrics.json").read_text()) == {"step": 6, "task_loss": .6}


def test_curves_under_dvc_are_the_same_files(tmp_path, monkeypatch):
    pytest.importorskip("dvclive")
    monkeypatch.chdir(tmp_path)
    subprocess.run("git init -q && dvc init -q", shell=True, check=True)
    with pytest.raises(OSError, match="/live: .*git commit"):
        pipeline._curves(tmp_path / "live")
    assert not (tmp_path / "live").exists()
    subprocess.run("git -c user.name=a -c user.email=a@b commit -q --allow-empty -m start", shell=True, check=True)
    for folder, (log, close) in {"live": pipeline._curves(tmp_path / "live"), "plain": pipeline._plain_curves(tmp_path / "plain")}.items():
        for step in (3, 6):
            log({"step": step, "task_loss": step / 10, "grad_norm": 1 / 3})
        close()
    read = lambda folder: {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.tsv")}
    assert read(tmp_path / "live") == read(tmp_path / "plain") and len(read(tmp_path / "live")) == 2


def test_training_without_dvclive_needs_no_dvclive(here, monkeypatch):
    with_pretraining(here)
    (here / ".dvc").mkdir()
    find = pipeline.importlib.util.find_spec
    monkeypatch.setattr(pipeline.importlib.util, "find_spec", lambda name, *a: None if name == "dvclive" else find(name, *a))
    assert main(["pretrain", *RUN, "before"]) == 0
    assert "step\ttask_loss" in (here / "build/pretrained/denoise/before-0/live/plots/metrics/task_loss.tsv").read_text()


def test_a_run_is_trained_by_one_process_at_a_time(here, capsys):
    with_pretraining(here)
    holder = ("import sys\nfrom irnb.training import run_lock\nwith run_lock('build/checkpoints/pretrained-denoise-before-0.pt'):\n"
              "    print('held', flush=True)\n    sys.stdin.read()\n")
    with subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}) as other:
        assert other.stdout.readline() == "held\n"
        capsys.readouterr()
        assert main(["pretrain", *RUN, "before"]) == 1
        assert f"process {other.pid}" in capsys.readouterr().err and not (here / "build/pretrained/denoise/before-0").exists()
        other.stdin.close()
    assert main(["pretrain", *RUN, "before"]) == 0
    curve = (here / "build/pretrained/denoise/before-0/live/plots/metrics/task_loss.tsv").read_text()
    assert len(curve.splitlines()) == 1 + 2   # a row per log point, none twice


def test_a_full_disk_is_told_with_the_folder(here, monkeypatch, capsys):
    with_pretraining(here)
    full = lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    monkeypatch.setattr(pipeline, "_plain_curves", lambda folder: (full, lambda: None))
    assert main(["pretrain", *RUN, "before"]) == 1 and re.search("before-0/live: .*No space left", capsys.readouterr().err)
    monkeypatch.setattr(pipeline, "synthesize", full)
    assert main(["synthesize"]) == 1 and f"{here}: no space left" in capsys.readouterr().err


# ---------------------------------------------------------------- the results folder

@pytest.fixture
def reported(here, monkeypatch):
    "A folder of results without a manifest, and a report of two files."
    results = here / "results" / "smoke"
    results.mkdir(parents=True)
    for name in ("means.csv", "psnr-0.csv", "table.csv"):
        (results / name).write_text(f"committed {name}")
    monkeypatch.setattr(pipeline, "_write_report", lambda params, out: [(out / name).write_text("new") for name in ("table.csv", "summary.md")])
    return results


def test_a_report_removes_nothing_that_it_did_not_write(reported, monkeypatch):
    assert main(["report"]) == 0
    read = lambda: {p.name: p.read_text() for p in reported.iterdir() if p.name != "manifest.json"}
    assert read() == {"means.csv": "committed means.csv", "psnr-0.csv": "committed psnr-0.csv", "table.csv": "new", "summary.md": "new"}
    assert set(json.loads((reported / "manifest.json").read_text())) == {"table.csv", "summary.md"}
    monkeypatch.setattr(pipeline, "_write_report", lambda params, out: (out / "summary.md").write_text("newer"))
    assert main(["report"]) == 0
    assert read() == {"means.csv": "committed means.csv", "psnr-0.csv": "committed psnr-0.csv", "summary.md": "newer"}


def test_a_file_of_the_report_that_was_edited_since_stays(reported, monkeypatch):
    assert main(["report"]) == 0
    (reported / "table.csv").write_text("edited by hand")
    monkeypatch.setattr(pipeline, "_write_report", lambda params, out: (out / "summary.md").write_text("newer"))
    assert main(["report"]) == 0 and (reported / "table.csv").read_text() == "edited by hand"


def test_a_manifest_that_leads_out_of_the_folder_removes_nothing(reported, here):
    import hashlib
    (here / "precious").write_text("x")
    (reported / "manifest.json").write_text(json.dumps({"../../precious": hashlib.sha256(b"x").hexdigest(), "means.csv": 3}))
    assert main(["report"]) == 0 and (here / "precious").exists() and (reported / "means.csv").exists()
    (reported / "manifest.json").write_text("[broken")
    assert main(["report"]) == 0 and (reported / "means.csv").exists()


@pytest.mark.parametrize("obstacle", ["a folder", "a linked folder", "a file"])
def test_what_stands_in_the_way_of_a_report_stays(reported, here, monkeypatch, capsys, obstacle):
    if obstacle == "a folder":
        (reported / "summary.md").mkdir()
    elif obstacle == "a linked folder":
        (here / "elsewhere").mkdir()
        (reported / "restored").symlink_to(here / "elsewhere")
        monkeypatch.setattr(pipeline, "_write_report", lambda params, out: [(out / "restored").mkdir(), (out / "restored" / "a.png").write_text("new")])
    else:
        shutil.rmtree(reported)
        reported.write_text("a file")
    before = sorted(p for p in (here / "results").rglob("*"))
    assert main(["report"]) == 1 and "move it away" in capsys.readouterr().err
    assert sorted(p for p in (here / "results").rglob("*")) == before and not list(here.glob("elsewhere/*"))


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_report_without_runs_touches_nothing(here, capsys):
    (here / "results/smoke/restored").mkdir(parents=True)
    for name in ("summary.md", "table.csv", "means.csv", "restored/a.png"):
        (here / "results/smoke" / name).write_text("committed")
    before = tree(here)
    assert main(["report"]) == 1 and "untrained.csv" in capsys.readouterr().err
    assert tree(here) == before and [p.name for p in (here / "results").iterdir()] == ["smoke"]


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/tmp", "-x", "a b", "a\nb", "results\u202e", None, 3, "x" * 101])
def test_an_experiment_is_a_name_and_no_path(here, capsys, name):
    (here / "results").mkdir()
    (here / "results" / "summary.md").write_text("committed")
    change(here / "params.yaml", experiment=name)
    before = tree(here)
    for command in ("report", "results", "synthesize"):
        assert main([command]) == 1
        error = capsys.readouterr().err
        assert "params.yaml: experiment " in error and error.count("\n") == 1
    with pytest.raises(ParameterError, match="experiment"):
        pipeline.report(load_params(ROOT / "scales/smoke.yaml") | {"experiment": name})
    assert tree(here) == before


def test_a_failing_report_leaves_the_earlier_one(reported, here, monkeypatch):
    assert main(["report"]) == 0
    before = tree(here)

    def fail(params, out):
        (out / "summary.md").write_text("half")
        raise MemoryError
    monkeypatch.setattr(pipeline, "_write_report", fail)
    assert main(["report"]) == 1 and tree(here) == before


def test_a_killed_report_forgets_no_file(reported, monkeypatch):
    "Killed while its files are put in place, it leaves a manifest with the names of both reports."
    class Kill(BaseException):
        pass
    assert main(["report"]) == 0
    monkeypatch.setattr(pipeline, "_write_report", lambda params, out: (out / "other.md").write_text("newer"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (_ for _ in ()).throw(Kill) if str(b).endswith("other.md") else replace(a, b))
    with pytest.raises(Kill):
        main(["report"])
    monkeypatch.setattr(os, "replace", replace)
    assert set(json.loads((reported / "manifest.json").read_text())) == {"other.md", "summary.md", "table.csv"}
    assert main(["report"]) == 0 and {p.name for p in reported.iterdir()} == {"means.csv", "psnr-0.csv", "other.md", "manifest.json"}


# ---------------------------------------------------------------- what runs, and how it is told

@pytest.mark.parametrize("dotted", ["os.system", "subprocess.Popen", "payload.Evil", "irnb.images.os", "irnb.metrics.psnr", "irnb.networks.NAFNet", "irnb.strategies.Strategy",
                                    "irnbevil.X", "Supervised", "", "...", "irnb.strategies.strategy"])
def test_a_class_is_a_strategy_and_nothing_else_is_imported(here, monkeypatch, capsys, dotted):
    (here / "payload.py").write_text("open('ran', 'w')\nclass Evil:\n    pass\n")
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.setattr(os, "system", lambda *a: pytest.fail("os.system was called"))
    change(here / "params.yaml", strategies__supervised={"class": dotted})
    assert main(["sources"]) == 1
    assert "params.yaml: strategies.supervised.class" in capsys.readouterr().err and not (here / "ran").exists()
    if dotted == "payload.Evil":  # allowed by name, it is imported, and still no strategy
        change(here / "params.yaml", plugins=["payload"])
        assert main(["sources"]) == 1 and "is no strategy" in capsys.readouterr().err and (here / "ran").exists()


def test_a_network_of_another_module_needs_a_plugin_too(here, monkeypatch, capsys):
    (here / "mynets").mkdir()
    (here / "mynets" / "__init__.py").write_text("")
    (here / "mynets" / "nets.py").write_text("open('ran', 'w')\nfrom irnb.networks import NAFNet as Mine\n")
    monkeypatch.syspath_prepend(str(here))
    change(here / "params.yaml", network={"name": "mynets.nets.Mine", "width": 4})
    assert main(["sources"]) == 1 and "plugins: [mynets.nets]" in capsys.readouterr().err and not (here / "ran").exists()
    change(here / "params.yaml", plugins=["mynets"])
    assert main(["sources"]) == 0 and (here / "ran").exists()


@pytest.mark.parametrize("text, words", [("a: 1\na: 2\n", "'a'.*twice"), ("a: &x [*x]\n", "alias.*inside"), ("a: [" * 2000, "not valid YAML"),
                                         ("a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(f"{n}: &{n} [{','.join([f'*{m}'] * 10)}]\n" for m, n in zip("abcdefgh", "bcdefghi")), "100000 values"),
                                         ("a: \x07\n", "not valid YAML"), ("{[a]: 1}", "must be|not valid YAML|unknown"), ("a: !!python/object/apply:os.system [ls]\n", "not valid YAML")])
def test_traps_of_yaml_are_refused(here, capsys, text, words):
    (here / "x.yaml").write_text(text)
    assert main(["report", "--params", "x.yaml"]) == 1
    error = capsys.readouterr().err
    assert re.search(words, error) and "x.yaml" in error and error.count("\n") == 1 and len(error) < 500


def test_a_parameter_file_that_is_no_text(here, capsys):
    (here / "x.yaml").write_bytes(b"\xff\xfe\x00")
    for path in ("x.yaml", "."):
        assert main(["report", "--params", path]) == 1 and f"{path}: " in capsys.readouterr().err


def test_names_reach_the_terminal_as_escapes(here, capsys):
    assert main(["report", "--params", "no\n\x1b[31m.yaml"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "\x1b" not in error and "no\\n\\x1b[31m.yaml: " in error


@pytest.mark.parametrize("error, words", [(MemoryError(), "memory.*train.batch"), (RuntimeError("CUDA out of memory. Tried\nto allocate"), "memory.*train.batch"),
                                          (KeyError("x"), "KeyError: 'x'.*--debug"), (RuntimeError("a\nb"), "RuntimeError: a b .*--debug"), (RecursionError("deep"), "RecursionError: deep")])
def test_every_error_is_one_sentence_and_debug_adds_the_traceback(here, monkeypatch, capsys, error, words):
    def fail(params):
        raise error
    monkeypatch.setattr(pipeline, "synthesize", fail)
    assert main(["synthesize"]) == 1
    text = capsys.readouterr().err
    assert re.search(words, text) and text.count("\n") == 1
    for arguments in (["synthesize", "--debug"], ["--debug", "synthesize"]):
        with pytest.raises(type(error)):
            main(arguments)
    monkeypatch.setenv("IRNB_TRACEBACK", "1")
    with pytest.raises(type(error)):
        main(["synthesize"])


def test_a_reader_that_has_gone_is_no_error(here):
    (here / "results/smoke").mkdir(parents=True)
    (here / "results/smoke/summary.md").write_text("a line\n" * 100_000)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = f"{sys.executable} -m irnb.pipeline results | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=here, env=environment, capture_output=True, text=True)
    assert done.stdout == "a line\n0\n" and done.stderr == ""


def test_wrong_options_show_before_anything_is_trained(here, capsys):
    for entry, words in (({"options": {"losss": "l1"}}, "supervised.options.*losss.*'loss'"), ({"options": {"loss": 3}}, "options.loss .*str.*3"),
                         ({"network": {"name": "NAFNet", "width": "4"}}, "supervised.network.width .*int.*'4'"), ({"network": {"name": "NAFNet", "width": 10**6}}, "network.width .*4096"),
                         ({"train": {"lr": "1e-3"}}, "supervised.train.lr .*float.*1.0e-3"), ({"train": {"steps": True}}, "train.steps .*int"), ({"options": None, "train": []}, "supervised.train .*mapping")):
        change(here / "params.yaml", strategies__supervised={"class": "irnb.strategies.Supervised", **entry})
        assert main(["synthesize"]) == 1
        assert re.search(words, capsys.readouterr().err)
    for entry, words in (({"options": {"loss": "l7"}}, "strategies.supervised.options: .*l7"), ({"network": {"name": "NAFNet", "width": -4}}, "strategies.supervised.network"),
                         ({"network": {"name": "NAFNet", "width": 0}}, "strategies.supervised.network"), ({"network": {"name": "UNet", "width": 4096, "depth": 6}}, "supervised.network .*weights")):
        change(here / "params.yaml", strategies__supervised={"class": "irnb.strategies.Supervised", **entry})
        assert main(["sources"]) == 1
        error = capsys.readouterr().err
        assert re.search(words, error) and "params.yaml" in error and not (here / "build/sources").exists()


def test_compare_before_there_is_anything(here, capsys):
    assert main(["compare"]) == 1 and "no metrics.json" in capsys.readouterr().err
    (here / "results/smoke").mkdir(parents=True)
    (here / "results/smoke/metrics.json").write_text("{}")
    assert main(["compare"]) == 1 and re.search("commit of results/smoke: .*metrics.json", capsys.readouterr().err)
    assert main(["compare", "elsewhere"]) == 1 and re.search("elsewhere: .*metrics.json", capsys.readouterr().err)


def test_compare_counts_a_missing_strategy_as_a_difference(here, capsys):
    row = {"supervised": {"psnr_seen": 30.0, "psnr_unseen": 20.0}}
    for folder, metrics in (("results/smoke", {"denoise": row}), ("other", {"denoise": row | {"dil_sf": {"psnr_seen": 30.0}}})):
        (here / folder).mkdir(parents=True)
        (here / folder / "metrics.json").write_text(json.dumps(metrics))
    assert main(["compare", "other"]) == 1
    out = capsys.readouterr().out
    assert "denoise, seen: dil_sf is in one of them only" in out and "denoise, unseen: supervised and all others are equal" in out and "differs" in out
