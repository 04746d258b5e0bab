"""What a loss is averaged over: means by their definition, and L does not know of cuts, order or micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from trainer import losses
from trainer.config import KL, Loss, LossNorm

CUT_BLIND = [LossNorm.token, LossNorm.episode]


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def test_each_norm_is_the_mean_that_it_says() -> None:
    """Episode a: sub-traces of 3 and 1 actions; episode b: one of 2."""
    per_sub_trace = [[1.0, 2.0, 6.0], [10.0], [-4.0, 5.0]]
    episode_of, num_actions = ["a", "a", "b"], [3, 1, 2]
    expected = {
        LossNorm.token: mean([1.0, 2.0, 6.0, 10.0, -4.0, 5.0]),
        LossNorm.episode: mean([mean([1.0, 2.0, 6.0, 10.0]), mean([-4.0, 5.0])]),
        LossNorm.sub_trace: mean([mean([1.0, 2.0, 6.0]), 10.0, mean([-4.0, 5.0])]),
    }
    assert len(set(expected.values())) == 3
    for norm, number in expected.items():
        weights = losses.normalizer_weights(episode_of, num_actions, norm)
        found = sum(w * sum(each) for w, each in zip(weights, per_sub_trace, strict=True)) / 6
        assert found == pytest.approx(number, rel=1e-14)
        assert sum(w * n for w, n in zip(weights, num_actions, strict=True)) == pytest.approx(6, rel=1e-14)


@pytest.mark.parametrize("norm", CUT_BLIND)
def test_a_cut_changes_no_tokens_weight(norm: LossNorm) -> None:
    whole = losses.normalizer_weights(["a", "b"], [12, 5], norm)
    parts = losses.normalizer_weights(["a", "b", "a", "a"], [7, 5, 1, 4], norm)
    assert parts == [whole[0], whole[1], whole[0], whole[0]]


def test_sub_trace_norm_does_notice_the_cut() -> None:
    """An episode cut in three weighs three times as much as its uncut neighbour."""
    weights = losses.normalizer_weights(["a", "b", "a", "a"], [7, 5, 1, 4], LossNorm.sub_trace)
    assert [w * n for w, n in zip(weights, [7, 5, 1, 4], strict=True)] == pytest.approx([17 / 4] * 4)
    assert losses.normalizer_weights(["a", "b"], [12, 5], LossNorm.sub_trace) == pytest.approx([17 / 24, 17 / 10])


def test_masked_tokens_stay_in_the_denominator() -> None:
    """DIS masks the second of two tokens: L is half of the first one's loss, not all of it."""
    new_T = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    found = losses.dis(new_T, torch.tensor([-1.0, -9.0]), torch.tensor([3.0, 3.0]), 0.2, 0.28)
    (weight,) = losses.normalizer_weights(["a"], [2], LossNorm.episode)
    assert (weight * found.loss_T).sum().item() / 2 == pytest.approx(1.5)


def test_positive_examples() -> None:
    """Mean over the 3 + 1 action tokens of the positive episode, in a step of 6, times the coefficient."""
    nll = [[1.0, 2.0, 6.0], [10.0], [4.0, 5.0]]
    weights = losses.positive_weights([3, 1, 2], [True, True, False], 0.1)
    found = sum(w * sum(each) for w, each in zip(weights, nll, strict=True)) / 6
    assert found == pytest.approx(0.1 * mean([1.0, 2.0, 6.0, 10.0]), rel=1e-14)
    assert losses.positive_weights([3, 1, 2], [True, True, False]) == pytest.approx([1.5, 1.5, 0.0])
    assert losses.positive_weights([3, 1], [False, False]) == [0.0, 0.0]
    assert losses.positive_weights([0, 1], [True, False]) == [0.0, 0.0]
    # a cut of the positive episode changes no token's weight
    once, zero = losses.positive_weights([6, 2], [True, False])
    assert losses.positive_weights([4, 2, 2], [True, False, True]) == [once, zero, once]


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(ValueError, match="2 counts of action tokens, 1 episode names"):
        losses.normalizer_weights(["a"], [1, 2], LossNorm.token)
    with pytest.raises(ValueError, match="1 counts of action tokens, 2 flags"):
        losses.positive_weights([1], [True, False])
    with pytest.raises(ValueError, match=r"num_actions=\[3, -1\]: none may be negative"):
        losses.normalizer_weights(["a", "b"], [3, -1], LossNorm.token)
    with pytest.raises(ValueError, match=r"episode b: sub-trace 1 .* 0 action tokens \(loss_norm=episode\)"):
        losses.normalizer_weights(["a", "b"], [3, 0], LossNorm.episode)
    with pytest.raises(ValueError, match=r"episode a: sub-trace 1 .* \(loss_norm=sub_trace\)"):
        losses.normalizer_weights(["a", "a"], [3, 0], LossNorm.sub_trace)
    assert losses.normalizer_weights(["a", "a"], [3, 0], LossNorm.episode) == [1.0, 1.0]
    assert losses.normalizer_weights([], [], LossNorm.episode) == []


# The whole loss of an optimizer step ----------------------------------------------------------------------------------


@dataclass
class Step:
    """Tokens of an optimizer step in float64, K sub-traces; `new_T` is the leaf."""

    new_T: torch.Tensor
    old_T: torch.Tensor
    engine_T: torch.Tensor
    advantages_T: torch.Tensor
    mask_T: torch.Tensor
    sub_trace_T: torch.Tensor
    episode_of: list[str]

    def weights(self, norm: LossNorm) -> torch.Tensor:
        counts = torch.bincount(self.sub_trace_T[self.mask_T], minlength=len(self.episode_of)).tolist()
        per_sub_trace = losses.normalizer_weights(self.episode_of, counts, norm)
        return torch.tensor(per_sub_trace, dtype=torch.float64)[self.sub_trace_T]

    def gradient(self, loss: Loss, norm: LossNorm, micro_batches: list[torch.Tensor]) -> tuple[float, torch.Tensor]:
        """L and dL / dlog pi, summed over micro-batches: lists of tokens, in any order."""
        weights_T, total = self.weights(norm), int(self.mask_T.sum())
        parts = [(weights_T[t] * self._tokens(loss, t))[self.mask_T[t]].sum() / total for t in micro_batches]
        (gradient_T,) = torch.autograd.grad(sum(parts, torch.zeros((), dtype=torch.float64)), self.new_T)
        return sum(part.item() for part in parts), gradient_T

    def _tokens(self, loss: Loss, t: torch.Tensor) -> torch.Tensor:
        new, old, engine, adv, clip = self.new_T[t], self.old_T[t], self.engine_T[t], self.advantages_T[t], (0.2, 0.28)
        extra = 0.1 * losses.kl(new, old, KL.k3)
        if loss is Loss("gspo"):
            sequences = self.sub_trace_T[t], self.mask_T[t], len(self.episode_of)
            return losses.gspo(new, old, adv, *sequences, *clip).loss_T + extra
        if loss is Loss("decoupled"):
            return losses.decoupled(new, old, engine, adv, *clip).loss_T + extra
        if loss is Loss("ppo"):
            return losses.ppo(new, old, adv, *clip).loss_T + extra
        return (losses.dis if loss is Loss("dis") else losses.cispo)(new, engine, adv, *clip).loss_T + extra


def step_of(lengths: list[int], episode_of: list[str], seed: int = 0) -> Step:
    """The same tokens for the same sum of lengths, however they are divided into sub-traces."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)

    def draw(scale: float) -> torch.Tensor:
        return scale * torch.randn(total, dtype=torch.float64, generator=generator)

    old_T = -draw(1.0).abs()
    return Step(
        new_T=(old_T + draw(0.3)).requires_grad_(),
        old_T=old_T,
        engine_T=old_T + draw(0.1),
        advantages_T=draw(1.0),
        mask_T=torch.rand(total, generator=generator) < 0.6,
        sub_trace_T=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        episode_of=episode_of,
    )


@pytest.mark.parametrize("norm", list(LossNorm))
@pytest.mark.parametrize("loss", list(Loss))
def test_micro_batches_and_order_do_not_matter(loss: Loss, norm: LossNorm) -> None:
    step = step_of([40, 25, 60, 9, 70, 33], ["a", "a", "b", "c", "c", "d"])
    everything = torch.arange(len(step.new_T))
    one, gradient_T = step.gradient(loss, norm, [everything])
    rng = np.random.default_rng(1)
    order = rng.permutation(6)
    own = [torch.from_numpy(rng.permutation(everything[step.sub_trace_T == int(k)].numpy())) for k in order]
    for micro_batches in (own, [torch.cat(own[:2]), torch.cat(own[2:5]), own[5]], [torch.cat(own)]):
        found, found_T = step.gradient(loss, norm, micro_batches)
        assert found == pytest.approx(one, rel=1e-10, abs=1e-10)
        torch.testing.assert_close(found_T, gradient_T, rtol=1e-10, atol=1e-10)
    assert gradient_T.abs().max() > 1e-3


@pytest.mark.parametrize("norm", list(LossNorm))
@pytest.mark.parametrize("loss", list(Loss))
def test_where_an_episode_was_cut_matters_to_gspo_and_to_the_mean_over_sub_traces_alone(
    loss: Loss, norm: LossNorm
) -> None:
    whole = step_of([65, 60, 112], ["a", "b", "c"])
    parts = step_of([40, 25, 60, 9, 70, 33], ["a", "a", "b", "c", "c", "c"])
    assert torch.equal(whole.new_T, parts.new_T)
    everything = [torch.arange(len(whole.new_T))]
    (uncut, uncut_T), (was_cut, was_cut_T) = (step.gradient(loss, norm, everything) for step in (whole, parts))
    if norm in CUT_BLIND and loss is not Loss("gspo"):
        assert was_cut == pytest.approx(uncut, rel=1e-10, abs=1e-10)
        torch.testing.assert_close(was_cut_T, uncut_T, rtol=1e-10, atol=1e-10)
    else:
        assert (was_cut_T - uncut_T).abs().max() > 1e-4
