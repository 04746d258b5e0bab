"""The process of a batch job: Ray over the job's nodes, the run, its signals, and whether the job starts again.

    budget      a job that starts again and again without a new checkpoint ends
    nodes       several: `ray start` on each (node.py), the first is the head
    run         `slime train`, which joins that Ray
    end         0: done.  75, a signal, a lost node: the job is put back into the queue.  Else: it has failed

SIGUSR1 (before the time limit) and SIGTERM (preemption, by herald.py) go on to the run, and to no other process of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from launch.environment import ray_environment
from launch.slurm.client import SlurmError, addresses, call, cancelled_file, describe, state_of
from launch.slurm.node import log_of, own_address, token_of
from launch.supervisor import TO_BE_CONTINUED, not_by_children
from machine.failures import end_descendants, ending
from machine.ports import ReservedPort

STARTED = b"Ray runtime started"  # in the log of a node
START_S = 300.0  # for Ray on a node: a cluster's shared disk may be slow
PROBE_S = 60.0  # for a node to run a program that does nothing
REQUEUE_S = 120.0  # for Slurm to end a job that is back in its queue


@dataclass(frozen=True)
class Start:
    """One start of a job, as Slurm tells it by environment variables."""

    job_id: str
    number: int  # 0, then 1 ... for a job that has been put back
    node: str  # this one, of which the batch script runs
    nodes: tuple[str, ...]

    @staticmethod
    def here() -> Start:
        """Read the environment of a job. SlurmError: there is none, or see `call`."""
        known = os.environ
        if "SLURM_JOB_NODELIST" not in known or "SLURMD_NODENAME" not in known:
            raise SlurmError("this is no batch job of Slurm's: submit it with `slime submit slurm`")
        nodes = call("scontrol", "show", "hostnames", known["SLURM_JOB_NODELIST"]).split()
        number = int(known.get("SLURM_RESTART_COUNT", "0"))
        return Start(known["SLURM_JOB_ID"], number, known["SLURMD_NODENAME"], tuple(nodes))


def without_progress(record: Path, start: Start, newest: int) -> int:
    """Return how often the job has started since the last start that found a new checkpoint; `newest`: its step, 0 for
    none.

    Written down in `record` for the next start. OSError: it can't be written to.
    """
    try:
        before = json.loads(record.read_text())
    except (OSError, ValueError):
        before = {}
    goes_on = before.get("job") == start.job_id and before.get("checkpoint") == newest
    since = int(before["since"]) if goes_on else start.number
    part = record.with_suffix(".part")
    part.write_text(json.dumps({"job": start.job_id, "checkpoint": newest, "since": since}) + "\n")
    part.replace(record)
    return start.number - since


def nodes_answer(count: int, limit_s: float = PROBE_S) -> bool:
    """Return whether all nodes of this job, which are `count`, run a program that does nothing within the limit."""
    probe = ["srun", "--overlap", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", "true"]
    try:
        return subprocess.run(probe, timeout=limit_s, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


class Job:
    """A job on its first node. `run` is called once."""

    def __init__(self, folder: Path, start: Start, num_gpus: int, say: Callable[[str], None]) -> None:
        """`folder`: of its logs, on a disk that all nodes mount. `say` prints a line."""
        self._folder, self._start, self._num_gpus, self._say = folder, start, num_gpus, say
        self._signal: signal.Signals | None = None
        self._run: subprocess.Popen[bytes] | None = None
        self._port: ReservedPort | None = None

    def run(self, command: Sequence[str]) -> int:
        """Run `slime train`'s command and return the job's exit code; see above."""
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._signalled)
        code = 1
        herald = [*self._step([self._start.node]), sys.executable, "-m", "launch.slurm.herald", str(os.getpid())]
        try:
            try:
                subprocess.Popen(herald, stdin=subprocess.DEVNULL)
                address = self._start_ray() if len(self._start.nodes) > 1 else ""
                code = self._train([*command, f"cluster.ray_address={address}"])
            except SlurmError as error:
                self._say(f"error: {error}")
            again = self._why_again(code)
        finally:
            end_descendants()
            self._end_steps()
            token_of(self._folder, self._start.job_id).unlink(missing_ok=True)
        if again and cancelled_file(self._folder, self._start.job_id).exists():
            self._say("the job is cancelled and does not start again")
            return 0
        return self._requeue(again) if again else code

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if self._signal is None and self._run is not None:
            self._run.send_signal(number)
        self._signal = self._signal or signal.Signals(number)

    def _train(self, command: Sequence[str]) -> int:
        """Wait for the run's end and return its exit code."""
        if self._signal is not None:
            return TO_BE_CONTINUED
        self._run = subprocess.Popen(command)
        if self._signal is not None:  # it came just now
            self._run.send_signal(self._signal)
        return self._run.wait()

    def _why_again(self, code: int) -> str:
        """In words; "" for a run that has finished, or failed or was refused on nodes that all answer."""
        if code == 0:
            return ""
        if self._signal is not None:
            return f"the run was told to end by {self._signal.name}"
        if code == TO_BE_CONTINUED:
            return "the run is to be continued"
        if code < 0:
            return f"the run {ending(code)}"
        if len(self._start.nodes) > 1 and not nodes_answer(len(self._start.nodes)):
            return "a node does not answer"
        return ""

    def _requeue(self, why: str) -> int:
        """Put the job back into the queue. Slurm then ends this process; if it does not, the job has failed."""
        job_id = self._start.job_id
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which Slurm sends, and its log would look like a failure
        try:
            if (state := state_of(describe(job_id))) != "RUNNING":
                self._say(f"{why}; the job is {state or 'unknown'} and does not start again")
                return TO_BE_CONTINUED
            self._say(f"{why}: the job goes back into the queue")
            call("scontrol", "requeue", job_id)
        except SlurmError as error:
            self._say(f"error: {why}, and the job can't go back into the queue: {error}; submit it again")
            return TO_BE_CONTINUED
        time.sleep(REQUEUE_S)
        return TO_BE_CONTINUED

    def _start_ray(self) -> str:
        """Start Ray on every node and return the address of its head. SlurmError: a node did not start it."""
        start = self._start
        others = [node for node in start.nodes if node != start.node]
        known = addresses(start.nodes)
        host = own_address(known[start.node], known[others[0]])
        self._port = ReservedPort(host)  # held until the job's end: other jobs may share the node
        head = f"{host}:{self._port.number}"
        token = token_of(self._folder, start.job_id)
        token.unlink(missing_ok=True)  # of a start that was killed
        with os.fdopen(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        os.environ.update(ray_environment(token))
        node = [sys.executable, "-m", "launch.slurm.node", str(self._folder), start.node, head, str(self._num_gpus)]
        logs = {name: log_of(self._folder, name, start.job_id) for name in start.nodes}
        seen = {name: log.stat().st_size if log.exists() else 0 for name, log in logs.items()}

        def begin(command: Sequence[str], names: Sequence[str]) -> None:
            with not_by_children():
                started = subprocess.Popen(command, stdin=subprocess.DEVNULL)
            self._wait_for_ray(started, {name: (logs[name], seen[name]) for name in names})

        begin(node, [start.node])
        begin([*self._step(others), *node], others)
        return head

    def _step(self, nodes: Sequence[str]) -> list[str]:
        """The `srun` of one task a node, which has all of it: one bound by a plug-in would have a single core."""
        count = len(nodes)
        where = [f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", f"--nodelist={','.join(nodes)}"]
        return ["srun", "--overlap", "--cpu-bind=none", *where]

    def _end_steps(self) -> None:
        """At once: they do not heed SIGTERM, and Slurm would wait for them."""
        with contextlib.suppress(SlurmError):  # it ends them itself, later
            for step in call("squeue", "--steps", "--noheader", "--format=%i", f"--jobs={self._start.job_id}").split():
                if step.rpartition(".")[2].isdigit():
                    call("scancel", "--signal=KILL", step)

    def _wait_for_ray(self, started: subprocess.Popen[bytes], logs: dict[str, tuple[Path, int]]) -> None:
        """Until each node's log says it, after what was there before."""
        deadline = time.monotonic() + START_S
        while missing := [
            name for name, (log, seen) in logs.items() if not log.exists() or STARTED not in log.read_bytes()[seen:]
        ]:
            if self._signal is not None:
                return
            where = f"Ray on {', '.join(missing)}"
            if started.poll() is not None:
                raise SlurmError(f"{where} {ending(started.returncode)}; log: {logs[missing[0]][0]}")
            if time.monotonic() > deadline:
                raise SlurmError(f"{where} has not started in {START_S:g} s; log: {logs[missing[0]][0]}")
            time.sleep(0.2)


def run_job(folder: Path, num_gpus: int, newest: int, max_starts: int, command: Sequence[str]) -> int:
    """Run a job's process and return its exit code, with one line on stderr where it does not begin.

    `newest`: step of the newest checkpoint, 0 for none. `max_starts`: starts without a new one, after which it ends.
    """

    def say(text: str) -> None:
        print(f"slime: {text}", file=sys.stderr, flush=True)

    try:
        start = Start.here()
        idle = without_progress(folder / "progress.json", start, newest)
        say(f"job {start.job_id}, start {start.number + 1}, on {', '.join(start.nodes)}; newest checkpoint: {newest}")
        if idle >= max_starts:
            say(
                f"error: job {start.job_id} has started {idle} times without a checkpoint after step {newest}, "
                f"--max-starts is {max_starts}: its logs in {folder} say why; it does not start again"
            )
            return 1
        return Job(folder, start, num_gpus, say).run(command)
    except (SlurmError, OSError) as error:
        say(f"error: {error}")
        return 1
