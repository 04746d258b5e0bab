"""Settings of the data buffer."""

from __future__ import annotations

from dataclasses import dataclass

from machine.settings import derive, setting


@dataclass(frozen=True)
class BufferConfig:
    """Number of episodes in a step, and limits on how far generation may run ahead of training.

    An episode holds a slot from its claim to the release of the step that trained it. Training takes the
    episodes_per_prompt episodes of a group together, once all are finished, and only if the group is fewer than
    `window` claims ahead of the group of the oldest unfinished episode. Therefore (see docs/concepts.md) at most

        max_lag = (slots + window - 2 * episodes_per_prompt) // episodes_per_step

    weight versions lie between the sampling and the training of a token. With slots = window = episodes_per_step,
    training is synchronous: the bound is at most 1 and the actual lag is 0.
    """

    episodes_per_step: int = setting(
        128, "Number of episodes that one step trains on.", bounds="[1, inf)", unit="episodes"
    )
    episodes_per_prompt: int = setting(
        1,
        "Group size: number of attempts at one prompt, all trained in the same step.",
        bounds="[1, inf)",
        unit="episodes",
    )
    slots: int = setting(
        0,
        "Episodes that may be claimed and not yet released by their step; 0: episodes_per_step, synchronous training.",
        bounds="[0, inf)",
        unit="episodes",
    )
    window: int = setting(
        0,
        "Number of claims that a group may be ahead of the oldest unfinished episode and still be trained; 0: slots.",
        bounds="[0, inf)",
        unit="episodes",
    )
    claim_timeout_s: float = setting(
        3600.0, "Time after which a ticket that was not returned is issued again.", bounds="(0, inf)", unit="s"
    )
    take_timeout_s: float = setting(
        3600.0,
        "Deadline for the episodes of a training step, and for the next progress of an evaluation.",
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
                f"a step could never be filled; use at least {self.episodes_per_step}"
            )
        if not self.episodes_per_step <= self.window <= self.slots:
            raise ValueError(
                f"buffer.window={self.window} must be between episodes_per_step={self.episodes_per_step} "
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
        """Return the largest number of weight versions between the sampling and the training of a token."""
        return (self.slots + self.window - 2 * self.episodes_per_prompt) // self.episodes_per_step
