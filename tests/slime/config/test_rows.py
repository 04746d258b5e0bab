"""Rows of a run: too few, too long for the window, or unreadable."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from roles import batch_of, seven_sub_traces

from buffer.tasks import TaskRow
from buffer.types import Batch, EpisodeStats
from recipes.coding.model import build_model
from rollout.worker import Played
from slime import Environment, Sandbox, Task, cli, loop
from slime.config import ConfigError, load
from slime.config.model import broken
from slime.config.rows import Overlong, overlong
from slime.observe.clock import Clock
from slime.schema import Config
from slime.sft import EPISODES_PER_CALL, MAX_WITHOUT_TURN, demonstrations
from slime.start.prepare import Prepared, prepare

PPO, SFT = "recipe=ppo_coding", "recipe=sft_coding"
WINDOW = ["rollout.compaction.context_tokens=104", "rollout.compaction.reserve_tokens=46"]
ROOM = 58


def written(path: Path, prompts: Sequence[str], encoding: str = "utf-8") -> Path:
    rows = [{"id": f"{path.stem}{k}", "domain": "d", "prompt": prompt} for k, prompt in enumerate(prompts)]
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(encoding))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build_model(folder, 0)
    return folder


def long(num_tokens: int) -> str:
    """Return a prompt that takes this many tokens in its context, including markup."""
    return "a" * (num_tokens - 2)


# Files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("recipe", [PPO, SFT])
def test_both_files_are_read_before_anything_starts(tmp_path: Path, split: str, recipe: str) -> None:
    rows = written(tmp_path / "rows.jsonl", ["a", "café"], "latin-1")
    with pytest.raises(ConfigError, match=rf"^task.{split}: .*rows\.jsonl:2: not UTF-8: byte 0xe9") as told:
        load([recipe, f"task.{split}={rows}"])
    assert "\n" not in str(told.value)


def test_rows_are_counted_as_they_are_read(tmp_path: Path) -> None:
    rows = written(tmp_path / "rows.jsonl", "abc")
    rows.write_bytes(b"\xef\xbb\xbf\r\n" + rows.read_bytes().replace(b"\n", b"\r\n\r\n"))
    assert load([PPO, f"task.eval={rows}", "eval.num_tasks=3"]).config.eval.num_tasks == 3
    with pytest.raises(ConfigError, match=r"eval.num_tasks=4, but .* has 3 rows: use at most 3"):
        load([PPO, f"task.eval={rows}", "eval.num_tasks=4"])
    load([SFT, f"task.eval={rows}"])  # which evaluates nothing


def test_training_and_evaluation_share_no_row(tmp_path: Path) -> None:
    rows = written(tmp_path / "rows.jsonl", "abc")
    with pytest.raises(ConfigError, match="task row 'rows0' is in both"):
        load([PPO, f"task.eval={rows}", f"task.train={rows}", "eval.num_tasks=3"])


class Maker(Task):
    """A task that makes the given rows."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def make_rows(self, split: str, count: int, seed: int) -> Any:
        return self.rows and [TaskRow(split[0] + row, "d", row) for row in self.rows]

    def environment(self, row: TaskRow, sandbox: Sandbox) -> Environment:
        raise NotImplementedError


def made(tmp_path: Path, model: Path, rows: Any, *more: str, recipe: str = PPO) -> Prepared:
    places = [f"cache_dir={tmp_path}", f"model.path={model}", "task.target=test_rows:Maker", *WINDOW, *more]
    config = load([recipe, *places]).config
    config = replace(config, task=replace(config.task, options={"rows": rows}))
    return prepare(config)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "no rows"),
        ([], "no rows"),
        (["x", "x"], "row 2: id 'tx' is already used on row 1"),
        (["\ud800"], "row 1: 'id' has half a surrogate pair"),
        (["x"], "eval.num_tasks=2, but .* has 1 rows: use at most 1"),
    ],
    ids=["None", "none", "twice", "half a character", "too few"],
)
def test_rows_that_a_task_makes_are_checked_like_files(tmp_path: Path, model: Path, rows: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"test_rows:Maker.make_rows\(.*{message}|^{message}"):
        made(tmp_path, model, rows, "eval.num_tasks=2")
    if message != "no rows":
        made(tmp_path, model, ["x", "y"], "eval.num_tasks=2")  # what was refused is not kept


def test_a_supervised_run_needs_no_rows_for_evaluation(tmp_path: Path, model: Path) -> None:
    rows = written(tmp_path / "rows.jsonl", ["a"])
    inputs = made(tmp_path, model, None, f"task.train={rows}", recipe=SFT)
    assert (len(inputs.train_rows), len(inputs.eval_rows)) == (1, 0)


# Prompts and the window ---------------------------------------------------------------------------------------------


def found(model: Path, prompts: Sequence[str]) -> Overlong | None:
    rows = [TaskRow(f"r{k}", "d", prompt) for k, prompt in enumerate(prompts)]
    return overlong(load([PPO, *WINDOW]).config, "train", rows, model)


def test_prompts_without_room_for_a_turn_are_named(model: Path) -> None:
    assert found(model, [long(ROOM)]) is None
    one = found(model, ["a", long(ROOM + 1), long(ROOM)])
    assert one is not None
    assert "1 of 3 prompts leave no room for a turn: row 'r1' with 59 tokens; at most 58 fit" in one.message
    assert "context_tokens=104 less reserve_tokens=46" in one.message
    assert not one.all
    many = found(model, [long(60 + k) for k in range(5)])
    assert many is not None
    assert "row 'r0' with 60 tokens, 'r1' with 61 tokens, 'r2' with 62 tokens and 2 more" in many.message
    assert many.all


def test_prompts_are_counted_by_the_tokenizers_own_template(model: Path, tmp_path: Path) -> None:
    """Here it writes what the built-in one does, so that the same rows are named; without one there is none to use."""
    folder, config = tmp_path / "own", load([PPO, *WINDOW, "model.template=tokenizer"]).config
    shutil.copytree(model, folder)
    (problem,) = broken(config, folder)
    assert problem.startswith(f"model.template=tokenizer: {folder} has no chat template (chat_template.jinja, or ")
    marks = "{'user': '<u>', 'tool': '<t>', 'assistant': ''}"
    template = "{% for m in messages %}{{ " + marks + "[m.role] + m.content + '$' }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    assert list(broken(config, folder)) == []
    rows = [TaskRow(f"r{k}", "d", long(size)) for k, size in enumerate([3, ROOM, ROOM + 1])]
    own = overlong(config, "train", rows, folder)
    assert own is not None
    assert own == overlong(load([PPO, *WINDOW]).config, "train", rows, folder)
    assert "row 'r2' with 59 tokens" in own.message


def test_tokens_count_and_bytes_only_save_the_counting(model: Path) -> None:
    assert found(Path("absent"), ["a" * 50, "é" * 25]) is None  # the tokenizer was not asked for
    assert found(model, ["a=17" * 50]) is None  # 200 bytes in 52 tokens
    with pytest.raises(ValueError, match="absent: its tokenizer can't be read"):
        found(Path("absent"), [long(300)])


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_run_names_them_before_it_starts_and_refuses_to_start_without_others(
    tmp_path: Path, model: Path, split: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = written(tmp_path / "mixed.jsonl", ["a", long(300)])
    inputs = made(tmp_path, model, ["x", "y"], f"task.{split}={mixed}", "eval.num_tasks=2")
    assert len(inputs.train_rows) == len(inputs.eval_rows) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"slime: note: task.{split}={mixed}: 1 of 2 prompts leave no room for a turn: row 'mixed1'")
    filled = written(tmp_path / "filled.jsonl", [long(300)] * 2)
    with pytest.raises(ConfigError, match=rf"task.{split}=.*filled.jsonl: 2 of 2 prompts leave no room for a turn"):
        made(tmp_path, model, ["x", "y"], f"task.{split}={filled}", "eval.num_tasks=2")


def test_evaluation_plays_the_first_rows_alone(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed = written(tmp_path / "mixed.jsonl", ["a", long(300)])
    made(tmp_path, model, ["x"], f"task.eval={mixed}", "eval.num_tasks=1")
    made(tmp_path, model, ["x"], f"task.eval={mixed}", recipe=SFT)
    assert capsys.readouterr().err == ""
    filled = written(tmp_path / "filled.jsonl", [long(300), "a"])
    with pytest.raises(ConfigError, match=r"filled.jsonl: 1 of 1 prompts leave no room for a turn"):
        made(tmp_path, model, ["x"], f"task.eval={filled}", "eval.num_tasks=1")


def test_slime_config_shows_them(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.doctor.machine.problems", lambda cluster, machine: [])
    mixed = written(tmp_path / "mixed.jsonl", ["a", long(300)])
    filled = written(tmp_path / "filled.jsonl", [long(300)] * 2)
    places = [f"model.path={model}", "model.start=''", f"cache_dir={tmp_path}"]
    for rows, code, begins in ((mixed, 0, "slime: note: "), (filled, 2, "slime: error: ")):
        assert cli.main(["config", PPO, *places, f"task.train={rows}", *WINDOW]) == code
        out, told = capsys.readouterr()
        assert told.startswith(f"{begins}task.train={rows}: ")
        assert "leave no room for a turn" in told
        assert ("this machine can run it" in out) == (code == 0)


# Episodes without a turn --------------------------------------------------------------------------------------------


def stats(reward: float = 1.0, tokens: int = 5, prompt: int = 9) -> EpisodeStats:
    return EpisodeStats(reward, num_sampled=tokens, prompt_tokens=prompt)


SILENT = stats(tokens=0, prompt=301)


class Notes(SimpleNamespace):
    """A watch that records the permanent lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        super().__init__(note=self.lines.append, sample_played=lambda *rest: None, rollout=lambda status: None)


def config_of(*overrides: str) -> Config:
    return load([PPO, *WINDOW, *overrides]).config


def evaluated(*of: EpisodeStats) -> tuple[dict[str, float], list[str]]:
    watch, played = Notes(), [Played(k, one) for k, one in enumerate(of)]
    run: Any = SimpleNamespace(
        clock=Clock(), check=None, rollout=SimpleNamespace(evaluate=lambda indices, keep, waiting: played)
    )
    return loop.evaluate(config_of(), run, watch, 3), watch.lines  # type: ignore[arg-type]


def test_an_evaluation_counts_what_was_sampled() -> None:
    metrics, lines = evaluated(SILENT, stats(1.0), SILENT, stats(0.0), stats(0.0), stats(0.0))
    assert metrics["eval/pass_rate"] == 0.25
    assert metrics["eval/pass_rate_stderr"] == pytest.approx((0.25 * 0.75 / 4) ** 0.5)
    assert (metrics["eval/num_tasks"], metrics["eval/num_without_turn"]) == (4, 2)
    assert lines == []


def test_an_evaluation_in_which_nothing_was_sampled_has_no_pass_rate() -> None:
    metrics, (line,) = evaluated(SILENT, stats(0.0, 0, 400))
    assert metrics == {"eval/num_tasks": 0, "eval/num_without_turn": 2}
    assert line.startswith(
        "evaluation of step 3 has no pass rate: the prompts of 2 episodes leave no room for a turn: "
    )
    assert "the shortest has 301 tokens, at most 58 fit" in line


class Taking:
    """A fake buffer that hands out the given batches and records the released steps."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        left, self.released = list(batches), list[int]()
        self.take = lambda waiting: left.pop(0)
        self.release = self.released.append


@pytest.mark.parametrize("num_empty", [0, 1, 2, 3])
def test_a_step_without_a_turn_is_passed_over_and_the_third_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, num_empty: int
) -> None:
    monkeypatch.setattr("ray.get", lambda refs, timeout=None: refs)
    traces = seven_sub_traces()
    empty = [Batch(step, (), (SILENT, stats(0.0, 0, 400))) for step in range(num_empty)]
    buffer, watch = Taking([*empty, batch_of(traces)]), Notes()
    run: Any = SimpleNamespace(clock=Clock(), buffer=buffer)
    if num_empty < loop.MAX_EMPTY_BATCHES:
        batch, given = loop.take(config_of(), run, watch)  # type: ignore[arg-type]
        assert len(batch.items) == len(given) == len(traces)
        assert buffer.released == list(range(num_empty))
        assert len(watch.lines) == num_empty
        return
    with pytest.raises(
        RuntimeError, match=r"3 steps in a row: the prompts of 2 episodes .* shortest has 301 tokens"
    ) as e:
        loop.take(config_of(), run, watch)  # type: ignore[arg-type]
    assert "\n" not in str(e.value)


# Demonstrations -----------------------------------------------------------------------------------------------------


class Stage:
    """Plays demonstrations; those of rows with a long prompt have no turn."""

    def __init__(self, rows: Sequence[TaskRow]) -> None:
        self.rows = rows
        self.times: Counter[int] = Counter()

    def demonstrate(self, indices: Sequence[int], progress: float) -> list[list[Played]]:
        self.times.update(indices)
        trace = seven_sub_traces()[:1]
        fits = [len(self.rows[index].prompt) + 2 <= ROOM for index in indices]
        prompts = [len(self.rows[index].prompt) + 2 for index in indices]
        return [
            [
                Played(index, stats(tokens=5 * ok, prompt=prompt), tuple(trace) if ok else ())
                for index, ok, prompt in zip(indices, fits, prompts, strict=True)
            ]
        ]

    def played(self, refs: Sequence[list[Played]], what: str) -> list[Played]:
        return [one for part in refs for one in part]


def rehearse(prompts: Sequence[str], num_batches: int = 9) -> tuple[Stage, list[int]]:
    """Return the played demonstrations, and for each batch the number of those without a turn."""
    rows = [TaskRow(f"r{k}", "d", prompt) for k, prompt in enumerate(prompts)]
    config, stage = load([SFT, *WINDOW, "sft.batch_sub_traces=8"]).config, Stage(rows)
    batches = demonstrations(config, Prepared(Maker(()), rows, [], Path()), stage)  # type: ignore[arg-type]
    drawn = [next(batches) for _ in range(num_batches)]
    assert all(len(one.items) == 8 for one in drawn)
    return stage, [len(one.without_turn) for one in drawn]


@pytest.mark.parametrize("num_rows", [1, 2, 10, 31, 32, 33, 100])
def test_any_number_of_rows_makes_batches_and_all_are_played_equally_often(num_rows: int) -> None:
    stage, silent = rehearse(["a"] * num_rows, num_batches=20)
    counts = [stage.times[index] for index in range(num_rows)]
    assert max(counts) - min(counts) <= 1
    assert sum(counts) % EPISODES_PER_CALL == 0
    assert not any(silent)


def test_demonstrations_without_a_turn_are_counted() -> None:
    stage, silent = rehearse(["a", long(300), "a", "a"])
    assert sum(silent) == pytest.approx(stage.times[1], abs=EPISODES_PER_CALL)  # one call is ahead
    assert sum(silent) > 0


@pytest.mark.parametrize(("num_rows", "num_told"), [(1, 32), (10, 32), (100, 128), (5000, MAX_WITHOUT_TURN)])
def test_without_any_that_fits_a_supervised_run_ends(num_rows: int, num_told: int) -> None:
    message = (
        rf"^no demonstration to learn: the prompts of {num_told} episodes leave no room .* has 301 tokens, at most 58"
    )
    with pytest.raises(RuntimeError, match=message):
        rehearse([long(301)] * num_rows)
