"""Config fields that declare their help text, bounds and unit next to the default.

    lr: float = setting(1e-6, "Learning rate after the warm-up.", bounds="(0, inf)")

The pre-flight checks, `slime train --help KEY` and docs/configuration.md are generated from these declarations
(slime/config/settings.py).
"""

from __future__ import annotations

import copy
from dataclasses import field
from typing import Any


def setting(default: Any, help: str, *, bounds: str = "", unit: str = "") -> Any:
    """Return a dataclass field whose metadata holds its documentation.

    `help`: one sentence. `bounds`: an interval; [ and ] include the end point, ( and ) exclude it. `unit`: the unit of
    the value, e.g. "tokens". A default that is a list or a dict is copied for each config.
    """
    metadata = {"help": help, "bounds": bounds, "unit": unit}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def derive(config: Any, **values: Any) -> None:
    """Set derived fields of a frozen config. Call this only from its `__post_init__`."""
    for name, value in values.items():
        object.__setattr__(config, name, value)
