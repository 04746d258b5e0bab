"""Weights into two real engines of two tensor-parallel ranks each, and what becomes of requests that are running."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import CONFIG, CONTEXT, VOCAB, make_model, prompts_with_shared_prefixes, reference

from buffer.types import Bool
from machine.ports import ReservedPort
from rollout.config import PauseMode
from rollout.engines.client import EngineClient, Generation
from rollout.engines.group import EngineGroup
from rollout.engines.server import EngineServer, ServerSettings
from slime.weights import Weights
from trainer.publish.broadcast import UpdateGroup, Weight, buckets
from trainer.publish.delta import Base


class Group:
    """Stands where the policy's group does: asks a trainer in a thread of this process."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._threads = ThreadPoolExecutor(4)

    def __getattr__(self, method: str) -> Any:
        return functools.partial(self._threads.submit, getattr(self._trainer, method))


class Trainer:
    """Stands where the policy's rank 0 does: a transformers model, sent the way rank 0 sends."""

    limit = 200_000  # bytes of a bucket

    def __init__(self, model: Any) -> None:
        self.model = model
        self.omitted = ""  # name of a tensor that is not sent
        self.base: Base | None = None
        self.sent: list[int] = []  # bytes of each publication

    def weights(self) -> dict[str, torch.Tensor]:
        state = self.model.state_dict()
        return {name: w for name, w in state.items() if name not in ("lm_head.weight", self.omitted)}

    def weight_names(self) -> list[Weight]:
        return [(name, "float32", list(w.shape)) for name, w in self.weights().items()]

    def address(self) -> tuple[str, int]:
        with ReservedPort("127.0.0.1") as port:
            return "127.0.0.1", port.number

    def join_engines(self, host: str, port: int, world_size: int, name: str, backend: str, timeout_s: float) -> None:
        self.group = UpdateGroup(host, port, world_size, name=name, backend=backend, timeout_s=timeout_s)

    def leave_engines(self) -> None:
        self.group.leave()

    def send_weights(self, changes: bool, keep_base: bool) -> None:
        if keep_base and not changes:
            self.base = Base()
        plan = buckets(self.weight_names(), self.limit)
        self.sent.append(self.group.send(self.weights().items(), plan, self.base, changes))

    def step(self, size: float, share: float = 1.0, seed: int = 1) -> None:
        """Moves a share of all weights by normal noise."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in self.model.parameters():
                here = torch.rand(weight.shape, generator=generator) < share
                weight.add_(size * here * torch.randn(weight.shape, generator=generator))

    def copy(self) -> Any:
        """The model as it is now."""
        from transformers import Qwen3ForCausalLM

        found = Qwen3ForCausalLM(self.model.config).float().eval()
        found.load_state_dict(self.model.state_dict())
        return found


ENGINES = replace(CONFIG, num_engines=2, tensor_parallel=2, delta=True)

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("publish")


@pytest.fixture(scope="module")
def servers() -> list[EngineServer]:
    """The engines, as soon as `published` has started them."""
    return []


def server_in(folder: Path, number: int) -> EngineServer:
    log = str(folder / f"{number}.log")
    return EngineServer(ServerSettings(ENGINES, str(folder / "model"), CONTEXT, log, cpu=True, seed=number))


@pytest.fixture(scope="module")
def published(folder: Path, servers: list[EngineServer]) -> Iterator[tuple[Weights, Trainer]]:
    """Two engines that have been sent a trainer's weights once."""
    trainer = Trainer(make_model(folder / "model"))
    with ExitStack() as stack:
        servers += [server_in(folder, number) for number in range(2)]
        for server in servers:
            stack.callback(server.stop)
        engines = EngineGroup(tuple(server.start() for server in servers), VOCAB, CONTEXT, ENGINES)
        weights = Weights(Group(trainer), engines, "gloo", 120.0)  # type: ignore[arg-type]
        weights.connect()
        plan(weights, trainer)
        weights.publish(1)
        yield weights, trainer
    trainer.leave_engines()


def plan(weights: Weights, trainer: Trainer) -> None:
    """Several buckets, though the model is small."""
    weights._buckets = buckets(trainer.weight_names(), trainer.limit)
    assert len(weights._buckets) > 5


def use(weights: Weights, **settings: Any) -> None:
    """Settings of the engines from now on; they are the publisher's, not the servers'."""
    weights.engines = replace(weights.engines, config=replace(ENGINES, **({"delta": False} | settings)))


@asynccontextmanager
async def clients_of(weights: Weights) -> AsyncIterator[list[EngineClient]]:
    """As a rollout worker's."""
    mode = weights.engines.config.pause
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(EngineClient(url, VOCAB, CONTEXT, pause_mode=mode))
            for url in weights.engines.urls
        ]


async def all_of(clients: Sequence[EngineClient], prompts: Sequence[list[int]], tokens: int) -> list[Generation]:
    return await asyncio.gather(
        *(clients[i % len(clients)].generate(prompt, tokens, []) for i, prompt in enumerate(prompts))
    )


async def swap_while_running(
    weights: Weights, clients: Sequence[EngineClient], prompts: Sequence[list[int]]
) -> list[Generation]:
    """All prompts' answers, 90 tokens each, with a publication in their midst."""
    running = asyncio.create_task(all_of(clients, prompts, 90))
    await asyncio.sleep(0.6)
    await asyncio.to_thread(weights.publish, weights.version + 1)
    found = await running
    assert len(found) == len(prompts)  # none was lost
    assert all(len(g.output_ids) == 90 or g.finish_reason == "stop" for g in found), "an answer was cut"
    for number in range(len(clients)):
        spans = [len(set(g.versions.tolist())) for g in found[number :: len(clients)]]
        assert 2 in spans, f"no request of engine {number} lived through the swap"
    return found


def far(model: Any, prompt: list[int], found: Generation, here: Bool) -> float:
    """Largest difference of log-probabilities to a re-scoring, of the tokens `here`."""
    differences = np.abs(found.logprobs - reference(model, prompt, found.output_ids.tolist()))
    return float(differences[here].max(initial=0.0))


def test_engines_hold_the_trainers_weights(published: tuple[Weights, Trainer]) -> None:
    weights, trainer = published
    use(weights)
    trainer.step(0.02, seed=2)
    weights.publish(weights.version + 1)
    weights.verify()
    prompts = prompts_with_shared_prefixes(seed=4)[:8]

    async def work() -> list[Generation]:
        async with clients_of(weights) as clients:
            assert [await client.version() for client in clients] == [weights.version] * 2
            return await all_of(clients, prompts, 10)

    for prompt, found in zip(prompts, asyncio.run(work()), strict=True):
        assert set(found.versions.tolist()) == {weights.version}
        assert far(trainer.model, prompt, found, np.full(len(found.versions), True)) <= 1e-5


def test_a_swap_in_mid_generation_is_exact_on_both_sides(published: tuple[Weights, Trainer]) -> None:
    weights, trainer = published
    use(weights)
    weights.publish(weights.version + 1)
    old = trainer.copy()
    trainer.step(0.02, seed=3)
    prompts = prompts_with_shared_prefixes(seed=5)[:12]

    async def work() -> list[Generation]:
        async with clients_of(weights) as clients:
            return await swap_while_running(weights, clients, prompts)

    for prompt, found in zip(prompts, asyncio.run(work()), strict=True):
        before = found.versions == weights.version - 1
        assert (np.diff(found.versions) >= 0).all()
        assert set(found.versions.tolist()) <= {weights.version - 1, weights.version}
        assert far(old, prompt, found, before) <= 1e-5
        assert far(trainer.model, prompt, found, ~before) <= 1e-5
        assert not found.stale_mask.any()


def test_tokens_over_an_old_cache_are_marked(published: tuple[Weights, Trainer]) -> None:
    """With `in_place`: what is marked may be far from its version's weights, what is not marked is exact."""
    weights, trainer = published
    use(weights, pause=PauseMode.in_place)
    weights.publish(weights.version + 1)
    old = trainer.copy()
    trainer.step(0.02, seed=4)
    prompts = prompts_with_shared_prefixes(seed=6)[:12]

    async def work() -> list[list[Generation]]:
        async with clients_of(weights) as clients:
            # A client that has heard nothing asks for the version: these fill the prefix cache under its name.
            early = await all_of(clients, prompts, 4)
            running = await swap_while_running(weights, clients, prompts)
            fresh = await all_of(clients, prompts, 10)
            for client in clients:
                client._seen_version = weights.version - 1  # as when it had not yet heard of the swap
            late = await all_of(clients, prompts, 4)
            return [early, running, fresh, late]

    early, running, fresh, late = asyncio.run(work())
    worst = 0.0
    for found, prompt in zip([*early, *running, *fresh], prompts * 3, strict=True):
        before = found.versions == weights.version - 1
        assert far(old, prompt, found, before & ~found.stale_mask) <= 1e-5
        assert far(trainer.model, prompt, found, ~before & ~found.stale_mask) <= 1e-5
        worst = max(worst, far(trainer.model, prompt, found, found.stale_mask))
    assert worst > 1e-2  # the marks are needed
    for found in running:
        assert found.stale_mask.tolist() == (found.versions == weights.version).tolist()
    assert not any(found.stale_mask.any() for found in (*early, *fresh))
    assert all(found.stale_mask.all() for found in late)
    assert any(
        far(trainer.model, prompt, found, found.stale_mask) > 1e-2 for prompt, found in zip(prompts, late, strict=True)
    )


def test_verify_names_what_an_engine_does_not_hold(published: tuple[Weights, Trainer]) -> None:
    weights, trainer = published
    use(weights)
    weights.publish(weights.version + 1)
    weights.verify()
    element = trainer.model.model.layers[1].mlp.down_proj.weight.data[0]
    right = element[0].item()
    element[0] = right + 1e-3
    weights.publish(weights.version + 1)
    element[0] = right
    with pytest.raises(RuntimeError, match=rf"engine {weights.engines.urls[0]} .* sent: model\.layers\.1\.mlp\.down"):
        weights.verify()
    weights.verify()  # which has sent them once more
    trainer.omitted = "model.layers.2.self_attn.q_norm.weight"
    plan(weights, trainer)
    with pytest.raises(RuntimeError, match=r"is not sent: model\.layers\.2\.self_attn\.q_norm\.weight$"):
        weights.verify()
    trainer.omitted = ""
    plan(weights, trainer)
    weights.publish(weights.version + 1)
    weights.verify()


def test_changes_leave_the_engines_as_whole_weights_do(published: tuple[Weights, Trainer]) -> None:
    weights, trainer = published
    use(weights, delta=True)
    weights._held = []
    weights.publish(weights.version + 1)
    for seed in (5, 6):
        trainer.step(1e-3, share=0.01, seed=seed)
        weights.publish(weights.version + 1)
    whole, *changes = trainer.sent[-3:]
    assert max(changes) < 0.03 * whole  # a hundredth of the elements, 8 bytes each instead of 4
    weights.verify()


def test_changes_of_another_base_are_refused(published: tuple[Weights, Trainer]) -> None:
    weights, trainer = published
    use(weights, delta=True)
    weights._held = []
    weights.publish(weights.version + 1)
    url = weights.engines.urls[1]

    async def rename(version: int) -> None:
        async with clients_of(weights) as clients:
            await clients[1].set_version(version)

    asyncio.run(rename(99))
    with pytest.raises(RuntimeError, match=rf"engine {url} holds weights of version 99, .* version {weights.version}"):
        weights.publish(weights.version + 1)
    asyncio.run(rename(weights.version))
    held, sent = weights._held, len(trainer.sent)
    use(weights)
    trainer.step(1e-3, seed=7)
    weights.publish(weights.version)
    use(weights, delta=True)
    weights._held = held
    with pytest.raises(RuntimeError, match=rf"no longer holds version {weights.version} in: .* and \d+ more"):
        weights.publish(weights.version + 1)
    assert len(trainer.sent) == sent + 1  # neither refusal sent anything
