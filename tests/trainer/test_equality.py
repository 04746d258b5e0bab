"""Neither layout nor engine changes the mathematics: every kind of parallelism and the engine in plain torch against
one process of Megatron, and that against transformers; dense and with experts, policy and critic, over three steps.

Learning rate and eps of Adam are equal and large, so the first step moves each weight by g / (|g| / 0.1 + 1): weights
after it are the gradient, gathered by the product's own export. Steps after it have Adam's state.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from layouts import ADAM, LAYOUTS, ONE
from roles import batch_of, layout_of, random_qwen3, random_targets, running, seven_sub_traces

from buffer.types import Scores, SubTrace, TokenColumn
from critic.config import CriticConfig
from critic.group import CriticGroup
from critic.worker import CriticWorker
from trainer.config import PolicyConfig
from trainer.engine import MakeEngine, megatron
from trainer.group import PolicyGroup
from trainer.policy import PolicyWorker
from trainer.reference.engine import TorchEngine

pytestmark = pytest.mark.e2e

KINDS = ("dense", "experts")


def cases() -> list[Any]:
    """A model with experts wants sequence parallelism beside tensor parallelism, one without has none to spread."""
    names = [(kind, name) for kind in KINDS for name in LAYOUTS]
    wrong = {("experts", "TP2"), ("experts", "TP2+SP x CP2"), *(("dense", name) for name in LAYOUTS if "EP2" in name)}
    return [pytest.param(kind, name, id=f"{name}, {kind}") for kind, name in names if (kind, name) not in wrong]


class Result(NamedTuple):
    """Of one role in one layout."""

    before: dict[int, Any]  # log-probabilities or values
    after: dict[int, Any]
    metrics: list[dict[str, float]]  # of each step
    first: dict[str, np.ndarray]  # weights after the first step
    last: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("models")
    return {kind: random_qwen3(made / kind, 5, experts=4 if kind == "experts" else 0) for kind in KINDS}


@pytest.fixture(scope="module")
def traces() -> list[SubTrace]:
    return seven_sub_traces()


def weights(group: Any) -> dict[str, np.ndarray]:
    """The whole model under Hugging Face names."""
    import ray

    def read(worker: Any) -> dict[str, np.ndarray]:
        found = worker.engine.weights()
        return {name: t.clone().numpy() for name, t in found if t.device.type != "meta"}

    answers = ray.get([actor.__ray_call__.remote(read) for actor in group.actors], timeout=300)
    assert all(not answer for answer in answers[1:]), "only rank 0 gets whole tensors"
    return answers[0]


def policy(folder: Path, layout: dict[str, Any], traces: list[SubTrace], engine: MakeEngine = megatron) -> Result:
    config = PolicyConfig(*layout_of(layout), entropy_coef=0.01, kl_coef=0.1)
    batch, ones = batch_of(traces), [np.ones(len(trace.tokens), np.float32) for trace in traces]
    with running(PolicyGroup, partial(PolicyWorker, make_engine=engine), folder, config, ADAM) as group:
        before = group.logprobs(batch).result()
        metrics, seen = [], []
        for step in range(3):
            rng = np.random.default_rng(step)
            update = group.update(
                batch, traces, random_targets(traces), Scores(TokenColumn(), before, before), ones, rng
            )
            metrics.append(update.result())
            seen.append(weights(group) if step != 1 else {})
        return Result(before, group.logprobs(batch).result(), metrics, seen[0], seen[2])


def critic(folder: Path, layout: dict[str, Any], traces: list[SubTrace], engine: MakeEngine = megatron) -> Result:
    config = CriticConfig(*layout_of(layout), head_init_std=0.1, value_clip=0.2, num_epochs=1, num_minibatches=1)
    batch = batch_of(traces)
    with running(CriticGroup, partial(CriticWorker, make_engine=engine), folder, config, ADAM) as group:
        before = group.values(batch).result()
        metrics, seen = [], []
        for step in range(3):
            metrics.append(group.update(batch, random_targets(traces), np.random.default_rng(step)).result())
            seen.append(weights(group) if step != 1 else {})
        return Result(before, group.values(batch).result(), metrics, seen[0], seen[2])


ROLES: dict[str, Callable[..., Result]] = {"policy": policy, "critic": critic}


@pytest.fixture(scope="module")
def references(ray_cluster: None, folders: dict[str, Path], traces: list[SubTrace]) -> dict[tuple[str, str], Result]:
    return {(role, kind): run(folders[kind], ONE, traces) for kind in KINDS for role, run in ROLES.items()}


def assert_close(found: dict[Any, np.ndarray], wanted: dict[Any, np.ndarray], bound: float) -> None:
    assert sorted(found) == sorted(wanted)
    worst = {key: float(np.abs(found[key] - wanted[key]).max()) for key in wanted}
    assert max(worst.values()) < bound, sorted(worst.items(), key=lambda item: -item[1])[:3]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("kind", "name"), cases())
def test_layout_changes_nothing(
    kind: str,
    name: str,
    role: str,
    references: dict[tuple[str, str], Result],
    folders: dict[str, Path],
    traces: list[SubTrace],
) -> None:
    found = ROLES[role](folders[kind], ONE | LAYOUTS[name], traces)
    assert_same(found, references[role, kind])


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_torch_engine_computes_what_megatrons_does(
    kind: str, role: str, references: dict[tuple[str, str], Result], folders: dict[str, Path], traces: list[SubTrace]
) -> None:
    """Behind the same workers, losses and micro-batches."""
    assert_same(ROLES[role](folders[kind], ONE, traces, TorchEngine), references[role, kind])


def assert_same(found: Result, wanted: Result) -> None:
    """One role's numbers are those of another layout or engine, and it has learnt something."""
    assert_close(found.before, wanted.before, 2e-6)
    for mine, theirs in zip(found.metrics, wanted.metrics, strict=True):
        assert sorted(mine) == sorted(theirs)
        for key in theirs:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-6), key
    assert_close(found.first, wanted.first, 1e-6)
    assert_close(found.last, wanted.last, 1e-5)
    assert_close(found.after, wanted.after, 1e-5)
    assert max(float(np.abs(found.after[i] - found.before[i]).max()) for i in found.after) > 0.1, "nothing was learnt"


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("kind", "name"), [("dense", "DP2"), ("experts", "EP2")])
def test_a_rank_without_any_token_changes_nothing(
    kind: str, name: str, role: str, ray_cluster: None, folders: dict[str, Path], traces: list[SubTrace]
) -> None:
    """One sub-trace for two data-parallel ranks: as where all other episodes of an optimizer step have no turn."""
    layouts = ONE, ONE | LAYOUTS[name]
    wanted, found = (ROLES[role](folders[kind], layout, traces[:1]) for layout in layouts)
    assert_close(found.first, wanted.first, 1e-6)
    assert found.metrics[0] == pytest.approx(wanted.metrics[0], rel=1e-5, abs=1e-6)


def hidden_states(model: Any, trace: SubTrace) -> torch.Tensor:
    """[1, T, hidden]: what transformers' decoder says of a sub-trace."""
    return model.model(torch.from_numpy(trace.tokens.astype(np.int64))[None]).last_hidden_state


def logprobs_of(model: Any, trace: SubTrace) -> torch.Tensor:
    """[T - 1] of the tokens after the first."""
    labels = torch.from_numpy(trace.tokens[1:].astype(np.int64))
    return model.lm_head(hidden_states(model, trace))[0, :-1].log_softmax(-1).gather(1, labels[:, None])[:, 0]


def three_steps(model: Any, parameters: list[Any], losses: Any, num_actions: int, path: Path) -> tuple[Any, Any]:
    """Metrics of each step and weights after the last, with torch's AdamW on transformers' model."""
    from safetensors.torch import load_file

    adam = torch.optim.AdamW(parameters, ADAM.lr, (ADAM.beta1, ADAM.beta2), ADAM.eps, weight_decay=0.0)
    metrics = []
    for _ in range(3):
        loss = sum(losses()) / num_actions
        adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, ADAM.max_grad_norm)
        adam.step()
        metrics.append({"loss": loss.item(), "grad_norm": norm.item()})
    model.save_pretrained(path)
    return metrics, {name: tensor.numpy() for name, tensor in load_file(path / "model.safetensors").items()}


@pytest.mark.parametrize("kind", KINDS)
def test_policy_is_that_of_transformers(
    kind: str, ray_cluster: None, folders: dict[str, Path], traces: list[SubTrace], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folders[kind], dtype=torch.float32).eval()
    batch, masks = batch_of(traces), [torch.from_numpy(trace.action_mask[1:]) for trace in traces]
    with running(PolicyGroup, PolicyWorker, folders[kind], PolicyConfig(*layout_of(ONE)), ADAM) as group:
        before = group.logprobs(batch).result()
        for i, trace in enumerate(traces):
            np.testing.assert_allclose(before[i][1:], logprobs_of(model, trace).detach().numpy(), atol=5e-6)
        grid = group.grid(range(len(traces)), [len(trace.tokens) for trace in traces])
        found = [group.imitate(batch, grid).result() for _ in range(3)]
        last = weights(group)
    losses = lambda: [-logprobs_of(model, t)[mask].sum() for t, mask in zip(traces, masks, strict=True)]  # noqa: E731
    num_actions = sum(int(mask.sum()) for mask in masks)
    metrics, wanted = three_steps(model, list(model.parameters()), losses, num_actions, tmp_path)
    for mine, theirs in zip(found, metrics, strict=True):
        for key, number in theirs.items():
            assert mine[key] == pytest.approx(number, rel=1e-5), key
    assert_close(last, wanted, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_critic_is_transformers_with_a_head(
    kind: str, ray_cluster: None, folders: dict[str, Path], traces: list[SubTrace], tmp_path: Path
) -> None:
    import ray
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folders[kind], dtype=torch.float32).eval()
    batch, targets = batch_of(traces), random_targets(traces)
    config = CriticConfig(*layout_of(ONE), head_init_std=0.1, value_clip=0.0, num_epochs=1, num_minibatches=1)
    with running(CriticGroup, CriticWorker, folders[kind], config, ADAM) as group:
        head = group.actors[0].__ray_call__.remote(lambda worker: worker.engine.models[0].output_layer.state_dict())
        weight, bias = (tensor.requires_grad_() for tensor in ray.get(head, timeout=60).values())
        values = lambda trace: hidden_states(model, trace)[0, :-1] @ weight[0] + bias  # noqa: E731
        before = group.values(batch).result()
        for i, trace in enumerate(traces):
            np.testing.assert_allclose(before[i][1:], values(trace).detach().numpy(), atol=5e-6)
        found = [group.update(batch, targets, np.random.default_rng(step)).result() for step in range(3)]
        last = weights(group)

    def losses() -> list[torch.Tensor]:
        found = []
        for trace, target in zip(traces, targets, strict=True):
            error = values(trace) - torch.from_numpy(target.returns[1:])
            found.append(0.5 * (error[torch.from_numpy(trace.action_mask[1:])] ** 2).sum())
        return found

    num_actions = sum(int(trace.action_mask[1:].sum()) for trace in traces)
    parameters = [*model.model.parameters(), weight, bias]
    metrics, wanted = three_steps(model, parameters, losses, num_actions, tmp_path)
    for mine, theirs in zip(found, metrics, strict=True):
        for key, number in theirs.items():
            assert mine[key] == pytest.approx(number, rel=1e-5), key
    assert_close(last, {name: tensor for name, tensor in wanted.items() if name != "lm_head.weight"}, 1e-5)
