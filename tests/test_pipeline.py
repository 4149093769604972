"""The pipeline: smoke scale under DVC in a clone, honest dependencies, a sixth strategy by one entry, kills and bad input."""
import ast
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from irnb import pipeline
from irnb.pipeline import ParameterError, load_params, main, module_closure, pick_pictures, run_settings
from tests.notebooks import ROOT

SCALES = [ROOT / "params.yaml", *sorted((ROOT / "scales").glob("*.yaml"))]


def sh(*command, cwd, check=True, **options):
    environment = os.environ | {"PYTHONPATH": str(cwd), "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, env=environment, **options)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def repro(cwd):
    start = time.perf_counter()
    return sh("dvc", "repro", cwd=cwd).stdout, time.perf_counter() - start


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
    from irnb.evaluation import read_table
    rows, trained = read_table(results / "table.csv"), load_params(ROOT / "scales" / "smoke.yaml")["run"]["strategies"]
    assert {"supervised", "dil_sf", "dil_ps", "spn_random"} <= set(trained)
    assert {r["strategy"] for r in rows} == {"degraded", "non_local_means", "wavelet", *trained}
    assert len(rows) == (3 + 2 * len(trained)) * 2 * 7 * 2  # untrained and two seeds each; images; settings; metrics
    from irnb.images import read_image
    pictures = sorted((results / "restored").glob("*.png"))
    assert len(pictures) == 2 * (1 + len(trained)) and all(read_image(p).shape == (3, 64, 64) for p in pictures)
    metrics = json.loads((results / "metrics.json").read_text())
    by_hand = [r["value"] for r in rows if r["strategy"] == "degraded" and r["metric"] == "psnr" and r["seen"]]
    assert abs(metrics["denoise"]["degraded"]["psnr_seen"] - sum(by_hand) / len(by_hand)) < 1e-3


@pytest.mark.slow
def test_second_repro_does_nothing_in_under_five_seconds(clone):
    before = outs(clone)
    text, seconds = repro(clone)
    assert "up to date" in text and "Running stage" not in text and seconds < 5
    assert outs(clone) == before


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
    checkpoint = tmp_path / "build" / "checkpoints" / "denoise-supervised-0.pt"
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
    text, _ = repro(clone)
    ran = [line.split("'")[1] for line in text.splitlines() if line.startswith("Running stage")]
    assert sorted(ran) == sorted(["sources", "report", *(f"{s}@denoise-brighter-{k}" for s in ("train", "evaluate") for k in (0, 1))])
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
        found |= pipeline.imported_modules(ast.unparse(functions[name]), "irnb.pipeline")
        waiting += [n.id for n in ast.walk(functions[name]) if isinstance(n, ast.Name)]
    return found | {"irnb.pipeline"}


def missing_deps(stage: dict, function: str) -> list[str]:
    "The modules, followed through their own imports, that a stage uses and does not name."
    deps = stage.get("deps", [])
    closure = module_closure(sorted(stage_imports(function) - {"irnb.pipeline", "irnb"}))
    files = {str(f.resolve().relative_to(ROOT)) for f in closure.values() if f.name != "__init__.py" or f.parent.name != "irnb"} | {"irnb/pipeline.py"}
    return sorted(f for f in files if f not in deps and "irnb" not in deps)


STAGES = {"photographs": "photographs", "synthesize": "synthesize", "sources": "sources", "train": "train_run", "evaluate": "evaluate_run",
          "baselines": "baselines", "report": "report"}


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
    assert pipeline.imported_modules(source, "irnb.evaluation") == {"irnb.images", "irnb", "irnb.metrics", "irnb.data"}
    assert "irnb.metrics" in module_closure(["irnb.evaluation"])


def test_sources_change_with_the_strategy_and_not_with_its_neighbour(tmp_path, monkeypatch):
    package = tmp_path / "mypackage"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for name in ("one", "two"):
        (package / f"{name}.py").write_text(f"from irnb.strategies import Supervised\nclass {name.title()}(Supervised):\n    'x'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    params = load_params(ROOT / "scales" / "smoke.yaml")
    params["strategies"] = {name: {"class": f"mypackage.{name}.{name.title()}"} for name in ("one", "two")}
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
    for name in params["run"]["tasks"]:
        task(name)
    for name in params["strategies"]:
        settings = run_settings(params, name)
        networks.build(**settings["network"])
        assert settings["config"].steps > 0 and settings["crop"] <= params["patches"]["size"]
    default = load_params(SCALES[0])
    assert {k: sorted(v) for k, v in params.items() if k in ("corpus", "patches", "benchmark", "run", "evaluation", "compute")} == \
        {k: sorted(v) for k, v in default.items() if k in ("corpus", "patches", "benchmark", "run", "evaluation", "compute")}


@pytest.mark.parametrize("path", SCALES, ids=lambda p: p.parent.name + "-" + p.stem)
def test_every_strategy_can_be_made_for_every_task_of_its_scale(path):
    "Options are checked by the constructor: a wrong name would otherwise show after hours."
    from irnb.data import task
    params = load_params(path)
    for task_name in params["run"]["tasks"]:
        for name in params["run"]["strategies"]:
            settings = run_settings(params, name, task_name)
            network = {"name": "UNet", "preset": "tiny"} | ({"upscale": task(task_name).scale} if task(task_name).scale > 1 else {})
            settings["class"](pipeline.initial_network(network, 0), seed=0, **settings["options"])


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
    ({"experimnt": "x"}, "experimnt.*did you mean 'experiment'"), ({"corpus__dirctory": "x"}, "corpus.*dirctory.*did you mean 'directory'"),
    ({"patches__sise": 3}, "patches.*sise.*did you mean 'size'"), ({"run__strategies": ["dill"]}, "dill"), ({"run": [1]}, "mapping"),
    ({"strategies__supervised": {"klass": "x"}}, "strategies.supervised.*klass"), ({"train__stepss": 10}, "stepss.*did you mean 'steps'"),
    ({"train__lr": -1}, "train.lr"), ({"strategies__supervised": {"class": "irnb.strategies.Supervized"}}, "cannot import.*Supervized"),
    ({"strategies__supervised": {"class": "irnb.strategies.Supervised", "options": {"loss": "l7"}}}, "unknown loss 'l7'"),
    ({"network": {"name": "NAFNot"}}, "NAFNot"), ({"network": {"name": "NAFNet", "widht": 3}}, "widht"), ({"run__tasks": ["denoize"]}, "denoize")])
def test_wrong_parameters_are_refused_by_the_command(here, capsys, changes, words):
    import re
    change(here / "params.yaml", **changes)
    task = yaml.safe_load((here / "params.yaml").read_text())
    name = task["run"]["tasks"][0] if isinstance(task["run"], dict) else "denoise"
    assert main(["train", "--task", name, "--strategy", "supervised", "--seed", "0"]) == 1
    assert re.search(words, capsys.readouterr().err.replace("\n", " "))
    assert not (here / "runs").exists() or not list((here / "runs").rglob("model*"))


def test_missing_and_broken_parameter_files(here, capsys):
    assert main(["report", "--params", "none.yaml"]) == 1 and "none.yaml: not found" in capsys.readouterr().err
    (here / "bad.yaml").write_text("a: [1\nb: }")
    assert main(["report", "--params", "bad.yaml"]) == 1 and "not valid YAML" in capsys.readouterr().err
    (here / "few.yaml").write_text("experiment: x\n")
    assert main(["report", "--params", "few.yaml"]) == 1 and "is missing" in capsys.readouterr().err
    (here / "empty.yaml").write_text("")
    assert main(["report", "--params", "empty.yaml"]) == 1 and "mapping" in capsys.readouterr().err


def test_results_before_a_report(here, capsys):
    assert main(["results"]) == 1 and "run dvc repro" in capsys.readouterr().err


def test_wrong_usage_exits_with_two(capsys):
    for arguments in ([], ["trian"], ["train", "--task", "denoise"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2


# ---------------------------------------------------------------- corpora

def picture(path, size=(96, 96), seed=0):
    import torch
    from irnb.images import write_image
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
    (lambda here: [picture(here / "mine" / "train" / "a.png"), picture(here / "mine" / "val" / "b.png", seed=1)], "corpus.test.*matches no usable picture"),
    (lambda here: [picture(here / "mine" / p / "a.png") for p in ("train", "val", "test")], "same content"),
    (lambda here: [picture(here / "mine" / p / "a.png", (70, 70), i) for i, p in enumerate(("train", "val", "test"))], "size|patch|tile")],
    ids=["missing", "empty", "fewer than splits", "same file twice", "smaller than a patch"])
def test_bad_corpora_are_refused_and_leave_nothing(here, capsys, prepare, words):
    import re
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
    change(here / "params.yaml", run__tasks=["camera"])
    assert main(["synthesize"]) == 0
    pairs, real = (PatchSet.open(here / "build/synthetic/camera" / name) for name in ("patches", "real"))
    assert not set(pairs.sources) & set(real.sources) and len(pairs.sources) == len(real.sources) == 2


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
