"""Small random models for tests, random sub-traces for them, and roles that train them in real processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from buffer.types import Batch, Status, SubTrace, SubTraceInfo, SubTraceKind

LIMIT_S = 300.0


def random_qwen3(path: Path) -> Path:
    """Writes a Hugging Face folder with a Qwen3 of two layers in float32; the same weights each time."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=97,  # odd: tensor parallelism has to pad it
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    return path


def sub_trace(rng: np.random.Generator, length: int, episode: int) -> SubTrace:
    """Random tokens of `random_qwen3`, four in ten of them sampled; a whole episode."""
    mask = rng.random(length) < 0.4
    mask[0], mask[-1] = False, True
    return SubTrace(
        tokens=rng.integers(0, 97, length).astype(np.int32),
        action_mask=mask,
        logprobs=np.where(mask, -1.0, 0.0).astype(np.float32),
        rewards=np.zeros(length, np.float32),
        versions=np.where(mask, 0, -1).astype(np.int32),
        summary_mask=np.zeros(length, bool),
        episode_id=f"e{episode}",
        position=0,
        successor=None,
        kind=SubTraceKind.FINAL,
        status=Status.FINISHED,
    )


def batch_of(traces: Sequence[SubTrace]) -> Batch:
    """A batch that holds the sub-traces themselves."""
    items = [SubTraceInfo(t, t.episode_id, len(t.tokens), t.num_actions, 0) for t in traces]
    return Batch(0, tuple(items), ())


@contextmanager
def running(group_class: type, worker: type, folder: Path, config: Any) -> Iterator[Any]:
    """A started role in its configuration's layout; its processes end with the block."""
    import ray

    from trainer.config import OptimizerConfig
    from trainer.worker import WorkerSettings

    layout, optimizer = config.layout, OptimizerConfig(lr=1e-2)
    actors = [
        ray.remote(worker).remote(WorkerSettings(rank, layout, optimizer, str(folder), 0, 1, LIMIT_S), config)
        for rank in range(layout.num_processes)
    ]
    group = group_class(actors, config, LIMIT_S)
    try:
        group.start(LIMIT_S).result()
        yield group
    finally:
        for actor in actors:
            ray.kill(actor)
