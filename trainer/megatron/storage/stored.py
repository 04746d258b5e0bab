"""Reading of a distributed checkpoint tensor by tensor, and export of its model, without process group or GPU.

A tensor may be stored in pieces, in the files of the ranks that held them; it is read whole, whatever the layout was.
"""

from __future__ import annotations

import io
import pickle
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from trainer.models.entries import Entry, Merge, entries
from trainer.models.families import read_shape
from trainer.models.folder import write_folder
from trainer.models.mapping import unmerge
from trainer.models.shape import ModelShape


def read_index(folder: Path) -> Any:
    """Return torch's `Metadata` of a checkpoint: names, shapes and pieces of its tensors.

    ValueError: the checkpoint is incomplete, or its metadata can't be read.
    """
    for name in ("metadata.json", ".metadata"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: not a complete checkpoint ({name} is missing)")
    try:
        return FileSystemReader(folder).read_metadata()
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError, ImportError, ValueError) as error:
        raise ValueError(f"{folder / '.metadata'}: can't be read: {error}") from error


def cut_off(folder: Path, index: Any, names: Collection[str]) -> str:
    """Return a message about a file of these tensors that is missing or shorter than in the index; "" if none is."""
    ends: dict[str, int] = {}
    for piece, info in index.storage_data.items():
        if piece.fqn in names:
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in ends.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else 0
        if size < end:
            return f"{path}: is cut off or missing: it has {size:,} of at least {end:,} bytes"
    return ""


class Stored:
    """The tensors of a checkpoint. ValueError: it is incomplete, or a file is truncated."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._index = read_index(folder)
        problem = cut_off(folder, self._index, {piece.fqn for piece in self._index.storage_data})
        if problem:
            raise ValueError(problem)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of the whole tensor; None if there is no such tensor."""
        found = self._index.state_dict_metadata.get(name)
        return tuple(found.size) if isinstance(found, TensorStorageMetadata) else None

    def read(self, name: str, first: int | None = None) -> torch.Tensor:
        """Return the whole tensor, or with `first` its slice [first] of dimension 0. ValueError: a piece is bad."""
        known = self._index.state_dict_metadata[name]
        size = list(known.size)
        low, high = (0, size[0]) if first is None else (first, first + 1)
        whole = torch.empty([high - low, *size[1:]], dtype=known.properties.dtype)
        filled = 0
        for chunk in known.chunks:
            begin, end = chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]
            begin, end = max(begin, low), min(end, high)
            if begin >= end:
                continue
            piece = self._piece(name, chunk.offsets)[begin - chunk.offsets[0] : end - chunk.offsets[0]]
            rest = [slice(o, o + n) for o, n in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)]
            whole[(slice(begin - low, end - low), *rest)] = piece
            filled += piece.numel()
        if filled != whole.numel():
            raise ValueError(f"{self.folder}: {name}: pieces for {filled:,} of {whole.numel():,} numbers")
        return whole if first is None else whole[0]

    def _piece(self, name: str, offsets: torch.Size) -> torch.Tensor:
        info = self._index.storage_data[MetadataIndex(name, offsets)]
        path = self.folder / info.relative_path
        try:
            with path.open("rb") as file:
                file.seek(info.offset)
                found: torch.Tensor = torch.load(io.BytesIO(file.read(info.length)), map_location="cpu")
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path}: tensor {name} can't be read: {error}") from error
        return found


def export(folder: Path, source: Path, out: Path) -> None:
    """Write the model of a checkpoint as a Hugging Face folder; `source`: the folder that its training started from.

    One file of the result is held in memory at a time. After an error nothing is left at `out`. ValueError: the
    checkpoint is incomplete, a file is truncated, a tensor is missing or misshapen. OSError: the disk is full.
    """
    try:
        write_folder(weights(Stored(folder), read_shape(source)), source, out)
    except (OSError, ValueError, SafetensorError) as error:
        shutil.rmtree(out.with_name(out.name + ".part"), ignore_errors=True)
        if isinstance(error, SafetensorError):
            raise OSError(f"{out}: {error}") from error
        raise


def weights(stored: Stored, shape: ModelShape) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every trained tensor, whole, under its Hugging Face name, in the order of `entries`.

    ValueError: see `export`.
    """
    for entry in entries(shape):
        name, expert = _name_in_checkpoint(entry)
        known = stored.shape(name)
        if known is None:
            raise ValueError(f"{stored.folder}: tensor {name} is missing")
        rows = sum(size[0] for size in entry.shapes)
        wanted = (rows, *entry.shapes[0][1:])
        found = known if expert is None else known[1:]
        if entry.merge is Merge.VOCAB and found[:1] > (rows,):
            found = wanted[:1] + found[1:]  # padding
        if found != wanted or (expert is not None and expert >= known[0]):
            raise ValueError(f"{stored.folder}: tensor {name} has shape {known}, the model's is {wanted}")
        yield from zip(entry.theirs, unmerge(stored.read(name, expert), entry, shape), strict=True)


def _name_in_checkpoint(entry: Entry) -> tuple[str, int | None]:
    """Return the name of an entry in the checkpoint and its index in dimension 0, where experts are stacked."""
    name = f"model.{entry.ours}"
    if entry.expert is None:
        return name, None
    return name.replace(f".local_experts.{entry.expert}.", ".experts."), entry.expert
