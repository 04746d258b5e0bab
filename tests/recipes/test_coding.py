"""The coding task: its rows, its judge in the real sandbox, and programs that try to cheat."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Sequence

import numpy as np
import pytest
from sandboxes import CONFIG, needs_bubblewrap, opened

from buffer.tasks import TaskRow
from buffer.trace import cut
from buffer.types import Episode, Status, TurnKind
from recipes.coding import CodingTask
from recipes.coding.demonstrator import FLIPPED, Noise, Script
from recipes.coding.model import build_tokenizer, vocabulary
from recipes.coding.rows import FACTS_PER_FILE, NUM_FILES, VARIABLES, make_rows, program, stub_of
from rollout.agents.loop import ToolLoop
from rollout.agents.player import Attempt
from rollout.agents.script import ScriptedSampler
from rollout.config import SandboxConfig
from rollout.environment import Step
from rollout.rendering.builtin import BuiltinRenderer
from rollout.sandbox.bubblewrap import BubblewrapPool
from rollout.sandbox.interface import RunResult, Sandbox, SandboxPool
from slime.config import load

ROWS = make_rows("train", 300, seed=0)
ROW = ROWS[0]
RECIPE = load(["recipe=ppo_coding"], None).config


def constants_of(row: TaskRow) -> dict[str, int]:
    """Return a row's four constants, from its files."""
    _, names = stub_of(row.prompt)
    facts = dict(fact.split("=") for name in names for fact in row.files[name].split(";"))
    return {name: int(facts[name]) for name in VARIABLES}


def evaluated(source: str, x: int) -> int:
    space: dict[str, object] = {}
    exec(source, space)
    return space["f"](x)  # type: ignore[operator]


def solution(row: TaskRow) -> tuple[str, str]:
    """Return the right operator and the wrong one."""
    stub, _ = stub_of(row.prompt)
    x, wanted = row.hidden_tests[0]
    (right,) = (sign for sign in "+-" if evaluated(program(constants_of(row), stub, sign), x) == wanted)
    return right, FLIPPED[right]


def source_of(row: TaskRow, operator: str) -> str:
    return program(constants_of(row), stub_of(row.prompt)[0], operator)


# Rows ---------------------------------------------------------------------------------------------------------------


def test_every_row_has_one_solution_that_its_files_decide() -> None:
    for row in ROWS:
        _, names = stub_of(row.prompt)
        assert [name[0] for name in names] == list(VARIABLES)
        assert len(row.files) == NUM_FILES
        assert all(len(text.split(";")) == FACTS_PER_FILE for text in row.files.values())
        right, wrong = solution(row)
        for sign, passes in ((right, True), (wrong, False)):
            for x, wanted in (*row.visible_tests, *row.hidden_tests):
                assert (evaluated(source_of(row, sign), x) == wanted) is passes
        assert {x for x, _ in row.visible_tests}.isdisjoint(x for x, _ in row.hidden_tests)
        assert (len(row.visible_tests), len(row.hidden_tests)) == (2, 4)


def test_each_constant_is_needed() -> None:
    """A program that is wrong in one of them fails every hidden test."""
    for row in ROWS[:50]:
        for name in VARIABLES:
            constants = constants_of(row)
            constants[name] += 1
            source = program(constants, stub_of(row.prompt)[0], solution(row)[0])
            assert all(evaluated(source, x) != wanted for x, wanted in row.hidden_tests)


def test_rows_come_from_the_seed_alone_and_splits_share_nothing() -> None:
    assert make_rows("train", 300, 0) == ROWS
    assert make_rows("train", 10, 0) == ROWS[:10]
    assert make_rows("train", 300, 1)[0].files != ROW.files
    held_out = make_rows("eval", 300, 0)
    for what in (lambda r: r.id, lambda r: json.dumps(r.files, sort_keys=True)):
        assert {what(row) for row in ROWS}.isdisjoint(what(row) for row in held_out)
    signs = [solution(row)[0] for row in ROWS]
    assert 0.4 < signs.count("+") / len(signs) < 0.6  # always the same operator solves half of them


def test_the_tokenizer_has_a_token_for_everything_in_the_task() -> None:
    tokenizer = build_tokenizer()
    assert len(set(vocabulary())) == len(vocabulary()) == len(tokenizer)
    renderer = BuiltinRenderer(tokenizer, "tiny")
    texts = {"", "submit", "err", "cat a8"}
    for row in ROWS[:100]:
        texts |= {row.prompt, *row.files.values(), *(source_of(row, sign) for sign in "+-")}
        texts |= {f"put {source_of(row, '+')}", ";".join(f"{k}={v}" for k, v in constants_of(row).items())}
        texts |= {f"f({x})={wanted + 1}!={wanted}" for x, wanted in row.visible_tests}
        script = Script(row, random.Random(row.id), noise=5.0)
        texts |= {text for _ in range(6) for text in (script.action(), script.summary())}
    for text in texts:
        ids = renderer.encode_reply(text)
        assert tokenizer.unk_token_id not in ids, text
        assert renderer.sampled_text(np.array(ids)) == text
    longest = max(len(renderer.encode_reply("put " + source_of(row, "-"))) for row in ROWS)
    assert longest <= RECIPE.rollout.max_turn_tokens


def test_noise_is_a_probability_of_each_mistake() -> None:
    assert Noise().scaled(0) == Noise(0, 0, 0, 0, 0, 0, 0)
    assert max(vars(Noise().scaled(1e9)).values()) == 1.0
    with pytest.raises(ValueError, match=r"task\.options\.noize: CodingTask takes no options"):
        CodingTask(noize=1.0)


# The judge, in the real sandbox -------------------------------------------------------------------------------------


async def _attempt(pool: SandboxPool, row: TaskRow, actions: Sequence[str]) -> tuple[list[Step], float]:
    sandbox = await pool.acquire()
    try:
        environment = CodingTask().environment(row, sandbox)
        assert await environment.start() == row.prompt
        return [await environment.step(action) for action in actions], await environment.reward()
    finally:
        await pool.release(sandbox)


def attempts(*games: tuple[TaskRow, Sequence[str]]) -> list[tuple[list[Step], float]]:
    """Return the answers and the reward for each list of actions."""

    async def main() -> list[tuple[list[Step], float]]:
        async with opened(BubblewrapPool(CONFIG)) as pool:
            return list(await asyncio.gather(*(_attempt(pool, row, actions) for row, actions in games)))

    return asyncio.run(main())


@needs_bubblewrap
def test_right_and_wrong_programs() -> None:
    right, wrong = solution(ROW)
    good, bad = "put " + source_of(ROW, right), "put " + source_of(ROW, wrong)
    name = stub_of(ROW.prompt)[1][0]
    as_text = good.replace("lambda x:", "lambda x:str(") + ")"
    solved, spelled, failed, mended, read, empty = attempts(
        (ROW, [good]),
        (ROW, [as_text, "submit"]),
        (ROW, [bad, "submit"]),
        (ROW, [bad, good]),
        (ROW, [f"cat {name}", "cat q", "cat ../etc/passwd", "cat /etc/passwd", "ls", "", "put", "submit"]),
        (ROW, ["submit"]),
    )
    assert solved == ([Step("", done=True)], 1.0)
    x, wanted = ROW.visible_tests[0]
    assert spelled == ([Step(f"f({x})=?!={wanted}"), Step("", done=True)], 0.0)  # numbers are asked for
    assert failed == ([Step(f"f({x})={evaluated(source_of(ROW, wrong), x)}!={wanted}"), Step("", done=True)], 0.0)
    assert mended[1] == 1.0
    assert read == ([Step(ROW.files[name]), *[Step("err")] * 6, Step("", done=True)], 0.0)
    assert empty[1] == 0.0


HASTY = SandboxConfig(run_timeout_s=0.4, num_prestarted=0)
FRAUDS = {
    "a table of the visible tests": f"f={{{','.join(f'{x}:{y}' for x, y in ROW.visible_tests)}}}.get",
    "a table with a default": f"f=lambda x:{dict(ROW.visible_tests)}.get(x,0)",
    "prints the right numbers": "print(*[1,2,3,4],sep='\\n');f=lambda x:0",
    "prints and exits": "print(1);print(2);import os;os._exit(0)",
    "exits": "raise SystemExit(0)",
    "never ends": "while True:pass",
    "f never ends": "def f(x):\n while True:pass",
    "not a program": "f=lambda x:a*x*x?b",
    "no f": "g=1",
    "not a function": "f=7",
    "equal to everything": "class A(int):\n __eq__=lambda s,o:True\n __str__=lambda s:'0'\nf=lambda x:A(0)",
    "its type lies": "class A:\n __class__=int\nf=lambda x:A()",
    "text, not a number": "f=lambda x:'81'",
    "floods": "print('1\\n'*10**6);f=lambda x:1",
    "replaces print": "import builtins;builtins.print=lambda *a:0;f=lambda x:0",
    "replaces type": "import builtins;builtins.type=lambda y:int;f=lambda x:True",
    "reads the workspace": "import os;t=''.join(open(n).read() for n in os.listdir());f=lambda x:len(t)",
    "reads what it can find": (
        "import os\n"
        "def text(p):\n"
        "    try: return open(p,errors='replace').read(100000)\n"
        "    except OSError: return ''\n"
        "found=''.join(text(d+'/'+n) for top in ('/box','/tmp','/dev/shm') for d,_,ns in os.walk(top) for n in ns)\n"
        "found+=text('/proc/self/environ')+text('/proc/self/cmdline')+text('/proc/1/environ')+text('/proc/1/cmdline')\n"
        "import re;numbers=re.findall('[0-9]{3,}',found)\n"
        "f=lambda x:int(numbers[0]) if numbers else 0"
    ),
    "leaves a program behind": (
        "open('json.py','w').write('load=lambda f:[]\\ndumps=str');open('sitecustomize.py','w').write('print(1)')\n"
        "f=lambda x:0"
    ),
    "remembers what it was asked": (
        "import os\n"
        "def f(x):\n"
        "    open('seen','a').write(f'{x} ')\n"
        "    return len(open('seen').read())"
    ),
}  # fmt: skip


@needs_bubblewrap
def test_programs_that_cheat_earn_nothing() -> None:
    async def main() -> dict[str, tuple[list[Step], float]]:
        results = {}
        async with opened(BubblewrapPool(CONFIG)) as pool, opened(BubblewrapPool(HASTY)) as hasty_pool:
            for name, source in FRAUDS.items():
                chosen = hasty_pool if "never ends" in name else pool
                results[name] = await _attempt(chosen, ROW, ["put " + source, "submit"])
        return results

    results = asyncio.run(main())
    assert {name: reward for name, (_, reward) in results.items() if reward} == {}
    for steps, _ in results.values():
        for _, wanted in ROW.hidden_tests:
            assert all(str(wanted) not in step.observation for step in steps)


class Listening:
    """A sandbox that records all of its inputs."""

    def __init__(self, inner: Sandbox) -> None:
        self.inner = inner
        self.sent = ""

    async def write_files(self, files: dict[str, str]) -> None:
        self.sent += json.dumps(files)
        await self.inner.write_files(files)

    async def read_file(self, path: str) -> str:
        return await self.inner.read_file(path)

    async def run_python(self, source: str, stdin: str = "") -> RunResult:
        self.sent += source + stdin
        return await self.inner.run_python(source, stdin)

    async def run(self, argv: list[str], stdin: str = "") -> RunResult:
        raise AssertionError("the task runs no other commands")


@needs_bubblewrap
def test_expected_values_never_enter_the_sandbox() -> None:
    async def main() -> tuple[str, float]:
        async with opened(BubblewrapPool(CONFIG)) as pool:
            sandbox = Listening(await pool.acquire())
            environment = CodingTask().environment(ROW, sandbox)
            await environment.start()
            for sign in solution(ROW)[::-1]:
                await environment.step("put " + source_of(ROW, sign))
            reward = await environment.reward()
            return sandbox.sent, reward

    sent, reward = asyncio.run(main())
    assert reward == 1.0
    numbers = set(re.findall(r"\d+", sent))
    assert {str(x) for x, _ in ROW.hidden_tests} <= numbers  # the program must receive the arguments of f
    assert numbers.isdisjoint(str(abs(wanted)) for _, wanted in (*ROW.visible_tests, *ROW.hidden_tests))


# The demonstrator, in the recipe's window ----------------------------------------------------------------------------


def demonstrations(rows: Sequence[TaskRow], noise: float) -> list[Episode]:
    task, renderer = CodingTask(noise), BuiltinRenderer(build_tokenizer(), RECIPE.model.template)

    async def one(pool: SandboxPool, index: int, row: TaskRow) -> Episode:
        sandbox = await pool.acquire()
        try:
            sampler = ScriptedSampler(task.demonstrate(row, random.Random(row.id)), renderer)
            attempt = Attempt(row.id, row, index, task.environment(row, sandbox), sampler)
            return await ToolLoop(renderer, RECIPE.rollout).play(attempt)
        finally:
            await pool.release(sandbox)

    async def main() -> list[Episode]:
        async with opened(BubblewrapPool(CONFIG)) as pool:
            return list(await asyncio.gather(*(one(pool, i, row) for i, row in enumerate(rows))))

    return asyncio.run(main())


@needs_bubblewrap
def test_perfect_play_earns_1_and_needs_compactions() -> None:
    for episode in demonstrations(ROWS[:10], noise=0.0):
        assert (episode.reward, episode.status) == (1.0, Status.FINISHED)
        summaries = [turn for turn in episode.turns if turn.kind is TurnKind.SUMMARY]
        assert len(summaries) >= 2
        sub_traces = cut(episode)
        assert len(sub_traces) == len(summaries) + 1 >= 3
        window = RECIPE.rollout.compaction.context_tokens
        assert max(len(s.tokens) for s in sub_traces) <= window
        assert all(turn.finish_reason == "stop" for turn in episode.turns)  # every text fits its budget


@needs_bubblewrap
def test_noisy_play_earns_less() -> None:
    rewards = [episode.reward for episode in demonstrations(ROWS[:24], noise=3.0)]
    assert sum(rewards) <= 12
