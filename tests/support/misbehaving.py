"""A task with a beginner's mistakes: half of its prompts fill the window, and its tool output is not clean text."""

from __future__ import annotations

from dataclasses import replace

from partial_credit import PartialCredit, Reader

from buffer.tasks import TaskRow
from slime import Environment, Sandbox, Step


class Careless(Reader):
    """Tool output ends in half a character; prompts of rows with an odd number are longer than the window."""

    async def start(self) -> str:
        prompt = await super().start()
        return prompt * 10 if int(self.row.id.rpartition("-")[2]) % 2 else prompt

    async def step(self, action: str) -> Step:
        step = await super().step(action)
        return replace(step, observation=step.observation + "\udcff")


class Misbehaving(PartialCredit):
    def environment(self, row: TaskRow, sandbox: Sandbox) -> Environment:
        return Careless(row, sandbox)
