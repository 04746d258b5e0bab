"""The lock files: complete, minimal, and what is installed; and the set-up script's refusals."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
STAMP = Path(sys.prefix) / "setup.stamp"  # its first line names the lock that this environment was made from
LOCK = STAMP.read_text().splitlines()[0] if STAMP.exists() else "locks/cpu.txt"
TAKEN_ALONE = "sglang"  # installed without its own requirements, which are for CUDA

on_cpu_lock = pytest.mark.skipif(LOCK != "locks/cpu.txt", reason=f"this environment was made from {LOCK}")


def locked(path: str) -> dict[str, str]:
    """Name to exact version of a lock file; every line that is not a comment must be one."""
    versions: dict[str, str] = {}
    for line in (ROOT / path).read_text().splitlines():
        if not line.startswith("#"):
            match = re.fullmatch(r"([a-z0-9-]+)==([^\s+]+)", line)
            assert match, f"{path}: {line!r} is not name==version without a local label"
            assert match[1] not in versions, f"{path}: {match[1]} twice"
            versions[match[1]] = match[2]
    return versions


def roots(path: str) -> dict[str, Requirement]:
    """Name to requirement of a lock's input; every line has its reason."""
    wanted: dict[str, Requirement] = {}
    for line in (ROOT / path).read_text().splitlines():
        text, _, reason = line.partition("#")
        if text.strip():
            assert reason.strip(), f"{path}: {text.strip()} has no reason"
            requirement = Requirement(text.strip())
            wanted[canonicalize_name(requirement.name)] = requirement
    return wanted


def requirements(name: str, extras: frozenset[str]) -> Iterator[Requirement]:
    """What an installed package needs on this machine, with the given extras of it."""
    for text in importlib.metadata.requires(name) or []:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield requirement


def closure(wanted: dict[str, Requirement]) -> dict[str, list[tuple[str, Requirement]]]:
    """Every package that the roots need, with who needs it and how. `TAKEN_ALONE` needs nothing."""
    needed: dict[str, list[tuple[str, Requirement]]] = {}
    pending = [("the project", requirement) for requirement in wanted.values()]
    seen = set()
    while pending:
        who, requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        needed.setdefault(name, []).append((who, requirement))
        step = (name, frozenset(requirement.extras))
        if name != TAKEN_ALONE and step not in seen and name in locked("locks/cpu.txt"):
            seen.add(step)
            pending += [(name, child) for child in requirements(*step)]
    return needed


def test_what_is_installed_is_what_is_locked() -> None:
    wrong = {}
    for name, version in locked(LOCK).items():
        try:
            installed = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            installed = "nothing"
        if installed != version:
            wrong[name] = f"{version} is locked, {installed} is installed"
    assert wrong == {}


@on_cpu_lock
def test_the_cpu_lock_holds_all_that_its_packages_need() -> None:
    lock = locked("locks/cpu.txt")
    missing = [
        f"{who} needs {requirement}, the lock has {lock.get(name, 'nothing')}"
        for name, uses in closure(roots("locks/cpu.in")).items()
        for who, requirement in uses
        if name not in lock or not requirement.specifier.contains(lock[name], prereleases=True)
    ]
    assert missing == []


@on_cpu_lock
def test_the_cpu_lock_holds_nothing_that_nobody_needs() -> None:
    assert set(locked("locks/cpu.txt")) - set(closure(roots("locks/cpu.in"))) == set()


def test_the_gpu_lock_fits_its_input() -> None:
    lock = locked("locks/gpu.txt")
    for name, requirement in roots("locks/gpu.in").items():
        assert requirement.specifier.contains(lock.get(name, "0"), prereleases=True), name


def test_both_locks_hold_the_projects_dependencies_and_the_same_engines() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cpu, gpu = locked("locks/cpu.txt"), locked("locks/gpu.txt")
    for text in project["dependencies"]:
        assert Requirement(text).name in cpu, text
        assert Requirement(text).name in gpu, text
    for name in ("sglang", "megatron-core", "ray", "transformers", "hydra-core", "omegaconf", "wandb"):
        assert cpu[name] == gpu[name]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with all that the set-up script reads, and an empty `tools` folder that is first on its PATH."""
    for name in ("launch/setup.sh", "locks/cpu.txt", "locks/gpu.txt", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "tools").mkdir()
    return tmp_path


def fake(tree: Path, name: str, body: str) -> None:
    tool = tree / "tools" / name
    tool.write_text(f"#!/bin/sh\n{body}\n")
    tool.chmod(0o755)


def set_up(tree: Path, **env: str) -> subprocess.CompletedProcess[str]:
    path = f"{tree / 'tools'}:{os.environ['PATH']}"
    command = ["bash", str(tree / "launch" / "setup.sh")]
    base = {key: value for key, value in os.environ.items() if key not in ("PYTHON", "GPU")}
    return subprocess.run(command, env=base | {"PATH": path} | env, capture_output=True, text=True, timeout=60)


def disk_full(tree: Path) -> None:
    fake(tree, "df", f"echo header; echo disk 99 98 {3 * 2**20} 97% /")  # 3 GB are free


def test_setup_refuses_a_small_disk_in_one_line(tree: Path) -> None:
    disk_full(tree)
    result = set_up(tree, PYTHON=sys.executable)
    assert result.returncode == 2
    assert result.stderr.endswith(f"setup: 3 GB of disk are free in {tree}; the installation needs 8 GB\n")
    result = set_up(tree, PYTHON=sys.executable, GPU="1")
    assert "the installation needs 40 GB" in result.stderr
    assert not (tree / ".venv").exists()


def test_setup_refuses_an_old_python_and_says_what_to_install(tree: Path) -> None:
    fake(tree, "old-python", "echo 3.9")
    result = set_up(tree, PYTHON="old-python")
    assert result.returncode == 2
    assert result.stderr.startswith("setup: Python 3.9 is too old: install Python 3.11")
    assert result.stderr.count("\n") == 1


def test_setup_throws_an_interrupted_installation_away(tree: Path) -> None:
    disk_full(tree)  # so that it stops right before it would install
    (tree / ".venv").mkdir()
    (tree / ".venv" / "setup.broken").touch()
    result = set_up(tree, PYTHON=sys.executable)
    assert result.returncode == 2
    assert "making it anew" in result.stdout
    assert not (tree / ".venv").exists()


def test_setup_does_nothing_when_nothing_changed_and_notices_a_changed_lock(tree: Path) -> None:
    disk_full(tree)
    venv = tree / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    hashed = f'cd "{tree}" && {{ cat locks/cpu.txt pyproject.toml && .venv/bin/python -VV && pwd; }} | sha256sum'
    digest = subprocess.run(["bash", "-c", hashed], capture_output=True, text=True, check=True).stdout.split()[0]
    (venv / "setup.stamp").write_text(f"locks/cpu.txt\n{digest}\n")
    unchanged = set_up(tree, PYTHON=sys.executable)
    assert (unchanged.returncode, unchanged.stdout, unchanged.stderr) == (0, "", "")
    with (tree / "locks" / "cpu.txt").open("a") as lock:
        lock.write("another==1.0\n")
    assert set_up(tree, PYTHON=sys.executable).returncode == 2  # goes to work, and stops at the full disk
