"""Shared code of the GPU benchmarks: model shapes, random models and sub-traces, the measured matrix rate, tables."""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from buffer.types import Status, SubTrace, SubTraceKind
from machine.ports import ReservedPort

# Shapes of the published Qwen3 models (their config.json); weights here are random.
QWEN3: dict[str, dict[str, Any]] = {
    "1.7b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
}
VOCAB = 151936
# Predictions of each sequence of a packed micro-batch of 32,768: agents' histories of very different lengths.
LENGTHS = (16384, 8192, 4096, 2048, 1024, 1024)


def write_config(folder: Path, model: str, num_layers: int = 0) -> Path:
    """Write the config.json of a Qwen3 model, without weights, and return the folder; `num_layers` > 0 cuts layers."""
    shape = dict(QWEN3[model])
    if num_layers:
        shape["num_hidden_layers"] = num_layers
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCAB,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": model == "1.7b",
        "hidden_act": "silu",
        "attention_bias": False,
        "torch_dtype": "bfloat16",
        **shape,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def sub_trace(rng: np.random.Generator, num_tokens: int, vocab: int, name: str) -> SubTrace:
    """Return a random sub-trace: turns of 256 tokens whose second half is sampled."""
    mask = np.arange(num_tokens) % 256 >= 128
    mask[-1] = True
    return SubTrace(
        tokens=rng.integers(0, vocab, num_tokens).astype(np.int32),
        action_mask=mask,
        logprobs=np.where(mask, -np.log(vocab), 0.0).astype(np.float32),
        rewards=np.zeros(num_tokens, np.float32),
        versions=np.where(mask, 0, -1).astype(np.int32),
        stale_mask=np.zeros(num_tokens, bool),
        summary_mask=np.zeros(num_tokens, bool),
        episode_id=name,
        position=0,
        successor=None,
        kind=SubTraceKind.FINAL,
        status=Status.FINISHED,
    )


def sub_traces(num_tokens: int, vocab: int, seed: int = 0) -> list[SubTrace]:
    """Return sub-traces with LENGTHS scaled to `num_tokens` predictions in total."""
    rng = np.random.default_rng(seed)
    scale = sum(LENGTHS) // num_tokens
    return [sub_trace(rng, length // scale + 1, vocab, f"e{i}") for i, length in enumerate(LENGTHS)]


def milliseconds(run: Callable[[], Any], repeats: int = 10, warm_up: int = 3) -> float:
    """Return the median milliseconds of `run` on the GPU, measured by events around each call."""
    for _ in range(warm_up):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def matrix_rate(n: int = 8192) -> float:
    """Return the bf16 FLOP/s of an n x n x n product of random numbers, the reference rate of utilization."""
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / (milliseconds(lambda: a @ b, repeats=20) * 1e-3)


def run_ranks(script: str, arguments: Sequence[str], num_ranks: int, timeout_s: float, first_gpu: int = 0) -> None:
    """Run `script` once per GPU; each process sees one GPU.

    RuntimeError: a process failed (raised at once, because the others would wait for it). TimeoutError: not done in
    `timeout_s`.
    """
    ends = time.monotonic() + timeout_s
    port = ReservedPort("127.0.0.1")
    ranks = [
        subprocess.Popen(
            [sys.executable, script, *arguments, "--rank", str(rank), "--port", str(port.number)],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": str(first_gpu + rank)},
        )
        for rank in range(num_ranks)
    ]
    try:
        while None in (codes := [rank.poll() for rank in ranks]) and not any(codes):
            if time.monotonic() > ends:
                raise TimeoutError(f"{script}: not done after {timeout_s:.0f} s, exit codes {codes}")
            time.sleep(0.2)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
        port.close()
    if any(codes):
        raise RuntimeError(f"{script}: exit codes {codes}")


class OneRank:
    """A worker in this process with the interface of a role of processes (trainer/group.py)."""

    def __init__(self, worker: Any) -> None:
        self.worker = worker
        self.said: dict[str, Any] = {}  # the last answer of each method
        self._thread = ThreadPoolExecutor(1)

    def __getattr__(self, method: str) -> Any:
        """Return a function that runs the worker's method in a thread; `result(timeout_s)` is its answer."""

        def run(*arguments: Any) -> Any:
            self.said[method] = getattr(self.worker, method)(*arguments)
            return self.said[method]

        return functools.partial(self._thread.submit, run)


def machine() -> str:
    """Return one line with GPU, driver and library versions."""
    import triton

    asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    gpus = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
    python = sys.version.split()[0]
    return f"{len(gpus)} x {gpus[0]}; Python {python}, torch {torch.__version__}, triton {triton.__version__}"


def say(cells: Sequence[Any], head: bool = False) -> None:
    """Print a row of a Markdown table at once, so that an aborted script keeps its measurements."""
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)
    if head:
        print("|" + "---|" * len(cells), flush=True)


def table(rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table; the first row is its head."""
    text = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in text) for i in range(len(text[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in text]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)
