"""What torch's own allocator says that something took."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class AllocatorMeter:
    """Adds up what torch's allocator handed out within `counted` blocks and was still there at
    their ends.

    `n_bytes` is None on a CPU, where torch does not say.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.n_bytes: int | None = 0 if device.type == "cuda" else None

    @contextmanager
    def counted(self) -> Iterator[None]:
        """What is built within counts."""
        if self.n_bytes is None:
            yield
            return
        before = torch.cuda.memory_allocated(self.device)
        yield
        self.n_bytes += torch.cuda.memory_allocated(self.device) - before
