"""A sampler that plays a script instead of the policy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from buffer.types import Bool, Float32, Int32, TurnKind
from rollout.agents.player import Sampled
from rollout.environment import Demonstrator, as_text
from rollout.rendering.renderer import Renderer


@dataclass(frozen=True)
class _Scripted:
    output_ids: Int32
    logprobs: Float32
    versions: Int32
    stale_mask: Bool
    finish_reason: str


class ScriptedSampler:
    """A sampler that takes the policy's turns from a demonstrator, so that both run through the same loop."""

    def __init__(self, demonstrator: Demonstrator, renderer: Renderer, name: str = "demonstration") -> None:
        self._name = name  # for messages
        self._demonstrator = demonstrator
        self._renderer = renderer

    async def sample(self, prompt_ids: list[int], max_tokens: int, kind: TurnKind) -> Sampled:
        asked = self._demonstrator.summary if kind is TurnKind.SUMMARY else self._demonstrator.action
        text = as_text(asked(), f"{self._name}: {type(self._demonstrator).__name__}.{asked.__name__}()")
        ids = np.asarray(self._renderer.encode_reply(text)[:max_tokens], np.int32)
        done = bool(len(ids)) and int(ids[-1]) == self._renderer.stop_id
        size = len(ids)
        zeros = np.zeros(size, np.float32), np.zeros(size, np.int32), np.zeros(size, np.bool_)
        return _Scripted(ids, *zeros, "stop" if done else "length")
