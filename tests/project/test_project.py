"""What the project shows to the outside: license, types, hooks, workflow and changelog agree with what is built."""

from __future__ import annotations

import re
import shlex
import tomllib

import yaml
from packaging.specifiers import SpecifierSet
from tree import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_license_is_the_one_that_is_declared() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert PYPROJECT["project"]["license"] == "Apache-2.0"
    assert PYPROJECT["project"]["license-files"] == ["LICENSE"]
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_every_package_carries_its_types() -> None:
    setuptools = PYPROJECT["tool"]["setuptools"]
    tops = [pattern.removesuffix("*") for pattern in setuptools["packages"]["find"]["include"]]
    assert {"slime", "rollout", "trainer"} < set(tops)
    assert [top for top in tops if not (ROOT / top / "py.typed").exists()] == []  # a marker counts for subpackages, too
    assert "py.typed" in setuptools["package-data"]["*"]


def test_tensors_and_ray_handles_are_checked() -> None:
    """`Any` begins where Megatron, SGLang and transformers do."""
    mypy = PYPROJECT["tool"]["mypy"]
    assert mypy["warn_unused_ignores"]
    followed = {name: one["follow_imports"] for one in mypy["overrides"] for name in one["module"]}
    assert {name for name, how in followed.items() if how == "skip"} == {
        "deepspeed.*",
        "megatron.*",
        "sglang.*",
        "transformers.*",
    }
    assert not any(one.get("ignore_errors") for one in mypy["overrides"])


def test_hooks_run_what_make_lint_runs() -> None:
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local"  # a hook from elsewhere would bring a second set of versions
    entries = {hook["entry"].replace("format .", "format --check .") for hook in repo["hooks"]}
    (recipe,) = re.findall(r"^lint: setup\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert entries == {line.strip() for line in recipe.splitlines()}
    assert all(not hook["pass_filenames"] for hook in repo["hooks"])  # pyproject.toml names the files


def test_the_workflow_runs_what_ci_runs_on_every_declared_python() -> None:
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["test"]
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands[-1] == ".ci/run"
    assert all(shlex.split(line)[0] == "sudo" for text in commands[:-1] for line in text.splitlines())
    assert "libseccomp2" in commands[0]
    assert job["steps"][-1]["env"]["PYTHON"] == "python${{ matrix.python }}"
    declared = SpecifierSet(PYPROJECT["project"]["requires-python"])
    assert job["strategy"]["matrix"]["python"] == [f"3.{minor}" for minor in range(20) if f"3.{minor}.9" in declared]


def test_the_changelog_has_the_version_of_the_project_or_says_that_none_is_released() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert PYPROJECT["project"]["version"] in headings or "No version has been released yet" in text
    kinds = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_every_example_is_linted_and_typed() -> None:
    """They are listed by name, since a pattern of ruff would reach into an example's runs/."""
    examples = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("examples/*/*.py")}
    assert examples
    assert examples <= set(PYPROJECT["tool"]["ruff"]["include"])
    assert examples <= set(PYPROJECT["tool"]["mypy"]["files"])
