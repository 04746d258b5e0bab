"""Files of the workspace, from within."""

from __future__ import annotations

import os
import shutil
import stat

BOX = "/box"
SCRATCH = {BOX: 0o755, "/tmp": 0o1777, "/dev/shm": 0o1777}  # every place that can be written, and its mode


class RequestError(Exception):
    """A request that can't be served; `kind` tells the host which exception to raise."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def inside(path: str) -> str:
    """The real path of a workspace file. No program runs meanwhile, so what is true now stays true."""
    try:
        real = os.path.realpath(os.path.join(BOX, path))
    except ValueError as error:  # a zero byte, or half a surrogate pair
        raise RequestError("value", f"{path!r} is no file name: {error}") from None
    if not real.startswith(BOX + "/"):
        raise RequestError("value", f"{path!r} leaves the workspace")
    return real


def write_file(path: str, text: str) -> None:
    """Makes the folders above the file, too."""
    real = inside(path)
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise RequestError("value", f"the text of {path!r} has no UTF-8 form: {error}") from None
    os.makedirs(os.path.dirname(real), exist_ok=True)
    if os.path.lexists(real) and not os.path.isdir(real):
        os.unlink(real)  # whatever a program has put there: a pipe, a file it may not write
    with open(real, "xb") as file:
        file.write(data)


def read_file(path: str, max_bytes: int) -> str:
    """Text of a regular file, bytes that are no UTF-8 replaced."""
    real = inside(path)
    try:
        if not stat.S_ISREG(os.lstat(real).st_mode):
            raise RequestError("missing", f"{path!r} is no regular file")
        with open(real, "rb") as file:
            data = file.read(max_bytes + 1)
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise RequestError("missing", f"{path!r}: {error.strerror}") from None
    if len(data) > max_bytes:
        raise RequestError("value", f"{path!r} is longer than {max_bytes} bytes")
    return data.decode("utf-8", "replace")


def wipe() -> None:
    """Empties every place that can be written; OSError when something is left."""
    for root, mode in SCRATCH.items():
        os.chmod(root, 0o700)
        for name in os.listdir(root):
            path = os.path.join(root, name)
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path, onerror=_open_up)
            else:
                os.unlink(path)
        if os.listdir(root):
            raise OSError(None, f"{root} can't be emptied")
        os.chmod(root, mode)
        os.utime(root, (0, 0))  # not even a time of change tells the next episode anything


def _open_up(function: Any, path: str, info: Any) -> None:
    """For rmtree: a folder that its owner may not enter."""
    parent = os.path.dirname(path)
    for folder in (parent, path):
        if os.path.isdir(folder) and not os.path.islink(folder):
            os.chmod(folder, 0o700)
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


