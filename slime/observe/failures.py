"""Error messages of a run: one line on stderr, everything else in its logs/error.log."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from launch.deaths import Effect, ProcessDied, watched_actors
from launch.supervisor import Supervisor, exit_code_of
from machine.failures import reason
from machine.waits import keep_stacks_in, sight_of
from slime.observe.standing import Standing, State
from slime.recovery.recovery import RanksLost

LOG_FILE = "error.log"
STACKS_FOLDER = "stacks"
LOG_TAIL_LINES = 30  # of a process that has died
# Time from the first consequence of a death to its detection: SGLang continues for 6 s without its scheduler.
SETTLE_S, SETTLE_LOST_S = 2.0, 10.0
_LOST = re.compile(r"connection|\bpeer\b|no answer|\bdied\b", re.IGNORECASE)
_LATE = re.compile(r"no answer|timed out", re.IGNORECASE)


class Failures:
    """A context manager that reports the first error of a run. Later errors, e.g. of the shutdown, are only logged.

    `refused` errors are about the user's input: their message is complete, and the exit code is 2. The exit code is 1
    for other errors and for the death of a process, 75 (EX_TEMPFAIL) after a launcher's SIGTERM or SIGUSR1, and 128 + N
    for another signal N.
    """

    def __init__(self, folder: Path, refused: tuple[type[Exception], ...] = ()) -> None:
        """Report the errors of a run. `folder` is for its logs; it is created when something is written."""
        self.log = folder / LOG_FILE
        self.exit_code = 0
        self.supervisor = Supervisor(self._say)
        self.standing: Standing | None = None  # of the run, once its folder is known
        self._refused = refused
        self._kept: list[BaseException] = []  # in the log
        self._stacks = folder / STACKS_FOLDER

    def __enter__(self) -> Failures:
        self.supervisor.__enter__()
        keep_stacks_in(self._stacks)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Report an error and suppress it; `exit_code` remains."""
        try:
            if isinstance(error, self._refused) and not self.exit_code:
                self.exit_code = 2
                _print(f"error: {' '.join(str(error).split())}")
            elif isinstance(error, Exception | KeyboardInterrupt):
                self._tell(error)
        finally:
            keep_stacks_in(None)
            self.supervisor.__exit__(kind, error, trace)
        return isinstance(error, Exception | KeyboardInterrupt)

    @contextmanager
    def at_once(self, unless: Callable[[BaseException], bool] = lambda error: False) -> Iterator[None]:
        """Report an error of this block before anything is stopped, and raise it again.

        An error for which `unless` returns True is not reported.
        """
        try:
            yield
        except self._refused:
            raise
        except (Exception, KeyboardInterrupt) as error:
            if not unless(error):
                self._tell(error)
            raise

    @contextmanager
    def ranks_lost(self) -> Iterator[None]:
        """Raise RanksLost in place of an error of this block that follows from the death of a training process."""
        try:
            yield
        except RanksLost:
            raise
        except Exception as error:
            death = self._restartable(error)
            if death is None:
                raise
            raise RanksLost(death) from error

    def recovers(self, error: BaseException) -> bool:
        """Return whether an error follows from the death of a training process."""
        return isinstance(error, RanksLost) or self._restartable(error) is not None

    def _restartable(self, error: BaseException) -> ProcessDied | None:
        """Wait until the death that an error follows from is detected."""
        self.supervisor.cause(_settle_s(error))
        return next((death for death in self.supervisor.deaths if death.effect is Effect.RESTART), None)

    @contextmanager
    def aside(self, what: str) -> Iterator[None]:
        """Record an error of this block in the log and suppress it. Print a warning if it is the first error."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 (see the class)
            where = self._keep(error, what)
            if not self.exit_code:
                _print(f"warning: {what}: {reason(error)}; {where}")

    @contextmanager
    def graceful(self, grace_s: float) -> Iterator[None]:
        """Let the block end by itself after a launcher's signal (see `Supervisor.graceful`)."""

        def heed(number: signal.Signals) -> None:
            _print(
                f"{number.name}: the run saves its state and ends, within {grace_s:g} s; a second one ends it at once"
            )

        with self.supervisor.graceful(grace_s, heed):
            yield

    def note(self, state: State, why: str = "") -> None:
        """Write the state of the run (see `Standing.write`)."""
        if self.standing is not None:
            with self.aside("writing the run's state"):
                self.standing.write(state, why)

    def to_be_continued(self) -> None:
        """Report that the run has saved its state and ends, after a launcher's signal."""
        assert self.supervisor.asked is not None, "nobody has told the run to end"
        self._say(self.supervisor.asked)

    def _tell(self, error: BaseException) -> None:
        self.supervisor.end()
        if not self.exit_code:
            cause = self.supervisor.cause(_settle_s(error))
            seen = sight_of(watched_actors(), reason(error)) if cause is None and _is_unseen(error) else ""
            where = self._keep(error, "the run ended by")
            self._say(cause or error, "; ".join(filter(None, (seen.removeprefix("; "), where))))
        self._keep(error, "the run ended by")

    def _say(self, cause: BaseException | signal.Signals, where: str = "") -> None:
        """Print the one line, and set the exit code."""
        if isinstance(cause, signal.Signals):
            self.exit_code = exit_code_of(cause)
            _print(f"stopped by {cause.name} {self.standing or 'before its first step'}")
            self.note(State.stopped if self.exit_code > 128 else State.continued, cause.name)
            return
        # A launcher that ends a run may end its other processes, too: that is no failure of the run.
        self.exit_code = exit_code_of(self.supervisor.asked)
        if isinstance(cause, KeyboardInterrupt):
            self.exit_code = 128 + signal.SIGINT
        if isinstance(cause, ProcessDied):
            self._keep(cause, "a process died")
            where = ""  # the message names that process's log
        _print(f"error: {reason(cause)}{where and '; ' + where}")
        self.note(State.continued if self.supervisor.asked else State.failed, reason(cause))

    def _keep(self, error: BaseException, what: str) -> str:
        """Write an error to the log, once, and return where it is."""
        if any(error is one for one in self._kept):
            return ""
        self._kept.append(error)
        text = "".join(traceback.format_exception(error))
        if isinstance(error, ProcessDied) and error.log:
            lines = error.log.read_text(errors="replace").splitlines() if error.log.is_file() else []
            text += "\n".join([f"last lines of {error.log}:", *lines[-LOG_TAIL_LINES:], ""])
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a", errors="replace") as log:
                log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {what}: {reason(error)}\n{text}\n")
        except OSError as full:
            return f"its traceback could not be written to {self.log}: {full.strerror}"
        return f"traceback: {self.log}"


def _is_unseen(error: BaseException) -> bool:
    """Return whether a wait was too long and its error does not say what the processes do."""
    said = reason(error)
    return (isinstance(error, TimeoutError) or bool(_LATE.search(said))) and "; stacks: " not in said


def _settle_s(error: BaseException) -> float:
    return SETTLE_LOST_S if _LOST.search(reason(error)) else SETTLE_S


def _print(text: str) -> None:
    try:
        print(f"slime: {text}", file=sys.stderr, flush=True)
    except RuntimeError:  # a signal arrived during another print
        os.write(sys.stderr.fileno(), f"slime: {text}\n".encode())
