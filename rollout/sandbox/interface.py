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
        """Put text files into the workspace. ValueError: a path that leaves it or is none, or what is no text."""

    async def read_file(self, path: str) -> str:
        """Return a workspace file as text. FileNotFoundError: there is none; ValueError: path leaves the workspace."""

    async def run_python(self, source: str, stdin: str = "") -> RunResult:
        """Run a Python program in the workspace, in a process of its own."""

    async def run(self, argv: list[str], stdin: str = "") -> RunResult:
        """Run a command in the workspace."""


def require_text(**values: object) -> None:
    """Require text. ValueError names what is none."""
    for name, value in values.items():
        if not isinstance(value, str):
            raise ValueError(f"{name} must be text, found {type(value).__name__}")


def require_files(files: object) -> None:
    """Require {path: text}. ValueError: it is not."""
    if not isinstance(files, dict):
        raise ValueError(f"files must be {{path: text}}, found {type(files).__name__}")
    for path, text in files.items():
        require_text(**{"the path of a file": path, f"the content of file {path!r}": text})


def require_argv(argv: object) -> None:
    """Require a list of texts. ValueError: it is none, or empty."""
    if not isinstance(argv, list | tuple) or not argv:
        raise ValueError(f"argv={argv!r}: must be a list with a command and its arguments")
    require_text(**{f"argv[{number}]": argument for number, argument in enumerate(argv)})


class SandboxPool(Protocol):
    """Lends sandboxes, one per episode."""

    async def acquire(self) -> Sandbox:
        """Return a sandbox with an empty workspace. RuntimeError names the cause when none can be started."""

    async def release(self, sandbox: Sandbox) -> None:
        """Take a sandbox back: every process in it is dead and its workspace empty afterwards."""

    async def close(self) -> None:
        """End all sandboxes."""
