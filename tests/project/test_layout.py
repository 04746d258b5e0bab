"""The layout rules: imports point one way, files and functions stay small, the configuration keeps its budget."""

from __future__ import annotations

import ast
import dataclasses
import typing
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from tree import ROOT, own_modules

import slime
from slime.schema import Config

# Who may import whom; a folder may always import itself.
ALLOWED = {
    "examples": {"slime"},  # and of it what `slime` itself exports, no module below it
    "slime": {"launch", "recipes", "critic", "trainer", "rollout", "buffer", "machine"},
    "launch": {"machine"},
    "recipes": {"rollout", "buffer"},
    "critic": {"trainer", "buffer", "machine"},
    "trainer": {"buffer", "machine"},
    "rollout": {"buffer", "machine"},
    "buffer": {"machine"},
    "machine": set(),
}
USER_NAMES = {"slime", *(f"slime.{name}" for name in slime.__all__)}
CONFIG_LIBRARIES = {"hydra", "omegaconf"}
CONFIG_FRONT_DOOR = ("slime/config.py", "slime/config/")  # the only place that may import them
MAY_CATCH_ALL = {
    "rollout/worker.py",  # the episode runner: any failure becomes a recorded status
    "launch/local.py",  # Ray raises a plain Exception when its raylet is late
    "slime/observe/failures.py",  # what ends a run becomes one line, whatever raised it
}
# The only folder that may import a library.
OWN_LIBRARY = {"megatron": "trainer/megatron/"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_FOLDER_FILES = 10
MAX_CONFIG_FIELDS = 120


def violations(root: Path) -> list[str]:
    """Return each violation of the rules below `root` as one line that starts with the file and the line number."""
    found = []
    own = own_modules(root)
    for top in ALLOWED:
        paths = sorted(path for path in own if path.relative_to(root).parts[0] == top)
        for folder in sorted({path.parent for path in paths}):
            count = sum(path.parent == folder and path.name != "__init__.py" for path in paths)
            if count > MAX_FOLDER_FILES:
                found.append(f"{folder.relative_to(root)}: {count} files, at most {MAX_FOLDER_FILES}")
        for path in paths:
            name = path.relative_to(root).as_posix()
            source = path.read_text()
            found += [f"{name}:{line}" for line in _in_file(name, source)]
    return found


def _in_file(name: str, source: str) -> Iterator[str]:
    lines = len(source.splitlines())
    if lines > MAX_FILE_LINES:
        yield f"1: {lines} lines, at most {MAX_FILE_LINES}"
    try:
        tree = ast.parse(source, name)
    except SyntaxError as error:
        yield f"{error.lineno}: {error.msg}"
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}"
        elif isinstance(node, ast.ExceptHandler):
            if name not in MAY_CATCH_ALL and _catches_everything(node.type):
                yield f"{node.lineno}: catches every exception"
        else:
            yield from (f"{line}: {reason}" for line, reason in _wrong_imports(name, node))


def _wrong_imports(name: str, node: ast.AST) -> Iterator[tuple[int, str]]:
    own = name.split("/")[0]
    for target in _imported(name, node):
        top = target.split(".")[0]
        line = getattr(node, "lineno", 0)
        if top in CONFIG_LIBRARIES and not name.startswith(CONFIG_FRONT_DOOR):
            yield line, f"imports {target} outside the configuration's front door"
        if own == "examples" and top == "slime" and target not in USER_NAMES:
            yield line, f"examples imports {target}"
        if not name.startswith(OWN_LIBRARY.get(top, "")):
            yield line, f"imports {target} outside {OWN_LIBRARY[top]}"
        if top in ALLOWED and top != own and top not in ALLOWED[own]:
            yield line, f"{own} imports {target}"


def _imported(name: str, node: ast.AST) -> list[str]:
    """Dotted names that a node imports: `from a.b import c` is a.b.c, relative imports are made absolute."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = name.split("/")[: -node.level] if node.level else []
        base += node.module.split(".") if node.module else []
        return [".".join([*base, alias.name]) for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        value = node.args[0].value
        if function in ("import_module", "__import__") and isinstance(value, str):
            return [value]
    return []


def _catches_everything(caught: ast.expr | None) -> bool:
    if caught is None:
        return True
    kinds = caught.elts if isinstance(caught, ast.Tuple) else [caught]
    names = {kind.attr if isinstance(kind, ast.Attribute) else getattr(kind, "id", "") for kind in kinds}
    return bool(names & {"Exception", "BaseException"})


def count_settings(config: type, known: set[type] | None = None) -> int:
    """Settings that a user has to learn, counted through nested dataclasses; a group is not a setting itself.

    A group that stands in several places (the layout of policy and of critic) is learned once.
    """
    known = set() if known is None else known
    known.add(config)
    hints = typing.get_type_hints(config)
    total = 0
    for field in dataclasses.fields(config):
        kinds = [kind for kind in (hints[field.name], *typing.get_args(hints[field.name])) if isinstance(kind, type)]
        nested = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
        if nested is None:
            total += 1
        elif nested not in known:
            total += count_settings(nested, known)
    return total


def test_this_tree_keeps_the_rules() -> None:
    assert all((ROOT / top / "__init__.py").exists() for top in ALLOWED if top != "examples")  # scripts, no package
    assert (ROOT / "examples").is_dir()
    assert violations(ROOT) == []


def test_tests_mirror_the_folders_of_the_product() -> None:
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").glob("**/*.py")}
    of_their_own = {Path(), Path("support"), Path("project")}
    assert [folder.as_posix() for folder in sorted(folders - of_their_own) if not (ROOT / folder).is_dir()] == []
    assert [path.name for path in (ROOT / "tests").glob("*.py")] == ["conftest.py"]


def test_the_floors_have_an_order() -> None:
    order = list(TopologicalSorter(ALLOWED).static_order())  # CycleError: two floors import each other
    assert order[0] == "machine"
    assert order[-2:] == ["slime", "examples"]


def test_a_class_name_exists_once() -> None:
    places: dict[str, list[str]] = {}
    for path in own_modules():
        name = path.relative_to(ROOT).as_posix()
        if name.split("/")[0] in ALLOWED.keys() - {"examples"}:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    places.setdefault(node.name, []).append(name)
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_the_configuration_stays_within_its_budget() -> None:
    assert 0 < count_settings(Config) <= MAX_CONFIG_FIELDS


def test_settings_are_counted_through_groups() -> None:
    @dataclasses.dataclass
    class Inner:
        a: int = 0
        b: str = ""

    @dataclasses.dataclass
    class Other:
        c: bool = False

    outer = dataclasses.make_dataclass("Outer", [("x", int), ("one", Inner | None), ("three", list[Other])])
    twice = dataclasses.make_dataclass("Twice", [("x", int), ("one", Inner), ("two", Inner), ("deep", outer)])
    assert count_settings(Inner) == 2
    assert count_settings(outer) == 1 + 2 + 1
    assert count_settings(twice) == 1 + 2 + (1 + 1)


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("trainer/a.py", "import rollout.engines.server\n", "trainer imports rollout.engines.server"),
        ("rollout/a.py", "from trainer import publish\n", "rollout imports trainer.publish"),
        ("rollout/deep/a.py", "from ...slime import loop\n", "rollout imports slime.loop"),
        ("trainer/a.py", "def f():\n    from critic.head import Head\n", ":2: trainer imports critic.head.Head"),
        ("buffer/a.py", "if TYPE_CHECKING:\n    import slime.schema\n", "buffer imports slime.schema"),
        ("buffer/a.py", "x = importlib.import_module('rollout.engines')\n", "buffer imports rollout.engines"),
        ("launch/a.py", "from slime import loop\n", "launch imports slime.loop"),
        ("launch/a.py", "import slime.config\n", "launch imports slime.config"),
        ("launch/a.py", "def f():\n    from slime.schema import Config\n", "launch imports slime.schema.Config"),
        ("launch/a.py", "from rollout.config import RolloutConfig\n", "launch imports rollout.config"),
        ("recipes/coding/a.py", "from slime import Task\n", "recipes imports slime.Task"),
        ("machine/a.py", "import buffer.types\n", "machine imports buffer.types"),
        ("recipes/coding/a.py", "import trainer.losses\n", "recipes imports trainer.losses"),
        (
            "examples/lookup/lookup.py",
            "from rollout.environment import Task\n",
            "examples imports rollout.environment.Task",
        ),
        ("examples/lookup/lookup.py", "from slime.config import load\n", "examples imports slime.config.load"),
        ("critic/a.py", "from omegaconf import OmegaConf\n", "imports omegaconf.OmegaConf outside"),
        ("slime/build.py", "def f():\n    import hydra\n", "imports hydra outside"),
        (
            "trainer/worker.py",
            "def f():\n    from megatron.core import mpu\n",
            "megatron.core.mpu outside trainer/megatron/",
        ),
        ("critic/head.py", "import megatron.core\n", "imports megatron.core outside trainer/megatron/"),
        ("buffer/a.py", "x = 0\n" * 401, "401 lines, at most 400"),
        ("buffer/a.py", "def f():\n" + "    x = 0\n" * 60, "f has 61 lines, at most 60"),
        ("buffer/a.py", "class A:\n    async def g(self):\n" + "        x = 0\n" * 60, "g has 61 lines, at most 60"),
        ("buffer/a.py", "try:\n    f()\nexcept Exception:\n    raise\n", ":3: catches every exception"),
        ("buffer/a.py", "try:\n    f()\nexcept (OSError, builtins.Exception) as e:\n    raise\n", "catches every"),
        ("buffer/a.py", "def f(:\n", ":1: invalid syntax"),
        ("buffer/a.py", "try:\n    f()\nexcept:\n    raise\n", "catches every"),
        ("rollout/agents/loop.py", "try:\n    f()\nexcept BaseException:\n    raise\n", "catches every"),
    ],
)
def test_each_violation_is_found(tmp_path: Path, path: str, source: str, message: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    (found,) = violations(tmp_path)
    assert found.startswith(path)
    assert message in found


def test_an_eleventh_file_in_a_folder_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "rollout" / "guard"
    folder.mkdir(parents=True)
    for name in ("__init__", *"abcdefghij"):
        (folder / f"{name}.py").touch()
    assert violations(tmp_path) == []
    (folder / "k.py").touch()
    assert violations(tmp_path) == ["rollout/guard: 11 files, at most 10"]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("slime/build.py", "import buffer, critic, trainer, rollout, launch, recipes\n"),
        ("examples/lookup/lookup.py", "import slime\nfrom slime import Task, TaskRow\n"),
        ("slime/config.py", "from hydra import compose\nfrom omegaconf import OmegaConf\n"),
        ("launch/a.py", "from launch.config import ClusterConfig\nimport machine.ports\n"),
        ("trainer/megatron/modules/a.py", "from megatron.core import mpu\n"),
        ("rollout/guard/a.py", "from .judge import Judge\nfrom ..agent import run\nimport buffer.types\n"),
        ("rollout/worker.py", "try:\n    f()\nexcept Exception as e:\n    record(e)\n"),
        ("buffer/a.py", "import rollouts\ntry:\n    f()\nexcept ValueError:\n    raise\n"),
        ("buffer/a.py", "def f():\n" + "    x = 0\n" * 59),
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, path: str, source: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    assert violations(tmp_path) == []
