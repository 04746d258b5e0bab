"""On-policy distillation: the student samples tokens and a teacher scores them."""

from __future__ import annotations

from enum import Enum

import torch

from trainer.losses.token import require_same_shape

TAIL_FLOOR = 1e-6  # smallest tail probability; 1 minus a sum of float32 probabilities is not more precise
SUM_TOLERANCE = 1e-3  # largest deviation from 1 of the sum of a row's probabilities


class Divergence(str, Enum):
    """A divergence between the student's distribution pi and the teacher's pi_T."""

    reverse_kl = "reverse_kl"  # KL(pi || pi_T): seeks a mode of the teacher
    forward_kl = "forward_kl"  # KL(pi_T || pi): covers all of the teacher
    jensen_shannon = "jensen_shannon"  # generalized, between the two


def distill_advantages(logprobs_T: torch.Tensor, teacher_logprobs_T: torch.Tensor) -> torch.Tensor:
    """Return the advantage of each sampled token y, [T], a constant; use it alone or add it to a task's advantage.

        A = sg[log pi_T(y) - log pi_theta(y)]

    A policy loss -A log pi_theta then has, over tokens sampled from pi_theta, the gradient of KL(pi_theta || pi_T) of
    each token's distribution (a sampled version of `distill` with reverse_kl). It needs one number per token from the
    teacher.

    ValueError: shapes differ.
    """
    require_same_shape(logprobs=logprobs_T, teacher_logprobs=teacher_logprobs_T)
    return (teacher_logprobs_T - logprobs_T).detach()


def distill(
    logprobs_TV: torch.Tensor, teacher_logprobs_TV: torch.Tensor, kind: Divergence, mix: float = 0.5
) -> torch.Tensor:
    """Compute the divergence of whole distributions, one loss per token, [T]; summed and divided by N like every loss.

        reverse_kl      sum_v pi(v) (log pi(v) - log pi_T(v))
        forward_kl      sum_v pi_T(v) (log pi_T(v) - log pi(v))
        jensen_shannon  b KL(pi_T || m) + (1 - b) KL(pi || m),   m = b pi_T + (1 - b) pi,   0 < b = mix < 1

    (generalized JSD: Agarwal et al., arXiv 2306.13649; divided by b it tends to forward_kl as b -> 0, divided by 1 - b
    to reverse_kl as b -> 1; it is bounded, by log 2 at b = 1/2). `mix` is read for jensen_shannon only.

    Rows: log-probabilities of the T action tokens' distributions over the whole vocabulary, not split over ranks; or
    over the teacher's top k, both completed by `with_tail`. A v with probability 0 on the left of a KL adds 0; a v with
    probability 0 only on the right makes it infinite (see `require_finite`). Gradients flow to logprobs_TV.

    ValueError: shapes differ; rows whose probabilities do not sum to 1; mix out of range.
    """
    require_same_shape(logprobs=logprobs_TV, teacher_logprobs=teacher_logprobs_TV)
    teacher_TV = teacher_logprobs_TV.detach()
    _require_distributions(logprobs_TV.detach(), "logprobs")
    _require_distributions(teacher_TV, "teacher_logprobs")
    if kind is Divergence.reverse_kl:
        return _kl(logprobs_TV, teacher_TV)
    if kind is Divergence.forward_kl:
        return _kl(teacher_TV, logprobs_TV)
    if not 0 < mix < 1:
        raise ValueError(f"mix={mix}: must lie between 0 (toward forward_kl) and 1 (toward reverse_kl), both excluded")
    # exp(-1e4) is 0 in every float: this changes no probability and avoids -inf - -inf in the mixture's gradient.
    student_TV, teacher_TV = logprobs_TV.clamp(min=-1e4), teacher_TV.clamp(min=-1e4)
    share = torch.tensor(mix, dtype=logprobs_TV.dtype, device=logprobs_TV.device)
    mixed_TV = torch.logaddexp(share.log() + teacher_TV, torch.log1p(-share) + student_TV)
    return mix * _kl(teacher_TV, mixed_TV) + (1 - mix) * _kl(student_TV, mixed_TV)


def with_tail(logprobs_TK: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of K chosen tokens followed by that of all others together: [T, K + 1].

        p_tail = 1 - sum_k p_k, at least TAIL_FLOOR

    Call it with the teacher's top k and with the student's log-probabilities at the same k tokens. Putting the rest
    into one bucket gives a lower bound of the whole divergence that converges to it as k grows. The alternative,
    rescaling the k to sum to 1, would not detect a student that leaves the teacher's top k altogether.

    ValueError: probabilities of a row sum to more than 1.
    """
    kept_T = logprobs_TK.exp().sum(-1, dtype=torch.float64)
    _refuse(~(kept_T.detach() <= 1 + SUM_TOLERANCE), kept_T, "top-k log-probabilities", "at most 1")
    tail_T = (1 - kept_T).clamp(min=TAIL_FLOOR).log().to(logprobs_TK.dtype)
    return torch.cat([logprobs_TK, tail_T[:, None]], 1)


def _kl(left_TV: torch.Tensor, right_TV: torch.Tensor) -> torch.Tensor:
    """Return sum_v p (log p - log q), [T]; terms with p = 0 add 0, and their gradient is not NaN."""
    p_TV = left_TV.exp()
    return (p_TV * (left_TV - right_TV).masked_fill(p_TV == 0, 0.0)).sum(-1)


def _require_distributions(logprobs_TV: torch.Tensor, name: str) -> None:
    sums_T = logprobs_TV.exp().sum(-1, dtype=torch.float64)
    _refuse(
        ~((sums_T - 1).abs() <= SUM_TOLERANCE),
        sums_T,
        name,
        "1: give log-probabilities of action tokens over the whole vocabulary, or with_tail(...) of the top k",
    )


def _refuse(bad_T: torch.Tensor, sums_T: torch.Tensor, name: str, must: str) -> None:
    if bad_T.any():
        row = int(bad_T.nonzero()[0, 0])
        raise ValueError(f"{name}: the probabilities of row {row} sum to {float(sums_T[row]):.6g}: must be {must}")
