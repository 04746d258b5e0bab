"""Speed of a PPO step's training: forward and update of policy and critic on packed tokens.

    python benchmarks/gpu/train.py --model 1.7b --recompute layer
    python benchmarks/gpu/train.py --model 8b --gpus 2 --recompute layer      data parallel, optimizer state shared

The product's own workers run on random weights, without Ray, one role after the other. A step has the calls of the
loop: the policy's log-probabilities, the critic's values, one update of each over the same tokens. The table is printed
after each role, so that an aborted run still shows the policy's rows.

    utilization = useful FLOP / seconds / measured rate of a large bf16 product
    useful FLOP = tokens * (2 forward, 6 update) * parameters in products + 2 (6) * attention width * sum of length^2

Attention counts its lower triangle: 2 products of 2 * width * length^2 / 2 forward. Recomputed FLOP are not useful;
`--recompute` sets how many there are.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu import common
from buffer.types import SubTrace, TokenColumn
from critic.config import CriticConfig
from critic.worker import CriticWorker
from trainer.config import LayoutConfig, OptimizerConfig, PolicyConfig, Precision, Recompute
from trainer.engine import EngineSettings
from trainer.megatron.config import MegatronConfig
from trainer.megatron.engine import MegatronEngine
from trainer.policy import PolicyWorker
from trainer.worker import Columns


def random_weights(models: Sequence[torch.nn.Module]) -> None:
    """Fill matrices with normal numbers of standard deviation 0.02; leave norms and heads unchanged."""
    torch.manual_seed(0)
    for parameter in chain.from_iterable(gpt.parameters() for gpt in models):
        if parameter.dim() == 2 and parameter.shape[0] > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.02)


class RandomEngine(MegatronEngine):
    """The Megatron engine without a weight file."""

    def _read_weights(self) -> None:
        random_weights(self.chunks)


def columns_of(role: str, traces: list[SubTrace]) -> Columns:
    """Return the columns of an update, with numbers of a realistic size."""
    zeros = TokenColumn((i, 0.0 * t.logprobs) for i, t in enumerate(traces))
    if role == "critic":
        returns = TokenColumn((i, t.action_mask.astype(np.float32)) for i, t in enumerate(traces))
        return {"values": zeros, "returns": returns}
    old = TokenColumn((i, t.logprobs) for i, t in enumerate(traces))
    ones = TokenColumn((i, zeros[i] + 1) for i in zeros)
    return {"advantages": ones, "weights": ones, "old_logprobs": old, "engine_logprobs": old, "kind": zeros}


def useful_flop(config: dict[str, Any], role: str, lengths: list[int]) -> float:
    """Return the useful FLOP of a forward pass over sequences of `lengths` predictions; an update has 3 times that."""
    h, f, d = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    products = config["num_hidden_layers"] * (h * (q + 2 * kv) + q * h + 3 * h * f)
    if role == "policy":
        products += h * config["vocab_size"]
    attention = config["num_hidden_layers"] * 2 * q * sum(n * n for n in lengths)
    return 2 * products * sum(lengths) + attention


def timed(run: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(role: str, options: argparse.Namespace, folder: Path, port: int) -> dict[str, Any]:
    """Return the median seconds of the role's phases and its peak memory on this rank."""
    config = json.loads((folder / "config.json").read_text())
    layout = LayoutConfig(
        num_processes=options.gpus,
        precision=Precision.bf16,
        max_tokens_per_micro_batch=options.tokens,
        recompute=Recompute(options.recompute),
    )
    tensor = options.tensor_parallel
    megatron = MegatronConfig(tensor_parallel=tensor, sequence_parallel=tensor > 1)
    settings = EngineSettings(options.rank, layout, megatron, OptimizerConfig(lr=1e-6), str(folder), 0, 1, 600.0)
    made = {"policy": (PolicyWorker, PolicyConfig), "critic": (CriticWorker, CriticConfig)}[role]
    role_config = made[1](layout, megatron)
    worker: Any = made[0](settings, role_config, RandomEngine)
    forward_pass = worker.logprobs if role == "policy" else worker.values
    began = time.perf_counter()
    worker.start("127.0.0.1", port)
    start_s = time.perf_counter() - began
    num_rows = role_config.data_parallel
    traces = [t for row in range(num_rows) for t in common.sub_traces(options.tokens, config["vocab_size"], row)]
    each = len(traces) // num_rows
    grid = [[list(range(row * each, (row + 1) * each))] * options.micro_batches for row in range(num_rows)]
    columns = [columns_of(role, traces)] * num_rows
    step_s: list[float] = []
    optimizer_step = worker.engine.optimizer.step

    def step_timed() -> Any:
        answer: list[Any] = []
        step_s.append(timed(lambda: answer.append(optimizer_step())))
        return answer[0]

    worker.engine.optimizer.step = step_timed
    forward, update = [], []
    for _ in range(options.steps + 1):
        forward.append(timed(lambda: forward_pass(traces, grid)))
        torch.cuda.reset_peak_memory_stats()
        update.append(timed(lambda: worker.update(traces, columns, [grid])))
    middle = lambda times: sorted(times[1:])[(len(times) - 1) // 2]  # noqa: E731 (the first warms up)
    lengths = [len(t.tokens) - 1 for t in traces[:each]] * options.micro_batches
    flop = useful_flop(config, role, lengths)
    if options.profile:
        profile(lambda: worker.update(traces, columns, [grid]), options.profile if options.rank == 0 else 0)
    found = {
        "role": role,
        "parameters": sum(p.numel() for p in worker.engine.chunks[0].parameters()) * options.tensor_parallel,
        "tokens": sum(lengths) * num_rows,
        "forward_s": middle(forward),
        "update_s": middle(update),
        "optimizer_s": middle(step_s),
        "flop_forward": flop / options.tensor_parallel,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "start_s": start_s,
        "first_s": forward[0] + update[0],
    }
    worker.stop()
    return found


def profile(run: Callable[[], Any], num_rows: int) -> None:
    """Print the most expensive kernels of `run`; with 0 rows only run it, because all ranks have to."""
    if not num_rows:
        run()
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    events = sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in events)
    rows = [["ms", "share", "calls", "kernel"]]
    rows += [
        [f"{e.self_device_time_total / 1e3:.1f}", f"{e.self_device_time_total / total:.3f}", e.count, e.key[:80]]
        for e in events[:num_rows]
    ]
    print(common.table(rows), flush=True)


def answer_file(role: str, first_gpu: int) -> Path:
    """Return the file to which rank 0 writes its measurements."""
    return Path(tempfile.gettempdir()) / f"train_{role}_{first_gpu}.json"


def report(found: list[dict[str, Any]], rate: float, options: argparse.Namespace) -> str:
    """Return the table: one row per phase, then the whole step."""
    rows: list[list[Any]] = [["phase", "s", "share", "tokens/s/GPU", "MFU", "peak GB"]]
    total_s = sum(f["forward_s"] + f["update_s"] for f in found)
    flop_all = 0.0
    for f in found:
        for phase, seconds, factor in (("forward", f["forward_s"], 1), ("update", f["update_s"], 3)):
            flop = factor * f["flop_forward"]
            flop_all += flop
            speed = f["tokens"] / seconds / options.gpus
            cells = [f"{seconds:.3f}", f"{seconds / total_s:.2f}", f"{speed:.0f}", f"{flop / seconds / rate:.3f}"]
            rows.append([f"{f['role']} {phase}", *cells, f"{f['peak_gb']:.1f}" if factor == 3 else ""])
        rows.append([f"  of it optimizer ({f['role']})", f"{f['optimizer_s']:.3f}", *[""] * 4])
    speed = found[0]["tokens"] / total_s / options.gpus
    rows.append(["all", f"{total_s:.3f}", "1.00", f"{speed:.0f}", f"{flop_all / total_s / rate:.3f}", ""])
    return common.table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(common.QWEN3), default="1.7b")
    parser.add_argument("--layers", type=int, default=0, help="cut the model to this number of layers; 0: all")
    parser.add_argument("--tokens", type=int, default=32768, help="of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--first-gpu", type=int, default=0)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--recompute", choices=[r.value for r in Recompute], default="layer")
    parser.add_argument("--roles", default="policy,critic")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--profile", type=int, default=0, help="print this number of kernels")
    parser.add_argument("--rank", type=int, default=-1, help="set by the script itself")
    parser.add_argument("--port", type=int, default=0, help="set by the script itself")
    options = parser.parse_args()
    if options.rank >= 0:
        role = options.roles
        folder = common.write_config(Path(tempfile.mkdtemp()), options.model, options.layers)
        found = measure(role, options, folder, options.port)
        if options.rank == 0:
            found["rate"] = common.matrix_rate()
            answer_file(role, options.first_gpu).write_text(json.dumps(found))
        return
    print(common.machine())
    print(f"Qwen3 {options.model}, {vars(options)}", flush=True)
    found_all: list[dict[str, Any]] = []
    for role in options.roles.split(","):
        arguments = [*sys.argv[1:], f"--roles={role}"]  # the last one counts
        common.run_ranks(__file__, arguments, options.gpus, 500, options.first_gpu)
        found = json.loads(answer_file(role, options.first_gpu).read_text())
        found_all.append(found)
        print(f"{role}: {found['parameters'] / 1e9:.2f} billion parameters, bf16 matrix rate "
              f"{found_all[0]['rate'] / 1e12:.0f} TFLOP/s; start {found['start_s']:.0f} s, first step "
              f"{found['first_s']:.0f} s")  # fmt: skip
        print(report(found_all, found_all[0]["rate"], options), flush=True)


if __name__ == "__main__":
    main()
