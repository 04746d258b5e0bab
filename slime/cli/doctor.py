"""`slime doctor`: checks of the machines that a run would use."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from slime.cli.common import Refused, say
from slime.cli.training import Arguments, Recipes, folder_of_recipes

if TYPE_CHECKING:
    from launch.doctor.finding import Finding

DEFAULT = ("recipe=ppo_coding",)
_COLORS = {"ok": "\033[32m", "warning": "\033[33m", "problem": "\033[31m"}
_MIN_TEXT = 30  # columns


def doctor(
    arguments: Arguments = None,
    recipes: Recipes = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> int:
    """Check the machines that a run would use.

    Exit code 1 when there is a problem, 0 with warnings alone. Takes the arguments of `slime train`; without any, those
    of recipe=ppo_coding.
    """
    from launch.doctor.checks import full
    from launch.nodes import NodeError
    from slime.config import ConfigError, load
    from slime.start.needs import needs

    try:
        config = load(arguments or list(DEFAULT), folder_of_recipes(recipes)).config
        found = full(needs(config))
    except (ConfigError, NodeError, ValueError) as error:
        raise Refused(str(error)) from error
    if as_json:
        say(json.dumps([asdict(one) for one in found], indent=2))
    else:
        colors = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        say(table(found, shutil.get_terminal_size((100, 24)).columns, colors))
    return int(any(one.level.value == "problem" for one in found))


def table(found: Sequence[Finding], columns: int, colors: bool = False) -> str:
    """Return the findings as lines of at most `columns` characters, and their number at the end."""
    node_width = max((len(one.node) + 2 for one in found if one.node), default=0)
    check_width = max(len(one.check) for one in found) + 2
    indent = 9 + node_width + check_width
    lines = []
    for one in found:
        level = f"{one.level.value:<9}"
        if colors:
            level = f"{_COLORS[one.level.value]}{level}\033[0m"
        # a path or a key=value is for copying: it is never broken
        wrapped = textwrap.wrap(
            one.text, max(_MIN_TEXT, columns - indent), break_long_words=False, break_on_hyphens=False
        )
        first, *rest = wrapped or [""]
        lines.append(f"{level}{one.node:<{node_width}}{one.check:<{check_width}}{first}")
        lines += [" " * indent + line for line in rest]
    counts = {name: sum(one.level.value == name for one in found) for name in ("problem", "warning")}
    told = [f"{count} {name}{'s' * (count > 1)}" for name, count in counts.items() if count]
    return "\n".join([*lines, "", ", ".join(told) or "no problems found"])
