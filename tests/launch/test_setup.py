"""The setup script: its decisions, its refusals, and that it does nothing if nothing has changed.

The tests download nothing. Interpreters and pip are fakes that record how they are called, except in one test that runs
the real pip on local folders and a local server.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from tree import ROOT

CPU_BUILD = "locks/torch-cpu.txt"
CUDA_BUILD = "locks/torch-cuda.txt"
OFFER = "Available versions: 2.15.0+cpu, 2.13.0+cpu, 2.13.0"  # of `pip index versions`

# A fake Python with venv and pip, which only record how they are called. Files in the tree contain their answers.
INTERPRETER = """
echo "$*${PYTHONPATH:+ sees packages elsewhere}" >>calls
case "$*" in
*'import torch') ! cat no-torch ;;
*'import ensurepip'*) exit $(cat no-ensurepip || echo 0) ;;
*'"python%d.%d-venv"'*) echo "python$VERSION-venv" ;;
*'"%d.%d"'*) echo "$VERSION" ;;
*_base_executable*) echo "$0" ;;
-VV | --version) echo "Python $VERSION" ;;
'-m venv '*)
    mkdir -p .venv/bin .venv/lib/python3.x/site-packages
    cp "$0" .venv/bin/python
    echo "command = $0 -m venv $PWD/.venv" >.venv/pyvenv.cfg ;;
*'version("torch")'*) cat installed ;;
*'index versions torch'*--index-url*) cat pytorch ;;
*'index versions torch'*) cat configured ;;
*"--requirement $(cat refused)"*) echo "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES"; exit 1 ;;
esac
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with all files that the setup script reads, and a folder `tools` that comes first on its PATH.

    By default, Python 3.11 is the fake, other Pythons do not start, pip finds no CPU build of torch, and 99 GB of disk
    are free. The folder's name contains a space and a quote.
    """
    tree = tmp_path / "my user's slime"
    for name in ("launch/setup.sh", "locks/cpu.txt", "locks/gpu.txt", CPU_BUILD, CUDA_BUILD, "pyproject.toml"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    (tree / "tools").mkdir()
    (tree / "refused").write_text("nothing")
    interpreter(tree, "python3.11", "3.11")
    for name in ("python3.12", "python3"):
        fake(tree, name, "exit 127")
    disk(tree, 99)
    return tree


def fake(tree: Path, name: str, body: str) -> None:
    tool = tree / "tools" / name
    tool.write_text(f"#!/bin/sh\n{body}\n")
    tool.chmod(0o755)


def interpreter(tree: Path, name: str, version: str) -> None:
    fake(tree, name, f"VERSION={version}{INTERPRETER}")


def disk(tree: Path, free_gb: int) -> None:
    fake(tree, "df", f"echo header; echo disk 99 98 {free_gb * 2**20} 97% /")


def set_up(tree: Path, **env: str) -> subprocess.CompletedProcess[str]:
    path = f"{tree / 'tools'}:{os.environ['PATH']}"
    command = ["bash", str(tree / "launch" / "setup.sh")]
    base = {key: value for key, value in os.environ.items() if key not in ("PYTHON", "GPU", "TORCH_INDEX")}
    return subprocess.run(command, env=base | {"PATH": path} | env, capture_output=True, text=True, timeout=600)


def calls(tree: Path, text: str) -> list[str]:
    """Return the recorded calls that contain `text`."""
    return [line for line in (tree / "calls").read_text().splitlines() if text in line]


def installed(tree: Path) -> list[str]:
    """Return the lock files that pip was called with, in order; every call must require hashes."""
    found = calls(tree, "--requirement")
    assert all({"--require-hashes", "--no-deps"} <= set(line.split()) for line in found)
    return [line.partition("--requirement ")[2].split()[0] for line in found][1:]  # after pip itself


# Which build of torch -------------------------------------------------------------------------------------------------


def test_a_cpu_build_that_pip_is_pointed_at_is_taken(tree: Path) -> None:
    (tree / "configured").write_text(OFFER)
    (tree / "pytorch").write_text(OFFER)
    result = set_up(tree)
    assert (result.returncode, result.stderr) == (0, "")
    assert installed(tree) == [CPU_BUILD, "locks/cpu.txt"]
    assert calls(tree, "--index-url") == []
    assert (tree / ".venv" / "setup.stamp").read_text().startswith("locks/cpu.txt\n")
    assert not (tree / ".venv" / "setup.broken").exists()


def test_else_the_index_of_cpu_builds_is_asked_for_a_few_seconds(tree: Path) -> None:
    (tree / "configured").write_text("Available versions: 2.15.0, 2.13.0")
    (tree / "pytorch").write_text(OFFER)
    assert set_up(tree, TORCH_INDEX="http://127.0.0.1:9/cpu").returncode == 0
    assert installed(tree) == [CPU_BUILD, "locks/cpu.txt"]
    asked, fetched = calls(tree, "--index-url http://127.0.0.1:9/cpu")
    assert "--retries 0 --timeout 3" in asked
    assert fetched.startswith("-m pip install")


@pytest.mark.parametrize("answer", ["", "Available versions: 2.13.0", "Available versions: 2.13.0+cpu1, 12.13.0+cpu"])
def test_else_it_is_the_cuda_build_with_its_libraries(tree: Path, answer: str) -> None:
    (tree / "configured").write_text(answer)
    result = set_up(tree)
    assert result.returncode == 0
    assert installed(tree) == [CUDA_BUILD, "locks/cpu.txt"]
    assert "installing the CUDA build, which also runs on CPUs" in result.stdout


def test_a_cpu_build_that_is_not_the_locked_file_is_passed_over(tree: Path) -> None:
    for name in ("configured", "pytorch"):
        (tree / name).write_text(OFFER)
    (tree / "refused").write_text(CPU_BUILD)
    result = set_up(tree)
    assert result.returncode == 0
    assert installed(tree) == [CPU_BUILD, CPU_BUILD, CUDA_BUILD, "locks/cpu.txt"]
    assert result.stdout.count("setup:   skipped: THESE PACKAGES DO NOT MATCH THE HASHES\n") == 2


def test_a_small_disk_refuses_the_cuda_build_and_says_how_to_do_without(tree: Path) -> None:
    disk(tree, 9)
    result = set_up(tree)
    assert result.returncode == 2
    assert result.stderr == (
        f"setup: 9 GB of disk are free in {tree}; torch's CUDA build (no CPU build was found) needs 12 GB: free some "
        "space, or point pip to torch 2.13.0+cpu (PIP_FIND_LINKS=FOLDER or PIP_EXTRA_INDEX_URL=URL)\n"
    )
    assert installed(tree) == []
    (tree / "configured").write_text(OFFER)
    assert set_up(tree).returncode == 0  # a CPU build fits


def test_the_build_of_torch_stays_when_another_package_changes(tree: Path) -> None:
    assert set_up(tree).returncode == 0
    (tree / "installed").write_text("2.13.0")
    (tree / "configured").write_text(OFFER)
    (tree / "calls").write_text("")
    with (tree / "locks" / "cpu.txt").open("a") as lock:
        lock.write("another==1.0\n")
    assert set_up(tree).returncode == 0
    assert [line.partition("--requirement ")[2] for line in calls(tree, "--requirement")] == [
        CUDA_BUILD,
        "locks/cpu.txt",
    ]


def test_a_failed_installation_ends_in_one_line_with_pips_reason(tree: Path) -> None:
    (tree / "refused").write_text("locks/cpu.txt")
    result = set_up(tree)
    assert result.returncode == 2
    log = tree / ".venv" / "setup.log"
    last = "installing locks/cpu.txt failed: THESE PACKAGES DO NOT MATCH THE HASHES; the log above is"
    assert result.stderr.splitlines()[-1] == f"setup: {last} {log}"
    assert (tree / ".venv" / "setup.broken").exists()
    (tree / "refused").write_text("nothing")
    assert "recreating it" in set_up(tree).stdout


def test_the_reason_is_that_of_the_command_that_failed(tree: Path) -> None:
    (tree / "configured").write_text(OFFER)
    (tree / "refused").write_text(CPU_BUILD)  # an earlier error that does not stop the setup
    (tree / "no-torch").write_text("Traceback\nImportError: libcudart.so.13 is missing\n")
    result = set_up(tree)
    assert result.returncode == 2
    assert "importing torch failed: ImportError: libcudart.so.13 is missing; the log above" in result.stderr


def test_without_ensurepip_the_systems_pip_puts_the_locked_one_into_the_environment(tree: Path) -> None:
    (tree / "no-ensurepip").write_text("1")
    assert set_up(tree).returncode == 0
    assert calls(tree, "-m venv") == ["-m venv --without-pip .venv"]
    first = calls(tree, "--requirement")[0]
    assert first.startswith("-m pip --python .venv/bin/python install")
    assert "--require-hashes" in first.split()
    assert (tree / ".venv" / "setup.tools.txt").read_text().count("==") == 2  # pip, setuptools


def test_the_users_own_packages_are_not_taken_for_those_of_the_environment(tree: Path) -> None:
    assert set_up(tree, PYTHONPATH=str(tree / "elsewhere")).returncode == 0
    assert calls(tree, "sees packages elsewhere") == []


def test_a_link_to_the_folder_is_the_same_folder(tree: Path) -> None:
    assert set_up(tree).returncode == 0
    link = tree.parent / "link"
    link.symlink_to(tree)
    result = set_up(link)
    assert (result.returncode, result.stdout) == (0, "")


def test_gpu_packages_bring_their_own_torch(tree: Path) -> None:
    assert set_up(tree, GPU="1").returncode == 0
    assert installed(tree) == ["locks/gpu.txt"]
    unchanged = set_up(tree)
    assert (unchanged.returncode, unchanged.stdout) == (0, "")
    back = set_up(tree, GPU="0")
    assert "recreating it" in back.stdout
    assert installed(tree)[-2:] == [CUDA_BUILD, "locks/cpu.txt"]


def wheel(folder: Path, name: str, version: str, text: str) -> str:
    """Make a wheel with one module and return its SHA-256."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", text)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_real_pip_takes_the_locked_file_from_an_index_and_no_other(tree: Path) -> None:
    for name in ("python3.11", "python3.12", "python3"):
        (tree / "tools" / name).unlink()
    wheel(tree / "wheels", "torch", "2.13.0+cpu", "somebody made it anew")
    wheel(tree / "wheels", "slime", "0.1.0", "")
    other = wheel(tree / "wheels", "other", "1.0", "")
    digest = wheel(tree / "index" / "torch", "torch", "2.13.0+cpu", "official = True")
    (file,) = (tree / "index" / "torch").iterdir()
    (tree / "index" / "torch" / "index.html").write_text(f'<a href="{file.name}">{file.name}</a>')
    (tree / "locks" / "cpu.txt").write_text(f"other==1.0 --hash=sha256:{other}\n")
    (tree / CPU_BUILD).write_text(f"torch==2.13.0+cpu --hash=sha256:{digest}\n")
    backend = (
        "def build_editable(to, *_):\n    name = 'slime-0.1.0-py3-none-any.whl'\n    shutil.copy(f'wheels/{name}', to)"
    )
    (tree / "backend.py").write_text(f"import shutil\n{backend}\n    return name\n")
    (tree / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    closed = "http://127.0.0.1:9/"  # the index that pip is configured for; nothing listens there
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tree / "index")) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        pip = {
            "PIP_INDEX_URL": closed,
            "PIP_RETRIES": "0",
            "PIP_FIND_LINKS": (tree / "wheels").as_uri(),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_USER": "1",
            "PIP_REQUIRE_HASHES": "1",
            "PIP_ONLY_BINARY": ":all:",
            "NO_PROXY": "127.0.0.1",
        }
        index = f"http://127.0.0.1:{server.server_port}"
        result = set_up(tree, PYTHON=sys.executable, TORCH_INDEX=index, PIP_EXTRA_INDEX_URL="", **pip)
        server.shutdown()
    assert result.returncode == 0, result.stderr
    assert "installing torch 2.13.0+cpu from pip's own sources\nsetup:   skipped: " in result.stdout
    assert f"installing torch 2.13.0+cpu from {index}\n" in result.stdout
    (module,) = (tree / ".venv").glob("lib/*/site-packages/torch.py")
    assert module.read_text() == "official = True"


# Which Python ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [["python3.11"], ["python3.12"], ["python3.11", "python3.12"], ["python3"]])
def test_either_python_will_do(tree: Path, there: list[str]) -> None:
    fake(tree, "python3.11", "exit 127")
    for name in there:
        interpreter(tree, name, "3.11" if name == "python3.11" else "3.12")
    result = set_up(tree)
    assert result.returncode == 0
    assert f"creating .venv with {'Python 3.11' if 'python3.11' in there else 'Python 3.12'}" in result.stdout


@pytest.mark.parametrize(
    ("version", "found"),
    [("3.9", "Python 3.9, not 3.11 or 3.12"), ("3.13", "Python 3.13, not 3.11 or 3.12"), ("", "not there")],
)
def test_without_one_a_line_says_how_to_get_one(tree: Path, version: str, found: str) -> None:
    fake(tree, "python3.11", "exit 127")
    if version:
        interpreter(tree, "python3", version)
    result = set_up(tree)
    assert result.returncode == 2
    assert result.stderr.startswith(f"setup: python3 is {found}: apt-get install python3.11 python3.11-venv")
    assert "python3.12-venv (Ubuntu 24.04)" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_python_that_the_user_names_is_used_or_refused(tree: Path) -> None:
    (tree / "a b").mkdir()
    interpreter(tree, "../a b/python", "3.12")
    assert "creating .venv with Python 3.12" in set_up(tree, PYTHON=str(tree / "a b" / "python")).stdout
    other = set_up(tree, PYTHON="python3.11")
    assert "recreating it" in other.stdout
    assert "creating .venv with Python 3.11" in other.stdout
    assert set_up(tree, PYTHON="python3.11").stdout == ""
    interpreter(tree, "old-python", "3.9")
    for name, what in (("old-python", "Python 3.9, not 3.11 or 3.12"), ("no-python", "no Python")):
        result = set_up(tree, PYTHON=name)
        assert result.returncode == 2
        assert result.stderr.startswith(f"setup: PYTHON={name} is {what}: apt-get install")
        assert result.stderr.count("\n") == 1


# The machine, and an existing environment -----------------------------------------------------------------------------


def test_setup_refuses_a_small_disk_in_one_line(tree: Path) -> None:
    disk(tree, 3)
    result = set_up(tree)
    assert result.returncode == 2
    assert result.stderr.startswith(f"setup: 3 GB of disk are free in {tree}; the installation needs 8 GB: ")
    assert result.stderr.count("\n") == 1
    result = set_up(tree, GPU="1")
    assert "the installation needs 40 GB" in result.stderr
    assert not (tree / ".venv").exists()


def test_setup_refuses_a_folder_that_no_environment_can_lie_in(tree: Path) -> None:
    moved = tree.rename(tree.parent / "a:b")
    result = set_up(moved)
    assert result.returncode == 2
    assert "has a colon in its name" in result.stderr


def test_setup_refuses_an_unknown_kind_of_machine(tree: Path) -> None:
    result = set_up(tree, GPU="yes")
    assert (result.returncode, result.stderr) == (2, "setup: GPU=yes is neither 1 nor 0\n")


def test_setup_throws_an_interrupted_installation_away(tree: Path) -> None:
    disk(tree, 3)  # makes it stop right before the installation
    (tree / ".venv").mkdir()
    (tree / ".venv" / "setup.broken").touch()
    result = set_up(tree)
    assert result.returncode == 2
    assert "recreating it" in result.stdout
    assert not (tree / ".venv").exists()


@pytest.mark.parametrize("changed", ["locks/cpu.txt", CPU_BUILD, CUDA_BUILD, "pyproject.toml"])
def test_setup_does_nothing_when_nothing_changed_and_notices_a_changed_file(tree: Path, changed: str) -> None:
    assert set_up(tree).returncode == 0
    unchanged = set_up(tree)
    assert (unchanged.returncode, unchanged.stdout, unchanged.stderr) == (0, "", "")
    with (tree / changed).open("a") as file:
        file.write("# another line\n")
    assert "done in" in set_up(tree).stdout
