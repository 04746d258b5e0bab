"""Memory that is away: bytes come back exactly, views stay views, nothing stays behind, training is the same."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from roles import batch_of, random_qwen3, random_targets, running, seven_sub_traces, write_checkpoint

from buffer.types import Scores, SubTrace
from critic.group import CriticGroup
from slime.config import load
from trainer.config import LayoutConfig, Offload, PolicyConfig, Precision
from trainer.engine import Memory, needed
from trainer.group import PolicyGroup, SharedDevice
from trainer.megatron import offload
from trainer.megatron.offload import Residence, Shelf, storages


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "PIECE", 24)


def random_bytes(count: int) -> torch.Tensor:
    """Every pattern of bits, those of NaNs among them."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, count, np.uint8)).clone()


def test_bytes_come_back_exactly_and_views_stay_views() -> None:
    flat = random_bytes(400).view(torch.float32)
    view, slice_of_view = flat[10:40].view(5, 6), flat[10:40].view(5, 6)[2]
    parameter = torch.nn.Parameter(view)
    wanted = [t.detach().view(torch.uint8).clone() for t in (flat, view, slice_of_view, parameter)]
    shelf = Shelf()
    shelf.put(storages([parameter, flat, view]))
    assert [t.untyped_storage().nbytes() for t in (flat, view, slice_of_view, parameter)] == [0] * 4
    torch.full((100,), 7.0)  # may take the memory that was given away
    shelf.give_back()
    for tensor, bits in zip((flat, view, slice_of_view, parameter), wanted, strict=True):
        assert torch.equal(tensor.detach().view(torch.uint8), bits)
    flat[22] = 5.0
    assert slice_of_view[0] == parameter[2, 0] == 5.0, "still the same memory"


def test_what_is_not_kept_comes_back_as_zeros() -> None:
    gradients = random_bytes(100)
    shelf = Shelf()
    shelf.put(storages([gradients]), keep=False)
    assert gradients.untyped_storage().nbytes() == 0
    shelf.give_back()
    assert gradients.shape == (100,)
    assert not gradients.any()


def test_a_storage_is_moved_once_and_only_where_it_belongs() -> None:
    weights, moments, empty = torch.ones(10), torch.ones(6), torch.empty(0)
    master = weights[2:5]
    found = storages([master, moments, moments[1:], empty], but=[weights])
    assert [storage.data_ptr() for storage in found] == [moments.data_ptr()]
    assert len(storages([weights, master, moments])) == 2


class Chunk:
    """A model whose gradients are summed in a buffer, as megatron-core wraps it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.module = torch.nn.Linear(8, 3, dtype=dtype)
        self.module.register_buffer("bias_of_experts", torch.ones(4))
        self.buffers = [SimpleNamespace(grad_data=torch.zeros(27))]
        self.expert_parallel_buffers = [SimpleNamespace(grad_data=torch.zeros(5))]


def role(dtype: torch.dtype) -> tuple[Chunk, Any, dict[Memory, list[torch.Tensor]]]:
    """A chunk, a distributed optimizer after a step, and what they hold by part."""
    chunk = Chunk(dtype)
    weights = list(chunk.module.parameters())
    masters = [w.detach().float() if dtype is torch.bfloat16 else w.detach() for w in weights]
    adam = torch.optim.AdamW([m.requires_grad_() for m in masters], lr=0.1)
    for master in masters:
        master.grad = torch.ones_like(master)
    adam.step()
    optimizer = SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=adam), SimpleNamespace(optimizer=None)])
    state = [v for of_one in adam.state.values() for name, v in of_one.items() if name != "step"]
    return (
        chunk,
        optimizer,
        {
            Memory.weights: [*weights, chunk.module.bias_of_experts],
            Memory.gradients: [chunk.buffers[0].grad_data, chunk.expert_parallel_buffers[0].grad_data],
            Memory.state: state + (masters if dtype is torch.bfloat16 else []),
        },
    )


def there(tensors: Sequence[torch.Tensor]) -> set[bool]:
    return {tensor.untyped_storage().nbytes() > 0 for tensor in tensors}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("setting", list(Offload))
def test_parts_are_there_while_they_are_needed_and_only_then(setting: Offload, dtype: torch.dtype) -> None:
    chunk, optimizer, held = role(dtype)
    before = {part: [t.detach().clone() for t in tensors] for part, tensors in held.items()}
    residence = Residence(setting, [chunk], optimizer)
    goes = {Offload.none: [], Offload.optimizer: [Memory.state], Offload.role: list(Memory)}[setting]

    def assert_away(*parts: Memory) -> None:
        assert {part: there(tensors) for part, tensors in held.items()} == {
            part: {part not in parts} for part in Memory
        }

    assert_away(*goes)
    with residence.present(Memory.weights, Memory.gradients):
        assert_away(*[part for part in goes if part is Memory.state])
        with residence.present(*Memory):  # of a method that another one calls
            assert_away()
            for part in (Memory.weights, Memory.state):
                assert all(torch.equal(t, b) for t, b in zip(held[part], before[part], strict=True))
        assert_away(*[part for part in goes if part is Memory.state])
    with pytest.raises(ZeroDivisionError), residence.present(*Memory):
        raise ZeroDivisionError
    assert_away(*goes)


def test_a_frozen_role_has_weights_alone() -> None:
    model = torch.nn.Linear(8, 3).requires_grad_(False)
    weights = list(model.parameters())
    before = [w.clone() for w in weights]
    residence = Residence(Offload.role, [model], None)
    assert there(weights) == {False}
    with residence.present(Memory.weights):
        assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    assert there(weights) == {False}


@pytest.mark.parametrize(
    ("numbers", "together"),
    [
        (["cluster.sharing=trainers", "cluster.gpus_per_node=2"], False),
        (["cluster.sharing=trainers", "cluster.gpus_per_node=2", "policy.layout.offload=optimizer"], False),
        (["cluster.sharing=trainers", "cluster.gpus_per_node=2", "critic.layout.offload=role"], True),
        (["cluster.gpus_per_node=3", "policy.layout.offload=role"], False),
    ],
)
def test_only_roles_that_share_a_gpu_and_leave_it_are_serialized(numbers: list[str], together: bool) -> None:
    from slime.build import share_devices

    config = load(["recipe=ppo_coding", *numbers], None).config
    roles = [PolicyGroup([], config.policy, 1.0), CriticGroup([], config.critic, 1.0)]
    share_devices(config, roles)
    assert (roles[0].shared_device is not None) == together
    assert roles[0].shared_device is roles[1].shared_device


def test_all_but_a_few_calls_declare_what_they_need() -> None:
    """A method that reads an emptied tensor would end the process."""
    from critic.worker import CriticWorker
    from trainer.policy import PolicyWorker

    device_free = {
        "address",
        "weight_names",
        "join_engines",
        "leave_engines",
        "saved",
        "finish_save",
        "free_cache",
        "peak_memory_gb",
    }
    for worker in (PolicyWorker, CriticWorker):
        public = {n: f for n, f in inspect.getmembers(worker, inspect.isfunction) if not n.startswith("_")}
        assert {n for n, f in public.items() if not needed(f)} == (device_free | {"stop"}) & public.keys()


def test_serialized_roles_wait_for_each_other_and_not_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def method(name: str) -> Any:
        def remote(*arguments: Any) -> str:
            events.append(f"{name} asked")
            return name

        return SimpleNamespace(remote=remote)

    def wait(refs: list[str], **rest: Any) -> tuple[list[str], list[str]]:
        events.append(f"{refs[0]} answered")
        return refs, []

    monkeypatch.setattr("ray.wait", wait)
    monkeypatch.setattr("ray.get", lambda refs, timeout: refs)
    calls = ("load", "save", "saved")
    actors: dict[str, Any] = {
        name: SimpleNamespace(**{c: method(f"{name} {c}") for c in calls}) for name in ("policy", "critic")
    }
    policy, critic = (PolicyGroup([actor], PolicyConfig(), 60.0, name) for name, actor in actors.items())
    policy.shared_device = critic.shared_device = SharedDevice()
    asked: list[Any] = [policy.load(Path()), policy.save(Path()), critic.saved(), critic.load(Path())]
    assert events == [
        *("policy load asked", "policy save asked", "critic saved asked", "policy save answered"),
        "critic load asked",
    ]
    assert [one.result() for one in asked][3] == ["critic load"]


# ---------------------------------------------------------------- real workers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_qwen3(tmp_path_factory.mktemp("model") / "qwen3")


@pytest.fixture(scope="module")
def traces() -> list[SubTrace]:
    return seven_sub_traces()


def trained(
    folder: Path, layout: LayoutConfig, traces: list[SubTrace], scratch: Path
) -> tuple[dict[str, Any], list[dict[str, int]]]:
    """What two updates, a checkpoint, an export and a resumed update give; bytes on the devices between the calls."""
    import ray
    from safetensors.torch import load_file

    from trainer.policy import PolicyWorker

    def sizes(worker: Any) -> dict[str, int]:
        """Bytes of each part on the device."""
        from trainer.megatron.offload import gradients_of, state_of, storages, weights_of

        weights = weights_of(worker.engine.chunks)
        parts = {
            "weights": storages(weights),
            "gradients": storages(gradients_of(worker.engine.chunks)),
            "state": storages(state_of(worker.engine.optimizer), but=weights),
        }
        return {name: sum(one.nbytes() for one in found) for name, found in parts.items()}

    batch, targets = batch_of(traces), random_targets(traces)
    ones = [np.ones(len(trace.tokens), np.float32) for trace in traces]
    seen = []
    with running(PolicyGroup, PolicyWorker, folder, PolicyConfig(layout, num_minibatches=2)) as group:

        def look() -> None:
            seen.extend(ray.get([actor.__ray_call__.remote(sizes) for actor in group.actors], timeout=60))

        def update(seed: int) -> dict[str, float]:
            metrics: dict[str, float]
            metrics = group.update(
                batch, traces, targets, Scores(old_logprobs=old), ones, np.random.default_rng(seed)
            ).result()
            return metrics

        look()
        old = group.logprobs(batch).result()
        found: dict[str, Any] = {"old": dict(old), "first": update(0)}
        write_checkpoint(group, scratch / "checkpoint")
        look()
        found["second"] = update(1)
        group.export(scratch / "model").result()
        group.load(scratch / "checkpoint").result()
        found["second again"], found["new"] = update(1), dict(group.logprobs(batch).result())
        look()
    found["weights"] = {name: t.float().numpy() for name, t in load_file(scratch / "model/model.safetensors").items()}
    return found, seen


LAYOUTS = {
    "fp32": LayoutConfig(max_tokens_per_micro_batch=70),
    "bf16": LayoutConfig(max_tokens_per_micro_batch=70, precision=Precision.bf16),
    "DP2": LayoutConfig(max_tokens_per_micro_batch=70, num_processes=2),
}


@pytest.mark.e2e
@pytest.mark.parametrize("name", LAYOUTS)
def test_training_is_bit_for_bit_the_same(
    name: str, folder: Path, traces: list[SubTrace], tmp_path: Path, ray_cluster: None
) -> None:
    results = {}
    for setting in Offload:
        layout = replace(LAYOUTS[name], offload=setting)
        results[setting], seen = trained(folder, layout, traces, tmp_path / setting.value)
        for sizes_then in seen:
            gone = {part for part, size in sizes_then.items() if size == 0}
            assert gone >= {"none": set(), "optimizer": {"state"}, "role": set(sizes_then)}[setting.value]
            assert setting is not Offload.optimizer or gone == {"state"}
        assert setting is not Offload.none or all(seen[-1].values()), "there is something to be away"
    plain = results[Offload.none]
    assert plain["second"] == plain["second again"], "a resumed role goes on as it would have"
    assert not np.array_equal(plain["old"][0], plain["new"][0]), "training moves something"
    for found in (results[Offload.optimizer], results[Offload.role]):
        np.testing.assert_equal(found, plain)
