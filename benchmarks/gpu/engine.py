"""One SGLang engine on a GPU and the trainer: start, speed, log-probabilities, new weights, released memory.

    python benchmarks/gpu/engine.py                    both on GPU 0, weights over gloo
    python benchmarks/gpu/engine.py --engine-gpu 1     one each, weights over nccl

The product's server, client and policy worker run without Ray. The trainer scores the engine's samples; then it takes a
few steps, publishes, and scores the engine's samples from the new weights.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

CONTEXT, PROMPT, SAMPLED = 2048, 256, 512


def used_gb(gpu: int) -> float:
    """Return the GPU memory in use by all processes, in GB, from the driver."""
    asked = ["nvidia-smi", f"--id={gpu}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(asked, capture_output=True, text=True, check=True).stdout) * 1.048576e-3


def traces_of(prompts: list[np.ndarray], answers: list[Any]) -> list[Any]:
    """Return sub-traces of one turn each, in the trainer's format."""
    from buffer.types import Status, SubTrace, SubTraceKind

    found = []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        lead = np.zeros(len(prompt), np.float32)
        tokens = np.concatenate([prompt, answer.output_ids]).astype(np.int32)
        mask = np.arange(len(tokens)) >= len(prompt)
        found.append(
            SubTrace(
                tokens=tokens,
                action_mask=mask,
                logprobs=np.concatenate([lead, answer.logprobs]),
                rewards=0.0 * mask.astype(np.float32),
                versions=np.concatenate([lead.astype(np.int32) - 1, answer.versions]),
                stale_mask=np.zeros(len(tokens), bool),
                summary_mask=np.zeros(len(tokens), bool),
                episode_id=f"e{number}",
                position=0,
                successor=None,
                kind=SubTraceKind.FINAL,
                status=Status.FINISHED,
            )
        )
    return found


def compare(worker: Any, traces: list[Any]) -> str:
    """Return a line with differences of the engine's and the trainer's log-probabilities of sampled tokens, in nats."""
    grid = [[[i] for i in range(len(traces))]]
    scored = worker.logprobs(traces, grid)
    gap = np.concatenate([(scored[i] - t.logprobs)[t.action_mask] for i, t in enumerate(traces)])
    own = np.concatenate([t.logprobs[t.action_mask] for t in traces])
    versions = sorted({int(v) for t in traces for v in t.versions[t.action_mask]})
    return (
        f"versions {versions}, {len(gap)} tokens, mean log-probability {own.mean():.3f}: difference mean "
        f"{gap.mean():+.1e}, absolute {np.abs(gap).mean():.1e}, 99th percentile {np.quantile(np.abs(gap), 0.99):.1e}, "
        f"largest {np.abs(gap).max():.1e}"
    )


async def sample(client: Any, prompts: list[np.ndarray]) -> tuple[list[Any], float]:
    """Send all prompts at once; return the answers and the sampled tokens per second."""
    began = time.perf_counter()
    answers = await asyncio.gather(*(client.generate(list(map(int, p)), SAMPLED, []) for p in prompts))
    return list(answers), sum(len(a.output_ids) for a in answers) / (time.perf_counter() - began)


async def session(options: argparse.Namespace, weights: Any, vocab: int) -> None:
    """Run all measurements on a running engine. `weights`: publishes to it from `weights.policy`."""
    from rollout.engines.client import EngineClient

    worker = weights.policy.worker
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, vocab, PROMPT) for _ in range(options.requests)]
    async with EngineClient(weights.engines.urls[0], vocab, CONTEXT) as client:
        await sample(client, prompts)  # warms up
        answers, speed = await sample(client, prompts)
        print(f"{len(prompts)} requests at once: {speed:.0f} sampled tokens/s", flush=True)
        print("before publishing:", compare(worker, traces_of(prompts, answers)), flush=True)
        await asyncio.to_thread(weights.connect)
        traces = traces_of(prompts, answers)
        grid = [[[i] for i in range(len(traces))]]
        for _ in range(4):
            worker.imitate(traces, [grid])
        for version in (1, 2):
            seconds = await asyncio.to_thread(weights.publish, version)
            sent = weights.policy.said["send_weights"]
            print(f"published {sent / 1e9:.2f} GB in {seconds:.2f} s: {sent / 1e9 / seconds:.1f} GB/s")
        answers, _ = await sample(client, prompts)
        print("after publishing:", compare(worker, traces_of(prompts, answers)), flush=True)
        before = used_gb(options.engine_gpu)
        began = time.perf_counter()
        await client.release_memory()
        released_s, between = time.perf_counter() - began, used_gb(options.engine_gpu)
        began = time.perf_counter()
        await client.resume_memory()
        resumed_s = time.perf_counter() - began
        after = used_gb(options.engine_gpu)
        print(f"memory in use {before:.1f} GB, released in {released_s:.2f} s {between:.1f} GB, "
              f"resumed in {resumed_s:.2f} s {after:.1f} GB")  # fmt: skip
        await asyncio.to_thread(weights.publish, 3)
        answers, _ = await sample(client, prompts)
        print("after release, resume and publishing:", compare(worker, traces_of(prompts, answers)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine-gpu", type=int, default=0)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--attention", default="", help="SGLang's attention backend")
    parser.add_argument("--log", default="", help="where the engine's log goes")
    options = parser.parse_args()
    from benchmarks.gpu.check import VOCAB, make_model
    from machine.ports import ReservedPort
    from rollout.config import EngineConfig
    from rollout.engines.group import EngineGroup
    from rollout.engines.server import EngineServer, ServerSettings
    from slime.weights import Weights

    folder = make_model(Path(tempfile.mkdtemp()))
    chosen = {"attention_backend": options.attention} if options.attention else {}
    config = EngineConfig(memory_fraction=0.3, max_running_requests=options.requests, options=chosen)
    began = time.perf_counter()
    os.environ["CUDA_VISIBLE_DEVICES"] = str(options.engine_gpu)
    log = options.log or str(folder / "engine.log")
    server = EngineServer(ServerSettings(config, str(folder), CONTEXT, log, cpu=False, yields_memory=True))
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    try:
        from benchmarks.gpu import common
        from trainer.config import LayoutConfig, OptimizerConfig, PolicyConfig, Precision
        from trainer.engine import EngineSettings
        from trainer.megatron.config import MegatronConfig
        from trainer.policy import PolicyWorker

        layout = LayoutConfig(precision=Precision.bf16), MegatronConfig()
        settings = EngineSettings(0, *layout, OptimizerConfig(lr=2e-5), str(folder), 0, 1, 300.0)
        worker = PolicyWorker(settings, PolicyConfig(*layout))
        with ReservedPort("127.0.0.1") as port:
            worker.start("127.0.0.1", port.number)
        url = server.start()
        print(common.machine())
        print(f"engine up after {time.perf_counter() - began:.0f} s")
        backend = "nccl" if options.engine_gpu else "gloo"
        policy: Any = common.OneRank(worker)
        weights = Weights(policy, EngineGroup((url,), VOCAB, CONTEXT, config), backend, 120.0)
        asyncio.run(session(options, weights, VOCAB))
    finally:
        server.stop()


if __name__ == "__main__":
    main()
