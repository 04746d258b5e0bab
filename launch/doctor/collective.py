"""A real all-reduce between processes of this machine: gloo on CPUs, NCCL between the GPUs where a run uses some."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from launch.doctor.finding import Finding, named, ok, problem
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
class StartedRank:
    """A rank's process and the file with its output."""

    process: subprocess.Popen[bytes]
    output: IO[bytes]


@dataclass(frozen=True)
class EndedRank:
    """A rank after its end or its deadline."""

    code: int | None  # exit code; None: it was still running
    lines: tuple[str, ...]  # its output
    node: str = ""  # its address; "" for this machine


def running(node: str) -> EndedRank:
    """Return a rank that was left waiting for another one."""
    return EndedRank(None, (JOINED,), node)


def all_reduce(num_gpus: int = 0, timeout_s: float = TIMEOUT_S) -> list[Finding]:
    """Check that processes can add up numbers within `timeout_s`: two over gloo, or one for each GPU over NCCL."""
    size = num_gpus or 2
    with ReservedPort(LOOPBACK) as port:
        commands = commands_of_ranks(range(size), size, LOOPBACK, port.number, timeout_s, num_gpus > 0)
        return judge(commands, backend_of(num_gpus), timeout_s)


def backend_of(num_gpus: int) -> str:
    """Return the library by which a run sums gradients."""
    return "nccl" if num_gpus else "gloo"


def commands_of_ranks(
    ranks: Sequence[int], size: int, host: str, port: int, timeout_s: float, uses_gpus: bool
) -> list[list[str]]:
    """Return the commands of a machine's ranks; each has a GPU of its own, in their order."""
    common = [str(size), host, str(port), str(timeout_s), backend_of(int(uses_gpus))]
    module = [sys.executable, "-m", "launch.doctor.rank"]
    return [[*module, str(rank), *common, str(gpu)] for gpu, rank in enumerate(ranks)]


def judge(commands: Sequence[Sequence[str]], backend: str, timeout_s: float) -> list[Finding]:
    """Start the ranks and wait for them; the finding names the rank that did not come, or what it said."""
    began = time.monotonic()
    return judged(run_ranks(commands, timeout_s), backend, time.monotonic() - began)


def run_ranks(
    commands: Sequence[Sequence[str]], timeout_s: float, variables: Mapping[str, str] | None = None
) -> list[EndedRank]:
    """Start ranks on this machine and wait until all have ended, one has failed, or `timeout_s` is over."""
    home = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, **(variables or {}), "PYTHONPATH": path}
    ranks: list[StartedRank] = []
    deadline = time.monotonic() + timeout_s
    try:
        for command in commands:
            output = tempfile.NamedTemporaryFile(prefix="slime-rank-")  # noqa: SIM115 (closed below)
            process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd="/")
            ranks.append(StartedRank(process, output))
        while time.monotonic() < deadline:
            codes = [one.process.poll() for one in ranks]
            if any(codes) or None not in codes:
                break
            time.sleep(POLL_S)
        outputs = [Path(one.output.name).read_text(errors="replace").strip() for one in ranks]
        return [
            EndedRank(one.process.poll(), tuple(text.splitlines())) for one, text in zip(ranks, outputs, strict=True)
        ]
    finally:
        for one in ranks:
            one.process.kill()
            one.process.wait()
            one.output.close()


def judged(ranks: Sequence[EndedRank], backend: str, took_s: float) -> list[Finding]:
    """Return the finding of a trial, given its ranks in their order. Its node is that of the rank to blame."""
    nodes = dict.fromkeys(one.node for one in ranks)
    name = f"{backend} between {len(ranks)} processes{f' on {len(nodes)} nodes' if len(nodes) > 1 else ''}"
    failed = [rank for rank, one in enumerate(ranks) if one.code]
    late = [rank for rank, one in enumerate(ranks) if JOINED not in one.lines]
    rest = [rank for rank, one in enumerate(ranks) if SUMMED not in one.lines]
    if not rest and not failed:
        done = ok("all-reduce", f"{name} in {took_s:.1f} s, start included")
        return [replace(one, node=named(list(nodes))) for one in done]
    if failed:
        rest = [next((rank for rank in failed if rank in late), failed[0])]  # others fail because it does
        one = ranks[rest[0]]
        text = f"rank {rest[0]} failed: {one.lines[-1] if one.lines else f'exit code {one.code}'}"
    elif late:
        rest = late[:1]
        text = f"rank {rest[0]} did not come in {took_s:.0f} s"
    else:
        text = f"ranks {', '.join(map(str, rest))} came and did not finish in {took_s:.0f} s"
    blamed = named(list(dict.fromkeys(ranks[rank].node for rank in rest)))
    return [replace(one, node=blamed) for one in problem("all-reduce", f"{name}: {text}: {CURES[backend]}")]
