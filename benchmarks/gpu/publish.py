"""Speed of publishing weights from a trainer on GPU 0 to an engine on GPU 1, compared with NCCL's own broadcast.

    python benchmarks/gpu/publish.py --model 8b --attention triton

The first measurement is NCCL alone, between two processes that see one GPU each, with NCCL_CUMEM_ENABLE=0 (which SGLang
sets in its engines and our trainers set in their processes) and 1. If 0 fails here, set both ends to 1.

The second one uses a trainer with random weights only and the product's own path: slime/weights.py, the policy worker's
`send_weights`, SGLang's update from a distributed group. Then the engine's weights are verified, and changes of every
hundredth weight are sent.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu import common
from benchmarks.gpu.engine import CONTEXT
from benchmarks.gpu.train import RandomEngine
from machine.ports import ReservedPort


def broadcast_rank(options: argparse.Namespace) -> None:
    """Run one of two ranks: broadcasts of 1 GiB, then of the sizes of a layer's tensors one after the other."""
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
    """Return a policy worker with random weights and no optimizer, and the folder with its weights for the engine."""
    from trainer.config import LayoutConfig, OptimizerConfig, PolicyConfig, Precision
    from trainer.engine import EngineSettings
    from trainer.megatron.config import MegatronConfig
    from trainer.models.folder import write_folder
    from trainer.policy import PolicyWorker

    layout = LayoutConfig(precision=Precision.bf16), MegatronConfig()
    settings = EngineSettings(0, *layout, OptimizerConfig(), str(folder), 0, 1, 300.0, frozen=True)
    worker = PolicyWorker(settings, PolicyConfig(*layout), RandomEngine)
    with ReservedPort("127.0.0.1") as port:
        worker.start("127.0.0.1", port.number)
    out = folder / "weights"
    write_folder(worker.engine.weights(), folder, out)
    return worker, out


def change(worker: Any) -> None:
    """Change every hundredth weight."""
    for chunk in worker.engine.models:
        for parameter in chunk.parameters():
            parameter.data.view(-1)[::100].mul_(1.25)


def session(weights: Any, repeats: int) -> None:
    """Join the group and publish a few times: whole weights, a proof, changes, a proof."""

    def publish(what: str) -> None:
        times = []
        for _ in range(repeats):
            change(weights.policy.worker)
            times.append(weights.publish(weights.version + 1))
        sent = weights.policy.said["send_weights"]
        seconds = statistics.median(times[1:])
        print(f"published {what}, {sent / 1e9:.2f} GB, in {', '.join(f'{s:.2f}' for s in times)} s: "
              f"{sent / 1e9 / seconds:.1f} GB/s (median, first left out)", flush=True)  # fmt: skip

    def prove() -> None:
        began = time.perf_counter()
        weights.verify()
        print(f"the engine holds these weights, and no others: known after {time.perf_counter() - began:.1f} s",
              flush=True)  # fmt: skip

    weights.connect()
    publish("whole weights")
    prove()
    weights.engines.config = replace(weights.engines.config, delta=True)
    began = time.perf_counter()
    weights.publish(weights.version + 1)
    print(f"the base of changes, kept on the host: {time.perf_counter() - began:.1f} s", flush=True)
    publish("changes")
    prove()


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
    from rollout.engines.group import EngineGroup
    from rollout.engines.server import EngineServer, ServerSettings
    from slime.weights import Weights

    print(common.machine(), flush=True)
    for cumem in ("0", "1"):
        try:
            common.run_ranks(__file__, [*sys.argv[1:], f"--cumem={cumem}"], 2, timeout_s=120)
        except (RuntimeError, TimeoutError) as error:  # a failure is a result, too
            print(f"NCCL_CUMEM_ENABLE={cumem}: {error}", flush=True)
    folder = common.write_config(Path(tempfile.mkdtemp()), options.model)
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    began = time.perf_counter()
    worker, weights = frozen_policy(folder)
    print(f"Qwen3 {options.model}, written in {time.perf_counter() - began:.0f} s", flush=True)
    chosen = {"attention_backend": options.attention} if options.attention else {}
    config = EngineConfig(
        memory_fraction=0.5, max_running_requests=32, delta=True, request_timeout_s=300.0, options=chosen
    )
    os.environ["CUDA_VISIBLE_DEVICES"] = "1"
    began = time.perf_counter()
    server = EngineServer(ServerSettings(config, str(weights), CONTEXT, str(folder / "engine.log"), cpu=False))
    try:
        url = server.start()
        print(f"engine up after {time.perf_counter() - began:.0f} s", flush=True)
        whole = replace(config, delta=False)
        engines = EngineGroup((url,), common.VOCAB, CONTEXT, whole)
        policy: Any = common.OneRank(worker)
        session(Weights(policy, engines, "nccl", 300.0), options.repeats)
    finally:
        server.stop()


if __name__ == "__main__":
    main()
