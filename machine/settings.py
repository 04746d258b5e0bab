"""Fields of a config: each states its help, bounds and unit beside its default.

    lr: float = setting(1e-6, "Learning rate after the warm-up.", bounds="(0, inf)")

The checks before a start, `slime train --help KEY` and docs/configuration.md are made from these
(slime/config/settings.py).
"""

from __future__ import annotations

import copy
from dataclasses import field
from typing import Any


def setting(default: Any, help: str, *, bounds: str = "", unit: str = "") -> Any:
    """Return a dataclass field with what a user may need to know of it.

    `help`: one sentence. `bounds`: an interval, in which [ and ] include the end and ( and ) do not. `unit`: what one
    of it is, e.g. "tokens". Each config gets its own copy of a default that is a list or a dict.
    """
    metadata = {"help": help, "bounds": bounds, "unit": unit}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def derive(config: Any, **values: Any) -> None:
    """Give a frozen config the values that follow from its other ones. Called by its `__post_init__` alone."""
    for name, value in values.items():
        object.__setattr__(config, name, value)
