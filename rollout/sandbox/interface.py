"""What a tool may ask of the place it runs in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class RunResult:
    """Outcome of one command."""

    exit_code: int  # negative: killed by that signal
    stdout: str  # at most the sandbox's output limit, decoded with replacement
    stderr: str
    timed_out: bool = False


class Sandbox(Protocol):
    """A workspace of one episode, cut off from network, host files and other episodes."""

    async def write_files(self, files: dict[str, str]) -> None:
        """Puts text files into the workspace. ValueError: a path that leaves it."""

    async def read_file(self, path: str) -> str:
        """Text of a workspace file. FileNotFoundError: there is none; ValueError: path leaves the workspace."""

    async def run_python(self, source: str, stdin: str = "") -> RunResult:
        """Runs a Python program in the workspace, in a process of its own."""

    async def run(self, argv: list[str], stdin: str = "") -> RunResult:
        """Runs a command in the workspace."""


class SandboxPool(Protocol):
    """Lends sandboxes, one per episode."""

    async def acquire(self) -> Sandbox:
        """A sandbox with an empty workspace. RuntimeError names the cause when none can be started."""

    async def release(self, sandbox: Sandbox) -> None:
        """Takes a sandbox back: every process in it is dead and its workspace empty afterwards."""

    async def close(self) -> None:
        """Ends all sandboxes."""
