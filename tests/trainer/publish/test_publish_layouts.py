"""Weights of a policy in any layout into real engines: what they hold and how they score is the policy's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
from engines import CONFIG
from layouts import ADAM, LAYOUTS, ONE
from roles import LIMIT_S, batch_of, layout_of, random_qwen3, running, seven_sub_traces, sub_trace

from buffer.types import Float32
from rollout.config import EngineConfig
from rollout.engines.client import Generation
from rollout.engines.group import EngineGroup
from rollout.engines.server import EngineServer, ServerSettings
from slime.weights import GROUP, Weights
from trainer.config import PolicyConfig
from trainer.group import PolicyGroup
from trainer.policy import PolicyWorker

pytestmark = pytest.mark.e2e

VOCAB, CONTEXT = 97, 96  # of `random_qwen3`


class Kind(NamedTuple):
    """A model's experts a layer, the engines that serve it, and the layouts that train it."""

    experts: int
    engines: EngineConfig
    layouts: tuple[str, ...]


KINDS = {
    "dense": Kind(0, replace(CONFIG, tensor_parallel=2), ("TP2+SP x PP2", "PP2 of 2 stages", "CP2")),
    "experts": Kind(4, replace(CONFIG, num_engines=2), ("TP2+SP x EP2", "PP2 x EP2")),
}


@pytest.fixture(scope="module", params=list(KINDS))
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Kind, Path, EngineGroup]]:
    """A kind of model, its folder, and engines that have read it."""
    kind, made = KINDS[request.param], tmp_path_factory.mktemp("served")
    folder = random_qwen3(made / "model", 5, kind.experts)
    with ExitStack() as stack:
        servers = []
        for number in range(kind.engines.num_engines):
            log = str(made / f"{number}.log")
            servers.append(EngineServer(ServerSettings(kind.engines, str(folder), CONTEXT, log, cpu=True, seed=number)))
            stack.callback(servers[-1].stop)
        yield kind, folder, EngineGroup(tuple(server.start() for server in servers), VOCAB, CONTEXT, kind.engines)


async def sample(engines: EngineGroup, prompts: Sequence[list[int]]) -> list[Generation]:
    async with engines.clients() as clients:
        number = len(clients)
        return await asyncio.gather(*(clients[i % number].generate(ids, 20, []) for i, ids in enumerate(prompts)))


async def leave(engines: EngineGroup) -> None:
    async with engines.clients() as clients:
        await asyncio.gather(*(client.destroy_group(GROUP) for client in clients))


def scored(policy: PolicyGroup, prompts: Sequence[list[int]], answers: Sequence[Generation]) -> list[Float32]:
    """The policy's log-probabilities of the answers' ids."""
    rng = np.random.default_rng(0)
    ids = [np.array([*prompt, *answer.output_ids], np.int32) for prompt, answer in zip(prompts, answers, strict=True)]
    found = policy.logprobs(batch_of([replace(sub_trace(rng, len(tokens), 0), tokens=tokens) for tokens in ids]))
    return [logprobs[len(prompts[index]) :] for index, logprobs in sorted(found.result().items())]


def test_engines_hold_what_was_trained(served: tuple[Kind, Path, EngineGroup], ray_cluster: ModuleType) -> None:
    kind, folder, engines = served
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, VOCAB, size).tolist() for size in (3, 40, 17, 50)]
    batch = batch_of(seven_sub_traces())
    for name in kind.layouts:
        with running(PolicyGroup, PolicyWorker, folder, PolicyConfig(*layout_of(ONE | LAYOUTS[name])), ADAM) as policy:
            weights = Weights(policy, engines, "gloo", LIMIT_S)
            weights.connect()
            policy.imitate(batch, policy.grid(range(7), [item.num_tokens for item in batch.items])).result()
            weights.publish(1)
            weights.verify()
            answers = asyncio.run(sample(engines, prompts))
            for answer, logprobs in zip(answers, scored(policy, prompts, answers), strict=True):
                assert len(logprobs) == 20
                assert np.abs(logprobs - answer.logprobs).max() <= 1e-5, name
            asyncio.run(leave(engines))
