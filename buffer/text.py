"""Text that comes from outside: prompts, tool output, files, what a policy said."""

from __future__ import annotations


def clean_text(text: str) -> str:
    """`text` as Unicode that every tokenizer and file takes: half surrogate pairs become U+FFFD.

    They are left behind by half-decoded bytes and by strings that were cut in UTF-16. Two halves that stand side by
    side become the character that they mean.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
