"""The state machine that issues prompts and selects finished episodes for training, without a clock and without Ray.

    claim -> [in flight] -> add -> [finished] -> take -> [taken] -> release
                 |  fail, expire, lost
                 +-> [waiting] -> claim (same ticket, next attempt)

Let G = episodes_per_prompt, E = episodes_per_step. Ticket k belongs to group k // G, and the tickets of a group have
the same row. A group is trained whole, in one step, so E, `slots` and `window` are multiples of G.

A ticket holds one of `slots` from its first claim to the release of the step that trained it. Training takes groups
whose episodes are all finished, in the order of their numbers, and only groups whose number is less than window / G
above the group of the oldest unfinished ticket. Then at most

    max_lag = (slots + window - 2 G) // E

weight versions lie between the claim of a ticket and the step that trains it. Proof for a ticket of group g: count
the other groups that are trained after the claim and before the step that trains g.

- Older groups: all their tickets were issued earlier and were open at the claim. The ticket itself holds a slot, too,
  so at most slots - 1 others are open, which is at most (slots - 1) // G = slots / G - 1 groups.
- Younger groups: they are taken before g only while g has an unfinished ticket. The oldest unfinished ticket then
  belongs to g or to an older group, so the younger groups lie within the window: at most the window / G - 1 groups
  that follow g.

Every step in between consumes E / G of these groups: (slots / G - 1 + window / G - 1) // (E / G). With G = 1 this is
(slots + window - 2) // E. The bound is attained whenever slots > E. With slots = E the lag is 0, since no other groups
can fill a step. Training never deadlocks: when all slots hold finished episodes, all groups that are not taken are
whole and inside the window, and slots >= E.

The window is defined by ticket numbers, not by positions in a queue. With "the oldest `window` open tickets", any
number of younger tickets could overtake a straggler, since each trained ticket would make room for the next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from buffer.config import BufferConfig
from buffer.types import Batch, EpisodeStats, SubTraceInfo


@dataclass(frozen=True)
class Ticket:
    """The right to run one episode."""

    number: int  # in the order of first claims, from 0
    row: int  # line of the task file, from 0
    attempt: int  # number of times that the ticket was issued before

    @property
    def episode_id(self) -> str:
        """Return the id of the episode that this attempt runs."""
        return f"{self.number}.{self.attempt}"


class Counts(NamedTuple):
    """The numbers of tickets and episodes in the store, for status displays."""

    finished: int  # episodes that wait for training
    takeable: int  # of these, in whole groups inside the window
    wanted: int  # episodes of a step
    in_flight: int  # tickets that a worker holds
    waiting: int  # tickets to be issued again
    tokens: int  # of the finished episodes
    tokens_per_s: float | None = None  # sampled, while episodes ran; None: not measured


@dataclass
class _Open:
    """A ticket between its first claim and its release."""

    ticket: Ticket
    worker: str | None = None  # None: waits to be issued
    claimed_s: float = 0.0
    failures: int = 0
    infos: tuple[SubTraceInfo, ...] | None = None  # not None: finished
    stats: EpisodeStats | None = None  # of a finished one
    step: int | None = None  # not None: taken by this step

    @property
    def measured(self) -> EpisodeStats:
        assert self.stats is not None, f"ticket {self.ticket.number} is not finished"
        return self.stats


class Store:
    """Tickets and finished episodes of one run. Times are seconds of any monotonic clock."""

    def __init__(self, config: BufferConfig, num_rows: int, seed: int, max_failures: int = 3) -> None:
        """Create an empty store. `max_failures`: number of failures of one ticket above which the run fails."""
        if num_rows < 1:
            raise ValueError(f"num_rows={num_rows}: the task file must have at least one row")
        if seed < 0:
            raise ValueError(f"seed={seed}: must be at least 0")
        self._config = config
        self._num_rows = num_rows
        self._seed = seed
        self._max_failures = max_failures
        self._next_number = 0
        self._step = 0
        self._open: dict[int, _Open] = {}  # ticket number -> its state, in the order of numbers
        self._rows_of_epoch: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def row(self, number: int) -> int:
        """Return the row of a ticket. Every epoch of `num_rows` groups is a shuffle determined by seed and epoch."""
        epoch, place = divmod(number // self._config.episodes_per_prompt, self._num_rows)
        if self._rows_of_epoch[0] != epoch:
            self._rows_of_epoch = (epoch, np.random.default_rng([self._seed, epoch]).permutation(self._num_rows))
        return int(self._rows_of_epoch[1][place])

    def claim(self, now_s: float, worker: str) -> Ticket | None:
        """Return the oldest ticket that waits to be reissued, or else a new ticket. Return None if no slot is free."""
        state = next((state for state in self._open.values() if state.worker is None and state.infos is None), None)
        if state is None:
            if len(self._open) >= self._config.slots:
                return None
            number = self._next_number
            self._next_number += 1
            state = self._open[number] = _Open(Ticket(number, self.row(number), attempt=0))
        state.worker = worker
        state.claimed_s = now_s
        return state.ticket

    def add(self, ticket: Ticket, infos: Sequence[SubTraceInfo], stats: EpisodeStats) -> bool:
        """Store a finished episode with its measured numbers. `infos` is empty if nothing was sampled.

        Return False and store nothing if the ticket was issued again meanwhile or is already finished.
        ValueError: a sub-trace belongs to another episode than the ticket's.
        """
        state = self._in_flight(ticket)
        if state is None:
            return False
        others = sorted({info.episode_id for info in infos} - {ticket.episode_id})
        if others:
            raise ValueError(
                f"ticket {ticket.number} got sub-traces of {', '.join(others)}: "
                f"all must be of episode {ticket.episode_id}"
            )
        state.infos = tuple(infos)
        state.stats = stats
        return True

    def fail(self, ticket: Ticket, reason: str, trace: str = "") -> bool:
        """Reissue the ticket of an episode that an infrastructure failure ended.

        Return False if the ticket was issued again meanwhile or is already finished.
        RuntimeError: the ticket failed more than `max_failures` times; `trace`, the last traceback, is its note.
        """
        state = self._in_flight(ticket)
        if state is None:
            return False
        worker = state.worker
        state.failures += 1
        self._reissue(state)
        if state.failures > self._max_failures:
            error = RuntimeError(
                f"ticket {ticket.number} (row {ticket.row}) failed {state.failures} times, "
                f"more than the allowed {self._max_failures}; the last time at {worker}: {reason}"
            )
            if trace:
                error.add_note(trace)
            raise error
        return True

    def hand_back(self, ticket: Ticket) -> bool:
        """Reissue the ticket of an episode that could not go on, e.g. without its engine. This is no failure of it.

        Return False if the ticket was issued again meanwhile or is already finished.
        """
        state = self._in_flight(ticket)
        if state is not None:
            self._reissue(state)
        return state is not None

    def expire(self, now_s: float) -> list[Ticket]:
        """Reissue the tickets that were claimed at least `claim_timeout_s` ago and not returned. Return them."""
        oldest_s = now_s - self._config.claim_timeout_s
        return self._take_back(lambda state: state.claimed_s <= oldest_s)

    def lost(self, worker: str) -> list[Ticket]:
        """Reissue the tickets that a dead worker holds. Return them."""
        return self._take_back(lambda state: state.worker == worker)

    def take(self) -> Batch | None:
        """Return the next step's groups in the order of their numbers.

        Return None while too few groups inside the window are finished.
        """
        chosen = self._takeable()[: self._config.episodes_per_step]
        if len(chosen) < self._config.episodes_per_step:
            return None
        for state in chosen:
            state.step = self._step
        batch = Batch(
            step=self._step,
            items=tuple(info for state in chosen for info in state.infos or ()),
            episodes=tuple(state.measured for state in chosen),
            episode_ids=tuple(state.ticket.episode_id for state in chosen),
            groups=tuple(state.ticket.number // self._config.episodes_per_prompt for state in chosen),
        )
        self._step += 1
        return batch

    def release(self, step: int) -> int:
        """Free the slots of a trained batch and delete its episodes. Return the number of episodes.

        ValueError: no batch of this step is taken and unreleased.
        """
        done = [number for number, state in self._open.items() if state.step == step]
        if not done:
            out = sorted({state.step for state in self._open.values() if state.step is not None})
            raise ValueError(f"can't release step {step}: it is not taken; the taken and unreleased steps are {out}")
        for number in done:
            del self._open[number]
        return len(done)

    def counts(self) -> Counts:
        finished = [state for state in self._open.values() if state.infos is not None and state.step is None]
        running = [state for state in self._open.values() if state.infos is None]
        return Counts(
            finished=len(finished),
            takeable=len(self._takeable()),
            wanted=self._config.episodes_per_step,
            in_flight=sum(state.worker is not None for state in running),
            waiting=sum(state.worker is None for state in running),
            tokens=sum(info.num_tokens for state in finished for info in state.infos or ()),
        )

    @property
    def any_in_flight(self) -> bool:
        """Return whether a worker holds a ticket."""
        return any(state.worker is not None and state.infos is None for state in self._open.values())

    def holders(self) -> dict[str, list[int]]:
        """Return the numbers of the tickets that each worker holds, oldest first, by worker."""
        held: dict[str, list[int]] = {}
        for number, state in self._open.items():
            if state.infos is None and state.worker is not None:
                held.setdefault(state.worker, []).append(number)
        return held

    def state_dict(self) -> dict[str, Any]:
        """Return plain data from which a new store continues: no ticket is lost and none is trained twice.

        Taken episodes count as trained, so call this after the update of the last batch that was taken and before
        the next `take`. Open tickets, including finished ones, are issued again after a resume. A partially claimed
        group continues with its next ticket, so groups stay whole.
        """
        return {
            "seed": self._seed,
            "num_rows": self._num_rows,
            "episodes_per_prompt": self._config.episodes_per_prompt,
            "step": self._step,
            "next_number": self._next_number,
            "open": [
                (number, state.ticket.attempt, state.failures)
                for number, state in self._open.items()
                if state.step is None
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned.

        ValueError: the seed, the number of rows or the group size differs, so the order of rows would differ, too.
        """
        mine = {
            "seed": self._seed,
            "num_rows": self._num_rows,
            "episodes_per_prompt": self._config.episodes_per_prompt,
        }
        state = {"episodes_per_prompt": 1} | state  # states of older versions do not contain it
        for name, number in mine.items():
            if state[name] != number:
                raise ValueError(
                    f"the checkpoint's {name} is {state[name]}, this run's is {number}: set it back, or start a new run"
                )
        self._step = state["step"]
        self._next_number = state["next_number"]
        self._open = {
            number: _Open(Ticket(number, self.row(number), attempt + 1), failures=failures)
            for number, attempt, failures in sorted(state["open"])
        }

    def _in_flight(self, ticket: Ticket) -> _Open | None:
        """Return the state of a ticket whose given attempt is in flight, else None."""
        state = self._open.get(ticket.number)
        if state is None or state.ticket != ticket or state.worker is None or state.infos is not None:
            return None
        return state

    def _take_back(self, is_meant: Callable[[_Open], bool]) -> list[Ticket]:
        running = [state for state in self._open.values() if state.worker is not None and state.infos is None]
        meant = [state for state in running if is_meant(state)]
        tickets = [state.ticket for state in meant]
        for state in meant:
            self._reissue(state)
        return tickets

    def _reissue(self, state: _Open) -> None:
        state.ticket = Ticket(state.ticket.number, state.ticket.row, state.ticket.attempt + 1)
        state.worker = None

    def _takeable(self) -> list[_Open]:
        """Return finished episodes that no step has taken, from whole groups inside the window, in ticket order."""
        size = self._config.episodes_per_prompt
        oldest = next((number for number, state in self._open.items() if state.infos is None), self._next_number)
        end = oldest // size * size + self._config.window
        inside = [
            state
            for number, state in self._open.items()
            if number < end and state.infos is not None and state.step is None
        ]
        finished = Counter(state.ticket.number // size for state in inside)
        return [state for state in inside if finished[state.ticket.number // size] == size]
