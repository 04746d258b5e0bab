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
EXTRA = 0.02  # one more micro-batch for every rank must make the costliest rank cheaper by this part
TOLERANCE = 0.005  # a costliest rank at most this far above the mean, as a part of it, is left alone
MAX_EXCHANGES = 512  # between ranks; a few hundred take about 0.5 s with 10,000 sub-traces
MAX_LOOKED_AT = 32  # sub-traces of the costliest rank, for each exchange


def pack(
    lengths: Sequence[int], num_ranks: int, max_tokens: int, linear: float = 1.0, quadratic: float = QUADRATIC
) -> Grid:
    """Return grid[rank][micro_batch] -> indices into `lengths`.

    Every index stands in it once; every rank has the same number m >= 1 of micro-batches; none has more than
    `max_tokens` tokens. m is the fewest for which first-fit-decreasing finds room, or one more where that makes the
    costliest rank more than EXTRA cheaper. Where there are too few sub-traces, micro-batches are empty: padding of
    zero loss. Five of 900 tokens, cap 1000, four ranks: two micro-batches a rank, three of the eight empty.

    The cost of a sub-trace is linear * length + quadratic * length^2. Micro-batches are filled
    longest-processing-time first. Ranks then get one micro-batch each of every num_ranks costliest, the lightest
    rank the costliest, so the loads of two ranks differ by no more than two micro-batches of the same round do.
    Then ranks exchange sub-traces until the costliest is at most TOLERANCE above the mean or nothing helps it.
    Within a rank micro-batches go from costly to cheap, so those with the same number on different ranks cost
    about the same. Deterministic; the order of `lengths` decides nothing but which of equal ones is meant.

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
    order = np.argsort(-sizes, kind="stable")  # longest first, ties by index; from here on k is a place in it
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
    """Return indices of the sub-traces of each optimizer minibatch: a random partition of whole episodes.

    `episode_ids[k]` is the episode of sub-trace k. Numbers of episodes differ by one at most, and none is 0: fewer
    episodes than `num_minibatches` (others of the step had no turn) make a minibatch each. Indices ascend within a
    minibatch. ValueError: fewer than 1 minibatch.
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
    """First-fit-decreasing: each into the first bin with room, at most 11/9 of the fewest bins possible, plus one."""
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
    """Longest-processing-time: each into the bin of least cost among those with room; None when there is none."""
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
    """The grid with `num_rounds` micro-batches a rank, at least as many as `first_fit` needs."""
    bins = _lightest_first(sizes, costs, num_ranks * num_rounds, max_tokens)
    if bins is None:  # too tight for balance first
        bins = first_fit + [[] for _ in range(num_ranks * num_rounds - len(first_fit))]
    return _exchange(_deal(bins, costs, num_ranks), sizes, costs, max_tokens)


def _deal(bins: list[list[int]], costs: Float64, num_ranks: int) -> Grid:
    """Round by round the num_ranks costliest bins that are left, the costliest of them to the lightest rank.

    Two ranks' loads then differ by at most the costliest less the cheapest bin of some round.
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
    """The grid after exchanges of sub-traces that make the costliest rank cheaper.

    An exchange gives a sub-trace of the costliest rank to another rank, for a cheaper one or for none: of those that
    fit, the one after which the costlier of the two ranks is cheapest. Preferred are those after which the
    receiving micro-batch costs no more than the costliest of its round: there nobody waits longer even where ranks
    meet after every micro-batch. The costliest load never rises and the cheapest never falls. It ends when the
    costliest rank is within TOLERANCE of the mean, no exchange takes away 1% of what it has above the mean, or
    after MAX_EXCHANGES.
    """
    num_ranks, num_rounds, num_bins = len(grid), len(grid[0]), len(grid) * len(grid[0])
    # Behind the sub-traces stands one of no tokens in each micro-batch: what it gives when it only receives.
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
        own = own[:: -(-len(own) // MAX_LOOKED_AT)]  # every so manieth by length, where there are many
        moved = costs[own, None] - costs
        costlier = np.maximum(loads[high] - moved, loads[place // num_rounds] + moved)
        better = costlier < loads[high] - 0.01 * excess
        better &= sizes[own, None] <= room[place] + sizes  # what comes back is shorter: it fits
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
