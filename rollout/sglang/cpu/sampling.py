"""Sampling of an engine on a CPU: each draw depends on its request's seed and its position, and on nothing else.

    u = uniform(seed, position) in (0, 1)        token = the smallest v with p(0) + ... + p(v) > u (p(0) + ... + p(V-1))

The uniform number is 52 bits of a counter-based hash, so that a request that is retracted and computed again meets the
same draws. Which requests are sampled beside it, and how, makes no difference. SGLang has such draws for some GPU
kernels only (`--enable-deterministic-inference`); without them all requests draw from one generator in turn.
"""

from __future__ import annotations

from typing import Any

import torch

GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio as an int64: the increment of splitmix64
MULTIPLIERS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # of splitmix64's finalizer


def hash64(x: torch.Tensor) -> torch.Tensor:
    """Return splitmix64's finalizer of int64 words: every bit depends on all bits."""
    for shift, multiplier in zip((30, 27), MULTIPLIERS, strict=True):
        x = (x ^ _shifted(x, shift)) * multiplier
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, count: int) -> torch.Tensor:
    """Shift right with zeros; torch's own shift of an int64 repeats the sign."""
    return (x >> count) & ((1 << (64 - count)) - 1)


def uniform(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return float64[B] in (0, 1) from int64[B] seeds and int[B] positions."""
    words = hash64(hash64(seeds + GOLDEN) + positions.to(torch.int64) * GOLDEN)
    return (_shifted(words, 12).to(torch.float64) + 0.5) * 2.0**-52


def draw(weights: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return int32[B] token ids drawn in proportion to weights [B, V], by the inverse of their cumulative sum."""
    cumulative = weights.to(torch.float64).cumsum(-1)
    total = cumulative[:, -1]
    at = torch.minimum(uniform(seeds, positions) * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, at[:, None], right=True).view(-1).to(torch.int32)


def filtered(
    probs: torch.Tensor, top_ks: torch.Tensor, top_ps: torch.Tensor, min_ps: torch.Tensor | None
) -> torch.Tensor:
    """Return probs [B, V] with zeros where a row's top-k, top-p or min-p, each [B], excludes a token.

    A row without limits stays as it is, bit for bit.
    """
    ordered, tokens = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.arange(probs.shape[1]) < top_ks.view(-1, 1)
    kept &= (before <= top_ps.view(-1, 1)) | (top_ps.view(-1, 1) >= 1)
    if min_ps is not None:
        kept &= ordered >= ordered[:, :1] * min_ps.view(-1, 1)
    return torch.zeros_like(probs).scatter_(1, tokens, ordered * kept)


def sample(
    probs: torch.Tensor, sampling_seed: torch.Tensor | None = None, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the tokens of a batch without limits on what is sampled: SGLang's `sampling_from_probs_torch`."""
    assert sampling_seed is not None, "every batch has seeds"
    assert positions is not None, "every batch has positions"
    return draw(probs, sampling_seed, positions)


def sample_filtered(
    probs: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    min_ps: torch.Tensor,
    need_min_p_sampling: bool,
    sampling_seed: torch.Tensor | None,
    positions: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """Return the tokens of any other batch: SGLang's `top_k_top_p_min_p_sampling_from_probs_torch`.

    Greedy requests have top-k 1. SGLang's own function sorts all rows of a batch before it draws, so that a request
    would draw another token beside a greedy one.
    """
    assert not options.get("return_filtered_probs"), "no request asks for the mask of what could be sampled"
    return sample(filtered(probs, top_ks, top_ps, min_ps if need_min_p_sampling else None), sampling_seed, positions)


def install() -> None:
    """Put the functions above into SGLang, and the seeds of requests into its batches.

    A request without a seed gets one from torch's generator, which is in the same state in all tensor-parallel ranks.
    """
    from sglang.srt.layers import sampler
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    made = SamplingBatchInfo.from_schedule_batch.__func__

    def from_schedule_batch(cls: Any, batch: Any, vocab_size: int) -> Any:
        info = made(cls, batch, vocab_size)
        seeds = [request.sampling_params.sampling_seed for request in batch.reqs]
        drawn = torch.randint(2**63 - 1, (seeds.count(None),)).tolist()
        info.sampling_seed = torch.tensor([drawn.pop() if seed is None else seed for seed in seeds], dtype=torch.int64)
        return info

    SamplingBatchInfo.from_schedule_batch = classmethod(from_schedule_batch)
    sampler.sampling_from_probs_torch = sample
    sampler.top_k_top_p_min_p_sampling_from_probs_torch = sample_filtered
