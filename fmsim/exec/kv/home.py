"""Where entries or index keys lie on a device: a pool of pages, and a block table into it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fmsim.exec.kernels.lang import cdiv
from fmsim.exec.kernels.layout import Layout

PER_PAGE = 64
# Of a batch: one request, several that follow one another, or all.
Requests = int | slice | None


def part_of(request: Requests) -> slice:
    """What picks them from an axis of all."""
    if isinstance(request, int):
        return slice(request, request + 1)
    return slice(None) if request is None else request


class Home(NamedTuple):
    """Where entries lie: ``pool`` uint8 [pages, page bytes], and ``table`` int32 [B, pages of a
    sequence], -1 = nowhere.
    """

    pool: Tensor
    table: Tensor

    @classmethod
    def of_its_own(
        cls,
        layout: Layout,
        batch: int,
        entries: int,
        device: torch.device,
        per_page: int = PER_PAGE,
    ) -> Home:
        """Room for ``entries`` entries of each sequence."""
        pages = cdiv(max(entries, 1), per_page)
        table = torch.arange(batch * pages, dtype=torch.int32, device=device).view(batch, pages)
        return cls(layout.new_pool(batch * pages, per_page, device), table)
