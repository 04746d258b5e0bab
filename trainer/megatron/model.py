"""Construction of this process's chunks of a megatron-core GPT model from a Hugging Face config."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist
from torch.nn import functional as F

from trainer.config import LayoutConfig, Precision, Recompute
from trainer.engine import EngineSettings
from trainer.layout import chunks_of
from trainer.megatron import cpu
from trainer.megatron.config import MegatronConfig

cpu.enable()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.tensor_parallel.mappings import (  # noqa: E402
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from trainer.megatron.modules.scores import scores  # noqa: E402
from trainer.megatron.options import config_class, finish, model_options  # noqa: E402
from trainer.megatron.spec import block_spec  # noqa: E402
from trainer.models.entries import padded_vocab  # noqa: E402
from trainer.models.shape import ModelShape  # noqa: E402

_RECOMPUTE: dict[Recompute, dict[str, Any]] = {
    Recompute.none: {},
    Recompute.mlp: {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    Recompute.layer: {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}


def start_process(settings: EngineSettings, master: str, port: int) -> None:
    """Join the role's process group and create megatron's parallel groups."""
    s, megatron = settings, settings.megatron
    cuda = torch.cuda.is_available()
    if not cuda:
        torch.set_num_threads(s.threads)
    num_processes = s.layout.num_processes
    os.environ.update(MASTER_ADDR=master, MASTER_PORT=str(port), RANK=str(s.rank), WORLD_SIZE=str(num_processes))
    # SGLang sets the same in its engines; if the two ends of a broadcast differ, NCCL fails with "invalid argument".
    os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        rank=s.rank,
        world_size=num_processes,
        timeout=timedelta(seconds=s.timeout_s),
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=megatron.tensor_parallel,
        pipeline_model_parallel_size=megatron.pipeline_parallel,
        virtual_pipeline_model_parallel_size=_virtual(megatron),
        context_parallel_size=megatron.context_parallel,
        expert_model_parallel_size=megatron.expert_parallel,
        expert_tensor_parallel_size=megatron.expert_tensor_parallel,
        distributed_timeout_minutes=math.ceil(s.timeout_s / 60),
    )
    tensor_parallel.random.model_parallel_cuda_manual_seed(s.seed)


def leave_process() -> None:
    """Undo `start_process`; the same process may start again in another layout."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _virtual(megatron: MegatronConfig) -> int | None:
    return megatron.virtual_stages if megatron.virtual_stages > 1 else None


def transformer_config(
    shape: ModelShape, layout: LayoutConfig, megatron: MegatronConfig, options: Mapping[str, Any] | None = None
) -> TransformerConfig:
    """Return Megatron's configuration. `options`: further fields of it. TypeError: a field that is set here already."""
    dtype = DTYPES[layout.precision]
    found: TransformerConfig = config_class(shape)(
        **model_options(shape),
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=megatron.tensor_parallel,
        sequence_parallel=megatron.sequence_parallel,
        pipeline_model_parallel_size=megatron.pipeline_parallel,
        virtual_pipeline_model_parallel_size=_virtual(megatron),
        pipeline_model_parallel_layout=_pipeline(shape, megatron),
        context_parallel_size=megatron.context_parallel,
        expert_model_parallel_size=megatron.expert_parallel,
        expert_tensor_parallel_size=megatron.expert_tensor_parallel,
        variable_seq_lengths=megatron.pipeline_parallel > 1,  # micro-batches differ in length
        # With virtual stages the other communication mode silently trains on wrong values.
        overlap_p2p_comm=megatron.virtual_stages > 1,
        batch_p2p_comm=megatron.virtual_stages == 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=layout.precision is Precision.bf16,
        use_cpu_initialization=True,
        perform_initialization=False,  # weights are read from a folder afterward
        calculate_per_token_loss=True,  # gradients are divided by the global number of action tokens
        moe_token_dispatcher_type="alltoall",  # the default refuses sequences of varying length
        **_recompute(shape, layout),
        # Uses torch.compile, which needs a compiler: stores one activation of SwiGLU less and reads the others once.
        bias_activation_fusion=torch.cuda.is_available(),
        # other fused kernels need Apex or Transformer Engine
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        **(options or {}),
    )
    return found


def _pipeline(shape: ModelShape, megatron: MegatronConfig) -> list[list[str]] | None:
    """Return Megatron's description of the chunks, which it needs when the layers do not divide evenly."""
    if megatron.pipeline_parallel == 1:
        return None
    chunks = chunks_of(shape.num_layers, megatron.pipeline_parallel, megatron.virtual_stages)
    found = [["decoder"] * len(layers) for layers in chunks]
    return [["embedding", *found[0]], *found[1:-1], [*found[-1], "loss"]]


def _recompute(shape: ModelShape, layout: LayoutConfig) -> dict[str, Any]:
    found = dict(_RECOMPUTE[layout.recompute])
    if layout.recompute is Recompute.mlp and shape.moe:
        found["recompute_modules"] = ["mlp", "moe"]  # in layers with experts the MLP is called "moe"
    return found


class ScoringGPT(GPTModel):
    """A chunk of a GPT model whose last stage returns log-probabilities and entropies, or values."""

    real_vocab = 0  # number of ids without padding, over all ranks
    has_value_head = False

    def _postprocess(self, hidden_states: torch.Tensor, labels: torch.Tensor | None = None, **rest: Any) -> Any:
        """Return, on the last pipeline stage, [2, P] for `labels` int64 [1, P] (modules/scores.py), logits [1, P, V]
        without labels, or values [1, P] with a value head; elsewhere the hidden states for the next stage.
        """
        if not self.post_process:
            return hidden_states
        if self.has_value_head:
            values_P11, _ = self.output_layer(hidden_states)
            return values_P11[:, :, 0].t()
        if labels is None:
            return super()._postprocess(hidden_states=hidden_states, labels=None, **rest)
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states)
        else:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states)
        for before_forward in self.output_layer._forward_pre_hooks.values():
            before_forward(self.output_layer, ())  # waits for a gather of its weights; the layer is not called
        shared = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if shared else self.output_layer.weight
        group = parallel_state.get_tensor_model_parallel_group()
        return scores(hidden_states[:, 0], weight, labels[0], self.real_vocab, group)


def build_models(
    shape: ModelShape,
    layout: LayoutConfig,
    megatron: MegatronConfig,
    output_layer: Any = None,
    options: Mapping[str, Any] | None = None,
) -> list[ScoringGPT]:
    """Build this process's chunks, one for each virtual stage, without weights.

    `output_layer(config)` replaces the vocabulary projection (a value head). `options`: see `transformer_config`.
    """
    config = transformer_config(shape, layout, megatron, options)
    return [_build(shape, megatron, config, stage, output_layer) for stage in range(megatron.virtual_stages)]


def _build(
    shape: ModelShape, megatron: MegatronConfig, config: TransformerConfig, stage: int, output_layer: Any
) -> ScoringGPT:
    rank = parallel_state.get_pipeline_model_parallel_rank()
    chunks = chunks_of(shape.num_layers, megatron.pipeline_parallel, megatron.virtual_stages)
    layers = chunks[stage * megatron.pipeline_parallel + rank]
    last = layers.stop == shape.num_layers
    model = ScoringGPT(
        config,
        block_spec(shape, layers),
        pre_process=layers.start == 0,
        post_process=last,
        vp_stage=stage if megatron.virtual_stages > 1 else None,
        vocab_size=padded_vocab(shape.vocab, megatron.tensor_parallel),
        max_sequence_length=shape.max_positions,
        position_embedding_type="rope",
        rotary_base=int(shape.rope_base),
        share_embeddings_and_output_weights=shape.tied and output_layer is None,
    )
    model.real_vocab = shape.vocab
    finish(model, shape)
    if output_layer is not None and last:
        model.output_layer = output_layer(config)
        model.has_value_head = True
    return model.cuda() if torch.cuda.is_available() else model
