"""Episodes as one sub-trace, and their twins: the same episodes in parts that each repeat all tokens before them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from buffer.types import Float32, Status, SubTrace, SubTraceKind, Successor


def whole_trace(rng: np.random.Generator, name: str, length: int, reward: float) -> SubTrace:
    """One uncut episode of blocks: sampled, tool, sampled, ..."""
    mask = np.repeat(rng.random(length // 4 + 1) < 0.5, 4)[:length]
    mask[0], mask[1], mask[-1] = False, True, True
    rewards = np.zeros(length, np.float32)
    rewards[-1] = reward
    return SubTrace(
        tokens=rng.integers(7, 400, length).astype(np.int32),
        action_mask=mask,
        logprobs=np.where(mask, -rng.random(length), 0).astype(np.float32),
        rewards=rewards,
        versions=np.where(mask, 0, -1).astype(np.int32),
        stale_mask=np.zeros(length, bool),
        summary_mask=np.zeros(length, bool),
        episode_id=name,
        position=0,
        successor=None,
        kind=SubTraceKind.FINAL,
        status=Status.FINISHED,
    )


def twin(trace: SubTrace, num_parts: int) -> list[SubTrace]:
    """The episode cut into parts of about as many actions each; every part repeats all tokens before it."""
    actions = np.flatnonzero(trace.action_mask)
    ends = [int(part[-1]) + 1 for part in np.array_split(actions, num_parts)]
    parts, begin = [], 0
    for position, end in enumerate(ends):
        own = trace.action_mask[:end] & (np.arange(end) >= begin)
        last = position == num_parts - 1
        parts.append(
            replace(
                trace,
                tokens=trace.tokens[:end],
                action_mask=own,
                logprobs=np.where(own, trace.logprobs[:end], 0).astype(np.float32),
                rewards=np.where(own, trace.rewards[:end], 0).astype(np.float32),
                versions=np.where(own, trace.versions[:end], -1).astype(np.int32),
                stale_mask=trace.stale_mask[:end],
                summary_mask=trace.summary_mask[:end],
                position=position,
                successor=None if last else Successor(position + 1, 0),
                kind=SubTraceKind.FINAL if last else SubTraceKind.COMPACTED,
            )
        )
        begin = end
    return parts


@dataclass(frozen=True)
class Pair:
    """The same episodes, once whole and once cut, with the same values at the same actions."""

    whole: list[SubTrace]
    parts: list[SubTrace]
    whole_values: list[Float32]
    parts_values: list[Float32]


def pair(seed: int) -> Pair:
    rng = np.random.default_rng(seed)
    whole = [whole_trace(rng, f"e{i}", n, float(i % 2)) for i, n in enumerate((40, 77, 23, 96, 60))]
    values = [rng.normal(size=len(trace.tokens)).astype(np.float32) for trace in whole]
    parts, parts_values = [], []
    for trace, value, count in zip(whole, values, (2, 3, 1, 4, 2), strict=True):
        for part in twin(trace, count):
            parts.append(part)
            parts_values.append(value[: len(part.tokens)])
    return Pair(whole, parts, values, parts_values)
