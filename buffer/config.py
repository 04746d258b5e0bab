"""Settings of the data buffer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class BufferConfig:
    """How many episodes make a step and how far generation may run ahead of training.

    An episode holds a slot from its claim to the release of the step that trained it; training takes the
    episodes_per_prompt episodes of a group together, once all are finished, and only when fewer than `window`
    claims lie between the group of the oldest unfinished episode and their own. Hence (see docs/concepts.md)

        max_lag = (slots + window - 2 * episodes_per_prompt) // episodes_per_step

    weight versions at most lie between a token's sampling and its training. slots = window =
    episodes_per_step is synchronous training, with lag 1 at most by this bound and 0 in fact.
    """

    episodes_per_step: int = 128
    episodes_per_prompt: int = 1  # a group: attempts at one prompt that are trained in the same step
    slots: int = 0  # 0: episodes_per_step (synchronous)
    window: int = 0  # 0: slots
    claim_timeout_s: float = 3600.0  # a ticket that is not returned in this time is issued again
    take_timeout_s: float = 3600.0  # training waits this long for its episodes, and for a next sign of an evaluation

    def __post_init__(self) -> None:
        if self.episodes_per_step < 1:
            raise ValueError(f"buffer.episodes_per_step={self.episodes_per_step}: must be at least 1")
        if self.episodes_per_prompt < 1:
            raise ValueError(f"buffer.episodes_per_prompt={self.episodes_per_prompt}: must be at least 1")
        self._check_multiple("episodes_per_step")
        self.slots = self.slots or self.episodes_per_step
        self.window = self.window or self.slots
        if self.slots < self.episodes_per_step:
            raise ValueError(
                f"buffer.slots={self.slots} is below buffer.episodes_per_step={self.episodes_per_step}: "
                f"a step could never fill; the smallest that works is {self.episodes_per_step}"
            )
        if not self.episodes_per_step <= self.window <= self.slots:
            raise ValueError(
                f"buffer.window={self.window} must lie between episodes_per_step={self.episodes_per_step} "
                f"and slots={self.slots}"
            )
        self._check_multiple("slots")
        self._check_multiple("window")

    def _check_multiple(self, name: str) -> None:
        number, group = getattr(self, name), self.episodes_per_prompt
        if number % group:
            nearest = max(1, (number + group // 2) // group) * group
            raise ValueError(
                f"buffer.{name}={number} is not a multiple of buffer.episodes_per_prompt={group}: "
                f"groups are trained whole; the nearest that works is {nearest}"
            )

    @property
    def max_lag(self) -> int:
        """Largest number of weight versions between sampling and training of a token."""
        return (self.slots + self.window - 2 * self.episodes_per_prompt) // self.episodes_per_step
