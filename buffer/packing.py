"""Assignment of sub-traces to ranks and micro-batches, and of episodes to optimizer minibatches."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from buffer.types import Grid

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

# FLOPs of a layer with hidden size h for a sequence of L tokens: 24 h^2 L for its matrices and 2 h L^2 for causal
# attention, so quadratic / linear = 1 / (12 h). The value is for h = 4096.
QUADRATIC = 2e-5
EXTRA = 0.02  # an additional micro-batch per rank must reduce the largest load by this fraction
TOLERANCE = 0.005  # stop when the largest load exceeds the mean by at most this fraction
MAX_EXCHANGES = 512  # between ranks; a few hundred take about 0.5 s with 10,000 sub-traces
MAX_LOOKED_AT = 32  # sub-traces of the costliest rank that are considered for each exchange


def pack(
    lengths: Sequence[int], num_ranks: int, max_tokens: int, linear: float = 1.0, quadratic: float = QUADRATIC
) -> Grid:
    """Return grid[rank][micro_batch] -> indices into `lengths`.

    Every index occurs exactly once. Every rank has the same number m >= 1 of micro-batches, and none has more than
    `max_tokens` tokens. m is the smallest number for which first-fit-decreasing succeeds, plus one if that reduces the
    load of the costliest rank by more than EXTRA. If there are too few sub-traces, some micro-batches are empty: they
    are padding with zero loss. Example: five sub-traces of 900 tokens, at most 1000 tokens in a micro-batch and four
    ranks give two micro-batches per rank; three of the eight are empty.

    The cost of a sub-trace is linear * length + quadratic * length^2. Micro-batches are filled in
    longest-processing-time order. They are then dealt in rounds of num_ranks, costliest first: in each round every
    rank gets one, and the rank with the smallest load gets the costliest. The loads of two ranks therefore differ by
    at most the difference between two micro-batches of one round. Finally ranks exchange sub-traces until the
    costliest rank is at most TOLERANCE above the mean or no exchange improves it. Each rank's micro-batches are sorted
    by descending cost, so micro-batches with the same number on different ranks have similar costs. The result is
    deterministic; the order of `lengths` only breaks ties between equal lengths.

    ValueError: a sub-trace does not fit in a micro-batch.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks={num_ranks}: must be at least 1")
    sizes = np.asarray(lengths, np.int64)
    if len(sizes) and sizes.min() < 1:
        raise ValueError(f"sub-trace {int(sizes.argmin())} has {sizes.min()} tokens: must be at least 1")
    if len(sizes) and sizes.max() > max_tokens:
        raise ValueError(
            f"sub-trace {int(sizes.argmax())} has {sizes.max()} tokens, but a micro-batch holds at most {max_tokens}: "
            f"raise layout.max_tokens_per_micro_batch to {sizes.max()}, or lower rollout.compaction.context_tokens"
        )
    order = np.argsort(-sizes, kind="stable")  # longest first, ties by index; from here on k indexes this order
    sizes = sizes[order]
    costs = linear * sizes + quadratic * sizes.astype(np.float64) ** 2
    first_fit = _first_fit(sizes, max_tokens)
    fewest = max(1, -(-len(first_fit) // num_ranks))
    grid = _balanced(first_fit, sizes, costs, num_ranks, fewest, max_tokens)
    top = _costliest(grid, costs)
    if top > (1 + EXTRA) * max(costs.sum() / num_ranks, costs.max(initial=0)):
        more = _balanced(first_fit, sizes, costs, num_ranks, fewest + 1, max_tokens)
        if _costliest(more, costs) < (1 - EXTRA) * top:
            grid = more
    for row in grid:
        row.sort(key=lambda micro: -_total(costs, micro))
    return [[sorted(order[micro].tolist()) for micro in row] for row in grid]


def split(episode_ids: Sequence[str], num_minibatches: int, rng: np.random.Generator) -> list[list[int]]:
    """Return the sub-trace indices of each optimizer minibatch: a random partition of whole episodes.

    `episode_ids[k]` is the episode of sub-trace k. The minibatches' numbers of episodes differ by at most one, and no
    minibatch is empty: if there are fewer episodes than `num_minibatches` (because episodes without a turn have no
    sub-traces), each episode is a minibatch. Indices are in ascending order within a minibatch.

    ValueError: `num_minibatches` is below 1.
    """
    if num_minibatches < 1:
        raise ValueError(f"num_minibatches={num_minibatches}: must be at least 1")
    episodes = list(dict.fromkeys(episode_ids))
    num_minibatches = min(num_minibatches, len(episodes))
    if not episodes:
        return []
    shuffled = rng.permutation(len(episodes))
    minibatch_of = {
        episodes[place]: number
        for number, places in enumerate(np.array_split(shuffled, num_minibatches))
        for place in places
    }
    minibatches: list[list[int]] = [[] for _ in range(num_minibatches)]
    for index, episode_id in enumerate(episode_ids):
        minibatches[minibatch_of[episode_id]].append(index)
    return minibatches


def _first_fit(sizes: Int64, max_tokens: int) -> list[list[int]]:
    """Pack by first-fit-decreasing: each item goes into the first bin with room.

    The number of bins is at most 11/9 of the optimum, plus one.
    """
    room = np.full(len(sizes), max_tokens, np.int64)
    bins: list[list[int]] = []
    for k, size in enumerate(sizes.tolist()):
        place = int(np.argmax(room[: len(bins) + 1] >= size))
        if place == len(bins):
            bins.append([])
        room[place] -= size
        bins[place].append(k)
    return bins


def _lightest_first(sizes: Int64, costs: Float64, num_bins: int, max_tokens: int) -> list[list[int]] | None:
    """Pack by longest-processing-time: each item goes into the cheapest bin with room. Return None if none has room."""
    room = np.full(num_bins, max_tokens, np.int64)
    load = np.zeros(num_bins)
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    for k, size in enumerate(sizes.tolist()):
        place = int(np.argmin(np.where(room >= size, load, np.inf)))
        if room[place] < size:
            return None
        room[place] -= size
        load[place] += costs[k]
        bins[place].append(k)
    return bins


def _balanced(
    first_fit: list[list[int]], sizes: Int64, costs: Float64, num_ranks: int, num_rounds: int, max_tokens: int
) -> Grid:
    """Return the grid with `num_rounds` micro-batches per rank; `num_rounds` must be large enough for `first_fit`."""
    bins = _lightest_first(sizes, costs, num_ranks * num_rounds, max_tokens)
    if bins is None:  # too tight for balance first
        bins = first_fit + [[] for _ in range(num_ranks * num_rounds - len(first_fit))]
    return _exchange(_deal(bins, costs, num_ranks), sizes, costs, max_tokens)


def _deal(bins: list[list[int]], costs: Float64, num_ranks: int) -> Grid:
    """Deal bins to ranks in rounds of num_ranks, costliest first; the rank with the smallest load gets the costliest.

    The loads of two ranks differ by at most the difference between the costliest and the cheapest bin of one round.
    """
    load = [_total(costs, bin_) for bin_ in bins]
    costliest = sorted(range(len(bins)), key=lambda b: (-load[b], b))
    ranks = [(0.0, rank) for rank in range(num_ranks)]
    grid: Grid = [[] for _ in range(num_ranks)]
    for first in range(0, len(bins), num_ranks):
        heapq.heapify(ranks)
        following = []
        for b in costliest[first : first + num_ranks]:
            total, rank = heapq.heappop(ranks)
            grid[rank].append(bins[b])
            following.append((total + load[b], rank))
        ranks = following
    return grid


def _exchange(grid: Grid, sizes: Int64, costs: Float64, max_tokens: int) -> Grid:
    """Return the grid after exchanges of sub-traces that reduce the load of the costliest rank.

    An exchange moves a sub-trace of the costliest rank to another rank, in return for a cheaper one or for nothing.
    Among the exchanges that fit, the one that minimizes the larger load of the two ranks is chosen. Exchanges after
    which the receiving micro-batch costs no more than the costliest of its round are preferred: they add no waiting
    time even if ranks synchronize after every micro-batch. The largest load never increases and the smallest never
    decreases. The search ends when the costliest rank is within TOLERANCE of the mean, when no exchange removes 1% of
    its excess over the mean, or after MAX_EXCHANGES.
    """
    num_ranks, num_rounds, num_bins = len(grid), len(grid[0]), len(grid) * len(grid[0])
    # Append an empty sub-trace for each micro-batch: it is exchanged when a micro-batch gives nothing in return.
    sizes, costs = np.append(sizes, np.zeros(num_bins, np.int64)), np.append(costs, np.zeros(num_bins))
    num_real = len(sizes) - num_bins
    place = np.concatenate([np.zeros(num_real, np.int64), np.arange(num_bins)])  # rank * num_rounds + round
    for number, bin_ in enumerate(micro for row in grid for micro in row):
        place[bin_] = number
    room = max_tokens - np.bincount(place, sizes, num_bins).astype(np.int64)
    for _ in range(MAX_EXCHANGES):
        work = np.bincount(place, costs, num_bins)
        loads = work.reshape(num_ranks, num_rounds).sum(axis=1)
        high, excess = int(loads.argmax()), float(loads.max() - loads.mean())
        if excess <= TOLERANCE * loads.mean():
            break
        own = np.flatnonzero(place[:num_real] // num_rounds == high)
        own = own[:: -(-len(own) // MAX_LOOKED_AT)]  # an evenly spaced sample by length if there are many
        moved = costs[own, None] - costs
        costlier = np.maximum(loads[high] - moved, loads[place // num_rounds] + moved)
        better = costlier < loads[high] - 0.01 * excess
        better &= sizes[own, None] <= room[place] + sizes  # the returned sub-trace is shorter, so it fits
        waits = np.tile(work.reshape(num_ranks, num_rounds).max(axis=0), num_ranks)
        quiet = better & (moved <= (waits - work)[place])
        if not better.any():
            break
        choice = np.where(quiet if quiet.any() else better, costlier, np.inf).argmin()
        one, other = own[choice // len(sizes)], choice % len(sizes)
        a, b = place[one], place[other]
        room[[a, b]] += (sizes[one] - sizes[other]) * np.array([1, -1])
        place[one] = b
        if other < num_real:
            place[other] = a
    exchanged: Grid = [[[] for _ in range(num_rounds)] for _ in range(num_ranks)]
    for k, number in enumerate(place[:num_real].tolist()):
        exchanged[number // num_rounds][number % num_rounds].append(k)
    return exchanged


def _total(costs: Float64, bin_: Sequence[int]) -> float:
    return float(costs[bin_].sum()) if bin_ else 0.0


def _costliest(grid: Grid, costs: Float64) -> float:
    return max(sum(_total(costs, micro) for micro in row) for row in grid)
