"""Broadcast of weights, in buckets, from a trainer's rank 0 to SGLang servers.

SGLang builds a process group in addition to the default one: a TCP store at the given address, wrapped in a PrefixStore
with the group's name, and a group of that name on it. Both sides must agree on each of these, so this module does the
same with torch.distributed alone; importing SGLang for it would cost a trainer 15 s and 600 MB.
"""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import cast

import torch
from torch import distributed
from torch.distributed import distributed_c10d as c10d

from trainer.publish.delta import Base

BUCKET_BYTES = 1 << 30
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
Weight = tuple[str, str, list[int]]  # Hugging Face name, dtype, shape


def buckets(weights: Sequence[Weight], limit: int = BUCKET_BYTES) -> list[list[Weight]]:
    """Split `weights` in order into buckets of at most `limit` bytes, or of a single larger module.

    The tensors of a module (their names differ in the last two words only: one attention, one expert) stay together:
    SGLang fuses some of them when it loads them, and loses a half that arrives alone.
    """
    found: list[list[Weight]] = []
    full = 0  # bytes in the last bucket
    for _, group in itertools.groupby(weights, lambda weight: weight[0].rsplit(".", 2)[0]):
        members = list(group)
        size = sum(_BYTES[dtype] * math.prod(shape) for _, dtype, shape in members)
        if not found or full + size > limit:
            found.append([])
            full = 0
        found[-1] += members
        full += size
    return found


def join_update_group(
    host: str, port: int, rank: int, world_size: int, group_name: str, backend: str, timeout_s: float
) -> distributed.ProcessGroup:
    """Join the group as `rank`; rank 0 listens on `port`. Wait for the other members for at most `timeout_s`.

    `backend` is "gloo" or "nccl". TimeoutError: a member has not joined; the message names the group.
    """
    timeout = timedelta(seconds=timeout_s)
    try:
        tcp_store, rank, world_size = next(
            distributed.rendezvous(f"tcp://{host}:{port}", rank, world_size, timeout=timeout)
        )
        tcp_store.set_timeout(timeout)
        group, _ = c10d._new_process_group_helper(
            world_size,
            rank,
            [],
            distributed.Backend(backend),
            distributed.PrefixStore(group_name, tcp_store),
            group_name=cast("c10d.GroupName", group_name),
            timeout=timeout,
        )
    except (distributed.DistStoreError, distributed.DistNetworkError) as error:
        raise TimeoutError(
            f"group {group_name!r}: not all of {world_size} members came to {host}:{port} within {timeout_s} s: {error}"
        ) from error
    c10d._world.pg_group_ranks[group] = {member: member for member in range(world_size)}
    return group


def broadcast(tensors: Iterable[torch.Tensor], group: distributed.ProcessGroup) -> None:
    """Send each tensor from rank 0 to the group, in order, and wait until all are sent.

    RuntimeError: torch lost a member, or the group's timeout has passed. With gloo at most one tensor is under way: if
    a member dies, a later one could block for the whole timeout, since members that fail stop receiving.
    """
    one_by_one = distributed.get_backend(group) == "gloo"
    works = []
    for tensor in tensors:
        works.append(distributed.broadcast(tensor.contiguous(), 0, group=group, async_op=True))
        if one_by_one:
            works.pop().wait()
    for work in works:
        work.wait()


def send(
    tensors: Iterable[tuple[str, torch.Tensor]],
    plan: Sequence[Sequence[Weight]],
    group: distributed.ProcessGroup,
    base: Base | None,
    changes: bool,
) -> int:
    """Broadcast named tensors in the buckets of `plan`, waiting once per bucket; return bytes sent.

    Sends whole tensors, or only changes with `changes`; `base` keeps what was sent.
    """
    stream, sent = iter(tensors), 0
    for bucket in plan:
        names, found = zip(*itertools.islice(stream, len(bucket)), strict=True)
        assert list(names) == [name for name, _, _ in bucket], (names[0], bucket[0])
        if changes:
            assert base is not None, "changes of what was never sent"
            outgoing = base.encode(names, found)
        else:
            outgoing = [tensor.contiguous() for tensor in found]
            if base is not None:
                base.keep(names, found)
        broadcast(outgoing, group)
        sent += sum(tensor.nbytes for tensor in outgoing)
    return sent


def leave_update_group(group: distributed.ProcessGroup) -> None:
    """Free the group's connections, when the caller has dropped its last reference, too.

    With NCCL a member may have died, and its peers' kernels would wait for it: the communicator is aborted.
    """
    if distributed.get_backend(group) == "nccl":
        group.abort()
    distributed.destroy_process_group(group)


class UpdateGroup:
    """The group as its rank 0 holds it: one reference, which `leave` drops.

    While a reference exists, members that wait in a broadcast do not notice that rank 0 is gone.
    """

    def __init__(self, host: str, port: int, world_size: int, *, name: str, backend: str, timeout_s: float) -> None:
        """See `join_update_group`."""
        self._group: distributed.ProcessGroup | None = join_update_group(
            host, port, 0, world_size, name, backend, timeout_s
        )

    def send(
        self,
        tensors: Iterable[tuple[str, torch.Tensor]],
        plan: Sequence[Sequence[Weight]],
        base: Base | None,
        changes: bool,
    ) -> int:
        """Broadcast named tensors and return bytes sent; see `send`. RuntimeError: a member was lost."""
        assert self._group is not None, "this process has left the group"
        try:
            return send(tensors, plan, self._group, base, changes)
        except RuntimeError as error:
            reason = str(error)
        raise RuntimeError(f"sending weights: {reason}")  # the first error's traceback would keep the group

    def leave(self) -> None:
        """Leave the group. Members that wait in a broadcast then fail."""
        group, self._group = self._group, None
        if group is not None:
            leave_update_group(group)
            del group
            gc.collect()
