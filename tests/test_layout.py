"""The shape of the package: floors, light imports, one version, documented and typed public names."""
import ast
import configparser
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.notebooks import ROOT

FLOORS = [{"images", "png"}, {"decoders"}, {"image_files"}, {"degradations", "metrics", "networks"}, {"demosaic"}, {"data"}, {"strategies"}, {"training", "results"},
          {"restore", "pipeline", "explorer"}]
MODULES = sorted(p for p in (ROOT / "irnb").rglob("*.py") if p.name != "_modidx.py" and p.parent != ROOT / "irnb" or p.name not in ("__init__.py", "_modidx.py"))
# What a user of the library must not inherit from the notebooks and the pipeline.
HEAVY = ["matplotlib", "ipywidgets", "IPython", "nbdev", "fastcore", "execnb", "dvc", "dvclive", "pandas", "scipy", "skimage", "torchvision"]


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "irnb").parts[0].removesuffix(".py")


def floor_of(room: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def upward_imports(path: Path, source: str) -> list[str]:
    "The rooms of irnb that a module imports, inside functions too, and that are not below it."
    from irnb.training import imported_modules
    own = room_of(path)
    rooms = {m.split(".")[1] for m in imported_modules(source, module_name(path), path.name == "__init__.py") if "." in m}
    return sorted(r for r in rooms if r != own and floor_of(r) >= floor_of(own))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT / "irnb")))
def test_imports_point_down(path):
    # `irnb` on the command line is one program: pipeline offers restore's command.
    allowed = {"restore"} if room_of(path) == "pipeline" else set()
    assert set(upward_imports(path, path.read_text())) <= allowed


def test_an_upward_import_is_found():
    assert upward_imports(ROOT / "irnb" / "images.py", "def f():\n    from irnb.strategies import DIL") == ["strategies"]
    assert upward_imports(ROOT / "irnb" / "metrics.py", "import irnb.degradations") == ["degradations"]


@pytest.mark.parametrize("name", ["irnb", "irnb.metrics", "irnb.degradations", "irnb.networks", "irnb.strategies", "irnb.data", "irnb.strategies.strategy",
                                  "irnb.training", "irnb.results", "irnb.restore", "irnb.pipeline", "irnb.explorer"])
def test_import_is_light(name):
    code = f"import {name}, sys; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]", f"import {name} also imports {out.stdout}"


def test_help_is_without_torch():
    code = ("import sys, irnb.pipeline\ntry:\n    irnb.pipeline.main(['--help'])\nexcept SystemExit as e:\n    assert not e.code\n"
            "assert not {'torch', 'numpy', 'skimage'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_one_version_and_one_list_of_requirements():
    import irnb
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert settings["DEFAULT"]["version"] == irnb.__version__ and project["dynamic"] == ["version"]
    assert settings["DEFAULT"]["requirements"].split() == project["dependencies"]
    assert project["requires-python"] == ">=" + settings["DEFAULT"]["min_python"]


def test_lock_pins_every_requirement():
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==\S+", line) for line in lines)
    pinned = {re.split("==", line)[0].lower().replace("_", "-") for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [r for group in ("notebooks", "pipeline", "docs", "examples", "dev") for r in project["optional-dependencies"][group]]
    names = {re.match(r"[A-Za-z0-9_-]+", r)[0].lower().replace("_", "-") for r in wanted} - {"irnb"}
    assert names <= pinned, names - pinned


@pytest.mark.parametrize("package", ["irnb.networks", "irnb.strategies", "irnb.degradations", "irnb.results", "irnb.explorer"])
def test_public_names_of_a_package_are_unique(package):
    "A name that two modules define could not be imported from their package."
    from irnb.networks import _public_names
    assert {name: where for name, where in _public_names(package).items() if len(where) > 1} == {}


def test_nothing_needs_torchvision():
    text = (ROOT / "requirements.lock").read_text() + "".join(p.read_text() for p in MODULES)
    assert "torchvision==" not in text and not re.search(r"^\s*(import|from) torchvision", text, re.MULTILINE)


def public_objects():
    for path in MODULES:
        name = module_name(path)
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", []):
            obj = getattr(module, public)
            if inspect.isfunction(obj) or inspect.isclass(obj):
                yield pytest.param(obj, id=f"{name}.{public}")


@pytest.mark.parametrize("obj", public_objects())
def test_public_names_are_documented_and_typed(obj):
    assert (inspect.getdoc(obj) or "").strip(), "no docstring"
    functions = [obj] if inspect.isfunction(obj) else [m for n, m in vars(obj).items() if inspect.isfunction(m) and (not n.startswith("_") or n == "__init__")]
    for f in functions:
        if "<string>" in f.__code__.co_filename or f.__module__ != obj.__module__:
            continue  # written by @dataclass or inherited
        assert f.__name__ == "__init__" or f.__doc__, f"{f.__qualname__} has no docstring"
        untyped = [n for n, p in inspect.signature(f).parameters.items() if p.annotation is p.empty and n not in ("self", "cls")
                   and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        assert not untyped, f"{f.__qualname__}: no type for {untyped}"


def test_no_name_is_undefined_or_unused(tmp_path):
    pytest.importorskip("ruff")
    check = lambda *paths: subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "--config", ROOT / "pyproject.toml", *paths], cwd=ROOT, capture_output=True, text=True)
    found = check(".")
    assert found.returncode == 0, found.stdout
    (tmp_path / "wrong.py").write_text("import os\nprint(undefined)\n")
    wrong = check(tmp_path / "wrong.py")
    assert wrong.returncode == 1 and "F401" in wrong.stdout and "F821" in wrong.stdout


def test_functions_are_small():
    lengths = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lengths[f"{path.name}:{node.name}"] = node.end_lineno - node.body[0].lineno + 1
    long = {k: v for k, v in lengths.items() if v > 60}
    assert not long, long
    assert sorted(lengths.values())[len(lengths) // 2] <= 12
