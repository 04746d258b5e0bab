"""The records of a run: metrics.jsonl, episodes.jsonl and Weights & Biases.

The two files are the record: `slime report` reads nothing else, and they are whole lines at any moment, so that a
run that was killed can be resumed and read. W&B gets the same numbers and sample episodes. It works offline below the
run's folder unless the user is logged in; `wandb sync` uploads an offline folder later.

Why wandb: people compare runs there. It is imported only when tracking.wandb is true.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import netrc
import numbers
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from buffer.text import clean_text
from launch.supervisor import not_by_children
from slime.schema import TrackingConfig

METRICS_FILE = "metrics.jsonl"
EPISODES_FILE = "episodes.jsonl"
WANDB_ID_FILE = "wandb_id"
SPLITS = ("train", "eval")

_DEFAULT_WANDB_URL = "https://api.wandb.ai"
_MAX_TABLE_TEXT = 20_000  # characters of one episode in a W&B table


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """Return the run's metrics in step order, one mapping per step, without an incomplete last line.

    Returns an empty list when there is no metrics.jsonl. ValueError names a line that is not an object with a step.
    """
    path = run_dir / METRICS_FILE
    if not path.is_file():
        return []
    rows: dict[int, dict[str, float]] = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            row = _parse(line, f"{path}:{number}")
            if row is not None:
                rows[int(row["step"])] = row
    return [rows[step] for step in sorted(rows)]


def readable_text(record: Mapping[str, Any]) -> str:
    """Return an episode as plain text: one paragraph per sub-trace, with the policy's tokens in ⟦ ⟧."""
    parts: list[str] = []
    for number, sub_trace in enumerate(record.get("sub_traces", ()), start=1):
        text: list[str] = []
        inside = False
        for token in sub_trace.get("tokens", ()):
            if bool(token.get("action")) != inside:
                inside = not inside
                text.append("⟦" if inside else "⟧")
            text.append(str(token.get("text", "")))
        parts.append(f"[{number} {sub_trace.get('kind', '')}] {''.join(text)}{'⟧' if inside else ''}")
    return clean_text("\n\n".join(parts))


class Tracker:
    """Writes metrics.jsonl and episodes.jsonl of one run, and mirrors them to W&B.

    `resume_step` is the step of the checkpoint that the run goes on from: what was written for later steps is removed
    first, since those steps happen again. None starts anew: files that are already there are kept as *.old.jsonl.
    Metrics without `time_s` get it: seconds since the run first started, earlier attempts included. An error of W&B's
    ends `aside` (see `slime.observe.failures`), and the run goes on without W&B.
    """

    def __init__(
        self,
        run_dir: Path,
        run: str,
        config: dict[str, Any],
        tracking: TrackingConfig,
        resume_step: int | None,
        aside: Callable[[str], AbstractContextManager[None]] = lambda what: nullcontext(),
    ) -> None:
        if resume_step is not None and resume_step < 0:
            raise ValueError(f"resume_step={resume_step}: must be at least 0, or None for a new run")
        run_dir.mkdir(parents=True, exist_ok=True)
        for name in (METRICS_FILE, EPISODES_FILE):
            _prepare(run_dir / name, resume_step)
        history = read_metrics(run_dir)
        self._last_step = int(history[-1]["step"]) if history else -1
        self._time_before_s = max((float(row.get("time_s", 0.0)) for row in history), default=0.0)
        self._started_s = time.monotonic()
        self._aside = aside
        self._run_dir = run_dir
        self._open()
        self._wandb = (
            _Wandb(run_dir, run, config, tracking.project, resume_step is not None) if tracking.wandb else None
        )

    def _open(self) -> None:
        self._metrics = (self._run_dir / METRICS_FILE).open("ab")
        self._episodes = (self._run_dir / EPISODES_FILE).open("ab")

    @property
    def elapsed_s(self) -> float:
        """Return seconds since the run first started; time between a stop and its resume does not count."""
        return self._time_before_s + time.monotonic() - self._started_s

    def rewind(self, step: int) -> list[dict[str, float]]:
        """Remove what was written for the steps after `step`, which happen again, and return the rows that are left."""
        for file in (self._metrics, self._episodes):
            file.close()
            _prepare(Path(file.name), step)
        self._open()
        self._last_step = min(self._last_step, step)
        return read_metrics(self._run_dir)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one step. ValueError: a metric that is not a finite number, or a step that is already there."""
        if step <= self._last_step:
            raise ValueError(f"step {step} is not above step {self._last_step}, the last one logged: log a step once")
        row: dict[str, float] = {"step": step, "time_s": round(self.elapsed_s, 3)}
        row.update({name: _number(name, step, value) for name, value in metrics.items() if name != "step"})
        _append(self._metrics, json.dumps(row, allow_nan=False))
        self._last_step = step
        self._mirror(lambda mirror: mirror.log(row))

    def episodes(self, step: int, split: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Append sample episodes of a step. ValueError: unknown split, or a number that is not finite."""
        if split not in SPLITS:
            raise ValueError(f"split={split!r}: must be one of {', '.join(SPLITS)}")
        rows = [{**record, "step": step, "split": split} for record in records]
        lines: list[str] = []
        for row in rows:
            try:
                lines.append(json.dumps(row, allow_nan=False))
            except ValueError as error:
                raise ValueError(f"episode {row.get('episode_id')!r} of step {step}: {error}") from error
        if not rows:
            return
        _append(self._episodes, "\n".join(lines))
        self._mirror(lambda mirror: mirror.episodes(step, split, rows))

    def close(self) -> None:
        """Close the files and finish the W&B run. Closing twice is allowed."""
        self._metrics.close()
        self._episodes.close()
        self._mirror(lambda mirror: mirror.close())
        self._wandb = None

    def _mirror(self, call: Callable[[_Wandb], None]) -> None:
        mirror, self._wandb = self._wandb, None
        if mirror is not None:
            with self._aside("W&B failed, the run goes on without it"):
                call(mirror)
                self._wandb = mirror


class _Wandb:
    """One W&B run, silent, below `run_dir`, offline unless the user is logged in.

    The x axis is our own metric `step`: W&B's built-in step may never go back, and a resumed run logs the steps after
    its checkpoint again.
    """

    def __init__(self, run_dir: Path, run: str, config: dict[str, Any], project: str, resumed: bool) -> None:
        online = _logged_in()
        # Staged tables, caches and logs stay with the run; settings have no field for these two.
        os.environ["WANDB_DATA_DIR"] = os.environ["WANDB_CACHE_DIR"] = str(run_dir.resolve() / "wandb")
        if not online:
            # wandb reports its own crashes to its makers unless this is set before it is imported.
            os.environ["WANDB_ERROR_REPORTING"] = "false"
        import wandb

        logging.getLogger("wandb").setLevel(logging.CRITICAL)
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            save_code=False,
            x_disable_stats=not online,
            x_disable_meta=not online,
            x_disable_machine_info=not online,
            x_save_requirements=online,
            x_transaction_log_flush_interval=5.0,
        )
        run_id = _run_id(run_dir, run, resumed)

        def start(online: bool) -> Any:
            with not_by_children():
                return wandb.init(
                    project=project,
                    name=run,
                    id=run_id,
                    dir=str(run_dir),
                    config=config,
                    mode="online" if online else "offline",
                    resume="allow" if online else None,
                    settings=settings,
                )

        self._wandb = wandb
        try:
            self._run = start(online)
        except wandb.errors.CommError as error:  # the training matters more than its picture
            warnings.warn(f"W&B does not answer ({error}): this run is tracked offline", stacklevel=2)
            self._run = start(online=False)
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, row: Mapping[str, float]) -> None:
        self._run.log(dict(row))

    def episodes(self, step: int, split: str, rows: list[dict[str, Any]]) -> None:
        table = self._wandb.Table(columns=["step", "episode", "reward", "status", "prompt", "text"])
        for row in rows:
            table.add_data(
                step,
                str(row.get("episode_id", "")),
                float(row.get("reward", 0.0)),
                str(row.get("status", "")),
                clean_text(str(row.get("prompt", "")))[:_MAX_TABLE_TEXT],
                readable_text(row)[:_MAX_TABLE_TEXT],
            )
        self._run.log({"step": step, f"episodes/{split}": table})

    def close(self) -> None:
        self._run.finish()


def _run_id(run_dir: Path, run: str, resumed: bool) -> str:
    """Return the W&B id of the run in `run_dir`. It is kept in a file there, and new if the run starts anew."""
    path = run_dir / WANDB_ID_FILE
    if resumed and path.is_file() and (known := path.read_text(encoding="utf-8").strip()):
        return known
    seed = f"{socket.gethostname()}:{run_dir.resolve()}:{time.time_ns()}"
    name = "".join(char if char.isalnum() or char in "-_" else "-" for char in run)[:40]
    run_id = f"{name}-{hashlib.sha256(seed.encode()).hexdigest()[:10]}"
    path.write_text(run_id + "\n", encoding="utf-8")
    return run_id


def _logged_in() -> bool:
    """Return whether W&B has credentials here (environment or netrc) and is not set to stay offline."""
    if os.environ.get("WANDB_MODE", "online") not in ("online", "run", "shared"):
        return False
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc").expanduser()
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or _DEFAULT_WANDB_URL).netloc
    try:
        entry = netrc.netrc(str(path)).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return False
    return entry is not None and bool(entry[2])


def _number(name: str, step: int, value: Any) -> float:
    """Return `value` as a JSON number: integers stay integers."""
    if isinstance(value, numbers.Integral):
        return int(value)
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metric {name!r} of step {step} is {value!r}: only numbers can be logged") from error
    if not math.isfinite(number):
        raise ValueError(f"metric {name!r} of step {step} is {number}: a metric must be finite, leave it out instead")
    return number


def _append(out: Any, lines: str) -> None:
    """Write complete lines and wait until they are on the disk."""
    try:
        out.write(lines.encode("ascii") + b"\n")
        out.flush()
        os.fsync(out.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, out.name) from error


def _parse(line: bytes, where: str) -> dict[str, Any] | None:
    """Return one line as an object with a step, or None for an incomplete line: one without its end."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}): remove the line") from error
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise ValueError(f"{where}: expected an object with an integer 'step': remove the line")
    return row


def _prepare(path: Path, resume_step: int | None) -> None:
    """Keep the lines up to `resume_step`; the file changes as a whole or not at all."""
    if not path.is_file():
        return
    if resume_step is None:
        path.replace(path.with_suffix(".old.jsonl"))
        return
    part = path.with_suffix(".part")
    with path.open("rb") as lines, part.open("wb") as out:
        for number, line in enumerate(lines, start=1):
            row = _parse(line, f"{path}:{number}")
            if row is not None and row["step"] <= resume_step:
                out.write(line)
        out.flush()
        os.fsync(out.fileno())
    part.replace(path)
