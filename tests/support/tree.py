"""The project's own files: a checkout in use also contains other files."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
OWN_FILES: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["include"]  # patterns


def own_modules(root: Path = ROOT) -> list[Path]:
    """Return the project's Python files below `root`, sorted."""
    return sorted({path for pattern in OWN_FILES for path in root.glob(pattern) if path.suffix == ".py"})
