"""Finds recipes, models and clusters by name: YAML files in folders named after their group.

    FOLDER/recipe/NAME.yaml    what to train and how
    FOLDER/model/NAME.yaml     which model, and every number that depends on its scale
    FOLDER/cluster/NAME.yaml   which machines, and how the roles are spread over them

The first line of each file is `# @package _global_`; the next comment line describes it in one sentence.
"""

from __future__ import annotations

from pathlib import Path

GROUPS = ("recipe", "model", "cluster")
PACKAGED = Path(__file__).resolve().parent


def search_path(recipes_dir: Path | None = None) -> list[Path]:
    """Return folders in which names are looked up, the first match wins.

    These are `recipes_dir` when given, `recipes` of the current folder when it holds one of the groups,
    and the ones that come with slime. ValueError: `recipes_dir` holds none of the groups.
    """
    folders: list[Path] = []
    if recipes_dir is not None:
        if not any((recipes_dir / group).is_dir() for group in GROUPS):
            raise ValueError(f"--recipes {recipes_dir}: holds none of the folders {', '.join(GROUPS)}")
        folders.append(recipes_dir.resolve())
    own = Path.cwd() / "recipes"
    if any((own / group).is_dir() for group in GROUPS):
        folders.append(own.resolve())
    folders.append(PACKAGED)
    return list(dict.fromkeys(folders))


def find(folders: list[Path], group: str, name: str) -> Path | None:
    """Return the YAML file of a name, None when no folder has it."""
    paths = (folder / group / f"{name}.yaml" for folder in folders)
    return next((path for path in paths if path.is_file()), None)


def names(folders: list[Path], group: str) -> list[str]:
    """Return all names of a group, sorted."""
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


def describe(path: Path) -> str:
    """Return the first comment line of a YAML file that is not a directive; "" when there is none."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            text = line.strip()
            if text.startswith("#") and not text.startswith("# @"):
                return text.lstrip("# ")
            if text and not text.startswith("#"):
                return ""
    return ""
