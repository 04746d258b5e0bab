"""A checkout in use also contains runs, caches, environments and a user's tasks; the checks must ignore them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tree import ROOT

PROJECT = (
    *("slime", "launch", "recipes", "critic", "trainer", "rollout", "buffer", "machine", "tests", "benchmarks"),
    *("docs", "examples", "locks", "README.md", "pyproject.toml", "Makefile"),
)
BROKEN = "import sys, os\ndef f(:\n"  # no formatter, linter or type checker accepts it
CLUTTER = {
    "runs/ppo_coding/code.py": BROKEN,
    "runs/tests/test_of_a_run.py": "def test_fails():\n    assert False\n",
    "wandb/run-1/files/code.py": BROKEN,
    "outputs/code.py": BROKEN,
    ".cache/slime/models/code.py": BROKEN,
    "env-3.11/pyvenv.cfg": "home = /usr/bin\n",
    "env-3.11/lib/python3.11/site-packages/package/__init__.py": BROKEN,
    "env-3.11/bin/activate_this.py": BROKEN,
    "mine/lookup.py": BROKEN,
    "examples/lookup/runs/ppo_lookup/code.py": BROKEN,
    "mine/recipes/recipe/ppo_mine.yaml": "# @package _global_\n# Mine\ndefaults: [ppo_coding, _self_]\n",
    "recipes/mine/task.py": BROKEN,
    "recipes/recipe/a_recipe_of_mine.yaml": "# @package _global_\n# Mine\ndefaults: [ppo_coding, _self_]\n",
    "recipes/model/a_model_of_mine.yaml": "# @package _global_\n# Mine\nmodel:\n  name: mine\n",
    "recipes/cluster/a_cluster_of_mine.yaml": "# @package _global_\n# Mine\ncluster:\n  name: mine\n",
    "notes.py": BROKEN,
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, with the other files of a used checkout, in a folder with a space in its name."""
    made = tmp_path_factory.mktemp("a checkout")
    for name in PROJECT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, made / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, made / name)
    for name, text in CLUTTER.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text(text)
    return made


@pytest.mark.parametrize(
    "command",
    [
        "ruff check .",
        "ruff format --check .",
        "mypy",
        "pytest -q -p no:cacheprovider tests/project/test_layout.py tests/project/test_dependencies.py",
    ],
)
def test_other_files_in_a_checkout_change_nothing(checkout: Path, command: str) -> None:
    if command == "mypy" and (ROOT / ".mypy_cache").is_dir():  # else it reads every package anew
        shutil.copytree(ROOT / ".mypy_cache", checkout / ".mypy_cache")
    done = subprocess.run(
        [sys.executable, "-m", *command.split()],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
