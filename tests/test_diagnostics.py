"""What is said about the critic's values."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from buffer.types import Status, SubTrace, SubTraceKind, Targets
from critic.diagnostics import by_position, explained_variance


def test_explained_variance_by_hand() -> None:
    returns = np.array([0.0, 0.0, 1.0, 1.0])  # variance 1/4
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(returns + 3, returns) == 1.0  # an offset is no variance
    assert explained_variance(np.full(4, 0.5), returns) == 0.0
    assert explained_variance(1 - returns, returns) == -3.0  # residual -1 or 1: variance 1
    assert explained_variance([0.0, 1.0, 1.0, 1.0], returns) == pytest.approx(1 - (3 / 16) / (1 / 4))


def test_explained_variance_of_constant_returns_is_defined() -> None:
    ones = np.full(5, 0.1, np.float32)
    assert explained_variance(ones, ones) == 1.0
    assert explained_variance(ones * 2, ones) == 1.0
    assert explained_variance(np.arange(5.0), ones) == 0.0


def test_explained_variance_of_small_rewards_does_not_vanish() -> None:
    returns = np.array([0.0, 1e-8])
    assert explained_variance(np.zeros(2), returns) == 0.0
    assert explained_variance(returns / 2, returns) == pytest.approx(0.75)


@pytest.mark.parametrize(("values", "returns"), [([], []), ([1.0], [1.0, 2.0]), ([np.nan], [1.0])])
def test_explained_variance_refuses(values: list[float], returns: list[float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        explained_variance(values, returns)


def test_by_position_counts_through_the_sub_traces_of_an_episode() -> None:
    mask = np.array([False, True, False, True])
    zeros = np.zeros(4, np.float32)
    first = SubTrace(
        tokens=np.zeros(4, np.int32),
        action_mask=mask,
        logprobs=zeros,
        rewards=zeros,
        versions=np.where(mask, 0, -1).astype(np.int32),
        summary_mask=np.zeros(4, bool),
        episode_id="e",
        position=0,
        successor=None,
        kind=SubTraceKind.COMPACTED,
        status=Status.FINISHED,
    )
    second = replace(first, position=1)

    def targets(a: float, b: float) -> Targets:
        values = np.array([9, a, 9, b], np.float32)  # 9 stands where nothing may be read
        return Targets(advantages=zeros, returns=values * 10, values=values)

    bins = by_position([second, first], [targets(3, 4), targets(1, 2)], num_bins=2)
    assert bins == [(0.0, 2, 1.5, 15.0), (0.5, 2, 3.5, 35.0)]
    sparse = by_position([first], [targets(1, 2)], num_bins=3)
    assert [entry.num_actions for entry in sparse] == [1, 1, 0]
    assert np.isnan(sparse[2].mean_value)
