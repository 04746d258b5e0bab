"""Checkpoints of a whole run: policy, critic, optimizers, step, prompts. Complete or not there at all.

    runs/<name>/checkpoints/step_000010/
        policy/  critic/     Megatron distributed checkpoints (no critic/ in runs without one)
        state.json           step and the buffer's open tickets

A checkpoint is written beside its place and renamed when everything is on disk.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import ray

from slime.build import Parts


def _folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:06d}"


def steps(run_dir: Path) -> list[int]:
    """Steps of the complete checkpoints, oldest first."""
    found = (run_dir / "checkpoints").glob("step_*/state.json")
    return sorted(int(path.parent.name.removeprefix("step_")) for path in found if not path.parent.suffix)


def save(run_dir: Path, step: int, parts: Parts, keep: int) -> Path:
    """Writes the checkpoint of a finished step and drops all but the newest `keep`."""
    folder = _folder(run_dir, step)
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    saving = [role.submit("save", str((part / role.name).resolve())) for role in parts.roles]
    for pending in saving:
        pending.result()
    state = {"step": step, "buffer": ray.get(parts.buffer.state_dict.remote(), timeout=60)}
    (part / "state.json").write_text(json.dumps(state))
    _sync(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    _sync(folder.parent)
    for old in steps(run_dir)[:-keep]:
        shutil.rmtree(_folder(run_dir, old))
    return folder


def load(run_dir: Path, parts: Parts) -> int:
    """Puts the newest checkpoint into the running parts; returns its step, 0 when there is none."""
    found = steps(run_dir)
    if not found:
        return 0
    folder = _folder(run_dir, found[-1])
    state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    loading = [role.submit("load", str((folder / role.name).resolve())) for role in parts.roles]
    for pending in loading:
        pending.result()
    ray.get(parts.buffer.load_state_dict.remote(state["buffer"]), timeout=60)
    return int(state["step"])


def _sync(folder: Path) -> None:
    """Asks the disk to remember a folder's entries."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
