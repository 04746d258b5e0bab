"""The manifest of a checkpoint: all of a run's state that is not in the files of its roles.

    step           the last completed step
    buffer         seed, order and position of the prompts, open tickets (buffer/store.py)
    rows           digest of the rows to train on, to which the order of the prompts refers
    config         the settings of the run, as in its config.yaml
    model_folder   the model that the run started from
    wandb_id       the run's id in Weights & Biases; "": it has none
    versions       versions of the packages that determine the results
    format         version of this list; each change of the list increases it by 1

`read` supports all earlier formats: it fills in what they lack, or refuses them in a line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FILE = "state.json"
FORMAT = 2  # 1, which has no number, ends with model_folder
PACKAGES = ("slime", "torch", "sglang", "megatron-core", "ray", "transformers")


def installed_versions() -> dict[str, str]:
    """Return the versions of PACKAGES, without those that are not installed as packages."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Manifest:
    """The manifest of one checkpoint; its fields are described at the top of this file."""

    step: int
    buffer: Mapping[str, Any]
    model_folder: str
    config: str = ""
    rows: str = ""
    wandb_id: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Write the manifest into a checkpoint's folder."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1))

    def changed_versions(self) -> list[str]:
        """Return a line for each package that had another version when the checkpoint was written."""
        now = installed_versions()
        return [
            f"{name} was {then} and is {now.get(name, 'not installed')}"
            for name, then in self.versions.items()
            if now.get(name) != then
        ]


def read(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint's folder. ValueError: it is damaged, or of a later version. OSError."""
    path = folder / FILE
    try:
        state = json.loads(path.read_text())
        number = state.get("format", 1)
        if number > FORMAT:
            raise ValueError(f"format {number} is of a later slime; this one reads up to {FORMAT}: update it")
        if number == 1:
            config = folder.parent.parent / "config.yaml"
            state = {"buffer": {}, "config": config.read_text() if config.exists() else ""} | state
        return Manifest(**state | {"format": FORMAT})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error
