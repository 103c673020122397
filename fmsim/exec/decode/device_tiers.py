"""The decode loop's tiers on a device: a policy's moves carried out by the tiered caches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fmsim.exec.kv.paired import PairedTiers
from fmsim.replay.cache_manager import CacheManager
from fmsim.replay.residency import Moves


class StepTables:
    """Pool pages of this step, int32 [rows, B, P + 1]; the last column is padding's.

    A row is a group of the residency's. Where layers load what they miss, or have different numbers
    of slots, each has a row of its own.
    """

    def __init__(self, tiers: PairedTiers, n_groups: int, n_pages: int, batch: int) -> None:
        self.tiers = tiers
        self.stages = tiers.entries.stage_pages > 0
        self.by_layer = self.stages or not tiers.entries.even
        rows = tiers.entries.layers if self.by_layer else n_groups
        shape = (rows, batch, n_pages + 1)
        self.rows = torch.full(shape, -1, dtype=torch.int32, device=tiers.entries.device)

    def blocks(self, layer: int, group: int) -> Tensor:
        """int32 [B, P + 1], a view: what a CSA layer that follows `group` finds in this step."""
        return self.rows[layer if self.by_layer else group]

    def of(self, request: int) -> Tensor:
        """int32 [rows, 1, P + 1], a view: one request's."""
        return self.rows[:, request : request + 1]

    def show(self, request: int, table: Tensor) -> None:
        """Enter a request's residency, its `table` int32 [G, P + 1]."""
        table = self.tiers.by_layer(table) if self.by_layer else table
        self.tiers.entries.blocks(request, table, self.rows[:, request, : table.shape[1]])

    def show_all(self, table: Tensor) -> None:
        """The same for all requests of the batch, which share one residency."""
        table = self.tiers.by_layer(table) if self.by_layer else table
        self.tiers.entries.blocks_of_all(table, self.rows)


class DeviceTiers:
    """`fmsim.replay.decode_loop.Tiers` of requests that each have a residency of their own."""

    def __init__(self, tiers: PairedTiers, tables: StepTables) -> None:
        self.tiers = tiers
        self.tables = tables

    def ahead_pages(self, request: int) -> int:
        return max(self.tiers.entries.sizes[request].ahead)

    def wrote(self, request: int, moves: Moves) -> None:
        """The model writes entries through to both tiers itself."""

    def recall(self, request: int, moves: Moves) -> None:
        self.tiers.recall(moves.pages, moves.slots, request)

    def recall_ahead(self, request: int, pages: Tensor) -> None:
        self.tiers.recall_ahead(pages, request)

    def settle(self, request: int, moves: Moves) -> None:
        if self.tiers.entries.stage_pages:
            self.tiers.settle(moves.pages, moves.slots, self.tables.of(request), request)

    def moved_bytes(self) -> Tensor:
        return self.tiers.moved_bytes()


class SharedTiers:
    """`fmsim.replay.decode_loop.Tiers` of equal requests that follow one residency in step.

    The loop knows them as one request. With `copies` no model writes the entries that close, so
    they are copied from the mirror, which has their bytes. `changed` is set when a page may have
    got or lost a slot.
    """

    def __init__(self, tiers: PairedTiers, tables: StepTables, copies: bool) -> None:
        self.tiers = tiers
        self.tables = tables
        self.copies = copies
        self.changed = True

    def ahead_pages(self, request: int) -> int:
        return max(self.tiers.entries.sizes[0].ahead)

    def wrote(self, request: int, moves: Moves) -> None:
        self.changed = True
        if self.copies:
            copy_uncounted(self.tiers, moves.pages, moves.slots)

    def recall(self, request: int, moves: Moves) -> None:
        self.changed = True
        self.tiers.recall(moves.pages, moves.slots)

    def recall_ahead(self, request: int, pages: Tensor) -> None:
        self.tiers.recall_ahead(pages)

    def settle(self, request: int, moves: Moves) -> None:
        if self.tables.stages:
            self.tiers.settle(moves.pages, moves.slots, self.tables.rows, all_staged=True)

    def moved_bytes(self) -> Tensor:
        return self.tiers.moved_bytes()


def copy_uncounted(tiers: PairedTiers, pages: Tensor, slots: Tensor) -> None:
    """Copy from the mirror into slots, both [G, m], what no link would carry."""
    before = [cache.recalled_pages.clone() for cache in tiers.caches]
    tiers.fetch(pages, slots)
    for cache, count in zip(tiers.caches, before, strict=True):
        cache.recalled_pages.copy_(count)


def show_residents(tables: StepTables, managers: Sequence[CacheManager]) -> None:
    """Enter every request's residency for the step."""
    for request, manager in enumerate(managers):
        tables.show(request, manager.residency.table)
