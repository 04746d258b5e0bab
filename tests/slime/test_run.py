"""A synchronous run of the real command: trained, killed, resumed, finished; and its refusals."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import re
import signal
import socket
import subprocess
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runs import START_S, Place, Run, rows_of
from tree import ROOT

from benchmarks.same import differences
from launch.environment import RAY_SOCKET, SOCKET_PATH_BYTES
from launch.lock import LockError, run_lock
from machine.ports import ReservedPort
from slime import checkpoint, cli, loop, train
from slime.config import load, load_start
from slime.observe.failures import Failures
from slime.run import Abandoned
from slime.steps import train as train_run

STEPS, EPISODES, TASKS, WORKERS = 4, 32, 32, 2
RUN = [
    "recipe=ppo_coding",
    "run=whole",
    f"steps={STEPS}",
    "model.start=''",
    "task.target=partial_credit:PartialCredit",
    f"buffer.episodes_per_step={EPISODES}",
    "policy.num_minibatches=2",
    "critic.num_minibatches=2",
    f"critic.warmup_episodes={2 * EPISODES}",
    f"eval.num_tasks={TASKS}",
    "eval.every=2",
    f"rollout.num_workers={WORKERS}",
    "checkpoint.every=1",
    "tracking.sample_every=1",
    "tracking.sample_episodes=4",
]
EVERY_STEP = {
    *("step", "time_s", "rollout/reward_mean", "rollout/num_episodes", "rollout/num_sub_traces"),
    *("rollout/compactions_per_episode", "rollout/tokens_generated", "policy/loss", "policy/clip_fraction"),
    *("policy/engine_logprob_diff_max", "critic/loss", "critic/explained_variance", "weights/version"),
    *("weights/lag_max", "time/rollout_s", "time/values_s", "time/update_s", "time/publish_s"),
}
AGAIN = "all training processes started again in"
RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # they give a killed raylet a minute to come back
EVALUATION = {"eval/pass_rate", "eval/num_tasks"}


# The order of things, without engines --------------------------------------------------------------------------------


@dataclass
class Diary:
    """A fake for a run's components and its watch that records the calls."""

    events: list[str] = field(default_factory=list)

    def train_step(self, config: Any, run: Any, watch: Any, step: int, evaluating: bool) -> dict[str, float]:
        self.events.append(f"train {step}")
        return self.evaluate(config, run, watch, step) if evaluating else {}

    def evaluate(self, config: Any, run: Any, watch: Any, step: int) -> dict[str, float]:
        self.events.append(f"evaluate {step}")
        return {"eval/pass_rate": 0.5}

    def check(self) -> None:
        self.events.append("check")

    def save(self, step: int) -> None:
        self.events.append(f"save {step}")

    def finish(self, step: int) -> None:
        self.events.append(f"finish {step}")

    def step(self, step: int, metrics: dict[str, float]) -> None:
        self.events.append(f"log {step}{' with pass rate' if 'eval/pass_rate' in metrics else ''}")


def whole_run(diary: Diary, monkeypatch: pytest.MonkeyPatch, folder: Path, begin: int = 0) -> int:
    """Do five steps from `begin` on; return the last one that was done."""
    note = diary.events.append
    monkeypatch.setattr(loop, "train_step", diary.train_step)
    monkeypatch.setattr(loop, "evaluate", diary.evaluate)
    monkeypatch.setattr(checkpoint, "Checkpoints", lambda run_dir, run, keep, tell: nullcontext(diary))
    found = SimpleNamespace(step=begin, buffer={"step": begin}) if begin else None
    monkeypatch.setattr(checkpoint, "load", lambda run_dir, run: note("load") or found)
    run: Any = SimpleNamespace(
        weights=SimpleNamespace(verify=lambda: note("verify")),
        send_weights=lambda version: note(f"publish {version}"),
        engines=SimpleNamespace(urls=()),
        servers=[],
        rollout=SimpleNamespace(workers=[]),
        play=lambda: note("play"),
        buffer=SimpleNamespace(state_dict=dict, load_state_dict=lambda state: note(f"buffer {state}")),
        clock=SimpleNamespace(),
        estimator=SimpleNamespace(roles=[]),
        policy=SimpleNamespace(export=lambda folder: note("export") or SimpleNamespace(result=list)),
    )
    watch: Any = SimpleNamespace(step=diary.step, note=lambda text: None, phase=lambda name: None)
    numbers = ["steps=5", "eval.every=3", "checkpoint.every=2", "critic.warmup_episodes=0"]
    config = load(["recipe=ppo_coding", *numbers], None).config
    with Failures(folder) as failures:
        return train_run(config, run, watch, folder, begin, failures, builder=SimpleNamespace(engine=None, worker=None))  # type: ignore[arg-type]
    raise AssertionError("it has failed")


@pytest.mark.parametrize(
    ("begin", "expected"),
    [
        (
            0,
            [
                *("load", "publish 0", "verify", "buffer {}", "play"),
                *("evaluate 0", "log 0 with pass rate", "train 1", "check"),
                *("log 1", "train 2", "check", "log 2", "save 2", "train 3", "evaluate 3", "check"),
                *("log 3 with pass rate", "train 4", "check", "log 4", "save 4", "train 5", "evaluate 5", "check"),
                *("log 5 with pass rate", "export", "save 5", "finish 5"),
            ],
        ),
        (
            4,
            [
                *("load", "publish 4", "verify", "buffer {'step': 4}", "play", "train 5", "evaluate 5", "check"),
                *("log 5 with pass rate", "export", "save 5", "finish 5"),
            ],
        ),
    ],
)
def test_order_of_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, begin: int, expected: list[str]) -> None:
    """A step is logged before its checkpoint, so that a run resumed from the checkpoint has all metrics up to it."""
    diary = Diary()
    assert whole_run(diary, monkeypatch, tmp_path, begin) == 5
    assert diary.events == expected


@dataclass
class Told(Diary):
    """As where a launcher sends SIGTERM in a phase of step `in_step`."""

    in_step: int = 0
    abandoned: bool = False

    def train_step(self, config: Any, run: Any, watch: Any, step: int, evaluating: bool) -> dict[str, float]:
        if step == self.in_step:
            os.kill(os.getpid(), signal.SIGTERM)
            if self.abandoned:  # in `loop.take` or after the scores
                raise Abandoned
        assert run.told_to_end() is (step == self.in_step)
        return super().train_step(config, run, watch, step, evaluating)


@pytest.mark.parametrize(
    ("in_step", "abandoned", "end"),
    [
        (4, True, ["train 3", "evaluate 3", "check", "log 3 with pass rate", "finish 3"]),
        (3, False, ["train 3", "evaluate 3", "check", "log 3 with pass rate", "finish 3"]),
        (3, True, ["train 2", "check", "log 2", "save 2", "finish 2"]),
    ],
)
def test_a_run_that_is_told_to_end_saves_its_last_finished_step(
    in_step: int, abandoned: bool, end: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    diary = Told(in_step=in_step, abandoned=abandoned)
    assert whole_run(diary, monkeypatch, tmp_path) == in_step - abandoned
    assert diary.events[-len(end) :] == end


def test_a_step_is_given_up_only_before_it_changes_anything() -> None:
    source = inspect.getsource(loop.train_step)
    assert source.index("run.score(") < source.index("run.abandon_if_told()") < source.index("run.update(")


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    assert checkpoint.steps(tmp_path) == []
    for name in ("step_000010", "step_000002", "step_000011.part", "step_000012"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        if name != "step_000012":
            (tmp_path / "checkpoints" / name / "state.json").write_text("{}")
    assert checkpoint.steps(tmp_path) == [2, 10]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.target=no_such_module:Task", "no_such_module"),
        ("task.target=recipes.coding:Nothing", "Nothing"),
        ("task.target=recipes.coding.task:RUNNER", "not a slime.Task"),
        ("task.options.noize=1", "takes no options"),
        ("task.target=no_python:Task", "invalid syntax (no_python.py, line 1)"),
        ("task.train=ROWS", "rows.jsonl:2: not JSON"),
        ("cache_dir=ROWS", "rows.jsonl can't be written to: Not a directory"),
        ("runs_dir=ROWS", "rows.jsonl can't be written to (Not a directory): choose another runs_dir"),
    ],
)
def test_bad_tasks_are_refused_in_one_line(
    override: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "stop_ray", lambda: None)  # nothing was started: leave others' clusters alone
    monkeypatch.setattr(train, "start_model", lambda config, start: pytest.fail("started to train"))
    (tmp_path / "no_python.py").write_text("def:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": "a", "domain": "d", "prompt": "p"}\n{\n')  # a bad second line, and no folder
    arguments = ["train", "recipe=ppo_coding", f"runs_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'cache'}"]
    code = cli.main([*arguments, override.replace("ROWS", str(rows))])
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not (tmp_path / "runs").exists()


def test_a_start_that_is_refused_late_leaves_nothing_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows, model and lock are there, and nobody listens where the cluster should be."""
    monkeypatch.setattr(train, "stop_ray", lambda: None)
    places = [f"runs_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'cache'}", "model.start=''"]
    with ReservedPort("127.0.0.1") as port:
        code = cli.main(["train", "recipe=ppo_coding", *places, f"cluster.ray_address=127.0.0.1:{port.number}"])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert ": can't connect (" in err.splitlines()[-1]  # libraries that make the model may have shown progress
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()
    assert not [path.name for path in (tmp_path / "cache").rglob("*") if path.suffix in (".lock", ".part")]


def test_a_warm_start_has_its_folder_alone_and_is_cached_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [f"runs_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'cache'}"]
    loaded = load(["recipe=ppo_coding", *places])
    asked = loaded.config, load_start(loaded), Failures(tmp_path)
    ran: list[Path] = []

    def run_sft(warm_start: Any, run_dir: Path, failures: Any, warnings: Sequence[str]) -> Path:
        with pytest.raises(LockError, match=f"{run_dir} is in use by"), run_lock(run_dir):
            pass
        ran.append(run_dir)
        exported = run_dir / "model"
        exported.mkdir()
        (exported / "config.json").write_text("{}")
        if len(ran) == 1:
            raise KeyboardInterrupt
        return exported

    monkeypatch.setattr(train, "run_sft", run_sft)
    with pytest.raises(KeyboardInterrupt):
        train.start_model(*asked)
    (tmp_path / "runs" / "sft_coding" / "model" / "config.json").unlink()
    (tmp_path / "runs" / "sft_coding" / "model").rmdir()
    folder = train.start_model(*asked)
    assert train.start_model(*asked) == folder
    assert ran == 2 * [tmp_path / "runs" / "sft_coding"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert [path.name for path in folder.iterdir()] == ["config.json"]


# The real thing ------------------------------------------------------------------------------------------------------


@dataclass
class Story:
    """Observations of the run."""

    run_dir: Path
    outputs: list[str]  # of the killed process, of the resumed one, of the one that found nothing to do
    left_over: list[list[str]]  # processes that outlived the first two
    resumed_from: int  # newest checkpoint after the kill
    rows_at_kill: list[dict[str, Any]]
    temporary: list[str]  # names in the folder for temporary files afterwards
    first: int  # process id of the killed one
    refused: tuple[int, str]  # exit code and output of the same command beside it
    looked_at: list[int]  # exit codes of `slime report` and `slime export` beside it


def hostile(place: Place) -> dict[str, str]:
    """Proxies that refuse everything, the address of a missing Ray cluster, and the longest folder for Ray."""
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9") | {"no_proxy": ""}
    ray = {"RAY_ADDRESS": "127.0.0.1:1", "RAY_AUTH_TOKEN": "of another Ray", "RAY_grpc_enable_http_proxy": "1"}
    longest = SOCKET_PATH_BYTES - len(RAY_SOCKET % Path("/proc/sys/kernel/pid_max").read_text().strip())
    size = longest - len(f"{place.temporary}/")
    folder = place.temporary / ("r" * size)
    folder.mkdir()
    return proxies | {name.upper(): value for name, value in proxies.items()} | ray | {"RAY_TMPDIR": str(folder)}


@pytest.fixture(scope="module")
def story(place: Place, warm_start: Path) -> Story:
    arguments = [*RUN, f"model.path={warm_start}"]
    run_dir = place.run_dir("whole")
    metrics = run_dir / "metrics.jsonl"
    with Run(place, *arguments, environment=hostile(place)) as first:
        first.wait_until((run_dir / "run.lock").exists, "lock", START_S)
        with Run(place, *arguments) as beside:
            refused = beside.process.wait(timeout=START_S), beside.output
        first.wait_until(lambda: "... eval" in first.output, "first evaluation", START_S)
        first.one("sglang::scheduler").kill()
        first.wait_until(lambda: bool(rows_of(metrics)) and rows_of(metrics)[-1]["step"] >= 1, "step 1", START_S)
        first.one("ray::BufferActor").kill()
        first.wait_until(lambda: AGAIN in first.output, "restart", START_S)
        first.wait_until(lambda: bool(rows_of(metrics)) and rows_of(metrics)[-1]["step"] >= 2, "step 2", START_S)
        priorities = {process.name(): process.nice() for process in first.processes()}
        assert any("bwrap" in name for name in priorities), priorities
        assert max(priorities.values()) <= 5, f"a busy neighbour would stop training: {priorities}"
        only_read = ["report"], ["export", "--out", str(place.folder / "exported")]
        looked_at = [cli.main([command, str(run_dir), *options]) for command, *options in only_read]
        first.process.send_signal(signal.SIGKILL)
        first.process.wait(timeout=30)
        gone = first.left_over(but=RAY_AGENTS)
        newest, at_kill = max(checkpoint.steps(run_dir)), rows_of(metrics)
        with Run(place, *arguments) as second:
            second.wait_until(lambda: "resumed at step" in second.output, "resume", START_S)
            second.one("ray::CriticWorker").kill()
            second.wait_until(lambda: AGAIN in second.output, "restart", START_S)
            second.one("ray::RolloutWorker", of=WORKERS).kill()
            second.finish()
            gone_too = second.left_over()
        gone += first.left_over()
    with Run(place, *arguments) as third:
        third.finish()
    outputs = [first.output, second.output, third.output]
    kept = [path.name for path in place.temporary.iterdir()]
    seen_beside = first.process.pid, refused, looked_at
    return Story(run_dir, outputs, [gone, gone_too], newest, at_kill, kept, *seen_beside)


@pytest.fixture(scope="module")
def unbroken(place: Place, story: Story, warm_start: Path) -> Path:
    """The folder of a run with the story's settings that nobody killed."""
    with Run(place, *RUN, "run=unbroken", f"model.path={warm_start}") as run:
        run.finish()
    return place.run_dir("unbroken")


@pytest.mark.e2e
def test_warm_start_learns(place: Place, warm_start: Path) -> None:
    losses = [row["policy/loss"] for row in rows_of(place.run_dir("start") / "metrics.jsonl")]
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert (warm_start / "model.safetensors").is_file()


@pytest.mark.e2e
def test_nothing_outlives_a_run_that_ends_or_is_killed(story: Story) -> None:
    assert story.left_over == [[], []]
    assert not [name for name in story.temporary if name.startswith("slime-ray-")]  # a killed run's goes with the next


@pytest.mark.e2e
def test_a_second_command_on_the_same_folder_is_refused(story: Story) -> None:
    code, output = story.refused
    assert (code, output.count("\n")) == (2, 1), output
    assert f"{story.run_dir} is in use by process {story.first} on {socket.gethostname()}" in output
    assert story.looked_at == [0, 0]  # what only reads is not refused
    assert not (story.run_dir / "run.lock").exists()


@pytest.mark.e2e
def test_resume_goes_on_after_the_newest_checkpoint(story: Story) -> None:
    assert story.resumed_from >= 1
    assert f"resumed at step {story.resumed_from}" in story.outputs[1]
    rows = rows_of(story.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    kept = [row for row in story.rows_at_kill if row["step"] <= story.resumed_from]
    assert rows[: len(kept)] == kept
    assert len(kept) == story.resumed_from + 1
    times = [row["time_s"] for row in rows]
    assert times == sorted(times)


@pytest.mark.e2e
def test_a_killed_and_resumed_run_is_the_one_that_was_not_killed(story: Story, unbroken: Path) -> None:
    """Every metric that is no measurement of time or memory, every token of the sampled episodes, every weight."""
    folders = unbroken, story.run_dir
    metrics = [rows_of(folder / "metrics.jsonl") for folder in folders]
    assert list(differences(*metrics)) == []
    episodes = [rows_of(folder / "episodes.jsonl") for folder in folders]
    for record in (*episodes[0], *episodes[1]):
        record["episode_id"] = record["episode_id"].split(".")[0]  # without the attempt, which the kill made necessary
    assert episodes[0] == episodes[1]
    models = [hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest() for folder in folders]
    assert models[0] == models[1]


@pytest.mark.e2e
def test_an_engine_that_dies_is_replaced_while_the_run_goes_on(story: Story) -> None:
    """The engine's scheduler is killed while episodes are in flight, as by the out-of-memory killer."""
    died = (
        r"engine 0 has ended, because its process scheduler_0 was killed by SIGKILL, e.g. by the out-of-memory killer"
    )
    log = re.escape(str(story.run_dir / "logs" / "engine_0.log"))
    assert re.search(rf"{died}; log: {log}; another engine 0 is started", " ".join(story.outputs[0].split()))
    assert "engine 0 serves again after" in story.outputs[0]


@pytest.mark.e2e
def test_a_rollout_worker_that_dies_is_replaced_while_the_run_goes_on(story: Story) -> None:
    died = r"rollout worker \d \(pid \d+ on \S+\) was killed.*; \d+ episodes are played again, another rollout worker"
    assert re.search(died, " ".join(story.outputs[1].split()))
    assert re.search(r"rollout worker \d plays again after \d+ s", story.outputs[1])
    assert rows_of(story.run_dir / "metrics.jsonl")[-1]["recovery/workers"] == 1


@pytest.mark.e2e
def test_training_processes_and_buffer_that_die_start_again_in_the_same_job(story: Story) -> None:
    for output, name in zip(story.outputs, ("the data buffer", "critic rank 0"), strict=False):
        assert re.search(rf"{name} \(pid \d+ on \S+\) was killed.*; all training processes start again", output)
        assert AGAIN in output
        assert "Traceback" not in output
    assert rows_of(story.run_dir / "metrics.jsonl")[-1]["recovery/restarts"] == 1


@pytest.mark.e2e
def test_metrics_of_every_step(story: Story) -> None:
    for row in rows_of(story.run_dir / "metrics.jsonl"):
        step = row["step"]
        assert all(math.isfinite(number) for number in row.values())
        assert row["weights/version"] == step
        assert (row.keys() >= EVALUATION) is (step % 2 == 0)
        if step % 2 == 0:
            assert row["eval/num_tasks"] == TASKS
            assert 0 <= row["eval/pass_rate"] <= 1
        if step == 0:
            continue
        assert EVERY_STEP - row.keys() == set()
        assert row["rollout/num_episodes"] == EPISODES
        assert row["rollout/num_sub_traces"] >= EPISODES
        assert row["rollout/tokens_generated"] >= 2 * row["rollout/num_sub_traces"]
        assert 0 < row["policy/engine_logprob_diff_max"] <= 1e-4  # every token is the current version's: all compared
        assert row["weights/lag_max"] == 0
        assert 0 <= row["policy/clip_fraction"] < 0.5
        assert row["critic/explained_variance"] <= 1
        phases = [name for name in row if name.startswith("time/") and name != "time/step_s"]
        assert sum(row[name] for name in phases) == pytest.approx(row["time/step_s"], abs=0.01)  # nothing counted twice


@pytest.mark.e2e
def test_policy_and_critic_move(story: Story) -> None:
    rows = rows_of(story.run_dir / "metrics.jsonl")[1:]
    assert all(0 < row["rollout/reward_mean"] < 1 for row in rows)
    assert all(row["rollout/compactions_per_episode"] > 0 for row in rows)
    assert all(row["policy/grad_norm"] > 0 for row in rows)
    assert all(row["critic/grad_norm"] > 0 for row in rows)
    assert all(row["policy/kl"] > 0 for row in rows)  # over the minibatches of a step


@pytest.mark.e2e
def test_what_a_run_leaves_behind(story: Story) -> None:
    folder = story.run_dir
    assert "partial_credit:PartialCredit" in (folder / "config.yaml").read_text()
    assert (folder / "model" / "model.safetensors").is_file()
    assert checkpoint.steps(folder) == [STEPS - 1, STEPS]  # checkpoint.keep=2
    state = json.loads((folder / "checkpoints" / f"step_{STEPS:06d}" / "state.json").read_text())
    assert state["step"] == STEPS
    assert list((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert (folder / "logs" / "engine_0.log").is_file()
    report = (folder / "report.html").read_text()
    assert "What was learned" in report
    assert all(f"Step {step} " in report for step in range(STEPS + 1))  # sample episodes
    assert "http" not in report.replace("http-equiv", "")  # it needs nothing from elsewhere


@pytest.mark.e2e
def test_sample_episodes(story: Story) -> None:
    records = rows_of(story.run_dir / "episodes.jsonl")
    seen = {(record["split"], record["step"]) for record in records}
    assert seen == {("train", step) for step in range(1, STEPS + 1)} | {("eval", step) for step in (0, 2, 4)}
    for record in records:
        tokens = [token for sub_trace in record["sub_traces"] for token in sub_trace["tokens"]]
        sampled = [token for token in tokens if token["action"]]
        assert sampled
        training = record["split"] == "train"
        for token in sampled:
            assert token["logprob"] <= 0
            assert token["version"] == (record["step"] - 1 if training else record["step"])
            assert (token["advantage"] is not None) is training
        kinds = [sub_trace["kind"] for sub_trace in record["sub_traces"]]
        assert kinds == ["compacted"] * (len(kinds) - 1) + ["final"]
        if training and len(kinds) > 1:
            assert any(token["summary"] and token["advantage"] for token in sampled)  # summaries are trained


@pytest.mark.e2e
def test_a_finished_run_says_so(story: Story) -> None:
    assert f"has finished its {STEPS} steps" in story.outputs[2]
    assert "held-out pass rate" in story.outputs[1]


@pytest.mark.e2e
def test_a_resume_with_other_settings_is_refused(place: Place, story: Story, warm_start: Path) -> None:
    command = place.command(*RUN, f"model.path={warm_start}", "steps=9", "policy.clip_low=0.1")
    before = (story.run_dir / "config.yaml").read_text()
    done = subprocess.run(
        command, cwd=ROOT / "tests" / "support", capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "clip_low" in done.stderr
    assert "resume_allow=[policy.clip_low], or choose another run=" in done.stderr  # the cure
    assert (story.run_dir / "config.yaml").read_text() == before
