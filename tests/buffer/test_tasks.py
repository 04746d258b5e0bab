"""Task files: refusals with file and line, and rows that are read back unchanged."""

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
        ({"id": "first"}, r"id 'first' is already used on line 1"),
        ({"prompt": "a\ud83d"}, r"'prompt' has half a surrogate pair, \\ud83d, at character 1"),
        ({"id": "\udcff"}, r"'id' has half a surrogate pair"),
        ({"files": {"a": "\ud800"}}, r"files\['a'\] has half a surrogate pair"),
        ({"files": {"\ud800": ""}}, r"files\['\\ud800'\]: its path has half a surrogate pair"),
        ({"files": {"a\0b": ""}}, r"files\['a\\x00b'\] is not a valid path: use no zero byte"),
        ({"files": {"é" * 128: ""}}, r"files\['é+'\] is not a valid path: .* at most 100 parts of 255 bytes"),
        ({"files": {"a/" * 100 + "b": ""}}, r"files.* is not a valid path"),
        ({"files": {"": ""}}, r"files\[''\] names no file"),
        ({"files": {".": ""}}, r"files\['.'\] names no file"),
        ({"files": {"a/": ""}}, r"files\['a/'\] names no file"),
        ({"files": {"a/b": "", "a": ""}}, r"files\['a'\] is a file, and a folder in files\['a/b'\]"),
        ({"files": {"a/b/c/d": "", "./a//b": ""}}, r"files\['./a//b'\] is a file, and a folder in files\['a/b/c/d'\]"),
        ({"files": {"a/b": "", "a/./b": ""}}, r"files\['a/./b'\] is the same file as files\['a/b'\]"),
        ({"protected_paths": [7]}, r"protected_paths\[0\] must be text, found int"),
        ({"allowed_hosts": ["x", None]}, r"allowed_hosts\[1\] must be text, found NoneType"),
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
    [
        ("{", "not JSON \\(one object per line\\)"),
        ("[1]", "expected an object, found list"),
        ("null", "expected an object, found NoneType"),
        ('{"id": "a", "id": "b"}', "key 'id' is there twice"),
        ('{"files": {"a": "1", "a": "2"}}', "key 'a' is there twice"),
        (f'{{"hidden_tests": [{"9" * 5000}]}}', "Exceeds the limit"),
        ("[" * 100_000, "recursion"),
    ],
    ids=["cut off", "list", "null", "twice", "file twice", "digits", "depth"],
)
def test_lines_that_are_no_objects(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: .*{message}"):
        read_rows(written(tmp_path, json.dumps(GOOD), line))


@pytest.mark.parametrize(("encoding", "byte"), [("latin-1", "0xe9"), ("cp1252", "0xe9"), ("utf-16", "0xff")])
def test_a_file_that_is_not_utf_8(tmp_path: Path, encoding: str, byte: str) -> None:
    path = tmp_path / "rows.jsonl"
    line = 1 if encoding == "utf-16" else 2
    rows = [GOOD | {"id": "first"}, GOOD | {"prompt": "café"}]
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(encoding))
    with pytest.raises(
        ValueError, match=rf"rows\.jsonl:{line}: not UTF-8: byte {byte} at character \d+; save the file"
    ):
        read_rows(path)


@pytest.mark.parametrize(
    ("before", "between", "after"),
    [
        (b"\xef\xbb\xbf", b"\n", b"\n"),
        (b"", b"\r\n", b"\r\n"),
        (b"", b"\r", b"\r"),
        (b"", b"\n", b""),
        (b"\n", b"\n\n \t\n", b"\n\n"),
        (b"", b"\n\xef\xbb\xbf", b"\n\xef\xbb\xbf"),
    ],
    ids=["byte-order mark", "Windows", "old Mac", "no last newline", "blank lines", "files one after the other"],
)
def test_what_editors_add_does_no_harm(tmp_path: Path, before: bytes, between: bytes, after: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [TaskRow("a", "test", "naïve\u2028✓"), TaskRow("b", "test", "\0", hidden_tests=(1e400, "\ud800"))]
    lines = [json.dumps({"id": r.id, "domain": r.domain, "prompt": r.prompt}, ensure_ascii=False) for r in rows]
    lines[1] = lines[1][:-1] + ', "hidden_tests": [Infinity, "\\ud800"]}'
    path.write_bytes(before + between.join(line.encode() for line in lines) + after)
    assert read_rows(path) == rows


def test_line_numbers_count_blank_lines(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows\.jsonl:4: id 'a' is already used on line 2"):
        read_rows(written(tmp_path, "", json.dumps(GOOD), "", json.dumps(GOOD)))


def test_files_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows\.jsonl: no rows"):
        read_rows(written(tmp_path))
    with pytest.raises(ValueError, match=r"absent\.jsonl: no such task file"):
        read_rows(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match=r": no such task file"):
        read_rows(tmp_path)
    with pytest.raises(ValueError, match=r"rows\.jsonl: no rows"):
        read_rows(written(tmp_path, "", " "))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([TaskRow("a", "t", ""), None], "row 2 is a NoneType: must be a TaskRow"),
        ([TaskRow("a", "t", "", hidden_tests=({1},))], "row 1, id 'a': .*set is not JSON serializable"),
        ([TaskRow("a", "t", ""), TaskRow("a", "t", "")], "row 2: id 'a' is already used on row 1"),
        ([TaskRow("a", "t", None)], "row 1: 'prompt' must be a str, found NoneType"),  # type: ignore[arg-type]
        ([TaskRow("a", "t", "", files={"x/y": "", "x": ""})], r"row 1: files\['x'\] is a file, and a folder"),
    ],
    ids=["none", "no row", "no JSON", "same id", "no prompt", "file and folder"],
)
def test_rows_that_could_not_be_read_again_are_not_written(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_rows(tmp_path / "rows.jsonl", rows)
    assert not list(tmp_path.iterdir())


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
    assert [entry.name for entry in path.parent.iterdir()] == ["rows.jsonl"]  # no partial file is left
    write_rows(path, rows[:1])
    assert read_rows(path) == rows[:1]


def test_defaults_of_the_keys_that_may_be_left_out(tmp_path: Path) -> None:
    assert read_rows(written(tmp_path, json.dumps(GOOD))) == [TaskRow("a", "test", "do it")]
