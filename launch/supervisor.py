"""Supervision of a run: interrupt it as soon as one of its processes dies or a signal arrives.

    with Supervisor(tell) as supervisor:      in the main thread of the driver
        watch("policy rank 0", actor)         where processes are made (launch/deaths.py)
        with supervisor.recoverable():        some deaths wait in `supervisor.deaths` for the loop instead

A thread monitors Ray's own processes, every watched actor and the processes that these actors own. A failure interrupts
the main thread like Ctrl-C, so it ends every wait: in Ray, in asyncio and in the operating system.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from launch import deaths
from launch.deaths import KNOCK_TIMEOUT_S, DeathWatch, Effect, ProcessDied, any_watched, forget_all
from machine.failures import end_descendants

if TYPE_CHECKING:
    from ray.actor import ActorHandle

INTERVAL_S = 0.5
REPEAT_S = 10.0  # an interrupt can be lost where Python ignores exceptions, e.g. in a finalizer
CLEANUP_S = 180.0  # deadline for an ending run to finish a checkpoint and stop its processes
TOGETHER_S = 1.0  # a terminal sends Ctrl-C to a shell and to its script: such signals count once
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
FROM_LAUNCHERS = (signal.SIGTERM, signal.SIGUSR1)  # time limit or preemption: the run is started again
TO_BE_CONTINUED = os.EX_TEMPFAIL  # 75: this exit code tells a launcher to start the same command again
WAKE = signal.SIGURG  # sent by the thread to the main thread; ignored by default, so it is harmless


def exit_code_of(cause: ProcessDied | signal.Signals | None) -> int:
    """Return the exit code of a run that ends because of a signal or a dead process."""
    if cause in FROM_LAUNCHERS:
        return TO_BE_CONTINUED
    return 128 + cause if isinstance(cause, signal.Signals) else 1


@contextlib.contextmanager
def not_by_children(number: signal.Signals = signal.SIGUSR1) -> Iterator[None]:
    """Block a signal for processes that are started within the block, and for their descendants.

    Launchers send SIGUSR1 to all processes of a job, and it would end each process that does not handle it. This
    process receives a signal that arrived meanwhile when the block ends, at the latest: another of its threads may
    take the signal.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals() -> None:
    """Ignore signals in a process that is about to exit.

    Python takes a second to exit, and a signal in that time would change the exit code.
    """
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


class Supervisor:
    """A context manager that supervises the run within its block. It has no effect outside the main thread.

    A signal interrupts the main thread, and the run's cleanup then has `CLEANUP_S`. In a `graceful` block a signal
    in `FROM_LAUNCHERS` is a request instead: the run saves its state and ends by itself. Another signal, at least
    `TOGETHER_S` later, ends the process and all its descendants at once.
    """

    def __init__(self, tell: Callable[[ProcessDied | signal.Signals], None]) -> None:
        """Prepare the supervisor. `tell` is called in the main thread before the interrupt."""
        self._tell = tell
        self._main = threading.get_ident()
        self._active = threading.current_thread() is threading.main_thread()
        self._handlers: dict[signal.Signals, Any] = {}
        self._over = threading.Event()
        self._ending = False
        self._signalled_s: float | None = None
        self._interrupted_s = 0.0
        self._heed: Callable[[signal.Signals], None] | None = None
        self._grace_s, self._asked_until_s = 0.0, math.inf
        self.asked: signal.Signals | None = None  # signal that requested the run to save its state and end
        self._cause: ProcessDied | signal.Signals | None = None
        self._timer = threading.Timer(CLEANUP_S, self._give_up)
        self._looking = threading.Lock()
        self._watch = DeathWatch()
        self._recoverable = False
        self.deaths: deque[ProcessDied] = deque()  # that the loop has not handled yet; see `recoverable`

    def __enter__(self) -> Supervisor:
        if self._active:
            self._handlers = {number: signal.getsignal(number) for number in (*SIGNALS, WAKE)}
            self._take_signals()
            # Two threads: if Ray's head does not answer, the other checks continue.
            for look in (self._look, self._watch.ask):
                threading.Thread(target=self._repeat, args=(look,), name="supervisor", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending = True
        self._timer.cancel()
        self.stop_looking()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        forget_all()

    def _take_signals(self) -> None:
        for number in SIGNALS:
            # An ignored SIGHUP means nohup: the run must outlive its terminal. A script's `command &` ignores SIGINT.
            if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._signalled)
        signal.signal(WAKE, self._woken)

    def cause(self, settle_s: float) -> ProcessDied | signal.Signals | None:
        """Return the signal or the dead process that ends the run. Wait for it up to `settle_s`.

        The wait is needed because an error that the cause leads to may be raised before the cause is detected.
        """
        deadline = time.monotonic() + settle_s
        while not self._found and any_watched() and self._active and time.monotonic() < deadline:
            time.sleep(0.05)
        return self._found

    @property
    def _found(self) -> ProcessDied | signal.Signals | None:
        return self._cause or next(iter(self.deaths), None)

    def stop_looking(self) -> None:
        """Stop the checks before Ray shuts down, when no call of Ray may be running."""
        self._over.set()
        if self._looking.acquire(timeout=KNOCK_TIMEOUT_S):
            self._looking.release()

    def end(self) -> None:
        """Allow no more interrupts because the run is ending. Exit after `CLEANUP_S` if the cleanup is not done."""
        if self._active and not self._ending:
            self._ending = True
            self._timer.daemon = True
            self._timer.start()

    @contextlib.contextmanager
    def graceful(self, grace_s: float, heed: Callable[[signal.Signals], None]) -> Iterator[None]:
        """Let the block end by itself within `grace_s` after a launcher's signal; interrupt it after that time.

        The block polls `asked`. `heed` is called once, when the signal arrives.
        """
        self._grace_s, self._heed = grace_s, heed
        try:
            yield
        finally:
            self._heed, self._asked_until_s = None, math.inf

    @contextlib.contextmanager
    def recoverable(self) -> Iterator[None]:
        """Put deaths whose effect is not `Effect.END` into `deaths` during the block, and interrupt nothing.

        The block takes each of them out when it handles it. One that is left is the cause of an error that ends the
        block.
        """
        self._recoverable = True
        try:
            yield
        finally:
            self._recoverable = False

    def forget(self, actors: Sequence[ActorHandle[Any]]) -> None:
        """Stop watching actors that are about to be stopped, and drop their deaths."""
        with self._looking:
            deaths.forget(actors)
            ids = set(map(deaths.actor_id, actors))
            for death in [one for one in self.deaths if one.actor_id in ids]:
                self.deaths.remove(death)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        now, found = time.monotonic(), signal.Signals(number)
        if self._signalled_s is not None and now > self._signalled_s + TOGETHER_S:
            end_descendants()
            os._exit(128 + found)
        self._signalled_s = now if self._signalled_s is None else self._signalled_s
        if self._heed is None or found not in FROM_LAUNCHERS:
            self._cause = self._cause or found
            self._interrupt()
        elif self.asked is None:
            self.asked, self._asked_until_s = found, now + self._grace_s
            self._heed(found)

    def _woken(self, number: int, frame: FrameType | None) -> None:
        self._interrupt()

    def _interrupt(self) -> None:
        if self._ending or self._cause is None:
            return
        first, self._interrupted_s = not self._interrupted_s, time.monotonic()
        if first:
            self._tell(self._cause)
        raise KeyboardInterrupt(str(self._cause))  # not caught by `except Exception`

    def _repeat(self, look: Callable[[], None]) -> None:
        while not self._over.wait(INTERVAL_S):
            look()

    def _look(self) -> None:
        with self._looking:
            if not self._over.is_set():
                self._cause = self._cause or self._death() or self._overdue()
        if self._cause is not None and not self._ending and time.monotonic() > self._interrupted_s + REPEAT_S:
            signal.pthread_kill(self._main, WAKE)

    def _death(self) -> ProcessDied | None:
        """Return a death that ends the run."""
        while (found := self._watch.look()) is not None:
            if not self._recoverable or found.effect is Effect.END:
                return found
            self.deaths.append(found)
        return None

    def _overdue(self) -> signal.Signals | None:
        """Return the signal that the run did not obey in time."""
        return self.asked if time.monotonic() > self._asked_until_s else None

    def _give_up(self) -> None:
        end_descendants()
        os._exit(exit_code_of(self.asked or self._cause))
