"""The engine in plain torch: what it saves, freezes, exports and refuses. Its numbers: trainer/test_equality.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from roles import layout_of, random_qwen3, random_targets, seven_sub_traces
from safetensors.torch import load_file

from critic.config import CriticConfig
from critic.worker import CriticWorker
from trainer.config import OptimizerConfig, PolicyConfig, Precision
from trainer.engine import EngineSettings
from trainer.policy import PolicyWorker
from trainer.reference.engine import TorchEngine

TRACES = seven_sub_traces()
GRID = [[[0, 1], [2, 3], [4], [5, 6]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_qwen3(tmp_path_factory.mktemp("model") / "qwen3")


def settings(folder: Path, **numbers: Any) -> EngineSettings:
    return EngineSettings(0, *layout_of(numbers), OptimizerConfig(lr=1e-2), str(folder), 0, 1, 60.0)


def critic(folder: Path, freeze: list[str]) -> CriticWorker:
    made = CriticWorker(settings(folder), CriticConfig(head_init_std=0.1, freeze=freeze), TorchEngine)
    made.start("", 0)
    return made


def step(worker: CriticWorker) -> None:
    targets = random_targets(TRACES)
    columns = {name: {i: getattr(t, name) for i, t in enumerate(targets)} for name in ("returns", "values")}
    worker.update(TRACES, [columns], [GRID])


def test_a_loaded_critic_goes_on_as_the_saved_one_and_frozen_weights_stay(folder: Path, tmp_path: Path) -> None:
    worker = critic(folder, ["*self_attention*"])
    before = {name: t.clone() for name, t in worker.engine.weights()}
    step(worker)
    after = dict(worker.engine.weights())
    assert {name for name, t in before.items() if torch.equal(t, after[name])} == {
        n for n in before if "self_attn" in n
    }
    worker.save(str(tmp_path / "one"))
    worker.finish_save([worker.saved() or b""])
    step(worker)
    wanted = worker.values(TRACES, GRID)
    other = critic(folder, ["*self_attention*"])
    other.load(str(tmp_path / "one"))
    step(other)
    for i, values in other.values(TRACES, GRID).items():
        np.testing.assert_array_equal(values, wanted[i])


def test_an_exported_folder_is_the_source_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    worker = PolicyWorker(settings(folder), PolicyConfig(), TorchEngine)
    worker.start("", 0)
    worker.export(str(tmp_path / "out"))
    found, source = load_file(tmp_path / "out" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert [(name, list(t.shape)) for name, t in worker.engine.weights()] == [
        (n, s) for n, _, s in worker.weight_names()
    ]
    assert sorted(found) == sorted(source)
    assert all(torch.equal(found[name], tensor) for name, tensor in source.items())


def test_what_it_can_not_do_is_refused(folder: Path, tmp_path: Path) -> None:
    more: tuple[dict[str, Any], ...] = {"num_processes": 2}, {"precision": Precision.bf16}
    for numbers in more:
        with pytest.raises(ValueError, match="this engine has only 1, fp32, none, none"):
            TorchEngine(settings(folder, **numbers))
    with pytest.raises(ValueError, match=r"tensor_parallel=2.*this engine has only Megatron's defaults"):
        TorchEngine(settings(folder, tensor_parallel=2))
    with pytest.raises(ValueError, match=r"'\*self_attn\*' matches none"):
        critic(folder, ["*self_attn*"])
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'state.pt'}: can't be read")):
        critic(folder, []).load(str(tmp_path))
