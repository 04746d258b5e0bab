"""KL estimators and distillation, against exact sums over a small vocabulary."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trainer import losses
from trainer.config import KL, LossNorm
from trainer.losses import Divergence
from trainer.losses.distill import TAIL_FLOOR

V = 7


def logits(*seeds: int, scale: float = 1.0) -> list[torch.Tensor]:
    return [
        scale * torch.randn(V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in seeds
    ]


def exact_kl(left_V: torch.Tensor, right_V: torch.Tensor) -> torch.Tensor:
    """KL between two softmaxes, by its definition."""
    p_V, q_V = left_V.softmax(0), right_V.softmax(0)
    return (p_V * (p_V / q_V).log()).sum()


def gradient(scalar: torch.Tensor, leaf_V: torch.Tensor) -> torch.Tensor:
    (found_V,) = torch.autograd.grad(scalar, leaf_V, retain_graph=True)
    return found_V


class Sampled:
    """A policy, a reference, and exact expectations over a token drawn from the policy."""

    def __init__(self, distance: float = 1.0) -> None:
        policy_V, direction_V = logits(3, 4)
        self.policy_V = policy_V.requires_grad_()
        self.reference_V = (policy_V.detach() + distance * direction_V).detach()
        self.logp_V = self.policy_V.log_softmax(0)
        self.p_V = self.logp_V.exp().detach()

    def estimate(self, estimator: KL) -> torch.Tensor:
        """The estimate for every token that might be drawn."""
        return losses.kl(self.logp_V, self.reference_V.log_softmax(0), estimator)

    def as_loss(self, estimator: KL) -> torch.Tensor:
        """Expected gradient of the estimate used as a loss: the sampling itself is not differentiated."""
        return gradient((self.p_V * self.estimate(estimator)).sum(), self.policy_V)

    def as_reward(self, estimator: KL) -> torch.Tensor:
        """Expected policy gradient of the estimate used as a cost: E[k grad log pi]."""
        return gradient((self.p_V * self.estimate(estimator).detach() * self.logp_V).sum(), self.policy_V)

    def true(self) -> torch.Tensor:
        return gradient(exact_kl(self.policy_V, self.reference_V), self.policy_V)

    def other(self) -> torch.Tensor:
        return gradient(exact_kl(self.reference_V, self.policy_V), self.policy_V)


def test_by_hand() -> None:
    """pi = 1/2, reference = 1/4: d = log 2; k3 = 1/2 - 1 + log 2."""
    new_T, reference_T = torch.tensor([0.5]).double().log(), torch.tensor([0.25]).double().log()
    expected = {KL.k1: math.log(2), KL.k2: math.log(2) ** 2 / 2, KL.k3: math.log(2) - 0.5}
    for estimator, number in expected.items():
        assert losses.kl(new_T, reference_T, estimator).item() == pytest.approx(number, rel=1e-14)
        assert losses.kl(reference_T, reference_T, estimator).item() == 0.0


def test_k1_and_k3_are_unbiased_and_k2_is_not() -> None:
    s = Sampled()
    exact = exact_kl(s.policy_V, s.reference_V).item()
    assert exact > 0.1
    mean = {estimator: (s.p_V * s.estimate(estimator)).sum().item() for estimator in KL}
    assert mean[KL.k1] == pytest.approx(exact, rel=1e-12)
    assert mean[KL.k3] == pytest.approx(exact, rel=1e-12)
    assert abs(mean[KL.k2] / exact - 1) > 0.05
    assert (s.estimate(KL.k1) < 0).any()
    assert (s.estimate(KL.k3) >= 0).all()


def test_gradients_of_the_estimators_as_losses() -> None:
    s = Sampled()
    assert s.true().abs().max() > 0.1
    torch.testing.assert_close(s.as_loss(KL.k1), torch.zeros(V, dtype=torch.float64), atol=1e-14, rtol=0)
    torch.testing.assert_close(s.as_loss(KL.k2), s.true())
    torch.testing.assert_close(s.as_loss(KL.k3), s.other())
    assert (s.other() - s.true()).abs().max() > 0.05


def test_gradients_of_the_estimators_as_rewards() -> None:
    s = Sampled()
    torch.testing.assert_close(s.as_reward(KL.k1), s.true())
    torch.testing.assert_close(s.as_reward(KL.k3), s.true() - s.other())
    assert (s.as_reward(KL.k2) - s.true()).abs().max() > 0.05


def test_near_the_reference_k3_is_right_as_a_loss_and_vanishes_as_a_reward() -> None:
    """To first order in the distance; k2 vanishes as a reward, too."""
    s = Sampled(distance=1e-3)
    size = s.true().abs().max()
    assert (s.as_loss(KL.k3) - s.true()).abs().max() < 0.01 * size
    for estimator in (KL.k2, KL.k3):
        assert s.as_reward(estimator).abs().max() < 0.01 * size


@pytest.mark.parametrize("estimator", list(KL))
def test_the_drivers_twin_gives_the_same_numbers(estimator: KL) -> None:
    rng = np.random.default_rng(0)
    old, reference = (-5 * rng.random(50)).astype(np.float32), (-5 * rng.random(50)).astype(np.float32)
    wanted = losses.kl(torch.from_numpy(old).double(), torch.from_numpy(reference).double(), estimator)
    found = losses.kl_reward(old, reference, estimator)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-6)


def test_k3_keeps_its_digits_near_zero() -> None:
    """d = 2^-12: k3 = d^2/2 - d^3/6 + ... = 2.98e-8, less than what float32 resolves next to 1."""
    d = 2.0**-12
    exact = d**2 / 2 - d**3 / 6 + d**4 / 24
    found = losses.kl(torch.tensor([-1.0 + d]), torch.tensor([-1.0]), KL.k3).item()
    assert found == pytest.approx(exact, rel=2e-3)


def test_the_drivers_twin_refuses_and_overflows_as_it_says() -> None:
    fine = np.array([-1, -1], np.float32)
    with pytest.raises(ValueError, match=r"index 1: old log-probability -1\.0, reference nan: must be finite"):
        losses.kl_reward(fine, np.array([-1, math.nan], np.float32), KL.k1)
    with pytest.raises(ValueError, match=r"old_logprobs \(2,\), reference_logprobs \(1,\)"):
        losses.kl_reward(fine, fine[:1], KL.k1)
    assert losses.kl_reward(np.array([-99], np.float32), np.array([-1], np.float32), KL.k3).tolist() == [math.inf]
    with pytest.raises(ValueError, match="all must have the same shape"):
        losses.kl(torch.zeros(2), torch.zeros(1), KL.k1)


# Distillation ---------------------------------------------------------------------------------------------------------


def test_distill_by_hand() -> None:
    """pi = (1/2, 1/2), pi_T = (1/4, 3/4)."""
    student_TV = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    teacher_TV = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    reverse = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    forward = 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
    m = (0.2 * 0.25 + 0.8 * 0.5, 0.2 * 0.75 + 0.8 * 0.5)  # mix 0.2
    mixed = 0.2 * (0.25 * math.log(0.25 / m[0]) + 0.75 * math.log(0.75 / m[1]))
    mixed += 0.8 * (0.5 * math.log(0.5 / m[0]) + 0.5 * math.log(0.5 / m[1]))
    for kind, expected in zip(Divergence, (reverse, forward, mixed), strict=True):
        assert losses.distill(student_TV, teacher_TV, kind, 0.2).item() == pytest.approx(expected, rel=1e-12)
        assert losses.distill(teacher_TV, teacher_TV, kind, 0.2).item() == pytest.approx(0.0, abs=1e-15)


def test_sampled_and_whole_reverse_kl_have_the_same_gradient() -> None:
    student_V, teacher_V = logits(5, 6)
    student_V.requires_grad_()
    logp_V, teacher_log_V = student_V.log_softmax(0), teacher_V.log_softmax(0)
    advantages_V = losses.distill_advantages(logp_V, teacher_log_V)
    assert not advantages_V.requires_grad
    sampled_V = gradient((logp_V.exp().detach() * -advantages_V * logp_V).sum(), student_V)
    whole = losses.distill(logp_V[None], teacher_log_V[None], Divergence.reverse_kl)
    assert whole.item() == pytest.approx(exact_kl(student_V, teacher_V).item(), rel=1e-12)
    torch.testing.assert_close(gradient(whole.sum(), student_V), sampled_V)
    assert sampled_V.abs().max() > 0.1


def test_jensen_shannon_lies_between_the_two() -> None:
    student_V, teacher_V = logits(5, 6)
    student_TV, teacher_TV = student_V.log_softmax(0)[None], teacher_V.log_softmax(0)[None]

    def js(mix: float) -> float:
        return losses.distill(student_TV, teacher_TV, Divergence.jensen_shannon, mix).item()

    assert js(1e-7) / 1e-7 == pytest.approx(exact_kl(teacher_V, student_V).item(), rel=1e-5)
    assert js(1 - 1e-7) / 1e-7 == pytest.approx(exact_kl(student_V, teacher_V).item(), rel=1e-5)
    swapped = losses.distill(teacher_TV, student_TV, Divergence.jensen_shannon, 0.7).item()
    assert js(0.3) == pytest.approx(swapped, rel=1e-12)
    assert js(0.3) != pytest.approx(js(0.7), rel=1e-3)


@pytest.mark.parametrize("kind", list(Divergence))
def test_tokens_without_probability_add_nothing(kind: Divergence) -> None:
    """Padded vocabulary: -inf on both sides changes neither value nor gradient."""
    student_V, teacher_V = logits(5, 6)
    pad = torch.full((1, 2), -math.inf, dtype=torch.float64)
    plain_TV = student_V.log_softmax(0)[None].requires_grad_()
    padded_TV = torch.cat([plain_TV.detach(), pad], 1).requires_grad_()
    teacher_TV = teacher_V.log_softmax(0)[None]
    plain = losses.distill(plain_TV, teacher_TV, kind)
    padded = losses.distill(padded_TV, torch.cat([teacher_TV, pad], 1), kind)
    torch.testing.assert_close(padded, plain)
    found_TV = gradient(padded.sum(), padded_TV)
    torch.testing.assert_close(found_TV[:, :V], gradient(plain.sum(), plain_TV))
    assert (found_TV[:, V:] == 0).all()


def test_disjoint_distributions() -> None:
    student_TV, teacher_TV = torch.tensor([[0.0, -math.inf]]), torch.tensor([[-math.inf, 0.0]])
    assert losses.distill(student_TV, teacher_TV, Divergence.reverse_kl).item() == math.inf
    assert losses.distill(student_TV, teacher_TV, Divergence.forward_kl).item() == math.inf
    js = losses.distill(student_TV, teacher_TV, Divergence.jensen_shannon)
    assert js.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("kind", list(Divergence))
def test_top_k_with_a_tail_is_a_lower_bound_that_grows_to_the_whole(kind: Divergence) -> None:
    student_V, teacher_V = logits(5, 6, scale=2.0)
    student_TV, teacher_TV = student_V.log_softmax(0)[None], teacher_V.log_softmax(0)[None]
    best = teacher_TV[0].argsort(descending=True)
    found = [
        losses.distill(
            losses.with_tail(student_TV[:, best[:k]]), losses.with_tail(teacher_TV[:, best[:k]]), kind
        ).item()
        for k in range(1, V + 1)
    ]
    whole = losses.distill(student_TV, teacher_TV, kind).item()
    assert all(small <= large + 1e-4 for small, large in zip(found, [*found[1:], whole], strict=True))
    assert found[0] < 0.9 * whole
    assert found[-1] == pytest.approx(whole, abs=1e-4)  # K = V: the floor of an empty tail is all that differs


def test_the_tail_sees_a_student_that_leaves_the_teachers_top_k() -> None:
    """Inside the top 2 both agree but for scale; rescaling to 1 would give 0."""
    student_TK = torch.tensor([[0.05, 0.05]]).log().requires_grad_()
    teacher_TK = torch.tensor([[0.45, 0.45]]).log()
    found = losses.distill(losses.with_tail(student_TK), losses.with_tail(teacher_TK), Divergence.reverse_kl)
    assert found.item() == pytest.approx(0.1 * math.log(1 / 9) + 0.9 * math.log(9), rel=1e-5)
    assert (gradient(found.sum(), student_TK) < 0).all()  # more of the teacher's tokens is better
    empty = losses.with_tail(torch.tensor([[0.5, 0.5]]).log())
    assert empty[0, 2].item() == pytest.approx(math.log(TAIL_FLOOR))


def test_distillation_refuses_what_is_no_distribution() -> None:
    whole_TV, part_TV = torch.tensor([[0.5, 0.5]] * 2).log(), torch.tensor([[0.5, 0.5], [0.5, 0.3]]).log()
    with pytest.raises(ValueError, match=r"^logprobs: the probabilities of row 1 sum to 0.8: must be 1: give"):
        losses.distill(part_TV, whole_TV, Divergence.reverse_kl)
    with pytest.raises(ValueError, match=r"^teacher_logprobs: the probabilities of row 1 sum to 0.8"):
        losses.distill(whole_TV, part_TV, Divergence.reverse_kl)
    with pytest.raises(ValueError, match="row 0 sum to nan"):
        losses.distill(whole_TV * math.nan, whole_TV, Divergence.reverse_kl)
    with pytest.raises(ValueError, match=r"top-k log-probabilities: .* row 0 sum to 1.2: must be at most 1"):
        losses.with_tail(torch.tensor([[0.6, 0.6]]).log())
    for mix in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match=f"mix={mix}"):
            losses.distill(whole_TV, whole_TV, Divergence.jensen_shannon, mix)
    with pytest.raises(ValueError, match="same shape"):
        losses.distill(whole_TV, whole_TV[:1], Divergence.reverse_kl)


def test_distillation_has_the_normaliser_of_all_losses() -> None:
    """Two sub-traces of 3 and 1 tokens: sum of w l / N, however they are spread over micro-batches."""
    generator = torch.Generator().manual_seed(2)
    student_TV, teacher_TV = (
        torch.randn(4, V, dtype=torch.float64, generator=generator).log_softmax(1) for _ in range(2)
    )
    each = [
        losses.distill(student_TV[t : t + 1], teacher_TV[t : t + 1], Divergence.reverse_kl).item() for t in range(4)
    ]
    together = losses.distill(student_TV, teacher_TV, Divergence.reverse_kl)
    for norm, wanted in (
        (LossNorm.token, sum(each) / 4),
        (LossNorm.episode, (sum(each[:3]) / 3 + each[3]) / 2),
    ):
        first, second = losses.normalizer_weights(["a", "b"], [3, 1], norm)
        weights_T = torch.tensor([first] * 3 + [second], dtype=torch.float64)
        assert (weights_T * together).sum().item() / 4 == pytest.approx(wanted, rel=1e-12)
