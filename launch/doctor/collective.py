"""A real all-reduce between processes of this machine: gloo on CPUs, NCCL between the GPUs where a run uses some."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from launch.doctor.finding import Finding, ok, problem
from launch.doctor.rank import JOINED, SUMMED
from launch.nodes import LOOPBACK
from machine.ports import ReservedPort

TIMEOUT_S = 90.0  # torch alone takes ten seconds to import on a busy machine
POLL_S = 0.1
CURES = {
    "gloo": "set GLOO_SOCKET_IFNAME to an interface of this machine, or unset it; allow local connections",
    "nccl": "run again with NCCL_DEBUG=INFO; NCCL_P2P_DISABLE=1 or NCCL_IB_DISABLE=1 show whose fault it is",
}


@dataclass
class Started:
    """A rank's process and what it prints."""

    process: subprocess.Popen[bytes]
    output: IO[bytes]

    def lines(self) -> list[str]:
        """Return what it has printed until now."""
        return Path(self.output.name).read_text(errors="replace").strip().splitlines()


def all_reduce(num_gpus: int = 0, timeout_s: float = TIMEOUT_S) -> list[Finding]:
    """Check that processes can add up numbers within `timeout_s`: two over gloo, or one for each GPU over NCCL."""
    backend, size = ("nccl", num_gpus) if num_gpus else ("gloo", 2)
    with ReservedPort(LOOPBACK) as port:
        module = [sys.executable, "-m", "launch.doctor.rank"]
        common = [str(size), LOOPBACK, str(port.number), str(timeout_s), backend]
        return judge([[*module, str(rank), *common] for rank in range(size)], backend, timeout_s)


def judge(commands: Sequence[Sequence[str]], backend: str, timeout_s: float) -> list[Finding]:
    """Start the ranks and wait for them; the finding names the rank that did not come, or what it said."""
    home = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH", ""))))
    ranks: list[Started] = []
    began = time.monotonic()
    try:
        for command in commands:
            output = tempfile.NamedTemporaryFile(prefix="slime-rank-")  # noqa: SIM115 (closed below)
            environment = {**os.environ, "PYTHONPATH": path}
            ranks.append(
                Started(subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd="/"), output)
            )
        while time.monotonic() < began + timeout_s:
            codes = [one.process.poll() for one in ranks]
            if any(codes) or None not in codes:
                break
            time.sleep(POLL_S)
        return _judged(ranks, backend, time.monotonic() - began)
    finally:
        for one in ranks:
            one.process.kill()
            one.process.wait()
            one.output.close()


def _judged(ranks: Sequence[Started], backend: str, took_s: float) -> list[Finding]:
    name = f"{backend} between {len(ranks)} processes"
    said = [one.lines() for one in ranks]
    failed = [rank for rank, one in enumerate(ranks) if one.process.poll()]
    late = [rank for rank, lines in enumerate(said) if JOINED not in lines]
    rest = [rank for rank, lines in enumerate(said) if SUMMED not in lines]
    if not rest and not failed:
        return ok("all-reduce", f"{name} in {took_s:.1f} s, start included")
    if failed:
        rank = failed[0]
        text = f"rank {rank} failed: {said[rank][-1] if said[rank] else f'exit code {ranks[rank].process.returncode}'}"
    elif late:
        text = f"rank {late[0]} did not come in {took_s:.0f} s"
    else:
        text = f"ranks {', '.join(map(str, rest))} came and did not finish in {took_s:.0f} s"
    return problem("all-reduce", f"{name}: {text}: {CURES[backend]}")
