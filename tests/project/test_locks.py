"""The lock files: complete, minimal, hashed, for every Python of the project, and equal to the installation."""

from __future__ import annotations

import importlib.metadata
import re
import runpy
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from tree import ROOT

STAMP = Path(sys.prefix) / "setup.stamp"  # its first line names the lock that this environment was made from
LOCK = STAMP.read_text().splitlines()[0] if STAMP.exists() else "locks/cpu.txt"
TORCH_LOCK = "locks/torch-cpu.txt" if "+" in importlib.metadata.version("torch") else "locks/torch-cuda.txt"
PYTHONS = ("3.11", "3.12")  # that each lock is for
WRITE = runpy.run_path(str(ROOT / "locks" / "write.py"))  # a script, not a module of the project
TAKEN_ALONE = "sglang"  # installed without its own requirements, which are for CUDA

on_cpu_lock = pytest.mark.skipif(LOCK != "locks/cpu.txt", reason=f"this environment was made from {LOCK}")


def locked(*paths: str) -> dict[str, str]:
    """Return {name: exact version} of lock files; every line except comments must be a package with its hashes."""
    versions: dict[str, str] = {}
    for path in paths:
        lines = [line for line in (ROOT / path).read_text().splitlines() if not line.startswith("#")]
        for entry in "\n".join(lines).replace(" \\\n", " ").splitlines():
            match = re.fullmatch(r"([a-z0-9-]+)==(\S+)((?: +--hash=sha256:[0-9a-f]{64})+)", entry)
            assert match, f"{path}: {entry!r} is not name==version with its hashes"
            assert match[1] not in versions, f"{path}: {match[1]} twice"
            versions[match[1]] = match[2]
    return versions


def roots(path: str) -> dict[str, Requirement]:
    """Return {name: requirement} of a lock's input; every line must have a reason."""
    wanted: dict[str, Requirement] = {}
    for line in (ROOT / path).read_text().splitlines():
        text, _, reason = line.partition("#")
        if text.strip():
            assert reason.strip(), f"{path}: {text.strip()} has no reason"
            requirement = Requirement(text.strip())
            wanted[canonicalize_name(requirement.name)] = requirement
    return wanted


def requirements(name: str, extras: frozenset[str]) -> Iterator[Requirement]:
    """Yield the requirements of an installed package, with the given extras, on one of PYTHONS."""
    for text in importlib.metadata.requires(name) or []:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(
            marker.evaluate({"extra": extra, "python_version": python, "python_full_version": f"{python}.1"})
            for extra in ("", *extras)
            for python in PYTHONS
        ):
            yield requirement


def closure(wanted: dict[str, Requirement], lock: dict[str, str]) -> dict[str, list[tuple[str, Requirement]]]:
    """Return every package that the roots need, with the packages that require it. `TAKEN_ALONE` requires nothing."""
    needed: dict[str, list[tuple[str, Requirement]]] = {}
    pending = [("the project", requirement) for requirement in wanted.values()]
    seen = set()
    while pending:
        who, requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        needed.setdefault(name, []).append((who, requirement))
        step = (name, frozenset(requirement.extras))
        if name != TAKEN_ALONE and step not in seen and name in lock:
            seen.add(step)
            pending += [(name, child) for child in requirements(*step)]
    return needed


def test_what_is_installed_is_what_is_locked() -> None:
    wrong = {}
    for name, version in locked(*([LOCK, TORCH_LOCK] if LOCK == "locks/cpu.txt" else [LOCK])).items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed = "nothing"
        if installed != version:
            wrong[name] = f"{version} is locked, {installed} is installed"
    assert wrong == {}


@on_cpu_lock
def test_the_cpu_lock_holds_all_that_its_packages_need() -> None:
    lock = locked("locks/cpu.txt", TORCH_LOCK)
    missing = [
        f"{who} needs {requirement}, the lock has {lock.get(name, 'nothing')}"
        for name, uses in closure(roots("locks/cpu.in"), lock).items()
        for who, requirement in uses
        if name not in lock or not requirement.specifier.contains(lock[name], prereleases=True)
    ]
    assert missing == []


@on_cpu_lock
def test_the_cpu_lock_holds_nothing_that_nobody_needs() -> None:
    lock = locked("locks/cpu.txt", TORCH_LOCK)
    assert set(lock) - set(closure(roots("locks/cpu.in"), lock)) == set()


def test_both_builds_of_torch_are_of_one_version() -> None:
    cpu, cuda = locked("locks/torch-cpu.txt"), locked("locks/torch-cuda.txt")
    assert cpu == {"torch": f"{cuda['torch']}+cpu"}
    assert roots("locks/cpu.in")["torch"].specifier.contains(cuda["torch"])
    assert {"nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-nccl-cu13", "cuda-toolkit"} <= set(cuda)
    assert not {name for name in locked("locks/cpu.txt") if name.startswith(("nvidia-", "cuda-"))}


def test_the_gpu_lock_fits_its_input() -> None:
    lock = locked("locks/gpu.txt")
    for name, requirement in roots("locks/gpu.in").items():
        assert requirement.specifier.contains(lock.get(name, "0"), prereleases=True), name


def test_the_lock_of_the_documentation_fits_its_input() -> None:
    """`make docs` shows that it is complete: its packages are installed without their own requirements."""
    lock = locked("locks/docs.txt")
    for name, requirement in roots("locks/docs.in").items():
        assert requirement.specifier.contains(lock.get(name, "0")), name


def test_both_locks_hold_the_projects_dependencies_and_the_same_engines() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cpu, gpu = locked("locks/cpu.txt", "locks/torch-cpu.txt"), locked("locks/gpu.txt")
    for text in project["dependencies"]:
        assert Requirement(text).name in cpu, text
        assert Requirement(text).name in gpu, text
    for extra, lock in (("test", cpu), ("gpu", gpu)):
        assert {Requirement(text).name for text in project["optional-dependencies"][extra]} <= set(lock)
    for name in ("sglang", "megatron-core", "ray", "transformers", "hydra-core", "omegaconf", "wandb"):
        assert cpu[name] == gpu[name]


def test_the_locks_are_for_the_pythons_that_the_project_declares() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = SpecifierSet(project["requires-python"])
    assert tuple(f"3.{minor}" for minor in range(20) if f"3.{minor}.9" in declared) == PYTHONS
    assert tuple(f"{major}.{minor}" for major, minor in WRITE["PYTHONS"]) == PYTHONS
    assert f"{' | '.join(PYTHONS)})" in (ROOT / "launch" / "setup.sh").read_text()


def package(*wheels: str, sdist: bool = True) -> dict[str, Any]:
    """Return a package in uv's format; the hash of each file is its name."""
    files = [{"url": f"https://x/{name}", "hashes": {"sha256": name}} for name in (*wheels, "a-1.tar.gz")]
    return {"name": "a", "version": "1", "wheels": files[:-1]} | ({"sdist": files[-1]} if sdist else {})


@pytest.mark.parametrize(
    ("wheel", "fits"),
    [
        ("a-1-py3-none-any.whl", True),
        ("a-1-py2.py3-none-any.whl", True),
        ("a-1-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", True),
        ("a-1-cp312-cp312-manylinux_2_34_x86_64.whl", True),
        ("a-1-cp39-abi3-manylinux1_x86_64.whl", True),
        ("a-1%2Bcpu-cp312-cp312-linux_x86_64.whl", True),
        ("a-1-py3-none-manylinux_2_27_x86_64.whl", True),
        ("a-1-cp313-cp313-manylinux_2_17_x86_64.whl", False),
        ("a-1-cp313-abi3-manylinux_2_17_x86_64.whl", False),
        ("a-1-cp311-cp311-manylinux_2_17_aarch64.whl", False),
        ("a-1-cp311-cp311-musllinux_1_2_x86_64.whl", False),
        ("a-1-cp311-cp311-macosx_11_0_x86_64.whl", False),
        ("a-1-pp311-pypy311_pp73-manylinux_2_17_x86_64.whl", False),
        ("a-1-cp312-none-win_amd64.whl", False),
    ],
)
def test_the_hashes_are_those_of_files_that_a_supported_machine_installs(wheel: str, fits: bool) -> None:
    other = "a-1-cp310-cp310-win_amd64.whl"
    assert WRITE["hashes"](package(wheel, other)) == [wheel if fits else "a-1.tar.gz"]
    if not fits:
        with pytest.raises(ValueError, match="a 1 has no file for Linux on x86-64"):
            WRITE["hashes"](package(wheel, sdist=False))


def test_a_lock_has_one_version_of_a_package() -> None:
    packages = [package("a-1-py3-none-any.whl"), package("b-1-py3-none-any.whl") | {"name": "b"}]
    assert list(WRITE["lines"](packages)) == [
        f"{name}==1 \\\n    --hash=sha256:{name}-1-py3-none-any.whl" for name in "ab"
    ]
    assert WRITE["chosen"](packages, "(?!b$).*") == packages[:1]
    with pytest.raises(ValueError, match="no version for all of"):
        WRITE["chosen"]([*packages, packages[0] | {"version": "2"}], "a|b")
