"""Gradients and weights that travel while others are computed: the numbers are those of one process.

A model of several buckets, of which none arrives before it is waited for: a layer that reads weights without waiting
reads NaN.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from families import random_model
from roles import batch_of, layout_of, random_targets, running, seven_sub_traces, write_checkpoint

from buffer.types import Scores, SubTrace
from critic.config import CriticConfig
from critic.group import CriticGroup
from critic.worker import CriticWorker
from trainer.config import PolicyConfig, Recompute
from trainer.group import PolicyGroup
from trainer.policy import PolicyWorker

pytestmark = pytest.mark.e2e

BUCKET_SIZE = 2000  # parameters; a layer has 8,000
ONE: dict[str, Any] = {"max_tokens_per_micro_batch": 70}
MODELS = {"qwen3, tied": 4, "glm4_moe": 3, "deepseek_v3": 3}  # layers
CASES: list[tuple[str, dict[str, Any]]] = [
    *((model, {"num_processes": 2}) for model in MODELS),
    ("qwen3, tied", {"num_processes": 2, "recompute": Recompute.layer}),
    ("qwen3, tied", {"num_processes": 4, "pipeline_parallel": 2, "virtual_stages": 2}),
]


def late(role: Any) -> type:
    """A worker whose weights are NaN after an optimizer step until they are waited for."""

    class Late(role):  # in here it travels by value
        def start(self, *where: Any) -> Any:
            from functools import partial
            from unittest.mock import patch

            import torch
            from megatron.core import parallel_state
            from megatron.core.distributed.param_and_grad_buffer import shard_buffer
            from torch import distributed as dist

            from trainer.megatron import optimizer

            def gather(group: Any) -> None:
                together = group.intra_distributed_optimizer_instance_group
                for bucket in group.buckets:
                    own = shard_buffer(bucket.param_data, together.size())[together.rank()]
                    dist.all_gather_into_tensor(bucket.param_data, own.clone(), group=together)

            def start_param_sync(group: Any, force_sync: bool = False) -> None:
                if force_sync:
                    gather(group)
                group.param_gather_handle = None if force_sync else SimpleNamespace(wait=partial(gather, group))
                group.param_gather_dispatched = True

            def spoil(group: Any) -> None:
                together = group.intra_distributed_optimizer_instance_group
                for bucket in group.buckets:
                    for rank, shard in enumerate(shard_buffer(bucket.param_data, together.size())):
                        if rank != together.rank():
                            shard.fill_(torch.nan)

            with patch.object(optimizer, "BUCKET_SIZE", BUCKET_SIZE):
                found = super().start(*where)
            chunks = self.engine.chunks
            assert all(chunk.ddp_config.overlap_param_gather for chunk in chunks)
            groups = [g for chunk in chunks for g in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups)]
            first = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
            assert not first or len(groups) > len(chunks), "one bucket each says nothing about order"
            for group in groups:
                group.start_param_sync = partial(start_param_sync, group)
            step = self.engine.optimizer.step

            def step_and_spoil() -> Any:
                answer = step()
                for group in groups:
                    spoil(group)
                return answer

            self.engine.optimizer.step = step_and_spoil
            return found

    return Late


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("models")
    return {name: random_model(name, made / name, num_layers=layers) for name, layers in MODELS.items()}


@pytest.fixture(scope="module")
def traces() -> list[SubTrace]:
    return seven_sub_traces()


Result = tuple[list[dict[str, float]], dict[int, Any]]


def critic(worker: type, folder: Path, layout: dict[str, Any], traces: list[SubTrace], scratch: Path) -> Result:
    """Metrics of two updates of three optimizer steps each, the values after them, and from a checkpoint."""
    config = CriticConfig(*layout_of(layout), head_init_std=0.1, num_epochs=1, num_minibatches=3)
    batch = batch_of(traces)
    with running(CriticGroup, worker, folder, config) as group:
        metrics = [group.update(batch, random_targets(traces), np.random.default_rng(i)).result() for i in range(2)]
        write_checkpoint(group, scratch / "critic")
        group.load(scratch / "critic").result()
        return metrics, group.values(batch).result()


def policy(worker: type, folder: Path, layout: dict[str, Any], traces: list[SubTrace], scratch: Path) -> Result:
    """The same of a policy, and its exported weights."""
    from safetensors.numpy import load_file

    config = PolicyConfig(*layout_of(layout), num_minibatches=3, entropy_coef=0.01)
    batch, ones = batch_of(traces), [np.ones(len(trace.tokens), np.float32) for trace in traces]
    with running(PolicyGroup, worker, folder, config) as group:
        scores = Scores(old_logprobs=group.logprobs(batch).result())
        metrics = []
        for i in range(2):
            rng = np.random.default_rng(i)
            metrics.append(group.update(batch, traces, random_targets(traces), scores, ones, rng).result())
        group.export(scratch / "policy").result()
        weights = load_file(scratch / "policy/model.safetensors")
        return metrics, dict(group.logprobs(batch).result()) | {-1 - i: weights[name] for i, name in enumerate(weights)}


ROLES = {policy: PolicyWorker, critic: CriticWorker}


@pytest.fixture(scope="module")
def references(
    ray_cluster: None, folders: dict[str, Path], traces: list[SubTrace], tmp_path_factory: pytest.TempPathFactory
) -> dict[Any, Result]:
    return {
        (role, model): role(worker, folder, ONE, traces, tmp_path_factory.mktemp("one"))
        for role, worker in ROLES.items()
        for model, folder in folders.items()
    }


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.__name__)
@pytest.mark.parametrize(("model", "layout"), CASES)
def test_nothing_is_read_before_it_is_there(
    model: str,
    layout: dict[str, Any],
    role: Any,
    references: Any,
    folders: dict[str, Path],
    traces: list[SubTrace],
    tmp_path: Path,
) -> None:
    wanted, after = references[role, model]
    metrics, found = role(late(ROLES[role]), folders[model], ONE | layout, traces, tmp_path)
    for mine, theirs in zip(metrics, wanted, strict=True):
        for key in theirs:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), key
    assert sorted(found) == sorted(after)
    for i in after:
        np.testing.assert_allclose(found[i], after[i], atol=5e-4)  # six Adam steps of lr 1e-2
