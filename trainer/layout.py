"""Checks of parallel layouts: which ones work for a model, and the nearest one that works otherwise.

Pure functions of numbers; nothing is started.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from trainer.models.shape import ModelShape

MOST_STAGES = 64  # virtual stages of a proposed layout


class Sizes(NamedTuple):
    """The numbers of a layout, under the names of their settings: of `layout` the first, of `megatron` the others."""

    num_processes: int
    tensor_parallel: int
    sequence_parallel: bool
    pipeline_parallel: int
    virtual_stages: int
    context_parallel: int
    expert_parallel: int

    @classmethod
    def of(cls, num_processes: int, megatron: Any) -> Sizes:
        """Read Megatron's sizes from any object that has these attributes."""
        return cls(num_processes, *(getattr(megatron, name) for name in cls._fields[1:]))

    @property
    def row_size(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel


def refuse_layout(sizes: Sizes) -> None:
    """Refuse a layout. ValueError: it works for no model, with the numbers and the nearest one that works."""
    for problem in _alone(sizes):
        raise ValueError(f"{problem}: {_cure(sizes, lambda s: not any(_alone(s)))}")


def check_layout(shape: ModelShape, sizes: Sizes) -> None:
    """Refuse a layout that can't work for this model.

    It has passed `refuse_layout`. The nearest layout has the same number of processes; it changes as few settings as
    possible, and these by the smallest factors.

    ValueError: the layout can't work; the message has the numbers and the nearest layout that works.
    """

    def works(candidate: Sizes) -> bool:
        return not any(_alone(candidate)) and not any(_for_model(candidate, shape))

    for problem in _for_model(sizes, shape):
        raise ValueError(f"{problem}: {_cure(sizes, works)}")


def chunks_of(num_layers: int, pipeline_parallel: int, virtual_stages: int) -> list[range]:
    """Return the global numbers of the layers in each chunk of the model, first to last.

    Chunks are assigned to the pipeline ranks, then to the virtual stages: with 8 layers on 2 ranks with 2 stages each,
    rank 0 has layers 0 1 and 4 5, and rank 1 has 2 3 and 6 7. If the layers do not divide evenly, some chunks have one
    more: never the last chunk (it also has the projection to the vocabulary), and the first (which has the most
    micro-batches in flight) only if necessary.
    """
    chunks = pipeline_parallel * virtual_stages
    size, larger = divmod(num_layers, chunks)
    first = 0 if larger == chunks - 1 else 1
    ends = list(itertools.accumulate(size + (first <= chunk < first + larger) for chunk in range(chunks)))
    return [range(start, end) for start, end in itertools.pairwise([0, *ends])]


@functools.cache  # called for every tensor of every publication
def pipeline_rank_of(layer: int, num_layers: int, pipeline_parallel: int, virtual_stages: int) -> int:
    """Return the pipeline rank that has a layer."""
    chunks = chunks_of(num_layers, pipeline_parallel, virtual_stages)
    return next(number for number, layers in enumerate(chunks) if layer in layers) % pipeline_parallel


def _key(name: str) -> str:
    """Return a setting's name in messages, which are about `megatron`."""
    return f"layout.{name}" if name == "num_processes" else name


def _alone(s: Sizes) -> Iterator[str]:
    """Yield the problems of a layout that hold for every model."""
    numbers = {name: value for name, value in s._asdict().items() if name != "sequence_parallel"}
    below = [f"{_key(name)}={value}" for name, value in numbers.items() if value < 1]
    if below:
        yield f"{', '.join(below)} must be at least 1"
        return
    if s.num_processes % s.row_size:
        sizes = f"{s.tensor_parallel}*{s.pipeline_parallel}*{s.context_parallel}"
        yield (
            f"layout.num_processes={s.num_processes} is not divisible by "
            f"tensor_parallel*pipeline_parallel*context_parallel={sizes}"
        )
        return
    if s.sequence_parallel and s.tensor_parallel == 1:
        yield "sequence_parallel=true needs tensor_parallel of at least 2"
    if s.virtual_stages > 1 and s.pipeline_parallel == 1:
        yield f"virtual_stages={s.virtual_stages} needs pipeline_parallel of at least 2"
    stage = s.num_processes // s.pipeline_parallel
    if stage % s.expert_parallel:
        yield (
            f"expert_parallel={s.expert_parallel} does not divide the {stage} processes of a pipeline stage "
            f"(layout.num_processes={s.num_processes} / pipeline_parallel={s.pipeline_parallel})"
        )


def _for_model(s: Sizes, shape: ModelShape) -> Iterator[str]:
    """Yield the problems of a layout with this model."""
    tensor = f"tensor_parallel={s.tensor_parallel}"
    divided = {"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads}
    if shape.moe is None or not all(shape.moe.layers):
        divided["intermediate_size"] = shape.ffn
    if shape.moe is not None:
        divided["the shared experts' width"] = shape.moe.shared_ffn
        if s.expert_parallel == 1:
            divided["moe_intermediate_size"] = shape.moe.ffn
    for name, number in divided.items():
        if number % s.tensor_parallel:
            yield f"{tensor} does not divide the model's {name}={number}"
    rows = -(-shape.vocab // s.tensor_parallel)
    if rows * (s.tensor_parallel - 1) >= shape.vocab:
        yield f"{tensor} leaves a process without a row of the model's vocab_size={shape.vocab}"
    chunks = s.pipeline_parallel * s.virtual_stages
    if shape.num_layers < chunks:
        yield (
            f"pipeline_parallel*virtual_stages={s.pipeline_parallel}*{s.virtual_stages} leaves a process without one "
            f"of the model's num_hidden_layers={shape.num_layers}"
        )
    experts = shape.moe.experts if shape.moe else 0
    if s.expert_parallel > 1 and not experts:
        yield f"expert_parallel={s.expert_parallel} for a model without experts"
    elif experts % s.expert_parallel:
        yield f"expert_parallel={s.expert_parallel} does not divide the model's num_experts={experts}"
    if experts and s.tensor_parallel > 1 and not s.sequence_parallel:
        yield f"{tensor} with sequence_parallel=false for a model with num_experts={experts}"


def _cure(sizes: Sizes, works: Callable[[Sizes], bool]) -> str:
    """Return a sentence with the nearest sizes that work."""
    best = min((c for c in _candidates(sizes) if works(c)), key=lambda c: _distance(sizes, c), default=None)
    if best is None:
        return "no layout with this number of processes works"
    changed = [
        f"{_key(name)}={str(new).lower()}"
        for name, old, new in zip(Sizes._fields, sizes, best, strict=True)
        if (old, type(old)) != (new, type(new))
    ]
    return f"the nearest that works is {', '.join(changed)}"


def _candidates(sizes: Sizes) -> Iterator[Sizes]:
    """Yield all layouts with this number of processes, and those with more or fewer but otherwise equal sizes."""
    total = max(1, sizes.num_processes)
    divisors = [n for n in range(1, total + 1) if total % n == 0]
    stages = range(1, min(max(8, sizes.virtual_stages), MOST_STAGES) + 1)
    for tensor, pipeline, context in itertools.product(divisors, repeat=3):
        if total % (tensor * pipeline * context):
            continue
        experts = [n for n in divisors if total // pipeline % n == 0]
        for virtual, expert, sequence in itertools.product(stages, experts, (False, True)):
            yield Sizes(total, tensor, sequence, pipeline, virtual, context, expert)
    if sizes.row_size > 0:
        for processes in {total // sizes.row_size * sizes.row_size, -(-total // sizes.row_size) * sizes.row_size}:
            yield sizes._replace(num_processes=processes)


def _distance(sizes: Sizes, other: Sizes) -> tuple[float, ...]:
    """Return a sort key: the number of changed settings, their factors, then a changed number of processes."""
    pairs = list(zip(sizes, other, strict=True))
    factors = [max(int(a), 1) / int(b) if a > b else int(b) / max(int(a), 1) for a, b in pairs[:2] + pairs[3:] if b]
    changed = sum(a != b for a, b in pairs)
    return (changed, sum(factors), other.num_processes != sizes.num_processes, *other)
