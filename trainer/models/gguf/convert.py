"""Conversion of a GGUF file into a Hugging Face folder that engines and training processes read like any other."""

from __future__ import annotations

import json
from pathlib import Path

from trainer.models.families import read_shape
from trainer.models.folder import write_files
from trainer.models.gguf.fields import GgufFile, config_of, special_ids
from trainer.models.gguf.tokens import write_tokenizer
from trainer.models.gguf.weights import weights_of


def convert(path: Path, folder: Path) -> None:
    """Write the model's folder: config, weights, tokenizer. At most one file of weights is in memory.

    ValueError, in one line: the file can't be read or its model is not supported.
    """
    file = GgufFile(path)
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(file)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps(special_ids(file), indent=2))
    dtype = write_files(weights_of(file, read_shape(folder)), (), folder)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(file, folder)
