"""What README.md and docs/ show is true: the task in the README works, commands compose, files that are named exist."""

from __future__ import annotations

import asyncio
import json
import operator
import random
import re
import shlex
import subprocess
import sys
from enum import Enum
from pathlib import Path

import pytest

from buffer.tasks import read_rows
from buffer.types import Episode, Status
from critic.config import Baseline, Credit, LambdaLength, Truncation
from launch.preflight import Machine
from recipes.coding.model import build_tokenizer
from rollout.agent import Agent, ScriptedSampler
from rollout.config import RolloutConfig, SandboxConfig
from rollout.environment import Task
from rollout.rendering import Renderer
from rollout.sandbox.unsafe import SubprocessPool
from slime import TaskRow, cli
from slime.config import ConfigError, load
from slime.schema import Config
from slime.start.prepare import make_task
from trainer.config import KL, Correction, KLPlace, Loss, LossNorm

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
ROOMY = Machine(num_cpus=2, free_memory_gb=16, free_disk_gb=50, free_temporary_gb=50, free_shm_gb=8, num_gpus=0)


def blocks(text: str, language: str) -> list[str]:
    """Code blocks of a language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder `mine/` of the README as the current one."""
    (tmp_path / "recipes" / "recipe").mkdir(parents=True)
    (source,) = blocks(README, "python")
    (tmp_path / "lookup.py").write_text(source)
    for name, text in zip(("sft_lookup", "ppo_lookup"), blocks(README, "yaml"), strict=True):
        (tmp_path / "recipes" / "recipe" / f"{name}.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "lookup", raising=False)
    monkeypatch.setattr(Machine, "read", lambda count_gpus: ROOMY)


def play(task: Task, row: TaskRow, config: RolloutConfig, seed: int) -> Episode:
    """A demonstration in the loop that the policy plays in."""
    renderer = Renderer(build_tokenizer(), "tiny")

    async def run() -> Episode:
        pool = SubprocessPool(SandboxConfig())
        sandbox = await pool.acquire()
        try:
            sampler = ScriptedSampler(task.demonstrate(row, random.Random(seed), 0.5), renderer)
            return await Agent(sampler, renderer, config).run(row, 0, task.environment(row, sandbox), "e")
        finally:
            await pool.close()

    return asyncio.run(run())


@pytest.mark.usefixtures("_own_folder")
def test_the_readmes_task_is_found_and_pays_for_right_answers_only() -> None:
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = [link.partition("#")[0] for link in re.findall(r"(?<!!)\[[^]]+\]\(([^)]+)\)", page.read_text())]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_readmes_task_imports_nothing_heavy() -> None:
    """What a rollout worker pays for it."""
    (source,) = blocks(README, "python")
    check = f"import sys\nexec({source!r})\nassert not {{'torch', 'transformers', 'ray'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)
