"""Settings of the data buffer."""

from __future__ import annotations

from dataclasses import dataclass

from machine.settings import derive, setting


@dataclass(frozen=True)
class BufferConfig:
    """How many episodes make a step and how far generation may run ahead of training.

    An episode holds a slot from its claim to the release of the step that trained it; training takes the
    episodes_per_prompt episodes of a group together, once all are finished, and only when fewer than `window`
    claims lie between the group of the oldest unfinished episode and their own. Hence (see docs/concepts.md)

        max_lag = (slots + window - 2 * episodes_per_prompt) // episodes_per_step

    weight versions at most lie between a token's sampling and its training. slots = window =
    episodes_per_step is synchronous training, with lag 1 at most by this bound and 0 in fact.
    """

    episodes_per_step: int = setting(128, "Episodes that one step trains on.", bounds="[1, inf)", unit="episodes")
    episodes_per_prompt: int = setting(
        1,
        "Size of a group: attempts at one prompt that are trained in the same step.",
        bounds="[1, inf)",
        unit="episodes",
    )
    slots: int = setting(
        0,
        "Episodes between their claim and the release of their step; 0: episodes_per_step, synchronous training.",
        bounds="[0, inf)",
        unit="episodes",
    )
    window: int = setting(
        0,
        "How many claims a group may lie ahead of the oldest unfinished episode and still be trained; 0: slots.",
        bounds="[0, inf)",
        unit="episodes",
    )
    claim_timeout_s: float = setting(
        3600.0, "A ticket that is not returned in this time is issued again.", bounds="(0, inf)", unit="s"
    )
    take_timeout_s: float = setting(
        3600.0,
        "How long training waits for its episodes, and for the next sign of an evaluation.",
        bounds="(0, inf)",
        unit="s",
    )

    def __post_init__(self) -> None:
        if self.episodes_per_step < 1:
            raise ValueError(f"buffer.episodes_per_step={self.episodes_per_step}: must be at least 1")
        if self.episodes_per_prompt < 1:
            raise ValueError(f"buffer.episodes_per_prompt={self.episodes_per_prompt}: must be at least 1")
        self._check_multiple("episodes_per_step")
        slots = self.slots or self.episodes_per_step
        derive(self, slots=slots, window=self.window or slots)
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
        """Return the largest number of weight versions between sampling and training of a token."""
        return (self.slots + self.window - 2 * self.episodes_per_prompt) // self.episodes_per_step
