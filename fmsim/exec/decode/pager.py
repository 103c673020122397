"""Which entries a CSA layer attends to during a decode under policies, and where they lie: the same
on CPU and GPU.

In a step, new entries are written and a decision may recall pages. Then each CSA layer's indexer
selects: with `on_miss` "fetch" and "fallback" among all entries, since all index keys are scored;
with "mask" among the resident ones alone, as FlashMemory does (arXiv 2606.09079), so that the next
best resident entry takes the place of one that is not there. Where a layer has all its keys, what
it would have selected among all entries is booked beside it. A replay has only what was selected
among all. To compare the two, `select="all"` selects as the recorded model did, and then leaves out
what is missing.

Nothing here asks the host about an array, so that a CUDA graph holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from fmsim.exec.decode.device_tiers import StepTables
from fmsim.exec.decode.request import Request, Select
from fmsim.exec.decode.selections import Selections
from fmsim.exec.kernels.attention.rows import Rows
from fmsim.exec.kernels.attention.sparse_attention import Masses, sparse_attention
from fmsim.exec.kernels.selection.index_score import GROUP, Scores
from fmsim.exec.kernels.selection.top_k import top_k as best
from fmsim.exec.kv.home import Home
from fmsim.exec.kv.keys import LayerKeys
from fmsim.exec.kv.tiered import TieredCache
from fmsim.exec.model.attention import Attention
from fmsim.exec.model.cache import Access
from fmsim.policies.base import PolicyParams
from fmsim.replay.paging import page_step


@dataclass(frozen=True)
class StepView:
    """What the pagers of a batch see of it."""

    requests: Sequence[Request]
    tiers: TieredCache
    tables: StepTables
    keys: Mapping[int, LayerKeys]
    selections: Selections
    select: Select
    dtype: torch.dtype
    stalled: Callable[[], AbstractContextManager[None]]  # around the loading of misses
    wait_for: Callable[[int], None]  # until what a decision recalls late into a layer is there

    @property
    def params(self) -> PolicyParams:
        return self.requests[0].policy.params

    @property
    def among_resident(self) -> bool:
        """The indexers select among resident entries alone."""
        return self.requests[0].among_resident


class LayerPager:
    """`fmsim.exec.model.cache.Pager` and `fmsim.exec.decode.decode_attention.EntryPager` of
    one CSA layer of a batch.

    `blocks` int32 [B, P + 1] is the pool page of each request's pages in this step, -1 where a page
    is neither resident nor staged; its last column is padding's.
    """

    wants_masses = True  # the ledger does

    def __init__(self, view: StepView, layer: int):
        self.view = view
        self.layer = layer
        self.blocks = view.tables.blocks(layer, view.requests[0].group(layer))
        self.tiers = view.tiers
        self.keys = view.keys[layer]
        self.granularity = view.tiers.granularity
        self.params = view.params
        policy = view.requests[0].policy
        self.recalls = self.params.cadence > 1 or policy.prefetches
        self.stages = self.params.on_miss != "mask" and self.tiers.stage_pages > 0
        self.loads = self.stages and self.params.on_miss == "fetch"  # few steps of fallback do
        # where no step gives slots away, what it attends to may come before its page
        self.brings = self.recalls and not self.stages

    def append(self, entry: Tensor, key: Tensor, index: Tensor) -> None:
        for b, request in enumerate(self.view.requests):
            table = request.residency.table[request.group(self.layer)]
            self.tiers.append(b, self.layer, entry[b : b + 1], index[b : b + 1], table)
            self.keys.append(b, key[b : b + 1], index[b : b + 1])

    def select(self, queries: Tensor, weights: Tensor, visible: Tensor, top_k: int) -> Tensor:
        self.choose(queries, weights, visible, top_k)
        return self.bring()

    def choose(self, queries: Tensor, weights: Tensor, visible: Tensor, top_k: int) -> None:
        lengths = visible.int()
        if self.recalls:
            self.keys.wait()
        if self.recalls and not self.brings:
            self.view.wait_for(self.layer)
        if (
            not self.keys.complete
        ):  # of resident entries alone; what would have been selected among all is not known
            self.ids = self.keys.best(queries, weights, lengths, top_k)
            return
        scores = self.keys.scores(queries, weights, lengths)
        self.wanted = best(scores.scores, lengths, top_k, scores.maxima)
        self.hit = self._here(self.wanted)
        if self.view.among_resident:
            resident = self._among_resident(scores)
            self.ids = best(resident.scores, lengths, top_k, resident.maxima)
        elif self.stages:
            self.pages, self.fetched = self._to_load(scores.scores)

    def bring(self) -> Tensor:
        if not self.keys.complete:
            self.view.selections.ids[self.layer].copy_(self.ids)
        else:
            attended = self._attended()
            if not self.view.among_resident:
                self.ids = torch.where(attended, self.wanted, -1)
            self.view.selections.book(self.layer, self.wanted, self.hit, attended, self.ids)
        if self.brings:
            self.tiers.bring(self.layer, self.ids, self.blocks)
        return self.ids

    def _attended(self) -> Tensor:
        """bool [B, K], which of the wanted entries can be attended to, once misses are loaded."""
        if not self.stages:
            return self.hit
        with self.view.stalled():
            self.tiers.stage(self.layer, self.pages, self.fetched, self.blocks)
        return (self.wanted >= 0) & self._here(self.wanted)

    def read(self, ids: Tensor) -> Tensor:
        return torch.stack(
            [self.tiers.read(self.layer, blocks, ids[b]) for b, blocks in enumerate(self.blocks)]
        ).to(self.view.dtype)

    def attended(
        self, access: Access, masses_of: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    ) -> None:
        masses = tuple(part[:, 0] for part in access[1:4])
        wanted = masses
        if self.measures:
            entries = torch.stack(
                [self.tiers.read_mirror(b, self.layer, ids) for b, ids in enumerate(self.wanted)]
            )
            wanted = tuple(
                part[:, 0] for part in masses_of(self.wanted, entries.to(self.view.dtype))
            )
        self.book(masses[0], wanted, access.hidden[:, 0])

    @property
    def measures(self) -> bool:
        """What attention would have put on the wanted entries is not what it put on those attended
        to, and is worked out.
        """
        return self.keys.complete and self.tiers.mirrored and self.params.on_miss != "fetch"

    def book(self, seen: Tensor, wanted: tuple[Tensor, Tensor, Tensor], hidden: Tensor) -> None:
        """Mass [B, K] of what was attended to; (entries [B, K], window [B], sink [B]) of the
        selection among all; hidden [B, H].
        """
        seen = wanted[0] if self.view.select == "all" else seen
        self.view.selections.book_masses(
            self.layer, seen, wanted if self.keys.complete else None, hidden
        )

    # ------------------------------------------------------------------ with attention from kernels

    @property
    def homes(self) -> list[Home]:
        return self.tiers.homes(self.layer, self.blocks)

    @property
    def key_homes(self) -> list[Home]:
        return self.keys.homes

    def reports(
        self, q: Tensor, rows: Rows, masses: Masses, x: Tensor, attention: Attention
    ) -> None:
        wanted = masses
        if self.measures:
            mirror = self.homes[1]
            everything = rows._replace(pool=mirror.pool, table=mirror.table, ids=self.wanted)
            wanted = sparse_attention(q, everything, attention.sinks, attention.scale, True)[1]
        self.book(masses.entries, wanted, x[:, 0])

    # ------------------------------------------------------------------------------------ selection

    def _pages(self, ids: Tensor) -> Tensor:
        """int64 pages of ids [B, K]; padding's column for -1."""
        return torch.where(ids < 0, self.blocks.shape[1] - 1, ids // self.granularity).long()

    def _here(self, ids: Tensor) -> Tensor:
        """bool [B, K], whether entries are resident or staged."""
        return self.blocks.gather(1, self._pages(ids)) >= 0

    def _among_resident(self, scores: Scores) -> Scores:
        """The same scores with -inf for what is not resident."""
        known, pages = scores.scores, self.blocks.shape[1] - 1
        missing = (self.blocks[:, :pages] < 0).repeat_interleave(self.granularity, 1)
        missing = (
            torch.nn.functional.pad(missing, (0, known.shape[1] - missing.shape[1]))
            if missing.shape[1] < known.shape[1]
            else missing
        )
        known = known.masked_fill(missing[:, : known.shape[1]], float("-inf"))
        return Scores(known, known.unflatten(1, (-1, GROUP)).amax(2))

    def _to_load(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The pages of the wanted entries, int64 [B, K], -1 = padding, and which of them `on_miss`
        loads, bool.

        "fallback" takes the heaviest pages first: by the indexer's softmax, which is trained to
        follow the attention mass.
        """
        weight = torch.where(
            self.wanted < 0, float("-inf"), scores.gather(1, self.wanted.clamp(min=0).long())
        ).softmax(-1)
        use = page_step(self.wanted, weight, self.granularity, shared=False)
        columns = torch.where(use.pages < 0, self.blocks.shape[1] - 1, use.pages).long()
        missing = (use.pages >= 0) & (self.blocks.gather(1, columns) < 0)
        return use.pages.long(), self.view.requests[0].manager.to_fetch(use, missing)
