"""The built-in templates: the text around each message of a context."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Template:
    """The text around each kind of message. `reply` opens the policy's turn, `stop` closes it."""

    user: tuple[str, str]
    tool: tuple[str, str]
    summary: tuple[str, str]
    compact: str
    reply: str
    stop: str


OWN_TEMPLATE = "tokenizer"  # the name that selects the tokenizer's own chat template
NO_CHAT_TEMPLATE = (
    "has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json): "
    "add the model's, or use a built-in model.template"
)
SUMMARY_HEADING = "Your summary of the work so far:\n"
SUMMARY_REQUEST = (
    "The context window is almost full. Write a summary of everything that is needed "
    "to go on: the goal, what was found out, what was changed, what is left to do. Only the task and this "
    "summary will remain."
)
TEMPLATES = {
    "tiny": Template(user=("<u>", "$"), tool=("<t>", "$"), summary=("<s>", "$"), compact="<c>", reply="", stop="$"),
    "chatml": Template(
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        tool=("\n<|im_start|>user\n<tool_response>\n", "\n</tool_response><|im_end|>\n"),
        summary=(f"<|im_start|>user\n{SUMMARY_HEADING}", "<|im_end|>\n"),
        compact=f"\n<|im_start|>user\n{SUMMARY_REQUEST}<|im_end|>\n",
        reply="<|im_start|>assistant\n",
        stop="<|im_end|>",
    ),
}


JINJA = {"hermes": Path(__file__).with_name("hermes.jinja")}  # built-in chat templates
JINJA_STOP = "<|im_end|>"  # closes a turn in each of them
TEMPLATE_NAMES = (*TEMPLATES, *JINJA, OWN_TEMPLATE)


def find_template(name: str) -> Template:
    """Return the built-in template `name`. ValueError: the name is unknown."""
    if name not in TEMPLATES:
        raise ValueError(f"model.template={name!r}: known templates are {', '.join(TEMPLATE_NAMES)}")
    return TEMPLATES[name]


def end_ids(model_folder: Path) -> list[int]:
    """Return the end-of-sequence ids in the model's configuration, at which an engine ends a turn by itself.

    ValueError: `eos_token_id` is neither an id nor a list of ids.
    """
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        path = model_folder / name
        given = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        ids = given if isinstance(given, list) else [] if given is None else [given]
        if not all(isinstance(i, int) for i in ids):
            raise ValueError(f"{path}: eos_token_id={given!r}: must be an id, or a list of ids")
        found.update(ids)
    return sorted(found)
