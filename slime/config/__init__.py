"""From `key=value` arguments and YAML recipes to one checked `Config`; nothing else knows Hydra."""

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
