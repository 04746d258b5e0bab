"""The changed part of weights, bit for bit: what the trainer's end of a delta sends.

A small optimizer step changes few weights of a model in bf16, whose numbers lie 2^-8 of their size apart. So rank 0
keeps on the host what it has sent last, the *base*, and of each tensor sends the places where bits differ and the
numbers that stand there now. rollout/sglang/delta.py is the engine's end. A bucket of N tensors is three broadcasts:

    counts     int64 [N]    changed elements of each tensor; -1: the whole tensor follows, where that is shorter
    places     int32 [sum]  their flat indices, tensor after tensor (of a whole tensor none)
    values     uint8 [...]  the bytes of the new elements, tensor after tensor

The second and third are left out where they are empty. NaN can't be sent: the engine's end marks with it what stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_BITS = {2: torch.int16, 4: torch.int32}  # integers as wide as an element
PLACE_BYTES = 4
MAX_ELEMENTS = 2**31 - 1  # a place is an int32


def changed(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Return the flat indices, int32 [K] ascending, of the elements whose bits differ: -0.0 is not 0.0.

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
    """What the engines hold: the tensors that were sent last, on the host."""

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def keep(self, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> None:
        """Note that the engines have been sent these."""
        for name, tensor in zip(names, tensors, strict=True):
            on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)  # read by each delta
            self._held[name] = on_host.copy_(tensor.detach())

    def encode(self, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the broadcasts of a bucket, on the tensors' device, and keep the new tensors as the base.

        ValueError: a tensor that has not been sent whole before, or a NaN.
        """
        counts, places, values = [], [], []
        for name, tensor in zip(names, tensors, strict=True):
            if name not in self._held:
                raise ValueError(f"{name} has not been sent whole: a delta has no base; publish whole weights first")
            new = tensor.detach().contiguous()
            if torch.isnan(new).any():
                raise ValueError(f"{name} holds NaN: a delta can not carry it")
            place = changed(self._held[name].to(new.device), new)
            flat = new.reshape(-1)
            whole = len(place) * (PLACE_BYTES + new.element_size()) >= new.nbytes
            counts.append(-1 if whole else len(place))
            if not whole:
                places.append(place)
                flat = flat[place.long()]
            values.append(flat.view(torch.uint8))
            if counts[-1]:
                self._held[name].copy_(new)
        device = tensors[0].device
        parts = [torch.tensor(counts, device=device)]
        parts += [torch.cat(found) for found in (places, values) if found]
        return [part for part in parts if part.numel()]
