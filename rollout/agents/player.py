"""Who plays an episode, and who speaks for the policy in it."""

from __future__ import annotations

from typing import Protocol

from buffer.types import Bool, Float32, Int32, TurnKind


class Sampled(Protocol):
    """What a sampler returns for one turn."""

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
    """Whoever speaks for the policy."""

    async def sample(self, prompt_ids: list[int], max_tokens: int, kind: TurnKind) -> Sampled: ...


class EpisodeAborted(RuntimeError):
    """The engine gave up a request: the episode can't go on and is not trained."""
