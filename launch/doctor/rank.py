"""One rank of a trial all-reduce, in a process of its own.

    python -m launch.doctor.rank RANK SIZE HOST PORT SECONDS BACKEND GPU

It prints `joined` when it has reached rank 0, and `summed` when the sum is right.
"""

from __future__ import annotations

import ctypes
import signal
import sys
from datetime import timedelta

PR_SET_PDEATHSIG = 1  # linux/prctl.h
JOINED, SUMMED = "joined", "summed"


def main(rank: int, size: int, host: str, port: int, timeout_s: float, backend: str, gpu: int) -> None:
    """Add up the numbers 1 ... `size`, one of each rank. RuntimeError: the sum is wrong, or a rank did not come."""
    import torch
    from torch import distributed

    limit = timedelta(seconds=timeout_s)
    store = distributed.TCPStore(host, port, size, rank == 0, limit, wait_for_workers=False)
    print(JOINED, flush=True)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    device = torch.device("cuda", gpu) if backend == "nccl" else torch.device("cpu")
    number = torch.full((1024,), rank + 1.0, device=device)
    distributed.all_reduce(number)
    if number.unique().tolist() != [size * (size + 1) / 2]:
        raise RuntimeError(f"the sum of 1 ... {size} is {number[0].item()}")
    print(SUMMED, flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # ranks that wait do not outlive the process that checks
    given = sys.argv[1:]
    main(int(given[0]), int(given[1]), given[2], int(given[3]), float(given[4]), given[5], int(given[6]))
