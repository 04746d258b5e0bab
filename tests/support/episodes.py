"""Random agent episodes with tool output, compactions, drift, and nested and parallel sub-agents."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

from buffer.store import Ticket
from buffer.types import Episode, Int32, Status, Turn, TurnKind


class _Simulator:
    """Agents as generators of turns; children run interleaved while their parent waits."""

    def __init__(self, rng: np.random.Generator, max_depth: int) -> None:
        self.rng = rng
        self.max_depth = max_depth
        self.parents = [-1]
        self.serial = 0  # every sampled token has a unique log-probability

    def ids(self, low: int, high: int) -> Int32:
        return self.rng.integers(0, 9, self.rng.integers(low, high + 1)).astype(np.int32)

    def turn(self, agent: int, prompt: Int32, kind: TurnKind, num_tokens: int) -> Turn:
        logprobs = -np.arange(self.serial + 1, self.serial + 1 + num_tokens, dtype=np.float32)
        self.serial += num_tokens
        return Turn(
            prompt_ids=prompt,
            output_ids=self.ids(num_tokens, num_tokens),
            logprobs=logprobs,
            versions=np.full(num_tokens, self.serial, np.int32),
            stale_mask=self.rng.random(num_tokens) < 0.5,
            finish_reason=str(self.rng.choice(["stop", "length"])),
            kind=kind,
            agent=agent,
        )

    def run(self, agent: int, depth: int) -> Iterator[Turn]:
        task = self.ids(1, 4)
        context = task
        for number in range(self.rng.integers(1, 5)):
            num_tokens = int(self.rng.choice([1, 2, 7])) if number == 0 else int(self.rng.choice([0, 1, 1, 2, 7]))
            turn = self.turn(agent, context, TurnKind.ACT, num_tokens)
            yield turn
            context = np.concatenate([context, turn.output_ids, self.ids(0, 5)])
            if depth < self.max_depth and self.rng.random() < 0.3:
                yield from self.children(agent, depth)
            if self.rng.random() < 0.3:
                summary = self.turn(agent, context, TurnKind.SUMMARY, int(self.rng.integers(1, 4)))
                yield summary
                context = np.concatenate([task, summary.output_ids, self.ids(0, 3)])
            elif self.rng.random() < 0.15:
                context = context.copy()
                context[0] += 10  # drift: the history was edited

    def children(self, agent: int, depth: int) -> Iterator[Turn]:
        running = []
        for _ in range(self.rng.integers(1, 4)):
            self.parents.append(agent)
            running.append(self.run(len(self.parents) - 1, depth + 1))
        while running:
            child = running[self.rng.integers(len(running))]
            turn = next(child, None)
            if turn is None:
                running.remove(child)
            else:
                yield turn


def random_episode(seed: int, max_depth: int = 2, episode_id: str = "") -> Episode:
    """Return one episode. It may end anywhere after its first turn; then it is truncated."""
    rng = np.random.default_rng(seed)
    simulator = _Simulator(rng, max_depth)
    turns = tuple(simulator.run(0, 0))
    status = Status.FINISHED
    if rng.random() < 0.3:
        status = Status.TRUNCATED
        turns = turns[: rng.integers(1, len(turns) + 1)]
    return Episode(
        episode_id=episode_id or f"e{seed}",
        row=seed,
        turns=turns,
        reward=float(rng.choice([0.0, 0.5, 1.0])),
        status=status,
        parents=tuple(simulator.parents),
    )


def sub_trace_of(ticket: Ticket, num_tokens: int = 10, num_actions: int = 5) -> Any:
    """Return what a buffer reads of a sub-trace of an episode that played a ticket."""
    return SimpleNamespace(
        episode_id=ticket.episode_id, tokens=range(num_tokens), num_actions=num_actions, oldest_version=0
    )
