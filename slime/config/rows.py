"""Pre-flight checks of task rows: valid files, enough rows, and prompts that leave room for a turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from buffer.tasks import TaskRow, read_rows
from buffer.types import EpisodeStats
from rollout.rendering.factory import make_renderer
from rollout.rendering.renderer import Renderer
from rollout.rendering.templates import TEMPLATES
from slime.schema import Config, Kind

SPLITS = ("train", "eval")
MAX_BYTES = 20_000_000  # prompts that are tokenized before the start; takes some seconds
MAX_NAMED = 3  # number of rows listed in a message


class Overlong(NamedTuple):
    """Prompts of a split that leave no room for a turn."""

    message: str
    all: bool  # no row of the split leaves room for a turn


def row_problems(config: Config) -> Iterator[str]:
    """Yield the problems of the files task.train and task.eval; skip missing files."""
    rows: dict[str, list[TaskRow]] = {}
    for split in SPLITS:
        given = getattr(config.task, split)
        if given and Path(given).is_file():
            try:
                rows[split] = read_rows(Path(given))
            except ValueError as error:
                yield f"task.{split}: {error}"
                return
    if "eval" in rows:
        yield from split_problems(config, rows.get("train", []), rows["eval"])


def split_problems(config: Config, train: Sequence[TaskRow], evaluation: Sequence[TaskRow]) -> Iterator[str]:
    """Yield why these rows can't be trained on and evaluated on."""
    shared = {row.id for row in train} & {row.id for row in evaluation}
    if shared:
        yield f"task row {min(shared)!r} is in both the training and the evaluation rows: evaluate on rows of their own"
    if config.kind is Kind.ppo and len(evaluation) < config.eval.num_tasks:
        yield (
            f"eval.num_tasks={config.eval.num_tasks}, but {_label(config, 'eval')} has {len(evaluation)} rows: "
            f"use at most {len(evaluation)}"
        )


def overlong(config: Config, split: str, rows: Sequence[TaskRow], model_folder: Path) -> Overlong | None:
    """Return the run's rows whose prompt leaves no room for a turn, or None if there are none.

    The check uses `TaskRow.prompt`, not the result of `Environment.start`. A prompt has at most as many tokens as
    bytes, so only prompts with more bytes than the limit are tokenized, longest first and up to MAX_BYTES in total.
    ValueError: the model's tokenizer or template can't be used.
    """
    room = config.rollout.compaction.max_prompt_tokens
    if split == "eval":
        rows = rows[: config.eval.num_tasks] if config.kind is Kind.ppo else ()
    template, renderer = TEMPLATES.get(config.model.template), None
    if template:
        around = len("".join([*template.user, template.reply]).encode())
    else:
        renderer = _renderer(config, model_folder)
        around = len(renderer.prompt(""))
    sizes = [(len(row.prompt.encode()), place) for place, row in enumerate(rows)]
    suspects = sorted((pair for pair in sizes if around + pair[0] > room), reverse=True)
    if not suspects:
        return None
    renderer = renderer or _renderer(config, model_folder)
    found: dict[int, int] = {}  # place -> tokens
    left = MAX_BYTES
    for size, place in suspects:
        if (left := left - size) < 0:
            break
        num_tokens = len(renderer.prompt(rows[place].prompt))
        if num_tokens > room:
            found[place] = num_tokens
    if not found:
        return None
    named = [f"{rows[place].id!r} with {found[place]} tokens" for place in sorted(found)[:MAX_NAMED]]
    more = f" and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
    message = (
        f"{_label(config, split)}: {len(found)} of {len(rows)} prompts leave no room for a turn: row "
        f"{', '.join(named)}{more}; {_limit(config)}"
    )
    return Overlong(message, len(found) == len(rows))


def _renderer(config: Config, model_folder: Path) -> Renderer:
    from transformers import AutoTokenizer  # takes seconds to import

    try:
        return make_renderer(AutoTokenizer.from_pretrained(model_folder, local_files_only=True), config.model.template)
    except OSError as error:
        raise ValueError(f"{model_folder}: its tokenizer can't be read: {error}") from error


def no_turn(config: Config, stats: Sequence[EpisodeStats]) -> str:
    """Return why nothing was sampled in these episodes."""
    shortest = min(one.prompt_tokens for one in stats)
    return (
        f"the prompts of {len(stats)} episodes leave no room for a turn: the shortest has {shortest} tokens, "
        f"{_limit(config)}"
    )


def _limit(config: Config) -> str:
    limits = config.rollout.compaction
    return (
        f"at most {limits.max_prompt_tokens} fit (rollout.compaction.context_tokens={limits.context_tokens} less "
        f"reserve_tokens={limits.reserve_tokens}): shorten them, leave them out, or use a larger window"
    )


def _label(config: Config, split: str) -> str:
    given = getattr(config.task, split)
    return f"task.{split}={given}" if given else f"{config.task.target}.make_rows({split!r})"
