"""Files of a workspace. Call these functions only while no program runs, so that a checked path can't change."""

from __future__ import annotations

import os
import stat

BOX = "/box"
MAX_PARTS, MAX_PART_BYTES = 100, 255  # of a path in the workspace; 255 bytes is the limit of Linux
SCRATCH = {BOX: 0o755, "/tmp": 0o1777, "/dev/shm": 0o1777}  # the writable folders and their modes


class RequestError(Exception):
    """A request that can't be served; `kind` selects the exception that the host raises."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def inside(root: str, path: str) -> str:
    """Return the real path of a workspace file. `path` is relative to `root`, or starts with it.

    RequestError: the path is invalid or leaves `root`, possibly through a link.
    """
    try:
        parts = os.fsencode(path).split(b"/")
        if len(parts) > MAX_PARTS or max(map(len, parts)) > MAX_PART_BYTES:
            raise ValueError(f"use at most {MAX_PARTS} parts of at most {MAX_PART_BYTES} bytes")
        real = os.path.realpath(os.path.join(root, path))
    except ValueError as error:  # a zero byte, half a surrogate pair, too long
        raise RequestError("value", f"{path[:80]!r} is not a valid path: {error}") from None
    if not real.startswith(os.path.join(os.path.realpath(root), "")):
        raise RequestError("value", f"{path!r} leaves the workspace")
    return real


def write_file(root: str, path: str, text: str) -> None:
    """Write a text file and make its parent folders. RequestError: the path or the text is invalid."""
    real = inside(root, path)
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise RequestError("value", f"the text of {path!r} can't be encoded as UTF-8: {error}") from None
    os.makedirs(os.path.dirname(real), exist_ok=True)
    if os.path.lexists(real) and not os.path.isdir(real):
        os.unlink(real)  # a program may have made a pipe or a read-only file there
    with open(real, "xb") as file:
        file.write(data)


def read_file(root: str, path: str, max_bytes: int) -> str:
    """Return the text of a regular file; invalid UTF-8 is replaced. RequestError: the file is missing or too long."""
    real = inside(root, path)
    try:
        if not stat.S_ISREG(os.lstat(real).st_mode):
            raise RequestError("missing", f"{path!r} is not a regular file")
        with open(real, "rb") as file:
            data = file.read(max_bytes + 1)
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise RequestError("missing", f"{path!r}: {error.strerror}") from None
    if len(data) > max_bytes:
        raise RequestError("value", f"{path!r} is longer than {max_bytes} bytes")
    return data.decode("utf-8", "replace")


def wipe() -> None:
    """Empty every writable folder. OSError: a folder is not empty afterwards."""
    for root, mode in SCRATCH.items():
        os.chmod(root, 0o700)  # a program may have removed permissions here or below
        for name in os.listdir(root):
            path = os.path.join(root, name)
            if os.path.isdir(path) and not os.path.islink(path):
                _remove_tree(path)
            else:
                os.unlink(path)
        if os.listdir(root):
            raise OSError(None, f"{root} can't be emptied")
        os.chmod(root, mode)
        os.utime(root, (0, 0))  # the next episode must not see the modification time


def _remove_tree(top: str) -> None:
    """Delete a folder, regardless of its permissions. (Importing `shutil` would slow down the start of a sandbox.)"""
    waiting, folders = [top], []
    while waiting:
        folder = waiting.pop()
        folders.append(folder)
        os.chmod(folder, 0o700)
        for entry in list(os.scandir(folder)):
            if entry.is_dir(follow_symlinks=False):
                waiting.append(entry.path)
            else:
                os.unlink(entry.path)
    for folder in reversed(folders):
        os.rmdir(folder)
