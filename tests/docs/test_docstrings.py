"""Docstrings of public functions begin with a verb in the imperative: "Return", "Refuse", "Broadcast"."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tree import ROOT, own_modules

FOLDERS = ("slime", "launch", "recipes", "critic", "trainer", "rollout", "buffer", "machine")
VERBS = frozenset(
    [
        "Add",
        "Advise",
        "Allocate",
        "Append",
        "Attend",
        "Begin",
        "Broadcast",
        "Build",
        "Cancel",
        "Carry",
        "Check",
        "Close",
        "Complete",
        "Compose",
        "Compute",
        "Copy",
        "Count",
        "Declare",
        "Delete",
        "Describe",
        "Do",
        "Empty",
        "End",
        "Fill",
        "Free",
        "Give",
        "Group",
        "Handle",
        "Hold",
        "Ignore",
        "Import",
        "Issue",
        "Join",
        "Judge",
        "Keep",
        "Kill",
        "Leave",
        "Let",
        "Load",
        "Look",
        "Make",
        "Map",
        "Measure",
        "Move",
        "Name",
        "Note",
        "Overwrite",
        "Pack",
        "Play",
        "Pre-train",
        "Predict",
        "Prepare",
        "Print",
        "Prove",
        "Put",
        "Raise",
        "Read",
        "Reap",
        "Receive",
        "Record",
        "Refuse",
        "Register",
        "Require",
        "Restore",
        "Return",
        "Run",
        "Sample",
        "Say",
        "Scale",
        "See",
        "Send",
        "Serve",
        "Set",
        "Show",
        "Split",
        "Start",
        "Stop",
        "Take",
        "Tell",
        "Train",
        "Turn",
        "Undo",
        "Update",
        "Wait",
        "Write",
        "Yield",
    ]
)


def first_words() -> Iterator[tuple[str, str]]:
    """Yield place and first word of the docstring of every public function and method."""
    for path in own_modules():
        if path.relative_to(ROOT).parts[0] not in FOLDERS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
                continue
            if text := ast.get_docstring(node):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", text.split()[0].rstrip(".,:;")


def test_docstrings_begin_with_a_verb() -> None:
    words = dict(first_words())
    assert len(words) > 500
    assert {place: word for place, word in words.items() if word not in VERBS} == {}
