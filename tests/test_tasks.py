"""Task files: what is refused, where it is said, and that rows come back as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from buffer.tasks import TaskRow, read_rows, write_rows

GOOD = {"id": "a", "domain": "test", "prompt": "do it"}


def written(folder: Path, *lines: str) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, r"'prompt' must be a str, found NoneType"),
        ({"id": 7}, r"'id' must be a str, found int"),
        ({"promt": "x"}, r"unknown key 'promt'; known: id, domain, prompt"),
        ({"files": ["a"]}, r"'files' must be a dict, found list"),
        ({"files": {"a.txt": 1}}, r"files\['a.txt'\] must be text, found int"),
        ({"files": {"/etc/passwd": ""}}, r"files\['/etc/passwd'\] leaves the workspace"),
        ({"files": {"a/../../b": ""}}, r"files\['a/../../b'\] leaves the workspace"),
        ({"hidden_tests": {}}, r"'hidden_tests' must be a list, found dict"),
        ({"protected_paths": "tests"}, r"'protected_paths' must be a list, found str"),
        ({"budgets": {"max_turns": 0}}, r"budgets\['max_turns'\]=0 must be an integer of at least 1"),
        ({"budgets": {"max_turns": True}}, r"budgets\['max_turns'\]=True must be"),
        ({"budgets": {"max_turns": 1.5}}, r"budgets\['max_turns'\]=1.5 must be"),
        ({"id": "first"}, r"id 'first' stands already in line 1"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = written(tmp_path, json.dumps(GOOD | {"id": "first"}), json.dumps(GOOD), json.dumps(GOOD | changes))
    with pytest.raises(ValueError, match=rf"rows\.jsonl:3: {message}"):
        read_rows(path)


@pytest.mark.parametrize("key", GOOD)
def test_required_keys(tmp_path: Path, key: str) -> None:
    path = written(tmp_path, json.dumps({k: v for k, v in GOOD.items() if k != key}))
    with pytest.raises(ValueError, match=rf"rows\.jsonl:1: key '{key}' is missing"):
        read_rows(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "not JSON"), ("", "not JSON"), ("[1]", "expected an object, found list"), ("null", "found NoneType")],
)
def test_lines_that_are_no_objects(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: {message}|rows\.jsonl:2: .*{message}"):
        read_rows(written(tmp_path, json.dumps(GOOD), line))


def test_files_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows\.jsonl: no rows"):
        read_rows(written(tmp_path))
    with pytest.raises(ValueError, match=r"absent\.jsonl: no such task file"):
        read_rows(tmp_path / "absent.jsonl")


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    rows = [
        TaskRow("plain", "test", "naïve ✓\nsecond line"),
        TaskRow(
            id="full",
            domain="coding",
            prompt="",
            files={"a/b.txt": "x\r\n", "empty": ""},
            visible_tests=([1, 2], {"in": "x"}),
            hidden_tests=([3, -4], "text", 1.5, None),
            protected_paths=("tests",),
            allowed_hosts=("example.org",),
            budgets={"max_turns": 7},
        ),
    ]
    path = tmp_path / "new" / "rows.jsonl"
    write_rows(path, rows)
    assert read_rows(path) == rows
    assert [entry.name for entry in path.parent.iterdir()] == ["rows.jsonl"]  # nothing half-written is left
    write_rows(path, rows[:1])
    assert read_rows(path) == rows[:1]


def test_defaults_of_the_keys_that_may_be_left_out(tmp_path: Path) -> None:
    assert read_rows(written(tmp_path, json.dumps(GOOD))) == [TaskRow("a", "test", "do it")]
