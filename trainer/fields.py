"""What a policy update is told about every token, computed once on the driver, where episodes are whole.

field               float32 [T]                                                            read by
advantages          the targets'                                                           every loss
weights             the normaliser's w (losses/weights.py), 0 where not trained            every loss
corrections         weight of the policy loss alone (losses/correction.py)                 ppo, gspo
old_logprobs        log pi_old: the trainer's, before the first update of the step         ppo, gspo, decoupled
engine_logprobs     log mu: the engine's, under the weights that sampled the token         dis, cispo, decoupled
reference_logprobs  of the frozen starting model                                           KL in the loss
nll_weights         of the token's negative log-likelihood, 0 but for positive episodes    positive-example NLL
part                index into PARTS                                                       gradient shares
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from buffer.types import Batch, Float32, Grid, LossWeights, SubTrace, Targets
from trainer.config import Correction, KLPlace, LossNorm, PolicyConfig
from trainer.losses.weights import normaliser_weights, positive_weights

PARTS = ("final", "compacted", "sub_agent", "summary")  # kinds of token whose share of the gradient is told


def policy_fields(
    config: PolicyConfig,
    batch: Batch,
    sub_traces: Sequence[SubTrace],
    targets: Sequence[Targets],
    logprobs: Mapping[int, Float32],
    reference_logprobs: Mapping[int, Float32],
    corrections: Sequence[Float32],
    grids: Sequence[Grid],
) -> dict[str, dict[int, Float32]]:
    """The fields above, by index of the sub-trace in the batch. One grid for each optimizer step of the epoch."""
    fields: dict[str, dict[int, Any]] = {
        "advantages": {i: target.advantages for i, target in enumerate(targets)},
        "weights": loss_weights(batch, sub_traces, grids, config.loss_norm),
        "old_logprobs": dict(logprobs),
        "engine_logprobs": {i: trace.logprobs for i, trace in enumerate(sub_traces)},
        "part": {i: parts_of(trace) for i, trace in enumerate(sub_traces)},
    }
    if config.correction is not Correction.none:
        fields["corrections"] = dict(enumerate(corrections))
    if reference_logprobs and config.kl_in is KLPlace.loss:
        fields["reference_logprobs"] = dict(reference_logprobs)
    if config.nll_coef:
        fields["nll_weights"] = nll_weights(config.nll_coef, batch, sub_traces, grids)
    if not config.train_summaries:
        for name in ("weights", "nll_weights"):
            for i, weights in fields.get(name, {}).items():
                fields[name][i] = np.where(sub_traces[i].summary_mask, np.float32(0), weights)
    return fields


def parts_of(trace: SubTrace) -> Float32:
    """Index into PARTS of every token, float32 [T]: summaries first, then the sub-trace's kind."""
    own = PARTS.index(trace.kind.value)
    return np.where(trace.summary_mask, np.float32(PARTS.index("summary")), np.float32(own))


def loss_weights(batch: Batch, sub_traces: Sequence[SubTrace], grids: Sequence[Grid], norm: LossNorm) -> LossWeights:
    """Weight of every token in its optimizer step's loss, float32 [T] by index; see trainer/losses/weights.py."""
    weights: LossWeights = {}
    for indices in map(_indices, grids):
        items = [batch.items[i] for i in indices]
        found = normaliser_weights([item.episode_id for item in items], [item.num_actions for item in items], norm)
        weights |= _per_token(indices, found, sub_traces)
    return weights


def nll_weights(coef: float, batch: Batch, sub_traces: Sequence[SubTrace], grids: Sequence[Grid]) -> LossWeights:
    """Weight of every token's negative log-likelihood: `coef` times the mean over episodes with positive reward."""
    earned: dict[str, float] = {}
    for trace in sub_traces:
        earned[trace.episode_id] = earned.get(trace.episode_id, 0.0) + float(trace.rewards.sum())
    weights: LossWeights = {}
    for indices in map(_indices, grids):
        items = [batch.items[i] for i in indices]
        positive = [earned[item.episode_id] > 0 for item in items]
        found = positive_weights([item.num_actions for item in items], positive)
        weights |= _per_token(indices, [coef * w for w in found], sub_traces)
    return weights


def _indices(grid: Grid) -> list[int]:
    return [i for row in grid for micro in row for i in micro]


def _per_token(indices: Sequence[int], found: Sequence[float], sub_traces: Sequence[SubTrace]) -> LossWeights:
    return {i: np.full(len(sub_traces[i].tokens), w, np.float32) for i, w in zip(indices, found, strict=True)}
