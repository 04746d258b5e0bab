"""Writing of Hugging Face folders: weights in *.safetensors, with the config and tokenizer of the source folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from trainer.models.entries import is_kept
from trainer.models.families import read_shape
from trainer.models.files import headers

FILE_BYTES = 4 << 30  # largest size of a written file, unless a single tensor is larger


def write_folder(weights: Iterable[tuple[str, torch.Tensor]], source: Path, folder: Path) -> None:
    """Write a Hugging Face folder with these weights and the config and tokenizer of `source`; whole or not at all.

    Tensors of `source` that are not trained (layers for multi-token prediction) are copied. One file is held in memory
    at a time. OSError: the disk is full.
    """
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix in {".json", ".txt", ".model", ".jinja"} and not file.name.endswith(".index.json"):
            shutil.copy(file, part / file.name)
    dtype = write_files(weights, _kept(source), part)
    config = json.loads((part / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    (part / "config.json").write_text(json.dumps(config, indent=2))
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def _kept(source: Path) -> Iterator[tuple[str, torch.Tensor]]:
    shape = read_shape(source)
    for name, header in headers(source).items() if shape.num_mtp else ():
        if is_kept(shape, name):
            with safe_open(header.file, "pt") as file:
                yield name, file.get_tensor(name)


def write_files(
    weights: Iterable[tuple[str, torch.Tensor]], kept: Iterable[tuple[str, torch.Tensor]], folder: Path
) -> torch.dtype | None:
    """Write `weights`, then `kept`, in files of at most FILE_BYTES, with an index if there are several files.

    Returns the dtype of the first tensor.
    """
    files: list[dict[str, int]] = []  # name -> bytes, of each file
    held: dict[str, torch.Tensor] = {}
    dtype = None

    def write() -> None:
        save_file(held, folder / f"{len(files)}.part", metadata={"format": "pt"})
        files.append({name: tensor.nbytes for name, tensor in held.items()})
        held.clear()

    for stream in (weights, kept):
        for name, tensor in stream:
            if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > FILE_BYTES:
                write()
            dtype = dtype or tensor.dtype
            held[name] = tensor.detach().contiguous().cpu()
    write()
    file_of: dict[str, str] = {}
    for i, sizes in enumerate(files):
        name = "model.safetensors" if len(files) == 1 else f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"{i}.part").rename(folder / name)
        file_of |= dict.fromkeys(sizes, name)
    if len(files) > 1:
        total = sum(sum(sizes.values()) for sizes in files)
        index = {"metadata": {"total_size": total}, "weight_map": file_of}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return dtype
