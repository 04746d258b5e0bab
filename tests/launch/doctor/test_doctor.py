"""The checks of machines: each one is shown what it is there to find."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from tree import ROOT

from launch.config import ClusterConfig
from launch.doctor import machine, software
from launch.doctor.collective import all_reduce, judge
from launch.doctor.finding import Finding, Level, Needs
from launch.doctor.software import KNOWN, Versions
from launch.preflight import Machine
from slime import cli
from slime.cli.doctor import table
from slime.config import load
from slime.start.needs import needs, preflight
from trainer.models.files import headers

UNSHARE = ["unshare", "--user", "--map-root-user", "sh", "-c"]
PRINTED = "import sys; from launch.doctor import machine; print(*machine.{call}, sep='\\n')"


def only(found: list[Finding]) -> tuple[Level, str]:
    (one,) = found
    assert "\n" not in one.text
    return one.level, one.text


def without_rights(command: str) -> str:
    """Output of a shell command as root of a user namespace of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*UNSHARE, command], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode and "unshare" in done.stderr:
        pytest.skip(f"no user namespaces here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    return done.stdout


# Software ------------------------------------------------------------------------------------------------------------


def test_versions_outside_those_known_are_told() -> None:
    assert only(software.python())[0] is Level.ok
    assert only(software.python((3, 13, 1))) == (
        Level.problem,
        "Python 3.13.1: make the environment anew with Python 3.11 or 3.12",
    )
    assert only(software.packages(KNOWN))[0] is Level.ok
    level, text = only(software.packages([Versions("psutil", "1.0", "2.0", "it is so")]))
    assert (level, "(it is so): install locks/" in text) == (Level.warning, True)
    level, text = only(software.packages([Versions("no-such-package", "", "", "it is so")]))
    assert (level, text) == (Level.problem, "no-such-package is not installed (it is so): install locks/*.txt")


@pytest.mark.parametrize(
    ("build", "driver", "level", "part"),
    [
        ("13.0", (13, 0), Level.ok, "torch built for CUDA 13.0, driver for CUDA 13.0"),
        ("13.0", (12, 8), Level.problem, "a torch built for CUDA 12.8"),
        ("12.8", (13, 0), Level.ok, ""),
        ("", (13, 0), Level.problem, "torch built for CPUs"),
        ("13.0", (0, 0), Level.problem, "driver not found: install NVIDIA's driver"),
    ],
)
def test_the_driver_must_be_as_new_as_torchs_build(
    build: str, driver: tuple[int, int], level: Level, part: str
) -> None:
    found = only(software.cuda(True, build, driver))
    assert found[0] is level
    assert part in found[1]
    assert only(software.cuda(False, build, driver))[0] is Level.ok


def test_a_file_that_hides_a_package_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for harmless in ("wandb", "recipes", "ray"):
        (tmp_path / harmless).mkdir()
    assert only(software.shadows([tmp_path, ROOT]))[0] is Level.ok
    (tmp_path / "torch.py").touch()
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "__init__.py").touch()
    (tmp_path / "queue.py").touch()
    monkeypatch.chdir(tmp_path)
    found = {one.text.partition(":")[0]: one.level for one in software.shadows()}
    assert found == {
        f"{tmp_path}/launch hides the package launch": Level.problem,
        f"{tmp_path}/torch.py hides the package torch": Level.problem,
        f"{tmp_path}/queue.py hides Python's own module queue": Level.warning,
    }
    where = "import torch; print(torch.__file__)"  # engines start with -m, which looks there, too
    (tmp_path / "ask.py").write_text(where)
    done = subprocess.run([sys.executable, "-m", "ask"], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == f"{tmp_path}/torch.py"
    assert any("torch.py hides" in line for line in preflight(load(["recipe=ppo_coding"], None).config).problems)


# Machine -------------------------------------------------------------------------------------------------------------


def test_resources_are_those_of_the_preflight() -> None:
    poor = Machine(num_cpus=1, free_memory_gb=1, free_disk_gb=1, free_temporary_gb=9, free_shm_gb=9, num_gpus=0)
    found = machine.resources(ClusterConfig(), poor)
    assert [one.level for one in found] == [Level.problem] * 2
    rich = Machine(num_cpus=1, free_memory_gb=16, free_disk_gb=50, free_temporary_gb=9, free_shm_gb=9, num_gpus=0)
    assert only(machine.resources(ClusterConfig(), rich))[0] is Level.ok


def test_a_low_limit_of_open_files_is_told() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1000, before[1]))
        level, text = only(machine.open_files())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert level is Level.warning
    assert text.startswith("limit 1000, large runs need 4096: ")


def test_an_address_of_another_machine_has_no_port_here() -> None:
    assert only(machine.ports())[0] is Level.ok
    level, text = only(machine.ports("192.0.2.1"))  # of documentation's network
    assert level is Level.problem
    assert "no port of 192.0.2.1" in text


def test_proxies_that_do_not_except_this_machine_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    assert only(machine.proxies()) == (Level.ok, "none set")
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    level, text = only(machine.proxies())
    assert level is Level.warning
    assert text.endswith("export no_proxy=localhost,127.0.0.1")
    assert any(
        line.startswith("proxies: http_proxy") for line in preflight(load(["recipe=ppo_coding"], None).config).warnings
    )
    monkeypatch.setenv("no_proxy", "localhost,127.0.0.1")
    assert only(machine.proxies())[0] is Level.ok


def test_a_machine_without_user_namespaces_is_told() -> None:
    call = PRINTED.format(call="namespaces()")
    told = without_rights(f'echo 0 > /proc/sys/user/max_user_namespaces; {sys.executable} -c "{call}"')
    assert "Level.problem" in told
    assert "rollout.sandbox.allow_unsafe=true" in told


def test_a_full_disk_and_a_read_only_one_are_told(tmp_path: Path) -> None:
    assert only(machine.runs_folder(tmp_path / "not" / "there", 4096))[0] is Level.ok
    assert list(tmp_path.iterdir()) == []
    for options, told in (("size=1m", "No space left on device"), ("ro", "Read-only file system")):
        call = PRINTED.format(call="runs_folder(__import__('pathlib').Path(sys.argv[1]))")
        mount = f"mount -t tmpfs -o {options} none {tmp_path}"
        script = f'unshare --mount sh -c \'{mount} && exec "$0" -c "$1" {tmp_path}\' {sys.executable} "{call}"'
        found = without_rights(script)
        assert "Level.problem" in found
        assert told in found


def test_planned_checkpoints_must_fit_the_disk(tmp_path: Path) -> None:
    plan = Needs(ClusterConfig(), tmp_path, checkpoint_bytes=10**15, kept=2)
    level, text = only(machine.checkpoints(plan))
    assert level is Level.problem
    assert text.startswith("2 + 1 checkpoints take 3000000.0 GB, ")
    assert only(machine.checkpoints(Needs(ClusterConfig(), tmp_path, checkpoint_bytes=1000)))[0] is Level.ok


def test_the_size_of_a_checkpoint_is_that_of_policy_and_critic(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(10, 7), "b": torch.zeros(30)}, tmp_path / "model.safetensors")
    assert len(headers(tmp_path)) == 2
    config = load(["recipe=ppo_coding"], None).config
    assert needs(config).checkpoint_bytes == 0
    object.__setattr__(config.model, "path", str(tmp_path))
    assert needs(config).checkpoint_bytes == 2 * 100 * (4 + 12)


# Ranks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.e2e
def test_two_ranks_add_up() -> None:
    level, text = only(all_reduce(timeout_s=600.0))
    assert (level, text.split(" in ")[0]) == (Level.ok, "gloo between 2 processes")


@pytest.mark.e2e
def test_a_rank_that_can_not_talk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    level, text = only(all_reduce(timeout_s=600.0))
    assert level is Level.problem
    assert "failed: " in text
    assert "nosuch0" in text


def test_a_rank_that_does_not_come_is_named() -> None:
    came = [sys.executable, "-c", "import time; print('joined', flush=True); time.sleep(1000)"]
    late = [sys.executable, "-c", "import time; time.sleep(1000)"]
    level, text = only(judge([came, late], "gloo", 5.0))
    assert level is Level.problem
    assert "rank 1 did not come in 5 s" in text
    _, text = only(judge([came, [sys.executable, "-c", "raise RuntimeError('no route')"]], "gloo", 600.0))
    assert "rank 1 failed: RuntimeError: no route" in text


# Command -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_fits_the_terminal(columns: int) -> None:
    found = [
        Finding("python", Level.ok, "3.11.7"),
        Finding("open files", Level.warning, "limit 1000, " * 30),
        Finding("names", Level.problem, "a " * 100, node="10.0.0.1"),
    ]
    text = table(found, columns)
    assert max(map(len, text.splitlines())) <= columns
    assert text.endswith("\n\n1 problem, 1 warning")


@pytest.mark.e2e
def test_only_problems_make_the_command_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    roomy = ["recipe=ppo_coding", "cluster.min_memory_gb=0", "cluster.min_disk_gb=0", f"runs_dir={tmp_path}", "--json"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "queue.py").write_text("from _queue import *\n")
    code = cli.main(["doctor", *roomy])
    found = json.loads(capsys.readouterr().out)
    assert ("names", "warning") in {(one["check"], one["level"]) for one in found}
    assert code == any(one["level"] == "problem" for one in found)
    (tmp_path / "sglang.py").touch()
    assert cli.main(["doctor", *roomy]) == 1
