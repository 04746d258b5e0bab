"""Weights from a trainer on GPU 0 into an engine on GPU 1: seconds and GB/s, against NCCL's own broadcast.

    python benchmarks/gpu/publish.py --model 8b --attention triton

First NCCL alone, between two processes that see one GPU each, with NCCL_CUMEM_ENABLE at 0 (what SGLang sets in its
engines and our trainers in themselves) and at 1. Where 0 fails here, both ends have to be set to 1.

The trainer holds weights only (random ones); the path is the product's: the policy worker's `send_weights`, SGLang's
update from a distributed group, buckets of trainer/broadcast.py.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu import common
from benchmarks.gpu.engine import CONTEXT, GROUP, publish
from benchmarks.gpu.train import RandomPolicy


def broadcast_rank(options: argparse.Namespace) -> None:
    """One of two ranks: broadcasts of 1 GiB, and of the sizes of a layer's tensors one after the other."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(options.port), NCCL_CUMEM_ENABLE=options.cumem)
    dist.init_process_group("nccl", rank=options.rank, world_size=2, timeout=timedelta(seconds=120))
    for megabytes in (1024, 128, 32, 8):
        tensor = torch.randn(megabytes << 18, device="cuda")
        number = max(1, 2048 // megabytes)

        def run(tensor: torch.Tensor = tensor, number: int = number) -> None:
            for _ in range(number):
                dist.broadcast(tensor, 0)

        rate = number * megabytes * 1.048576e6 / (common.milliseconds(run, repeats=5) * 1e-3)
        if options.rank == 0:
            print(f"NCCL_CUMEM_ENABLE={options.cumem}, broadcast of tensors of {megabytes} MiB: {rate / 1e9:.0f} GB/s",
                  flush=True)  # fmt: skip
    dist.destroy_process_group()


def frozen_policy(folder: Path) -> Any:
    """The policy's worker with random weights and without optimizer, and the weights in the folder, for the engine."""
    from trainer.config import LayoutConfig, OptimizerConfig, PolicyConfig, Precision
    from trainer.megatron import hf
    from trainer.worker import WorkerSettings

    layout = LayoutConfig(precision=Precision.bf16)
    settings = WorkerSettings(0, layout, OptimizerConfig(), str(folder), 0, 1, 300.0, frozen=True)
    worker = RandomPolicy(settings, PolicyConfig(layout=layout))
    worker.start("127.0.0.1", common.free_port())
    out = folder / "weights"
    hf.save(hf.export(worker.models, worker.shape), folder, out)
    return worker, out


async def session(url: str, worker: Any, repeats: int) -> None:
    """Joins the group and publishes a few times."""
    from rollout.client import EngineClient

    pool = ThreadPoolExecutor(1)
    loop = asyncio.get_running_loop()
    async with EngineClient(url, common.VOCAB, CONTEXT) as client:
        port = common.free_port()
        joining = loop.run_in_executor(pool, worker.join_engines, "127.0.0.1", port, 2, GROUP, "nccl", 120.0)
        await client.init_group("127.0.0.1", port, 1, 2, GROUP, "nccl")
        await joining
        found = [await publish(client, worker, version, pool) for version in range(1, repeats + 1)]
    seconds = statistics.median(s for _, s in found[1:])
    size = found[0][0]
    times = ", ".join(f"{s:.2f}" for _, s in found)
    print(f"published {size / 1e9:.1f} GB in {times} s: {size / 1e9 / seconds:.1f} GB/s (median, first left out)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(common.QWEN3), default="8b")
    parser.add_argument("--attention", default="", help="SGLang's attention backend")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--cumem", default="0", help="set by the script itself")
    parser.add_argument("--rank", type=int, default=-1, help="set by the script itself")
    parser.add_argument("--port", type=int, default=0, help="set by the script itself")
    options = parser.parse_args()
    if options.rank >= 0:
        broadcast_rank(options)
        return
    from rollout.config import EngineConfig
    from rollout.engine import EngineServer

    print(common.machine(), flush=True)
    for cumem in ("0", "1"):
        try:
            common.run_ranks(__file__, [*sys.argv[1:], f"--cumem={cumem}"], 2, timeout_s=120)
        except (RuntimeError, TimeoutError) as error:  # that it fails is a result, too
            print(f"NCCL_CUMEM_ENABLE={cumem}: {error}", flush=True)
    folder = common.write_config(Path(tempfile.mkdtemp()), options.model)
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    began = time.perf_counter()
    worker, weights = frozen_policy(folder)
    print(f"Qwen3 {options.model}, written in {time.perf_counter() - began:.0f} s", flush=True)
    config = EngineConfig(memory_fraction=0.5, max_running_requests=32, attention=options.attention)
    os.environ["CUDA_VISIBLE_DEVICES"] = "1"
    began = time.perf_counter()
    server = EngineServer(config, str(weights), CONTEXT, str(folder / "engine.log"), cpu=False)
    try:
        url = server.start()
        print(f"engine up after {time.perf_counter() - began:.0f} s", flush=True)
        asyncio.run(session(url, worker, options.repeats))
    finally:
        server.stop()


if __name__ == "__main__":
    main()
