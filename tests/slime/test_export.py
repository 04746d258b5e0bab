"""A policy is exported from a checkpoint without a trainer process, or refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from roles import random_qwen3

from slime import cli


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
