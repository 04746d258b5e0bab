"""pyproject.toml declares exactly the packages that the project and its checks import."""

from __future__ import annotations

import ast
import importlib.metadata
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tree import ROOT, own_modules

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("slime", "launch", "recipes", "critic", "trainer", "rollout", "buffer", "machine")
CHECKS = ("tests", "benchmarks", "examples", "docs", "locks")
NOT_HERE = {"flash_attn": "flash-attn-4"}  # what is imported where it is installed: there is no build for CPUs
OWN_ENVIRONMENT = "benchmarks/advantages_peers.py"  # makes one, with what it compares
NEVER_IMPORTED = {"pytest-timeout", "pytest-xdist", "ruff", "mypy"}  # plugins of pytest, and what `make lint` runs
IMPORTERS = ("import_module", "__import__", "find_spec", "importorskip")


def imports(source: str) -> Iterator[str]:
    """Top-level names of all modules that a file imports, in functions and by name, too; relative ones left out."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in IMPORTERS and isinstance(node.args[0].value, str):
                yield node.args[0].value.partition(".")[0]


def distributions(root: Path, folders: Iterable[str]) -> dict[str, str]:
    """Distribution to a file that imports it, of all that these folders import and neither Python nor the project has.

    Files of tests and benchmarks import each other by their bare names.
    """
    of_module = importlib.metadata.packages_distributions()
    files = [path for folder in folders for path in own_modules(root) if path.is_relative_to(root / folder)]
    own = {*PACKAGES, *CHECKS, *(path.stem for path in files if path.relative_to(root).parts[0] in CHECKS)}
    found: dict[str, str] = {}
    for path in files:
        name = path.relative_to(root).as_posix()
        for module in imports(path.read_text()):
            if name != OWN_ENVIRONMENT and module not in sys.stdlib_module_names and module not in own:
                distribution = NOT_HERE.get(module) or of_module.get(module, [module])[0]
                found.setdefault(canonicalize_name(distribution), name)
    return found


def declared(*extras: str) -> set[str]:
    """Names of the dependencies with these extras."""
    texts = [*PROJECT["dependencies"], *(text for extra in extras for text in PROJECT["optional-dependencies"][extra])]
    return {canonicalize_name(Requirement(text).name) for text in texts}


def test_every_import_of_the_project_is_declared() -> None:
    found = distributions(ROOT, PACKAGES)
    assert {name: where for name, where in found.items() if name not in declared("gpu")} == {}


def test_every_declared_dependency_is_imported() -> None:
    assert declared("gpu") - set(distributions(ROOT, PACKAGES)) == set()


def test_the_extra_for_tests_is_what_tests_and_benchmarks_need_besides() -> None:
    found = distributions(ROOT, CHECKS)
    assert {name: where for name, where in found.items() if name not in declared("gpu", "test")} == {}
    assert declared("test") - declared() - set(found) == NEVER_IMPORTED
    assert [name for name in PROJECT["optional-dependencies"]["test"] if name in declared()] == []


@pytest.mark.parametrize(
    "source",
    [
        "import yaml\n",
        "import os, yaml.nodes as n\n",
        "from yaml import load\n",
        "def f():\n    from yaml.nodes import Node\n",
        "if TYPE_CHECKING:\n    import yaml\n",
        "try:\n    import yaml\nexcept ImportError:\n    yaml = None\n",
        "x = importlib.import_module('yaml.nodes')\n",
        "x = pytest.importorskip('yaml')\n",
    ],
)
def test_an_import_is_found_wherever_it_stands(tmp_path: Path, source: str) -> None:
    (tmp_path / "slime" / "deep").mkdir(parents=True)
    (tmp_path / "slime" / "deep" / "a.py").write_text(source)
    assert distributions(tmp_path, PACKAGES) == {"pyyaml": "slime/deep/a.py"}


def test_own_relative_and_standard_modules_need_no_declaration(tmp_path: Path) -> None:
    for folder in ("slime", "tests"):
        (tmp_path / folder).mkdir()
    (tmp_path / "slime" / "a.py").write_text("import os.path\nfrom . import yaml\nfrom buffer.types import Turn\n")
    (tmp_path / "tests" / "yaml.py").write_text("import slime.a\n")
    (tmp_path / "tests" / "test_a.py").write_text("from yaml import helper\n")
    assert distributions(tmp_path, PACKAGES) == {}
    assert distributions(tmp_path, CHECKS) == {}
