"""The metadata of a GGUF file as a tokenizer: vocabulary, merges, special tokens, chat template.

The file names the pre-tokenizer, which splits text into words, but does not contain it. The patterns are those of the
models' own tokenizers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trainer.models.gguf.fields import GgufFile

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # kinds of tokens


def _bytes(use_regex: bool = True) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _split(pattern: str) -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), _bytes(use_regex=False)])


def _splitter(name: str) -> Any | None:
    """Return the pre-tokenizer of this name, or None if it is unknown."""
    if name in ("gpt-2", "default"):
        return _bytes()
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _bytes()])
    if name == "qwen2":
        return _split(_WORDS % "")
    return _split(_WORDS % "{1,3}") if name == "llama-bpe" else None


def write_tokenizer(file: GgufFile, folder: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and the file's chat template, if it has one.

    ValueError: the tokenizer is of a kind that is not supported.
    """
    kind, name = file.field("tokenizer.ggml.model"), file.field("tokenizer.ggml.pre", "default")
    splitter = _splitter(name)
    if kind != "gpt2" or splitter is None:
        raise ValueError(
            f"{file.path}: a tokenizer of kind {kind!r}, {name!r} is not supported (gpt2 with smollm, gpt-2, qwen2 or "
            "llama-bpe is): use the model's Hugging Face folder"
        )
    texts, kinds = file.field("tokenizer.ggml.tokens"), file.field("tokenizer.ggml.token_type")
    merges = [tuple(pair.split(" ", 1)) for pair in file.field("tokenizer.ggml.merges")]
    vocabulary = {text: number for number, text in enumerate(texts)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=name == "llama-bpe"))
    tokenizer.normalizer = normalizers.NFC() if name == "qwen2" else None
    tokenizer.pre_tokenizer, tokenizer.decoder = splitter, decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(text, special=one == _CONTROL, normalized=False)
            for text, one in zip(texts, kinds, strict=True)
            if one in (_CONTROL, _USER_DEFINED)
        ]
    )
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {role: file.field(f"tokenizer.ggml.{theirs}_token_id", None) for role, theirs in roles.items()}
    special = {role: texts[number] for role, number in ids.items() if number is not None}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=file.own("context_length"), clean_up_tokenization_spaces=False
    )
    fast.add_special_tokens(special)
    fast.chat_template = file.field("tokenizer.chat_template", None)
    fast.save_pretrained(folder)
