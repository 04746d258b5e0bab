"""Text that comes from outside: prompts, tool output, files, what a policy said."""

from __future__ import annotations

from typing import Any


def clean_text(text: str) -> str:
    """Return `text` as Unicode that every tokenizer and file takes: half surrogate pairs become U+FFFD.

    They are left behind by half-decoded bytes and by strings that were cut in UTF-16. Two halves that stand side by
    side become the character that they mean.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object of its pairs (`json.loads(..., object_pairs_hook=unique_keys)`).

    ValueError: a key that is there twice, of which one value would be lost.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found
