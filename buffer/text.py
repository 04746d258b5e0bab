"""Sanitizing of text from external sources: prompts, tool output, files and policy output."""

from __future__ import annotations

from typing import Any


def clean_text(text: str) -> str:
    """Return `text` as valid Unicode that every tokenizer and file accepts: unpaired surrogates become U+FFFD.

    Unpaired surrogates come from partially decoded bytes and from strings that were cut in UTF-16. Two adjacent
    surrogates that form a pair become the character that they encode.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object from its pairs (`json.loads(..., object_pairs_hook=unique_keys)`).

    ValueError: a key occurs twice, so one of its values would be lost.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found
