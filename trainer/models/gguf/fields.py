"""The metadata of a GGUF file as a `config.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

# By the file's `general.architecture`: the model_type and the class of a Hugging Face folder.
ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
}
_REQUIRED = object()


class GgufFile:
    """An open GGUF file. ValueError: it can't be read, or its architecture is not supported."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.reader = gguf.GGUFReader(path)
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise ValueError(f"{path}: is no GGUF file that can be read ({error or type(error).__name__})") from error
        self.architecture = str(self.field("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"{path}: a GGUF file of architecture {self.architecture!r} is not supported; supported: "
                f"{', '.join(ARCHITECTURES)}. Use the model's Hugging Face folder"
            )

    def field(self, name: str, default: Any = _REQUIRED) -> Any:
        """Return a metadata field. ValueError: it is missing and has no default."""
        if name in self.reader.fields:
            return self.reader.fields[name].contents()
        if default is _REQUIRED:
            raise ValueError(f"{self.path}: holds no field {name}")
        return default

    def own(self, name: str, default: Any = _REQUIRED) -> Any:
        """Return a metadata field of the architecture, such as `block_count`. Floats are the shortest that fit."""
        found = self.field(f"{self.architecture}.{name}", default)
        return float(str(np.float32(found))) if isinstance(found, float) else found


def config_of(file: GgufFile) -> dict[str, Any]:
    """Return the `config.json` of a file's model. ValueError: a field is missing or its value is not supported."""
    kind, name = ARCHITECTURES[file.architecture]
    tensors = {tensor.name: tensor for tensor in file.reader.tensors}
    if "rope_freqs.weight" in tensors or file.own("rope.scaling.type", "none") != "none":
        raise ValueError(f"{file.path}: its scaled position embedding is not supported: use its Hugging Face folder")
    if "token_embd.weight" not in tensors:
        raise ValueError(f"{file.path}: holds no tensor token_embd.weight")
    heads, hidden = file.own("attention.head_count"), file.own("embedding_length")
    found = {
        "architectures": [name],
        "model_type": kind,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "num_hidden_layers": file.own("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.own("attention.head_count_kv", heads),
        "head_dim": file.own("attention.key_length", hidden // heads),
        "intermediate_size": file.own("feed_forward_length"),
        "rms_norm_eps": file.own("attention.layer_norm_rms_epsilon"),
        "rope_theta": file.own("rope.freq_base", 10000.0),
        "max_position_embeddings": file.own("context_length"),
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    if kind != "qwen2":
        found |= {"attention_bias": False}
    if kind == "llama":
        found |= {"mlp_bias": False}
    if kind == "qwen3_moe":
        found |= {
            "num_experts": file.own("expert_count"),
            "num_experts_per_tok": file.own("expert_used_count"),
            "moe_intermediate_size": file.own("expert_feed_forward_length"),
            "norm_topk_prob": bool(file.own("expert_weights_norm", True)),
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return found | special_ids(file)


def special_ids(file: GgufFile) -> dict[str, int]:
    """Return the ids of the tokens that begin and end a text, and of padding, as far as the file names them."""
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ids = {ours: file.field(f"tokenizer.ggml.{theirs}_token_id", None) for ours, theirs in names.items()}
    return {name: int(number) for name, number in ids.items() if number is not None}
