"""`slime submit k8s` through the real `main`: what it prints, hands over and refuses."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import Place
from test_faults_run import RUN
from tree import ROOT

from slime import cli

PPO = "recipe=ppo_coding"
CLUSTER = ["--image", "registry.example/slime:1", "--claim", "runs"]
TWO_NODES = ["model=qwen3_8b", "cluster=gpu_2x8", "model.path=/data/models/Qwen3-8B"]


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The manifest that the command prints."""
    assert cli.main(["submit", "k8s", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return dict(yaml.safe_load(out))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which it is refused."""
    code = cli.main(["submit", *arguments])
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    return err


def pod_of(job: dict[str, Any]) -> dict[str, Any]:
    return dict(job["spec"]["template"]["spec"])


def test_one_node_is_a_job_and_several_are_a_ray_job(capsys: pytest.CaptureFixture[str]) -> None:
    job = printed(capsys, PPO, *CLUSTER)
    assert (job["kind"], job["metadata"]["name"]) == ("Job", "slime-ppo-coding")
    (container,) = pod_of(job)["containers"]
    assert container["resources"]["requests"] == {"cpu": "4", "memory": "10G"}  # engine, policy, critic, rollout worker
    several = printed(capsys, PPO, *TWO_NODES, *CLUSTER, "--dry-run")  # the model is on the claim, not here
    assert several["kind"] == "RayJob"
    assert several["spec"]["entrypoint"] == f"cd /data && exec slime train {PPO} {' '.join(TWO_NODES)}"
    cluster = several["spec"]["rayClusterSpec"]
    (container,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"memory": "209G", "nvidia.com/gpu": "8"}
    assert container["resources"]["requests"]["cpu"] == "12"  # 12 ranks, 4 engines, 8 rollout workers on two nodes


def test_the_command_of_a_job_is_the_one_that_is_stopped_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    """In test_faults_run.py: SIGTERM or SIGUSR1, a checkpoint, exit code 75, and the same command to the end."""
    command = Place(Path("/data")).command(*RUN, "run=stopped")
    assert command[1] == "train"
    (container,) = pod_of(printed(capsys, *command[2:], *CLUSTER))["containers"]
    assert container["command"] == ["tini", "--", "slime", *command[1:]]


def test_the_configuration_decides_grace_sandboxes_and_name(capsys: pytest.CaptureFixture[str]) -> None:
    pod = pod_of(printed(capsys, PPO, *CLUSTER))
    assert pod["hostUsers"] is False
    short = printed(capsys, PPO, *CLUSTER, "checkpoint.grace_s=20", "rollout.sandbox.allow_unsafe=true", "run=x")
    assert short["metadata"]["name"] == "slime-x"
    assert pod["terminationGracePeriodSeconds"] - pod_of(short)["terminationGracePeriodSeconds"] == 100
    assert "hostUsers" not in pod_of(short)


def test_the_hook_is_told_the_folder_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    for runs_dir in ("out", "/data/out"):
        made = printed(capsys, PPO, *TWO_NODES, *CLUSTER, f"runs_dir={runs_dir}", "run=x")
        (container,) = made["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
        assert container["lifecycle"]["preStop"]["exec"]["command"][3] == "/data/out/x"


def test_recipes_of_ones_own_are_named_in_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "own" / "recipe").mkdir(parents=True)
    (tmp_path / "own" / "recipe" / "mine.yaml").write_text(
        "# @package _global_\n# Mine\ndefaults: [ppo_coding, _self_]\nsteps: 7\n"
    )
    (container,) = pod_of(printed(capsys, "recipe=mine", "--recipes", "own", *CLUSTER))["containers"]
    assert container["command"][2:] == ["slime", "train", "recipe=mine", "--recipes", "own"]


def test_the_commands_of_the_page_print_the_jobs_that_it_selects(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "kubernetes.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"slime submit k8s (recipe=.*)", page)
    assert len(commands) == 2
    jobs = [printed(capsys, *shlex.split(command.replace("--apply", ""))) for command in commands]
    selected = re.findall(r"app.kubernetes.io/instance=(\S+)", page)
    assert set(selected) == {job["metadata"]["labels"]["app.kubernetes.io/instance"] for job in jobs}


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["k8s", PPO, "--claim", "runs"], "--image '': must be the name of an image"),
        (["k8s", PPO, "--image", "a"], "--claim '': a name in Kubernetes"),
        (["k8s", PPO, *CLUSTER, "polcy.loss=ppo"], "did you mean 'policy.loss'?"),
        (["k8s", *CLUSTER], "recipe=NAME is missing"),
        (["k8s", PPO, *CLUSTER, "runs_dir=/scratch"], "runs_dir=/scratch is not on the claim"),
        (["k8s", PPO, *CLUSTER, "runs_dir=../x"], "runs_dir=../x is not on the claim"),
        (["k8s", PPO, *CLUSTER, "cluster.ray_address=auto"], "a run on one node starts its own Ray"),
        (["k8s", PPO, *TWO_NODES, *CLUSTER, "cluster.ray_address=10.0.0.1:6379"], "use auto"),
        (["k8s", PPO, *CLUSTER, "--retries", "many"], "--retries many: must be a number"),
        (["k8s", PPO, *CLUSTER, "--apply", "--dry-run"], "--apply and --dry-run: choose one"),
        (["k8s", PPO, *CLUSTER, "--image"], "--image needs a value"),
        (["k8s", PPO, *CLUSTER, "--queues=x"], "unknown option '--queues=x'"),
        (["k9s", PPO], "unknown command 'k9s'; did you mean 'k8s'?"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    assert part in refused(capsys, *arguments)


def test_help_is_there_at_each_level(capsys: pytest.CaptureFixture[str]) -> None:
    levels: list[tuple[list[str], str]] = [([], "k8s"), (["--help"], "k8s"), (["k8s", "--help"], "--claim NAME")]
    for arguments, part in levels:
        assert cli.main(["submit", *arguments]) == 0
        assert part in capsys.readouterr().out


# kubectl --------------------------------------------------------------------------------------------------------------


def fake_kubectl(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    program = folder / "bin" / "kubectl"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")


def test_apply_hands_the_printed_manifest_to_kubectl(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = printed(capsys, PPO, *CLUSTER)
    fake_kubectl(tmp_path, monkeypatch, f'echo "$@" >{tmp_path}/words; cat >{tmp_path}/given; echo job.batch/x created')
    assert cli.main(["submit", "k8s", PPO, *CLUSTER, "--apply"]) == 0
    assert capsys.readouterr().out == "job.batch/x created\n"
    assert (tmp_path / "words").read_text() == "apply -f -\n"
    assert yaml.safe_load((tmp_path / "given").read_text()) == shown


def test_what_kubectl_refuses_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_kubectl(tmp_path, monkeypatch, "cat >/dev/null; echo 'error: no cluster' >&2; echo 'is set' >&2; exit 1")
    assert "kubectl apply: error: no cluster is set" in refused(capsys, "k8s", PPO, *CLUSTER, "--apply")


def test_without_kubectl_a_line_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "kubectl is not on PATH" in refused(capsys, "k8s", PPO, *CLUSTER, "--apply")
