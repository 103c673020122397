"""Tensors between the ranks of one host: processes with a GPU each, or on its CPUs.

NCCL carries them between GPUs, where a CUDA graph holds its calls; gloo between CPUs.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

# older releases have these under other names alone
_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class Exchange:
    """What process `rank` of `count` gives the others, and gets of them.

    All call the same in the same order, with tensors of the same shape and type, contiguous and on
    the rank's device.
    """

    def __init__(self, device: str) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.device = torch.device(device)

    def gather(self, part: Tensor) -> Tensor:
        """[n, ...] of each rank -> [count * n, ...], in the order of ranks."""
        whole = part.new_empty(self.count * len(part), *part.shape[1:])
        _gather(whole, part)
        return whole

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        """[count * n, ...] -> [n, ...]: this rank's part of the sum over ranks."""
        part = whole.new_empty(len(whole) // self.count, *whole.shape[1:])
        _reduce_scatter(part, whole)
        return part

    def share(self, tensor: Tensor) -> None:
        """Rank 0's into every rank's, of any type."""
        dist.broadcast(tensor.view(-1).view(torch.uint8), 0)

    def least(self, number: int) -> int:
        """Of the ranks' numbers. Every rank waits here for the others."""
        found = torch.tensor(number, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MIN)
        return int(found)

    def greatest(self, numbers: np.ndarray) -> np.ndarray:
        """Of the ranks' numbers, one by one."""
        found = torch.tensor(numbers, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.cpu().numpy()


@contextmanager
def joined(meeting: Path, rank: int, count: int, device: str) -> Iterator[Exchange]:
    """This process as one of ``count``, which meet at the file ``meeting``; on "cuda" it has GPU
    ``rank``.

    No CUDA graph that holds calls of the exchange may be reachable when the block ends: NCCL waits
    for the last of them. Where the block fails the others go on waiting: whoever started them ends
    them, and tells why.
    """
    if device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // count))
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all are on this host
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=meeting.absolute().as_uri(),
        rank=rank,
        world_size=count,
        device_id=torch.device(device, rank) if device == "cuda" else None,
    )
    yield Exchange(device)
    gc.collect()  # a step and its graph refer to each other
    dist.destroy_process_group()
