"""Correctness of the trainer on a GPU: packed attention, scores, log-probabilities, layouts.

    python benchmarks/gpu/check.py               one GPU
    python benchmarks/gpu/check.py --gpus 2      also the layouts that two GPUs allow, against one
    python benchmarks/gpu/check.py --gpus 2 --models experts      only the layouts of a model with experts

Every number is |found - reference| / |reference| in Frobenius norm (for log-probabilities, nats). References are
computed in float64 from the same inputs, one sequence at a time; those of a model by transformers in float32.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu import common
from trainer.batching import Packing
from trainer.config import LayoutConfig, OptimizerConfig, PolicyConfig, Precision, Recompute
from trainer.engine import EngineSettings
from trainer.megatron.config import MegatronConfig
from trainer.policy import PolicyWorker

ONE = LayoutConfig(precision=Precision.bf16, max_tokens_per_micro_batch=4096)
TWO = replace(ONE, num_processes=2)
LAYOUTS = {
    "1 GPU": PolicyConfig(ONE),
    "1 GPU, layers recomputed": PolicyConfig(replace(ONE, recompute=Recompute.layer)),
    "1 GPU, MLP recomputed": PolicyConfig(replace(ONE, recompute=Recompute.mlp)),
    "DP2": PolicyConfig(TWO),
    "TP2": PolicyConfig(TWO, MegatronConfig(tensor_parallel=2)),
    "TP2+SP": PolicyConfig(TWO, MegatronConfig(tensor_parallel=2, sequence_parallel=True)),
    "PP2": PolicyConfig(TWO, MegatronConfig(pipeline_parallel=2)),
    "CP2": PolicyConfig(TWO, MegatronConfig(context_parallel=2)),
    "EP2": PolicyConfig(TWO, MegatronConfig(expert_parallel=2)),
}
MODELS = {  # with the layouts that are relevant for each
    "dense": [name for name in LAYOUTS if name != "EP2"],
    "experts": ["1 GPU", "1 GPU, MLP recomputed", "DP2", "TP2+SP", "EP2"],
}
DEVICE = "cuda"
VOCAB = 32003  # odd: tensor parallelism has to pad it


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def check_attention(heads: int = 16, kv_heads: int = 8, d: int = 128) -> list[list[str]]:
    """Compare packed attention, forward and backward, with softmax attention in float64."""
    from megatron.core.transformer.enums import AttnMaskType

    from trainer.megatron.model import transformer_config
    from trainer.megatron.modules.attention import PackedAttention, PackedSequences
    from trainer.models.families import read_shape

    lengths = [700, 1, 129, 1218]
    torch.manual_seed(1)
    q, k, v, g = (
        torch.randn(sum(lengths), n, d, device="cuda", dtype=torch.bfloat16) for n in (heads, kv_heads, kv_heads, heads)
    )
    shape = read_shape(common.write_config(Path(tempfile.mkdtemp()), "1.7b"))
    config = transformer_config(shape, ONE, MegatronConfig())
    attention = PackedAttention(config, 1, AttnMaskType.causal, "self")
    ours = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attention(*ours, None, packed_seq_params=PackedSequences(Packing(lengths, torch.device("cuda"))))
    out.backward(g.flatten(1))
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    exact_out = []
    for a, b, c in zip(*(x.split(lengths) for x in exact), strict=True):
        query, key, value = (x.transpose(0, 1)[None] for x in (a, b, c))
        exact_out.append(
            F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
        )
    reference = torch.cat(exact_out)
    reference.backward(g.double())
    rows = [["packed attention, forward", f"{distance(out, reference.flatten(1)):.1e}"]]
    for name, x, y in zip("qkv", ours, exact, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        rows.append([f"packed attention, gradient of {name}", f"{distance(x.grad, y.grad):.1e}"])
    return rows


class _Alone:
    """A tensor-parallel group of one."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def check_scores(tokens: int = 1500, hidden: int = 256) -> list[list[str]]:
    """Compare log-probability and entropy from bf16 hidden states in slices with float64."""
    from trainer.megatron.modules.scores import scores

    torch.manual_seed(2)
    h = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16).requires_grad_()
    w = (torch.randn(VOCAB, hidden, device="cuda") * 0.15).bfloat16().requires_grad_()
    labels = torch.randint(0, VOCAB, (tokens,), device="cuda")
    g = torch.randn(2, tokens, device="cuda")
    out = scores(h, w, labels, VOCAB, _Alone())
    found = torch.autograd.grad((out * g).sum(), (h, w))
    exact_h, exact_w = (x.detach().double().requires_grad_() for x in (h, w))
    log_p = (exact_h @ exact_w.t()).log_softmax(1)
    exact = torch.stack([log_p.gather(1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)])
    grads = torch.autograd.grad((exact * g).sum(), (exact_h, exact_w))
    return [
        ["log-probabilities", f"{distance(out[0], exact[0]):.1e}"],
        ["entropies", f"{distance(out[1], exact[1]):.1e}"],
        ["gradient of hidden states", f"{distance(found[0], grads[0]):.1e}"],
        ["gradient of the projection", f"{distance(found[1], grads[1]):.1e}"],
    ]


def make_model(folder: Path, kind: str = "dense") -> Path:
    """Write a random model whose predictions are far from uniform and return its folder.

    It is a Qwen3 of 130 million parameters, or a Qwen3-MoE of 230 million with 4 layers of 32 experts, 4 a token.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    more: dict[str, Any] = {"num_hidden_layers": 6, "tie_word_embeddings": True}
    if kind == "experts":
        more = {"num_hidden_layers": 4, "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 384}
        more |= {"norm_topk_prob": True, "tie_word_embeddings": False}
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        "qwen3_moe" if kind == "experts" else "qwen3",
        vocab_size=VOCAB,
        hidden_size=1024,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,
        intermediate_size=3072,
        max_position_embeddings=4096,
        initializer_range=0.06,
        **more,
    )
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    return folder


def reference_logprobs(kind: str, folder: Path, traces: list[Any], dtype: torch.dtype) -> np.ndarray:
    """Return the log-probabilities of transformers' own model, computed one sequence and one expert at a time."""
    from transformers import AutoModelForCausalLM

    how = {"attn_implementation": "sdpa"} | ({"experts_implementation": "eager"} if kind == "experts" else {})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **how).to(DEVICE).eval()
    found = []
    for trace in traces:
        tokens = torch.from_numpy(trace.tokens).long().to(DEVICE)
        with torch.no_grad():
            logits = model(tokens[None]).logits[0, :-1].float()
        found.append(logits.log_softmax(1).gather(1, tokens[1:, None])[:, 0].cpu().numpy())
    return np.concatenate(found)


def train_rank(options: argparse.Namespace) -> None:
    """Run one rank of a layout: log-probabilities, four updates, log-probabilities; write the results."""
    config = LAYOUTS[options.layout]
    optimizer = OptimizerConfig(lr=1e-4)
    settings = EngineSettings(options.rank, config.layout, config.megatron, optimizer, options.folder, 0, 1, 300.0)
    worker = PolicyWorker(settings, config)
    worker.start("127.0.0.1", options.port)
    traces = common.sub_traces(4096, VOCAB)
    grid = [[list(range(len(traces)))[row :: config.data_parallel]] for row in range(config.data_parallel)]
    old = {i: t.logprobs for i, t in enumerate(traces)}
    ones = {i: t.action_mask.astype(np.float32) for i, t in enumerate(traces)}
    columns: Any = {"advantages": ones, "weights": ones, "old_logprobs": old, "engine_logprobs": old}
    columns["kind"] = {i: 0 * x for i, x in ones.items()}
    before = worker.logprobs(traces, grid)
    norms = [worker.imitate(traces, [grid]).grad_norms[0] for _ in range(4)]
    after = worker.logprobs(traces, grid)
    worker.stop()
    found = {"before": before, "after": after, "norms": norms, "memory": torch.cuda.max_memory_allocated()}
    torch.save(found, Path(options.folder) / f"answer_{options.rank}.pt")


def run_layout(name: str, folder: Path) -> dict[str, Any]:
    num_processes = LAYOUTS[name].layout.num_processes
    common.run_ranks(__file__, ["--layout", name, "--folder", str(folder)], num_processes, timeout_s=300)
    ranks = [torch.load(folder / f"answer_{r}.pt", weights_only=False) for r in range(num_processes)]
    joined = {
        key: np.concatenate([part[1:] for _, part in sorted({i: x for r in ranks for i, x in r[key].items()}.items())])
        for key in ("before", "after")
    }
    return {**joined, "norms": ranks[0]["norms"], "memory": ranks[0]["memory"]}


def check_layouts(kind: str, num_gpus: int) -> None:
    """Compare log-probabilities before and after four updates in every layout with one GPU and transformers."""
    folder = make_model(Path(tempfile.mkdtemp()), kind)
    traces = common.sub_traces(4096, VOCAB)
    exact = reference_logprobs(kind, folder, traces, torch.float32)
    rough = reference_logprobs(kind, folder, traces, torch.bfloat16)
    nats = lambda a, b: f"{np.abs(a - b).mean():.1e} / {np.abs(a - b).max():.1e}"  # noqa: E731
    far = ["to fp32 transformers: mean / max nats", "to 1 GPU after 4 steps"]
    common.say([f"layout, {kind}", *far, "gradient norms", "peak GB"], head=True)
    common.say(["transformers in bf16", nats(rough, exact), "", "", ""])
    base: dict[str, Any] = {}
    for name in MODELS[kind]:
        if LAYOUTS[name].layout.num_processes > num_gpus:
            continue
        found = run_layout(name, folder)
        base = base or found
        norms = " ".join(f"{n:.4f}" for n in found["norms"])
        memory = f"{found['memory'] / 1e9:.2f}"
        common.say([name, nats(found["before"], exact), nats(found["after"], base["after"]), norms, memory])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--layout", default="", help="set by the script itself")
    parser.add_argument("--folder", default="", help="set by the script itself")
    parser.add_argument("--rank", type=int, default=-1, help="set by the script itself")
    parser.add_argument("--port", type=int, default=0, help="set by the script itself")
    options = parser.parse_args()
    if options.rank >= 0:
        train_rank(options)
        return
    print(common.machine(), flush=True)
    print(common.table([["against float64", "distance"], *check_attention(), *check_scores()]), flush=True)
    for kind in options.models.split(","):
        print(flush=True)
        check_layouts(kind, options.gpus)


if __name__ == "__main__":
    main()
