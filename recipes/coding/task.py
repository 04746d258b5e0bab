"""The coding task: read files and write a program, which hidden tests judge.

    cat a8          shows a file
    put SOURCE      writes solution.py and runs the visible tests; if all pass, the episode ends
    submit          ends the episode

Programs run in the sandbox and never see an expected value. The reward is 1 if every hidden test passes, else 0. An
episode has at most seven actions.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from buffer.tasks import TaskRow
from recipes.coding.demonstrator import Script
from recipes.coding.rows import make_rows
from rollout.environment import Demonstrator, Environment, Step
from rollout.sandbox.interface import Sandbox
from rollout.task import Task

# Calls f for each x from stdin and prints one result per line: an integer, or "?" for any other value.
RUNNER = """
import json, sys
space = {"__name__": "solution"}
exec(compile(open("solution.py").read(), "solution.py", "exec"), space)
for x in json.load(sys.stdin):
    y = space["f"](x)
    print(y if type(y) is int else "?")
"""


class CodingEnvironment(Environment):
    """One attempt at a row."""

    def __init__(self, row: TaskRow, sandbox: Sandbox) -> None:
        self.row = row
        self.sandbox = sandbox
        self.written = False

    async def start(self) -> str:
        await self.sandbox.write_files(dict(self.row.files))
        return self.row.prompt

    async def _results(self, xs: list[int]) -> list[str]:
        """Return the printed results of f at `xs`; fewer if the program failed."""
        return (await self.sandbox.run_python(RUNNER, stdin=json.dumps(xs))).stdout.split()

    async def step(self, action: str) -> Step:
        if action == "submit":
            return Step("", done=True)
        if action.startswith("cat "):
            try:
                return Step(await self.sandbox.read_file(action.removeprefix("cat ")))
            except (OSError, ValueError):
                return Step("err")
        if not action.startswith("put "):
            return Step("err")
        try:
            await self.sandbox.write_files({"solution.py": action.removeprefix("put ")})
        except (OSError, ValueError):  # an earlier program filled the workspace, or made a folder of this name
            return Step("err")
        self.written = True
        results = await self._results([x for x, _ in self.row.visible_tests])
        if len(results) != len(self.row.visible_tests):
            return Step("err")
        for (x, wanted), found in zip(self.row.visible_tests, results, strict=True):
            if found != str(wanted):
                return Step(f"f({x})={found}!={wanted}")
        return Step("", done=True)

    async def reward(self) -> float:
        if not self.written:
            return 0.0
        results = await self._results([x for x, _ in self.row.hidden_tests])
        return float(results == [str(wanted) for _, wanted in self.row.hidden_tests])


class CodingTask(Task):
    """The coding task. Its demonstrations are correct for the first `clean_fraction` of a warm start, then imperfect.

    The correct ones teach the actions; the others teach mistakes for reinforcement learning to correct. `noise` scales
    the probability of each mistake (1: the demo's).
    """

    def __init__(self, noise: float = 1.0, clean_fraction: float = 0.7, **options: Any) -> None:
        super().__init__(**options)
        self.noise = noise
        self.clean_fraction = clean_fraction

    def make_rows(self, split: str, count: int, seed: int) -> list[TaskRow]:
        return make_rows(split, count, seed)

    def make_model(self, folder: Path, seed: int) -> None:
        from recipes.coding.model import build_model  # transformers takes seconds to import

        build_model(folder, seed)

    def environment(self, row: TaskRow, sandbox: Sandbox) -> Environment:
        return CodingEnvironment(row, sandbox)

    def demonstrate(self, row: TaskRow, rng: random.Random, progress: float = 1.0) -> Demonstrator:
        return Script(row, rng, self.noise if progress >= self.clean_fraction else 0.0)
