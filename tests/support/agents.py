"""Scripted players and a small environment, for tests of the loop in which an agent acts."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import numpy as np

from buffer.tasks import TaskRow
from buffer.types import Bool, Episode, Float32, Int32, TurnKind
from recipes.coding.model import build_tokenizer
from rollout.agents.loop import ToolLoop
from rollout.agents.player import Attempt
from rollout.config import CompactionConfig, RolloutConfig
from rollout.environment import Environment, Step
from rollout.rendering.builtin import BuiltinRenderer
from rollout.rendering.renderer import Renderer

TOKENIZER = build_tokenizer()
TINY = BuiltinRenderer(TOKENIZER, "tiny")
USER, TOOL, COMPACT, SUMMARY, STOP = (TOKENIZER.convert_tokens_to_ids(t) for t in ("<u>", "<t>", "<c>", "<s>", "$"))
ROW = TaskRow("r", "test", "")
CONTEXT, RESERVE, SUMMARY_TOKENS = 60, 20, 6


def settings_of(max_turns: int = 50, max_turn_tokens: int = 10, **compaction: int) -> RolloutConfig:
    numbers = {"context_tokens": CONTEXT, "reserve_tokens": RESERVE, "summary_tokens": SUMMARY_TOKENS} | compaction
    return RolloutConfig(max_turns=max_turns, max_turn_tokens=max_turn_tokens, compaction=CompactionConfig(**numbers))


def ids(text: str) -> list[int]:
    """Return one id per letter: these tests contain no words of the vocabulary."""
    return [TOKENIZER.convert_tokens_to_ids(letter) for letter in text]


@dataclass(frozen=True)
class Said:
    output_ids: Int32
    logprobs: Float32
    versions: Int32
    stale_mask: Bool
    finish_reason: str


class Player:
    """Samples the given texts, one per turn, and records its prompts."""

    def __init__(self, *texts: str, finish_reason: str = "stop") -> None:
        self.texts = list(texts)
        self.last_reason = finish_reason
        self.asked: list[tuple[list[int], int, TurnKind]] = []

    async def sample(self, prompt_ids: list[int], max_tokens: int, kind: TurnKind) -> Said:
        self.asked.append((list(prompt_ids), max_tokens, kind))
        said = np.array([*ids(self.texts.pop(0)), STOP], np.int32)
        reason = "stop" if self.texts else self.last_reason
        logprobs, versions = -np.arange(len(said), dtype=np.float32), np.full(len(said), len(self.asked))
        return Said(said, logprobs, versions, np.arange(len(said)) == 1, reason)


class World(Environment):
    """Answers with the given texts; the episode ends after the last one."""

    def __init__(self, task: str, *answers: str) -> None:
        self.task = task
        self.answers = list(answers)
        self.heard: list[str] = []

    async def start(self) -> str:
        return self.task

    async def step(self, action: str) -> Step:
        self.heard.append(action)
        return Step(self.answers.pop(0)) if self.answers else Step("", done=True)

    async def reward(self) -> float:
        return 0.5


def play(player: Any, world: World, config: RolloutConfig, row: TaskRow = ROW, renderer: Renderer = TINY) -> Episode:
    return asyncio.run(ToolLoop(renderer, config).play(Attempt("e", row, 3, world, player)))


def byte_tokenizer() -> Any:
    """A tokenizer of bytes and the markup of chat models."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=marks[1], additional_special_tokens=marks)
