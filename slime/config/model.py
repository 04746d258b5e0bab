"""Checks of the model's folder: it must be complete and fit the settings.

No weights are read. Slow imports happen only if Megatron's own options are set.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_type_hints

from rollout.rendering.templates import JINJA, JINJA_STOP, NO_CHAT_TEMPLATE, OWN_TEMPLATE, TEMPLATES
from slime.config.nodes import has_engines, trained_roles
from slime.config.settings import as_text
from slime.schema import Config
from trainer.config import RoleConfig
from trainer.layout import check_layout
from trainer.models.families import read_shape
from trainer.models.files import check_weights
from trainer.models.reading import read_json
from trainer.models.shape import ModelShape

TOKENIZER = "tokenizer.json"
# Megatron's names of the settings of a role.
_OURS = {
    "tensor_model_parallel_size": "megatron.tensor_parallel",
    "sequence_parallel": "megatron.sequence_parallel",
    "pipeline_model_parallel_size": "megatron.pipeline_parallel",
    "virtual_pipeline_model_parallel_size": "megatron.virtual_stages",
    "context_parallel_size": "megatron.context_parallel",
    "expert_model_parallel_size": "megatron.expert_parallel",
    "params_dtype": "layout.precision",
    "bf16": "layout.precision",
    "recompute_granularity": "layout.recompute",
    "recompute_modules": "layout.recompute",
}
OTHER_TOKENIZERS = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json", "*.tiktoken")


def unsuited(config: Config, folder: Path) -> Iterator[str]:
    """Yield the settings that the model's config.json does not support, one message each."""
    path = folder / "config.json"
    try:
        shape = read_shape(folder)
    except ValueError as error:
        yield str(error)
        return
    window = config.rollout.compaction.context_tokens
    if window > shape.max_positions:
        yield (
            f"rollout.compaction.context_tokens={window} is above the model's max_position_embeddings="
            f"{shape.max_positions} ({path}): use at most {shape.max_positions}"
        )
    size = config.rollout.engine.tensor_parallel
    if has_engines(config) and shape.heads % size:
        nearest = next(n for n in range(min(size, shape.heads), 0, -1) if shape.heads % n == 0)
        yield (
            f"rollout.engine.tensor_parallel={size} does not divide the model's num_attention_heads={shape.heads} "
            f"({path}): the nearest that works is {nearest}"
        )
    for role, one in trained_roles(config):
        try:
            check_layout(shape, one.sizes())
        except ValueError as error:
            yield f"{role}.megatron: {error} ({path})"
            continue
        yield from _megatron_options(role, shape, one, getattr(config, role).engine.options)


def _megatron_options(role: str, shape: ModelShape, config: RoleConfig, options: Mapping[str, Any]) -> Iterator[str]:
    """Yield why Megatron's TransformerConfig refuses some of the options, or why a user must not set them.

    Check the options against the type hints, then construct the config with all settings of a run for this model.
    This imports Megatron, which takes seconds.
    """
    if not options:
        return
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    from trainer.megatron.model import transformer_config
    from trainer.megatron.options import config_class

    told = f"Megatron {version('megatron-core')}"
    known = get_type_hints(config_class(shape))
    typed = True
    for name, value in options.items():
        key = f"{role}.engine.options.{name}={as_text(value)}"
        if name not in known:
            near = get_close_matches(name, known, n=1)
            cure = f"did you mean {near[0]!r}?" if near else "its transformer_config.py lists them"
            yield f"{key}: {told} has no such setting; {cure}"
            typed = False
            continue
        try:
            strict = ConfigDict(strict=True, arbitrary_types_allowed=True)
            TypeAdapter(known[name], config=strict).validate_python(value)
        except ValidationError as error:
            yield f"{key}: {told} refuses it: {error.errors()[0]['msg']}"
            typed = False
    if not typed:
        return
    try:
        transformer_config(shape, config.layout, config.megatron, options)
    except (TypeError, ValueError, AssertionError, NotImplementedError) as error:
        ours = re.search(r"multiple values for keyword argument '(\w+)'", str(error))
        if ours:
            cure = f"use {role}.{_OURS[ours[1]]}" if ours[1] in _OURS else "leave it out"
            yield f"{role}.engine.options.{ours[1]}={as_text(options[ours[1]])}: a run sets this itself: {cure}"
        else:
            yield f"{role}.engine.options={dict(options)}: {told} refuses them: {error or type(error).__name__}"


def broken(config: Config, folder: Path) -> Iterator[str]:
    """Yield the files of weights and tokenizer that are missing, truncated or inconsistent with config.json."""
    try:
        shape = read_shape(folder)
        check_weights(folder, shape)
        tokens = _token_ids(folder)
    except ValueError as error:
        yield str(error)
        return
    last = max(tokens, key=lambda token: tokens[token], default="")
    if tokens and tokens[last] >= shape.vocab:
        yield (
            f"{folder}: its tokenizer gives {last!r} the id {tokens[last]}, the ids of its config.json end at "
            f"vocab_size-1={shape.vocab - 1}: use the tokenizer that belongs to the weights"
        )
    if config.model.template == OWN_TEMPLATE:
        if not _has_chat_template(folder):
            yield f"model.template={OWN_TEMPLATE}: {folder} {NO_CHAT_TEMPLATE}"
        return
    name = config.model.template
    stop = JINJA_STOP if name in JINJA else TEMPLATES[name].stop
    if tokens and stop not in tokens:
        others = [name for name, template in TEMPLATES.items() if template.stop in tokens]
        cure = f"use model.template={others[0]}" if others else "use a model whose tokenizer has it"
        yield (f"model.template={name} ends a turn with {stop!r}, which is no token of {folder / TOKENIZER}: {cure}")


def _has_chat_template(folder: Path) -> bool:
    path = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").is_file() or (path.is_file() and bool(read_json(path).get("chat_template")))


def _token_ids(folder: Path) -> dict[str, int]:
    """Return the id of every token, or {} if only the tokenizer's own library can read it.

    ValueError: the folder has no tokenizer, or it can't be read.
    """
    if not (folder / TOKENIZER).is_file():
        if any(path.is_file() for name in OTHER_TOKENIZERS for path in folder.glob(name)):
            return {}
        raise ValueError(f"{folder}: holds no tokenizer ({TOKENIZER}): put that of the model there")
    tokenizer = read_json(folder / TOKENIZER)
    try:
        vocabulary = tokenizer["model"]["vocab"]
        if isinstance(vocabulary, list):  # unigram: [token, score]
            vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
        found = {str(token): int(number) for token, number in vocabulary.items()}
        found |= {str(token["content"]): int(token["id"]) for token in tokenizer.get("added_tokens") or ()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{folder / TOKENIZER}: is no tokenizer that can be read ({error!r})") from error
    return found
