"""The resources that a run would use, for the checks of launch/doctor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.doctor.checks import quick
from launch.doctor.finding import Finding, Level, Needs
from slime.config.nodes import trained_roles
from slime.schema import Config
from trainer.config import Precision
from trainer.models.files import headers
from trainer.models.gguf.source import is_folder, model_folder

OPTIMIZER_BYTES = 12  # per parameter: fp32 weights and Adam's two moments
WEIGHT_BYTES = {Precision.fp32: 4, Precision.bf16: 2}


@dataclass(frozen=True)
class Preflight:
    """Findings of the quick checks, one line each."""

    problems: tuple[str, ...] = ()  # empty: a run can start
    warnings: tuple[str, ...] = ()


def needs(config: Config) -> Needs:
    """Return the needs of a run. The size of its checkpoints is known only if model.path has weights."""
    return Needs(
        config.cluster,
        Path(config.runs_dir),
        sandbox=not config.rollout.sandbox.allow_unsafe,
        checkpoint_bytes=_checkpoint_bytes(config),
        kept=config.checkpoint.keep,
        num_rollout_workers=config.rollout.num_workers,
        cache_dir=Path(config.cache_dir),
        model_folder=_folder(config),
    )


def _folder(config: Config) -> Path | None:
    """Return the folder of model.path; None: there is none yet."""
    folder = model_folder(config.model.path, Path(config.cache_dir)) if config.model.path else None
    return folder if folder and (folder.is_dir() or is_folder(config.model.path)) else None


def _checkpoint_bytes(config: Config) -> int:
    folder = _folder(config)
    if folder is None:
        return 0
    try:
        parameters = sum(math.prod(one.shape) for one in headers(folder).values())
    except (ValueError, OSError):  # reported by the checks of the model's folder
        return 0
    return sum(parameters * (WEIGHT_BYTES[one.layout.precision] + OPTIMIZER_BYTES) for _, one in trained_roles(config))


def preflight(config: Config) -> Preflight:
    """Return what the quick checks find on this machine."""
    return sorted_out(quick(needs(config)))


def sorted_out(found: Sequence[Finding]) -> Preflight:
    """Return findings as lines that name the node where it is another machine."""

    def lines(level: Level, named: bool) -> tuple[str, ...]:
        listed = [one for one in found if one.level is level]
        return tuple(
            f"{f'node {one.node}: ' if one.node else ''}{f'{one.check}: ' if named else ''}{one.text}" for one in listed
        )

    return Preflight(lines(Level.problem, False), lines(Level.warning, True))
