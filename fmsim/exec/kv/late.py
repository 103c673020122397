"""What a decision recalls late: pages that come from the mirror while steps go on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.pages.late_pages import copy_late, take_back, wait_for_copy
from fmsim.exec.kv.beside import Beside
from fmsim.exec.kv.copies import Copies, LayerPages


class LatePages:
    """Of a cache's layers, whose parts of the pool begin at the pages ``pool_start`` [L + 1].

    A layer either waits for its own (`wait_for`), or reads what it attends to by itself
    (`fmsim.exec.kernels.pages.late_entries`) where pages are still `on_the_way`. Who gives a slot
    to another page says so before (`take_back`). Nobody else waits.
    """

    def __init__(self, copies: Copies, pool_start: Sequence[int], beside: Beside) -> None:
        self.copies = copies
        self.pool_start = pool_start
        self.beside = beside
        self._layers = len(pool_start) - 1
        # layers come in parts of so many; a part begins at each start
        self._part = max(1, -(-self._layers // tuning.LATE_LAUNCHES))
        self._starts = range(0, self._layers, self._part)
        self._done = beside.event()  # of the last copy, for the host
        self._number = 0  # of the last copy
        # int32, on the device: the number of the last copy, and of that which a part has
        self._asked = torch.zeros(1, dtype=torch.int32, device=copies.pool.pages.device)
        self._come = self._asked.repeat(len(self._starts))

    @cached_property
    def _waiting(self) -> Tensor:
        """`fmsim.exec.kernels.pages.late_pages`: int32 [lists, pages of the pool + 1]. It is
        bookkeeping, as block tables are: 4 bytes a page.
        """
        lists = self.copies.lists
        pages = self.pool_start[-1] // lists
        device = self.copies.pool.pages.device
        return torch.zeros(lists, pages + 1, dtype=torch.int32, device=device)

    def on_the_way(self, layer: int) -> Tensor:
        """int32 [pages of the layer's pool], a view in one place: not 0 where a page has not
        come.
        """
        if self.copies.even:
            return self._waiting[layer, :-1]
        return self._waiting[0, self.pool_start[layer] : self.pool_start[layer + 1]]

    def copy(self, source: LayerPages, pages: Tensor, to: Tensor) -> None:
        """`Copies.copy`, beside what runs, layer by layer. Of slots that were taken back."""
        copies, waiting = self.copies, self._waiting
        if not self._number:  # load the kernel now: a later step would wait for it
            take_back(waiting, to.new_full((copies.lists, 1), -1))
        moves = copies.listed(source, pages, to)
        self._number = number = self._number + 1
        places = torch.where(moves.to < 0, waiting.shape[1] - 1, moves.to)
        waiting.scatter_(1, places.expand(copies.lists, -1), number)
        moves = copies.of_each(moves)
        self._asked.fill_(number)

        def come() -> None:
            for place, first in enumerate(self._starts):
                part = slice(first, first + self._part)
                if first < copies.lists:
                    copy_late(
                        copies.by_lists(source.pages)[part],
                        copies.by_lists(copies.pool.pages)[part],
                        *(of_lists[part] for of_lists in moves),
                        waiting[part],
                        number,
                    )
                self._come[place].fill_(number)
            self.beside.record(self._done)

        self.beside.late(come, *moves)

    def take_back(self, slots: Tensor) -> None:
        """Pool pages int64 [L or 1, B, m] (-1 = none) get others: what was to come into them stays
        away. Waits for those alone that are being copied at that moment.
        """
        if self.come():
            return
        take_back(self._waiting, self.copies.by_list(slots))

    def come(self) -> bool:
        """Nothing is on its way any more, as far as the host knows."""
        return not self._number or self.beside.over(self._done)

    def wait_for(self, layer: int) -> None:
        """A layer's pages are here for what comes after. Layers are waited for in their order."""
        part, within = divmod(layer, self._part)
        if within == 0:
            wait_for_copy(self._come[part:], self._asked)
