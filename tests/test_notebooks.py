"""Every notebook runs from top to bottom; library, README and notebooks are in sync."""
import filecmp
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.notebooks import ROOT, execute, notebooks, readme


@pytest.fixture(scope="module")
def runs(request):
    "The chosen notebooks, two at a time on one thread each; every test waits for its own."
    chosen = [item.callspec.params["path"] for item in request.session.items if item.function.__name__ == "test_notebook_runs"]
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setenv("OMP_NUM_THREADS", "1")  # two kernels with two threads each would wait for one another
        yield {path: pool.submit(execute, path) for path in chosen}
        pool.shutdown(wait=True, cancel_futures=True)


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.stem if p.stem != "index" else f"{p.parent.name}-index")
def test_notebook_runs(path, runs):
    assert runs[path].result().cells


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "The checkout's notebooks and library, exported and cleaned anew elsewhere."
    pytest.importorskip("nbdev")
    folder = tmp_path_factory.mktemp("sync")
    for name in ("settings.ini", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    for name in ("nbs", "irnb"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    subprocess.run(["git", "init", "-q", "."], cwd=folder, check=True)
    for module, name in (("doclinks", "export"), ("clean", "clean")):
        code = f"from nbdev.{module} import nbdev_{name}; nbdev_{name}()"
        subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    return folder


def _same_files(a: Path, b: Path, pattern: str) -> None:
    files = {p.relative_to(a) for p in a.rglob(pattern) if "__pycache__" not in p.parts and ".ipynb_checkpoints" not in p.parts}
    others = {p.relative_to(b) for p in b.rglob(pattern) if "__pycache__" not in p.parts and ".ipynb_checkpoints" not in p.parts}
    assert files == others, f"only in one of the two: {sorted(map(str, files ^ others))}"
    differing = [str(f) for f in sorted(files) if not filecmp.cmp(a / f, b / f, shallow=False)]
    assert not differing, f"run `make notebooks`: {differing}"


def test_library_is_what_the_notebooks_export(copy):
    _same_files(ROOT / "irnb", copy / "irnb", "*.py")


def test_notebooks_are_clean(copy):
    _same_files(ROOT / "nbs", copy / "nbs", "*.ipynb")


def test_sync_check_can_fail(copy, tmp_path):
    shutil.copytree(copy / "irnb", tmp_path / "irnb")
    with open(tmp_path / "irnb" / "training.py", "a") as f:
        f.write("\nedited = True\n")
    with pytest.raises(AssertionError, match="training.py"):
        _same_files(ROOT / "irnb", tmp_path / "irnb", "*.py")


def test_readme_is_the_index():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme(), "run `make readme`"


def test_notebooks_are_committed_with_outputs():
    import nbformat
    for path in notebooks():
        cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
        assert any(c.outputs for c in cells), f"{path.name}: committed without outputs"
        errors = [o.ename for c in cells for o in c.outputs if o.output_type == "error"]
        assert not errors, f"{path.name}: committed with errors {errors}"


def test_notebooks_name_no_path_of_the_authors_machine():
    import re
    for path in notebooks():
        text = path.read_text(encoding="utf-8")
        found = re.findall(r"(?:/home/\w+|/root/|/Users/\w+|site-packages/)[^\"\\ ]{0,40}", text)
        assert not found, f"{path.name}: {found[:3]}"
