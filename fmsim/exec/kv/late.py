"""What a decision recalls late: pages that come from the mirror while steps go on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from fmsim.exec.kernels import tuning
from fmsim.exec.kv.beside import Beside
from fmsim.exec.kv.copies import Copies, LayerPages


class LatePages:
    """Of a cache's layers, whose parts of the pool begin at the pages ``pool_start`` [L + 1].

    One decision's pages at a time: who moves others into slots calls `finish` before. A layer
    either waits for its own (`wait_for`), or reads what it attends to by itself
    (`fmsim.exec.kernels.late_entries`) where pages are still `on_the_way`.
    """

    def __init__(self, copies: Copies, pool_start: Sequence[int], beside: Beside) -> None:
        self.copies = copies
        self.pool_start = pool_start
        self.beside = beside
        self._here = [beside.event() for _ in pool_start[1:]]

    @cached_property
    def _on_the_way(self) -> Tensor:
        """uint8 [lists, pages of the pool + 1]: 1 where a page has not come; the last column is
        padding's. It is bookkeeping, as block tables are: a byte a page.
        """
        lists = len(self._here) if self.copies.even else 1
        pages = self.pool_start[-1] // lists
        device = self.copies.pool.pages.device
        return torch.zeros(lists, pages + 1, dtype=torch.uint8, device=device)

    def on_the_way(self, layer: int) -> Tensor:
        """uint8 [pages of the layer's pool], a view in one place: 1 where a page has not come."""
        if self.copies.even:
            return self._on_the_way[layer, :-1]
        return self._on_the_way[0, self.pool_start[layer] : self.pool_start[layer + 1]]

    def copy(self, source: LayerPages, pages: Tensor, to: Tensor) -> None:
        """`Copies.copy`, beside what runs, in an order that lets the first layers go on while the
        last are still waited for.
        """
        moves = self.copies.listed(source, pages, to)
        programs = tuning.late_programs(source.pages.shape[1])
        padding = self._on_the_way.shape[1] - 1
        self._on_the_way.scatter_(1, torch.where(moves.to < 0, padding, moves.to), 1)

        def come() -> None:
            lists = len(moves.counts)
            step = max(1, lists // tuning.LATE_LAUNCHES)
            for first in range(0, lists, step):
                part = slice(first, first + step)
                self.copies.move(source, moves, programs, part)
                self._on_the_way[part].zero_()
                for event in self._here[part] if self.copies.even else self._here:
                    self.beside.record(event)

        self.beside.late(come, *moves)

    def wait_for(self, layer: int) -> None:
        """A layer's pages are here for what comes after."""
        self.beside.wait(self._here[layer])

    def finish(self) -> None:
        """All layers' are: they come in order."""
        self.wait_for(-1)
