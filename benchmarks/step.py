"""Overhead of a PPO step relative to the matrix work in it. Needs no accelerator.

    .venv/bin/python benchmarks/step.py [--pairs 7]        three minutes on two idle cores

Two kinds of steps take turns in the same processes, with the same models, optimizers and micro-batches:

    ours    slime/loop.py's train_step: sub-traces by Ray reference, packing, log-probabilities and values, advantages,
            losses, updates, metrics; engines, buffer and publishing are stubs that take no time
    bare    megatron-core's schedule around tensors prepared in advance: forward passes with softmax and gather, then
            forward, cross-entropy (the critic: squared error), backward, optimizer

In both, policy and critic work in parallel, each in a process with one thread. The model is ten times the demo's. The
output is the ratio ours / bare of each pair, in wall-clock seconds and in CPU seconds of all working processes (the two
ranks, and for ours the driver), with medians and quartiles. On a machine with other work trust the CPU seconds. The
last table shows which process spends the difference.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray

from buffer.types import Batch, EpisodeStats, Status, SubTrace, SubTraceInfo, SubTraceKind
from launch.local import start_ray, stop_ray
from slime import loop
from slime.build import build_estimator, build_policy
from slime.config import load
from slime.run import Roles, Run
from slime.schema import Config
from slime.start.placement import placement
from trainer.group import NoReference

WINDOW = 104  # tokens of the demo's context
SUB_TRACES = 3  # of an episode


def write_model(folder: Path) -> int:
    """Write a random Qwen3 with ten times the demo's parameters and return their number."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from recipes.coding.model import vocabulary

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(vocabulary()),
        hidden_size=384,
        num_hidden_layers=3,
        num_attention_heads=12,
        num_key_value_heads=6,
        head_dim=32,
        intermediate_size=1216,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    return int(sum(parameter.numel() for parameter in model.parameters()))


def sub_traces(episodes: int, vocab: int) -> list[SubTrace]:
    """Return episodes like the demo's: three sub-traces, a quarter of the tokens sampled, a reward on the last one."""
    rng = np.random.default_rng(0)
    found = []
    for episode in range(episodes):
        for position in range(SUB_TRACES):
            length = int(rng.integers(WINDOW // 2, WINDOW + 1))
            mask = rng.random(length) < 0.25
            mask[0], mask[-1] = False, True
            last = position == SUB_TRACES - 1
            rewards = np.zeros(length, np.float32)
            rewards[-1] = float(last and rng.random() < 0.5)
            found.append(
                SubTrace(
                    tokens=rng.integers(0, vocab, length).astype(np.int32),
                    action_mask=mask,
                    logprobs=np.where(mask, -1.0, 0.0).astype(np.float32),
                    rewards=rewards,
                    versions=np.where(mask, 0, -1).astype(np.int32),
                    stale_mask=np.zeros(length, bool),
                    summary_mask=np.zeros(length, bool),
                    episode_id=f"e{episode}",
                    position=position,
                    successor=None,
                    kind=SubTraceKind.FINAL if last else SubTraceKind.COMPACTED,
                    status=Status.FINISHED,
                )
            )
    return found


def prepare_bare(worker: Any, traces: list[SubTrace], grids: list[Any]) -> None:
    """Prepare, in a rank, the micro-batches of a forward pass and of each optimizer step as tensors."""
    from trainer.megatron.modules.attention import PackedSequences

    own = dict(enumerate(traces))
    worker.bare = [
        [(batch, PackedSequences(batch.packing)) for batch in worker._micro_batches(grid[0], own, {})] for grid in grids
    ]


def bare_step(worker: Any) -> None:
    """Run, in a rank, one forward pass over all micro-batches, then one optimizer step for each group of them."""
    import torch
    from torch.nn import functional as F

    engine = worker.engine
    critic = engine.head is not None

    def step(batches: Any, model: Any) -> Any:
        b, packed = next(batches)
        out = model(b.tokens_1P, b.packing.position_T[None], None, packed_seq_params=packed)

        def scored(out: Any, non_loss_data: bool = False) -> Any:
            if critic:
                return out[0] if non_loss_data else ((out[0] - 0.5).square() * b.action_P).sum() / 2
            each_P = F.cross_entropy(out[0], b.labels_1P[0], reduction="none")
            return -each_P if non_loss_data else (each_P * b.action_P).sum()

        def reduce(out: Any, non_loss_data: bool = False) -> Any:
            found = scored(out, non_loss_data)
            return found if non_loss_data else (found, torch.tensor(int(b.num_actions), dtype=torch.int), {})

        return out, reduce

    def run(batches: list[Any], forward_only: bool) -> Any:
        return engine.run_schedule(
            forward_step_func=step,
            data_iterator=[iter(batches)],
            model=engine.chunks,
            num_microbatches=len(batches),
            seq_length=max(b.tokens_1P.shape[1] for b, _ in batches),
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    forward, *updates = worker.bare
    with torch.no_grad():
        run(forward, True)
    for batches in updates:
        for chunk in engine.chunks:
            chunk.zero_grad_buffer()
        engine.optimizer.zero_grad()
        run(batches, False)
        engine.optimizer.step()


def cpu_seconds(worker: Any) -> float:
    """Return, in a rank, the CPU seconds of its process since its start."""
    return time.process_time()


class Bench:
    """The two roles with both kinds of step."""

    def __init__(self, config: Config, folder: Path, episodes: int) -> None:
        from transformers import AutoConfig

        self.config = config
        self.traces = sub_traces(episodes, AutoConfig.from_pretrained(folder).vocab_size)
        infos = [
            SubTraceInfo(ray.put(t), t.episode_id, len(t.tokens), int(t.action_mask.sum()), 0) for t in self.traces
        ]
        ids = tuple(f"e{episode}" for episode in range(episodes))
        self.batch = Batch(1, tuple(infos), tuple(EpisodeStats(1.0, num_sampled=1, duration_s=1.0) for _ in ids), ids)
        self.policy = build_policy(config, folder, placement(config))
        self.estimator = build_estimator(config, folder, placement(config))
        self.groups = [self.policy, *self.estimator.roles]
        limit_s = config.cluster.start_timeout_s
        for starting in [group.start(limit_s) for group in self.groups]:
            starting.result(limit_s)
        unused: Any = SimpleNamespace()
        buffer: Any = SimpleNamespace(take=lambda waiting: self.batch, release=lambda step: None)
        weights: Any = SimpleNamespace(version=0, lend_memory=lambda: None, publish=lambda version: 0.0)
        self._run = Run(
            buffer=buffer,
            rollout=unused,
            engines=unused,
            servers=[],
            model_folder=folder,
            rows="",
            models=Roles(self.policy, NoReference(), self.estimator),
            weights=weights,
        )
        self._watch: Any = SimpleNamespace(sample=lambda *rest: None)

    def call(self, function: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
        """Run a function in both ranks at once, each with its element of every list of arguments."""
        refs = [
            group.actors[0].__ray_call__.remote(function, *(argument[i] for argument in arguments))
            for i, group in enumerate(self.groups)
        ]
        return list(ray.get(refs, timeout=600))

    def prepare(self) -> None:
        """Send the inputs of bare steps to the ranks."""
        indices, num_tokens = range(len(self.traces)), [len(trace.tokens) for trace in self.traces]
        rng = np.random.default_rng(0)
        counts = (self.config.policy.num_minibatches, self.config.critic.num_minibatches)
        grids = [
            [group.grid(indices, num_tokens), *group.minibatch_grids(self.batch, count, rng)]
            for group, count in zip(self.groups, counts, strict=True)
        ]
        self.call(prepare_bare, [self.traces] * 2, grids)

    def ours(self) -> dict[str, float]:
        """Run one step of the product and return its metrics."""
        return loop.train_step(self.config, self._run, self._watch, 1, evaluating=False)

    def bare(self) -> None:
        self.call(bare_step)

    def measured(self, step: Callable[[], Any], driver: bool) -> tuple[float, list[float]]:
        """Return wall-clock seconds, and CPU seconds of policy, critic and driver (0 if the driver does no work)."""
        before, own, began = self.call(cpu_seconds), time.process_time(), time.perf_counter()
        step()
        wall, mine = time.perf_counter() - began, time.process_time() - own
        ranks = [after - b for after, b in zip(self.call(cpu_seconds), before, strict=True)]
        return wall, [*ranks, mine if driver else 0.0]


def quartiles(numbers: Sequence[float], unit: str = "") -> str:
    """Return a text with the median and the first and third quartile."""
    low, middle, high = np.percentile(numbers, [25, 50, 75])
    return f"{middle:.3f}{unit} ({low:.3f} - {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7, help="of a step of ours and a bare one")
    parser.add_argument("--episodes", type=int, default=64, help="in a step")
    arguments = parser.parse_args()
    settings = ["policy.max_logprob_diff=1e9", "policy.optimizer.lr=1e-6", "critic.optimizer.lr=1e-6"]
    config = load(["recipe=ppo_coding", *settings], None).config
    with tempfile.TemporaryDirectory() as scratch:
        size = write_model(Path(scratch) / "model")
        start_ray(config.cluster)
        try:
            bench = Bench(config, Path(scratch) / "model", arguments.episodes)
            report(bench, arguments.pairs, size)
        finally:
            stop_ray()


def report(bench: Bench, pairs: int, size: int) -> None:
    """Measure the pairs and print the results."""
    bench.prepare()
    tokens = sum(len(trace.tokens) for trace in bench.traces)
    print(f"{size / 1e6:.2f} million parameters, {tokens} tokens in {len(bench.traces)} sub-traces a step", flush=True)
    bench.ours()
    bench.bare()
    ours: list[tuple[float, list[float]]] = []
    bare: list[tuple[float, list[float]]] = []
    for pair in range(pairs):
        steps = [(bench.ours, True, ours), (bench.bare, False, bare)]
        for step, driver, found in steps if pair % 2 else reversed(steps):
            found.append(bench.measured(step, driver))
        print(
            f"pair {pair + 1}: wall {ours[-1][0]:.2f} / {bare[-1][0]:.2f} s, "
            f"CPU {sum(ours[-1][1]):.2f} / {sum(bare[-1][1]):.2f} s",
            flush=True,
        )
    print(f"\nours / bare by the wall      {quartiles([a[0] / b[0] for a, b in zip(ours, bare, strict=True)])}")
    ratios = [sum(a[1]) / sum(b[1]) for a, b in zip(ours, bare, strict=True)]
    print(f"ours / bare by CPU seconds   {quartiles(ratios)}\n")
    print("CPU seconds       ours                       bare")
    for i, name in enumerate(("policy", "critic", "driver")):
        mine, theirs = [a[1][i] for a in ours], [b[1][i] for b in bare]
        print(f"{name:16}  {quartiles(mine):25}  {quartiles(theirs)}")


if __name__ == "__main__":
    main()
