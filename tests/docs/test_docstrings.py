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
        "Allow",
        "Append",
        "Attend",
        "Begin",
        "Block",
        "Broadcast",
        "Build",
        "Call",
        "Cancel",
        "Carry",
        "Check",
        "Close",
        "Compare",
        "Complete",
        "Compose",
        "Compute",
        "Copy",
        "Count",
        "Create",
        "Declare",
        "Delete",
        "Describe",
        "Disconnect",
        "Do",
        "Empty",
        "End",
        "Fill",
        "Flatten",
        "Free",
        "Give",
        "Group",
        "Hand",
        "Handle",
        "Hold",
        "Ignore",
        "Import",
        "Install",
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
        "Parse",
        "Play",
        "Pre-train",
        "Predict",
        "Prepare",
        "Print",
        "Prove",
        "Publish",
        "Put",
        "Raise",
        "Read",
        "Reap",
        "Receive",
        "Record",
        "Refuse",
        "Register",
        "Reissue",
        "Release",
        "Remove",
        "Replace",
        "Report",
        "Request",
        "Require",
        "Restart",
        "Restore",
        "Return",
        "Run",
        "Sample",
        "Say",
        "Scale",
        "See",
        "Send",
        "Serialize",
        "Serve",
        "Set",
        "Show",
        "Split",
        "Start",
        "Stop",
        "Store",
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
