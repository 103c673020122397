"""Copies of pages into a cache's pool: all layers in a launch, and nothing asked of the host."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fmsim.exec.kernels.pages.gather import copy_rows
from fmsim.exec.kernels.tuning import GatherTuning


class LayerPages(NamedTuple):
    """Pages of all layers, one layer's after another's: uint8 [pages, page bytes]; ``first`` int64
    [L, 1, 1], where each layer's begin.
    """

    pages: Tensor
    first: Tensor


class MoveLists(NamedTuple):
    """For `copy_rows`: ``pages`` and ``to`` int64 [lists, n], those that are moved at the front;
    ``counts`` int32 [lists], how many these are. Of layers that move alike there is one list.
    """

    pages: Tensor
    to: Tensor
    counts: Tensor


class Copies:
    """Into ``pool``. Layers that are laid out alike (``even``) have a list of moves each, others
    one for all, by places in all of the memory.
    """

    def __init__(self, pool: LayerPages, even: bool) -> None:
        self.pool = pool
        self.even = even
        self.lists = len(pool.first) if even else 1

    def copy(
        self, source: LayerPages, pages: Tensor, to: Tensor, tune: GatherTuning | None = None
    ) -> None:
        """Into page ``to[l, b, i]`` of layer l's pool page ``pages[l, b, i]`` of its part of
        `source`, where both are >= 0. Even layers that move alike may have one row for all.
        """
        moves = self.of_each(self.listed(source, pages, to))
        copy_rows(self.by_lists(source.pages), self.by_lists(self.pool.pages), *moves, tune)

    def listed(self, source: LayerPages, pages: Tensor, to: Tensor) -> MoveLists:
        """The same as lists. Pages [L, B, m] are as many as slots, and most of them are left out;
        so those that are moved are brought to the front.
        """
        pages, to = torch.broadcast_tensors(pages, to)
        if not self.even:
            pages = torch.where(pages < 0, -1, pages + source.first).flatten(0, 1)[None]
            to = torch.where(to < 0, -1, to + self.pool.first).flatten(0, 1)[None]
        moved = (pages >= 0) & (to >= 0)
        of_request = moved.sum(2)
        rank = (
            moved.cumsum(2) - 1 + (of_request.cumsum(1) - of_request)[..., None]
        )  # a scan a request: of all at once few processors would take part
        places = moved[0].numel()
        rank = torch.where(moved, rank, places).flatten(1)
        front = rank.new_full((2, len(rank), places + 1), -1)
        for part, out in zip((pages, to), front):
            out.scatter_(1, rank, part.flatten(1).long())
        counts = of_request.sum(1, dtype=torch.int32)
        return MoveLists(front[0, :, :places], front[1, :, :places], counts)

    def by_list(self, to: Tensor) -> Tensor:
        """Places [L or 1, B, m] of layers' pools, -1 = none, as each list has them: [lists, n]."""
        if self.even:
            return to.flatten(1).expand(self.lists, -1)
        return torch.where(to < 0, -1, to + self.pool.first).flatten()[None]

    def of_each(self, moves: MoveLists) -> MoveLists:
        """The same with every list, views where they are alike."""
        counts = moves.counts.expand(self.lists).contiguous()
        return MoveLists(*(part.expand(self.lists, -1) for part in moves[:2]), counts)

    def by_lists(self, pages: Tensor) -> Tensor:
        """Pages of all layers [n, page bytes] as lists name them: [lists, pages, page bytes]."""
        return pages.unflatten(0, (self.lists, -1))
