"""The built-in chat template with tools: its text, and that what is appended never changes the past."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from chat_templates import SMOLLM2, chat_tokenizer

from rollout.rendering.factory import make_renderer
from rollout.rendering.messages import Prompt
from rollout.rendering.templates import JINJA

TOOL = {"type": "function", "function": {"name": "ls", "description": "Lists.", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "ls", "arguments": {"path": "a"}}}
TEXT_CALL = {"id": "2", "type": "function", "function": {"name": "ls", "arguments": '{"path": "b"}'}}


def shown(messages: list[dict[str, Any]], tools: list[Any] | None = None, opened: bool = False) -> str:
    tokenizer = chat_tokenizer(JINJA["hermes"].read_text())
    text: str = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=opened)
    return text


def test_a_conversation_with_tools_is_this_text() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "there?"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL, TEXT_CALL]},
        {"role": "tool", "tool_call_id": "1", "content": "x.py"},
        {"role": "tool", "tool_call_id": "2", "content": ""},
        {"role": "assistant", "content": "Again.", "reasoning_content": "Hm.", "tool_calls": [CALL]},
    ]
    call = '<tool_call>\n{"name": "ls", "arguments": {"path": "%s"}}\n</tool_call>'
    assert shown(messages, [TOOL], opened=True) == (
        "<|im_start|>system\nBe brief.\n\n# Tools\n\nYou may call one or more functions. Their signatures are within "
        f"<tools></tools>:\n<tools>\n{json.dumps(TOOL)}\n</tools>\n\nFor each call, return a JSON object with the name "
        "and the arguments of the function within <tool_call></tool_call>:\n<tool_call>\n"
        '{"name": <name>, "arguments": <arguments>}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nWhat is there?<|im_end|>\n"
        f"<|im_start|>assistant\n{call % 'a'}\n{call % 'b'}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nx.py\n</tool_response><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n\n</tool_response><|im_end|>\n"
        f"<|im_start|>assistant\n<think>\nHm.\n</think>\n\nAgain.\n{call % 'a'}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_without_tools_and_system_message_it_is_plain_chatml() -> None:
    said = {"role": "assistant", "content": "b"}
    assert shown([{"role": "user", "content": "a"}, said]) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    )
    assert shown([{"role": "assistant"}]) == "<|im_start|>assistant\n<|im_end|>\n"  # no content at all


@pytest.mark.parametrize("seed", range(20))
def test_each_message_only_extends_the_text(seed: int) -> None:
    rng = random.Random(seed)
    kinds: list[dict[str, Any]] = [
        {"role": "user", "content": "u"},
        {"role": "system", "content": "s"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "assistant", "content": "a", "reasoning_content": "r"},
        {"role": "assistant", "content": None},
        {"role": "tool", "content": "t"},
    ]
    tools = rng.choice([None, [TOOL]])
    messages = [rng.choice(kinds) for _ in range(8)]
    for end in range(1, len(messages)):
        assert shown(messages[: end + 1], tools).startswith(shown(messages[:end], tools))


def test_contexts_keep_the_ids_of_the_past() -> None:
    """Answers that are cut, contain markup or reasoning stay as they were sampled."""
    tokenizer = chat_tokenizer(SMOLLM2)
    renderer = make_renderer(tokenizer, "hermes")
    assert tokenizer.chat_template == SMOLLM2  # the caller's tokenizer keeps its own
    context = renderer.start(Prompt(({"role": "user", "content": "Go."},), (TOOL,)))
    for text in ('<tool_call>\n{"name": "ls"}\n</tool_call>', "<think>x</think> y ", "", "\n z"):
        said = renderer.encode_reply(text)
        before = (*context.ids, *said)
        context = renderer.observe(context.answered(said, text), "<|im_end|>file", 9999)
        assert context.ids[: len(before)] == before
    asked = renderer.ask_summary(context)
    assert asked.ids[: len(before)] == before
    assert "<tools>" in tokenizer.decode(list(asked.ids))
