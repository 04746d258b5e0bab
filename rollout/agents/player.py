"""The protocols of an episode: Player plays it, Sampler generates the policy's turns in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from buffer.tasks import TaskRow
from buffer.types import Bool, Episode, Float32, Int32, TurnKind
from rollout.environment import Environment


class Sampled(Protocol):
    """A sampler's result for one turn of N tokens; the fields are those of `Turn`."""

    @property
    def output_ids(self) -> Int32: ...
    @property
    def logprobs(self) -> Float32: ...
    @property
    def versions(self) -> Int32: ...
    @property
    def stale_mask(self) -> Bool: ...
    @property
    def finish_reason(self) -> str: ...


class Sampler(Protocol):
    """Generates the policy's turns, with an engine or from a script."""

    async def sample(self, prompt_ids: list[int], max_tokens: int, kind: TurnKind) -> Sampled:
        """Return the turn that follows the prompt, at most `max_tokens` tokens."""
        ...


@dataclass(frozen=True)
class Attempt:
    """One attempt at one row: the input of a player."""

    episode_id: str
    row: TaskRow
    row_index: int  # line of the task file, from 0
    environment: Environment
    sampler: Sampler

    @property
    def name(self) -> str:
        """Return the attempt's name for messages."""
        return f"episode {self.episode_id}, row {self.row.id!r}"


class Player(Protocol):
    """Plays attempts, many of them concurrently. The task chooses it (`Task.player`)."""

    async def play(self, attempt: Attempt) -> Episode:
        """Return the finished or truncated episode.

        Exceptions from the engine, the sandbox or user code propagate: the caller records a failed episode.
        """
        ...


class EpisodeAborted(RuntimeError):
    """The engine aborted a request: the episode can't continue and is not trained."""
