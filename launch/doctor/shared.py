"""A folder that all nodes must see: a file of this machine is read on a node, and the node's answer is read here.

offer (this machine)  ->  reply (a node)  ->  received (this machine)  ->  remove
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

SEE_WAIT_S = 10.0  # a network disk may show new files late
POLL_S = 0.1
CURE = "mount the same disk under the same path on every node"


@dataclass(frozen=True)
class Offer:
    """A file that this machine has written into a folder."""

    setting: str  # that names the folder, e.g. runs_dir
    path: str  # absolute
    digest: str
    num_bytes: int

    @property
    def shown(self) -> str:
        """Return the folder with the setting that names it."""
        return f"{self.setting}={Path(self.path).parent}"


@dataclass(frozen=True)
class Reply:
    """A node's view of an offer, and the file that it has written beside it."""

    problem: str = ""  # one line; with the cure
    path: str = ""
    digest: str = ""
    read_mb_s: float = 0.0
    written_mb_s: float = 0.0


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    return next(one for one in (folder, *folder.parents) if one.exists())


def offer(setting: str, folder: Path, num_bytes: int) -> Offer:
    """Write a file of random bytes into the folder. OSError: it can't be written to."""
    path = folder / f".doctor-{secrets.token_hex(8)}"
    return Offer(setting, str(path), _write(path, num_bytes), num_bytes)


def reply(offered: Offer, name: str, wait_s: float = SEE_WAIT_S) -> Reply:
    """Read the file of another machine within `wait_s`, and write one beside it. `name`: of this node."""
    path = Path(offered.path)
    began = time.perf_counter()
    if not _seen(path, offered.digest, wait_s):
        return Reply(f"{offered.shown} does not show the files of the machine that starts the run: {CURE}")
    read_s = time.perf_counter() - began
    answer = path.with_name(f"{path.name}-{name}")
    began = time.perf_counter()
    try:
        digest = _write(answer, offered.num_bytes)
    except OSError as error:
        why = error.strerror or error
        return Reply(f"{offered.shown} can't be written to ({why}): let Ray's user write there, or free some space")
    megabytes = offered.num_bytes / 1e6
    return Reply("", str(answer), digest, megabytes / read_s, megabytes / (time.perf_counter() - began))


def received(offered: Offer, answer: Reply, wait_s: float = SEE_WAIT_S) -> str:
    """Return the problem of a reply, "" if this machine sees its file within `wait_s`."""
    if answer.problem or _seen(Path(answer.path), answer.digest, wait_s):
        return answer.problem
    return f"{offered.shown}: a file written there is not seen on this machine: {CURE}"


def remove(offered: Offer) -> None:
    """Remove the file and the replies to it."""
    path = Path(offered.path)
    for one in path.parent.glob(f"{path.name}*"):
        with contextlib.suppress(OSError):  # a reply of another user's
            one.unlink()


def digest_of_model(folder: Path) -> str:
    """Return a digest of a model's config and of the names and sizes of its weights; "" where there is no config."""
    config = folder / "config.json"
    if not config.is_file():
        return ""
    weights = sorted((one.name, one.stat().st_size) for one in folder.glob("*.safetensors"))
    return hashlib.sha256(config.read_bytes() + repr(weights).encode()).hexdigest()


def _write(path: Path, num_bytes: int) -> str:
    content = os.urandom(num_bytes)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def _seen(path: Path, digest: str, wait_s: float) -> bool:
    deadline = time.monotonic() + wait_s
    while True:
        with contextlib.suppress(OSError):
            if hashlib.sha256(path.read_bytes()).hexdigest() == digest:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
