"""Which rank trains which sub-traces in which micro-batch, and which episodes share an optimizer step."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from buffer.types import Grid

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

# Work of a layer of hidden size h on a sequence of L tokens: 24 h^2 L in its matrices and 2 h L^2 in causal
# attention, so quadratic / linear = 1 / (12 h); this is h = 4096.
QUADRATIC = 2e-5


def pack(
    lengths: Sequence[int], num_ranks: int, max_tokens: int, linear: float = 1.0, quadratic: float = QUADRATIC
) -> Grid:
    """grid[rank][micro_batch] -> indices into `lengths`.

    Every index stands in it once; every rank has the same number m >= 1 of micro-batches, the fewest for which
    first-fit-decreasing finds room; none has more than `max_tokens` tokens. Where there are too few sub-traces,
    micro-batches are empty: padding of zero loss. Five of 900 tokens, cap 1000, four ranks: two micro-batches a
    rank, three of the eight empty.

    The cost of a sub-trace is linear * length + quadratic * length^2. Micro-batches are filled
    longest-processing-time first. Ranks then get one micro-batch each of every num_ranks costliest, the lightest
    rank the costliest, so the loads of two ranks never differ by more than two micro-batches of the same round
    do. Micro-batches with the same number on different ranks cost about the same. Deterministic.

    ValueError: a sub-trace that does not fit in a micro-batch.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks={num_ranks}: must be at least 1")
    sizes = np.asarray(lengths, np.int64)
    if len(sizes) and sizes.min() < 1:
        raise ValueError(f"sub-trace {int(sizes.argmin())} has {sizes.min()} tokens: must be at least 1")
    if len(sizes) and sizes.max() > max_tokens:
        raise ValueError(
            f"sub-trace {int(sizes.argmax())} has {sizes.max()} tokens, a micro-batch at most {max_tokens}: raise "
            f"layout.max_tokens_per_micro_batch to {sizes.max()}, or lower rollout.compaction.context_tokens"
        )
    costs = linear * sizes + quadratic * sizes.astype(np.float64) ** 2
    order = np.lexsort((np.arange(len(sizes)), -sizes))  # longest first, ties by index
    first_fit = _first_fit(sizes, order, max_tokens)
    num_bins = max(1, -(-len(first_fit) // num_ranks)) * num_ranks
    bins = _lightest_first(sizes, costs, order, num_bins, max_tokens)
    if bins is None:  # too tight for balance first: start from a packing that fits, then level it
        bins = first_fit + [[] for _ in range(num_bins - len(first_fit))]
        _level(bins, sizes, costs, max_tokens)
    return _deal(bins, costs, num_ranks)


def split(episode_ids: Sequence[str], num_minibatches: int, rng: np.random.Generator) -> list[list[int]]:
    """Indices of the sub-traces of each optimizer minibatch: a random partition of whole episodes.

    `episode_ids[k]` is the episode of sub-trace k. Numbers of episodes differ by one at most. Indices ascend
    within a minibatch. ValueError: fewer episodes than minibatches.
    """
    episodes = list(dict.fromkeys(episode_ids))
    if not 1 <= num_minibatches <= len(episodes):
        raise ValueError(
            f"num_minibatches={num_minibatches} for {len(episodes)} episodes: must lie between 1 and {len(episodes)}"
        )
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


def _first_fit(sizes: Int64, order: Int64, max_tokens: int) -> list[list[int]]:
    """First-fit-decreasing: each into the first bin with room, at most 11/9 of the fewest bins possible."""
    room = np.full(len(sizes), max_tokens, np.int64)
    bins: list[list[int]] = [[] for _ in sizes]
    for index in order.tolist():
        place = int(np.argmax(room >= sizes[index]))
        room[place] -= sizes[index]
        bins[place].append(index)
    return [bin_ for bin_ in bins if bin_]


def _lightest_first(
    sizes: Int64, costs: Float64, order: Int64, num_bins: int, max_tokens: int
) -> list[list[int]] | None:
    """Longest-processing-time: each into the bin of least cost among those with room; None when there is none."""
    room = np.full(num_bins, max_tokens, np.int64)
    load = np.zeros(num_bins)
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    for index in order.tolist():
        place = int(np.argmin(np.where(room >= sizes[index], load, np.inf)))
        if room[place] < sizes[index]:
            return None
        room[place] -= sizes[index]
        load[place] += costs[index]
        bins[place].append(index)
    return bins


def _level(bins: list[list[int]], sizes: Int64, costs: Float64, max_tokens: int) -> None:
    """Moves sub-traces from the costliest bin to the cheapest while that lowers the costliest; at most one each."""
    used = [int(sizes[bin_].sum()) if bin_ else 0 for bin_ in bins]
    load = [float(costs[bin_].sum()) if bin_ else 0.0 for bin_ in bins]
    for _ in range(len(sizes)):
        high, low = int(np.argmax(load)), int(np.argmin(load))
        fitting = [k for k in bins[high] if used[low] + sizes[k] <= max_tokens and load[low] + costs[k] < load[high]]
        if not fitting:
            return
        moved = min(fitting, key=lambda k: (max(load[high] - costs[k], load[low] + costs[k]), k))
        bins[high].remove(moved)
        bins[low].append(moved)
        used[high], used[low] = used[high] - int(sizes[moved]), used[low] + int(sizes[moved])
        load[high], load[low] = load[high] - float(costs[moved]), load[low] + float(costs[moved])


def _deal(bins: list[list[int]], costs: Float64, num_ranks: int) -> Grid:
    """Round by round the num_ranks costliest bins that are left, the costliest of them to the lightest rank."""
    load = [float(costs[bin_].sum()) if bin_ else 0.0 for bin_ in bins]
    costliest = sorted(range(len(bins)), key=lambda b: (-load[b], b))
    ranks = [(0.0, rank) for rank in range(num_ranks)]
    grid: Grid = [[] for _ in range(num_ranks)]
    for first in range(0, len(bins), num_ranks):
        heapq.heapify(ranks)
        following = []
        for b in costliest[first : first + num_ranks]:
            total, rank = heapq.heappop(ranks)
            grid[rank].append(sorted(bins[b]))
            following.append((total + load[b], rank))
        ranks = following
    return grid
