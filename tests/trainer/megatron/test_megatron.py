"""Megatron workers: minibatches, norms, checkpoints, folders. Layouts: tests/trainer/test_equality.py."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from roles import (
    batch_of,
    layout_of,
    on_ranks,
    random_qwen3,
    random_targets,
    running,
    seven_sub_traces,
    write_checkpoint,
)

from buffer.types import Scores, SubTrace, TokenColumn
from critic.config import CriticConfig
from critic.group import CriticGroup
from critic.worker import CriticWorker
from trainer.config import LossNorm, PolicyConfig
from trainer.group import PolicyGroup
from trainer.policy import PolicyWorker

LIMIT_S = 300.0
LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {},
    "TP2": {"num_processes": 2, "tensor_parallel": 2},
    "TP2+SP": {"num_processes": 2, "tensor_parallel": 2, "sequence_parallel": True},
    "DP2": {"num_processes": 2},
}
MICRO = {"max_tokens_per_micro_batch": 160}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Qwen3."""
    return random_qwen3(tmp_path_factory.mktemp("model") / "qwen3")


@pytest.fixture(scope="module")
def traces() -> list[SubTrace]:
    return seven_sub_traces()


def policy(folder: Path, layout: dict[str, Any], norm: LossNorm = LossNorm.token) -> Any:
    groups = layout_of(MICRO | layout)
    config = PolicyConfig(*groups, loss_norm=norm, num_minibatches=2, num_epochs=2, entropy_coef=0.01, kl_coef=0.1)
    return running(PolicyGroup, PolicyWorker, folder, config)


def train_policy(group: Any, traces: list[SubTrace]) -> tuple[dict[int, Any], dict[str, float], dict[int, Any]]:
    """Log-probabilities, metrics of four optimizer steps, log-probabilities after them."""
    batch = batch_of(traces)
    before = group.logprobs(batch).result()
    ones = [np.ones(len(trace.tokens), np.float32) for trace in traces]
    rng = np.random.default_rng(3)
    metrics = group.update(
        batch, traces, random_targets(traces), Scores(TokenColumn(), before, before), ones, rng
    ).result()
    return before, metrics, group.logprobs(batch).result()


@pytest.fixture(scope="module")
def reference(ray_cluster: None, folder: Path, traces: list[SubTrace]) -> Any:
    with policy(folder, LAYOUTS["one process"]) as group:
        return train_policy(group, traces)


def assert_close(found: dict[int, Any], wanted: dict[int, Any], bound: float) -> None:
    assert sorted(found) == sorted(wanted)
    worst = max(float(np.abs(found[i] - wanted[i]).max()) for i in wanted)
    assert worst < bound


@pytest.mark.e2e
def test_minibatches_and_epochs_on_two_rows_are_those_on_one(
    reference: Any, folder: Path, traces: list[SubTrace]
) -> None:
    with policy(folder, LAYOUTS["DP2"]) as group:
        before, metrics, after = train_policy(group, traces)
    assert_close(before, reference[0], 5e-6)
    for key in ("loss", "grad_norm", "kl", "clip_fraction", "ratio_max", "entropy", "gradient_share/final"):
        assert metrics[key] == pytest.approx(reference[1][key], rel=1e-4, abs=1e-6), key
    assert_close(after, reference[2], 2e-4)  # after four Adam steps of lr 1e-2
    moved = max(float(np.abs(after[i] - before[i]).max()) for i in after)
    assert moved > 0.1, "the comparison means nothing if training moved nothing"


@pytest.mark.e2e
def test_episode_norm_weighs_episodes_equally(folder: Path, traces: list[SubTrace], ray_cluster: None) -> None:
    """Doubling the tokens of one episode changes the token-level gradient, and `episode` is not `token`."""
    with policy(folder, LAYOUTS["one process"], LossNorm.episode) as group:
        _, by_episode, _ = train_policy(group, traces)
    with policy(folder, LAYOUTS["one process"]) as group:
        _, by_token, _ = train_policy(group, traces)
    assert by_episode["grad_norm"] != pytest.approx(by_token["grad_norm"], rel=1e-3)


@pytest.mark.e2e
def test_critic_layouts_agree_and_checkpoints_resume_in_another(
    folder: Path, traces: list[SubTrace], ray_cluster: None, tmp_path: Path
) -> None:
    batch, targets = batch_of(traces), random_targets(traces)

    def critic(layout: dict[str, Any]) -> Any:
        config = CriticConfig(
            *layout_of(MICRO | layout), head_init_std=0.1, num_epochs=2, num_minibatches=2, value_clip=0.2
        )
        return running(CriticGroup, CriticWorker, folder, config)

    with critic(LAYOUTS["one process"]) as group:
        values = group.values(batch).result()
        metrics = group.update(batch, targets, np.random.default_rng(3)).result()
        write_checkpoint(group, tmp_path / "one")
        after = group.values(batch).result()
        group.update(batch, targets, np.random.default_rng(4)).result()
        later = group.values(batch).result()
    with critic(LAYOUTS["TP2+SP"]) as group:
        assert_close(group.values(batch).result(), values, 5e-6)
        found = group.update(batch, targets, np.random.default_rng(3)).result()
        assert found["loss"] == pytest.approx(metrics["loss"], rel=1e-4)
        assert found["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=1e-4)
        group.load(tmp_path / "one").result()
        assert_close(group.values(batch).result(), after, 5e-6)
        group.update(batch, targets, np.random.default_rng(4)).result()  # the optimizer's state came along
        assert_close(group.values(batch).result(), later, 2e-4)  # after more Adam steps of lr 1e-2


@pytest.mark.e2e
@pytest.mark.parametrize("experts", [0, 4])
def test_a_process_keeps_nothing_of_a_worker_that_has_left(
    experts: int, traces: list[SubTrace], ray_cluster: None, tmp_path: Path
) -> None:
    """Process groups end with the last reference to them, and each has threads."""
    folder, threads = random_qwen3(tmp_path / "model", experts=experts), []
    count = lambda worker: len(os.listdir("/proc/self/task"))  # noqa: E731
    for _ in range(3):
        with policy(folder, LAYOUTS["DP2"] | {"expert_parallel": 2 if experts else 1}) as group:
            train_policy(group, traces)
            threads.append(sum(on_ranks(group, count)))
    assert threads[1] == pytest.approx(threads[2], abs=20)  # about 100 more, where something is kept


def spoilt(source: Path, folder: Path, name: str, change: Any) -> None:
    """The folder with `change` made to one of its tensors; None takes it out."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    tensors: dict[str, torch.Tensor | None] = {**load_file(folder / "model.safetensors")}
    tensors[name] = None if change is None else change(tensors.get(name))
    save_file({n: t.contiguous() for n, t in tensors.items() if t is not None}, folder / "model.safetensors")


@pytest.mark.e2e
def test_folders_are_read_whole_or_refused_and_written_bit_for_bit(
    folder: Path, ray_cluster: None, tmp_path: Path
) -> None:
    import ray
    from safetensors.torch import load_file

    norm = "model.layers.1.input_layernorm.weight"
    cases = {
        "short": (norm, lambda t: t[:-1], rf"{norm} has shape \(31,\), config.json asks for \(32,\)"),
        "gone": (norm, None, rf"{norm} is missing \(23 tensors found\)"),
        "more": ("model.layers.1.self_attn.q_proj.bias", lambda t: torch.zeros(32), "q_proj.bias is not supported"),
    }

    def read(worker: Any, path: str) -> None:
        from trainer.megatron import hf

        hf.load(worker.engine.models, worker.engine.shape, Path(path))

    def in_small_files(worker: Any, path: str) -> None:
        from trainer.models import folder

        usual, folder.FILE_BYTES = folder.FILE_BYTES, 20_000
        worker.export(path)
        folder.FILE_BYTES = usual

    with policy(folder, LAYOUTS["TP2"]) as group:
        for name, (tensor, change, message) in cases.items():
            spoilt(folder, tmp_path / name, tensor, change)
            for actor in group.actors:  # each refuses, none waits for another
                with pytest.raises(ValueError, match=message):
                    ray.get(actor.__ray_call__.remote(read, str(tmp_path / name)), timeout=60)
        names = group.weight_names().result()
        group.export(tmp_path / "one").result()
        out = str(tmp_path / "many")
        ray.get([actor.__ray_call__.remote(in_small_files, out) for actor in group.actors], timeout=60)
    source = load_file(folder / "model.safetensors")
    files = sorted((tmp_path / "many").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(files) > 2
    assert all(index[name] == file.name for file in files for name in load_file(file))
    for found in (
        load_file(tmp_path / "one" / "model.safetensors"),
        {name: tensor for file in files for name, tensor in load_file(file).items()},
    ):
        assert {name: list(tensor.shape) for name, tensor in found.items()} == {n: s for n, _, s in names}
        assert all(torch.equal(tensor, source[name]) for name, tensor in found.items())
