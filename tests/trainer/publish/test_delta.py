"""Buckets of weights, and deltas through the wire: pure functions of both ends."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollout.sglang.delta import Changes, KeepUnderNaN, decode
from slime.weights import different
from trainer.publish.broadcast import Weight, buckets
from trainer.publish.delta import Base, changed


@given(
    modules=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3), min_size=1, max_size=12),
    limit=st.integers(4, 400),
)
def test_buckets_hold_whole_modules_in_order(modules: list[list[int]], limit: int) -> None:
    weights: list[Weight] = [
        (f"model.layers.{i}.part.{name}.weight", "float32", [rows])
        for i, sizes in enumerate(modules)
        for name, rows in zip("abc", sizes, strict=False)
    ]
    found = buckets(weights, limit)
    assert [weight for bucket in found for weight in bucket] == weights
    holders = [{name.rsplit(".", 2)[0] for name, _, _ in bucket} for bucket in found]
    assert sum(map(len, holders)) == len(modules)  # no module in two
    sizes = [sum(4 * rows for _, _, [rows] in bucket) for bucket in found]
    assert all(size <= limit or len(holder) == 1 for size, holder in zip(sizes, holders, strict=True))
    firsts = [4 * sum(modules[int(bucket[0][0].split(".")[2])]) for bucket in found]
    assert all(size + first > limit for size, first in zip(sizes, firsts[1:], strict=False))  # none could be joined


def through_the_wire(base: Base, weights: dict[str, torch.Tensor]) -> tuple[Changes, int]:
    """What the engine's end makes of an encoded bucket, and its bytes."""
    sent = base.encode(list(weights), list(weights.values()))
    queue = list(sent)

    def receive(size: int, dtype: torch.dtype) -> torch.Tensor:
        if not size:
            return torch.empty(0, dtype=dtype)
        tensor = queue.pop(0)
        assert (tensor.numel(), tensor.dtype) == (size, dtype)
        return tensor

    dtypes = [str(w.dtype).removeprefix("torch.") for w in weights.values()]
    found = decode(list(weights), dtypes, [w.shape for w in weights.values()], receive)
    assert not queue
    return found, sum(tensor.nbytes for tensor in sent)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


@pytest.mark.parametrize("share", [0.0, 0.02, 0.4, 1.0])
def test_changes_make_the_new_weights_bit_for_bit(share: float) -> None:
    """Into a fused and a sharded tensor, as a loader writes them; three steps, so that the base moves, too."""
    generator = torch.Generator().manual_seed(0)
    kinds = {"m.a": torch.bfloat16, "m.b": torch.bfloat16, "m.c": torch.float32, "m.one": torch.bfloat16}
    sizes = {"m.a": (6, 33), "m.b": (4, 33), "m.c": (5, 8), "m.one": (7,)}
    new = {name: torch.randn(sizes[name], generator=generator).to(kind) for name, kind in kinds.items()}
    fused, shard, one = torch.cat([new["m.a"], new["m.b"]]), new["m.c"][:, 4:].clone(), new["m.one"].clone()
    base = Base()
    base.keep(list(new), list(new.values()))
    for _ in range(3):
        for name, weight in new.items():
            here = torch.rand(weight.shape, generator=generator) < share
            moved = torch.randn(weight.shape, generator=generator).to(weight.dtype)
            new[name] = torch.where(here, moved, weight)
        new["m.one"][3] = -0.0 if math.copysign(1, new["m.one"][3]) > 0 else 0.0
        found, sent = through_the_wire(base, new)
        with KeepUnderNaN():
            for name, tensor in found:
                if name in ("m.a", "m.b"):
                    rows = slice(0, 6) if name == "m.a" else slice(6, 10)
                    fused[rows].copy_(tensor)
                elif name == "m.c":
                    shard.copy_(tensor[:, 4:])
                else:
                    one.copy_(tensor)
        assert torch.equal(bits(fused), bits(torch.cat([new["m.a"], new["m.b"]])))
        assert torch.equal(bits(shard), bits(new["m.c"][:, 4:]))
        assert torch.equal(bits(one), bits(new["m.one"]))
        whole = sum(weight.nbytes for weight in new.values())
        assert sent <= whole + 8 * len(new)  # never more than whole weights and their counts
        if share == 0.02:
            assert sent < 0.4 * whole


def test_copies_outside_are_not_touched() -> None:
    target = torch.ones(2)
    target.copy_(torch.tensor([math.nan, 2.0]))
    assert torch.isnan(target[0])


def test_changed_counts_bits() -> None:
    old = torch.tensor([[1.0, 0.0], [math.nan, 3.0]])
    assert changed(old, old.clone()).tolist() == []  # a NaN is itself
    assert changed(old, torch.tensor([[1.0, -0.0], [math.nan, 3.0000002]])).tolist() == [1, 3]


def test_changes_without_a_base_are_refused() -> None:
    base = Base()
    base.keep(["a"], [torch.ones(2)])
    with pytest.raises(ValueError, match="b has not been sent whole"):
        base.encode(["b"], [torch.ones(2)])
    with pytest.raises(ValueError, match="a holds NaN"):
        base.encode(["a"], [torch.tensor([1.0, math.nan])])
    with pytest.raises(ValueError, match=r"float32 \(2,\) became torch.float32 \(3,\)"):
        base.encode(["a"], [torch.ones(3)])


def test_different_tensors_are_named_once() -> None:
    wanted = [{"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "2", "c": "3"}]
    assert different(wanted, wanted) == []
    assert different(wanted, [{"a": "1", "b": "0", "c": "3"}, {"b": "0", "c": "3", "d": "4"}]) == ["a", "b", "d"]
