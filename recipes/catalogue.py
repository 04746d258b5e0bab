"""The catalogue of recipes, models and clusters: YAML files in folders named after their group.

    FOLDER/recipe/NAME.yaml    the task and the algorithm
    FOLDER/model/NAME.yaml     the model, and every setting that depends on its scale
    FOLDER/cluster/NAME.yaml   the machines, and the placement of the roles on them

The first line of each file is `# @package _global_`; the next comment line is its title.
"""

from __future__ import annotations

from pathlib import Path

GROUPS = ("recipe", "model", "cluster")
PACKAGED = Path(__file__).resolve().parent


def search_path(recipes_dir: Path | None = None) -> list[Path]:
    """Return the folders in which names are looked up; the first match is used.

    They are `recipes_dir` if given, the current folder's `recipes` if it contains one of the groups, and the packaged
    recipes. ValueError: `recipes_dir` contains none of the groups.
    """
    folders: list[Path] = []
    if recipes_dir is not None:
        if not any((recipes_dir / group).is_dir() for group in GROUPS):
            raise ValueError(f"--recipes {recipes_dir}: contains none of the folders {', '.join(GROUPS)}")
        folders.append(recipes_dir.resolve())
    own = Path.cwd() / "recipes"
    if any((own / group).is_dir() for group in GROUPS):
        folders.append(own.resolve())
    folders.append(PACKAGED)
    return list(dict.fromkeys(folders))


def find(folders: list[Path], group: str, name: str) -> Path | None:
    """Return the first YAML file with this name, or None if there is none."""
    paths = (folder / group / f"{name}.yaml" for folder in folders)
    return next((path for path in paths if path.is_file()), None)


def names(folders: list[Path], group: str) -> list[str]:
    """Return all names in a group, sorted."""
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


def describe(path: Path) -> str:
    """Return the title of a YAML file: its first comment line that is not a directive, or "" if there is none."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            text = line.strip()
            if text.startswith("#") and not text.startswith("# @"):
                return text.lstrip("# ")
            if text and not text.startswith("#"):
                return ""
    return ""
