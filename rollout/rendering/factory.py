"""Selection of the renderer by the template's name."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from typing import Any

from rollout.rendering.builtin import BuiltinRenderer
from rollout.rendering.chat import ChatRenderer
from rollout.rendering.renderer import Renderer
from rollout.rendering.templates import JINJA, OWN_TEMPLATE


def make_renderer(tokenizer: Any, template: str, end_ids: Iterable[int] = ()) -> Renderer:
    """Return the renderer for `model.template`. ValueError: this tokenizer does not support the template."""
    if template == OWN_TEMPLATE:
        return ChatRenderer(tokenizer, end_ids)
    if template in JINJA:
        own = copy(tokenizer)  # shares its vocabulary
        own.chat_template = JINJA[template].read_text(encoding="utf-8")
        return ChatRenderer(own, end_ids)
    return BuiltinRenderer(tokenizer, template, end_ids)
