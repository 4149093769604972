"""The examples and the template as a downstream user would run them, at smoke scale: other folders, own pictures, own networks."""
import ast
import inspect
import os
import re
import subprocess
import sys

import nbformat
import pytest
import torch
import yaml

from tests.notebooks import ROOT, execute, notebooks

EXAMPLES, TEMPLATE, GUIDE = ROOT / "examples", ROOT / "nbs" / "strategies" / "_template.ipynb", ROOT / "CONTRIBUTING.md"
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "Crops of four photographs of scikit-image."
    import skimage.data
    from PIL import Image
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        Image.fromarray(getattr(skimage.data, name)()[:120, :140]).save(folder / f"{name}.png")
    return folder


def run(script, *arguments, cwd):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(EXAMPLES / script), *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True)


def table_of(text):
    "strategy -> PSNR on seen and on unseen settings, from the printed table."
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: (float(row[-2]), float(row[-1])) for row in rows[2:] if row[1] == "psnr"}


@slow
def test_plain_pytorch(pictures, tmp_path):
    done = run("plain_pytorch.py", pictures, "--steps", 12, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    table = table_of(done.stdout)
    assert set(table) == {"supervised", "dil"} and all(seen > unseen > 10 for seen, unseen in table.values()) and table["supervised"] != table["dil"]
    assert {p.name for p in tmp_path.iterdir()} == {"supervised.pt", "dil.pt"}


@slow
def test_fabric(pictures, tmp_path):
    pytest.importorskip("lightning_fabric")
    done = run("fabric.py", pictures, "--steps", 20, "--precision", "bf16-mixed", "--accelerator", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    table = table_of(done.stdout)
    assert set(table) == {"supervised", "spn"} and all(seen > unseen > 10 for seen, unseen in table.values()) and table["supervised"] != table["spn"]


def test_a_folder_without_pictures_is_an_error_that_says_so(tmp_path):
    done = run("plain_pytorch.py", tmp_path, cwd=tmp_path)
    assert done.returncode and "no usable picture" in done.stderr.splitlines()[-1]


@slow
def test_colab_notebook_runs_from_top_to_bottom(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("IRNB_PICTURES", str(pictures))
    monkeypatch.setenv("IRNB_STEPS", "8")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    path = tmp_path / "colab.ipynb"  # elsewhere: it needs no other file of the repository
    path.write_bytes((EXAMPLES / "colab.ipynb").read_bytes())
    nb = execute(path)
    code = [c for c in nb.cells if c.cell_type == "code"]
    assert "pip install" in code[0].source
    tables = [o.data["text/markdown"] for c in code for o in c.outputs if "text/markdown" in o.get("data", {})]
    assert set(table_of(tables[-1])) == {"supervised", "dil"} and any("image/png" in o.get("data", {}) for o in code[-1].outputs)


@pytest.mark.parametrize("name", ["plain_pytorch.py", "fabric.py"])
def test_examples_are_short_and_use_public_names(name):
    import importlib
    text = (EXAMPLES / name).read_text()
    assert len(text.splitlines()) < 60 and max(map(len, text.splitlines())) <= 150
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("irnb"):
            module = importlib.import_module(node.module)
            offered = getattr(module, "__all__", None) or dir(module)
            assert all(alias.name in offered and not alias.name.startswith("_") for alias in node.names), node.module


# --- every strategy in two frameworks that bring a loop, files and a precision of their own

def every_strategy():
    "Name -> maker of a small strategy, equal at every call."
    from irnb import strategies
    from irnb.networks.general import ConStyleEncoder
    from irnb.strategies import ToyNet
    from tests.test_constyle import SMALL, told

    def encoder():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return ConStyleEncoder(**SMALL)

    options = {"CR": {"extractor": "random"}, "NoiseDA": {"denoiser": "nano"}, "FineTune": {"layers": 1}, "DIL": {"inner": "adam"},
               "SPN": {"extractor": "random", "rho": .1, "negatives": [{"interval": 2, "decay": .1}]},
               "IRConStyle": {"queue_size": 12}, "ConStylePretraining": {"queue_size": 12, "crop": 16}}
    nets = {"IRConStyle": told, "ConStylePretraining": encoder}
    classes = {name: getattr(strategies, name) for name in dir(strategies) if not name.startswith("_")}
    found = {name: c for name, c in classes.items()
             if inspect.isclass(c) and issubclass(c, strategies.Strategy) and not inspect.isabstract(c)}
    makers = {name: lambda c=c, name=name: c(nets.get(name, ToyNet)(), **options.get(name, {})) for name, c in found.items()}
    beside = lambda: found["IRConStyle"](ToyNet(), queue_size=12, encoder=SMALL, condition=False)
    return makers | {"DIL ps": lambda: found["DIL"](ToyNet(), variant="ps"), "IRConStyle beside a network": beside}


STRATEGIES = every_strategy()


def batches_for_all(count=6):
    from irnb.strategies import toy_batch
    return [toy_batch(seed=i) | {"degraded2": toy_batch(seed=100 + i)["degraded"]} for i in range(count)]


def adam(strategy):
    return torch.optim.AdamW([p for p in strategy.parameters() if p.requires_grad], lr=2e-3)


def test_the_table_of_strategies_is_whole():
    assert len(STRATEGIES) >= 19 and {"Supervised", "DIL", "NoiseDA", "SPN", "IRConStyle", "RCL", "DANN", "CR"} <= set(STRATEGIES)


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate")
    yield accelerate.Accelerator(cpu=True)
    accelerate.Accelerator().free_memory()


@pytest.mark.parametrize("name", STRATEGIES)
def test_accelerate_stores_a_strategy_and_resumes_to_the_same_bits(name, accelerator, tmp_path):
    import accelerate

    def loop(model, opt, batches):
        for batch in batches:
            opt.zero_grad()
            accelerator.backward(model(batch))
            opt.step()
            accelerator.unwrap_model(model).after_step()

    def prepared():
        accelerator.free_memory()
        strategy = STRATEGIES[name]()
        return accelerator.prepare(strategy, adam(strategy))

    (whole, opt), data = prepared(), batches_for_all()
    loop(whole, opt, data[:3])
    accelerator.save_state(tmp_path / "state")
    accelerator.save_model(whole, tmp_path / "model")
    loop(whole, opt, data[3:])
    again, opt = prepared()
    accelerator.load_state(tmp_path / "state")
    assert again.step == 3
    loop(again, opt, data[3:])
    assert whole.step == again.step == 6
    assert [key for key, value in whole.state_dict().items() if not torch.equal(value, again.state_dict()[key])] == []
    other = STRATEGIES[name]()
    accelerate.load_checkpoint_in_model(other, str(tmp_path / "model"), strict=True)
    assert other.step == 3


@pytest.mark.parametrize("name", STRATEGIES)
def test_fabric_trains_every_strategy_in_mixed_precision(name):
    pytest.importorskip("lightning_fabric")
    from lightning_fabric import Fabric
    fabric, strategy = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed"), STRATEGIES[name]()
    model, opt = fabric.setup(strategy, adam(strategy))
    for batch in batches_for_all(2):
        loss = model(batch)
        opt.zero_grad()
        fabric.backward(loss)
        opt.step()
        strategy.after_step()
    assert loss.dtype == torch.float32 and loss.isfinite() and all(p.isfinite().all() for p in strategy.parameters())


def test_what_fabric_rounds_stays_rounded_and_autocast_around_the_call_rounds_nothing():
    pytest.importorskip("lightning_fabric")
    from lightning_fabric import Fabric
    from irnb.strategies import Supervised, ToyNet
    seen, batch = [], batches_for_all(1)[0]
    for precision in ("bf16-mixed", "32-true"):
        strategy = Supervised(ToyNet(), loss=lambda restored, clean: seen.append(clean) or (restored - clean).abs().mean())
        model = Fabric(accelerator="cpu", devices=1, precision=precision).setup(strategy)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(batch).isfinite()
    rounded, exact = seen
    assert rounded.dtype == exact.dtype == torch.float32 and torch.equal(exact, batch["clean"])
    assert torch.equal(rounded, batch["clean"].bfloat16().float()) and 0 < (rounded - exact).abs().max() <= 2 ** -9


@pytest.mark.parametrize("given, taken", [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)])
@pytest.mark.parametrize("name", STRATEGIES)
def test_no_strategy_hands_half_types_on(name, given, taken):
    "What the network is given in a step outside autocast."
    strategy, seen = STRATEGIES[name](), []
    strategy = strategy.double() if given == torch.float64 else strategy
    strategy.net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    strategy.restorer().register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    loss = strategy({key: x.to(given) for key, x in batches_for_all(1)[0].items()})
    assert loss.isfinite() and loss.dtype == taken and set(seen) <= {taken}


@slow
def test_template_runs_and_keeps_the_contract():
    nb = execute(TEMPLATE)
    assert any("24 checks passed" in o.get("text", "") for c in nb.cells if c.cell_type == "code" for o in c.outputs)


def test_template_is_neither_exported_nor_listed():
    assert TEMPLATE not in notebooks() and not (ROOT / "irnb" / "strategies" / "mine.py").exists()
    nb = nbformat.read(TEMPLATE, as_version=4)
    assert not [o for c in nb.cells if c.cell_type == "code" for o in c.outputs if o.output_type == "error"]


def test_a_copy_of_the_template_is_another_strategy(tmp_path):
    pytest.importorskip("nbdev")
    command = re.search(r"^sed (.*?) nbs/strategies/_template.ipynb", GUIDE.read_text(), re.MULTILINE)[1]
    pairs = re.findall(r"s/([^/]+)/([^/]+)/g", command)
    text = TEMPLATE.read_text()
    for old, new in pairs:
        text = re.sub(old, new, text)
    (tmp_path / "30_mixup.ipynb").write_text(text)
    from nbdev.export import nb_export
    (tmp_path / "irnb" / "strategies").mkdir(parents=True)
    nb_export(tmp_path / "30_mixup.ipynb", lib_path=tmp_path / "irnb")
    names = {n.name for n in ast.parse((tmp_path / "irnb" / "strategies" / "mixup.py").read_text()).body if isinstance(n, (ast.ClassDef, ast.FunctionDef))}
    assert names == {"Mixup", "flip_difference"}


def test_guide_names_files_that_exist_and_an_entry_that_the_pipeline_takes(tmp_path):
    from irnb.pipeline import load_params
    text = GUIDE.read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), link
    entry = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    entry["strategies"]["mixup"]["class"] = "irnb.strategies.Supervised"  # the class is the reader's
    entry["strategies"]["mixup"]["options"] = {}
    params = yaml.safe_load((ROOT / "scales" / "smoke.yaml").read_text()) | entry
    params["evaluation"]["tuned"] = []
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    assert load_params(tmp_path / "params.yaml")["run"]["strategies"] == ["supervised", "mixup"]
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        ast.parse(block)
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in re.findall(r"`make (\w+)`", text))
