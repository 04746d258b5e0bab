"""Valid answers of a user's task, and the errors for invalid ones: one sentence with episode, row and value."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from agents import TINY, Player, settings_of

from buffer.tasks import TaskRow
from buffer.types import Episode, Status
from rollout.agents.loop import ToolLoop
from rollout.agents.player import Attempt
from rollout.agents.script import ScriptedSampler
from rollout.environment import Demonstrator, Environment, Step

ROW = TaskRow("r7", "test", "")


class World(Environment):
    """Returns the given answers."""

    def __init__(self, prompt: Any = "u", step: Any = None, reward: Any = 0.5) -> None:
        self.answers = {"prompt": prompt, "step": Step("", done=True) if step is None else step, "reward": reward}

    async def start(self) -> Any:
        return self.answers["prompt"]

    async def step(self, action: str) -> Any:
        return self.answers["step"]

    async def reward(self) -> Any:
        return self.answers["reward"]


class Sync(World):
    """An environment whose method lacks `async`."""

    def reward(self) -> Any:
        return 1.0


def play(world: Environment, player: Any = None) -> Episode:
    attempt = Attempt("5.0", ROW, 3, world, player or Player("x", "y"))
    return asyncio.run(ToolLoop(TINY, settings_of(max_turns=2)).play(attempt))


@pytest.mark.parametrize(
    ("given", "reward"),
    [
        (1, 1.0),
        (True, 1.0),
        (np.bool_(True), 1.0),
        (np.float32(0.25), 0.25),
        (np.float16(0.25), 0.25),
        (np.int64(-3), -3.0),
        (Fraction(1, 4), 0.25),
    ],
    ids=repr,
)
def test_every_kind_of_number_is_a_reward(given: Any, reward: float) -> None:
    assert (play(World(reward=given)).reward, type(play(World(reward=given)).reward)) == (reward, float)
    (turn,) = play(World(step=Step("", done=True, reward=given))).turns
    assert (turn.reward, type(turn.reward)) == (reward, float)


NO_NUMBERS = [
    (None, "None"),
    ("1", "'1'"),
    (np.array([1.0]), "array\\(\\[1.\\]\\)"),
    (np.zeros((50, 50)), "array.*"),
    ([1.0], r"\[1.0\]"),
    (float("nan"), "nan"),
    (float("inf"), "inf"),
    (np.float32("nan"), ".*nan.*"),
    (10**400, "10+.*"),
    (1e39, "1e\\+39"),  # beyond float32
    (1j, "1j"),
]


@pytest.mark.parametrize(("given", "shown"), NO_NUMBERS, ids=[shown for _, shown in NO_NUMBERS])
def test_what_is_no_finite_number_is_no_reward(given: Any, shown: str) -> None:
    for world, where in (
        (World(reward=given), "reward"),
        (World(step=Step("", reward=given)), "turn 0: reward"),
        (World(step=Step("", done=True, reward=given)), "turn 0: reward"),
    ):
        with pytest.raises(
            ValueError, match=rf"^episode 5.0, row 'r7'[:,] {where} is {shown}: .*finite number$"
        ) as told:
            play(world)
        assert len(str(told.value)) < 200


@pytest.mark.parametrize(
    ("world", "message"),
    [
        (World(prompt=None), "the prompt is None: it must be text"),
        (World(prompt=b"u"), "the prompt is b'u': it must be text"),
        (World(step="ok"), "the step is 'ok': it must be a slime.Step"),
        (World(step=("ok", 0.0, False)), "the step is .*: it must be a slime.Step"),
        (World(step=Step), "the step is <class .*>: it must be a slime.Step"),
        (World(step=Step(None)), "observation is None: it must be text"),  # type: ignore[arg-type]
        (World(step=Step(["a"])), r"observation is \['a'\]: it must be text"),  # type: ignore[arg-type]
        (World(step=Step("", done=None)), "done is None: it must be True or False"),  # type: ignore[arg-type]
        (World(step=Step("", done="no")), "done is 'no': it must be True or False"),  # type: ignore[arg-type]
        (Sync(), "reward is 1.0: the method must be an `async def`"),
    ],
)
def test_answers_that_can_not_be_played(world: World, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^episode 5.0, row 'r7'.*: {message}$"):
        play(world)


def test_an_end_needs_no_observation() -> None:
    episode = play(World(step=Step(None, done=np.bool_(True))))  # type: ignore[arg-type]
    assert (episode.status, episode.turns[0].observation) == (Status.FINISHED, "")


class Script(Demonstrator):
    def __init__(self, action: Any = "x") -> None:
        self.said = action

    def action(self) -> Any:
        return self.said

    def summary(self) -> Any:
        return None


@pytest.mark.parametrize("said", [None, 7, b"x"])
def test_a_demonstrator_speaks_text(said: Any) -> None:
    with pytest.raises(ValueError, match=r"^row 'r7': Script.action\(\) is .*: it must be text$"):
        play(World(), ScriptedSampler(Script(said), TINY, "row 'r7'"))


def test_an_episode_without_a_turn_says_how_long_its_prompt_is() -> None:
    limits = settings_of().compaction
    fits: Callable[[int], Episode] = lambda size: play(World(prompt="u" * (limits.max_prompt_tokens - 2 + size)))  # noqa: E731
    assert [(len(e.turns), e.prompt_tokens) for e in map(fits, (0, 1))] == [
        (1, limits.max_prompt_tokens),
        (0, limits.max_prompt_tokens + 1),
    ]
