"""Bit-exact encoding of changed weights: the trainer's side of a delta.

A small optimizer step changes few weights of a model in bf16, whose numbers lie 2^-8 of their size apart. So rank 0
keeps the weights that it sent last, the *base*, in host memory and sends for each tensor the indices of elements whose
bits differ and their new values. rollout/sglang/delta.py is the engine's side. A bucket of N tensors is three
broadcasts:

    counts     int64 [N]    changed elements of each tensor; -1: the whole tensor follows, because that is shorter
    places     int32 [sum]  their flat indices, tensor after tensor (none for a whole tensor)
    values     uint8 [...]  the bytes of the new elements, tensor after tensor

The second and third are omitted if empty. NaN can't be sent: the engine's side uses it to mark unchanged elements.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_BITS = {2: torch.int16, 4: torch.int32}  # integers as wide as an element
PLACE_BYTES = 4
MAX_ELEMENTS = 2**31 - 1  # a place is an int32


def changed(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Return the flat indices, int32 [K] ascending, of the elements whose bits differ (-0.0 and 0.0 do).

    ValueError: shapes or dtypes differ, or there are too many elements for an int32.
    """
    if old.shape != new.shape or old.dtype != new.dtype:
        raise ValueError(f"{old.dtype} {tuple(old.shape)} became {new.dtype} {tuple(new.shape)}: send it whole")
    if new.numel() > MAX_ELEMENTS:
        raise ValueError(f"a tensor of {new.numel()} elements: a delta reaches {MAX_ELEMENTS}; publish whole weights")
    kind = _BITS[new.element_size()]
    differ = old.reshape(-1).view(kind) != new.reshape(-1).view(kind)
    return differ.nonzero()[:, 0].to(torch.int32)


class Base:
    """The tensors that were sent last, which the engines hold, in host memory."""

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def keep(self, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> None:
        """Keep copies of tensors that have been sent to the engines."""
        for name, tensor in zip(names, tensors, strict=True):
            on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)  # read by each delta
            self._held[name] = on_host.copy_(tensor.detach())

    def encode(self, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the broadcasts of a bucket, on the tensors' device, and keep the new tensors as the base.

        ValueError: a tensor that has not been sent whole before, or a NaN.
        """
        counts, indices, values = [], [], []
        for name, tensor in zip(names, tensors, strict=True):
            if name not in self._held:
                raise ValueError(f"{name} has not been sent whole: a delta has no base; publish whole weights first")
            new = tensor.detach().contiguous()
            if torch.isnan(new).any():
                raise ValueError(f"{name} holds NaN: a delta can't carry it")
            index = changed(self._held[name].to(new.device), new)
            flat = new.reshape(-1)
            whole = len(index) * (PLACE_BYTES + new.element_size()) >= new.nbytes
            counts.append(-1 if whole else len(index))
            if not whole:
                indices.append(index)
                flat = flat[index.long()]
            values.append(flat.view(torch.uint8))
            if counts[-1]:
                self._held[name].copy_(new)
        device = tensors[0].device
        messages = [torch.tensor(counts, device=device)]
        messages += [torch.cat(found) for found in (indices, values) if found]
        return [message for message in messages if message.numel()]
