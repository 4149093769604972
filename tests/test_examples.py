"""The examples and the template as a downstream user would run them, at smoke scale: other folders, own pictures, own networks."""
import ast
import os
import re
import subprocess
import sys

import nbformat
import pytest
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


@slow
def test_template_runs_and_keeps_the_contract():
    nb = execute(TEMPLATE)
    assert any("22 checks passed" in o.get("text", "") for c in nb.cells if c.cell_type == "code" for o in c.outputs)


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
