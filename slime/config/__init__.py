"""From `key=value` arguments and YAML recipes to one checked `Config`; nothing else knows Hydra.

Names load on first use: help and completion read the schema without Hydra, which takes most of a second to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slime.config.checks import check, check_model, missing
    from slime.config.compose import Loaded, differences, dump, leaves, load, load_start, parse
    from slime.config.settings import ConfigError

__all__ = [
    "ConfigError",
    "Loaded",
    "check",
    "check_model",
    "differences",
    "dump",
    "leaves",
    "load",
    "load_start",
    "missing",
    "parse",
]
_MODULES = {"ConfigError": "settings", "check": "checks", "check_model": "checks", "missing": "checks"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'compose')}"), name)
