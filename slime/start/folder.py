"""The folder of a run: the step to continue from, and the record of its configuration."""

from __future__ import annotations

from pathlib import Path

from slime import checkpoint
from slime.config import ConfigError, differences, dump
from slime.schema import Config, folder_of
from slime.start.needs import warnings

# Settings that may change when a run is resumed.
_FREE = (
    *("steps", "resume", "eval.", "checkpoint.", "tracking.", "cluster.", "runs_dir", "cache_dir"),
    *("policy.layout.", "critic.layout."),  # checkpoints are read in any layout
)
_FIXED = ("policy.layout.precision", "critic.layout.precision")  # the precision of the stored weights must not change


def open_run(config: Config) -> tuple[Path, int]:
    """Return the run's folder and the step to continue from. ConfigError: it can't be used for this run."""
    run_dir = folder_of(config)
    done = checkpoint.steps(run_dir)
    saved = run_dir / "config.yaml"
    if saved.exists() and not config.resume:
        raise ConfigError(f"{run_dir} exists: choose another run= name, or resume=true to go on with it")
    if done and saved.exists():
        lines = differences(saved.read_text(), config)
        changed = [line for line in lines if line.startswith(_FIXED) or not line.startswith(_FREE)]
        if changed:
            raise ConfigError(f"{run_dir} was started with other settings: {changed[0]}; choose another run= name")
    return run_dir, done[-1] if done else 0


def record(config: Config, run_dir: Path) -> None:
    """Write the run's configuration. It is the run's first file, written after all checks have passed."""
    logs = run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    if found := warnings(config):
        (logs / "doctor.log").write_text("\n".join([*found, ""]))
    part = run_dir / "config.part"
    part.write_text(dump(config))
    part.replace(run_dir / "config.yaml")
