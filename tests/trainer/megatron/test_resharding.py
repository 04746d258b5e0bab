"""Checkpoints of real workers: taken in one layout, read in another, while training goes on, with failures."""

from __future__ import annotations

import errno
import pickle
import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from roles import (
    LIMIT_S,
    batch_of,
    finish_checkpoint,
    layout_of,
    on_ranks,
    random_qwen3,
    running,
    sub_trace,
    write_checkpoint,
)

from buffer.types import SubTrace
from trainer.config import PolicyConfig
from trainer.group import Pending, PolicyGroup
from trainer.policy import PolicyWorker

pytestmark = pytest.mark.e2e
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's processes can't import this module

Layout = dict[str, Any]
ONE: Layout = {"max_tokens_per_micro_batch": 120}
DENSE: list[Layout] = [  # each reads what the one before it has written; the first and the last run are one process
    {"num_processes": 2, "tensor_parallel": 2, "sequence_parallel": True},
    {"num_processes": 2, "pipeline_parallel": 2},
    {"num_processes": 2},
    {"num_processes": 2, "pipeline_parallel": 2, "virtual_stages": 2},
]
EXPERTS: list[Layout] = [
    {"num_processes": 2, "expert_parallel": 2},
    {"num_processes": 2, "pipeline_parallel": 2},
    {"num_processes": 2, "tensor_parallel": 2, "sequence_parallel": True},
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five layers, which two processes do not divide, with tied embeddings."""
    return random_qwen3(tmp_path_factory.mktemp("dense") / "model", num_layers=5)


@pytest.fixture(scope="module")
def traces() -> list[SubTrace]:
    rng = np.random.default_rng(1)
    return [sub_trace(rng, length, i) for i, length in enumerate([50, 7, 33, 12, 60, 41])]


def role(folder: Path, layout: Layout) -> Any:
    return running(PolicyGroup, PolicyWorker, folder, PolicyConfig(*layout_of(ONE | layout)))


def train(group: Any, traces: list[SubTrace]) -> dict[str, float]:
    """One supervised step on all sub-traces: its metrics."""
    grid = group.grid(range(len(traces)), [len(trace.tokens) for trace in traces])
    metrics: dict[str, float] = group.imitate(batch_of(traces), grid).result()
    return metrics


def uninterrupted(folder: Path, traces: list[SubTrace], first: Path, steps: int) -> list[dict[str, float]]:
    """Metrics of the steps after `first`, a checkpoint that one process wrote on its way."""
    with role(folder, ONE) as group:
        train(group, traces)
        train(group, traces)
        write_checkpoint(group, first)
        return [train(group, traces) for _ in range(steps)]


@pytest.mark.parametrize(("experts", "layouts"), [(0, DENSE), (4, EXPERTS)], ids=["dense", "experts"])
def test_a_run_goes_on_in_any_layout(
    experts: int, layouts: list[Layout], traces: list[SubTrace], ray_cluster: None, tmp_path: Path, dense: Path
) -> None:
    """Loss and gradient norm of every step are those of a run that was never stopped.

    Each checkpoint is written while its role trains on: what is trained after `save` returned is not in it. Exported
    without processes it gives the files that the workers themselves give, bit for bit.
    """
    folder = random_qwen3(tmp_path / "model", 3, experts) if experts else dense
    wanted = uninterrupted(folder, traces, tmp_path / "step0", len(layouts) + 1)
    for i, layout in enumerate([*layouts, ONE]):
        with role(folder, layout) as group:
            group.load(tmp_path / f"step{i}").result()
            found = train(group, traces)
            assert found["loss"] == pytest.approx(wanted[i]["loss"], rel=2e-5), layout
            assert found["grad_norm"] == pytest.approx(wanted[i]["grad_norm"], rel=2e-4), layout
            group.export(tmp_path / f"model{i}").result()
            group.save(tmp_path / f"step{i + 1}").result()
            moved = train(group, traces)
            assert moved["loss"] < 0.99 * found["loss"], "the test means nothing if training moves nothing"
            finish_checkpoint(group)
        exported_alike(tmp_path / f"step{i + 1}", folder, tmp_path / f"model{i}", tmp_path / f"export{i}")


def exported_alike(checkpoint: Path, source: Path, wanted: Path, out: Path) -> None:
    from trainer.megatron.storage import stored

    stored.export(checkpoint, source, out)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in wanted.iterdir())
    for path in wanted.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.fixture(scope="module")
def pair(dense: Path, traces: list[SubTrace], ray_cluster: None) -> Iterator[Any]:
    """Two tensor-parallel ranks that have taken a step."""
    with role(dense, DENSE[0]) as group:
        train(group, traces)
        yield group


def draws(worker: Any) -> list[float]:
    """Of each generator that a process has."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        parallel = torch.rand(1).item()
    return [random.random(), float(np.random.random()), torch.rand(1).item(), parallel]


def test_the_same_layout_goes_on_bit_for_bit_with_the_same_draws(
    pair: Any, traces: list[SubTrace], tmp_path: Path
) -> None:
    write_checkpoint(pair, tmp_path / "one")
    drawn = on_ranks(pair, draws)
    assert drawn[0][3] != drawn[1][3], "tensor-parallel ranks have different generators"
    later = train(pair, traces)
    assert on_ranks(pair, draws) != drawn
    pair.load(tmp_path / "one").result()
    assert on_ranks(pair, draws) == drawn
    assert train(pair, traces) == later


def fill_disk(worker: Any, path: str) -> None:
    """Puts a file that takes nothing where this rank will write its tensors."""
    if worker.settings.rank == 1:
        Path(path).mkdir(parents=True)
        (Path(path) / "__1_0.distcp").symlink_to("/dev/full")


def test_a_full_disk_is_told_with_the_file_and_blocks_nobody(pair: Any, traces: list[SubTrace], tmp_path: Path) -> None:
    on_ranks(pair, fill_disk, str(tmp_path / "full"))
    pair.save(tmp_path / "full").result()
    with pytest.raises(OSError, match=r"No space left on device.*__1_0\.distcp") as caught:
        finish_checkpoint(pair)
    error: Any = caught.value
    assert error.cause.errno == errno.ENOSPC
    assert not (tmp_path / "full" / "metadata.json").exists()
    train(pair, traces)
    write_checkpoint(pair, tmp_path / "next")
    pair.load(tmp_path / "next").result()


def room(worker: Any, free: int | None) -> None:
    """Lets this process see so many free bytes; None: what there is."""
    from trainer.megatron.storage import checkpoint

    usage: Any = shutil.disk_usage if free is None else lambda folder: SimpleNamespace(free=free)
    checkpoint.disk_usage = usage


def test_no_room_is_told_by_all_ranks_before_anything_is_written(pair: Any, tmp_path: Path) -> None:
    on_ranks(pair, room, 1000)
    with pytest.raises(OSError, match=r"the checkpoint needs [\d,]{6,} bytes, the disk has 1,000 free"):
        pair.save(tmp_path / "small").result()
    on_ranks(pair, room, None)
    assert not list((tmp_path / "small").iterdir())


def broken(whole: Path, folder: Path, how: str) -> str:
    """A copy of a checkpoint with something wrong in it, and what loading must say."""
    shutil.copytree(whole, folder)
    index = folder / ".metadata"
    name = "model.decoder.layers.1.mlp.linear_fc2.weight"
    if how == "missing":
        content = pickle.loads(index.read_bytes())
        del content.state_dict_metadata[name]
        index.write_bytes(pickle.dumps(content))
        return f"{folder}: tensor {name} is missing"
    if how == "misshapen":
        content = pickle.loads(index.read_bytes())
        content.state_dict_metadata[name].size = torch.Size([32, 47])
        index.write_bytes(pickle.dumps(content))
        return rf"{folder}: tensor {name} has shape \(32, 47\), the model's is \(32, 48\)"
    names = {"cut off": "__1_0.distcp", "no index": ".metadata", "scrambled": "__0_0.distcp"}
    said = {"cut off": "is cut off", "no index": "can't be read", "scrambled": "can't be read"}
    path = folder / names[how]
    content = path.read_bytes()
    path.write_bytes(bytes(len(content)) if how == "scrambled" else content[: len(content) // 2])
    return f"{folder if how == 'scrambled' else path}: {said[how]}"


@pytest.mark.parametrize("how", ["missing", "misshapen", "cut off", "no index", "scrambled"])
def test_a_broken_checkpoint_is_refused_by_name(pair: Any, tmp_path: Path, how: str) -> None:
    write_checkpoint(pair, tmp_path / "whole")
    message = broken(tmp_path / "whole", tmp_path / "broken", how)
    with pytest.raises(ValueError, match=message):
        pair.load(tmp_path / "broken").result()
    pair.load(tmp_path / "whole").result()


def test_a_rank_that_fails_ends_the_wait_for_the_others_at_once(ray_cluster: None) -> None:
    class Rank:
        def save(self, folder: str, fails: bool) -> None:
            if fails:
                raise OSError(errno.ENOSPC, "No space left on device", folder)
            time.sleep(LIMIT_S)  # in a collective with the other

    ranks: list[Any] = [ray.remote(Rank).remote() for _ in range(2)]
    group = PolicyGroup(ranks, PolicyConfig(*layout_of(ONE | DENSE[2])), LIMIT_S)
    calls = [rank.save.remote("folder", i == 1) for i, rank in enumerate(ranks)]
    began = time.monotonic()
    with pytest.raises(OSError, match="No space left"):
        Pending(group, "save", calls, list).result()
    assert time.monotonic() - began < 30
    for rank in ranks:
        ray.kill(rank)
