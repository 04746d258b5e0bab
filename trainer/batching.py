"""Packing of sub-traces into the tensors of one micro-batch.

The model reads tokens[:-1] and predicts tokens[1:], so every per-token array is shifted by one on the way in and
shifted back on the way out: index t of a SubTrace array belongs to prediction t - 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from buffer.types import Float32, SubTrace, TokenColumn


class Packing:
    """Boundaries of the sequences in one packed micro-batch, and the tokens of it that this process holds.

    With context parallelism over C processes each sequence, whose length is a multiple of 2 C, is cut into 2 C equal
    pieces; process c holds pieces c and 2 C - 1 - c of every sequence, so that all processes have the same work under a
    causal mask.

    T = tokens of this process, A = tokens of all C processes (A = C T).
    """

    def __init__(self, lengths: Sequence[int], device: torch.device, context_size: int = 1, rank: int = 0) -> None:
        self.lengths_N = torch.tensor(lengths, dtype=torch.int64)  # of whole sequences
        self.start_N = self.lengths_N.cumsum(0) - self.lengths_N
        self.device = device
        self.place_A: torch.Tensor | None = None  # index of each token among all processes' concatenated tokens; CPU
        if context_size == 1:
            self.own_T = torch.arange(int(self.lengths_N.sum()))  # indices of this process's tokens; CPU
        else:
            held = held_pieces(context_size)
            own = [pieces(self.start_N, self.lengths_N // (2 * context_size), numbers) for numbers in held]
            self.own_T = own[rank]
            self.place_A = torch.cat(own).argsort()
        self.context_size, self.context_rank = context_size, rank
        starts_T = torch.repeat_interleave(self.start_N, self.lengths_N // context_size)
        self.position_T = (self.own_T - starts_T).to(device)


def held_pieces(context_size: int) -> list[list[int]]:
    """Return the numbers of the two pieces of a sequence that each context-parallel process holds."""
    return [[rank, 2 * context_size - 1 - rank] for rank in range(context_size)]


def pieces(start_N: torch.Tensor, length_N: torch.Tensor, numbers: list[int]) -> torch.Tensor:
    """Return the indices of pieces `numbers` of each sequence i; piece k is start_N[i] + k * length_N[i] + 0, 1, ..."""
    found = [
        torch.arange(start + number * length, start + (number + 1) * length)
        for start, length in zip(start_N.tolist(), length_N.tolist(), strict=True)
        for number in numbers
    ]
    return torch.cat(found)


@dataclass(frozen=True)
class MicroBatch:
    """The sequences of one forward pass, concatenated. P = predictions of this process over all sequences.

    Under context parallelism a process holds only some pieces of each sequence (`Packing`); A = predictions of all
    processes.
    """

    tokens_1P: torch.Tensor  # int64
    labels_1P: torch.Tensor  # int64, the token that each position predicts
    action_P: torch.Tensor  # bool, True = the predicted token was sampled by the policy
    columns: dict[str, torch.Tensor]  # name -> float32 [P], 0 where action_P is False
    packing: Packing
    indices: tuple[int, ...]  # of the sub-traces, in order; empty for a padding micro-batch
    lengths: tuple[int, ...]  # predictions of each whole sequence with its padding, and of the padding sequence
    predictions: tuple[int, ...]  # of each sub-trace, without padding
    names: tuple[str, ...]  # of the sequences, for messages

    @property
    def num_actions(self) -> int:
        return int(self.action_P.sum())

    @property
    def sequence_P(self) -> torch.Tensor:
        """Return the number of the sequence that contains each prediction, int64 [P]."""
        share = sum(self.lengths) // len(self.action_P)
        lengths_N = torch.tensor(self.lengths, device=self.action_P.device) // share
        return torch.repeat_interleave(torch.arange(len(self.lengths), device=lengths_N.device), lengths_N)

    def name_of(self, prediction: int) -> str:
        """Return a name for the token that a prediction of this process is about: episode, sub-trace, index."""
        index = int(self.packing.own_T[prediction])
        ends = np.cumsum(self.lengths)
        k = int(np.searchsorted(ends, index, side="right"))
        start = int(ends[k - 1]) if k else 0
        return f"{self.names[k]}, index {index - start + 1}"


def length_multiples(tensor: int, sequence_parallel: bool, context: int) -> tuple[int, int]:
    """Return the numbers that must divide the length of each sequence and of a whole micro-batch in such a layout.

    Context parallelism cuts every sequence into 2 `context` pieces; sequence parallelism cuts the tokens that a process
    then holds into `tensor` slices.
    """
    each = 2 * context if context > 1 else 1
    return each, math.lcm(each, context * tensor if sequence_parallel else 1)


def micro_batch(
    indices: Sequence[int],
    sub_traces: Mapping[int, SubTrace],
    columns: Mapping[str, Mapping[int, Float32]],
    device: torch.device,
    multiples: tuple[int, int] = (1, 1),
    context: tuple[int, int] = (1, 0),
) -> MicroBatch:
    """Pack the tokens of the sub-traces `indices` that process `context` = (size, rank) holds.

    `columns[name][index]` is float32 [T] for that sub-trace. `multiples`: see `length_multiples`. Each sequence is
    padded at its end; a padding sequence is added if there is no sequence or if the total length is not a multiple.
    Padding has no actions.
    """
    chosen = [sub_traces[index] for index in indices]
    predictions = [len(s.tokens) - 1 for s in chosen]
    lengths = [-(-n // multiples[0]) * multiples[0] for n in predictions]
    missing = -sum(lengths) % multiples[1] if lengths else multiples[1]
    lengths += [missing] if missing else []
    packing = Packing(lengths, device, *context)
    whole = np.zeros(sum(lengths), np.bool_)  # True: not padding
    for end, length, n in zip(np.cumsum(lengths), lengths, predictions, strict=False):
        whole[end - length : end - length + n] = True
    own = packing.own_T.numpy()

    def joined(arrays: list[np.ndarray], dtype: type) -> torch.Tensor:
        padded: np.ndarray = np.zeros(len(whole), dtype)
        padded[whole] = np.concatenate(arrays) if arrays else 0
        return torch.from_numpy(padded[own]).to(device)

    action = joined([s.action_mask[1:] for s in chosen], np.bool_)
    return MicroBatch(
        tokens_1P=joined([s.tokens[:-1] for s in chosen], np.int64)[None],
        labels_1P=joined([s.tokens[1:] for s in chosen], np.int64)[None],
        action_P=action,
        columns={name: joined([of[i][1:] for i in indices], np.float32) * action for name, of in columns.items()},
        packing=packing,
        indices=tuple(indices),
        lengths=tuple(lengths),
        predictions=tuple(predictions),
        names=tuple(s.name for s in chosen),
    )


def per_sub_trace(batch: MicroBatch, out_A: torch.Tensor) -> TokenColumn:
    """Map model outputs back to SubTrace indices: float32 [T] per sub-trace, 0 at index 0.

    `out_A`: the outputs of all processes of the context-parallel group, concatenated in rank order.
    """
    flat = out_A.detach().float().cpu()
    if batch.packing.place_A is not None:
        flat = flat[batch.packing.place_A]
    found: dict[int, Float32] = {}
    start = 0
    for index, length, n in zip(batch.indices, batch.lengths, batch.predictions, strict=False):  # padding has no index
        found[index] = np.concatenate([np.zeros(1, np.float32), flat[start : start + n].numpy()])
        start += length
    return TokenColumn(found)
