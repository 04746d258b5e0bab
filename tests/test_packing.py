"""Micro-batches: everything once, caps held, equal counts, even loads."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer.packing import QUADRATIC, pack, split

LENGTHS = st.lists(st.integers(1, 1000), max_size=60)


def cost(lengths: list[int], indices: list[int], quadratic: float = QUADRATIC) -> float:
    return sum(lengths[k] + quadratic * lengths[k] ** 2 for k in indices)


def test_five_of_900_on_four_ranks() -> None:
    grid = pack([900] * 5, num_ranks=4, max_tokens=1000)
    assert [len(rank) for rank in grid] == [2, 2, 2, 2]
    sizes = [len(micro_batch) for rank in grid for micro_batch in rank]
    assert (sizes.count(1), sizes.count(0)) == (5, 3)


def test_no_sub_traces_give_one_padding_micro_batch_each() -> None:
    assert pack([], num_ranks=2, max_tokens=10) == [[[]], [[]]]


@settings(max_examples=300, deadline=None)
@given(LENGTHS, st.integers(1, 9), st.integers(1000, 3000), st.sampled_from([0.0, QUADRATIC, 0.1]))
def test_everything_once_caps_counts_and_balance(
    lengths: list[int], num_ranks: int, max_tokens: int, quadratic: float
) -> None:
    grid = pack(lengths, num_ranks, max_tokens, quadratic=quadratic)
    assert grid == pack(lengths, num_ranks, max_tokens, quadratic=quadratic)
    assert len(grid) == num_ranks
    assert len({len(rank) for rank in grid}) == 1
    assert sorted(k for rank in grid for micro_batch in rank for k in micro_batch) == list(range(len(lengths)))
    assert all(sum(lengths[k] for k in micro_batch) <= max_tokens for rank in grid for micro_batch in rank)

    # At most one bin of first-fit-decreasing is at most half full, so few micro-batches are needed.
    assert len(grid[0]) <= max(1, math.ceil((2 * sum(lengths) / max_tokens + 1) / num_ranks))

    single = [cost(lengths, micro_batch, quadratic) for rank in grid for micro_batch in rank]
    loads = [sum(cost(lengths, micro_batch, quadratic) for micro_batch in rank) for rank in grid]
    single.sort()
    rounds = [single[first : first + num_ranks] for first in range(0, len(single), num_ranks)]
    assert max(loads) - min(loads) <= max(dealt[-1] - dealt[0] for dealt in rounds) * (1 + 1e-9) + 1e-6


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(1, 9))
def test_without_tight_caps_loads_obey_the_list_scheduling_bound(lengths: list[int], num_ranks: int) -> None:
    grid = pack(lengths, num_ranks, max_tokens=sum(lengths))
    loads = [cost(lengths, micro_batch) for rank in grid for micro_batch in rank]
    largest = max(cost(lengths, [k]) for k in range(len(lengths)))
    assert max(loads) <= sum(loads) / len(loads) + (1 - 1 / len(loads)) * largest + 1e-6


def test_long_sequences_weigh_more_than_their_tokens() -> None:
    """By tokens 5000 against 5000; with attention one of 4000 costs 16 million, six of 1000 cost 6 million."""
    lengths = [4000] + [1000] * 6
    by_tokens = pack(lengths, num_ranks=2, max_tokens=8000, quadratic=0.0)
    by_cost = pack(lengths, num_ranks=2, max_tokens=8000, quadratic=1.0)
    assert sorted(len(rank[0]) for rank in by_tokens) == [2, 5]
    assert sorted(len(rank[0]) for rank in by_cost) == [1, 6]


def test_tight_caps_fall_back_to_a_packing_that_fits() -> None:
    """Two of 10: the lightest first makes {6, 3} and {5, 4}, and 2 fits nowhere; {6, 4} and {5, 3, 2} do."""
    lengths = [6, 5, 4, 3, 2]
    (rank,) = pack(lengths, num_ranks=1, max_tokens=10)
    assert sorted(sum(lengths[k] for k in micro_batch) for micro_batch in rank) == [10, 10]


def test_thousands_of_ragged_sub_traces_are_nearly_even_and_nearly_full() -> None:
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(8, 0.8, 2000).astype(int) + 1, 16384).tolist()
    grid = pack(lengths, num_ranks=16, max_tokens=32768)
    loads = [sum(cost(lengths, micro_batch) for micro_batch in rank) for rank in grid]
    assert max(loads) < 1.01 * sum(loads) / len(loads)
    assert len(grid[0]) == math.ceil(sum(lengths) / 32768 / 16)


def test_spare_micro_batches_are_used_to_level_a_tight_packing() -> None:
    """Lightest-first finds no room here and first-fit leaves 3 of 32 micro-batches empty: 11% too much for a rank."""
    lengths = np.random.default_rng(208).integers(1, 1001, 100).tolist()
    grid = pack(lengths, num_ranks=16, max_tokens=2000)
    loads = [sum(cost(lengths, micro_batch) for micro_batch in rank) for rank in grid]
    assert max(loads) < 1.03 * sum(loads) / len(loads)


@pytest.mark.parametrize(
    ("lengths", "num_ranks", "message"),
    [
        ([5, 11], 1, "sub-trace 1 has 11 tokens, a micro-batch at most 10: raise .* to 11"),
        ([5, 0], 1, "sub-trace 1 has 0 tokens"),
        ([5], 0, "num_ranks=0"),
    ],
)
def test_bad_input_is_refused(lengths: list[int], num_ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(lengths, num_ranks, max_tokens=10)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=60), st.data())
def test_split_keeps_episodes_whole_and_even(episodes: list[int], data: st.DataObject) -> None:
    ids = [f"e{number}" for number in episodes]
    num_minibatches = data.draw(st.integers(1, len(set(ids))))
    minibatches = split(ids, num_minibatches, np.random.default_rng(data.draw(st.integers(0, 100))))
    assert sorted(k for minibatch in minibatches for k in minibatch) == list(range(len(ids)))
    sizes = [len({ids[k] for k in minibatch}) for minibatch in minibatches]
    assert sum(sizes) == len(set(ids))
    assert max(sizes) - min(sizes) <= 1


def test_split_is_random_and_repeatable() -> None:
    ids = [f"e{k}" for k in range(50)]
    one, same, other = (split(ids, 5, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert one == same
    assert one != other
    with pytest.raises(ValueError, match="num_minibatches=3 for 2 episodes"):
        split(["a", "b", "a"], 3, np.random.default_rng(0))
