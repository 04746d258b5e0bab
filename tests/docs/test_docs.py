"""README.md, docs/ and examples/ are correct: the example works, commands compose, links have targets."""

from __future__ import annotations

import asyncio
import json
import operator
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from enum import Enum
from pathlib import Path

import pytest
from tree import ROOT

from buffer.tasks import read_rows
from buffer.types import Episode, Status
from critic.config import Baseline, Credit, LambdaLength, Truncation
from launch.preflight import Machine
from recipes.coding.model import build_tokenizer
from rollout.agents.loop import ToolLoop
from rollout.agents.player import Attempt
from rollout.agents.script import ScriptedSampler
from rollout.config import RolloutConfig, SandboxConfig
from rollout.rendering.builtin import BuiltinRenderer
from rollout.sandbox.unsafe import SubprocessPool
from rollout.task import Task
from slime import TaskRow, cli
from slime.config import ConfigError, load
from slime.schema import Config
from slime.start.prepare import make_task
from trainer.config import KL, Correction, KLPlace, Loss, LossNorm

README = (ROOT / "README.md").read_text()
EXAMPLE = ROOT / "examples" / "lookup"
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
LINKED = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")])
LINKED += sorted((ROOT / "benchmarks").rglob("*.md"))
MAX_CELL = 160  # characters
ROOMY = Machine(num_cpus=2, free_memory_gb=16, free_disk_gb=50, free_temporary_gb=50, free_shm_gb=8, num_gpus=0)


def blocks(text: str, language: str) -> list[str]:
    """Return the code blocks of a language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the example as a user's own folder, and the current one."""
    for name in ("lookup.py", "recipes/recipe/sft_lookup.yaml", "recipes/recipe/ppo_lookup.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(EXAMPLE / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "lookup", raising=False)
    monkeypatch.setattr(Machine, "read", lambda count_gpus: ROOMY)


def play(task: Task, row: TaskRow, config: RolloutConfig, seed: int) -> Episode:
    """A demonstration in the policy's loop."""
    renderer = BuiltinRenderer(build_tokenizer(), "tiny")

    async def run() -> Episode:
        pool = SubprocessPool(SandboxConfig())
        sandbox = await pool.acquire()
        try:
            sampler = ScriptedSampler(task.demonstrate(row, random.Random(seed), 0.5), renderer)
            attempt = Attempt("e", row, 0, task.environment(row, sandbox), sampler)
            return await ToolLoop(renderer, config).play(attempt)
        finally:
            await pool.close()

    return asyncio.run(run())


@pytest.mark.usefixtures("_own_folder")
def test_the_examples_task_is_found_and_pays_for_right_answers_only() -> None:
    config = load(["recipe=ppo_lookup"]).config
    assert (config.model.start, load(["recipe=sft_lookup"]).config.task.target) == ("sft_lookup", config.task.target)
    task = make_task(config)
    rows = task.make_rows("train", 12, 0)
    assert not {row.id for row in rows} & {row.id for row in task.make_rows("eval", 12, 0)}
    for seed, row in enumerate(rows):
        episode = play(task, row, config.rollout, seed)
        assert episode.status is Status.FINISHED
        assert len(episode.turns) == 2
        right = row.hidden_tests[0] in episode.turns[0].observation  # the file was shown before the answer
        answer = build_tokenizer().decode(episode.turns[1].output_ids[:-1])
        assert right
        assert episode.reward == float(answer == row.hidden_tests[0])


@pytest.mark.usefixtures("_own_folder")
def test_a_module_that_is_not_there_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (elsewhere := tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)
    assert cli.main(["train", "recipe=ppo_lookup", "--recipes", str(tmp_path / "recipes")]) == 2
    assert f"no module lookup among the installed ones or in {elsewhere}" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert cli.main(["config", "recipe=ppo_lookup"]) == 0
    assert "this machine can run it" in capsys.readouterr().out


@pytest.mark.usefixtures("_own_folder")
def test_a_wrong_class_is_a_mistake_of_the_users() -> None:
    with pytest.raises(ConfigError, match="has no attribute 'Nope'"):
        make_task(load(["recipe=ppo_lookup", "task.target=lookup:Nope"]).config)


@pytest.mark.usefixtures("_own_folder")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_the_pages_compose(page: Path) -> None:
    for line in re.findall(r"^[\w./]*slime (?:train|config) (recipe=.*)$", page.read_text(), re.MULTILINE):
        load(shlex.split(line, comments=True))


def test_settings_named_by_the_algorithms_compose() -> None:
    page = (ROOT / "docs" / "algorithms.md").read_text()
    spans = re.findall(r"`((?:[a-z_]+\.[a-z_.]+=\S+ ?)+)`", page)
    assert len(spans) > 20
    for span in set(spans):
        alone = "policy.kl_in=" in span and "policy.kl_coef=" not in span  # named, and no effect by itself
        load(["recipe=ppo_coding", *span.split(), *(["policy.kl_coef=1e-3"] if alone else [])])


def test_the_algorithms_page_names_every_choice_and_default() -> None:
    page = (ROOT / "docs" / "algorithms.md").read_text()
    for choice in (Loss, LossNorm, Correction, KL, KLPlace, Baseline, Credit, LambdaLength, Truncation):
        for one in choice:
            assert re.search(rf"`(\S+=)?{one.value}`|={one.value}\b|\| {one.value} \|", page), one
    defaults = dict(re.findall(r"^\| `((?:advantage|critic)\.[a-z_.]+)` \| ([^|]+) \|", page, re.MULTILINE))
    assert len(defaults) >= 15
    for key, told in defaults.items():
        value = operator.attrgetter(key)(Config())
        text = value.value if isinstance(value, Enum) else str(value).lower() if isinstance(value, bool) else f"{value}"
        assert told == text or float(told) == value, key


def test_the_example_row_is_one(tmp_path: Path) -> None:
    (example,) = blocks((ROOT / "docs" / "tasks.md").read_text(), "json")
    (tmp_path / "rows.jsonl").write_text(json.dumps(json.loads(example)) + "\n")
    (row,) = read_rows(tmp_path / "rows.jsonl")
    assert row.budgets == {"max_turns": 12}


@pytest.mark.parametrize("page", [ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: page.name)
def test_table_cells_are_short_enough_to_read(page: Path) -> None:
    text = re.sub(r"\]\([^)]+\)", "]", page.read_text())  # what is seen of a link
    cells = [cell.strip() for line in re.findall(r"^\|.+\|$", text, re.MULTILINE) for cell in line.split("|")]
    assert [cell for cell in cells if len(cell) > MAX_CELL] == []


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site generate them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower())) for heading in headings}


def dead_links(page: Path) -> list[str]:
    """Return the links and pictures of a page whose file or heading does not exist in this checkout."""
    dead = []
    for link in re.findall(r"\[[^]]*\]\(([^)\s]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if "://" not in link and (not target.exists() or (anchor and anchor not in anchors(target))):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page: Path) -> None:
    assert dead_links(page) == []


def test_dead_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    page.write_text(
        "# A (b), `c`\n[x](#a-b-c) [x](a.md#a-b-c) ![x](no.svg) [x](#no) [x](a.md#no) [x](https://no/where)"
    )
    assert dead_links(page) == ["no.svg", "#no", "a.md#no"]


def test_the_examples_task_imports_nothing_heavy() -> None:
    """Every rollout worker imports the task's module."""
    check = "import sys, lookup\nassert not {'torch', 'transformers', 'ray'} & set(sys.modules)"
    path = os.pathsep.join([str(EXAMPLE), str(ROOT)])
    subprocess.run([sys.executable, "-c", check], env={**os.environ, "PYTHONPATH": path}, check=True, timeout=60)


def test_the_readme_shows_lines_of_the_example() -> None:
    (shown,) = blocks(README, "python")
    assert len(shown.splitlines()) <= 15
    assert textwrap.indent(shown, "    ") in (EXAMPLE / "lookup.py").read_text()
