"""The demo's model and tokenizer, built at the start of a run: a Qwen3 with half a million parameters."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from recipes.coding.rows import HIGHEST, LOWEST, OTHER_NAMES, VARIABLES

SPECIAL = ["<pad>", "<u>", "<t>", "<c>", "<s>", "$", "<unk>"]
WORDS = ["f=lambda x:", "cat ", "put ", "submit", "f(", ")=", "!=", "*x", "err"]
# longest first: words, facts (a=17), signed variables (+b), file names (a8), any single character
PATTERN = (
    r"f=lambda x:|cat |put |submit|err|f\(|\)=|!=|\*x|[a-eg-vz]=(?:1[0-9]|2[0-5])(?![0-9])"
    r"|[+?-][b-d]|[a-eg-vz][0-9]|.|\n"
)


def vocabulary() -> list[str]:
    """Return every token of the task, special ones first."""
    names = VARIABLES + OTHER_NAMES
    facts = [f"{name}={number}" for name in names for number in range(LOWEST, HIGHEST + 1)]
    signed = [sign + name for sign in "+-?" for name in VARIABLES[1:]]
    files = [f"{name}{digit}" for name in names for digit in range(10)]
    characters = list("abcdefghijklmnopqrstuvwxyz0123456789=+-*?;: ()!")
    return SPECIAL + WORDS + characters + facts + signed + files


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer over `vocabulary`; text outside it becomes <unk>."""
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(vocabulary())}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="$",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[1:5],
    )


@torch.no_grad()
def _favour_copying(model: Qwen3ForCausalLM, generator: torch.Generator) -> None:
    """Initialize attention for copying: per head W_O = W_V^T / 2, and W_V has orthonormal rows.

    From this start, small models learn to copy from the context in tens of steps; from a random one, in thousands (cf.
    Trockman & Kolter 2023).
    """
    config = model.config
    heads, groups, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.q_norm.weight.fill_(1.5)
        attention.k_norm.weight.fill_(1.5)
        blocks = [torch.linalg.qr(torch.randn(config.hidden_size, d, generator=generator))[0].T for _ in range(groups)]
        attention.v_proj.weight.copy_(torch.cat(blocks))
        out = [blocks[group].T for group in range(groups) for _ in range(heads // groups)]
        attention.o_proj.weight.copy_(torch.cat(out, dim=1) * 0.5)


def build_model(folder: Path, seed: int) -> None:
    """Write an untrained Hugging Face folder. The write is atomic: `folder` is complete or does not exist."""
    tokenizer = build_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=320,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    generator = torch.Generator().manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() != 2:
                continue
            std = 0.09 if "embed_tokens" in name else 0.7 * weight.shape[1] ** -0.5
            if "down_proj" in name:
                std *= (2 * config.num_hidden_layers) ** -0.5
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)
    _favour_copying(model, generator)
    part = folder.with_name(folder.name + ".part")
    logging.disable_progress_bar()
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)
