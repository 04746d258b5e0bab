"""An example task: one of four files contains a fact; the agent reads that file and answers with the fact."""

from __future__ import annotations

import random
from pathlib import Path

from slime import Demonstrator, Environment, Sandbox, Step, Task, TaskRow


class Lookup(Environment):
    """`cat FILE` shows a file; anything else is the answer and ends the episode."""

    def __init__(self, row: TaskRow, sandbox: Sandbox) -> None:
        self.row, self.sandbox, self.answer = row, sandbox, ""

    async def start(self) -> str:
        await self.sandbox.write_files(dict(self.row.files))
        return self.row.prompt

    async def step(self, action: str) -> Step:
        if action.startswith("cat "):
            try:
                return Step(await self.sandbox.read_file(action.removeprefix("cat ")))
            except (FileNotFoundError, ValueError):
                return Step("err")
        self.answer = action
        return Step("", done=True)

    async def reward(self) -> float:
        return float(self.answer == self.row.hidden_tests[0])


class Script(Demonstrator):
    """Reads the right file, then answers: with the fact in 7 of 10 cases, else with a guess."""

    def __init__(self, row: TaskRow, rng: random.Random) -> None:
        name, file = row.prompt.split("=?;")
        answer = row.hidden_tests[0] if rng.random() < 0.7 else f"{name}={rng.randint(10, 25)}"
        self.moves = [f"cat {file}", answer]

    def action(self) -> str:
        return self.moves.pop(0)

    def summary(self) -> str:
        return ""


class LookupTask(Task):
    """The task: rows are generated from a seed; model and tokenizer are the demo's, whose vocabulary is sufficient."""

    def make_rows(self, split: str, count: int, seed: int) -> list[TaskRow]:
        return [make_row(f"{split}-{seed}-{number}") for number in range(count)]

    def make_model(self, folder: Path, seed: int) -> None:
        from slime import build_model  # imported here because transformers takes seconds to import

        build_model(folder, seed)

    def environment(self, row: TaskRow, sandbox: Sandbox) -> Lookup:
        return Lookup(row, sandbox)

    def demonstrate(self, row: TaskRow, rng: random.Random, progress: float = 1.0) -> Script:
        return Script(row, rng)


def make_row(name: str) -> TaskRow:
    """Return the row of this name: four files with one fact each, and a question about one of them."""
    rng = random.Random(name)
    facts = {f"{letter}{rng.randint(0, 9)}": f"{letter}={rng.randint(10, 25)}" for letter in "abcd"}
    wanted = rng.choice(list(facts))
    return TaskRow(name, "lookup", f"{wanted[0]}=?;{wanted}", files=facts, hidden_tests=(facts[wanted],))
