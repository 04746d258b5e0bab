"""Sampled tokens per second, over the time in which episodes ran."""

from __future__ import annotations


class Throughput:
    """A counter of the tokens of finished episodes and of the seconds in which at least one episode ran.

    Episodes of a step may run before the step begins (during an evaluation) or while another step is trained.
    Therefore neither the step's duration nor its wait for episodes is the time in which its tokens were sampled.
    Times are seconds of any monotonic clock.
    """

    def __init__(self) -> None:
        self._num_tokens = 0
        self._spent_s = 0.0
        self._since_s: float | None = None  # None: no episode runs

    def runs(self, any_episode: bool, now_s: float) -> None:
        """Record whether at least one episode runs from now on."""
        if self._since_s is not None:
            self._spent_s += now_s - self._since_s
        self._since_s = now_s if any_episode else None

    def finished(self, num_tokens: int) -> None:
        """Count an episode's sampled tokens."""
        self._num_tokens += num_tokens

    def tokens_per_s(self, now_s: float) -> float | None:
        """Return tokens per second since the last `reset`, or None if no episode has run since."""
        spent_s = self._spent_s + (0.0 if self._since_s is None else now_s - self._since_s)
        return self._num_tokens / spent_s if spent_s > 0 else None

    def reset(self, now_s: float) -> None:
        """Restart the count; running episodes continue to be counted."""
        self._num_tokens, self._spent_s = 0, 0.0
        if self._since_s is not None:
            self._since_s = now_s
