"""The critic's training process: where its weights come from, what of it trains, what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from roles import batch_of, layout_of, random_qwen3, running, sub_trace, write_checkpoint

from buffer.types import SubTrace, Targets
from critic.config import CriticConfig
from critic.group import CriticGroup
from critic.worker import CriticWorker, one_longer
from trainer.config import LayoutConfig, Precision, Recompute
from trainer.engine import frozen_names
from trainer.megatron.optimizer import freeze

LIMIT_S = 300.0
ATTENTION = "*self_attention*"
NAMES = [
    "embedding.word_embeddings.weight",
    "decoder.layers.0.self_attention.linear_qkv.weight",
    "decoder.layers.0.mlp.linear_fc1.weight",
    "output_layer.weight",
]
Arrays = dict[str, np.ndarray]


def test_frozen_names_match_the_whole_name_and_case() -> None:
    assert frozen_names(NAMES, []) == []
    assert frozen_names(NAMES, ["*.layers.0.*", "embedding*"]) == NAMES[:3]
    assert frozen_names(NAMES, [ATTENTION, "*attention*"]) == [NAMES[1]]
    for part in ("self_attention", "*SELF_ATTENTION*"):
        with pytest.raises(ValueError, match="matches none of the 4"):
            frozen_names(NAMES, [part])


def test_a_pattern_that_matches_nothing_names_what_comes_nearest() -> None:
    with pytest.raises(ValueError, match=r"'\*self_attn\*' matches none.*nearest: decoder\.layers\.0\.self_attention"):
        frozen_names(NAMES, ["embedding*", "*self_attn*"])


def test_freezing_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="matches all 4 parameters"):
        frozen_names(NAMES, ["decoder*", "embedding*", "output_layer*"])


def test_freeze_takes_the_gradient_from_what_matches() -> None:
    """Also where another pipeline stage has it: a pattern must match a name of the whole model."""
    model: Any = torch.nn.Module()
    model.pre_process, model.embedding, model.head = True, torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    own = dict(model.named_parameters())
    names = [*own, "elsewhere.weight"]
    freeze([model], own, names, ["head.*", "elsewhere*"])
    assert [name for name, p in own.items() if p.requires_grad] == ["embedding.weight", "embedding.bias"]
    with pytest.raises(ValueError, match="'tail' matches none"):
        freeze([model], own, names, ["tail"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Qwen3."""
    return random_qwen3(tmp_path_factory.mktemp("model") / "qwen3")


@pytest.fixture(scope="module")
def traces() -> list[SubTrace]:
    rng = np.random.default_rng(1)
    return [sub_trace(rng, length, i) for i, length in enumerate([30, 7, 22, 2])]


def targets_of(traces: Sequence[SubTrace], values: Mapping[int, np.ndarray]) -> list[Targets]:
    """Returns 0 or 1, an episode each; values as the critic said them."""
    found = []
    for i, trace in enumerate(traces):
        here = trace.action_mask.astype(np.float32)
        found.append(Targets(np.zeros_like(here), here * (i % 2), here * values[i]))
    return found


def weights(group: CriticGroup) -> list[Arrays]:
    """Each rank's shard, by Megatron name."""

    def read(worker: Any) -> Arrays:
        parameters = worker.engine.models[0].named_parameters()
        return {name: p.detach().float().numpy().copy() for name, p in parameters}

    return ray.get([actor.__ray_call__.remote(read) for actor in group.actors], timeout=LIMIT_S)


def trunk(group: CriticGroup) -> Arrays:
    """The whole model but for its head, under Hugging Face names."""
    of = lambda worker: {name: t.clone().numpy() for name, t in worker.engine.weights()}  # noqa: E731
    return ray.get([actor.__ray_call__.remote(of) for actor in group.actors], timeout=LIMIT_S)[0]


def three_updates(group: CriticGroup, traces: Sequence[SubTrace], seed: int) -> dict[str, float]:
    batch = batch_of(traces)
    targets = targets_of(traces, group.values(batch).result())
    return group.update(batch, targets, np.random.default_rng(seed)).result()


def assert_frozen(before: Sequence[Arrays], after: Sequence[Arrays], patterns: Sequence[str]) -> None:
    """Matching parameters are bitwise the same on every rank, every other one has moved."""
    for old, new in zip(before, after, strict=True):
        assert list(old) == list(new)
        frozen = frozen_names(list(old), patterns)
        assert 0 < len(frozen) < len(old)
        assert {name for name in old if np.array_equal(old[name], new[name])} == set(frozen)


@pytest.mark.e2e
def test_trunk_is_the_policys_and_frozen_attention_stays_so(
    folder: Path, traces: list[SubTrace], ray_cluster: None, tmp_path: Path
) -> None:
    """Bitwise, over a save and a load, and in another layout."""
    from safetensors.torch import load_file

    source = {name: tensor.numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    batch = batch_of(traces)

    def config(**numbers: Any) -> CriticConfig:
        return CriticConfig(*layout_of(numbers), head_init_std=0.1, num_epochs=3, freeze=[ATTENTION])

    with running(CriticGroup, CriticWorker, folder, config(max_tokens_per_micro_batch=40)) as group:
        loaded = trunk(group)
        assert sorted(loaded) == sorted(source)
        assert all(np.array_equal(loaded[name], source[name]) for name in source)

        begin = weights(group)
        metrics = three_updates(group, traces, seed=3)
        middle = weights(group)
        assert_frozen(begin, middle, [ATTENTION])
        write_checkpoint(group, tmp_path / "one")
        three_updates(group, traces, seed=4)
        end, values = weights(group), group.values(batch).result()
        assert_frozen(middle, end, [ATTENTION])

        group.load(tmp_path / "one").result()
        assert all(np.array_equal(middle[0][name], now) for name, now in weights(group)[0].items())
        three_updates(group, traces, seed=4)  # the optimizer's state came along
        again = weights(group)
        assert all(np.array_equal(end[0][name], again[0][name]) for name in end[0])

    two = config(num_processes=2, tensor_parallel=2, sequence_parallel=True, max_tokens_per_micro_batch=80)
    with running(CriticGroup, CriticWorker, folder, two) as group:
        begin = weights(group)
        found = three_updates(group, traces, seed=3)
        assert_frozen(begin, weights(group), [ATTENTION])
        for key in ("loss", "grad_norm"):
            assert found[key] == pytest.approx(metrics[key], rel=1e-4), key
        group.load(tmp_path / "one").result()
        three_updates(group, traces, seed=4)
        for i, now in group.values(batch).result().items():
            np.testing.assert_allclose(now, values[i], atol=5e-4)


@pytest.mark.e2e
def test_bounds_the_state_after_the_end_and_frozen_embeddings(
    folder: Path, traces: list[SubTrace], ray_cluster: None
) -> None:
    """Embeddings are frozen below recomputed layers, which must train all the same."""
    batch, patterns = batch_of(traces), ["embedding*", ATTENTION]
    layout = LayoutConfig(max_tokens_per_micro_batch=34, recompute=Recompute.layer)
    config = CriticConfig(layout, num_epochs=6, value_range=[-1.0, 3.0], value_clip=0.2, freeze=patterns)
    with running(CriticGroup, CriticWorker, folder, config) as group:
        start, begin = group.values(batch).result(), weights(group)
        assert all(np.array_equal(v[1:], np.ones(len(v) - 1, np.float32)) for v in start.values())
        metrics = group.update(batch, targets_of(traces, start), np.random.default_rng(0)).result()
        assert 0 < metrics["clip_fraction"] < 1  # six steps of a high lr move some values by more than the clip
        assert_frozen(begin, weights(group), patterns)
        values, further = group.values(batch).result(), group.values(batch, beyond=True).result()
        longer = group.values(batch_of([one_longer(one_longer(trace)) for trace in traces])).result()
    for i, trace in enumerate(traces):
        assert np.all((values[i][1:] > -1) & (values[i][1:] < 3))
        assert np.ptp(np.concatenate([values[i][1:], start[i][1:]])) > 0.01
        assert len(further[i]) == len(trace.tokens) + 1
        np.testing.assert_allclose(further[i][:-1], values[i], atol=1e-6)
        np.testing.assert_allclose(further[i], longer[i][: len(further[i])], atol=1e-6)


@pytest.mark.e2e
def test_a_critic_in_bf16_with_a_head_in_fp32_is_saved_whole(
    folder: Path, traces: list[SubTrace], ray_cluster: None, tmp_path: Path
) -> None:
    """Weights, moments and master weights of both precisions: after a load training goes on bit for bit."""
    config = CriticConfig(LayoutConfig(precision=Precision.bf16), head_init_std=0.1)
    with running(CriticGroup, CriticWorker, folder, config) as group:
        three_updates(group, traces, seed=3)
        middle = weights(group)[0]
        rounded = {name for name, a in middle.items() if np.array_equal(torch.tensor(a).bfloat16().float().numpy(), a)}
        assert set(middle) - rounded == {"output_layer.weight", "output_layer.bias"}
        write_checkpoint(group, tmp_path / "bf16")
        three_updates(group, traces, seed=4)
        end = weights(group)[0]
        group.load(tmp_path / "bf16").result()
        assert all(np.array_equal(middle[name], now) for name, now in weights(group)[0].items())
        three_updates(group, traces, seed=4)
        assert all(np.array_equal(end[name], now) for name, now in weights(group)[0].items())
