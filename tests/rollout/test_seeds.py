"""Seeds of turns, and that a worker sends them: an episode's draws depend on what it is, not on who plays it when."""

from __future__ import annotations

import asyncio
import functools
import itertools
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from buffer.types import TurnKind
from rollout.seeds import Domain, turn_seed
from rollout.worker import EngineSampler


def test_seeds_differ_in_each_number() -> None:
    """2 runs, both domains, 500 episodes and 20 turns: 40,000 seeds."""
    seeds = [turn_seed(*key) for key in itertools.product((0, 11), Domain, range(500), range(20))]
    assert len(set(seeds)) == len(seeds)


@given(st.integers(0, 2**32 - 1), st.sampled_from(Domain), st.integers(0), st.integers(0))
def test_a_seed_is_an_int64_and_does_not_change(run_seed: int, domain: Domain, number: int, turn: int) -> None:
    assert 0 <= turn_seed(run_seed, domain, number, turn) < 2**63
    assert turn_seed(run_seed, domain, number, turn) == turn_seed(run_seed, domain, number, turn)


def test_seeds_are_the_same_on_every_machine_and_in_every_version() -> None:
    """A change here changes what every run samples after its resume."""
    assert turn_seed(0, Domain.train, 0, 0) == 5072715384079281731
    assert turn_seed(11, Domain.eval, 3, 2) == 1666789006524549778


class Engine:
    """Notes the seeds that it is sent."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    async def generate(self, prompt_ids: Any, max_new_tokens: int, stop_ids: Any, *, seed: int) -> Any:
        self.seeds.append(seed)


def test_every_turn_of_an_episode_has_its_own_seed_and_another_attempt_has_the_same_ones() -> None:
    def attempt() -> list[int]:
        engine: Any = Engine()
        sampler = EngineSampler(engine, [3], functools.partial(turn_seed, 5, Domain.train, 17))

        async def play() -> None:
            for kind in (TurnKind.ACT, TurnKind.SUMMARY, TurnKind.ACT):
                await sampler.sample([1, 2], 8, kind)

        asyncio.run(play())
        return list(engine.seeds)

    assert attempt() == attempt() == [turn_seed(5, Domain.train, 17, turn) for turn in range(3)]
