"""Rows of the coding task, generated from a seed.

A row asks for a Python function. Its four constants are in four files, and one of its operators is hidden:

    prompt           f=lambda x:a*x*x?b*x-c+d;a8b9c6d2        `?` is + or -; a is in file a8, b in b9, ...
    file a8          e=12;g=19;a=17;...                       twelve facts, one of which is needed
    visible tests    [[x, f(x)], ...]                         two; they run whenever a program is written
    hidden tests     four, at larger x                        they determine the reward
"""

from __future__ import annotations

import random

from buffer.tasks import TaskRow

VARIABLES = "abcd"
OTHER_NAMES = "eghijklmnopqrstuvz"
LOWEST, HIGHEST = 10, 25
FACTS_PER_FILE, NUM_FILES = 12, 10


def program(constants: dict[str, int], stub: str, operator: str) -> str:
    """Return the source of a solution: constants, then the stub with its operator filled in."""
    facts = "".join(f"{name}={number};" for name, number in constants.items())
    return facts + stub.replace("?", operator)


def stub_of(prompt: str) -> tuple[str, list[str]]:
    """Return the stub and the four file names of a prompt."""
    stub, names = prompt.split(";")
    return stub, [names[i : i + 2] for i in range(0, len(names), 2)]


def _value(constants: dict[str, int], signs: str, x: int) -> int:
    a, b, c, d = constants.values()
    b, c, d = (-k if sign == "-" else k for k, sign in zip((b, c, d), signs, strict=True))
    return a * x * x + b * x + c + d


def make_row(identifier: str, rng: random.Random) -> TaskRow:
    """Return one random row."""
    digits = rng.sample(range(10), NUM_FILES)
    letters = [*VARIABLES, *rng.sample(OTHER_NAMES, NUM_FILES - len(VARIABLES))]
    names = [f"{letter}{digit}" for letter, digit in zip(letters, digits, strict=True)]
    constants = {name: rng.randint(LOWEST, HIGHEST) for name in VARIABLES}
    files = {}
    for name in names:
        needed = name[0] in constants
        facts = [f"{n}={rng.randint(LOWEST, HIGHEST)}" for n in rng.sample(OTHER_NAMES, FACTS_PER_FILE - needed)]
        if needed:
            facts.insert(rng.randrange(FACTS_PER_FILE), f"{name[0]}={constants[name[0]]}")
        files[name] = ";".join(facts)
    signs = "".join(rng.choice("+-") for _ in range(3))
    visible, hidden = rng.sample(range(2, 10), 2), rng.sample(range(10, 60), 4)
    return TaskRow(
        id=identifier,
        domain="coding",
        prompt=f"f=lambda x:a*x*x?b*x{signs[1]}c{signs[2]}d;" + "".join(names[: len(VARIABLES)]),
        files=files,
        visible_tests=tuple([x, _value(constants, signs, x)] for x in visible),
        hidden_tests=tuple([x, _value(constants, signs, x)] for x in hidden),
        budgets={"max_turns": 7},
    )


def make_rows(split: str, count: int, seed: int) -> list[TaskRow]:
    """Return `count` rows. Each split has its own random generators."""
    return [make_row(f"{split}-{seed}-{i}", random.Random(f"coding {split} {seed} {i}")) for i in range(count)]
