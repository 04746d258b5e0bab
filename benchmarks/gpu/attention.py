"""Speed of packed attention, forward and backward, by kernel, to choose the trainer's kernel.

    python benchmarks/gpu/attention.py

flash   torch.nn.attention.varlen, which the trainer calls if FlashAttention 4 is not installed
fa4     FlashAttention 4 (flash-attn-4), which the trainer calls if it is installed
cudnn   scaled_dot_product_attention on cuDNN, one call a sequence
ragged  the cuDNN operator that varlen_attn would call if its switch allowed it, all sequences in one call

Useful FLOP count the lower triangle: 4 * width * length^2 / 2 forward, twice that backward. Distances are to flash, the
largest of output and gradients; a kernel is usable if its distance is near 1e-2 or below. Some versions of torch pass
the width of a head to cuDNN as the longest sequence in `ragged`'s backward pass: a large distance shows this.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu import common
from benchmarks.gpu.check import distance

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def kernels(lengths: list[int]) -> dict[str, Attention]:
    """Return the kernels by name: query [T, H, d], key and value [T, G, d] -> [T, H, d]."""
    from torch.nn.attention import varlen

    borders = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to("cuda", torch.int32)
    longest = max(lengths)

    def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = varlen.varlen_attn(q, k, v, borders, borders, longest, longest, window_size=(-1, 0))
        assert isinstance(out, torch.Tensor)
        return out

    def fa4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        from flash_attn.cute import flash_attn_varlen_func

        packed = {"cu_seqlens_q": borders, "cu_seqlens_k": borders, "max_seqlen_q": longest, "max_seqlen_k": longest}
        return flash_attn_varlen_func(q, k, v, **packed, causal=True)[0]

    def cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        found = []
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            for sequence in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
                a, b, c = (x.transpose(0, 1)[None] for x in sequence)
                found.append(F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=True)[0])
        return torch.cat(found, 1).transpose(0, 1)

    def ragged(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return _Ragged.apply(q, k, v, borders, longest)

    return {"flash": flash, "fa4": fa4, "cudnn": cudnn, "ragged": ragged}


class _Ragged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, borders, longest):  # type: ignore[no-untyped-def]
        out, lse, _, _, _, _, seed, offset, _ = torch.ops.aten._cudnn_attention_forward(
            q, k, v, None, borders, borders, longest, longest, True, 0.0, True, False
        )
        ctx.save_for_backward(q, k, v, out, lse, seed, offset, borders)
        ctx.longest = longest
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        q, k, v, out, lse, seed, offset, borders = ctx.saved_tensors
        n, no_bias = ctx.longest, None  # an empty tensor would be treated as a one-dimensional bias
        grads = torch.ops.aten._cudnn_attention_backward(
            grad.contiguous(), q, k, v, out, lse, seed, offset, no_bias, borders, borders, n, n, 0.0, True
        )
        return *grads, None, None


def measure(name: str, lengths: list[int], heads: int = 32, kv_heads: int = 8, d: int = 128) -> list[str]:
    """Return the row of a kernel: TFLOP/s, first call, distance of output and gradients to flash."""
    torch.manual_seed(0)
    q, k, v, g = (
        torch.randn(sum(lengths), n, d, device="cuda", dtype=torch.bfloat16) for n in (heads, kv_heads, kv_heads, heads)
    )
    flop = 2 * heads * d * sum(n * n for n in lengths)

    def run(kernel: Attention) -> tuple[list[torch.Tensor], Callable[[], object]]:
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = kernel(*inputs)
        backward = partial(torch.autograd.grad, out, inputs, g, retain_graph=True)
        return [out.detach(), *backward()], backward

    kernel = kernels(lengths)[name]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    packed = f"{len(lengths)} sequences"
    try:
        start.record()
        found, again = run(kernel)
        end.record()
        end.synchronize()
    except (
        ImportError,
        RuntimeError,
        IndexError,
    ) as error:  # a kernel that does not take these inputs is a result, too
        return [name, packed, str(error).splitlines()[0][:60], "", "", ""]
    with torch.no_grad():
        forward_ms = common.milliseconds(partial(kernel, q, k, v))
    backward_ms = common.milliseconds(again)
    base, _ = run(kernels(lengths)["flash"])
    far = max(distance(a, b) for a, b in zip(found, base, strict=True))
    speeds = [f"{flop / forward_ms / 1e9:.0f}", f"{2 * flop / backward_ms / 1e9:.0f}"]
    return [name, packed, *speeds, f"{start.elapsed_time(end):.0f} ms", f"{far:.1e}"]


def main() -> None:
    print(common.machine(), flush=True)
    head = ["kernel", "packed", "forward TFLOP/s", "backward TFLOP/s", "first call", "distance"]
    common.say(head, head=True)
    for name in (
        "flash",
        "fa4",
        "cudnn",
        "ragged",
    ):  # the last one may leave CUDA in a state in which all later calls fail
        for lengths in (list(common.LENGTHS), [512] * 64):
            common.say(measure(name, lengths))


if __name__ == "__main__":
    main()
