"""Small random models for tests, random sub-traces for them, and roles that train them in real processes."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from buffer.types import Batch, Status, SubTrace, SubTraceInfo, SubTraceKind, Targets
from trainer.config import LayoutConfig
from trainer.megatron.config import MegatronConfig

LIMIT_S = 300.0


def layout_of(numbers: Mapping[str, Any]) -> tuple[LayoutConfig, MegatronConfig]:
    """The first two settings of a role, which hold these numbers."""
    own = {field.name for field in fields(LayoutConfig)}
    others = {name: number for name, number in numbers.items() if name not in own}
    return LayoutConfig(**{name: number for name, number in numbers.items() if name in own}), MegatronConfig(**others)


def random_qwen3(path: Path, num_layers: int = 2, experts: int = 0) -> Path:
    """Writes a Hugging Face folder with a Qwen3, or a Qwen3-MoE, in float32; the same weights each time.

    The dense one has tied embeddings, the other one has not.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    more = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    config = AutoConfig.for_model(
        "qwen3_moe" if experts else "qwen3",
        vocab_size=97,  # odd, so that tensor parallelism must pad it
        hidden_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        max_position_embeddings=128,
        tie_word_embeddings=not experts,
        **(more if experts else {}),
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def sub_trace(rng: np.random.Generator, length: int, episode: int) -> SubTrace:
    """Return a whole episode of random tokens of `random_qwen3`; 40% of them are sampled."""
    mask = rng.random(length) < 0.4
    mask[0], mask[-1] = False, True
    return SubTrace(
        tokens=rng.integers(0, 97, length).astype(np.int32),
        action_mask=mask,
        logprobs=np.where(mask, -1.0, 0.0).astype(np.float32),
        rewards=np.zeros(length, np.float32),
        versions=np.where(mask, 0, -1).astype(np.int32),
        stale_mask=np.zeros(length, bool),
        summary_mask=np.zeros(length, bool),
        episode_id=f"e{episode}",
        position=0,
        successor=None,
        kind=SubTraceKind.FINAL,
        status=Status.FINISHED,
    )


def seven_sub_traces() -> list[SubTrace]:
    """Return sub-traces of 2 to 60 tokens, two per episode; the result is deterministic."""
    rng = np.random.default_rng(1)
    return [sub_trace(rng, length, i // 2) for i, length in enumerate([50, 7, 33, 12, 60, 2, 41])]


def random_targets(traces: Sequence[SubTrace]) -> list[Targets]:
    """Return normally distributed advantages, returns and values of the action tokens; deterministic."""
    rng = np.random.default_rng(2)
    draw = lambda t: (rng.normal(size=len(t.tokens)) * t.action_mask).astype(np.float32)  # noqa: E731
    return [Targets(draw(t), draw(t), draw(t)) for t in traces]


def batch_of(traces: Sequence[SubTrace]) -> Batch:
    """Return a batch that contains the sub-traces themselves, not references."""
    items = [SubTraceInfo(t, t.episode_id, len(t.tokens), t.num_actions, 0) for t in traces]
    return Batch(0, tuple(items), ())


def seat() -> Any:
    """A process that runs one worker after another, because starting a process takes longer than most tests."""
    import ray

    class Seat:  # a local class is pickled by value: Ray's processes can't import this module
        def __init__(self) -> None:
            self.worker: Any = None

        def sit(self, worker: Callable[..., Any], *arguments: Any) -> None:
            self.worker = worker(*arguments)

        def ask(self, method: str, *arguments: Any) -> Any:
            if method == "__ray_call__":
                return arguments[0](self.worker, *arguments[1:])
            return getattr(self.worker, method)(*arguments)

        def leave(self) -> None:
            self.worker.stop()
            self.worker = None
            gc.collect()

    return ray.remote(Seat).remote()


class Actor:
    """A handle to the worker in a seat, with the interface of a Ray actor."""

    def __init__(self, place: Any) -> None:
        self._place = place

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: self._place.ask.remote(method, *arguments))


_FREE: list[Any] = []  # seats without a worker


@contextmanager
def running(
    group_class: type, worker: Callable[..., Any], folder: Path, config: Any, optimizer: Any = None
) -> Iterator[Any]:
    """Yield a started role in its configuration's layout; the next role reuses its processes."""
    import ray

    from trainer.config import OptimizerConfig
    from trainer.engine import EngineSettings

    layout, optimizer = (config.layout, config.megatron), optimizer or OptimizerConfig(lr=1e-2)
    while len(_FREE) < config.layout.num_processes:
        _FREE.append(seat())
    seats = [_FREE.pop() for _ in range(config.layout.num_processes)]
    try:
        settings = [EngineSettings(rank, *layout, optimizer, str(folder), 0, 1, LIMIT_S) for rank in range(len(seats))]
        ray.get([at.sit.remote(worker, s, config) for at, s in zip(seats, settings, strict=True)], timeout=LIMIT_S)
        group = group_class([Actor(at) for at in seats], config, LIMIT_S)
        group.start(LIMIT_S).result()
        yield group
        ray.get([at.leave.remote() for at in seats], timeout=LIMIT_S)
    except BaseException:
        for at in seats:  # a worker may wait for another one forever
            ray.kill(at)
        raise
    _FREE.extend(seats)


def on_ranks(group: Any, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call a function with the worker and these arguments in each rank's process; return the results."""
    import ray

    return list(ray.get([actor.__ray_call__.remote(function, *arguments) for actor in group.actors], timeout=LIMIT_S))


def write_checkpoint(group: Any, folder: Path) -> None:
    """Save a role and wait until its checkpoint is complete."""
    group.save(folder).result()
    finish_checkpoint(group)


def finish_checkpoint(group: Any) -> None:
    """Wait for the files of a save that has started."""
    deadline = time.monotonic() + LIMIT_S
    while None in (of_ranks := group.saved().result()):
        assert time.monotonic() < deadline, "not written"
        time.sleep(0.02)
    group.finish_save(of_ranks).result(LIMIT_S)
