"""Settings of the data buffer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class BufferConfig:
    """How many episodes make a step and how far generation may run ahead of training.

    A prompt holds a slot from its claim to the release of the step that trained it; training takes
    a finished episode only when fewer than `window` claims lie between the oldest unfinished one and
    its own. Hence (see docs/concepts.md)

        max_lag = (slots + window - 2) // episodes_per_step

    weight versions lie between a token's sampling and its training. slots = window =
    episodes_per_step is synchronous training, with lag 1 at most by this bound and 0 in fact.
    """

    episodes_per_step: int = 128
    slots: int = 0  # 0: episodes_per_step (synchronous)
    window: int = 0  # 0: slots
    claim_timeout_s: float = 3600.0  # a ticket that is not returned in this time is issued again
    take_timeout_s: float = 3600.0  # training waits at most this long for its episodes

    def __post_init__(self) -> None:
        if self.episodes_per_step < 1:
            raise ValueError(f"buffer.episodes_per_step={self.episodes_per_step}: must be at least 1")
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

    @property
    def max_lag(self) -> int:
        """Largest number of weight versions between sampling and training of a token."""
        return (self.slots + self.window - 2) // self.episodes_per_step
