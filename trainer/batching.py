"""From sub-traces to the tensors of one packed micro-batch.

The model reads tokens[:-1] and predicts tokens[1:], so everything per token is shifted by one on the
way in and shifted back on the way out: index t of a SubTrace array belongs to prediction t - 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from buffer.types import Float32, SubTrace
from trainer.megatron.modules import Packing


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of one forward pass, one after the other. P = predictions, all sequences together."""

    tokens_1P: torch.Tensor  # int64
    labels_1P: torch.Tensor  # int64, the token that each position predicts
    action_P: torch.Tensor  # bool, True = the predicted token was sampled by the policy
    fields: dict[str, torch.Tensor]  # name -> float32 [P], 0 where action_P is False
    packing: Packing
    indices: tuple[int, ...]  # which sub-traces, in order; empty for a padding micro-batch
    lengths: tuple[int, ...]  # predictions of each sequence, padding sequence included
    names: tuple[str, ...]  # of the sequences, for people

    @property
    def num_actions(self) -> int:
        return int(self.action_P.sum())

    @property
    def sequence_P(self) -> torch.Tensor:
        """Number of the sequence that each prediction belongs to, int64."""
        lengths_N = torch.tensor(self.lengths, device=self.action_P.device)
        return torch.repeat_interleave(torch.arange(len(self.lengths), device=lengths_N.device), lengths_N)

    def name_of(self, prediction: int) -> str:
        """Which token a prediction is: episode, sub-trace, index."""
        ends = np.cumsum(self.lengths)
        k = int(np.searchsorted(ends, prediction, side="right"))
        start = int(ends[k - 1]) if k else 0
        return f"{self.names[k]}, index {prediction - start + 1}"


def micro_batch(
    indices: Sequence[int],
    sub_traces: Mapping[int, SubTrace],
    fields: Mapping[str, Mapping[int, Float32]],
    device: torch.device,
    multiple_of: int = 1,
) -> MicroBatch:
    """Packs the sub-traces named by `indices`.

    `fields[name][index]` is float32 [T] of that sub-trace. A padding sequence without actions is
    added where there is none or where the length must be a multiple (sequence parallelism).
    """
    chosen = [sub_traces[index] for index in indices]
    lengths = [len(s.tokens) - 1 for s in chosen]
    missing = -sum(lengths) % multiple_of if lengths else multiple_of
    pad = np.zeros(missing, np.int32)
    lengths += [missing] if missing else []

    def joined(parts: list[np.ndarray], dtype: type) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([*parts, pad]).astype(dtype)).to(device)

    action = joined([s.action_mask[1:] for s in chosen], np.bool_)
    return MicroBatch(
        tokens_1P=joined([s.tokens[:-1] for s in chosen], np.int64)[None],
        labels_1P=joined([s.tokens[1:] for s in chosen], np.int64)[None],
        action_P=action,
        fields={name: joined([of[i][1:] for i in indices], np.float32) * action for name, of in fields.items()},
        packing=Packing(lengths, device),
        indices=tuple(indices),
        lengths=tuple(lengths),
        names=tuple(s.name for s in chosen),
    )


def per_sub_trace(batch: MicroBatch, out_P: torch.Tensor) -> dict[int, Float32]:
    """Model outputs back on SubTrace indices: float32 [T] per sub-trace, 0 at index 0."""
    flat = out_P.detach().float().cpu().numpy()
    found: dict[int, Float32] = {}
    start = 0
    for index, length in zip(batch.indices, batch.lengths, strict=False):  # the padding sequence has no index
        found[index] = np.concatenate([np.zeros(1, np.float32), flat[start : start + length]])
        start += length
    return found
