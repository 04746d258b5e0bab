"""The tensors of a Hugging Face folder, located by its index and the headers of its files in milliseconds.

With an index, only the files and tensors that it names are used; without one, all *.safetensors files. SGLang reads
the same files, so engines and training processes start from the same tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from buffer.text import unique_keys
from trainer.models.entries import Entry, entries, strays
from trainer.models.reading import read_json, refuse_pointer
from trainer.models.shape import ModelShape

INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # types that can be loaded; all others are quantized
OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack")
AGAIN = "download the folder again"


@dataclass(frozen=True)
class Header:
    """The description of one tensor in its file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def check_weights(folder: Path, shape: ModelShape) -> None:
    """Refuse a folder whose files do not hold every tensor of this model once and whole.

    Values are not checked. ValueError: see `headers` and `check_headers`.
    """
    check_headers(folder, headers(folder), entries(shape), shape)


def check_headers(folder: Path, found: dict[str, Header], wanted: Sequence[Entry], shape: ModelShape) -> None:
    """Refuse a folder. ValueError: a tensor is missing, misshapen, of a quantized type, or not one of the model's."""
    for entry in wanted:
        for name, size in zip(entry.theirs, entry.shapes, strict=True):
            if name not in found:
                raise ValueError(f"{folder}: tensor {name} is missing ({len(found)} tensors found)")
            header = found[name]
            if header.shape != size:
                raise ValueError(f"{header.file}: tensor {name} has shape {header.shape}, config.json asks for {size}")
            if header.dtype not in ITEM_BYTES:
                raise ValueError(
                    f"{header.file}: tensor {name} is of type {header.dtype}: use a folder whose weights are of one of "
                    f"{', '.join(ITEM_BYTES)}"
                )
    unknown = strays(shape, found)
    if unknown:
        others = f", nor are {len(unknown) - 1} others" if len(unknown) > 1 else ""
        raise ValueError(f"{found[unknown[0]].file}: tensor {unknown[0]} is not supported{others}")


def headers(folder: Path) -> dict[str, Header]:
    """Return every tensor of a folder by its name.

    ValueError, with file and tensor: a file is missing, truncated or not a safetensors file; a tensor is in two files;
    the index can't be read, names a file outside the folder, or names a tensor that its file does not hold.
    """
    named = _named(folder)
    if named is None:
        return _joined(weight_files(folder))
    for name, file in named.items():
        if not file.is_file():
            raise ValueError(f"{file}: no such file, in which {INDEX} places tensor {name}: {AGAIN}")
    held = _joined(sorted(set(named.values())))
    for name, file in named.items():
        if name not in held or held[name].file != file:
            raise ValueError(f"{file}: holds no tensor {name}, which {INDEX} places there: {AGAIN}")
    return {name: held[name] for name in named}


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a folder's tensors, sorted. ValueError: there are none, or the index can't be read."""
    named = _named(folder)
    if named is not None:
        return sorted(set(named.values()))
    found = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("."))
    names = [path.name for path in found]
    if names == ["consolidated.safetensors", "model.safetensors"]:
        return found[1:]  # the first file holds the same weights under Mistral's own names
    if not found:
        others = sorted(path.name for pattern in OTHER_FORMATS for path in folder.glob(pattern))
        cure = "write it anew with transformers: AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)"
        raise ValueError(
            f"{folder}: holds no weights in *.safetensors"
            + (f", only {others[0]}: {cure}" if others else f": {AGAIN}, with its weights")
        )
    if all(name.startswith("consolidated") for name in names):
        raise ValueError(
            f"{found[0]}: holds Mistral's own names of tensors, and there is no other file: "
            "download the folder's model*.safetensors as well"
        )
    return found


def _named(folder: Path) -> dict[str, Path] | None:
    """Return the file of each tensor from the index; None if there is no index. ValueError: the index is bad."""
    path = folder / INDEX
    if not path.is_file():
        return None
    index = read_json(path)
    file_of = index.get("weight_map")
    if not isinstance(file_of, dict) or not file_of:
        raise ValueError(f"{path}: names no tensors (its weight_map is {type(file_of).__name__}): {AGAIN}")
    for name, file in file_of.items():
        plain = isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors")
        if not plain or file.startswith("."):
            raise ValueError(f"{path}: places tensor {name} in {file!r}, which is no *.safetensors file of this folder")
    return {name: folder / file for name, file in file_of.items()}


def _joined(files: Iterable[Path]) -> dict[str, Header]:
    found: dict[str, Header] = {}
    for file in files:
        for name, header in read_header(file).items():
            if name in found:
                raise ValueError(
                    f"{file}: tensor {name} is in {found[name].file.name} as well: remove the file that is not the "
                    "model's from the folder"
                )
            found[name] = header
    return found


def read_header(path: Path) -> dict[str, Header]:
    """Return the tensors of one safetensors file: 8 bytes with the length of a JSON object, the object, the data.

    ValueError: the file is truncated (the message names the first incomplete tensor), or not of this format.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            refuse_pointer(path, start)
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"{path}: is no safetensors file, or is cut off after {size:,} bytes: {AGAIN}")
            text = file.read(length)
    except OSError as error:
        raise ValueError(f"{path}: can't be read: {error.strerror}") from error
    try:
        tensors = json.loads(text, object_pairs_hook=unique_keys)
        tensors.pop("__metadata__", None)
        found = [(name, *_described(path, one)) for name, one in tensors.items()]
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is no safetensors file (its header can't be read: {error}): {AGAIN}") from error
    end, held = 0, size - 8 - length
    for name, header, first, last in sorted(found, key=lambda one: one[2:]):
        items = math.prod(header.shape)
        if first != end or (header.dtype in ITEM_BYTES and last - first != items * ITEM_BYTES[header.dtype]):
            raise ValueError(
                f"{path}: tensor {name} ({header.dtype}, shape {header.shape}) is at bytes {first:,} to {last:,}, "
                f"not where and as long as it should be: {AGAIN}"
            )
        if last > held:
            raise ValueError(f"{path}: is cut off in tensor {name}, which ends at byte {last:,} of {held:,}: {AGAIN}")
        end = last
    if end != held:
        raise ValueError(f"{path}: has {held - end:,} bytes after its last tensor: {AGAIN}")
    return {name: header for name, header, _, _ in found}


def _described(path: Path, tensor: dict[str, Any]) -> tuple[Header, int, int]:
    first, last = (int(offset) for offset in tensor["data_offsets"])
    return Header(path, str(tensor["dtype"]), tuple(int(n) for n in tensor["shape"])), first, last
