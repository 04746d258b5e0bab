"""The tensors of a GGUF file under their Hugging Face names, dequantized one at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
import torch

from trainer.models.entries import entries
from trainer.models.gguf.fields import GgufFile
from trainer.models.shape import ModelShape

_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(\w+)\.weight")
_ROTATED = {"q_proj": "heads", "k_proj": "kv_heads"}


def weights_of(file: GgufFile, shape: ModelShape) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of the model: float32 if no matrix of the file is quantized or of 16 bits, else bfloat16.

    ValueError: a tensor is missing, misshapen, of an unknown quantization, or not one of the model's.
    """
    held = {tensor.name: tensor for tensor in file.reader.tensors}
    exact = all(tensor.tensor_type.name == "F32" for tensor in held.values() if len(tensor.shape) > 1)
    names = gguf.get_tensor_name_map(_architecture(file.architecture), shape.num_layers)
    used: set[str] = set()
    stacked: tuple[str, np.ndarray] = ("", np.empty(0))  # the experts' tensor that was dequantized last
    wanted = [pair for entry in entries(shape) for pair in zip(entry.theirs, entry.shapes, strict=True)]
    for name, size in wanted:
        expert = _EXPERT.fullmatch(name)
        theirs = names.get_name(f"{expert[1]}.{expert[3]}" if expert else name, try_suffixes=(".weight", ".bias"))
        theirs = f"{theirs}.weight" if expert else theirs
        if theirs not in held:
            raise ValueError(f"{file.path}: holds no tensor {theirs}, which is {name}")
        used.add(theirs)
        if stacked[0] != theirs:
            stacked = theirs, _numbers(file, held[theirs])
        found = stacked[1][int(expert[2])] if expert else stacked[1]
        if found.shape != tuple(size):
            raise ValueError(f"{file.path}: tensor {theirs} has shape {found.shape}, its metadata asks for {size}")
        found = _straight(found, name, shape) if file.architecture == "llama" else found
        yield name, torch.tensor(found, dtype=torch.float32 if exact else torch.bfloat16)
    if unknown := sorted(held.keys() - used):
        raise ValueError(f"{file.path}: tensor {unknown[0]} is not supported: use the model's Hugging Face folder")


def _architecture(name: str) -> Any:
    return next(one for one, theirs in gguf.MODEL_ARCH_NAMES.items() if theirs == name)


def _numbers(file: GgufFile, tensor: Any) -> np.ndarray:
    try:
        found: np.ndarray = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ValueError(f"{file.path}: tensor {tensor.name} is of type {tensor.tensor_type.name}: {error}") from error
    return found.astype(np.float32, copy=False)


def _straight(found: np.ndarray, name: str, shape: ModelShape) -> np.ndarray:
    """Undo the interleaving of the two rotated halves of each head, which files of Llama have."""
    kind = _ROTATED.get(name.split(".")[-2])
    if kind is None:
        return found
    rows = found.reshape(getattr(shape, kind), shape.head_dim // 2, 2, *found.shape[1:])
    return rows.swapaxes(1, 2).reshape(found.shape)
