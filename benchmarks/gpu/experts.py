"""Speed of the experts of one layer, forward and backward: one after another against all together.

    python benchmarks/gpu/experts.py                      Qwen3-30B-A3B's layer, 32,768 tokens
    python benchmarks/gpu/experts.py --experts 16         the share of one GPU of eight under expert parallelism

loop     megatron-core's SequentialMLP, which the trainer uses where torch has no grouped product
grouped  the trainer's own module, two grouped products

`even` rows are drawn uniformly over the experts; `skewed` ones by 1 / rank, and an eighth of the experts get none.
`layer` is the whole layer: router, sorting, experts, summation. Useful FLOP are those of the experts' products alone:
6 * rows * hidden * width forward, twice that backward. A distance is relative to the loop with the same rows, the
largest of output, gradient of the input and gradients of all weights. Peak memory is the memory of one forward and
backward pass in addition to weights and inputs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu import common
from benchmarks.gpu.check import distance
from machine.ports import ReservedPort
from trainer.config import LayoutConfig, OptimizerConfig, Precision
from trainer.engine import EngineSettings
from trainer.megatron.config import MegatronConfig
from trainer.megatron.model import leave_process, start_process, transformer_config
from trainer.megatron.modules import experts
from trainer.megatron.spec import block_spec
from trainer.models.families import read_shape

# Qwen3-30B-A3B's config.json, one layer of it.
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": common.VOCAB,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "torch_dtype": "bfloat16",
}
DEVICE = "cuda"
LAYOUT = LayoutConfig(precision=Precision.bf16), MegatronConfig()
Layer = Callable[[torch.Tensor], torch.Tensor]


def make_layer(config: dict[str, Any]) -> Any:
    """Return the trainer's module for the experts of a layer, including the router, with random weights in bf16."""
    from megatron.core.transformer.spec_utils import build_module

    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(config))
    shape = read_shape(folder)
    spec = block_spec(shape, [0]).layer_specs[0].submodules.mlp
    layer = build_module(spec, config=transformer_config(shape, *LAYOUT))
    layer.set_layer_number(1)
    layer.to(DEVICE)
    torch.manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.02)
    return layer


def counts_of(rows: int, num_experts: int, skewed: bool) -> list[int]:
    """Return the number of rows of each expert."""
    weight_E = 1 / torch.arange(1.0, num_experts + 1) if skewed else torch.ones(num_experts)
    if skewed:
        weight_E[:: min(8, num_experts)] = 0
    drawn = torch.multinomial(weight_E, rows, replacement=True, generator=torch.Generator().manual_seed(1))
    return drawn.bincount(minlength=num_experts).tolist()


def largest_distance(found: Sequence[torch.Tensor], base: Sequence[torch.Tensor]) -> float:
    """Return the largest distance of output, input gradient and all weight gradients taken as one vector."""
    joined = [torch.cat([x.flatten() for x in side[2:]]) for side in (found, base)]
    pairs = [*zip(found[:2], base[:2], strict=True), (joined[0], joined[1])]
    return max(distance(a, b) for a, b in pairs)


def measure(run: Layer, x: torch.Tensor, weights: Sequence[torch.Tensor]) -> tuple[float, float, float, Any]:
    """Return milliseconds forward and backward, peak GB of both, and output and gradients."""
    grad = torch.randn(x.shape, device=DEVICE, dtype=x.dtype, generator=torch.Generator(DEVICE).manual_seed(2))
    torch.autograd.grad(run(x), (x, *weights), grad)  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = run(x)
    backward = partial(torch.autograd.grad, out, (x, *weights), grad, retain_graph=True)
    found = [out.detach(), *backward()]
    peak_gb = (torch.cuda.max_memory_allocated() - before) / 1e9
    backward_ms = common.milliseconds(backward)
    with torch.no_grad():
        forward_ms = common.milliseconds(lambda: run(x))
    return forward_ms, backward_ms, peak_gb, found


def report(name: str, run: Layer, x: torch.Tensor, weights: Sequence[torch.Tensor], flop: float) -> None:
    """Print the rows of both ways to compute `run`."""
    base: Any = None
    for way in ("loop", "grouped"):
        takes = experts.grouped_product_takes if way == "grouped" else lambda *of: False
        with patch.object(experts, "grouped_product_takes", takes):
            forward_ms, backward_ms, peak_gb, found = measure(run, x, weights)
        far = "" if base is None else f"{largest_distance(found, base):.1e}"
        base = base or found
        speeds = [f"{flop / forward_ms / 1e9:.0f}", f"{2 * flop / backward_ms / 1e9:.0f}"]
        speeds.append(f"{3 * flop / (forward_ms + backward_ms) / 1e9:.0f}")
        common.say([name, way, f"{forward_ms:.2f}", f"{backward_ms:.2f}", *speeds, f"{peak_gb:.2f}", far])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--experts", type=int, default=CONFIG["num_experts"])
    parser.add_argument("--hidden", type=int, default=CONFIG["hidden_size"])
    parser.add_argument("--width", type=int, default=CONFIG["moe_intermediate_size"])
    options = parser.parse_args()
    print(common.machine(), f"{vars(options)}", flush=True)
    with ReservedPort("127.0.0.1") as port:
        start_process(EngineSettings(0, *LAYOUT, OptimizerConfig(), "", 0, 1, 300.0), "127.0.0.1", port.number)
    own = {"num_experts": options.experts, "hidden_size": options.hidden, "moe_intermediate_size": options.width}
    layer = make_layer(CONFIG | own)
    weights = list(layer.experts.parameters())
    takes = experts.grouped_product_takes(weights[0].dtype, weights[0].device, [options.hidden, options.width])
    rows = options.tokens * CONFIG["num_experts_per_tok"]
    flop = 6.0 * rows * options.hidden * options.width
    print(f"{sum(w.numel() for w in weights) / 1e6:.0f} million weights, {rows} rows; grouped product: {takes}")
    print(f"bf16 matrix rate {common.matrix_rate() / 1e12:.0f} TFLOP/s", flush=True)
    speeds = ["forward ms", "backward ms", *(f"TFLOP/s {phase}" for phase in ("forward", "backward", "both"))]
    common.say(["rows", "experts", *speeds, "peak GB", "distance"], head=True)
    x = torch.randn(rows, options.hidden, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    probs = torch.rand(rows, device=DEVICE)
    for name in ("even", "skewed"):
        counts = torch.tensor(counts_of(rows, options.experts, name == "skewed"))
        report(name, lambda x, counts=counts: layer.experts(x, counts, probs)[0], x, weights, flop)  # type: ignore[misc]
    tokens = torch.randn(options.tokens, 1, options.hidden, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    report("layer", lambda x: layer(x)[0], tokens, weights, flop)
    none = layer.experts(x[:0], torch.zeros(options.experts, dtype=torch.int64), probs[:0])[0]
    zero = not any(bool(g.any()) for g in torch.autograd.grad(none.sum(), weights))
    print(f"no rows at all: every weight has a gradient of zero: {zero}")
    leave_process()


if __name__ == "__main__":
    main()
