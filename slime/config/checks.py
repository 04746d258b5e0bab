"""Pre-flight checks of the configuration: values out of range and values that are inconsistent.

Every message contains the wrong number and the nearest that works.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from critic.config import Baseline, Credit, Truncation
from rollout.rendering.templates import TEMPLATE_NAMES
from rollout.sglang.options import refused_options
from slime.config.keys import hint
from slime.config.model import broken, unsuited
from slime.config.nodes import crowded, has_engines, trained_roles
from slime.config.rows import row_problems
from slime.config.settings import ConfigError, settings
from slime.schema import Config, Kind
from trainer.config import Correction
from trainer.models.gguf.source import is_folder, model_folder

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
TARGET = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

RANGES = {setting.key: setting.bounds for setting in settings().values() if setting.bounds}


def check(config: Config) -> None:
    """Check a configuration before any process starts. ConfigError: the first problem found.

    Read only the model's config.json and the rows of `task.train` and `task.eval` if they exist; `missing` reports
    missing and incomplete files.
    """
    for part in (_ranges, _names, _budgets, _training, crowded, _engine_options, _model, row_problems):
        for problem in part(config):
            raise ConfigError(problem)


def missing(config: Config) -> list[str]:
    """Return a message for each file that the run needs and that is missing or incomplete."""
    found = []
    package = config.task.target.partition(":")[0].partition(".")[0]
    if find_spec(package) is None and PathFinder.find_spec(package, [str(Path.cwd())]) is None:
        found.append(
            f"task.target={config.task.target}: no module {package} among the installed ones or in {Path.cwd()}: "
            "run from the folder that holds it, or install it"
        )
    if config.model.path and not is_folder(config.model.path):
        folder = model_folder(config.model.path, Path(config.cache_dir))
        if folder.is_dir():
            found += broken(config, folder)
        elif config.model.path.endswith(".gguf") and not Path(config.model.path).is_file():
            found.append(f"model.path={config.model.path}: no such file; give a Hugging Face folder or a GGUF file")
    elif config.model.path:
        folder = Path(config.model.path)
        cure = f"give the model's folder with model.path=FOLDER (model {config.model.name})"
        if not folder.is_dir():
            found.append(f"model.path={config.model.path}: no such folder; {cure}")
        elif not (folder / "config.json").is_file():
            found.append(f"model.path={config.model.path}: holds no config.json; {cure}")
        else:
            found += broken(config, folder)
    for key, name in (("train", config.task.train), ("eval", config.task.eval)):
        if name and not Path(name).is_file():
            found.append(f"task.{key}={name}: no such file of task rows")
    return found


def get(config: Any, key: str) -> Any:
    """Return the value of a dotted key."""
    for name in key.split("."):
        config = config[name] if isinstance(config, dict) else getattr(config, name)
    return config


def _ranges(config: Config) -> Iterator[str]:
    for key, bounds in RANGES.items():
        value = get(config, key)
        if cure := bounds.cure(value):
            yield f"{key}={value} is not in {bounds.text}: {cure}"


def _names(config: Config) -> Iterator[str]:
    run = config.run or config.recipe
    if not RUN_NAME.fullmatch(run):
        nearest = re.sub(r"[^A-Za-z0-9._-]+", "-", run).lstrip("._-")[:64] or "run"
        yield (
            f"run={run!r} can not name a folder and a job: letters, digits, '.', '_' and '-', at most 64, "
            f"the first a letter or digit; the nearest that works is {nearest!r}"
        )
    for key in config.resume_allow:
        try:
            hint(key)
        except ConfigError as error:
            yield f"resume_allow: {error}"
    for key in ("runs_dir", "cache_dir"):
        if not get(config, key):
            yield f"{key} is empty: name a folder, e.g. {key}={get(Config(), key)}"
    if not TARGET.fullmatch(config.task.target):
        yield f"task.target={config.task.target!r} does not name a task: write package.module:Class"
    if config.kind is Kind.ppo and config.model.start == run:
        yield f"run={run} is the folder of the warm start, model.start={run}: choose another run= name"
    if config.model.template not in TEMPLATE_NAMES:
        known = ", ".join(TEMPLATE_NAMES)
        yield f"model.template={config.model.template!r}: no such template; known: {known}"
    if config.kind is Kind.sft and config.model.start == config.recipe:
        yield f"model.start={config.model.start} starts recipe {config.recipe} from its own result: use model.start=''"


def _budgets(config: Config) -> Iterator[str]:
    compaction, window = config.rollout.compaction, config.rollout.compaction.context_tokens
    room = compaction.reserve_tokens - compaction.summary_tokens
    if config.rollout.max_turn_tokens > room:
        yield (
            f"rollout.max_turn_tokens={config.rollout.max_turn_tokens} does not fit: a turn may begin with "
            f"reserve_tokens={compaction.reserve_tokens} left, of which a summary takes "
            f"summary_tokens={compaction.summary_tokens}; use at most {room}"
        )
    cache = config.rollout.engine.max_total_tokens
    if config.kind is Kind.ppo and 0 < cache < window:
        yield (
            f"rollout.engine.max_total_tokens={cache} is below rollout.compaction.context_tokens={window}: "
            f"one agent would not fit in the KV cache; use at least {window}, or 0 to let the engine decide"
        )
    for role, one in trained_roles(config):
        limit = one.layout.max_tokens_per_micro_batch
        if limit < window:
            yield (
                f"{role}.layout.max_tokens_per_micro_batch={limit} is below "
                f"rollout.compaction.context_tokens={window}: the longest sub-trace would not fit; "
                f"use at least {window}"
            )


def _training(config: Config) -> Iterator[str]:
    yield from _algorithm(config)
    yield from _episode_baseline(config)
    for role, _ in trained_roles(config):
        settings = get(config, role)
        optimizer = settings.optimizer
        if 0 < optimizer.decay_steps <= optimizer.warmup_steps:
            yield (
                f"{role}.optimizer.decay_steps={optimizer.decay_steps} is not above warmup_steps="
                f"{optimizer.warmup_steps}: use at least {optimizer.warmup_steps + 1}, or 0 for a constant rate"
            )
        ranks, episodes = settings.data_parallel, config.buffer.episodes_per_step
        if config.kind is Kind.ppo and episodes < settings.num_minibatches * ranks:
            most = episodes // ranks
            cure = (
                f"use {role}.num_minibatches of at most {most}"
                if most
                else f"use buffer.episodes_per_step of at least {settings.num_minibatches * ranks}"
            )
            yield (
                f"{role}.num_minibatches={settings.num_minibatches} with data_parallel={ranks} needs "
                f"{settings.num_minibatches * ranks} episodes a step, buffer.episodes_per_step={episodes}: {cure}"
            )
    ranks = config.policy.data_parallel
    if config.kind is Kind.sft and config.sft.batch_sub_traces < ranks:
        yield (
            f"sft.batch_sub_traces={config.sft.batch_sub_traces} is below the policy's data_parallel={ranks}: "
            f"use at least {ranks}"
        )


def _algorithm(config: Config) -> Iterator[str]:
    policy, advantage = config.policy, config.advantage
    if policy.correction is not Correction.none and policy.loss.value not in ("ppo", "gspo"):
        yield (
            f"policy.correction={policy.correction.value} with policy.loss={policy.loss.value}: that loss has the "
            "engine's probabilities in its own ratio; use policy.correction=none, or policy.loss=ppo or gspo"
        )
    if policy.dual_clip and policy.loss.value != "ppo":
        yield f"policy.dual_clip={policy.dual_clip:g} is ppo's, policy.loss={policy.loss.value}: use policy.dual_clip=0"
    if 0 < policy.dual_clip <= 1 + policy.clip_high:
        yield (
            f"policy.dual_clip={policy.dual_clip:g} lies inside the clip window, which ends at "
            f"{1 + policy.clip_high:g}: use more than that, e.g. 3, or 0 for none"
        )
    if advantage.baseline is not Baseline.critic and advantage.truncation is Truncation.bootstrap:
        yield (
            f"advantage.truncation=bootstrap needs a critic's value, advantage.baseline={advantage.baseline.value} "
            "has none: use truncation=terminal"
        )


def _episode_baseline(config: Config) -> Iterator[str]:
    advantage, group = config.advantage, config.buffer.episodes_per_prompt
    name = advantage.baseline.value
    if config.kind is not Kind.ppo or advantage.baseline is Baseline.critic:
        return
    if group < 2 and advantage.baseline is not Baseline.reinforce_pp:
        yield (
            f"advantage.baseline={name} compares the episodes of a prompt, buffer.episodes_per_prompt={group}: "
            "use at least 2, e.g. 8, or advantage.baseline=reinforce_pp"
        )
    if advantage.credit is not Credit.chained:
        yield (
            f"advantage.credit={advantage.credit.value} has no meaning with advantage.baseline={name}, which gives all "
            "tokens of an episode the same advantage: use advantage.credit=chained"
        )
    if advantage.gamma != 1:
        yield (
            f"advantage.gamma={advantage.gamma:g} has no meaning with advantage.baseline={name}, which does not "
            "discount rewards: use advantage.gamma=1"
        )


def _engine_options(config: Config) -> Iterator[str]:
    if has_engines(config):
        try:
            yield from refused_options(config.rollout.engine.options, config.cluster.gpus_per_node == 0)
        except RuntimeError as error:
            yield str(error)


def _model(config: Config) -> Iterator[str]:
    if not config.model.path:
        return
    try:
        folder = model_folder(config.model.path, Path(config.cache_dir))
    except ValueError as error:
        yield f"model.path={error}"
        return
    if (folder / "config.json").is_file():
        yield from unsuited(config, folder)


def check_model(config: Config, folder: Path) -> None:
    """Run the model's part of `check` and `missing` on a folder. ConfigError: the first problem found."""
    for part in (unsuited, broken):
        for problem in part(config, folder):
            raise ConfigError(problem)
