"""Print a lock from uv's result: `write.py REGEX PYLOCK...` prints the packages whose whole name matches REGEX.

A package has the hashes of the wheels that fit one of PYTHONS on 64-bit Linux with glibc, or the hash of its source
archive if there is no such wheel. uv lists the files of all platforms, which are ten times as many.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

PYTHONS = ((3, 11), (3, 12))
NEWEST_GLIBC = 39  # minor version of glibc 2.39 (Ubuntu 24.04); pip selects the wheel that fits the machine's glibc
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(5, NEWEST_GLIBC + 1)]
PLATFORMS += ["manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64", "linux_x86_64", "any"]


def fitting_tags() -> frozenset[Tag]:
    """Return the tags of the wheels that one of PYTHONS can install."""
    tags: set[Tag] = set()
    for major, minor in PYTHONS:
        tags.update(cpython_tags((major, minor), platforms=PLATFORMS))
        tags.update(compatible_tags((major, minor), f"cp{major}{minor}", PLATFORMS))
    return frozenset(tags)


def hashes(package: dict[str, Any]) -> list[str]:
    """Return the SHA-256 of each file of a package that may be installed. ValueError: there is none."""
    tags = fitting_tags()
    files = [wheel for wheel in package.get("wheels", []) if tags & parse_wheel_filename(_file_name(wheel))[3]]
    if not files and "sdist" in package:
        files = [package["sdist"]]
    if not files:
        raise ValueError(f"{package['name']} {package['version']} has no file for Linux on x86-64")
    return sorted(file["hashes"]["sha256"] for file in files)


def _file_name(wheel: dict[str, Any]) -> str:
    name: str = wheel.get("name") or wheel["url"].rpartition("/")[2].replace("%2B", "+")
    return name


def lines(packages: list[dict[str, Any]]) -> Iterator[str]:
    """Yield one requirement per package, in the format of `pip install --require-hashes`."""
    for package in sorted(packages, key=lambda package: package["name"]):
        parts = [f"{package['name']}=={package['version']}", *(f"--hash=sha256:{digest}" for digest in hashes(package))]
        yield " \\\n    ".join(parts)


def chosen(packages: list[dict[str, Any]], pattern: str) -> list[dict[str, Any]]:
    """Return the packages whose name matches `pattern`. ValueError: one of them has two versions."""
    found = [package for package in packages if re.fullmatch(pattern, package["name"])]
    names = [package["name"] for package in found]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"no version for all of {PYTHONS}: {', '.join(sorted(twice))}")
    return found


if __name__ == "__main__":
    _, regex, *paths = sys.argv
    resolved = [package for path in paths for package in tomllib.loads(Path(path).read_text())["packages"]]
    print("\n".join(lines(chosen(resolved, regex))))
