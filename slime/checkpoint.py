"""Checkpoints of a whole run: policy, critic, optimizers, step, prompts. Each one is complete or does not exist.

    runs/<name>/checkpoints/step_000010/
        policy/  critic/     Megatron distributed checkpoints (no critic/ in runs without one)
        state.json           the manifest: all other state (slime/start/manifest.py)

Training continues while the files are written: `save` returns as soon as every rank has copied its state. A checkpoint
is written under another name (`.part`) and renamed when all roles are done and all files are on the disk. An old one is
renamed (`.old`) before it is deleted. So a folder without a suffix is complete, even after a power failure.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayError

from slime.observe.tracking import WANDB_ID_FILE
from slime.start import manifest
from slime.start.manifest import Manifest

if TYPE_CHECKING:  # the command line reads checkpoints without importing what a run needs
    from slime.run import Run

GRACE_S = 60.0  # for a checkpoint that is being written when a run is stopped
_POLL_S = (0.05, 2.0)  # first and longest interval at which the ranks are polled


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read. The message names it, the reason, and the newest complete one."""


class DiskRefused(CheckpointError):
    """A checkpoint could not be written because the disk is full or read-only, or by lack of rights."""


def _folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:06d}"


def steps(run_dir: Path) -> list[int]:
    """Return steps of the complete checkpoints, oldest first."""
    found = (run_dir / "checkpoints").glob("step_*/state.json")
    return sorted(int(path.parent.name.removeprefix("step_")) for path in found if not path.parent.suffix)


class Checkpoints:
    """Writes the checkpoints of a run, one at a time, beside the training. Leaving the block waits for the last.

    A disk that refuses a checkpoint is told, and the next one is tried in its turn. Any other failure is raised by the
    next call of any method, `CheckpointError` with its reason. When the block is left by an error, what is being
    written gets `GRACE_S` to be finished.
    """

    def __init__(self, run_dir: Path, run: Run, keep: int, tell: Callable[[str], None]) -> None:
        """Remove what a killed run has left. `tell` gets the line about a refused checkpoint; "" when one is whole."""
        self._run_dir = run_dir
        self._run = run
        self._keep = keep
        self._tell = tell
        self._timeout_s = run.policy.timeout_s
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._stop = threading.Event()
        self._refused = 0  # checkpoints
        self._remove_torn()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._wait()
            else:
                self._tell = lambda text: None  # the first error is the one to be told
                with suppress(CheckpointError):
                    self._wait(GRACE_S)
        finally:
            self._stop.set()
            self._pool.shutdown(wait=False)

    def save(self, step: int) -> None:
        """Take the state after a finished step; return when training may go on. Waits for the save before it."""
        self.wait()
        with self._going_on():
            self._save(step)

    def finish(self, step: int) -> None:
        """Wait until the checkpoint of the last finished step is on the disk; save it unless it is.

        CheckpointError: it could not be written, also if the disk refused it.
        """
        self.wait()
        if step > next(reversed(steps(self._run_dir)), 0):
            self._save(step)
            self._wait()

    def _save(self, step: int) -> None:
        self._remove_torn()
        # A rank that still writes to a refused checkpoint must not find its folder again.
        part = _folder(self._run_dir, step).with_suffix(f".part{self._refused or ''}")
        try:
            part.mkdir(parents=True)
            taking = [role.save(part / role.name) for role in self._run.roles]
            for pending in taking:
                pending.result()
            buffer = self._run.buffer.state_dict()
        except (OSError, RayError) as error:
            raise self._failed(step, part, error) from error
        taken = Manifest(
            step,
            buffer,
            str(self._run.model_folder.resolve()),
            config=_text(self._run_dir / "config.yaml"),
            rows=self._run.rows,
            wandb_id=_text(self._run_dir / WANDB_ID_FILE).strip(),
            versions=manifest.installed_versions(),
        )
        self._writing = self._pool.submit(self._finish, step, part, taken)

    def check(self) -> None:
        """Raise the error of a checkpoint whose writing has ended, without waiting."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until what was saved is on the disk, as long as the files grow."""
        with self._going_on():
            self._wait()

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        """Tell that the disk refused a checkpoint, and let the run go on."""
        try:
            yield
        except DiskRefused as refused:
            self._tell(f"{refused}; the run goes on and tries again at its next checkpoint")

    def _remove_torn(self) -> None:
        """Remove all that is not a whole checkpoint, as far as the disk allows."""
        for torn in (self._run_dir / "checkpoints").glob("step_*.*"):
            shutil.rmtree(torn, ignore_errors=True)

    def _wait(self, limit_s: float | None = None) -> None:
        """Wait for what is being written. `limit_s`: from now. CheckpointError: see the class, and DiskRefused."""
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        try:
            writing.result(limit_s)
        except TimeoutError:
            raise CheckpointError("the checkpoint was not written in time") from None
        if self._refused:
            self._refused = 0
            self._tell("")

    def _finish(self, step: int, part: Path, taken: Manifest) -> None:
        """Complete the checkpoint, in the background."""
        try:
            for role in self._run.roles:
                of_ranks = self._written(role, part)
                role.finish_save(of_ranks).result(self._timeout_s)
            taken.write(part)
            _sync(part)
            _put_in_place(part, _folder(self._run_dir, step))
            for old in steps(self._run_dir)[: -self._keep]:
                _remove(_folder(self._run_dir, old))
        except (OSError, RayError) as error:
            raise self._failed(step, part, error) from error

    def _written(self, role: Any, part: Path) -> list[bytes]:
        """Return what every rank has written, in rank order.

        TimeoutError names the ranks that are still writing when the files have not grown for the ranks' deadline.
        """
        pause_s, longest_s = _POLL_S
        before, deadline = -1, 0.0
        while True:
            if (size := _size(part)) != before:
                before, deadline = size, time.monotonic() + self._timeout_s
            answers = role.saved().result()
            late = [rank for rank, answer in enumerate(answers) if answer is None]
            if not late:
                return list(answers)
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{role.name}: ranks {late} have not written to their files in {self._timeout_s:.0f} s"
                )
            if self._stop.wait(pause_s):
                raise TimeoutError(f"{role.name}: the run ended before ranks {late} had written their files")
            pause_s = min(longest_s, 1.5 * pause_s)

    def _failed(self, step: int, part: Path, error: Exception) -> CheckpointError:
        """Return what is raised for a checkpoint that could not be written; nothing is left of it."""
        good = steps(self._run_dir)
        last = f"the newest whole one is of step {good[-1]}" if good else "there is none before it"
        line = f"the checkpoint of step {step} could not be written: {_reason(error)}; {last}"
        cause = getattr(error, "cause", None) or error
        if not isinstance(cause, OSError) or isinstance(cause, TimeoutError | ConnectionError):
            return CheckpointError(line)
        self._refused += 1
        shutil.rmtree(part, ignore_errors=True)
        return DiskRefused(line)


def newest(run_dir: Path) -> Manifest | None:
    """Return the manifest of the newest checkpoint; None where there is none. ValueError: see `manifest.read`."""
    found = steps(run_dir)
    return manifest.read(_folder(run_dir, found[-1])) if found else None


def load(run_dir: Path, run: Run) -> Manifest | None:
    """Load the newest checkpoint into the training roles and return its manifest, None when there is none.

    The buffer's state is loaded later, when the engines have the checkpoint's weights: an episode that is claimed
    before would be sampled with others. CheckpointError: the checkpoint can't be read, or is not of this model.
    """
    found = steps(run_dir)
    if not found:
        return None
    folder = _folder(run_dir, found[-1])
    try:
        taken = manifest.read(folder)
        loading = [role.load(folder / role.name) for role in run.roles]
        for pending in loading:
            pending.result()
    except (ValueError, OSError, RayError) as error:
        earlier = f"step {found[-2]}" if len(found) > 1 else "the beginning"
        raise CheckpointError(
            f"{folder} can't be loaded: {_reason(error)}; move the folder away to go on from {earlier}"
        ) from error
    return taken


def export(run_dir: Path, step: int | None, out: Path) -> Path:
    """Write the policy of a checkpoint (None: the newest) as a Hugging Face folder. This needs no GPU and no engine.

    ValueError: no such checkpoint, or it can't be read; `out` is taken; the model that the run started from, whose
    config and tokenizer go into the folder, is gone. OSError: the folder can't be written.
    """
    found = steps(run_dir)
    if not found or (step is not None and step not in found):
        there = f"there are those of steps {', '.join(map(str, found))}" if found else "it has none"
        raise ValueError(f"no checkpoint{'' if step is None else f' of step {step}'}; {there}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is there already: name a new folder")
    folder = _folder(run_dir, found[-1] if step is None else step)
    source = Path(manifest.read(folder).model_folder)
    if not (source / "config.json").is_file():
        raise ValueError(f"{source} is gone: the run started from it, and its config and tokenizer are needed")

    from trainer.megatron.storage import stored

    stored.export(folder / "policy", source, out)
    return out


def _size(folder: Path) -> int:
    """Return the bytes of the files in a folder; files that disappear meanwhile count as 0."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def _text(path: Path) -> str:
    """Return the contents of a file, or "" if it does not exist."""
    return path.read_text() if path.is_file() else ""


def _put_in_place(part: Path, folder: Path) -> None:
    _remove(folder)
    part.rename(folder)
    _sync_one(folder.parent)


def _remove(folder: Path) -> None:
    """Delete a folder; an interruption never leaves half of it under its name."""
    if folder.exists():
        old = folder.with_suffix(".old")
        folder.rename(old)
        shutil.rmtree(old)


def _sync(folder: Path) -> None:
    """Flush a folder and everything in it to the disk."""
    for path in (*folder.rglob("*"), folder):
        _sync_one(path)


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: BaseException) -> str:
    """Return a rank's own error message, without Ray's traceback."""
    return str(getattr(error, "cause", None) or error)
