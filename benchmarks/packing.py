"""Time lost by the packing of long-tailed agent traces, compared with simpler packers. Needs no accelerator.

    .venv/bin/python benchmarks/packing.py [--seeds 3]        half a minute on one core

The time of a micro-batch is modeled, not measured: a sub-trace of n tokens costs n + QUADRATIC * n^2 (matrices and
causal attention, buffer/packing.py). With W[r, j] the cost of micro-batch j of rank r, R ranks, m micro-batches each:

    step loss        = 1 - mean_r sum_j W[r, j] / max_r sum_j W[r, j]    ranks meet once, to reduce the gradient
    micro-batch loss = 1 - sum_r,j W[r, j] / (R * sum_j max_r W[r, j])   ranks meet after every micro-batch

are fractions of the ranks' time spent waiting. Data-parallel ranks meet once a step; ranks over which experts are
spread meet in every micro-batch. No packer can lose less at the step barrier than

    unavoidable      = 1 - mean_r sum_j W[r, j] / B,   B = max over c = 0, 1, .. of the sum of the c + 1 cheapest
                                                       of the c * R + 1 costliest sub-traces, and of the mean itself

since some rank trains c + 1 of those; c = 0 is the costliest sub-trace alone. The bound ignores the cap.

These losses exclude the fixed overhead of a micro-batch, whether full, short or empty. So m is printed beside the
fewest that any packer could need, ceil(total tokens / (cap * R)), with the fraction of micro-batches that are empty.
Padding has no other cost: sub-traces are concatenated in a micro-batch at their own length. The model also ignores
communication and kernels that are more efficient at some lengths.

Exit code 1: in some scenario with at least 10 sub-traces a rank and less than 2% unavoidable loss, one seed of our
packer loses more than 2% at the step barrier. The standard scenario (512 episodes, 32 ranks, cap 65,536, all three
kinds of lengths) is one of them.
"""

from __future__ import annotations

import argparse
import heapq
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from buffer.packing import QUADRATIC, pack
from buffer.types import Grid

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
Packer = Callable[[Int64, int, int], Grid]

CONTEXT = 65_536  # tokens
RESERVE = 10_240  # an episode is compacted when less than this is left of the context
LIMIT = 0.02
ENOUGH = 10  # sub-traces a rank
RANKS = (1, 2, 4, 8, 32, 128)
EPISODES = (128, 512, 1024)
CAPS = (65_536, 131_072)
STANDARD = (512, 32, 65_536)  # episodes, ranks, cap


# Lengths of sub-traces in tokens, 200 to CONTEXT, in order of arrival.


def sub_traces_per_episode(rng: np.random.Generator, episodes: int) -> Int64:
    """Return numbers from 1 to 8, 2.5 on average."""
    return np.minimum(rng.geometric(0.4, episodes), 8)


def compacted(rng: np.random.Generator, episodes: int) -> Int64:
    """Sample agents that fill their context: all but an episode's last end between the threshold and the limit."""
    lengths = []
    for count in sub_traces_per_episode(rng, episodes):
        lengths += [rng.integers(CONTEXT - RESERVE, CONTEXT + 1, count - 1), rng.lognormal(9.2, 1.2, 1)]
    return np.clip(np.concatenate(lengths), 200, CONTEXT).astype(np.int64)


def lognormal(rng: np.random.Generator, episodes: int) -> Int64:
    """Sample agents with many short sub-agents: median 4,900 tokens, one in 50 at the limit."""
    lengths = rng.lognormal(8.5, 1.3, sub_traces_per_episode(rng, episodes).sum())
    return np.clip(lengths, 200, CONTEXT).astype(np.int64)


def pareto(rng: np.random.Generator, episodes: int) -> Int64:
    """Sample a heavy tail: half below 1,100 tokens, tail index 0.9, one in 80 at the limit."""
    lengths = 500 * (1 + rng.pareto(0.9, sub_traces_per_episode(rng, episodes).sum()))
    return np.clip(lengths, 200, CONTEXT).astype(np.int64)


KINDS = (compacted, lognormal, pareto)


# Packers for comparison.


def padded(rows: Grid) -> Grid:
    """Add empty micro-batches until every rank has as many as the longest row."""
    most = max(1, *(len(row) for row in rows))
    return [row + [[] for _ in range(most - len(row))] for row in rows]


def filled(order: Sequence[int], lengths: Int64, max_tokens: int, look_back: bool) -> list[list[int]]:
    """Put each sub-trace into the first micro-batch with room; without `look_back`, into the newest or a new one."""
    micros: list[list[int]] = []
    room: list[int] = []
    for k in order:
        tried = range(0 if look_back else max(0, len(room) - 1), len(room))
        place = next((b for b in tried if room[b] >= lengths[k]), len(room))
        if place == len(room):
            micros.append([])
            room.append(max_tokens)
        micros[place].append(k)
        room[place] -= int(lengths[k])
    return micros


def by_arrival(lengths: Int64, num_ranks: int, max_tokens: int) -> Grid:
    """Assign sub-trace k to rank k mod R and fill micro-batches one after the other."""
    return padded([filled(range(r, len(lengths), num_ranks), lengths, max_tokens, False) for r in range(num_ranks)])


def by_tokens(lengths: Int64, num_ranks: int, max_tokens: int) -> Grid:
    """Assign the longest first to the rank with the fewest tokens, first-fit within a rank; ignores attention."""
    ranks = [(0, rank) for rank in range(num_ranks)]
    rows: list[list[int]] = [[] for _ in ranks]
    for k in np.argsort(-lengths, kind="stable").tolist():
        tokens, rank = heapq.heappop(ranks)
        rows[rank].append(k)
        heapq.heappush(ranks, (tokens + int(lengths[k]), rank))
    return padded([filled(row, lengths, max_tokens, True) for row in rows])


def first_fit(lengths: Int64, num_ranks: int, max_tokens: int) -> Grid:
    """Pack all sub-traces by first-fit-decreasing and deal the micro-batches to ranks in turn."""
    micros = filled(np.argsort(-lengths, kind="stable").tolist(), lengths, max_tokens, True)
    return padded([micros[rank::num_ranks] for rank in range(num_ranks)])


def differencing(lengths: Int64, num_ranks: int, max_tokens: int) -> Grid:
    """Apply largest differencing of costs over ranks, then over a rank's micro-batches, as many as the cap requires.

    These are the two stages of verl 0.9.1, whose package can't be imported without torch, Ray and tensordict.
    """
    costs = cost(lengths).tolist()
    rows = [np.array(row, np.int64) for row in _differences(costs, num_ranks)]
    count = max(1, *(-(-int(lengths[row].sum()) // max_tokens) for row in rows))
    while True:
        grid = [[row[part].tolist() for part in _differences([costs[k] for k in row], count)] for row in rows]
        if all(lengths[micro].sum() <= max_tokens for row in grid for micro in row if micro):
            return [sorted(row, key=lambda micro: -sum(costs[k] for k in micro)) for row in grid]
        count += 1


def _differences(costs: Sequence[float], num_parts: int) -> list[list[int]]:
    """Merge the two partial partitions of largest spread, costliest with cheapest (Karmarkar and Karp, 1982)."""
    empty: list[tuple[float, list[int]]] = [(0.0, []) for _ in range(num_parts - 1)]
    heap = [(-c if num_parts > 1 else 0.0, k, [*empty, (c, [k])]) for k, c in enumerate(costs)]
    heapq.heapify(heap)
    while len(heap) > 1:
        (_, k, one), (_, _, other) = heapq.heappop(heap), heapq.heappop(heap)
        merged = sorted((a + b, own + his) for (a, own), (b, his) in zip(one, reversed(other), strict=True))
        heapq.heappush(heap, (merged[0][0] - merged[-1][0], k, merged))
    return [part for _, part in heap[0][2]] if heap else [[] for _ in range(num_parts)]


def ours(lengths: Int64, num_ranks: int, max_tokens: int) -> Grid:
    """Pack with buffer/packing.py."""
    return pack(lengths.tolist(), num_ranks, max_tokens)


PACKERS: dict[str, Packer] = {
    "ours": ours,
    "round-robin by arrival": by_arrival,
    "balanced by tokens only": by_tokens,
    "first-fit, dealt in turn": first_fit,
    "largest differencing": differencing,
}


@dataclass(frozen=True)
class Lost:
    """Fractions of time, 0 to 1, and numbers of micro-batches per rank."""

    step: float
    micro_batch: float
    unavoidable: float
    count: int
    fewest: int
    empty: float  # fraction of all micro-batches
    seconds: float = 0.0


def cost(lengths: Int64, quadratic: float = QUADRATIC) -> Float64:
    """Return n + quadratic * n^2 of each sub-trace, in units of one token's matrix work."""
    return lengths + quadratic * lengths.astype(np.float64) ** 2


def lost(grid: Grid, lengths: Int64, max_tokens: int, quadratic: float = QUADRATIC, seconds: float = 0.0) -> Lost:
    """Return the losses defined at the top of this file. AssertionError: a grid trains one twice or breaks the cap."""
    micros = [micro for row in grid for micro in row]
    assert sorted(k for micro in micros for k in micro) == list(range(len(lengths)))
    assert max(int(lengths[micro].sum()) for micro in micros if micro) <= max_tokens
    costs = cost(lengths, quadratic)
    work = np.array([[costs[micro].sum() if micro else 0.0 for micro in row] for row in grid])
    num_ranks, mean = len(grid), work.sum() / len(grid)
    costliest = np.sort(costs)[::-1]
    crowds = [costliest[c * num_ranks - c : c * num_ranks + 1].sum() for c in range(-(-len(costs) // num_ranks))]
    return Lost(
        step=1 - mean / work.sum(axis=1).max(),
        micro_batch=1 - mean / work.max(axis=0).sum(),
        unavoidable=1 - mean / max(mean, *crowds),
        count=len(grid[0]),
        fewest=-(-int(lengths.sum()) // (max_tokens * num_ranks)),
        empty=sum(not micro for micro in micros) / len(micros),
        seconds=seconds,
    )


def measured(packer: Packer, lengths: Int64, num_ranks: int, max_tokens: int) -> Lost:
    """Return the result of one packing, with the CPU seconds that it took."""
    began = time.process_time()
    grid = packer(lengths, num_ranks, max_tokens)
    return lost(grid, lengths, max_tokens, seconds=time.process_time() - began)


def batches(kind: Callable[[np.random.Generator, int], Int64], episodes: int, seeds: int) -> Iterator[Int64]:
    return (kind(np.random.default_rng(seed), episodes) for seed in range(seeds))


def print_packers(seeds: int) -> None:
    """Print all packers in the standard scenario, with the numbers of the worst seed."""
    episodes, num_ranks, cap = STANDARD
    print(f"{episodes} episodes, {num_ranks} ranks, cap {cap:,} tokens; % of time lost, worst of {seeds} seeds")
    print(f"{'':26}" + "".join(f"{kind.__name__:^36}" for kind in KINDS))
    print(f"{'':26}" + f"{'step':>7}{'micro':>7}{'m':>5} of {'':5}{'empty':>6}    " * len(KINDS) + " s")
    for name, packer in PACKERS.items():
        line, seconds = f"{name:26}", 0.0
        for kind in KINDS:
            runs = [measured(packer, lengths, num_ranks, cap) for lengths in batches(kind, episodes, seeds)]
            step, micro = max(run.step for run in runs), max(run.micro_batch for run in runs)
            most = max(runs, key=lambda run: run.count - run.fewest)
            empty = max(run.empty for run in runs)
            line += f"{100 * step:7.2f}{100 * micro:7.1f}{most.count:5d} of {most.fewest:<5d}{100 * empty:5.0f}%    "
            seconds = max(seconds, *(run.seconds for run in runs))
        print(f"{line}{seconds:6.2f}")
    print()


def print_scenarios(seeds: int) -> list[str]:
    """Print our packer's step loss, micro-batch loss and unavoidable loss everywhere; return the cells over LIMIT."""
    print(
        f"ours: step / micro-batch loss [unavoidable step loss], %, worst of {seeds} seeds; "
        f"* fewer than {ENOUGH} sub-traces a rank"
    )
    print(f"{'lengths':10}{'episodes':>9}{'cap':>6}" + "".join(f"{f'{ranks} ranks':>20}" for ranks in RANKS))
    over = []
    for kind, episodes, cap in ((kind, episodes, cap) for kind in KINDS for episodes in EPISODES for cap in CAPS):
        line = f"{kind.__name__:10}{episodes:9}{cap // 1024:5}k"
        for num_ranks in RANKS:
            traces = list(batches(kind, episodes, seeds))
            runs = [measured(ours, lengths, num_ranks, cap) for lengths in traces]
            worst = max(runs, key=lambda run: run.step)
            micro = max(run.micro_batch for run in runs)
            few = min(map(len, traces)) < ENOUGH * num_ranks
            bound = f" [{100 * worst.unavoidable:.1f}]" if worst.unavoidable >= 0.0005 else ""
            cell = f"{100 * worst.step:.2f}/{100 * micro:.1f}{bound}"
            line += f"{cell + '*' * few:>20}"
            if not few and any(run.step > LIMIT > run.unavoidable for run in runs):
                over.append(f"{kind.__name__}, {episodes} episodes, cap {cap}, {num_ranks} ranks: {cell}")
        print(line)
    print()
    return over


def print_constants(seeds: int) -> None:
    """Print the step loss if the true cost of attention differs from the packer's constant."""
    episodes, num_ranks, cap = STANDARD
    print(f"ours, packed with QUADRATIC = {QUADRATIC}: step loss, %, if the true constant is")
    truths = (0.0, QUADRATIC / 2, QUADRATIC, 2 * QUADRATIC, 5 * QUADRATIC)
    print(f"{'':10}" + "".join(f"{truth:>10}" for truth in truths))
    for kind in KINDS:
        grids = [(lengths, ours(lengths, num_ranks, cap)) for lengths in batches(kind, episodes, seeds)]
        losses = [max(lost(grid, lengths, cap, truth).step for lengths, grid in grids) for truth in truths]
        print(f"{kind.__name__:10}" + "".join(f"{100 * loss:10.2f}" for loss in losses))
    print()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    print_packers(seeds)
    over = print_scenarios(seeds)
    print_constants(seeds)
    large = compacted(np.random.default_rng(0), 4400)[:10_000]
    print(f"{len(large):,} sub-traces for 32 ranks: {measured(ours, large, 32, 65_536).seconds:.2f} s of one core")
    print(
        "\n".join(
            [f"Above {100 * LIMIT:.0f}%:", *over] if over else [f"Nowhere above {100 * LIMIT:.0f}% where avoidable."]
        )
    )
    return 1 if over else 0


if __name__ == "__main__":
    raise SystemExit(main())
