"""Log-probabilities and entropies of a projection that is never held whole, against their definitions in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from trainer.megatron.modules import scores as module
from trainer.megatron.modules.scores import scores

ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)  # a tensor-parallel group of one
V, PADDED, H, P = 97, 100, 16, 200


def draw(scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, projection with padded rows that hold large numbers, labels."""
    generator = torch.Generator().manual_seed(0)
    hidden_PH = scale * torch.randn(P, H, generator=generator)
    weight_VH = torch.randn(PADDED, H, generator=generator)
    weight_VH[V:] = 50.0
    return hidden_PH, weight_VH, torch.randint(0, V, (P,), generator=generator)


def exact(hidden_PH: torch.Tensor, weight_VH: torch.Tensor, labels_P: torch.Tensor) -> torch.Tensor:
    """[2, P] by definition, float64."""
    log_p_PV = (hidden_PH @ weight_VH[:V].T).log_softmax(1)
    return torch.stack([log_p_PV.gather(1, labels_P[:, None])[:, 0], -(log_p_PV.exp() * log_p_PV).sum(1)])


@pytest.fixture(params=["one slice", "slices, kept", "slices, computed again"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    """Tokens of each product with the vocabulary: those to come, and those that are wanted of a gradient."""
    if request.param != "one slice":
        monkeypatch.setattr(module, "CPU_TOKENS", 128)
    if "again" in request.param:
        monkeypatch.setattr(module, "SLICE_BYTES", 4 * P * PADDED - 1)  # the limit of 128 tokens is the smaller one
    done: list[int] = []

    def linear(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        done.append(len(hidden))
        return hidden @ weight.T

    monkeypatch.setattr(module, "F", SimpleNamespace(linear=linear))
    return done, {"one slice": [P], "slices, kept": [128, P - 128]}.get(request.param, [128, P - 128] * 2)


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 10.0])
def test_scores_and_gradients(scale: float, products: tuple[list[int], list[int]]) -> None:
    hidden_PH, weight_VH, labels_P = draw(scale)
    pair = hidden_PH.requires_grad_(), weight_VH.requires_grad_()
    double = hidden_PH.detach().double().requires_grad_(), weight_VH.detach().double().requires_grad_()
    found_2P, wanted_2P = scores(*pair, labels_P, V, ALONE), exact(*double, labels_P)
    torch.testing.assert_close(found_2P.double(), wanted_2P, rtol=1e-5, atol=1e-4)
    each_2P = torch.linspace(-1, 2, 2 * P).reshape(2, P)  # every prediction weighs differently
    found = torch.autograd.grad((each_2P * found_2P).sum(), pair)
    wanted = torch.autograd.grad((each_2P.double() * wanted_2P).sum(), double)
    for mine, theirs in zip(found, wanted, strict=True):
        assert float((mine.double() - theirs).norm()) <= 1e-5 * max(1.0, float(theirs.norm()))
    assert not found[1][V:].any(), "padding of the vocabulary is no token"
    assert products[0] == products[1]


def test_a_certain_token_has_no_entropy_and_a_finite_gradient() -> None:
    hidden_PH, weight_VH, labels_P = draw(1000.0)
    leaf_PH = hidden_PH.requires_grad_()
    found_2P = scores(leaf_PH, weight_VH, labels_P, V, ALONE)
    assert float(found_2P[1].min()) >= -1e-4
    assert float(found_2P[1].median()) < 1e-3
    found_2P.sum().backward()
    assert leaf_PH.grad is not None
    assert leaf_PH.grad.isfinite().all()


def test_bf16_weights_give_bf16_gradients_near_the_exact_ones() -> None:
    hidden_PH, weight_VH, labels_P = (t.bfloat16() if t.is_floating_point() else t for t in draw(0.3))
    leaf_PH = hidden_PH.requires_grad_()
    double_PH = hidden_PH.detach().double().requires_grad_()
    found_2P = scores(leaf_PH, weight_VH, labels_P, V, ALONE)
    wanted_2P = exact(double_PH, weight_VH.double(), labels_P)
    assert found_2P.dtype is torch.float32
    assert float((found_2P - wanted_2P).abs().max()) < 0.05
    (mine,), (theirs,) = (
        torch.autograd.grad(found_2P[0].sum(), leaf_PH),
        torch.autograd.grad(wanted_2P[0].sum(), double_PH),
    )
    assert mine.dtype is torch.bfloat16
    assert float((mine - theirs).norm()) < 0.02 * float(theirs.norm())
