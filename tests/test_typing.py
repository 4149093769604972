"""Types for users of the library: the marker file, hints that resolve, names on demand that a type checker sees."""
import ast
import importlib
import inspect
import tomllib
import typing

import pytest

from irnb.networks import _public_names
from tests.notebooks import ROOT

MODULES = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
           for p in sorted((ROOT / "irnb").rglob("*.py")) if p.name != "_modidx.py" and p.parent.name != "__pycache__"]
ROOMS = ["irnb.strategies"]  # packages that offer the names of their modules on demand


def functions_of(obj):
    "A function, or a class with the functions that it defines."
    yield obj
    for value in vars(obj).values() if inspect.isclass(obj) else ():
        value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if inspect.isfunction(value):
            yield value


def unresolved(module):
    "Public names whose hints cannot be evaluated, with the reason."
    for name in getattr(module, "__all__", []):
        obj = getattr(module, name)
        for each in functions_of(obj) if inspect.isclass(obj) or inspect.isfunction(obj) else ():
            try:
                typing.get_type_hints(each)
            except Exception as error:
                yield f"{name} ({getattr(each, '__qualname__', each)}): {error}"


FIGURES = {"irnb.evaluation", "irnb.explorer"}  # they import matplotlib's Figure for type checkers only
xfail = pytest.mark.xfail(reason="Figure is not a name at run time")


@pytest.mark.parametrize("name", [pytest.param(n, marks=xfail) if n in FIGURES else n for n in MODULES])
def test_hints_of_public_names_resolve(name):
    assert list(unresolved(importlib.import_module(name))) == []


def test_a_hint_that_does_not_resolve_is_found():
    module = type(importlib)("broken")
    exec("from __future__ import annotations\n__all__ = ['f', 'C']\ndef f(x: Nowhere): ...\n"
         "class C:\n    @property\n    def p(self) -> Missing: ...", module.__dict__)
    assert [line.split()[0] for line in unresolved(module)] == ["f", "C"]


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "irnb" / "py.typed").read_bytes() == b""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "py.typed" in settings["irnb"]


def checker_sees(path):
    "The modules from which a file takes all names, below `if TYPE_CHECKING`."
    body = ast.parse(path.read_text()).body
    blocks = [node for node in body if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"]
    stars = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom) and node.level == 1]
    return sorted(node.module for node in stars if node.names[0].name == "*")


@pytest.mark.parametrize("package", ROOMS)
def test_names_on_demand_are_listed_and_visible_to_type_checkers(package):
    room, offered = importlib.import_module(package), _public_names(package)
    assert sorted(room.__all__) == sorted(offered) and len(offered) > 50, "the list of the package is stale"
    modules = sorted({module for places in offered.values() for module in places})
    assert checker_sees(ROOT.joinpath(*package.split("."), "__init__.py")) == modules


@pytest.mark.parametrize("package", ROOMS)
def test_a_star_imports_what_all_says(package):
    names = {}
    exec(f"from {package} import *", names)
    room = importlib.import_module(package)
    assert set(names) - {"__builtins__"} == set(room.__all__)
    assert all(names[name] is getattr(room, name) for name in room.__all__)
