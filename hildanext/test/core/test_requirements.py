"""Whatever the package imports of others is declared in its pyproject.toml, at once or as an extra."""

import ast
import re
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest

BACKEND = Path(__file__).parents[2] / "backend"
PACKAGE = BACKEND / "src" / "hildanext"
PROJECT = tomllib.loads((BACKEND / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def names(requirements: list[str]) -> set[str]:
    """Distributions as their import names, which differ from them by dashes alone."""
    return {re.split(r"[^A-Za-z0-9_.-]", text, maxsplit=1)[0].lower().replace("-", "_") for text in requirements}


NEEDED = names(PROJECT["dependencies"])
EXTRAS = {name for extra, texts in PROJECT["optional-dependencies"].items() if extra != "test" for name in names(texts)}


ABOUT_AN_EXTRA = {"onnx": ("export/onnx_file.py", "export/onnx_graph.py")}
"""Modules that are nothing without an extra, which may so import it at their top: others import them in functions."""


def imported(tree: ast.Module) -> dict[str, bool]:
    """Packages of others to whether the module cannot be imported without them."""
    inside = {
        id(node)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef) or is_for_types(outer)
        for node in ast.walk(outer)
    }
    packages: dict[str, bool] = defaultdict(bool)
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module]
        for package in {module.partition(".")[0] for module in modules} - set(sys.stdlib_module_names) - {"hildanext"}:
            packages[package] |= id(node) not in inside
    return packages


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@pytest.mark.parametrize(
    "text, packages",
    [
        ("import numpy.linalg, os", {"numpy": True}),
        ("def f():\n    from lm_eval import x", {"lm_eval": False}),
        ("if TYPE_CHECKING:\n    import torch", {"torch": False}),
        ("from . import x\nfrom hildanext import y\ntry:\n    import h11\nfinally:\n    pass", {"h11": True}),
    ],
)
def test_what_a_module_imports_is_read_from_its_text(text, packages):
    assert imported(ast.parse(text)) == packages


def test_every_import_is_declared_and_extras_are_imported_in_functions_alone():
    undeclared, needless = defaultdict(list), NEEDED.copy()
    about = [name for names in ABOUT_AN_EXTRA.values() for name in names]
    lazy = {f"hildanext.{name.removesuffix('.py').replace('/', '.')}" for name in about}
    for path in sorted(PACKAGE.rglob("*.py")):
        for package, at_once in imported(ast.parse(path.read_text(encoding="utf-8"))).items():
            needless.discard(package)
            name = path.relative_to(PACKAGE).as_posix()
            bound = at_once and name not in ABOUT_AN_EXTRA.get(package, ())
            if package not in (NEEDED if bound else NEEDED | EXTRAS):
                undeclared[package].append(name)
        tops = ast.parse(path.read_text(encoding="utf-8")).body
        if path.relative_to(PACKAGE).as_posix() not in about:
            assert not lazy & {node.module for node in tops if isinstance(node, ast.ImportFrom)}, path
    assert not undeclared
    assert not needless


def test_uvicorn_ends_before_the_first_minor_version_that_was_not_tried():
    """`serve/protocol.py` builds on a class that uvicorn does not promise."""
    versions = (BACKEND.parent / "VERSIONS.md").read_text(encoding="utf-8")
    oldest, newest = re.search(r"\| uvicorn \| ([\d.]+) \| 0\.(\d+)\.\d+ \|", versions).groups()
    assert f"uvicorn>={oldest},<0.{int(newest) + 1}" in PROJECT["dependencies"]
