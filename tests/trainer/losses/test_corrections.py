"""Weights for the engine's mismatch: numbers by hand at every bound, and nothing notices where an episode was cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from buffer.types import Float32, Status, SubTrace, SubTraceKind
from trainer.config import Correction
from trainer.losses import correction_weights
from trainer.losses.correction import VETO

# 1/2 and 2 as float32 log-ratios say them: what lies on a bound lies on it exactly.
LOW, HIGH = np.exp(np.array([-math.log(2), math.log(2)], np.float32).astype(np.float64)).tolist()
BOUNDS = {
    Correction.none: (0.0, math.inf),
    Correction.tis: (0.0, HIGH),
    Correction.icepop: (LOW, HIGH),
    Correction.mis: (LOW, HIGH),
}


def sampled(rhos: Sequence[float], episode: str = "e", position: int = 0) -> tuple[SubTrace, Float32]:
    """A sub-trace of context, actions, context, the first action with rhos[0] and so on; and log pi_old.

    The engine's log-probability is 0, so that log pi_old is log rho; context holds what must not be read.
    """
    log_rho = np.log(np.array(rhos)).astype(np.float32)
    mask = np.concatenate([[False, False], np.ones(len(rhos), bool), [False]])
    old = np.full(len(mask), math.nan, np.float32)
    old[mask] = log_rho
    trace = SubTrace(
        tokens=np.zeros(len(mask), np.int32),
        action_mask=mask,
        logprobs=np.where(mask, 0, math.nan).astype(np.float32),
        rewards=np.zeros(len(mask), np.float32),
        versions=np.where(mask, 0, -1).astype(np.int32),
        stale_mask=np.zeros(len(mask), bool),
        summary_mask=np.zeros(len(mask), bool),
        episode_id=episode,
        position=position,
        successor=None,
        kind=SubTraceKind.FINAL,
        status=Status.FINISHED,
    )
    return trace, old


def weights_of(pairs: Sequence[tuple[SubTrace, Float32]], kind: Correction, low: float, high: float) -> list[Float32]:
    traces, olds = [trace for trace, _ in pairs], [old for _, old in pairs]
    found = correction_weights(traces, olds, kind, low, high)
    for trace, weights in zip(traces, found, strict=True):
        assert weights.dtype == np.float32
        assert weights.shape == trace.tokens.shape
        assert (weights[~trace.action_mask] == 0).all()
    return [weights[trace.action_mask] for trace, weights in zip(traces, found, strict=True)]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Correction.none, [1, 1, 1, 1, 1, 1, 1]),
        (Correction.tis, [0.01, 0.499, 0.5, 1, 2, 2, 2]),
        (Correction.icepop, [0, 0, 0.5, 1, 2, 0, 0]),
    ],
)
def test_token_weights_at_their_bounds(kind: Correction, expected: list[float]) -> None:
    """Window [0.5, 2], both ends inside."""
    (found,) = weights_of([sampled([0.01, 0.499, 0.5, 1.0, 2.0, 2.001, 99.0])], kind, *BOUNDS[kind])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("rhos", "kept"),
    [
        # geometric mean in [0.5, 2], both ends inside
        ([4.0, 1.0], True),  # 2
        ([4.001, 1.0], False),
        ([3.999, 1.0], True),
        ([0.25, 1.0], True),  # 1/2
        ([0.2499, 1.0], False),
        ([8.0, 0.125], True),  # 1: no token alone decides ...
        ([1.01 * VETO, 1 / VETO], True),
        ([0.99 * VETO, 1 / VETO], False),  # ... but for the veto
    ],
)
def test_mis_keeps_or_drops_whole_episodes(rhos: list[float], kept: bool) -> None:
    """Kept tokens have weight 1, whatever their rho. Another episode has no say."""
    other = sampled([1.0], episode="other")
    for pairs in ([sampled(rhos)], [sampled(rhos[:1]), sampled(rhos[1:], position=1)]):
        *mine, others = weights_of([*pairs, other], Correction.mis, LOW, HIGH)
        assert np.concatenate(mine).tolist() == [float(kept)] * 2
        assert others.tolist() == [1.0]


def test_mis_goes_over_the_episode_not_over_its_sub_traces() -> None:
    """3 actions of 1.4 and 1 of 0.3: the second part alone would be dropped, the episode's mean is 0.95."""
    pairs = [sampled([1.4, 1.4, 1.4]), sampled([0.3], position=1)]
    assert [part.tolist() for part in weights_of(pairs, Correction.mis, 0.5, 2.0)] == [[1, 1, 1], [1]]
    assert weights_of([pairs[1]], Correction.mis, 0.5, 2.0)[0].tolist() == [0]


def test_no_rounding_decides_at_a_bound() -> None:
    """log rho: once 16, 15 times 2^-50. Added to 16 one by one in float64 these are lost; the mean is 1 + 2^-50."""
    trace, old = sampled([1.0] * 16)
    low = float(np.exp(1 + 2.0**-50))
    for large in (0, 15):
        old[2:18] = 2.0**-50
        old[2 + large] = 16.0
        assert weights_of([(trace, old)], Correction.mis, low, 9.0)[0].tolist() == [1.0] * 16


@pytest.mark.parametrize("kind", list(Correction))
def test_a_cut_changes_no_weight(kind: Correction) -> None:
    rng = np.random.default_rng(0)
    whole, parts = [], []
    for number in range(40):
        rhos = np.exp(rng.normal(scale=0.6, loc=rng.normal(), size=int(rng.integers(3, 30)))).tolist()
        whole.append(sampled(rhos, f"e{number}"))
        ends = [0, *sorted(rng.choice(range(1, len(rhos)), 2, replace=False).tolist()), len(rhos)]
        for position, (begin, end) in enumerate(pairwise(ends)):
            parts.append(sampled(rhos[begin:end], f"e{number}", position))
    uncut = np.concatenate(weights_of(whole, kind, *BOUNDS[kind]))
    was_cut = np.concatenate(weights_of(parts, kind, *BOUNDS[kind]))
    np.testing.assert_array_equal(was_cut, uncut)
    if kind is not Correction.none:
        bounded = np.float32(HIGH) if kind is Correction.tis else 0
        assert 0.1 < (uncut == bounded).mean() < 0.9  # it did decide something
    order = rng.permutation(len(parts))
    shuffled = weights_of([parts[k] for k in order], kind, *BOUNDS[kind])
    back = [shuffled[place] for place in np.argsort(order)]
    np.testing.assert_array_equal(np.concatenate(back), uncut)


def test_ratios_beyond_a_float_are_bounded_or_refused() -> None:
    trace, old = sampled([1.0, 1.0])
    old[3] = 1000.0  # rho = e^1000, beyond float64
    pairs = [(trace, old)]
    assert weights_of(pairs, Correction.tis, 0.0, 2.0)[0].tolist() == [1, 2]
    assert weights_of(pairs, Correction.icepop, 0.5, 2.0)[0].tolist() == [1, 0]
    assert weights_of(pairs, Correction.mis, 0.5, 2.0)[0].tolist() == [0, 0]
    assert weights_of(pairs, Correction.none, 0.0, math.inf)[0].tolist() == [1, 1]
    old[3] = 89.0  # e^89: float64 holds it, float32 does not
    for kind in (Correction.tis, Correction.icepop):
        with pytest.raises(ValueError, match=r"episode e, sub-trace 0, index 3 is inf: a correction=.* beyond float32"):
            correction_weights([trace], [old], kind, 0.0, math.inf)


@pytest.mark.parametrize("kind", list(Correction))
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_log_probabilities_that_are_no_numbers_are_named(kind: Correction, bad: float) -> None:
    first, (trace, old) = sampled([1.0], "a"), sampled([1.0, 1.0], "b", position=4)
    wrong = old.copy()
    wrong[3] = bad
    with pytest.raises(ValueError, match=rf"episode b, sub-trace 4, index 3 is {bad}: the trainer's log-probability"):
        correction_weights([first[0], trace], [first[1], wrong], kind, *BOUNDS[kind])
    engine = trace.logprobs.copy()
    engine[2] = bad
    with pytest.raises(ValueError, match=rf"episode b, sub-trace 4, index 2 is {bad}: the engine's log-probability"):
        correction_weights([first[0], replace(trace, logprobs=engine)], [first[1], old], kind, *BOUNDS[kind])


def test_what_does_not_fit_together_is_refused() -> None:
    trace, old = sampled([1.0, 1.0])
    with pytest.raises(ValueError, match="1 sub-traces, 0 arrays"):
        correction_weights([trace], [], Correction.none, 0.0, 1.0)
    with pytest.raises(ValueError, match="episode e, sub-trace 0: 4 log-probabilities for 5 tokens"):
        correction_weights([trace], [old[1:]], Correction.none, 0.0, 1.0)
    for kind, low, high in ((Correction.icepop, 2.0, 2.0), (Correction.mis, -1.0, 2.0), (Correction.tis, 0.0, 0.0)):
        with pytest.raises(ValueError, match=f"correction={kind.value} with bounds low={low}, high={high}"):
            correction_weights([trace], [old], kind, low, high)
    assert correction_weights([], [], Correction.mis, 0.5, 2.0) == []
