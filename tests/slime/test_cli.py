"""The command line through its real `main`: exit codes and printed text."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import pytest
import typer

from launch.lock import run_lock
from launch.preflight import Machine
from slime import cli

PPO = "recipe=ppo_coding"
ROOMY = Machine(num_cpus=2, free_memory_gb=16, free_disk_gb=50, free_temporary_gb=50, free_shm_gb=8, num_gpus=0)


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def _roomy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "read", lambda count_gpus: ROOMY)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one line on stderr with which the command is refused."""
    code = cli.main([*arguments])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("slime: error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("command", ["train", "config"])
@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([PPO, "polcy.loss=ppo"], "did you mean 'policy.loss'?"),
        ([PPO, "steps=many"], "must be an integer"),
        ([PPO, "policy.loss=x"], "one of cispo, decoupled, dis, gspo, ppo"),
        (["recipe=nothing"], "recipe=nothing: no such recipe"),
        ([PPO, "model=tine"], "did you mean 'tiny'?"),
        ([PPO, "cluster=moon"], "cluster=moon: no such cluster; known: "),
        ([PPO, "steps=[1"], "can't be read"),
        ([PPO, "steps"], "is not key=value"),
        ([PPO, "policy.layout.precision=bf16"], "use fp32"),
        ([PPO, "rollout.compaction.context_tokens=10"], "context_tokens=10 is not above"),
        ([PPO, "advantage.gamma=1.5"], "the nearest that works is 1"),
        ([PPO, "runs_dir=~nobody-here/runs"], "runs_dir=~nobody-here/runs starts with the home folder of a user"),
        ([PPO, "model.path=$NOT_SET/model"], "model.path=$NOT_SET/model: no environment variable $NOT_SET"),
        ([PPO, "--recipes=~nobody-here/own"], "~nobody-here/own starts with the home folder of a user"),
        ([PPO, "--recipes"], "--recipes needs a folder"),
        ([PPO, "--recipes", "absent"], "absent"),
        ([PPO, "--recipies=x"], "unknown option '--recipies=x'"),
        ([], "recipe=NAME is missing"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], command: str, arguments: list[str], part: str
) -> None:
    assert part in refused(capsys, command, *arguments)


def test_unknown_commands_name_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'train'?" in refused(capsys, "trian", PPO)
    assert "commands: train, config, doctor, report, advise" in refused(capsys, "zzz")


def test_train_is_refused_without_the_gpus_and_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "train", PPO, "model=qwen3_8b", "cluster=gpu_8", "cluster.gpus_per_node=4096")
    assert "model.path=models/Qwen3-8B: no such folder" in line
    assert "GPUs found, cluster.gpus_per_node=4096" in line


def test_config_of_absent_hardware_is_shown_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = ["steps=7", "buffer.episodes_per_step=96", "cluster.gpus_per_node=4096"]
    assert cli.main(["config", PPO, "model=qwen3_8b", "cluster=gpu_8", *numbers]) == 0
    shown, _, verdict = capsys.readouterr().out.partition("\n\n")
    assert verdict.startswith("this machine can not run it:")
    assert "model.path=models/Qwen3-8B" in verdict
    assert "cluster.gpus_per_node=4096" in verdict
    rows = [line.split("#") for line in shown.splitlines()]
    told = {row[0].strip(): row[1].strip() for row in rows if len(row) == 2}
    assert told["recipe: ppo_coding"] == "command line"
    assert told["steps: 7"] == told["episodes_per_step: 96"] == "command line"
    assert told["kind: ppo"] == "recipe ppo_coding"
    assert told["name: qwen3_8b"] == "model qwen3_8b"
    assert told["precision: bf16"] == "cluster gpu_8"
    assert told["slots: 96"] == told["(max_lag: 1)"] == told["(data_parallel: 2)"] == "derived"
    columns = {len(row[0]) for row in rows if len(row) == 2}
    assert len(columns) == 1  # the comments stand in one column


@pytest.mark.usefixtures("_roomy_machine")
def test_config_of_a_runnable_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", PPO]) == 0
    out = capsys.readouterr().out
    assert out.endswith("this machine can run it\n")
    assert "\033" not in out  # not a terminal: no colors


@pytest.mark.usefixtures("_roomy_machine")
def test_train_hands_over_the_run_and_its_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from slime import train

    seen: list[Any] = []
    note = lambda config, start, failures, warnings: seen.append((config.steps, start and start.recipe))  # noqa: E731
    monkeypatch.setattr(train, "main", note)
    own = tmp_path / "recipe" / "sft_own.yaml"
    own.parent.mkdir()
    own.write_text("# @package _global_\n# Ours\ndefaults: [sft_coding, _self_]\n")
    assert cli.main(["train", PPO, "steps=3", "model.start="]) == 0
    assert cli.main(["train", PPO, "steps=4", "--recipes", str(tmp_path), "model.start=sft_own"]) == 0
    assert seen == [(3, None), (4, "sft_own")]


@pytest.mark.usefixtures("_roomy_machine")
def test_a_refusal_inside_training_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from slime import train
    from slime.config import ConfigError

    def refuse(config: Any, start: Any, failures: Any, warnings: Any) -> None:
        raise ConfigError("steps: 3 -> 4\nsince the last start")

    monkeypatch.setattr(train, "main", refuse)
    assert "steps: 3 -> 4 since the last start" in refused(capsys, "train", PPO)


@pytest.mark.usefixtures("_roomy_machine")
def test_paths_may_begin_at_home(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    own = tmp_path / "own" / "recipe" / "mine.yaml"
    own.parent.mkdir(parents=True)
    own.write_text(
        "# @package _global_\ndefaults: [ppo_coding, _self_]\ntask: {eval: ~/rows.jsonl}\neval: {num_tasks: 1}\n"
    )
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "domain": "d", "prompt": "p"}\n')
    paths = ["eval.num_tasks=1", "runs_dir=~/runs", "cache_dir=$HOME/cache", "--recipes=~/own"]
    assert cli.main(["config", "recipe=mine", *paths]) == 0
    out = capsys.readouterr().out
    assert "this machine can run it" in out
    told = {line.partition(":")[0].strip(): line.partition(": ")[2].split() for line in out.splitlines()}
    assert told["runs_dir"] == [f"{tmp_path}/runs", "#", "command", "line"]
    assert told["cache_dir"][0] == f"{tmp_path}/cache"
    assert told["eval"] == []  # the section
    assert f"eval: {tmp_path}/rows.jsonl" in out
    (tmp_path / "runs" / "first").mkdir(parents=True)
    assert "no such run" in refused(capsys, "report", "~/runs/second")
    assert "no such run" not in refused(capsys, "advise", "~/runs/first")


@pytest.mark.usefixtures("_roomy_machine")
def test_a_run_that_is_running_is_not_started_twice(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "ppo_coding"
    with run_lock(folder):
        (folder / "metrics.jsonl").write_text('{"step": 0}\n')
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        line = refused(capsys, "train", PPO)
        assert f"in use by process {os.getpid()} on {socket.gethostname()}" in line
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_ctrl_c_before_a_run_begins_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupt)
    assert cli.main(["train", PPO]) == 130
    assert capsys.readouterr() == ("", "slime: stopped by SIGINT\n")


def test_help_of_train_lists_what_can_be_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    own = tmp_path / "own" / "recipe" / "mine.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("# @package _global_\n# My own agent\nsteps: 3\n")
    assert cli.main(["train", "--recipes", str(tmp_path / "own"), "--help"]) == 0
    out = capsys.readouterr().out
    assert ["mine", "My own agent"] in [line.split(maxsplit=1) for line in out.splitlines()]
    for text in (
        "ppo_coding",
        "Reinforcement learning of a coding agent",
        "qwen3_8b",
        "gpu_8",
        "  policy.*",
        "  steps",
    ):
        assert text in out
    assert "Config(" not in out  # every section has a docstring


@pytest.mark.parametrize("command", ["report", "advise"])
def test_commands_about_a_run_name_the_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str) -> None:
    assert "runs/ has none" in refused(capsys, command, "first")
    (tmp_path / "runs" / "second").mkdir(parents=True)
    assert "runs: second" in refused(capsys, command, "first")
    assert f"{command} takes one RUN, found 0" in refused(capsys, command)
    assert "found 2" in refused(capsys, command, "first", "second")
    assert cli.main([command, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"Usage: slime {command} RUN")


def test_report_calls_the_writer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "runs" / "first").mkdir(parents=True)
    fake = ModuleType("slime.report")
    fake.write_report = lambda run_dir: run_dir / "report.html"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "slime.report", fake)
    assert cli.main(["report", "first"]) == 0
    assert capsys.readouterr().out == "runs/first/report.html\n"


HEAVY = {"torch", "hydra", "omegaconf", "ray", "rich", "megatron", "sglang", "numpy", "transformers"}


def in_a_process(*arguments: str) -> str:
    """Return a command's output, from a separate process that must not import large packages for it."""
    program = (
        f"import sys, slime.cli; code = slime.cli.main({[*arguments]!r})\n"
        f"heavy = {HEAVY!r} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("command", ["", *(command.__name__ for command in cli.COMMANDS)])
def test_the_help_of_every_command_imports_nothing_heavy(command: str) -> None:
    out = in_a_process(*command.split(), "--help")
    assert out.startswith(f"Usage: slime {command}")


def test_help_explains_keys_and_sections_and_imports_nothing_heavy(capsys: pytest.CaptureFixture[str]) -> None:
    out = in_a_process("train", "--help", "policy.clip_low", "rollout.engine")
    assert "policy.clip_low: number in (0, 1]; default 0.2\n  The loss's window begins at a ratio of" in out
    assert "rollout.engine.max_total_tokens" in out
    assert "Size of an engine's KV cache" in out
    assert "did you mean 'policy.loss'?" in refused(capsys, "train", "--help", "policy.los")


@pytest.mark.parametrize("arguments", [[], ["help"], ["-h"], ["--help"]])
def test_help_names_every_command(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert {line.split()[0] for line in out.splitlines() if line.startswith("  ")} >= {
        command.__name__ for command in cli.COMMANDS
    }
    assert "..." not in out.partition("Commands:")[2]  # no sentence is cut off


def test_a_command_is_a_function_in_one_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def greet(name: Annotated[str, typer.Argument(metavar="NAME")]) -> int:
        """Greet somebody."""
        if name == "nobody":
            raise cli.Refused(f"greet {name}: there is\nnobody to greet")
        print(f"hello {name}")
        return 7

    monkeypatch.setattr(cli, "COMMANDS", (*cli.COMMANDS, greet))
    assert cli.main(["greet", "world"]) == 7
    assert capsys.readouterr().out == "hello world\n"
    assert refused(capsys, "greet", "nobody") == "slime: error: greet nobody: there is nobody to greet\n"
    assert "Missing argument 'NAME'" in refused(capsys, "greet")
    assert "unexpected extra argument" in refused(capsys, "greet", "a", "b")
    assert "did you mean 'greet'?" in refused(capsys, "gret")
    assert "unknown option '--loud'" in refused(capsys, "greet", "--loud")


def test_ctrl_c_inside_a_command_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wait() -> int:
        """Wait."""
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "COMMANDS", (wait,))
    assert cli.main(["wait"]) == 130
    assert capsys.readouterr() == ("", "slime: stopped by SIGINT\n")


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        # bash hands over a word with "=" as three
        (["slime", "tr"], ["train"]),
        (["slime", "train", "recipe", "=", "ppo_coding_"], ["ppo_coding_async"]),
        (["slime", "train", PPO, "policy.loss", "=", "d"], ["decoupled", "dis"]),
        (["slime", "train", PPO, "policy.optimizer.l"], ["policy.optimizer.lr="]),
        (["slime", "config", "clu"], ["cluster=gpu_8", "cluster=local", "cluster.num_nodes="]),
        (["slime", "report", "fi"], ["first"]),
    ],
)
def test_the_shell_completes(words: list[str], offered: list[str], tmp_path: Path) -> None:
    (tmp_path / "runs" / "first").mkdir(parents=True)
    variables = {"_SLIME_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    command = [sys.executable, "-m", "slime.cli"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **variables}
    )
    found = done.stdout.split()
    assert set(offered) <= set(found)
    assert all(word.startswith(words[-1]) for word in found)


def test_a_shell_that_shows_descriptions_gets_each_on_one_line() -> None:
    variables = {"_SLIME_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "slime train recipe="}
    command = [sys.executable, "-m", "slime.cli"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **variables}
    )
    assert len(done.stdout.strip().splitlines()) == 3


def test_completion_imports_nothing_heavy() -> None:
    program = (
        "import sys; from slime.cli.keys import complete\n"
        "found = complete(['recipe=ppo_coding'], 'policy.loss=d')\n"
        f"sys.exit(str({HEAVY!r} & set(sys.modules) or [text for text, _ in found]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr.strip() == "['policy.loss=decoupled', 'policy.loss=dis']"


def test_a_mistake_in_a_process_of_its_own_shows_no_traceback() -> None:
    command = [sys.executable, "-m", "slime.cli", "train", PPO, "polcy.lr=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("slime: error: unknown key 'polcy.lr'")
    assert done.stderr.count("\n") == 1


def test_a_reader_that_stops_early_sees_no_traceback() -> None:
    config = [sys.executable, "-m", "slime.cli", "config", PPO, "model.path=absent"]
    with subprocess.Popen(config, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
