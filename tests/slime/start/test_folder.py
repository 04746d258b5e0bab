"""Going on with a run: from which checkpoint, with which settings and rows, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slime.config import ConfigError, dump, load
from slime.schema import Config
from slime.start import manifest
from slime.start.folder import open_run, record, refuse_other_rows, resume_notes
from slime.start.manifest import FORMAT, Manifest


def config_of(runs: Path, *overrides: str) -> Config:
    return load(["recipe=ppo_coding", f"runs_dir={runs}", "run=a", *overrides]).config


def checkpointed(runs: Path, *overrides: str, step: int = 4, versions: dict[str, str] | None = None) -> Path:
    """The folder of a run that has a checkpoint and was started with these settings."""
    config = config_of(runs, *overrides)
    record(config, runs / "a")
    folder = runs / "a" / "checkpoints" / f"step_{step:06d}"
    folder.mkdir(parents=True)
    Manifest(step, {}, "/m", dump(config), rows="digest", wandb_id="abc", versions=versions or {}).write(folder)
    return runs / "a"


def opened(config: Config) -> tuple[Path, int]:
    """The folder and the step to continue from."""
    run_dir, newest = open_run(config)
    return run_dir, newest.step if newest else 0


def refusal(config: Config) -> str:
    with pytest.raises(ConfigError) as caught:
        open_run(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_each_value_of_resume_does(tmp_path: Path) -> None:
    never, auto, must = (config_of(tmp_path, f"resume={value}") for value in ("never", "auto", "must"))
    assert opened(never) == opened(auto) == (tmp_path / "a", 0)
    assert refusal(must).startswith(f"{tmp_path / 'a'} has no checkpoint, and resume=must begins no run")
    record(auto, tmp_path / "a")  # started, and stopped before its first checkpoint
    assert opened(auto) == (tmp_path / "a", 0)
    assert "has no checkpoint" in refusal(must)
    checkpointed(tmp_path)
    assert opened(auto) == opened(must) == (tmp_path / "a", 4)
    assert refusal(never) == f"{tmp_path / 'a'} exists: choose another run= name, or resume=auto to go on with it"


def test_settings_of_no_consequence_may_change(tmp_path: Path) -> None:
    run_dir = checkpointed(tmp_path)
    layout = ["policy.layout.num_processes=2", "critic.layout.num_processes=2", "critic.megatron.tensor_parallel=2"]
    config = config_of(tmp_path, "steps=99", "eval.every=3", "tracking.wandb=false", "resume=must", *layout)
    assert opened(config) == (run_dir, 4)
    assert resume_notes(config, open_run(config)[1]) == []


def test_a_run_with_megatrons_settings_in_its_layout_goes_on_in_any(tmp_path: Path) -> None:
    """As versions wrote it that had them there."""
    of_then = dump(config_of(tmp_path)).replace("  layout:\n", "  layout:\n    tensor_parallel: 1\n")
    assert of_then.count("  layout:\n    tensor_parallel: 1\n") == 2
    folder = tmp_path / "a" / "checkpoints" / "step_000004"
    folder.mkdir(parents=True)
    Manifest(4, {}, "/m", of_then).write(folder)
    config = config_of(tmp_path, "policy.layout.num_processes=2", "policy.megatron.tensor_parallel=2")
    assert opened(config) == (tmp_path / "a", 4)
    assert resume_notes(config, open_run(config)[1]) == []


def test_changed_settings_are_shown_and_refused_until_they_are_allowed(tmp_path: Path) -> None:
    run_dir = checkpointed(tmp_path)
    changes = ["policy.clip_low=0.1", "policy.optimizer.lr=1e-4", "rollout.max_turns=9"]
    message = refusal(config_of(tmp_path, *changes))
    old = config_of(tmp_path)
    assert f"rollout.max_turns: {old.rollout.max_turns} -> 9; " in message
    assert "resume_allow=[rollout.max_turns,policy.optimizer.lr,policy.clip_low]" in message
    message = refusal(config_of(tmp_path, *changes, "resume_allow=[policy.optimizer,policy.clip_low]"))
    assert "resume_allow=[rollout.max_turns]" in message
    assert "clip_low" not in message
    allowed = config_of(tmp_path, *changes, "resume_allow=[policy,rollout.max_turns]")
    assert opened(allowed) == (run_dir, 4)
    assert len(resume_notes(allowed, open_run(allowed)[1])) == 3


def test_changes_count_against_the_checkpoint_and_not_the_last_start(tmp_path: Path) -> None:
    """A start with an allowed change that did not reach its first checkpoint has changed nothing yet."""
    run_dir = checkpointed(tmp_path)
    changed = config_of(tmp_path, "policy.clip_low=0.1", "resume_allow=[policy.clip_low]")
    record(changed, run_dir)
    assert opened(changed) == opened(config_of(tmp_path)) == (run_dir, 4)
    assert "policy.clip_low" in refusal(config_of(tmp_path, "policy.clip_low=0.1"))


def test_a_setting_that_is_no_more_is_noted(tmp_path: Path) -> None:
    """Nothing could allow it; keys below a mapping are the user's own, and count."""
    config, folder = config_of(tmp_path), tmp_path / "a" / "checkpoints" / "step_000004"
    folder.mkdir(parents=True)
    Manifest(4, {}, "/m", dump(config) + "old: 3\n").write(folder)
    assert opened(config) == (tmp_path / "a", 4)
    assert resume_notes(config, open_run(config)[1]) == ["old: 3 -> (absent)"]
    assert "task.options.mine: (absent) -> 1" in refusal(config_of(tmp_path, "task.options.mine=1"))


@pytest.mark.parametrize(
    ("key", "now", "then"),
    [
        ("policy.layout.precision", "precision: fp32", "precision: bf16"),
        ("seed", "seed: 0", "seed: 5"),
        ("buffer.episodes_per_prompt", "episodes_per_prompt: 1", "episodes_per_prompt: 2"),
    ],
)
def test_what_the_checkpoint_depends_on_can_not_be_allowed(tmp_path: Path, key: str, now: str, then: str) -> None:
    config, folder = config_of(tmp_path, f"resume_allow=[{key}]"), tmp_path / "a" / "checkpoints" / "step_000004"
    folder.mkdir(parents=True)
    Manifest(4, {}, "/m", dump(config).replace(now, then)).write(folder)
    message = refusal(config)
    assert f"depends on: {key}: {then.partition(' ')[2]} -> {now.partition(' ')[2]}" in message
    assert "resume_allow" not in message


def test_other_rows_are_refused_before_anything_starts(tmp_path: Path) -> None:
    checkpointed(tmp_path)
    _, newest = open_run(config_of(tmp_path))
    refuse_other_rows(config_of(tmp_path), newest, "digest")
    with pytest.raises(ConfigError, match=r"was trained on other rows.*resume_allow=\[task\.train\]"):
        refuse_other_rows(config_of(tmp_path), newest, "another")
    refuse_other_rows(config_of(tmp_path, "resume_allow=[task]"), newest, "another")
    refuse_other_rows(config_of(tmp_path), None, "another")


def test_packages_that_changed_are_noted(tmp_path: Path) -> None:
    now = manifest.installed_versions()
    checkpointed(tmp_path, versions=now | {"torch": "1.0", "old": "3"})
    notes = [f"torch was 1.0 and is {now['torch']}", "old was 3 and is not installed"]
    assert resume_notes(config_of(tmp_path), open_run(config_of(tmp_path))[1]) == notes
    assert resume_notes(config_of(tmp_path), None) == []


def test_the_run_in_wandb_is_the_checkpoints(tmp_path: Path) -> None:
    run_dir = checkpointed(tmp_path)
    _, newest = open_run(config_of(tmp_path))
    record(config_of(tmp_path), run_dir, newest)
    assert (run_dir / "wandb_id").read_text() == "abc"
    (run_dir / "wandb_id").write_text("of the run")
    record(config_of(tmp_path), run_dir, newest)
    assert (run_dir / "wandb_id").read_text() == "of the run"


def test_a_checkpoint_of_the_first_format_is_read(tmp_path: Path) -> None:
    """It has no settings of its own: those of the folder count."""
    run_dir = checkpointed(tmp_path)
    state = run_dir / "checkpoints" / "step_000004" / manifest.FILE
    state.write_text(json.dumps({"step": 4, "buffer": {"step": 4}, "model_folder": "/m"}))
    read = manifest.read(state.parent)
    assert read == Manifest(4, {"step": 4}, "/m", config=(run_dir / "config.yaml").read_text())
    assert opened(config_of(tmp_path)) == (run_dir, 4)
    refuse_other_rows(config_of(tmp_path), read, "any")
    assert "clip_low" in refusal(config_of(tmp_path, "policy.clip_low=0.1"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (json.dumps({"format": FORMAT + 1}), f"format {FORMAT + 1} is of a later slime; this one reads up to {FORMAT}"),
        (json.dumps({"format": FORMAT, "step": 4}), "missing 2 required positional arguments"),
        (json.dumps({"format": FORMAT, "stepp": 4}), "unexpected keyword argument 'stepp'"),
        ("[]", "'list' object"),
        ('{"step": 4', "Expecting"),
    ],
)
def test_a_manifest_that_can_not_be_read_is_refused_in_a_line(tmp_path: Path, text: str, reason: str) -> None:
    state = checkpointed(tmp_path) / "checkpoints" / "step_000004" / manifest.FILE
    state.write_text(text)
    message = refusal(config_of(tmp_path))
    assert message.startswith(f"{state}: ")
    assert reason in message
    assert message.endswith("move that folder away to go on from the checkpoint before it")


def test_the_warnings_of_a_start_are_in_its_logs(tmp_path: Path) -> None:
    record(config_of(tmp_path), tmp_path / "a", warnings=["ports: slow", "proxies: one"])
    assert (tmp_path / "a" / "logs" / "doctor.log").read_text() == "ports: slow\nproxies: one\n"
