"""Preparation of a run's inputs: task rows, a model folder and a warm start.

Everything that is generated here is cached under a name that contains a digest of its inputs.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from buffer.tasks import TaskRow, read_rows, write_rows
from launch.lock import made_once
from rollout.task import Task
from slime.config import ConfigError, check_model, missing
from slime.config.rows import overlong, split_problems
from slime.schema import Config, Kind
from trainer.models.gguf.source import is_folder, make_folder, model_folder

TRAIN_ROWS = 8192  # number of rows that a task generates


@dataclass(frozen=True)
class Prepared:
    """Inputs of a run, on disk and checked."""

    task: Task
    train_rows: Sequence[TaskRow]
    eval_rows: Sequence[TaskRow]
    model_folder: Path

    @cached_property
    def rows_digest(self) -> str:
        """Return a short name for the rows to train on, in their order."""
        return digest([asdict(row) for row in self.train_rows])

    @property
    def vocab_size(self) -> int:
        return int(json.loads((self.model_folder / "config.json").read_text())["vocab_size"])


def digest(value: Any) -> str:
    """Return a short digest of a value that JSON can represent."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def make_task(config: Config) -> Task:
    """Return the recipe's task. Its module is installed or in the current folder, which Ray's workers search, too.

    ConfigError: its target can't be imported or is not a Task.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    module, _, name = config.task.target.partition(":")
    if not module or not name:
        raise ConfigError(f"task.target={config.task.target!r}: must be 'package.module:Class'")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, SyntaxError, NameError) as error:
        raise ConfigError(f"task.target={config.task.target!r}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ConfigError(f"task.target={config.task.target!r} is not a slime.Task")
    try:
        return found(**config.task.options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{config.task.target} refuses task.options={config.task.options}: {error}") from error


def _rows(config: Config, task: Task, split: str, count: int) -> list[TaskRow]:
    given = getattr(config.task, split)
    if given:
        try:
            return read_rows(Path(given))
        except ValueError as error:
            raise ConfigError(f"task.{split}: {error}") from error
    key = digest([config.task.target, config.task.options, split, count, config.seed])
    path = Path(config.cache_dir) / "rows" / f"{split}-{key}.jsonl"
    try:
        if not path.exists():
            rows = task.make_rows(split, count, config.seed) or ()
            try:
                write_rows(path, rows)
            except OSError as error:
                reason = error.strerror or error
                raise ConfigError(f"cache_dir={config.cache_dir} can't be written to: {reason}") from error
        return read_rows(path)
    except ConfigError:  # a subclass of ValueError that already names the setting
        raise
    except ValueError as error:
        raise ConfigError(f"{config.task.target}.make_rows({split!r}, {count}, {config.seed}): {error}") from error


def untrained_model(config: Config, task: Task) -> Path:
    """Return the folder of model.path or of the task's own small model, which is built if it is missing.

    A GGUF file is converted, and a package fetched, at the first use. ConfigError: that fails; or the task has no own
    model, or `make_model` writes nothing.
    """
    if config.model.path:
        return _given_model(config.model.path, Path(config.cache_dir))
    made_from = [config.task.target, config.task.options, config.seed]
    folder = Path(config.cache_dir) / "models" / f"{config.model.name}-{digest(made_from)}"

    def make(part: Path) -> None:
        try:
            task.make_model(part, config.seed)
        except ValueError as error:
            raise ConfigError(f"{config.task.target}: {error}") from error
        if not part.is_dir():
            raise ConfigError(f"{config.task.target}: make_model wrote nothing to {part}")

    made_once(folder, make)
    return folder.resolve()


def _given_model(path: str, cache_dir: Path) -> Path:
    def make(part: Path) -> None:
        try:
            make_folder(path, part)
        except ValueError as error:
            raise ConfigError(f"model.path: {error}") from error

    folder = model_folder(path, cache_dir)
    if not is_folder(path):
        made_once(folder, make)
    return folder.resolve()


def start_folder(config: Config, start: Config) -> Path:
    """Return the cache folder of the warm start's result. Its name depends on all inputs, including model files."""
    kept = {"seed", "steps", "task", "model", "policy", "sft"}
    relevant = {key: value for key, value in asdict(start).items() if key in kept}
    relevant |= {key: asdict(start.rollout)[key] for key in ("max_turns", "max_turn_tokens", "compaction")}
    if start.model.path:
        folder = model_folder(start.model.path, Path(config.cache_dir))
        files = sorted(path for path in folder.glob("*") if path.is_file() and is_folder(start.model.path))
        relevant["files"] = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
        relevant["folder"] = "" if is_folder(start.model.path) else folder.name  # names file and converter
    return (Path(config.cache_dir) / "starts" / f"{start.recipe}-{digest(relevant)}").resolve()


def first_model(config: Config, task: Task, start: Config | None) -> Path:
    """Return a folder with the model that training starts from, or one of the same shape.

    It is the warm start's result if that is cached, or else the model that the warm start itself starts from.
    ConfigError: the model does not fit the settings.
    """
    if start is None:
        folder = untrained_model(config, task)
    else:
        done = start_folder(config, start)
        folder = done if done.exists() else untrained_model(start, make_task(start))
    check_model(config, folder)
    return folder


def prepare(config: Config, start: Config | None = None) -> Prepared:
    """Prepare, check and return the rows and the model of a run before any process starts.

    `start`: the recipe of the warm start. Rows whose prompt leaves no room for a turn are reported on stderr, and
    refused only if no other rows remain. ConfigError: the run's recipe or the warm start's recipe is invalid.
    """
    for problem in missing(config):
        raise ConfigError(problem)
    task = make_task(config)
    train = _rows(config, task, "train", TRAIN_ROWS)
    evaluated = config.kind is Kind.ppo or config.task.eval
    evaluation = _rows(config, task, "eval", config.eval.num_tasks) if evaluated else []
    for problem in split_problems(config, train, evaluation):
        raise ConfigError(problem)
    if start is not None and not start_folder(config, start).exists():
        try:
            prepare(start)
        except ConfigError as error:
            raise ConfigError(f"model.start={config.model.start}: {error}") from error
    folder = first_model(config, task, start)
    for split, rows in (("train", train), ("eval", evaluation)):
        try:
            found = overlong(config, split, rows, folder)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if found and found.all:
            raise ConfigError(found.message)
        if found:
            print(f"slime: note: {found.message}", file=sys.stderr)
    return Prepared(task, train, evaluation, folder)
