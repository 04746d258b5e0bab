"""The folder of a run: the step to continue from, with which settings, and the record of its configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slime import checkpoint
from slime.config import ConfigError, differences, dump
from slime.config.keys import all_keys, mapping_of
from slime.observe.tracking import WANDB_ID_FILE
from slime.schema import Config, Resume, folder_of
from slime.start.manifest import Manifest

# Settings that may change when a run is resumed.
_FREE = (
    *("steps", "resume", "eval.", "checkpoint.", "tracking.", "cluster.", "runs_dir", "cache_dir"),
    *("policy.layout.", "policy.megatron.", "critic.layout.", "critic.megatron."),  # checkpoints are read in any layout
)
# What a checkpoint itself depends on: its tensors' precision, and the order of its prompts.
_FIXED = ("policy.layout.precision", "critic.layout.precision", "seed", "buffer.episodes_per_prompt")
_ROWS = "task.train"


def open_run(config: Config) -> tuple[Path, Manifest | None]:
    """Return the run's folder and the manifest of the checkpoint to continue from, None: there is none.

    ConfigError: the folder can't be used for this run.
    """
    run_dir = folder_of(config)
    saved = run_dir / "config.yaml"
    if saved.exists() and config.resume is Resume.never:
        raise ConfigError(f"{run_dir} exists: choose another run= name, or resume=auto to go on with it")
    newest = _newest(run_dir)
    if newest is None:
        if config.resume is Resume.must:
            raise ConfigError(
                f"{run_dir} has no checkpoint, and resume=must begins no run: use resume=auto, or name another folder "
                "with run= and runs_dir="
            )
        return run_dir, None
    lines = _changes(config, newest)
    if fixed := [line for line in lines if line.startswith(_FIXED)]:
        raise ConfigError(
            f"{run_dir} was started with other settings, which its checkpoint depends on: {'; '.join(fixed)}; set them "
            "back, or choose another run= name"
        )
    if changed := [line for line in lines if not _allowed(config, _key(line))]:
        keys = ",".join(dict.fromkeys(map(_key, changed)))
        raise ConfigError(
            f"{run_dir} was started with other settings: {'; '.join(changed)}; set them back, allow them with "
            f"resume_allow=[{keys}], or choose another run= name"
        )
    return run_dir, newest


def refuse_other_rows(config: Config, newest: Manifest | None, rows: str) -> None:
    """Refuse a resume with other rows to train on, by their digest, than the checkpoint had. ConfigError."""
    if newest is not None and newest.rows not in ("", rows) and not _allowed(config, _ROWS):
        raise ConfigError(
            f"{folder_of(config)} was trained on other rows than there are now: put the rows of its task back, allow "
            f"others with resume_allow=[{_ROWS}], or choose another run= name"
        )


def resume_notes(config: Config, newest: Manifest | None) -> list[str]:
    """Return the differences from the state in which the newest checkpoint was written, one line each."""
    return [*_changes(config, newest), *newest.changed_versions()] if newest else []


def record(config: Config, run_dir: Path, newest: Manifest | None = None, warnings: Sequence[str] = ()) -> None:
    """Write the run's configuration, and the warnings of its pre-flight checks.

    These are the run's first files, written after all checks have passed.
    """
    logs = run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    if warnings:
        (logs / "doctor.log").write_text("\n".join([*warnings, ""]))
    part = run_dir / "config.part"
    part.write_text(dump(config))
    part.replace(run_dir / "config.yaml")
    wandb_id = run_dir / WANDB_ID_FILE
    if newest and newest.wandb_id and not wandb_id.exists():
        wandb_id.write_text(newest.wandb_id, encoding="utf-8")


def _newest(run_dir: Path) -> Manifest | None:
    try:
        return checkpoint.newest(run_dir)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{error}; move that folder away to go on from the checkpoint before it") from error


def _changes(config: Config, newest: Manifest) -> list[str]:
    """Return `key: old -> new` for each setting that differs from the checkpoint's and may change the results."""
    lines = differences(newest.config, config) if newest.config else []
    return [line for line in lines if line.startswith(_FIXED) or not line.startswith(_FREE)]


def _key(line: str) -> str:
    return line.partition(":")[0]


def _allowed(config: Config, key: str) -> bool:
    """Return whether a key may differ: it is named, or this version no longer has such a setting."""
    if not mapping_of(key) and key not in all_keys():
        return True
    return any(f"{key}.".startswith(f"{one}.") for one in config.resume_allow)
