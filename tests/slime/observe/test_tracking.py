"""Tracking: one object per step after any interruption, only finite numbers, and offline W&B in the run's folder."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slime.observe.tracking import Tracker, _logged_in, read_metrics, readable_text
from slime.schema import TrackingConfig

FILES_ONLY = TrackingConfig(wandb=False)
TOKENS = [{"text": "task ", "action": False}, {"text": "do", "action": True}, {"text": "ne", "action": True}]
EPISODE = {
    "episode_id": "a",
    "row": 0,
    "prompt": "task",
    "reward": 1.0,
    "status": "finished",
    "sub_traces": [{"kind": "final", "tokens": TOKENS}],
    "guard_events": [],
}


def tracker(run_dir: Path, resume_step: int | None = None) -> Tracker:
    return Tracker(run_dir, "demo", {"seed": 0}, FILES_ONLY, resume_step)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_step_is_on_disk_when_log_returns(tmp_path: Path) -> None:
    track = tracker(tmp_path)
    metrics: dict[str, Any] = {"eval/pass_rate": np.float32(0.5), "weights/version": np.int64(3)}
    track.log(0, metrics)
    row = lines(tmp_path / "metrics.jsonl")[0]
    assert (row["step"], row["eval/pass_rate"], row["weights/version"]) == (0, 0.5, 3)
    track.episodes(0, "eval", [EPISODE])
    assert lines(tmp_path / "episodes.jsonl")[0] == {**EPISODE, "step": 0, "split": "eval"}
    track.close()
    track.close()


def test_resume_removes_what_happens_again(tmp_path: Path) -> None:
    track = tracker(tmp_path)
    for step in range(6):
        track.log(step, {"x": step, "time_s": 10.0 * step})
        track.episodes(step, "train", [EPISODE, EPISODE])
    track.close()
    with (tmp_path / "metrics.jsonl").open("a") as out:
        out.write('{"step": 6, "x"')  # the process was killed here
    with (tmp_path / "episodes.jsonl").open("a") as out:
        out.write('{"step": 2')
    track = tracker(tmp_path, resume_step=3)
    assert track.elapsed_s >= 30.0
    track.log(4, {"x": 40})
    track.close()
    rows = read_metrics(tmp_path)
    assert [(row["step"], row["x"]) for row in rows] == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 40)]
    assert rows[-1]["time_s"] >= 30.0
    assert [row["step"] for row in lines(tmp_path / "episodes.jsonl")] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_running_process_can_go_back_to_a_step(tmp_path: Path) -> None:
    track = tracker(tmp_path)
    for step in range(4):
        track.log(step, {"x": step})
        track.episodes(step, "train", [EPISODE])
    assert [row["step"] for row in track.rewind(1)] == [0, 1]
    track.log(2, {"x": 20})
    assert track.rewind(-1) == []
    track.log(0, {"x": 7})
    track.episodes(0, "train", [EPISODE])
    track.close()
    assert [(row["step"], row["x"]) for row in read_metrics(tmp_path)] == [(0, 7)]
    assert [row["step"] for row in lines(tmp_path / "episodes.jsonl")] == [0]


def test_starting_anew_keeps_the_old_files_apart(tmp_path: Path) -> None:
    track = tracker(tmp_path)
    track.log(0, {"x": 1})
    track.close()
    track = tracker(tmp_path)
    track.log(0, {"x": 2})
    track.close()
    assert [row["x"] for row in read_metrics(tmp_path)] == [2]
    assert [row["x"] for row in lines(tmp_path / "metrics.old.jsonl")] == [1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, np.float32("nan"), "text", None])
def test_metrics_must_be_finite_numbers(tmp_path: Path, bad: Any) -> None:
    track = tracker(tmp_path)
    with pytest.raises(ValueError, match=r"'policy/loss' of step 4"):
        track.log(4, {"fine": 1.0, "policy/loss": bad})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    track.log(4, {"policy/loss": 0.0})
    track.close()


def test_bad_calls_are_refused(tmp_path: Path) -> None:
    track = tracker(tmp_path)
    track.log(2, {})
    with pytest.raises(ValueError, match="not above step 2"):
        track.log(2, {})
    with pytest.raises(ValueError, match="'test'"):
        track.episodes(2, "test", [EPISODE])
    with pytest.raises(ValueError, match="episode 'a' of step 2"):
        track.episodes(2, "eval", [{**EPISODE, "reward": math.nan}])
    assert (tmp_path / "episodes.jsonl").read_bytes() == b""
    track.close()
    with pytest.raises(ValueError, match="resume_step=-1"):
        tracker(tmp_path, resume_step=-1)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nrubbish\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        tracker(tmp_path, resume_step=1)


def test_readable_text_marks_what_was_sampled() -> None:
    hostile = {"sub_traces": [{"kind": "final", "tokens": [*TOKENS, {"text": "\ud800", "action": False}]}]}
    assert readable_text(hostile) == "[1 final] task ⟦done⟧\ufffd"


def test_logged_in_by_environment_or_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not _logged_in()
    (tmp_path / "netrc").write_text("machine elsewhere.example login user password p\n")
    assert not _logged_in()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password p\n")
    assert _logged_in()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert not _logged_in()
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert _logged_in()


def test_wandb_is_not_imported_when_switched_off(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from slime.schema import TrackingConfig; from slime.observe.tracking import Tracker\n"
        f"Tracker(Path({str(tmp_path)!r}), 'demo', {{}}, TrackingConfig(wandb=False), None).close()\n"
        "sys.exit('wandb' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert not (tmp_path / "wandb").exists()


def wandb_records(path: Path) -> list[Any]:
    """Yield the records of a .wandb file: LevelDB log blocks of 32 KiB after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made at run time

    data, at, whole, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a full record, or its last part
            records.append(Record.FromString(whole))
            whole = b""
    return records


@pytest.mark.e2e
def test_wandb_offline_holds_the_same_numbers(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "demo"
    code = f"""
from pathlib import Path
from slime.schema import TrackingConfig
from slime.observe.tracking import Tracker
for resume, steps in ((None, (0, 1, 2)), (1, (2, 3))):
    track = Tracker(Path({str(run_dir)!r}), "demo", {{"seed": 7, "policy": {{"lr": 0.5}}}}, TrackingConfig(), resume)
    for step in steps:
        track.log(step, {{"rollout/reward_mean": step / 4}})
        track.episodes(step, "train", [{EPISODE!r}])
    track.close()
"""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    home = tmp_path / "home"
    home.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=180,
        env=clean | {"HOME": str(home), "NETRC": str(home / "none")},
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout.strip(), done.stderr.strip()) == ("", "")
    assert not [path for path in home.rglob("*") if path.is_file()]
    logs = sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(logs) == 2
    seen, ids = [], set()
    for log in logs:
        for record in wandb_records(log):
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
                config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
                assert config["policy"] == {"lr": 0.5}
            if record.WhichOneof("record_type") == "history":
                row = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                if "rollout/reward_mean" in row:
                    seen.append((int(row["step"]), float(row["rollout/reward_mean"])))
    assert seen == [(0, 0.0), (1, 0.25), (2, 0.5), (2, 0.5), (3, 0.75)]
    assert ids == {(run_dir / "wandb_id").read_text().strip()}
    table = next((run_dir / "wandb").glob("offline-run-*/files/media/table/episodes/*.json"))
    assert "⟦done⟧" in json.loads(table.read_text())["data"][0][-1]
