"""The page for operators quotes lines as the product says them, and every state and exit code."""

from __future__ import annotations

import re

from tree import ROOT, own_modules

from launch.supervisor import TO_BE_CONTINUED
from slime.observe.standing import State

PAGE = (ROOT / "docs" / "operations.md").read_text()
JOINED = re.compile(r"""["']\s*\n\s*f?["']""")  # parts of a text on several lines


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_every_quoted_line_is_said_somewhere() -> None:
    product = [path for path in own_modules() if path.relative_to(ROOT).parts[0] not in ("tests", "benchmarks")]
    source = JOINED.sub("", "\n".join(path.read_text() for path in product))
    rows = re.findall(r"^\| (.+?) \| \[.+\]\(#\S+\) \|$", section("By the line"), re.MULTILINE)
    lines = [line for row in rows for line in re.findall(r"`([^`]+)`", row)]
    assert len(lines) > 20
    pieces = [piece.strip() for line in lines for piece in line.split("...") if len(piece.strip(" :;,")) > 2]
    assert [piece for piece in pieces if piece not in source] == []


def test_every_symptom_is_found_by_its_line_or_by_itself() -> None:
    headings = re.findall(r"^### (.+)$", section("By symptom"), re.MULTILINE)
    assert len(headings) >= 12
    for heading in headings:
        assert re.search(rf"^### {re.escape(heading)}\n\n(?:\*(?:Line|Lines|Seen)\*|- \*)", PAGE, re.MULTILINE), heading


def test_states_and_exit_codes_are_those_of_a_run() -> None:
    told = re.findall(r"^\| `([a-z ]+)` \|", section("First look"), re.MULTILINE)
    assert told == [state.value for state in State]
    codes = re.findall(r"^\| ([\d, ]+) \|", section("By exit code"), re.MULTILINE)
    assert {"0", "1", "2", str(TO_BE_CONTINUED)} <= set(codes)
