"""Typed reading of a `config.json`; missing or unsupported values are refused with file, field and value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_REQUIRED = object()
_POINTER = b"version https://git-lfs"  # start of a placeholder for a file that git-LFS has not fetched


def refuse_pointer(path: Path, start: bytes) -> None:
    """Refuse a git-LFS pointer. ValueError: the file, which starts with `start`, is a pointer without the content."""
    if start and _POINTER.startswith(start[: len(_POINTER)]):
        raise ValueError(f"{path}: is a pointer of git-LFS in place of the file: run git lfs pull in its folder")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. ValueError: the file can't be read or holds no JSON object."""
    try:
        content = path.read_bytes()
        refuse_pointer(path, content)
        found = json.loads(content)
    except OSError as error:
        raise ValueError(f"{path}: can't be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds a {type(found).__name__}, not an object")
    return found


class JsonObject:
    """The fields of one `config.json`, or of an object in it. A null field counts as absent."""

    def __init__(self, where: str, found: dict[str, Any]) -> None:
        self.where = where
        self._found = found

    @staticmethod
    def read(path: Path) -> JsonObject:
        """Read a JSON file. ValueError: there is no such file, or no JSON object in it."""
        if not path.is_file():
            raise ValueError(f"{path}: no such file; a model is a Hugging Face folder")
        return JsonObject(str(path), read_json(path))

    def __contains__(self, name: str) -> bool:
        return self._found.get(name) is not None

    def __bool__(self) -> bool:
        return bool(self._found)

    def value(self, name: str, default: Any = _REQUIRED) -> Any:
        if name in self:
            return self._found[name]
        if default is _REQUIRED:
            raise ValueError(f"{self.where}: {name} is missing")
        return default

    def count(self, name: str, default: Any = _REQUIRED) -> int:
        """Return an integer of at least 1."""
        found = self.int(name, default)
        if found < 1:
            raise self.refused(name, found, "1 or more")
        return found

    def int(self, name: str, default: Any = _REQUIRED) -> int:
        return int(self._typed(name, default, "an integer", int))

    def float(self, name: str, default: Any = _REQUIRED) -> float:
        return float(self._typed(name, default, "a number", int, float))

    def bool(self, name: str, default: bool = False) -> bool:
        return bool(self._typed(name, default, "true or false", bool))

    def list(self, name: str) -> list[Any]:
        """Return a list; empty if the field is absent."""
        return list(self._typed(name, [], "a list", list))

    def inside(self, name: str) -> JsonObject:
        """Return the fields of an object; none if it is absent."""
        return JsonObject(f"{self.where}: {name}", dict(self._typed(name, {}, "an object", dict)))

    def only(self, name: str, mapped: Any) -> None:
        """Require that a field has this value or is absent. ValueError: it has another value."""
        found = self.value(name, mapped)
        if found != mapped:
            raise self.refused(name, found, repr(mapped))

    def absent(self, name: str) -> None:
        """Require that a field is absent. ValueError: it is present."""
        if name in self:
            raise self.refused(name, self.value(name), "a model without it")

    def refused(self, name: str, found: Any, mapped: str) -> ValueError:
        return ValueError(f"{self.where}: {name} is {found!r}, which is not supported; supported: {mapped}")

    def _typed(self, name: str, default: Any, what: str, *types: type) -> Any:
        found = self.value(name, default)
        if not isinstance(found, types) or (isinstance(found, bool) and bool not in types):
            raise ValueError(f"{self.where}: {name} is {found!r}, which is not {what}")
        return found
