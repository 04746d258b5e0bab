"""Task files: JSONL, one row a prompt."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TaskRow:
    """One prompt with everything that its environment needs.

    `visible_tests` are shown to the agent's tools, `hidden_tests` only to the judge.
    """

    id: str
    domain: str
    prompt: str
    files: dict[str, str] = field(default_factory=dict)  # workspace path -> text
    visible_tests: tuple[Any, ...] = ()
    hidden_tests: tuple[Any, ...] = ()
    protected_paths: tuple[str, ...] = ()  # what the agent may not touch
    allowed_hosts: tuple[str, ...] = ()  # what its tools may reach
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
    for path, text in row.get("files", {}).items():
        if not isinstance(text, str):
            raise ValueError(f"{where}: files[{path!r}] must be text, found {type(text).__name__}")
        if path.startswith("/") or ".." in Path(path).parts:
            raise ValueError(f"{where}: files[{path!r}] leaves the workspace")
    for name, limit in row.get("budgets", {}).items():
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise ValueError(f"{where}: budgets[{name!r}]={limit!r} must be an integer of at least 1")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    return TaskRow(**values)


def read_rows(path: Path) -> list[TaskRow]:
    """All rows of a task file. ValueError names file and line of the first bad row."""
    if not path.is_file():
        raise ValueError(f"{path}: no such task file")
    rows: list[TaskRow] = []
    seen: dict[str, int] = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            try:
                row = _check(json.loads(line), where)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON: {error}") from error
            if row.id in seen:
                raise ValueError(f"{where}: id {row.id!r} stands already in line {seen[row.id]}")
            seen[row.id] = number
            rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def write_rows(path: Path, rows: list[TaskRow]) -> None:
    """Writes rows so that `read_rows` gives them back; the file appears whole or not at all, whoever else writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{secrets.token_hex(4)}.part")
    with part.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps({f.name: getattr(row, f.name) for f in fields(row)}) + "\n")
    part.replace(path)
