"""The interface of sandboxes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class RunResult:
    """The result of one command."""

    exit_code: int  # negative: killed by this signal
    stdout: str  # at most the sandbox's output limit, decoded with replacement
    stderr: str
    timed_out: bool = False


class Sandbox(Protocol):
    """The workspace of one episode, isolated from the network, the host's files and other episodes."""

    async def write_files(self, files: dict[str, str]) -> None:
        """Write text files into the workspace.

        ValueError: a path is invalid or leaves the workspace, or a content is not text.
        """

    async def read_file(self, path: str) -> str:
        """Return a workspace file as text.

        FileNotFoundError: the file does not exist. ValueError: the path is invalid or leaves the workspace.
        """

    async def run_python(self, source: str, stdin: str = "") -> RunResult:
        """Run a Python program in the workspace, in a process of its own."""

    async def run(self, argv: list[str], stdin: str = "") -> RunResult:
        """Run a command in the workspace."""


def require_text(**values: object) -> None:
    """Require each value to be text. ValueError: one is not; the message names it."""
    for name, value in values.items():
        if not isinstance(value, str):
            raise ValueError(f"{name} must be text, found {type(value).__name__}")


def require_files(files: object) -> None:
    """Require a dict {path: text}, else raise ValueError."""
    if not isinstance(files, dict):
        raise ValueError(f"files must be {{path: text}}, found {type(files).__name__}")
    for path, text in files.items():
        require_text(**{"the path of a file": path, f"the content of file {path!r}": text})


def require_argv(argv: object) -> None:
    """Require a non-empty list of texts, else raise ValueError."""
    if not isinstance(argv, list | tuple) or not argv:
        raise ValueError(f"argv={argv!r}: must be a list with a command and its arguments")
    require_text(**{f"argv[{number}]": argument for number, argument in enumerate(argv)})


class SandboxPool(Protocol):
    """Lends sandboxes, one per episode."""

    async def acquire(self) -> Sandbox:
        """Return a sandbox with an empty workspace. RuntimeError: none can be started; the message gives the reason."""

    async def release(self, sandbox: Sandbox) -> None:
        """Take a sandbox back. Afterwards every process in it is dead and its workspace is empty."""

    async def close(self) -> None:
        """End all sandboxes."""
