"""The per-token columns of a policy update, computed once on the driver, where episodes are whole.

column              float32 [T]                                                            read by
advantages          of the targets                                                         every loss
weights             the normalizer's w (losses/averages.py), 0 where not trained            every loss
corrections         weight of the policy loss alone (losses/correction.py)                 ppo, gspo
old_logprobs        log pi_old: of the trainer, before the first update of the step        ppo, gspo, decoupled
engine_logprobs     log mu: of the engine, under the weights that sampled the token        dis, cispo, decoupled
reference_logprobs  of the frozen starting model                                           KL in the loss
nll_weights         of the token's negative log-likelihood, 0 except in positive episodes  positive-example NLL
kind                index into TOKEN_KINDS                                                 gradient shares
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from buffer.types import Batch, Float32, Grid, Scores, SubTrace, Targets, TokenColumn
from trainer.config import Correction, KLPlace, LossNorm, PolicyConfig
from trainer.losses.averages import normalizer_weights, positive_weights

TOKEN_KINDS = ("final", "compacted", "sub_agent", "summary")  # the share of the gradient of each kind is a metric


def policy_columns(
    config: PolicyConfig,
    batch: Batch,
    sub_traces: Sequence[SubTrace],
    targets: Sequence[Targets],
    scores: Scores,
    corrections: Sequence[Float32],
    grids: Sequence[Grid],
) -> dict[str, TokenColumn]:
    """Return the columns above. `grids`: one for each optimizer step of the epoch."""
    columns = {
        "advantages": TokenColumn((i, target.advantages) for i, target in enumerate(targets)),
        "weights": loss_weights(batch, sub_traces, grids, config.loss_norm),
        "old_logprobs": scores.old_logprobs,
        "engine_logprobs": TokenColumn((i, trace.logprobs) for i, trace in enumerate(sub_traces)),
        "kind": TokenColumn((i, token_kinds(trace)) for i, trace in enumerate(sub_traces)),
    }
    if config.correction is not Correction.none:
        columns["corrections"] = TokenColumn(enumerate(corrections))
    if scores.reference_logprobs and config.kl_in is KLPlace.loss:
        columns["reference_logprobs"] = scores.reference_logprobs
    if config.nll_coef:
        columns["nll_weights"] = nll_weights(config.nll_coef, batch, sub_traces, grids)
    if not config.train_summaries:
        for name in ("weights", "nll_weights"):
            if name in columns:
                columns[name] = TokenColumn(
                    (i, np.where(sub_traces[i].summary_mask, np.float32(0), weights))
                    for i, weights in columns[name].items()
                )
    return columns


def token_kinds(trace: SubTrace) -> Float32:
    """Return the index into TOKEN_KINDS of every token, float32 [T]: summaries first, then the sub-trace's kind."""
    own = TOKEN_KINDS.index(trace.kind.value)
    return np.where(trace.summary_mask, np.float32(TOKEN_KINDS.index("summary")), np.float32(own))


def loss_weights(batch: Batch, sub_traces: Sequence[SubTrace], grids: Sequence[Grid], norm: LossNorm) -> TokenColumn:
    """Return the weight of every token in the loss of its optimizer step, float32 [T] for each sub-trace by index.

    ValueError: see `normalizer_weights` in trainer/losses/averages.py.
    """
    weights: dict[int, Float32] = {}
    for indices in map(_indices, grids):
        items = [batch.items[i] for i in indices]
        found = normalizer_weights([item.episode_id for item in items], [item.num_actions for item in items], norm)
        weights |= _per_token(indices, found, sub_traces)
    return TokenColumn(weights)


def nll_weights(coef: float, batch: Batch, sub_traces: Sequence[SubTrace], grids: Sequence[Grid]) -> TokenColumn:
    """Return the weight of every token's negative log-likelihood, float32 [T] for each sub-trace by index.

    The loss is `coef` times the mean over the action tokens of episodes with positive reward.
    """
    earned: dict[str, float] = {}
    for trace in sub_traces:
        earned[trace.episode_id] = earned.get(trace.episode_id, 0.0) + float(trace.rewards.sum())
    weights: dict[int, Float32] = {}
    for indices in map(_indices, grids):
        items = [batch.items[i] for i in indices]
        positive = [earned[item.episode_id] > 0 for item in items]
        found = positive_weights([item.num_actions for item in items], positive)
        weights |= _per_token(indices, [coef * w for w in found], sub_traces)
    return TokenColumn(weights)


def _indices(grid: Grid) -> list[int]:
    return [i for row in grid for micro in row for i in micro]


def _per_token(indices: Sequence[int], found: Sequence[float], sub_traces: Sequence[SubTrace]) -> dict[int, Float32]:
    return {i: np.full(len(sub_traces[i].tokens), w, np.float32) for i, w in zip(indices, found, strict=True)}
