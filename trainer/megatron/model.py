"""From a Hugging Face config to a megatron-core GPT model on this process's shard."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist
from torch.nn import functional as F

from trainer.config import LayoutConfig, Precision, Recompute
from trainer.megatron import cpu

cpu.enable()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.tensor_parallel.mappings import (  # noqa: E402
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from trainer.megatron.models.mapping import padded_vocab  # noqa: E402
from trainer.megatron.models.shape import ModelShape  # noqa: E402
from trainer.megatron.models.spec import block_spec  # noqa: E402
from trainer.megatron.scores import scores  # noqa: E402

_RECOMPUTE: dict[Recompute, dict[str, Any]] = {
    Recompute.none: {},
    Recompute.mlp: {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    Recompute.layer: {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}


def start_process(
    rank: int, layout: LayoutConfig, master: str, port: int, seed: int, timeout_s: float, threads: int
) -> None:
    """Joins the role's process group and makes megatron's parallel groups."""
    cuda = torch.cuda.is_available()
    if not cuda:
        torch.set_num_threads(threads)
    os.environ.update(MASTER_ADDR=master, MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(layout.num_processes))
    # SGLang does the same in its engines; where the two ends of a broadcast differ, NCCL says "invalid argument".
    os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        rank=rank,
        world_size=layout.num_processes,
        timeout=timedelta(seconds=timeout_s),
    )
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=layout.tensor_parallel)
    tensor_parallel.random.model_parallel_cuda_manual_seed(seed)


def transformer_config(shape: ModelShape, layout: LayoutConfig) -> TransformerConfig:
    dtype = DTYPES[layout.precision]
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn,
        layernorm_epsilon=shape.norm_eps,
        qk_layernorm=shape.qk_norm,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=layout.tensor_parallel,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=layout.precision is Precision.bf16,
        use_cpu_initialization=True,
        perform_initialization=False,  # weights are read from a folder right away
        calculate_per_token_loss=True,  # gradients are divided by the global number of action tokens
        moe_token_dispatcher_type="alltoall",  # the default refuses sequences of varying length
        **_RECOMPUTE[layout.recompute],
        # torch.compile, which needs a compiler: keeps one activation of SwiGLU less and passes once over the others
        bias_activation_fusion=torch.cuda.is_available(),
        # other fused kernels need Apex or Transformer Engine
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
    )


class ScoringGPT(GPTModel):
    """A GPT model that can answer with log-probabilities and entropies instead of logits."""

    real_vocab = 0  # ids that are no padding, all ranks together

    def _postprocess(self, hidden_states: torch.Tensor, labels: torch.Tensor | None = None, **rest: Any) -> Any:
        """[2, P] for `labels` int64 [1, P] (see trainer/megatron/scores.py); without labels logits [1, P, V]."""
        if labels is None:
            return super()._postprocess(hidden_states=hidden_states, labels=None, **rest)
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states)
        else:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states)
        weight = self.shared_embedding_or_output_weight()
        group = parallel_state.get_tensor_model_parallel_group()
        return scores(hidden_states[:, 0], weight, labels[0], self.real_vocab, group)


def build_gpt(shape: ModelShape, layout: LayoutConfig, output_layer: Any = None) -> GPTModel:
    """A GPT model without weights; `output_layer(config)` replaces the vocabulary projection (a value head)."""
    config = transformer_config(shape, layout)
    model = ScoringGPT(
        config,
        block_spec(shape.num_layers, shape.qk_norm),
        vocab_size=padded_vocab(shape.vocab, layout.tensor_parallel),
        max_sequence_length=shape.max_positions,
        position_embedding_type="rope",
        rotary_base=int(shape.rope_base),
        share_embeddings_and_output_weights=shape.tied and output_layer is None,
    )
    model.real_vocab = shape.vocab
    if output_layer is not None:
        model.output_layer = output_layer(config)
    return model.cuda() if torch.cuda.is_available() else model
