"""The experts of a layer computed together are those computed one after another: outputs and every gradient."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import random_model

from trainer.config import LayoutConfig, Precision
from trainer.megatron.config import MegatronConfig
from trainer.megatron.model import build_models
from trainer.megatron.modules import experts
from trainer.megatron.modules.experts import GroupedExperts, GroupedProduct, grouped_product_takes
from trainer.models.families import read_shape

ROWS = {"all": [5, 9, 1, 3, 2, 4], "some empty": [0, 9, 0, 0, 14, 1], "one": [0, 0, 0, 24, 0, 0], "none": [0] * 6}


@pytest.fixture(scope="module", params=Precision, ids=lambda p: p.value)
def module(request: pytest.FixtureRequest, process: None, tmp_path_factory: pytest.TempPathFactory) -> GroupedExperts:
    """Six experts of a model of two layers, as the trainer builds it; hidden size 32, width 20 (bf16: 24)."""
    folder = random_model("qwen3_moe", tmp_path_factory.mktemp("model"))
    if request.param is Precision.bf16:  # rows of 20 numbers are no multiple of 16 bytes there
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(text.replace('"moe_intermediate_size": 20', '"moe_intermediate_size": 24'))
    chunk: Any = build_models(read_shape(folder), LayoutConfig(precision=request.param), MegatronConfig())[0]
    found = chunk.decoder.layers[1].mlp.experts
    assert isinstance(found, GroupedExperts), "the trainer's models are not built with it"
    generator = torch.Generator().manual_seed(0)
    for parameter in found.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    return found


def forbidden(*arguments: Any, **named: Any) -> None:
    raise AssertionError("one after another")


def outcome(module: Any, forward: Any, counts: list[int]) -> dict[str, Any]:
    """Output, and gradients by name: of the rows, of the router's weights, of every parameter."""
    generator = torch.Generator().manual_seed(1)
    dtype = next(module.parameters()).dtype
    rows = torch.randn(sum(counts), 32, generator=generator).to(dtype).requires_grad_()
    probs = torch.rand(sum(counts), generator=generator).requires_grad_()
    module.zero_grad()
    out, bias = forward(rows, torch.tensor(counts), probs)
    assert bias is None
    (out.float() * torch.randn(out.shape, generator=generator)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"out": out.detach(), "rows": rows.grad, "probs": probs.grad, **gradients}


@pytest.mark.parametrize("counts", ROWS.values(), ids=ROWS)
def test_together_is_one_after_another(
    counts: list[int], module: GroupedExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = outcome(module, super(GroupedExperts, module).forward, counts)
    for expert in module.local_experts:
        monkeypatch.setattr(expert, "forward", forbidden)
    found = outcome(module, module, counts)
    names = [f"local_experts.{i}.linear_fc{j}.weight" for i in range(6) for j in (1, 2)]
    assert [*found] == ["out", "rows", "probs", *names], "parameters that a checkpoint does not know"
    for name, tensor in wanted.items():
        assert found[name] is not None, f"{name}: the overlap of gradients would wait for it"
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor, rtol=1e-6 if tensor.dtype == torch.float32 else 1e-2, atol=1e-6)
    moved = [name for name in names if bool(found[name].any())]
    assert len(moved) == 2 * sum(count > 0 for count in counts), "a gradient that is zero anyway proves nothing"


def test_an_expert_without_rows_gets_zeros_whatever_the_kernel_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    product = experts.F.grouped_mm

    def careless(a: torch.Tensor, b: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
        found = product(a, b, offs=offs)
        if b.dim() == 2:
            found[offs.diff(prepend=offs.new_zeros(1)) == 0] = torch.nan
        return found

    monkeypatch.setattr(experts, "F", SimpleNamespace(grouped_mm=careless))
    weights = [torch.randn(8, 4, requires_grad=True) for _ in range(3)]
    ends = torch.tensor([0, 5, 5], dtype=torch.int32)
    GroupedProduct.apply(torch.randn(5, 4, requires_grad=True), [0, 5, 0], ends, *weights).sum().backward()
    for weight, rows in zip(weights, (0, 5, 0), strict=True):
        assert weight.grad is not None
        assert bool(weight.grad.isfinite().all())
        assert bool(weight.grad.any()) == (rows > 0)


def test_copies_of_weights_are_not_kept_for_the_backward_pass() -> None:
    weights = [torch.randn(8, 4, requires_grad=True) for _ in range(3)]
    rows = torch.randn(6, 4)
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        GroupedProduct.apply(rows, [1, 2, 3], torch.tensor([1, 3, 6], dtype=torch.int32), *weights)
    known = {rows.data_ptr(), *(weight.data_ptr() for weight in weights)}
    assert len(kept) == 5
    assert len(set(kept) - known) == 1, "besides rows and weights only where groups end"


def test_a_layer_whose_weights_are_under_way_is_waited_for(module: GroupedExperts) -> None:
    waited: list[Any] = []
    layers = [layer for expert in module.local_experts for layer in (expert.linear_fc1, expert.linear_fc2)]
    handles = [layer.register_forward_pre_hook(lambda layer, inputs: waited.append(layer)) for layer in layers]
    outcome(module, module, ROWS["some empty"])
    for handle in handles:
        handle.remove()
    assert {id(layer) for layer in waited} == {id(layer) for layer in layers}


@pytest.mark.parametrize(
    ("dtype", "device", "widths", "capability", "takes"),
    [
        (torch.bfloat16, "cuda", [2048, 1536, 768], (9, 0), True),
        (torch.bfloat16, "cuda", [2048, 1536, 768], (10, 0), True),
        (torch.bfloat16, "cuda", [2048, 1536, 768], (8, 0), False),
        (torch.float32, "cuda", [2048, 1536, 768], (9, 0), False),
        (torch.bfloat16, "cuda", [2048, 1540, 770], (9, 0), False),
        (torch.float32, "cpu", [32, 20], None, True),
        (torch.float32, "cpu", [32, 10], None, False),
        (torch.bfloat16, "cpu", [32, 20], None, False),
        (torch.float64, "cpu", [32, 20], None, False),
    ],
)
def test_what_the_product_does_not_take_goes_one_after_another(
    dtype: torch.dtype, device: str, widths: list[int], capability: Any, takes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert grouped_product_takes(dtype, torch.device(device), widths) == takes


def test_widths_that_are_not_aligned_are_computed_all_the_same(
    module: GroupedExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = outcome(module, super(GroupedExperts, module).forward, ROWS["all"])
    monkeypatch.setattr(experts, "_ALIGNED_BYTES", 1 << 20)
    monkeypatch.setattr(GroupedProduct, "apply", forbidden)
    found = outcome(module, module, ROWS["all"])
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
