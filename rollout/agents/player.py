"""The seams of an episode: who plays it, and who generates the policy's turns in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from buffer.tasks import TaskRow
from buffer.types import Bool, Episode, Float32, Int32, TurnKind
from rollout.environment import Environment


class Sampled(Protocol):
    """What a sampler returns for one turn, N tokens."""

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
    """Generates the policy's turns: an engine, or a script."""

    async def sample(self, prompt_ids: list[int], max_tokens: int, kind: TurnKind) -> Sampled:
        """Return what follows the prompt, at most `max_tokens` tokens."""
        ...


@dataclass(frozen=True)
class Attempt:
    """One attempt at one row: what a player is given."""

    episode_id: str
    row: TaskRow
    row_index: int  # line of the task file, from 0
    environment: Environment
    sampler: Sampler

    @property
    def name(self) -> str:
        """Return what messages call the attempt."""
        return f"episode {self.episode_id}, row {self.row.id!r}"


class Player(Protocol):
    """Plays attempts, many at once; a task chooses it (`Task.player`)."""

    async def play(self, attempt: Attempt) -> Episode:
        """Return the finished or truncated episode.

        Exceptions of engine, sandbox or user code pass through: the caller records a failed episode.
        """
        ...


class EpisodeAborted(RuntimeError):
    """The engine gave up a request: the episode can't go on and is not trained."""
