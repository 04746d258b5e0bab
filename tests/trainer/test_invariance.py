"""The policy's whole objective does not notice how a step was cut up: loss and gradients in float64 to 1e-10.

A bigram model in float64 stands for the transformer: its log-probability of a token depends on the token before it,
so the contexts of an episode and of its cut twin agree. Everything after the model is the trainer's own code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from twins import pair

from buffer.types import Batch, Float32, Grid, Scores, SubTrace, SubTraceInfo, SubTraceKind, TokenColumn
from critic.advantages import advantages
from critic.config import AdvantageConfig
from trainer.batching import micro_batch
from trainer.columns import policy_columns
from trainer.config import KL, Correction, Loss, LossNorm, PolicyConfig
from trainer.losses.correction import correction_weights
from trainer.policy import PolicyWorker

VOCAB = 400
OBJECTIVES = {
    "ppo": PolicyConfig(),
    "ppo, dual clip": PolicyConfig(dual_clip=1.5),
    "ppo, tis": PolicyConfig(correction=Correction.tis, correction_bounds=[0.0, 1.1]),
    "ppo, icepop": PolicyConfig(correction=Correction.icepop, correction_bounds=[0.7, 1.4]),
    "ppo, mis": PolicyConfig(correction=Correction.mis, correction_bounds=[0.95, 1.06]),
    "ppo, per episode": PolicyConfig(loss_norm=LossNorm.episode),
    "ppo, k3, entropy, nll": PolicyConfig(kl_coef=0.1, kl=KL.k3, entropy_coef=0.01, nll_coef=0.1),
    "ppo, no summaries": PolicyConfig(train_summaries=False, nll_coef=0.1),
    "dis": PolicyConfig(loss=Loss("dis")),
    "cispo": PolicyConfig(loss=Loss("cispo")),
    "decoupled": PolicyConfig(loss=Loss("decoupled")),
}
NOTICE_A_CUT = {
    "gspo": PolicyConfig(loss=Loss("gspo"), clip_low=0.05, clip_high=0.05),
    "ppo, per sub-trace": PolicyConfig(loss_norm=LossNorm.sub_trace),
}


@dataclass(frozen=True)
class Found:
    """What one optimizer step would see."""

    loss: float
    gradient: torch.Tensor
    metrics: dict[str, float]


def with_summaries(traces: Sequence[SubTrace]) -> list[SubTrace]:
    """Every fifth token of the vocabulary counts as part of a summary."""
    return [replace(trace, summary_mask=trace.action_mask & (trace.tokens % 5 == 0)) for trace in traces]


def per_token(traces: Sequence[SubTrace], scale: float, shift: int) -> dict[int, Float32]:
    """A number for each token that depends on it and the token before, as a log-probability would."""
    found = {}
    for i, trace in enumerate(traces):
        before = np.roll(trace.tokens, 1)
        noise = np.sin(trace.tokens * 12.9898 + before * 78.233 + shift) * scale
        found[i] = (np.where(trace.action_mask, np.maximum(trace.logprobs, -2.0) + noise, 0)).astype(np.float32)
    return found


def step(config: PolicyConfig, traces: list[SubTrace], values: list[Float32], grid: Grid) -> Found:
    """Loss and gradient of one optimizer step over `grid`, summed over its ranks and micro-batches."""
    items = tuple(SubTraceInfo(t, t.episode_id, len(t.tokens), t.num_actions, 0) for t in traces)
    batch = Batch(0, items, ())
    old = per_token(traces, 0.3, 0)
    targets = advantages(traces, values, AdvantageConfig(gamma=0.99, lambda_policy=0.9))
    corrections = correction_weights(
        traces, [old[i] for i in range(len(traces))], config.correction, *config.correction_window
    )
    reference = per_token(traces, 0.5, 1) if config.kl_coef else {}
    scores = Scores(TokenColumn(), TokenColumn(old), TokenColumn(reference))
    columns = policy_columns(config, batch, traces, targets, scores, corrections, [grid])
    worker: Any = PolicyWorker.__new__(PolicyWorker)
    worker.config = config
    rng = torch.Generator().manual_seed(5)
    model_VV = (torch.randn(VOCAB, VOCAB, generator=rng, dtype=torch.float64) * 0.5).requires_grad_()
    total, sums, tokens = torch.zeros((), dtype=torch.float64), dict[str, float](), 0
    for row in grid:
        for indices in row:
            micro = micro_batch(indices, dict(enumerate(traces)), columns, torch.device("cpu"), (1, 8))
            all_PV = torch.log_softmax(model_VV[micro.tokens_1P[0]], -1)
            logprobs_P = all_PV.gather(1, micro.labels_1P[0][:, None])[:, 0]
            # Near the old ones, so that some tokens are clipped and most are not.
            near_P = micro.columns["old_logprobs"] + 0.6 * (logprobs_P + 6.1)
            entropy_P = -(all_PV.exp() * all_PV).sum(1)
            loss, of_sums, _ = worker._policy_loss(torch.stack([near_P, entropy_P]), micro)
            total = total + loss
            tokens += micro.num_actions
            for name, number in of_sums.items():
                sums[name] = sums.get(name, 0.0) + float(number)
    loss = total / tokens
    loss.backward()
    assert model_VV.grad is not None
    return Found(float(loss.detach()), model_VV.grad, sums)


def assert_same(found: Found, wanted: Found) -> None:
    assert found.loss == pytest.approx(wanted.loss, rel=0, abs=1e-10)
    assert float((found.gradient - wanted.gradient).abs().max()) < 1e-10
    assert float(wanted.gradient.abs().max()) > 1e-4, "nothing is compared with nothing"
    for name, number in wanted.metrics.items():
        assert found.metrics[name] == pytest.approx(number, rel=1e-9, abs=1e-9), name


@pytest.mark.parametrize("name", [*OBJECTIVES, *NOTICE_A_CUT])
def test_micro_batches_ranks_order_and_padding_change_nothing(name: str) -> None:
    config = (OBJECTIVES | NOTICE_A_CUT)[name]
    p = pair(11)
    traces, values = with_summaries(p.parts), p.parts_values
    n = len(traces)
    whole = step(config, traces, values, [[list(range(n))]])
    assert 0 < whole.metrics["clip_fraction"] < whole.metrics["tokens"]
    grids: list[Grid] = [
        [[[i] for i in range(n)]],  # a micro-batch for each
        [[list(range(0, n, 2)), list(range(1, n, 2))], [[], []]],  # one rank has padding alone
        [[[i for i in range(n) if i % 3 == k]] for k in range(3)],  # three ranks
    ]
    for grid in grids:
        assert_same(step(config, traces, values, grid), whole)
    order = np.random.default_rng(0).permutation(n).tolist()
    shuffled = [traces[i] for i in order], [values[i] for i in order]
    assert_same(step(config, *shuffled, [[list(range(n))]]), whole)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_cut_changes_neither_loss_nor_gradient(name: str) -> None:
    p = pair(11)
    uncut = step(OBJECTIVES[name], with_summaries(p.whole), p.whole_values, [[list(range(len(p.whole)))]])
    cut = step(OBJECTIVES[name], with_summaries(p.parts), p.parts_values, [[[i] for i in range(len(p.parts))]])
    kinds = {"gradient/final", "gradient/compacted"}  # the one thing that a cut is meant to change
    assert cut.metrics["gradient/compacted"] > 0
    assert uncut.metrics["gradient/compacted"] == 0
    assert sum(cut.metrics[k] for k in kinds) == pytest.approx(uncut.metrics["gradient/final"])
    rest = {k: v for k, v in uncut.metrics.items() if k not in kinds}
    # advantages are float32 and may differ in their last bit
    assert cut.loss == pytest.approx(uncut.loss, abs=1e-6)
    assert float((cut.gradient - uncut.gradient).abs().max()) < 1e-6 * float(uncut.gradient.abs().max())
    for key, number in rest.items():
        assert cut.metrics[key] == pytest.approx(number, rel=1e-5, abs=1e-5), key


@pytest.mark.parametrize("name", NOTICE_A_CUT)
def test_what_is_defined_by_the_sub_trace_does_notice_a_cut(name: str) -> None:
    p = pair(11)
    uncut = step(NOTICE_A_CUT[name], p.whole, p.whole_values, [[list(range(len(p.whole)))]])
    cut = step(NOTICE_A_CUT[name], p.parts, p.parts_values, [[list(range(len(p.parts)))]])
    assert float((cut.gradient - uncut.gradient).abs().max()) > 1e-3 * float(uncut.gradient.abs().max())


def test_tokens_without_weight_stay_in_the_denominator() -> None:
    """Summaries that are not trained: the others' gradient is what it was, not scaled up."""
    p = pair(11)
    traces, grid = with_summaries(p.parts), [[list(range(len(p.parts)))]]
    without = step(PolicyConfig(train_summaries=False), traces, p.parts_values, grid)
    with_all = step(PolicyConfig(), traces, p.parts_values, grid)
    assert without.metrics["tokens"] == with_all.metrics["tokens"]
    assert without.metrics["gradient/summary"] == 0
    for part in ("final", "compacted"):
        assert without.metrics[f"gradient/{part}"] == pytest.approx(with_all.metrics[f"gradient/{part}"])
    assert {trace.kind for trace in traces} == {SubTraceKind.FINAL, SubTraceKind.COMPACTED}


def test_a_number_that_is_not_finite_is_named() -> None:
    p = pair(11)
    config, traces = PolicyConfig(), list(p.parts)
    huge = replace(traces[2], logprobs=np.where(traces[2].action_mask, -1e9, 0).astype(np.float32))
    traces[2] = huge
    with pytest.raises(ValueError, match=f"episode {huge.episode_id}, sub-trace {huge.position}, index"):
        step(replace(config, loss=Loss("cispo"), clip_high=float("inf")), traces, p.parts_values, [[list(range(12))]])
