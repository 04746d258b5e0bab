"""Token weights that define the mean of a loss, computed on the driver for one optimizer step."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.config import LossNorm


def normalizer_weights(episode_of: Sequence[str], num_actions: Sequence[int], norm: LossNorm) -> list[float]:
    """Return the weight w_k of every token of sub-trace k, for the sub-traces of one optimizer step.

    With N = sum_k n_k action tokens in the step, n_k = num_actions[k], and the trainer's L = sum w l / N:

        norm        w_k             L is
        token       1               mean over all action tokens
        episode     N / (E n_e)     mean over the E episodes of each one's mean over its n_e action tokens
        sub_trace   N / (S n_k)     mean over the S sub-traces of each one's mean over its n_k action tokens

    `token` and `episode` do not depend on how an episode was cut; `sub_trace` does: an episode cut into three has three
    times the weight. Action tokens that are masked or not trained (summaries with train_summaries=false) count in n and
    N.

    ValueError: lengths differ; a negative count; an episode (`episode`) or a sub-trace (`sub_trace`) without action
    tokens, whose mean is not defined.
    """
    _check(num_actions, len(episode_of), "episode names")
    total = sum(num_actions)
    if norm is LossNorm.token:
        return [1.0] * len(num_actions)
    groups = list(episode_of) if norm is LossNorm.episode else [str(k) for k in range(len(num_actions))]
    sizes: dict[str, int] = {}
    for group, count in zip(groups, num_actions, strict=True):
        sizes[group] = sizes.get(group, 0) + count
    for k, group in enumerate(groups):
        if sizes[group] == 0:
            raise ValueError(
                f"episode {episode_of[k]}: sub-trace {k} of the step leads to a mean over 0 action tokens "
                f"(loss_norm={norm.value}): leave it out, there is nothing to train"
            )
    return [total / (len(sizes) * sizes[group]) for group in groups]


def positive_weights(num_actions: Sequence[int], positive: Sequence[bool], coef: float = 1.0) -> list[float]:
    """Return the weight w_k of every token's negative log-likelihood (positive-example loss: VAPO, arXiv 2504.05118).

    `positive[k]`: sub-trace k belongs to an episode with reward above 0. With N action tokens in the optimizer step, P
    of them in positive episodes, and the trainer's L = sum w l / N:

        w_k = coef N / P where positive, else 0        L = coef * mean of l over the action tokens of positive episodes

    Zero everywhere when no episode is positive. ValueError: lengths differ; a negative count.
    """
    _check(num_actions, len(positive), "flags")
    total = sum(num_actions)
    chosen = sum(count for count, good in zip(num_actions, positive, strict=True) if good)
    return [coef * total / chosen if good and chosen else 0.0 for good in positive]


def _check(num_actions: Sequence[int], others: int, what: str) -> None:
    if len(num_actions) != others:
        raise ValueError(f"{len(num_actions)} counts of action tokens, {others} {what}: must be equal")
    if any(count < 0 for count in num_actions):
        raise ValueError(f"num_actions={list(num_actions)}: none may be negative")
