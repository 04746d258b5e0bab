"""Policy and value losses: numbers worked out by hand on both sides of every bound, identities, the ends of a float."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from trainer import losses
from trainer.losses import TokenLoss

LOW, HIGH = 0.2, 0.28  # usual window: (0.8, 1.28)
EXACT = 0.5, 1.0  # window (0.5, 2): both bounds are ratios that log and exp give back exactly
PolicyLoss = Callable[..., TokenLoss]


def logs(*ratios: float) -> torch.Tensor:
    return torch.tensor(ratios, dtype=torch.float64).log().requires_grad_()


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def slope(loss_T: torch.Tensor, leaf_T: torch.Tensor) -> torch.Tensor:
    """d sum(loss) / d leaf."""
    (gradient_T,) = torch.autograd.grad(loss_T.sum(), leaf_T, retain_graph=True)
    return gradient_T


def gspo_of_tokens(new_T: torch.Tensor, old_T: torch.Tensor, adv_T: torch.Tensor, low: float, high: float) -> TokenLoss:
    """GSPO where every token is a sequence."""
    each_T = torch.arange(len(new_T))
    return losses.gspo(new_T, old_T, adv_T, each_T, torch.ones(len(new_T), dtype=torch.bool), len(new_T), low, high)


def decoupled_fresh(
    new_T: torch.Tensor, old_T: torch.Tensor, adv_T: torch.Tensor, low: float, high: float
) -> TokenLoss:
    """Decoupled PPO where the engine's probabilities are the trainer's."""
    return losses.decoupled(new_T, old_T, old_T, adv_T, low, high)


POLICY_LOSSES: list[PolicyLoss] = [losses.ppo, losses.dis, losses.cispo, gspo_of_tokens, decoupled_fresh]
SURROGATES: list[PolicyLoss] = [losses.ppo, gspo_of_tokens, decoupled_fresh]


@pytest.mark.parametrize("loss", SURROGATES)
@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "gradient", "clipped"),
    [
        # window (0.5, 2): l = -min(r A, clip(r) A); slope = dl / dlog pi
        (1.0, 2.0, -2.0, -2.0, False),
        (1.999, 1.0, -1.999, -1.999, False),
        (2.0, 1.0, -2.0, -2.0, False),  # on the bound: whole gradient
        (2.001, 1.0, -2.0, 0.0, True),  # too good already: no gradient
        (0.1, 2.0, -0.2, -0.2, False),  # a good action became rarer: whole gradient, far below the window
        (0.501, -1.0, 0.501, 0.501, False),
        (0.5, -1.0, 0.5, 0.5, False),
        (0.499, -1.0, 0.5, 0.0, True),
        (9.0, -2.0, 18.0, 18.0, False),  # a bad action became likelier: whole gradient, far above the window
        (9.0, 0.0, 0.0, 0.0, False),
    ],
)
def test_clipped_surrogate_at_its_bounds(
    loss: PolicyLoss, ratio: float, advantage: float, expected: float, gradient: float, clipped: bool
) -> None:
    new_T = logs(ratio)
    found = loss(new_T, numbers(0.0), numbers(advantage), *EXACT)
    assert found.loss_T.item() == pytest.approx(expected, abs=1e-12)
    assert slope(found.loss_T, new_T).item() == pytest.approx(gradient, abs=1e-12)
    assert found.clipped_T.item() is clipped
    assert found.ratio_T.item() == pytest.approx(ratio)
    assert not found.ratio_T.requires_grad


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "gradient", "clipped"),
    [
        # the usual window (0.8, 1.28)
        (1.27, 2.0, -2.54, -2.54, False),
        (1.29, 2.0, -2.56, 0.0, True),
        (0.81, -1.0, 0.81, 0.81, False),
        (0.79, -1.0, 0.8, 0.0, True),
    ],
)
def test_ppo_in_its_usual_window(
    ratio: float, advantage: float, expected: float, gradient: float, clipped: bool
) -> None:
    new_T = logs(ratio)
    found = losses.ppo(new_T, numbers(0.0), numbers(advantage), LOW, HIGH)
    assert found.loss_T.item() == pytest.approx(expected)
    assert slope(found.loss_T, new_T).item() == pytest.approx(gradient)
    assert found.clipped_T.item() is clipped


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "gradient", "clipped"),
    [
        # c = 4, window (0.5, 2): A < 0 has l = min(max(-r A, -clip(r) A), -4 A)
        (3.999, -2.0, 7.998, 7.998, False),
        (4.0, -2.0, 8.0, 8.0, False),
        (4.001, -2.0, 8.0, 0.0, True),
        (0.4, -2.0, 1.0, 0.0, True),  # the ordinary clip is there as before
        (4.001, 2.0, -4.0, 0.0, True),  # A > 0: the ordinary clip, no other
    ],
)
def test_dual_clip_at_its_bound(
    ratio: float, advantage: float, expected: float, gradient: float, clipped: bool
) -> None:
    new_T = logs(ratio)
    found = losses.ppo(new_T, numbers(0.0), numbers(advantage), *EXACT, dual_clip=4.0)
    assert found.loss_T.item() == pytest.approx(expected)
    assert slope(found.loss_T, new_T).item() == pytest.approx(gradient)
    assert found.clipped_T.item() is clipped


@pytest.mark.parametrize(
    ("ratio", "advantage", "weight"),
    [
        # window (0.5, 2), both ends outside: weight = f(x)
        (1.0, 2.0, 1.0),
        (1.999, 1.0, 1.999),
        (2.0, 1.0, 0.0),
        (2.001, 1.0, 0.0),
        (0.501, -1.0, 0.501),
        (0.5, -1.0, 0.0),
        (0.499, -1.0, 0.0),
        (0.499, 1.0, 0.0),  # both sides, whatever the sign
        (2.001, -1.0, 0.0),
    ],
)
def test_dis_masks_both_sides(ratio: float, advantage: float, weight: float) -> None:
    new_T = logs(ratio)
    found = losses.dis(new_T, numbers(0.0), numbers(advantage), *EXACT)
    assert found.loss_T.item() == pytest.approx(-weight * advantage * new_T.item())
    assert slope(found.loss_T, new_T).item() == pytest.approx(-weight * advantage)
    assert found.clipped_T.item() is (weight == 0.0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "weight", "clipped"),
    [
        # window (0.5, 2): weight = clip(x), and every token has a gradient
        (1.999, 1.0, 1.999, False),
        (2.0, 1.0, 2.0, False),
        (2.001, 1.0, 2.0, True),
        (2.001, -3.0, 2.0, True),
        (0.501, -1.0, 0.501, False),
        (0.5, -1.0, 0.5, False),
        (0.499, -1.0, 0.5, True),
        (0.001, 1.0, 0.5, True),
    ],
)
def test_cispo_clips_the_weight_and_keeps_the_gradient(
    ratio: float, advantage: float, weight: float, clipped: bool
) -> None:
    new_T = logs(ratio)
    found = losses.cispo(new_T, numbers(0.0), numbers(advantage), *EXACT)
    assert found.loss_T.item() == pytest.approx(-weight * advantage * new_T.item())
    assert slope(found.loss_T, new_T).item() == pytest.approx(-weight * advantage)
    assert found.clipped_T.item() is clipped


def test_cispo_without_a_lower_bound() -> None:
    new_T = logs(1e-6, 5.0)
    found = losses.cispo(new_T, torch.zeros_like(new_T), torch.ones_like(new_T), 1.0, 2.0)
    torch.testing.assert_close(slope(found.loss_T, new_T), numbers(-1e-6, -3.0))


def test_gspo_has_one_ratio_a_sequence_and_one_advantage_a_token() -> None:
    """Sequence 0: ratios 4, 1 and a masked token: s = 2. Sequence 1: ratios 1/8 and 8, s = 1. Sequence 2: no action."""
    new_T = logs(4.0, 50.0, 1.0, 0.125, 8.0, 50.0)
    old_T = torch.zeros_like(new_T)
    sequence_T = torch.tensor([0, 0, 0, 1, 1, 2])
    mask_T = torch.tensor([True, False, True, True, True, False])
    advantages_T = numbers(1.0, 0.0, -3.0, 1.0, -2.0, 0.0)
    found = losses.gspo(new_T, old_T, advantages_T, sequence_T, mask_T, 3, *EXACT)
    torch.testing.assert_close(found.ratio_T, numbers(2.0, 2.0, 2.0, 1.0, 1.0, 1.0))
    torch.testing.assert_close(found.loss_T[mask_T], numbers(-2.0, 6.0, -1.0, 2.0))
    torch.testing.assert_close(slope(found.loss_T, new_T), numbers(-2.0, 0.0, 6.0, -1.0, 2.0, 0.0))
    # a lower upper bound clips sequence 0 where its advantage is positive, all at once
    tight = losses.gspo(new_T, old_T, advantages_T, sequence_T, mask_T, 3, 0.5, 0.9)
    torch.testing.assert_close(tight.loss_T[mask_T], numbers(-1.9, 6.0, -1.0, 2.0))
    torch.testing.assert_close(slope(tight.loss_T, new_T), numbers(0.0, 0.0, 6.0, -1.0, 2.0, 0.0))
    assert tight.clipped_T.tolist() == [True] + [False] * 5


def test_gspo_token_has_the_gradient_of_gspo_where_a_sequence_has_one_advantage() -> None:
    generator = torch.Generator().manual_seed(0)
    new_T = torch.randn(9, dtype=torch.float64, generator=generator).requires_grad_()
    old_T = torch.randn(9, dtype=torch.float64, generator=generator)
    one_T, seven = torch.ones(9, dtype=torch.bool), numbers(0.7).expand(9)
    token = losses.gspo(new_T, old_T, seven, torch.zeros(9, dtype=torch.int64), one_T, 1, 0.999, 100.0)
    whole = -((new_T - old_T).mean().exp() * 0.7)  # the sequence form, unclipped
    torch.testing.assert_close(slope(token.loss_T.mean(), new_T), slope(whole, new_T))
    torch.testing.assert_close(token.loss_T.mean(), whole)


def test_gspo_alone_notices_where_an_episode_was_cut() -> None:
    new_T, old_T, advantages_T = logs(3.0, 3.0, 0.5, 0.5), numbers(0, 0, 0, 0), numbers(1, 1, 1, 1)
    mask_T = torch.ones(4, dtype=torch.bool)
    whole = losses.gspo(new_T, old_T, advantages_T, torch.tensor([0, 0, 0, 0]), mask_T, 1, *EXACT)
    parts = losses.gspo(new_T, old_T, advantages_T, torch.tensor([0, 0, 1, 1]), mask_T, 2, *EXACT)
    torch.testing.assert_close(slope(whole.loss_T, new_T), -numbers(1.5, 1.5, 1.5, 1.5).sqrt())
    torch.testing.assert_close(slope(parts.loss_T, new_T), numbers(0.0, 0.0, -0.5, -0.5))


@pytest.mark.parametrize("loss", POLICY_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_policy_every_loss_has_the_policy_gradient(loss: PolicyLoss, dtype: torch.dtype) -> None:
    advantages_T = torch.tensor([0.5, -2.0, 3.0, 0.0], dtype=dtype)
    new_T = torch.tensor([-0.1, -2.0, -5.0, -9.0], dtype=dtype, requires_grad=True)
    found = loss(new_T, new_T.detach(), advantages_T, LOW, HIGH)
    torch.testing.assert_close(slope(found.loss_T, new_T), -advantages_T)
    assert found.loss_T.dtype is dtype
    assert found.ratio_T.dtype is dtype
    assert not found.clipped_T.any()


def test_identities_between_the_losses() -> None:
    generator = torch.Generator().manual_seed(1)

    def draw() -> torch.Tensor:
        return torch.randn(2000, dtype=torch.float64, generator=generator)

    new_T, old_T, advantages_T, engine_T = draw().requires_grad_(), draw(), draw(), draw()
    ppo = losses.ppo(new_T, old_T, advantages_T, LOW, HIGH)
    assert 0.2 < ppo.clipped_T.double().mean() < 0.8
    for same in (
        losses.ppo(new_T, old_T, advantages_T, LOW, HIGH, dual_clip=0.0),
        losses.ppo(new_T, old_T, advantages_T, LOW, HIGH, dual_clip=1e9),
        decoupled_fresh(new_T, old_T, advantages_T, LOW, HIGH),
        gspo_of_tokens(new_T, old_T, advantages_T, LOW, HIGH),
    ):
        torch.testing.assert_close(same.loss_T, ppo.loss_T)
        torch.testing.assert_close(slope(same.loss_T, new_T), slope(ppo.loss_T, new_T))
        assert torch.equal(same.clipped_T, ppo.clipped_T)
    stale = losses.decoupled(new_T, old_T, engine_T, advantages_T, LOW, HIGH)
    weight_T = (old_T - engine_T).exp()
    torch.testing.assert_close(stale.loss_T, weight_T * ppo.loss_T)
    torch.testing.assert_close(slope(stale.loss_T, new_T), weight_T * slope(ppo.loss_T, new_T))
    # inside the window DIS and CISPO are one
    dis, cispo = (loss(new_T, engine_T, advantages_T, LOW, HIGH) for loss in (losses.dis, losses.cispo))
    assert torch.equal(dis.clipped_T, cispo.clipped_T)
    torch.testing.assert_close(dis.loss_T[~dis.clipped_T], cispo.loss_T[~dis.clipped_T])


# The ends of a float --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("advantage", "dual_clip", "expected", "clipped"),
    [
        (2.0, 0.0, -2.56, True),  # A > 0: clipped as any large ratio
        (0.0, 0.0, 0.0, False),
        (-2.0, 0.0, math.inf, False),
        (-2.0, 3.0, 6.0, True),
    ],
)
def test_ppo_beyond_the_range_of_a_float(advantage: float, dual_clip: float, expected: float, clipped: bool) -> None:
    new_T = torch.tensor([-0.5], requires_grad=True)
    found = losses.ppo(new_T, torch.tensor([-89.5]), torch.tensor([advantage]), LOW, HIGH, dual_clip)
    assert found.ratio_T.item() == math.inf
    assert found.loss_T.item() == pytest.approx(expected)
    assert found.clipped_T.item() is clipped
    if expected < math.inf:
        assert slope(found.loss_T, new_T).item() == 0.0  # not 0 * inf
    else:
        with pytest.raises(ValueError, match=r"token 0: the loss is inf \(1 of 1 action tokens\)"):
            losses.require_finite(found.loss_T, torch.tensor([True]), "token {}".format)


def test_dis_and_cispo_beyond_the_range_of_a_float() -> None:
    new_T, engine_T, advantages_T = (
        torch.tensor([-0.5], requires_grad=True),
        torch.tensor([-89.5]),
        torch.tensor([-2.0]),
    )
    dis = losses.dis(new_T, engine_T, advantages_T, LOW, HIGH)
    assert (dis.loss_T.item(), slope(dis.loss_T, new_T).item(), dis.clipped_T.item()) == (0.0, 0.0, True)
    cispo = losses.cispo(new_T, engine_T, advantages_T, LOW, HIGH)
    assert slope(cispo.loss_T, new_T).item() == pytest.approx(2.56)


@pytest.mark.parametrize("loss", POLICY_LOSSES)
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("place", ["new", "old"])
def test_no_loss_hides_a_nan(loss: PolicyLoss, advantage: float, place: str) -> None:
    nan_T, fine_T = numbers(-1.0, math.nan), numbers(-1.0, -1.0)
    new_T, old_T = (nan_T, fine_T) if place == "new" else (fine_T, nan_T)
    found = loss(new_T.requires_grad_(), old_T, numbers(1.0, advantage), LOW, HIGH)
    with pytest.raises(ValueError, match=r"^index 1: the loss is nan"):
        losses.require_finite(found.loss_T, torch.tensor([True, True]), "index {}".format)
    losses.require_finite(found.loss_T, torch.tensor([True, False]), "index {}".format)  # not an action token


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: losses.ppo(t, t, t[:1], 0.2, 0.2), r"advantages \(1,\): all must have the same shape"),
        (lambda t: losses.decoupled(t, t, t[:1], t, 0.2, 0.2), r"engine_logprobs \(1,\)"),
        (lambda t: losses.dis(t, t[:1], t, 0.2, 0.2), r"engine_logprobs \(1,\)"),
        (lambda t: losses.cispo(t, t, t[None], 0.2, 0.2), r"advantages \(1, 2\)"),
        (lambda t: losses.value(t, t, t[:1], 0.2), r"returns \(1,\)"),
        (lambda t: losses.ppo(t, t, t, -0.2, 0.2), "clip_low=-0.2, clip_high=0.2: both must be at least 0"),
        (lambda t: losses.cispo(t, t, t, 0.2, math.nan), "clip_high=nan"),
        (lambda t: losses.ppo(t, t, t, 0.2, 0.2, 1.0), r"dual_clip=1.0: must be 0 \(none\) or above 1"),
        (lambda t: losses.value(t, t, t, -1.0), "value clip=-1.0: must be at least 0"),
        (
            lambda t: losses.gspo(t, t, t, torch.tensor([0, 2]), t > -9, 2, 0.2, 0.2),
            "sequence numbers from 0 to 2 with num_sequences=2",
        ),
    ],
)
def test_bad_input_is_refused_with_its_number(call: Callable[[torch.Tensor], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(numbers(-1.0, -2.0))


# Value ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("v", "expected", "gradient", "clipped"),
    [
        # old value 1, return 3, clip 0.5: l = 1/2 max((v - 3)^2, (clip(v) - 3)^2)
        (1.0, 2.0, -2.0, False),
        (1.25, 1.53125, -1.75, False),
        (1.5, 1.125, -1.5, False),  # on the bound: whole gradient
        (1.75, 1.125, 0.0, True),  # moved enough towards the return
        (4.0, 1.125, 0.0, True),  # past it, but no further off than the bound
        (4.5, 1.125, 1.5, False),  # past it and as far off: the unclipped one
        (5.0, 2.0, 2.0, False),
        (0.0, 4.5, -3.0, False),  # moved away: whole gradient
    ],
)
def test_value_loss_around_its_clip(v: float, expected: float, gradient: float, clipped: bool) -> None:
    values_T = numbers(v).requires_grad_()
    found = losses.value(values_T, numbers(1.0), numbers(3.0), 0.5)
    assert found.loss_T.item() == pytest.approx(expected)
    assert slope(found.loss_T, values_T).item() == pytest.approx(gradient)
    assert found.clipped_T.item() is clipped


def test_a_value_that_moved_less_than_the_clip_keeps_its_gradient_whatever_the_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    values_T, old_T, returns_T = torch.rand(3, 100_000, generator=generator).unbind()
    found = losses.value(values_T, old_T, returns_T, 0.2)
    inside_T = (values_T - old_T).abs() <= 0.2
    assert inside_T.any()
    assert not found.clipped_T[inside_T].any()
    assert found.clipped_T[~inside_T].any()


def test_value_loss_without_clip_is_half_the_squared_error() -> None:
    values_T = numbers(0.9, -2.0).requires_grad_()
    found = losses.value(values_T, numbers(0.1, 0.1), numbers(1.0, 1.0), 0.0)
    torch.testing.assert_close(found.loss_T, numbers(0.005, 4.5))
    torch.testing.assert_close(slope(found.loss_T, values_T), numbers(-0.1, -3.0))
    assert not found.clipped_T.any()


def test_nll() -> None:
    new_T = logs(0.5, 0.25)
    torch.testing.assert_close(losses.nll(new_T), numbers(math.log(2), math.log(4)))
    torch.testing.assert_close(slope(losses.nll(new_T), new_T), numbers(-1.0, -1.0))
