"""Checkpoints of a run: atomic, written during training, retained, and exported without a trainer process."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from roles import random_qwen3

from slime import checkpoint, cli
from slime.checkpoint import CheckpointError, Checkpoints
from slime.start import manifest
from slime.start.manifest import Manifest
from trainer.group import Ready

FULL = OSError(28, "No space left on device", "policy/__1_0.distcp")


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

    def __post_init__(self) -> None:
        self.roles = [Role("policy", self.events), Role("critic", self.events)]
        buffer = SimpleNamespace(state_dict=lambda: {"open": [len(self.events)]})
        self.run: Any = SimpleNamespace(
            roles=self.roles, policy=self.roles[0], buffer=buffer, model_folder=self.run_dir, rows="digest"
        )

    def opened(self, keep: int = 2) -> Checkpoints:
        return Checkpoints(self.run_dir, self.run, keep)

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


def test_a_full_disk_ends_the_run_with_its_reason_and_spares_the_last_good_one(story: Story) -> None:
    story.allow()

    def run() -> None:
        with story.opened() as checkpoints:
            checkpoints.save(1)
            checkpoints.wait()
            story.roles[0].error = FULL
            checkpoints.save(2)
            until(lambda: checkpoints._writing is not None and checkpoints._writing.done())
            checkpoints.check()
            pytest.fail("the run went on")

    with pytest.raises(CheckpointError) as caught:
        run()
    message = str(caught.value)
    assert "checkpoint of step 2 could not be written" in message
    assert "No space left on device: 'policy/__1_0.distcp'" in message
    assert "the newest whole one is of step 1" in message
    assert checkpoint.steps(story.run_dir) == [1]


def test_a_failure_in_the_last_save_is_not_lost(story: Story) -> None:
    story.allow()
    story.roles[1].error = FULL
    with pytest.raises(CheckpointError, match=r"step 5.*there is none before it"), story.opened() as checkpoints:
        checkpoints.save(5)


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


# Export --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_qwen3(tmp_path_factory.mktemp("model") / "qwen3")


def write_policy(source: Path, folder: Path, change: Callable[[dict[str, Any]], None] = lambda tensors: None) -> None:
    """Write a checkpoint of `source` as one rank would, with torch only."""
    from safetensors.torch import load_file
    from torch.distributed import checkpoint as torch_checkpoint

    from trainer.models.entries import entries
    from trainer.models.families import read_shape
    from trainer.models.mapping import merge

    shape, theirs = read_shape(source), load_file(source / "model.safetensors")
    tensors = {f"model.{e.ours}": merge([theirs[n] for n in e.theirs], e, shape, 2) for e in entries(shape)}
    change(tensors)
    torch_checkpoint.save(tensors, checkpoint_id=folder, no_dist=True)
    (folder / "metadata.json").write_text("{}")


@pytest.fixture
def run_dir(model: Path, tmp_path: Path) -> Path:
    for step in (4, 8):
        folder = tmp_path / "run" / "checkpoints" / f"step_{step:06d}"
        write_policy(model, folder / "policy")
        (folder / "state.json").write_text(json.dumps({"step": step, "model_folder": str(model)}))
    return tmp_path / "run"


def exported(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the one-line message of a refused export; "" if it was not refused."""
    code = cli.main(["export", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert (code, err.count("\n")) == ((2, 1) if err else (0, 0))
    assert bool(out) is not bool(err)
    return err


def test_an_exported_model_is_the_source_bit_for_bit_and_loads(
    run_dir: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    assert exported(capsys, run_dir, "--step", 4, f"--out={tmp_path / 'four'}") == ""
    assert exported(capsys, run_dir, "--out", tmp_path / "newest") == ""
    wanted = load_file(model / "model.safetensors")
    for name in ("four", "newest"):
        found = load_file(tmp_path / name / "model.safetensors")
        assert sorted(found) == sorted(wanted)
        assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "four", dtype="auto")
    assert torch.equal(loaded.model.norm.weight, wanted["model.norm.weight"])


def test_export_refuses_what_is_not_there(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert "no such run" in exported(capsys, tmp_path / "nothing", "--out", out)
    assert "no checkpoint of step 5; there are those of steps 4, 8" in exported(
        capsys, run_dir, "--step", 5, "--out", out
    )
    assert "--step five" in exported(capsys, run_dir, "--step", "five", "--out", out)
    assert "--out DIR" in exported(capsys, run_dir)
    assert "one RUN, found 2" in exported(capsys, run_dir, run_dir, "--out", out)
    assert "--out needs a folder" in exported(capsys, run_dir, "--out")
    assert "unknown option '--outt'" in exported(capsys, run_dir, "--outt", out)
    (tmp_path / "empty").mkdir()
    assert "no checkpoint; it has none" in exported(capsys, tmp_path / "empty", "--out", out)
    assert "is there already" in exported(capsys, run_dir, "--out", run_dir)
    state = run_dir / "checkpoints" / "step_000008" / "state.json"
    state.write_text(json.dumps({"step": 8, "model_folder": "/nowhere"}))
    assert "/nowhere is gone" in exported(capsys, run_dir, "--out", out)
    assert not out.exists()


def test_export_of_a_broken_checkpoint_names_tensor_or_file_and_leaves_nothing(
    run_dir: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, name = run_dir / "checkpoints" / "step_000008" / "policy", "model.decoder.layers.1.mlp.linear_fc1.weight"

    def refused(*words: str) -> None:
        said = exported(capsys, run_dir, "--out", tmp_path / "out")
        assert all(word in said for word in words), said
        assert [path.name for path in tmp_path.iterdir()] == ["run"]

    write_policy(model, policy, lambda tensors: tensors.pop(name))
    refused(str(policy), f"{name} is missing")
    write_policy(model, policy, lambda tensors: tensors.update({name: tensors[name][:-1]}))
    refused(f"{name} has shape (95, 32), the model's is (96, 32)")
    write_policy(model, policy)
    (data,) = policy.glob("*.distcp")
    data.write_bytes(data.read_bytes()[:-100])
    refused(str(data), "is cut off")
    (policy / ".metadata").unlink()
    refused(str(policy), "not a complete checkpoint (.metadata is missing)")
