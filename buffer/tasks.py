"""Task files in JSONL format: one row per prompt."""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from buffer.text import unique_keys


@dataclass(frozen=True)
class TaskRow:
    """One prompt and all data that its environment needs.

    The agent's tools can access `visible_tests`; only the judge can access `hidden_tests`.
    """

    id: str
    domain: str
    prompt: str
    files: dict[str, str] = field(default_factory=dict)  # workspace path -> text
    visible_tests: tuple[Any, ...] = ()
    hidden_tests: tuple[Any, ...] = ()
    protected_paths: tuple[str, ...] = ()  # paths that the agent must not change
    allowed_hosts: tuple[str, ...] = ()  # hosts that the agent's tools may connect to
    budgets: dict[str, int] = field(default_factory=dict)  # e.g. max_turns


_KINDS: dict[str, type] = {
    "id": str,
    "domain": str,
    "prompt": str,
    "files": dict,
    "visible_tests": list,
    "hidden_tests": list,
    "protected_paths": list,
    "allowed_hosts": list,
    "budgets": dict,
}
_REQUIRED = ("id", "domain", "prompt")
_HALF_PAIR = re.compile(
    "[\ud800-\udfff]"
)  # not a character; in a file read with surrogateescape it stands for a byte that is not valid UTF-8
_BLANK = string.whitespace + "\ufeff"  # the byte-order mark
_MAX_PARTS, _MAX_PART_BYTES = 100, 255  # limits for paths in sandboxes


def _check(row: Any, where: str) -> TaskRow:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object, found {type(row).__name__}")
    for key in _REQUIRED:
        if key not in row:
            raise ValueError(f"{where}: key {key!r} is missing")
    for key, value in row.items():
        if key not in _KINDS:
            raise ValueError(f"{where}: unknown key {key!r}; known: {', '.join(_KINDS)}")
        if not isinstance(value, _KINDS[key]):
            raise ValueError(f"{where}: {key!r} must be a {_KINDS[key].__name__}, found {type(value).__name__}")
    for key in _REQUIRED:
        _check_text(row[key], f"{where}: {key!r}")
    for key in ("protected_paths", "allowed_hosts"):
        for number, text in enumerate(row.get(key, ())):
            _check_text(text, f"{where}: {key}[{number}]")
    _check_files(row.get("files", {}), where)
    for name, limit in row.get("budgets", {}).items():
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise ValueError(f"{where}: budgets[{name!r}]={limit!r} must be an integer of at least 1")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    return TaskRow(**values)


def _check_text(value: Any, what: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{what} must be text, found {type(value).__name__}")
    half = _HALF_PAIR.search(value)
    if half:
        raise ValueError(
            f"{what} has half a surrogate pair, \\u{ord(half[0]):04x}, at character {half.start()}, which is invalid; "
            "remove it, or write \\ufffd"
        )


def _check_files(files: dict[str, Any], where: str) -> None:
    """Check that all files can be written into one workspace. ValueError names the first that can't."""
    names: dict[tuple[str, ...], str] = {}
    for path, text in files.items():
        what = f"{where}: files[{path!r}]"
        _check_text(path, f"{what}: its path")
        _check_text(text, what)
        parts = PurePosixPath(path).parts
        if path.startswith("/") or ".." in parts:
            raise ValueError(f"{what} leaves the workspace")
        if not parts or path.endswith("/"):
            raise ValueError(f"{what} names no file")
        if "\0" in path or len(parts) > _MAX_PARTS or max(len(part.encode()) for part in parts) > _MAX_PART_BYTES:
            raise ValueError(
                f"{what} is not a valid path: use no zero byte and at most "
                f"{_MAX_PARTS} parts of {_MAX_PART_BYTES} bytes"
            )
        if parts in names:
            raise ValueError(f"{what} is the same file as files[{names[parts]!r}]")
        names[parts] = path
    for parts, path in names.items():
        for end in range(1, len(parts)):
            if parts[:end] in names:
                raise ValueError(
                    f"{where}: files[{names[parts[:end]]!r}] is a file, and a folder in files[{path!r}]: rename one"
                )


def _parse(line: str, where: str) -> Any:
    broken = _HALF_PAIR.search(line)
    if broken:
        raise ValueError(
            f"{where}: not UTF-8: byte 0x{ord(broken[0]) & 0xFF:02x} at character {broken.start()}; "
            "save the file as UTF-8"
        )
    try:
        return json.loads(line, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON (one object per line): {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from error


def _rows(texts: Iterable[tuple[int, str]], place: str, unit: str) -> list[TaskRow]:
    """Parse numbered JSON texts into rows. ValueError names the first bad one by `place` and its number."""
    rows: list[TaskRow] = []
    seen: dict[str, int] = {}
    for number, text in texts:
        where = f"{place}{number}"
        row = _check(_parse(text, where), where)
        if row.id in seen:
            raise ValueError(f"{where}: id {row.id!r} is already used on {unit} {seen[row.id]}")
        seen[row.id] = number
        rows.append(row)
    return rows


def read_rows(path: Path) -> list[TaskRow]:
    """Return all rows of a UTF-8 task file with one JSON object per line. Skip blank lines and a byte-order mark.

    ValueError names the file and the line of the first bad row.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such task file")
    try:
        with path.open(encoding="utf-8", errors="surrogateescape") as lines:
            texts = ((number, line.strip(_BLANK)) for number, line in enumerate(lines, start=1))
            rows = _rows(((number, text) for number, text in texts if text), f"{path}:", "line")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def write_rows(path: Path, rows: Iterable[TaskRow]) -> None:
    """Write rows in the format of `read_rows`. The file is replaced atomically, also with concurrent writers.

    ValueError names the first row that `read_rows` would refuse.
    """
    lines = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, TaskRow):
            raise ValueError(f"row {number} is a {type(row).__name__}: must be a TaskRow")
        try:
            lines.append(json.dumps({f.name: getattr(row, f.name) for f in fields(row)}))
        except (TypeError, ValueError) as error:  # a value that JSON can't represent
            raise ValueError(f"row {number}, id {row.id!r}: {error}") from error
    if not _rows(enumerate(lines, start=1), "row ", "row"):
        raise ValueError("no rows")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{secrets.token_hex(4)}.part")
    part.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    part.replace(path)
