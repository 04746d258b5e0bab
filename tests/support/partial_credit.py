"""A user's task in a separate folder: the coding task with partial rewards, which even a weak policy receives."""

from __future__ import annotations

from buffer.tasks import TaskRow
from recipes.coding import CodingTask
from recipes.coding.rows import stub_of
from recipes.coding.task import CodingEnvironment
from slime import Environment, Sandbox, Step


class Reader(CodingEnvironment):
    """Gives a reward of 1/5 for each file of the prompt that was read, and 1/5 for the program."""

    def __init__(self, row: TaskRow, sandbox: Sandbox) -> None:
        super().__init__(row, sandbox)
        self.read: set[str] = set()

    async def step(self, action: str) -> Step:
        if action.startswith("cat "):
            self.read.add(action.removeprefix("cat "))
        return await super().step(action)

    async def reward(self) -> float:
        wanted = set(stub_of(self.row.prompt)[1])
        return (len(wanted & self.read) + await super().reward()) / (len(wanted) + 1)


class PartialCredit(CodingTask):
    def environment(self, row: TaskRow, sandbox: Sandbox) -> Environment:
        return Reader(row, sandbox)
