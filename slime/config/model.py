"""The model's folder: whether it suits the settings, and whether it is whole. No weights are read, nothing is imported
that takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rollout.rendering import TEMPLATES
from slime.config.nodes import has_engines, layouts
from slime.schema import Config
from trainer.layout import check_layout
from trainer.megatron.models.fields import read_json
from trainer.megatron.models.files import check_weights
from trainer.megatron.models.shape import read_shape

TOKENIZER = "tokenizer.json"
OTHER_TOKENIZERS = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json", "*.tiktoken")


def unsuited(config: Config, folder: Path) -> Iterator[str]:
    """What the settings ask of a model that its config.json does not give."""
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
    for role, layout in layouts(config):
        try:
            check_layout(shape, layout)
        except ValueError as error:
            yield f"{role}.layout: {error} ({path})"


def broken(config: Config, folder: Path) -> Iterator[str]:
    """What of the weights and the tokenizer is missing, cut off, or does not go with config.json."""
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
    stop = TEMPLATES[config.model.template].stop
    if tokens and stop not in tokens:
        others = [name for name, template in TEMPLATES.items() if template.stop in tokens]
        cure = f"use model.template={others[0]}" if others else "use a model whose tokenizer has it"
        yield (
            f"model.template={config.model.template} ends a turn with {stop!r}, which is no token of "
            f"{folder / TOKENIZER}: {cure}"
        )


def _token_ids(folder: Path) -> dict[str, int]:
    """Every token of the folder's tokenizer; none where only its own library could tell. ValueError: it has none."""
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
