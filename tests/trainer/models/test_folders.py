"""Faulty model folders: told before anything starts, in one line with file and tensor, without reading a tensor."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from families import FAMILIES, random_model
from roles import random_qwen3
from safetensors.numpy import load_file, save_file

from trainer.config import LayoutConfig
from trainer.models.families import read_shape
from trainer.models.files import INDEX, check_weights, headers, weight_files

WEIGHTS = "model.safetensors"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole folder with one file of weights."""
    return random_qwen3(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "model"))


def shards(folder: Path) -> None:
    """The same weights in two files with an index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    parts = {FIRST: {EMBEDDING: tensors.pop(EMBEDDING)}, SECOND: tensors}
    for file, part in parts.items():
        save_file(part, folder / file)
    write_index(folder, {name: file for file, part in parts.items() for name in part})


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def place(folder: Path, name: str, file: object) -> None:
    """Lets the index place a tensor elsewhere."""
    shards(folder)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    write_index(folder, index | {name: file})


def cut(path: Path, keep: Callable[[int], int]) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: keep(len(data))])


def change(folder: Path, name: str, values: Callable[[np.ndarray], np.ndarray] | None) -> None:
    tensors = load_file(folder / WEIGHTS)
    old = tensors.pop(name)
    save_file(tensors if values is None else {**tensors, name: values(old)}, folder / WEIGHTS)


def with_header(path: Path, edit: Callable[[str], str]) -> None:
    """Rewrites the header of a file, whose tensors stay as they are."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = edit(data[8 : 8 + length].decode()).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def sharded(*faults: Callable[[Path], object]) -> Callable[[Path], None]:
    """Two files with an index, then the faults."""

    def make(folder: Path) -> None:
        shards(folder)
        for fault in faults:
            fault(folder)

    return make


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        check_weights(folder, read_shape(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


FAULTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no weights": (lambda f: (f / WEIGHTS).unlink(), ["holds no weights in *.safetensors"]),
    "another format": (
        lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"),
        ["only pytorch_model.bin", "save_pret"],
    ),
    "gguf": (lambda f: (f / WEIGHTS).rename(f / "model-q4.gguf"), ["only model-q4.gguf"]),
    "Mistral's own": (lambda f: (f / WEIGHTS).rename(f / "consolidated.safetensors"), ["consolidated", "Mistral's"]),
    "empty": (lambda f: cut(f / WEIGHTS, lambda size: 0), [WEIGHTS, "cut off after 0 bytes"]),
    "four bytes": (lambda f: cut(f / WEIGHTS, lambda size: 4), [WEIGHTS, "cut off after 4 bytes"]),
    "cut in the header": (lambda f: cut(f / WEIGHTS, lambda size: 300), [WEIGHTS, "cut off after 300 bytes"]),
    "cut in half": (lambda f: cut(f / WEIGHTS, lambda size: size // 2), [WEIGHTS, "is cut off in tensor model."]),
    "last byte": (lambda f: cut(f / WEIGHTS, lambda size: size - 1), [WEIGHTS, "is cut off in tensor model."]),
    "more bytes": (lambda f: (f / WEIGHTS).open("ab").write(b"abc"), [WEIGHTS, "has 3 bytes after its last tensor"]),
    "a web page": (lambda f: (f / WEIGHTS).write_text("<!DOCTYPE html>" * 9), [WEIGHTS, "is no safetensors file"]),
    "a pointer": (lambda f: (f / WEIGHTS).write_text(POINTER), [WEIGHTS, "git-LFS", "git lfs pull"]),
    "no JSON": (lambda f: with_header(f / WEIGHTS, lambda text: text[:-9]), [WEIGHTS, "its header can't be read"]),
    "a list": (lambda f: with_header(f / WEIGHTS, lambda text: "[]"), [WEIGHTS, "its header can't be read"]),
    "a tensor twice": (
        lambda f: with_header(f / WEIGHTS, lambda text: text.replace("layers.1", "layers.0")),
        [WEIGHTS, "model.layers.0.", "is there twice"],
    ),
    "places overlap": (
        lambda f: with_header(f / WEIGHTS, lambda text: text.replace('"data_offsets":[0,', '"data_offsets":[8,')),
        [WEIGHTS, "tensor ", "is at bytes 8 to "],
    ),
    "tensor missing": (lambda f: change(f, NORM, None), [f"tensor {NORM} is missing (23 tensors found)"]),
    "tensor misshapen": (
        lambda f: change(f, NORM, lambda t: t[:-1]),
        [WEIGHTS, f"tensor {NORM} has shape (31,), config.json asks for (32,)"],
    ),
    "quantized": (
        lambda f: change(f, EMBEDDING, lambda t: t.astype(np.int8)),
        [WEIGHTS, f"tensor {EMBEDDING} is of type I8", "BF16"],
    ),
    "another model's": (
        lambda f: save_file({"vision.weight": np.zeros(3, np.float32)}, f / "vision.safetensors"),
        ["vision.safetensors: tensor vision.weight is not supported"],
    ),
    "in two files": (
        lambda f: shutil.copy(f / WEIGHTS, f / "model-old.safetensors"),
        ["tensor model.", "is in model-old.safetensors as well"],
    ),
    "shard missing": (sharded(lambda f: (f / SECOND).unlink()), [SECOND, "no such file", "tensor model.layers.0."]),
    "shard cut off": (
        sharded(lambda f: cut(f / SECOND, lambda n: n // 2)),
        [SECOND, "is cut off in tensor model."],
    ),
    "shard is a pointer": (sharded(lambda f: (f / SECOND).write_text(POINTER)), [SECOND, "git lfs pull"]),
    "in two shards": (
        sharded(lambda f: save_file(load_file(f / SECOND) | load_file(f / FIRST), f / SECOND)),
        [SECOND, f"tensor {EMBEDDING} is in {FIRST} as well"],
    ),
    "not where it should be": (lambda f: place(f, NORM, FIRST), [FIRST, f"holds no tensor {NORM}, which {INDEX}"]),
    "outside the folder": (lambda f: place(f, NORM, "../x.safetensors"), [INDEX, NORM, "'../x.safetensors'"]),
    "in a folder inside": (lambda f: place(f, NORM, "x/x.safetensors"), [INDEX, NORM, "is no *.safetensors file of"]),
    "in no file": (lambda f: place(f, NORM, 3), [INDEX, NORM, "3, which is no *.safetensors file of this folder"]),
    "index without tensors": (sharded(lambda f: write_index(f, {})), [INDEX, "names no tensors"]),
    "index of another kind": (sharded(lambda f: write_index(f, "all")), [INDEX, "names no tensors"]),
    "index is no JSON": (lambda f: (f / INDEX).write_text("{"), [INDEX, "not JSON"]),
    "index is in latin-1": (lambda f: (f / INDEX).write_bytes(b'{"\xe9": 1}'), [INDEX, "not JSON"]),
    "index is a pointer": (lambda f: (f / INDEX).write_text(POINTER), [INDEX, "git lfs pull"]),
    "shard is a folder": (
        sharded(lambda f: (f / SECOND).unlink(), lambda f: (f / SECOND).mkdir()),
        [SECOND, "no such file"],
    ),
    "tensor of the model not in the index": (
        sharded(lambda f: write_index(f, dict.fromkeys(load_file(f / SECOND), SECOND))),
        [f"tensor {EMBEDDING} is missing"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_folder_is_refused_with_file_and_tensor(folder: Path, fault: str) -> None:
    make, parts = FAULTS[fault]
    make(folder)
    message = refusal(folder)
    assert str(folder) in message
    for part in parts:
        assert part in message


def add(folder: Path, file: str, tensors: dict[str, np.ndarray] | None = None) -> None:
    zeros = {name: np.zeros_like(tensor) for name, tensor in load_file(weight_files(folder)[0]).items()}
    save_file(zeros if tensors is None else tensors, folder / file)


# What lies beside the model's files and is no fault: the files that count all the same.
WHOLE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "one file": (lambda f: None, [WEIGHTS]),
    "two files": (shards, [FIRST, SECOND]),
    "a stray file beside an index": (sharded(lambda f: add(f, WEIGHTS)), [FIRST, SECOND]),
    "an adapter beside an index": (
        sharded(lambda f: add(f, "adapter_model.safetensors", {"x": np.zeros(2)})),
        [FIRST, SECOND],
    ),
    "Mistral's own beside it": (lambda f: add(f, "consolidated.safetensors", {"tok": np.zeros(2)}), [WEIGHTS]),
    "Mistral's own beside an index": (sharded(lambda f: add(f, "consolidated.safetensors")), [FIRST, SECOND]),
    "files without an index": (sharded(lambda f: (f / INDEX).unlink()), [FIRST, SECOND]),
    "a copy's hidden file": (lambda f: (f / "._model.safetensors").write_bytes(b"Mac OS X"), [WEIGHTS]),
    "other formats": (lambda f: (f / "pytorch_model.bin").write_bytes(b"PK"), [WEIGHTS]),
    "half precision": (lambda f: change(f, NORM, lambda t: t.astype(np.float16)), [WEIGHTS]),
    "the tied matrix twice": (
        lambda f: save_file(
            (tensors := load_file(f / WEIGHTS)) | {"lm_head.weight": tensors[EMBEDDING].copy()}, f / WEIGHTS
        ),
        [WEIGHTS],
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_no_fault_passes(folder: Path, name: str) -> None:
    make, files = WHOLE[name]
    make(folder)
    check_weights(folder, read_shape(folder))
    assert [file.name for file in weight_files(folder)] == files
    assert {header.file.name for header in headers(folder).values()} == set(files)


@pytest.mark.parametrize("name", ["one file", "a stray file beside an index", "Mistral's own beside an index"])
@pytest.mark.usefixtures("process")
def test_the_weights_that_are_loaded_are_those_of_the_index(source: Path, folder: Path, name: str) -> None:
    from trainer.megatron import hf
    from trainer.megatron.config import MegatronConfig
    from trainer.megatron.model import build_models

    WHOLE[name][0](folder)
    shape = read_shape(folder)
    models = build_models(shape, LayoutConfig(), MegatronConfig())
    hf.load(models, shape, folder)
    wanted = load_file(source / WEIGHTS)
    found = {name: tensor.detach().numpy() for name, tensor in hf.export(models, shape)}
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.e2e
def test_sglang_reads_the_same_files(source: Path, tmp_path: Path) -> None:
    """SGLang's own choice among all *.safetensors of a folder, as its loader makes it."""
    for number, name in enumerate(WHOLE):
        WHOLE[name][0](Path(shutil.copytree(source, tmp_path / str(number))))
    program = (
        "import glob, json, os, sys\n"
        "from sglang.srt.model_loader.weight_utils import filter_duplicate_safetensors_files as choose\n"
        "folders = [os.path.join(sys.argv[1], str(n)) for n in range(int(sys.argv[2]))]\n"
        f"found = [choose(glob.glob(os.path.join(f, '*.safetensors')), f, {INDEX!r}) for f in folders]\n"
        "print(json.dumps([sorted(map(os.path.basename, files)) for files in found]))"
    )
    command = [sys.executable, "-c", program, str(tmp_path), str(len(WHOLE))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [files for _, files in WHOLE.values()]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_read_by_headers_alone(name: str, tmp_path: Path) -> None:
    folder = random_model(name, tmp_path / "model", "bfloat16")
    check_weights(folder, read_shape(folder))


def test_a_folder_is_looked_at_without_torch(source: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from trainer.models.files import check_weights\n"
        "from trainer.models.families import read_shape\n"
        "check_weights(Path(sys.argv[1]), read_shape(Path(sys.argv[1])))\n"
        "sys.exit(', '.join({'torch', 'numpy', 'safetensors', 'transformers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(source)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
