"""Model families. The file of each family reads its `config.json` and maps its tensors."""

from __future__ import annotations

from pathlib import Path

from trainer.models.families import deepseek, glm, llama, qwen
from trainer.models.reading import JsonObject
from trainer.models.shape import ModelShape

READERS = qwen.READERS | llama.READERS | glm.READERS | deepseek.READERS  # by `model_type`


def read_shape(folder: Path) -> ModelShape:
    """Return the shape of a folder's model.

    ValueError: no config.json, or an architecture or an option that is not supported.
    """
    config = JsonObject.read(folder / "config.json")
    kind = config.value("model_type", None)
    if not isinstance(kind, str) or kind not in READERS:
        raise ValueError(f"{config.where}: model_type {kind!r} is not supported; supported: {', '.join(READERS)}")
    return READERS[kind](config)
