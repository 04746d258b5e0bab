"""Checkpoints of a run: atomic, written during training, and retained."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.exceptions

from slime import checkpoint
from slime.checkpoint import CheckpointError, Checkpoints
from slime.start import manifest
from slime.start.manifest import Manifest
from trainer.group import Ready

_OF_A_RANK = OSError(28, "No space left on device", "policy/__1_0.distcp")
FULL = ray.exceptions.RayTaskError("saved", "its trace", _OF_A_RANK).as_instanceof_cause()  # as it arrives


@dataclass
class Role:
    """Two ranks that write when the test allows it; both record their calls."""

    name: str
    events: list[str]
    allowed: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None
    folder: Path = Path()
    timeout_s: float = 20.0
    writes: Callable[[int], None] = lambda count: None  # what happens at each question to rank 1
    asked: int = 0

    def save(self, folder: Path) -> Ready[None]:
        self.events.append(f"{self.name} save")
        self.folder = folder
        self.folder.mkdir()
        return Ready(None)

    def load(self, folder: Path) -> Ready[None]:
        if self.error is not None:
            raise self.error
        return Ready(None)

    def saved(self) -> Any:
        return SimpleNamespace(result=lambda: [self.written(rank) for rank in range(2)])

    def written(self, rank: int) -> bytes | None:
        self.asked += rank
        self.writes(self.asked)
        if rank and self.error is not None and self.allowed.is_set():
            raise self.error
        return f"{rank}".encode() if rank == 0 or self.allowed.is_set() else None

    def finish_save(self, of_ranks: list[bytes]) -> Ready[None]:
        assert of_ranks == [b"0", b"1"]
        (self.folder / "metadata.json").write_text("{}")
        self.events.append(f"{self.name} finish")
        return Ready(None)


@dataclass
class Story:
    """Roles, the run's folder, and the events in order."""

    run_dir: Path
    events: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.roles = [Role("policy", self.events), Role("critic", self.events)]
        buffer = SimpleNamespace(state_dict=lambda: {"open": [len(self.events)]})
        self.run: Any = SimpleNamespace(
            roles=self.roles, policy=self.roles[0], buffer=buffer, model_folder=self.run_dir, rows="digest"
        )

    def opened(self, keep: int = 2) -> Checkpoints:
        return Checkpoints(self.run_dir, self.run, keep, self.told.append)

    def allow(self, allowed: bool = True) -> None:
        for role in self.roles:
            role.allowed.set() if allowed else role.allowed.clear()

    @property
    def names(self) -> list[str]:
        return sorted(path.name for path in (self.run_dir / "checkpoints").glob("*"))


@pytest.fixture
def story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Story:
    monkeypatch.setattr(checkpoint, "_POLL_S", (0.001, 0.005))
    return Story(tmp_path)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


# Written beside the training -----------------------------------------------------------------------------------------


def test_training_goes_on_and_the_checkpoint_appears_whole(story: Story) -> None:
    (story.run_dir / "config.yaml").write_text("steps: 9\n")
    (story.run_dir / "wandb_id").write_text("abc\n")
    with story.opened() as checkpoints:
        checkpoints.save(3)
        story.events.append("train 4")  # while rank 1 of both roles is writing
        checkpoints.check()
        assert story.names == ["step_000003.part"]
        assert checkpoint.steps(story.run_dir) == []
        story.allow()
        until(lambda: checkpoint.steps(story.run_dir) == [3])
    assert story.events == ["policy save", "critic save", "train 4", "policy finish", "critic finish"]
    folder = story.run_dir / "checkpoints" / "step_000003"
    assert sorted(path.name for path in folder.iterdir()) == ["critic", "policy", "state.json"]
    assert manifest.read(folder) == Manifest(
        step=3,
        buffer={"open": [2]},
        model_folder=str(story.run_dir),
        config="steps: 9\n",
        rows="digest",
        wandb_id="abc",
        versions=manifest.installed_versions(),
    )
    assert manifest.installed_versions().keys() == set(manifest.PACKAGES)


def test_it_is_on_the_disk_before_it_has_its_name(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []

    def sync(path: Path) -> None:
        assert path.exists()
        synced.append(str(path.relative_to(story.run_dir / "checkpoints")))

    monkeypatch.setattr(checkpoint, "_sync_one", sync)
    story.allow()
    with story.opened() as checkpoints:
        checkpoints.save(1)
    inside = ["policy/metadata.json", "critic/metadata.json", "policy", "critic", "state.json"]
    assert sorted(synced[:-2]) == sorted(f"step_000001.part/{name}" for name in inside)
    assert synced[-2:] == ["step_000001.part", "."]  # the folder under its first name, then the entry of its last


def test_the_next_save_and_the_end_wait_for_what_is_being_written(story: Story) -> None:
    with story.opened() as checkpoints:
        checkpoints.save(1)
        later = threading.Timer(0.05, story.allow)
        later.start()
        checkpoints.save(2)
        assert checkpoint.steps(story.run_dir)[0] == 1
    assert checkpoint.steps(story.run_dir) == [1, 2]
    assert story.events.index("critic finish") < story.events.index("policy save", 2)


def test_the_newest_are_kept(story: Story) -> None:
    story.allow()
    with story.opened(keep=2) as checkpoints:
        for step in (1, 2, 3, 10):
            checkpoints.save(step)
    assert story.names == ["step_000003", "step_000010"]
    with story.opened(keep=1) as checkpoints:
        checkpoints.save(10)  # once more: a run that went on from an earlier one
    assert story.names == ["step_000010"]


def test_what_a_killed_run_leaves_is_never_picked_and_swept_away(story: Story) -> None:
    story.allow()
    with story.opened() as checkpoints:
        checkpoints.save(1)
    folder = story.run_dir / "checkpoints"
    for name in ("step_000002.part", "step_000000.old"):  # killed while writing, and while dropping
        (folder / name / "policy").mkdir(parents=True)
        (folder / name / "state.json").write_text("{}")
    assert checkpoint.steps(story.run_dir) == [1]
    with story.opened():
        assert story.names == ["step_000001"]


# Failures ------------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_when_the_disk_is_full_and_tries_the_next_checkpoint(story: Story) -> None:
    story.allow()
    with story.opened() as checkpoints:
        checkpoints.save(1)
        checkpoints.wait()
        story.roles[0].error = FULL
        checkpoints.save(2)
        until(lambda: checkpoints._writing is not None and checkpoints._writing.done())
        checkpoints.check()
        (line,) = story.told
        assert "checkpoint of step 2 could not be written" in line
        assert "No space left on device: 'policy/__1_0.distcp'; the newest whole one is of step 1" in line
        assert "the run goes on" in line
        assert story.names == ["step_000001"]
        story.roles[0].error = None
        checkpoints.save(3)
    assert story.names == ["step_000001", "step_000003"]
    assert story.told == [line, ""]


def test_a_folder_that_refuses_a_checkpoint_does_not_end_the_run(story: Story) -> None:
    story.allow()
    (story.run_dir / "checkpoints").write_text("no folder can be made here, by root neither")
    with story.opened() as checkpoints:
        checkpoints.save(1)
        assert "checkpoint of step 1 could not be written" in story.told[0]
        (story.run_dir / "checkpoints").unlink()
        checkpoints.finish(1)  # a launcher has told the run to end
    assert story.names == ["step_000001"]
    assert len(story.told) == 2


def test_a_rank_that_still_writes_to_a_refused_checkpoint_does_not_find_its_folder_again(story: Story) -> None:
    story.allow()
    with story.opened() as checkpoints:
        story.roles[1].error = FULL
        checkpoints.save(4)
        checkpoints.wait()
        refused = story.roles[0].folder
        story.roles[1].error = None
        checkpoints.finish(4)
    assert story.roles[0].folder != refused
    assert story.names == ["step_000004"]


@pytest.mark.parametrize("at_once", [False, True])
def test_a_last_checkpoint_that_the_disk_refuses_ends_the_run(story: Story, at_once: bool) -> None:
    story.allow()
    story.roles[1].error = FULL
    with pytest.raises(CheckpointError, match=r"step 5.*there is none before it$"), story.opened() as checkpoints:
        checkpoints.finish(5) if at_once else checkpoints.save(5)
    assert story.names == []
    assert story.told == []


def test_nothing_is_told_of_checkpoints_after_the_error_that_ends_a_run(story: Story) -> None:
    story.allow()

    def run() -> None:
        with story.opened() as checkpoints:
            story.roles[1].error = FULL
            checkpoints.save(1)
            checkpoints.wait()
            story.roles[1].error = None
            checkpoints.save(2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert story.names == ["step_000002"]
    assert len(story.told) == 1


def test_a_lost_process_is_no_trouble_of_the_disk(story: Story) -> None:
    story.allow()
    reset = ray.exceptions.RayTaskError("saved", "its trace", ConnectionResetError("a peer is gone"))
    for error in (ray.exceptions.RayActorError(), reset.as_instanceof_cause(), TimeoutError("no answer")):
        story.roles[1].error = error
        with pytest.raises(CheckpointError, match="step 6"), story.opened() as checkpoints:
            checkpoints.save(6)
    assert story.told == []


def test_ranks_that_never_finish_are_named_at_the_deadline(story: Story) -> None:
    for role in story.roles:
        role.timeout_s = 0.05
    with pytest.raises(CheckpointError, match=r"policy: ranks \[1\] have not written"), story.opened() as checkpoints:
        checkpoints.save(5)


def test_ranks_may_write_as_long_as_their_files_grow(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(monotonic=map(float, itertools.count()).__next__)  # a second for each look at it
    monkeypatch.setattr(checkpoint, "time", clock)

    def grow(role: Role, count: int) -> None:
        (role.folder / "__1_0.distcp").write_bytes(b"x" * count)
        if count == 20:
            role.allowed.set()

    for role in story.roles:
        role.timeout_s, role.writes = 3.0, partial(grow, role)
    with story.opened() as checkpoints:
        checkpoints.save(5)
    assert checkpoint.steps(story.run_dir) == [5]


@pytest.mark.parametrize("stuck", [False, True])
def test_a_run_that_is_stopped_finishes_what_it_can(story: Story, monkeypatch: pytest.MonkeyPatch, stuck: bool) -> None:
    monkeypatch.setattr(checkpoint, "GRACE_S", 0.2 if stuck else 20.0)
    if not stuck:
        threading.Timer(0.05, story.allow).start()

    def run() -> None:
        with story.opened() as checkpoints:
            checkpoints.save(7)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert checkpoint.steps(story.run_dir) == ([] if stuck else [7])


def test_a_checkpoint_that_can_not_be_loaded_says_where_to_go_on(story: Story) -> None:
    story.allow()
    with story.opened() as checkpoints:
        checkpoints.save(4)
        checkpoints.save(8)

    story.roles[1].error = ValueError("tensor x is missing")
    with pytest.raises(CheckpointError, match=r"step_000008 can't be loaded: tensor x is missing.*from step 4"):
        checkpoint.load(story.run_dir, story.run)
