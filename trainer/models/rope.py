"""Frequencies of the rotary position embedding, including those scaled for long contexts.

With d rotated dimensions, base b and i = 0 .. d/2 - 1 the plain frequencies are f_i = b^(-2i/d). Scaled by factor s:

    linear   f_i / s
    llama3   g f_i + (1 - g) f_i / s,  g = clamp((L f_i / 2 pi - low) / (high - low), 0, 1)   L = original positions
    yarn     g f_i + (1 - g) f_i / s,  g = 1 - clamp((i - i_high) / (i_low - i_high), 0, 1)
             i_r: the dimension whose wave makes r rotations in L positions, rounded outward

Sources: Su et al. 2021 (2104.09864), Peng et al. 2023 (2309.00071), Llama 3.1's release.
"""

from __future__ import annotations

import math

import torch

from trainer.models.shape import ModelShape, Rope


def inverse_frequencies(shape: ModelShape) -> torch.Tensor:
    """Return float32 [rotated dimensions / 2]: radians per position."""
    dims, base, rope = int(shape.head_dim * shape.rotary_fraction), shape.rope_base, shape.rope
    plain = 1.0 / base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims)
    if rope.kind == "default":
        return plain
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        waves = rope.original * plain / (2 * math.pi)
        kept = ((waves - rope.low) / (rope.high - rope.low)).clamp(0, 1)
    else:
        first, last = _yarn_borders(rope, dims, base)
        kept = 1 - ((torch.arange(dims // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    return plain * kept + plain / rope.factor * (1 - kept)


def _yarn_borders(rope: Rope, dims: int, base: float) -> tuple[float, float]:
    """Return the two dimension pairs between which yarn goes from plain to scaled frequencies."""

    def pair(rotations: float) -> float:
        return dims * math.log(rope.original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    first, last = max(math.floor(pair(rope.high)), 0), min(math.ceil(pair(rope.low)), dims - 1)
    return first, last if last > first else first + 0.001
