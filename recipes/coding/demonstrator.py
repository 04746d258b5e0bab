"""Imperfect demonstrations: a script that plays a row and makes mistakes that training should correct.

It loses facts in summaries, guesses constants it has not read, repeats an operator that has failed, or gives up. A
policy that imitates it solves some tasks and has seen every action that a solution needs.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, fields

from buffer.tasks import TaskRow
from recipes.coding.rows import HIGHEST, LOWEST, VARIABLES, program, stub_of
from rollout.environment import Demonstrator

FLIPPED = {"+": "-", "-": "+"}


@dataclass(frozen=True)
class Noise:
    """The probability of each mistake."""

    off_topic: float = 0.15  # a summary that lists the last file instead of the facts
    drop: float = 0.12  # a summary that loses a fact
    wrong_digit: float = 0.02  # a summary that changes a fact
    give_up: float = 0.20  # submit after a failed test
    repeat: float = 0.05  # write the failed operator again
    guess: float = 0.10  # write before all constants are known
    reread: float = 0.04  # read a random file, possibly again

    def scaled(self, factor: float) -> Noise:
        return Noise(**{f.name: min(1.0, factor * getattr(self, f.name)) for f in fields(self)})


class Script(Demonstrator):
    """Plays one row. Like the policy, it uses only facts that it has read or carried over in a summary."""

    def __init__(self, row: TaskRow, rng: random.Random, noise: float) -> None:
        self.stub, self.names = stub_of(row.prompt)
        self.files = row.files
        self.rng = rng
        self.noise = Noise().scaled(noise)
        self.known: dict[str, int] = {}
        self.last_file: str | None = None
        self.failed: str | None = None  # operator of the last program that failed its tests
        self.compacted = False

    def _happens(self, chance: float) -> bool:
        return self.rng.random() < chance

    def _guess(self) -> int:
        return self.rng.randint(LOWEST, HIGHEST)

    def action(self) -> str:
        if self.failed is not None:
            if self._happens(self.noise.give_up):
                return "submit"
            again = self._happens(self.noise.repeat)
            return self._write(self.failed if again else FLIPPED[self.failed])
        missing = [i for i, name in enumerate(VARIABLES) if name not in self.known]
        guesses = self.compacted and bool(missing) and missing[0] < 2 and self._happens(self.noise.guess)
        if not missing or guesses:
            return self._write(self.rng.choice("+-"))
        i = self.rng.randrange(len(VARIABLES)) if self._happens(self.noise.reread) else missing[0]
        self.last_file = self.names[i]
        facts = dict(fact.split("=") for fact in self.files[self.last_file].split(";"))
        self.known[VARIABLES[i]] = int(facts[VARIABLES[i]])
        return f"cat {self.last_file}"

    def _write(self, operator: str) -> str:
        self.failed = operator  # if the program passes, the episode ends
        constants = {name: self.known.get(name, self._guess()) for name in VARIABLES}
        return "put " + program(constants, self.stub, operator)

    def summary(self) -> str:
        facts = [f"{name}={self.known[name]}" for name in VARIABLES if name in self.known]
        chance = self.rng.random()
        n = self.noise
        if chance < n.off_topic and self.last_file is not None:
            facts = self.files[self.last_file].split(";")[: len(VARIABLES)]
        elif chance < n.off_topic + n.drop and facts:
            facts.pop(self.rng.randrange(len(facts)))
        elif chance < n.off_topic + n.drop + n.wrong_digit and facts:
            i = self.rng.randrange(len(facts))
            facts[i] = f"{facts[i][0]}={self._guess()}"
        self.compacted = True
        self.known = {fact[0]: int(fact[2:]) for fact in facts if fact[0] in VARIABLES}
        self.last_file = None
        return ";".join(facts)
