"""The critic's value head and the bound of its values."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch

from trainer.engine import ScalarHead


def value_head(init_std: float, value_range: Sequence[float] = ()) -> ScalarHead:
    """Describe the head: v = w h + b, or, with value_range = [low, high], `bounded` of that.

    init_std 0 starts every value at 0, or in the middle of its range. ValueError: see `bounded`.
    """
    if not value_range:
        return ScalarHead(init_std)
    low, high = value_range
    bounded(torch.zeros(1), low, high)  # refuses bad bounds here, before the first forward pass
    return ScalarHead(init_std, functools.partial(bounded, low=low, high=high))


def bounded(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Map any number, monotonically, to one strictly between low and high, in fp32.

        v     = (low + high) / 2 + (high - low) / pi * atan(x)
        dv/dx = (high - low) / pi / (1 + x^2)

    x = 0 maps to the middle, |x| = 1 to half the way to a bound. Bounding values by atan follows BPCO (arXiv
    2608.23566); the constants are ours. Where fp32 would round v to a bound, the result is the nearest number inside.
    The gradient is the one above everywhere: small far out (0 only where x^2 is beyond fp32), but never cut off as by a
    clamp.

    ValueError: no fp32 number lies between the bounds, or they are too large for fp32.
    """
    with np.errstate(over="ignore"):
        bottom, top = np.float32(low), np.float32(high)
    first, last = np.nextafter(bottom, top), np.nextafter(top, bottom)
    if not bottom < first <= last < top or np.isinf(top - bottom):
        raise ValueError(
            f"value_range=[{low}, {high}]: as float32 both must be finite, with other numbers between them"
        )
    v = (low + high) / 2 + (high - low) / math.pi * torch.atan(x.float())
    with torch.no_grad():
        back = v.clamp(float(first), float(last)) - v  # at most a rounding error
    return v + back
