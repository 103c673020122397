"""Which pages of each request are on the GPU, listed: an indexer that selects among resident
entries scores these, and not a table of all pages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fmsim import arrays
from fmsim.exec.kernels.layout import Layout
from fmsim.exec.kernels.selection.index_score import index_scores, new_scores
from fmsim.exec.kernels.selection.top_k import top_k as best
from fmsim.exec.kv.home import Requests, part_of

BEYOND = torch.iinfo(torch.int32).max  # after every page


class ResidentPages:
    """Of each of G residency groups and B requests, in buffers that never move (a CUDA graph reads
    them): `entries` int32 [G, B, S x granularity + 1], the ids of the entries of the S pages that
    have a slot, ascending, so that equal scores are parted as among all entries, then -1; `table`
    int32 [G, B, S] the pool's page of each of these pages, -1 at the end; `kept_table` the same for
    a pool that keeps all pages of each request, one after another; `lengths` int32 [G, B], how many
    of the entries are visible.

    ``slots``: each request's number of slots, in the group that has most; ``first_slots``: in each
    group [G][B] the pool's page of a request's first; ``pages``: how many a request has where all
    are kept.
    """

    def __init__(
        self,
        slots: Sequence[int],
        first_slots: Sequence[Sequence[int]],
        pages: int,
        granularity: int,
        device: torch.device,
    ):
        self.granularity, self.n_pages = granularity, pages
        shape = (len(first_slots), len(slots), max(slots))
        self.entries, self.table = (
            torch.full((*shape[:2], width), -1, dtype=torch.int32, device=device)
            for width in (shape[2] * granularity + 1, shape[2])
        )
        self._start = arrays.offsets(self.entries[0], torch)
        self._within = torch.arange(granularity, dtype=torch.int32, device=device)
        self.lengths, self._listed, self._end = (
            torch.zeros(shape[:2], dtype=torch.int32, device=device) for _ in range(3)
        )  # entries visible; entries of the pages listed, and where the last of these ends
        self.kept_table = self.table.clone()
        self._first_page = (
            torch.arange(len(slots), dtype=torch.int32, device=device)[None, :, None] * pages
        )
        self._first = torch.tensor(first_slots, dtype=torch.int32, device=device)[..., None]
        self._scores = new_scores(
            len(slots), max(slots) * granularity, device
        )  # of one layer after another

    @property
    def n_bytes(self) -> int:
        """What its buffers take: bookkeeping, and no part of what a request's KV takes."""
        own = [part for part in vars(self).values() if isinstance(part, Tensor)]
        return sum(part.nbytes for part in (*own, *self._scores))

    def list(self, slots: Tensor, request: Requests = None) -> None:
        """The page in each slot, int32 [G, s] of one request, or of all alike, or [G, B, s] of
        several; -1 = none.
        """
        part = part_of(request)
        slots = slots[:, None] if slots.ndim == 2 else slots
        pages, slot = torch.where(slots < 0, BEYOND, slots).sort(2)
        there, width = pages < BEYOND, slots.shape[2]
        entries = torch.where(
            there[..., None], pages[..., None] * self.granularity + self._within, -1
        )
        self.entries[:, part, : width * self.granularity] = entries.flatten(2)
        self.table[:, part, :width] = torch.where(there, slot.int() + self._first[:, part], -1)
        self.kept_table[:, part, :width] = torch.where(there, pages + self._first_page[:, part], -1)
        count = there.sum(2)
        last = pages.gather(2, (count - 1).clamp(min=0)[..., None])[..., 0] * (count > 0)
        self._listed[:, part] = count.int() * self.granularity
        self._end[:, part] = (last.int() + 1) * self.granularity

    def see(self, visible: Tensor | int) -> None:
        """``visible`` entries are, of each request int32 [B], or of all alike.

        The page that the last of them is in may be a part; it is resident whenever it is one.
        """
        unfilled = (self._end - visible).clamp(min=0)
        self.lengths.copy_((self._listed - unfilled).clamp(min=0))

    def best(
        self,
        group: int,
        queries: Tensor,
        weights: Tensor,
        pool: Tensor,
        layout: Layout,
        top_k: int,
        kept: bool = False,
    ) -> Tensor:
        """int32 [B, top_k]: ids of the resident entries of highest index score, ascending, -1 where
        there are fewer.

        ``queries`` and ``weights`` as in `index_scores`, ``pool`` of a layer's keys: of those in
        slots, or, where they are ``kept``, of all.
        """
        table = self.kept_table if kept else self.table
        scores = index_scores(
            queries, weights, pool, layout, table[group], self.lengths[group], self._scores
        )
        places = best(scores.scores, self.lengths[group], top_k, scores.maxima)
        return arrays.read(self.entries[group], self._start, places)
