"""The decode loop's tiers on a device: a policy's moves carried out by the tiered caches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fmsim.exec.decode.keeper import Keeper
from fmsim.exec.decode.streams import SideStream
from fmsim.exec.kv.home import Requests, part_of
from fmsim.exec.kv.paired import PairedTiers
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

    def show(self, table: Tensor, request: Requests = None) -> None:
        """Enter residencies: int32 [G, P + 1] of one request, or of all alike, or [G, B, P + 1]."""
        table = self.tiers.by_layer(table) if self.by_layer else table
        rows = self.rows[:, part_of(request), : table.shape[-1]]
        self.tiers.entries.blocks(table, rows, request)


class DeviceTiers:
    """`fmsim.replay.decode_loop.Tiers` of requests that are kept by `keepers`: what the loop calls
    a request is one of these.
    """

    def __init__(self, tiers: PairedTiers, tables: StepTables, keepers: Sequence[Keeper]) -> None:
        self.tiers = tiers
        self.tables = tables
        self.keepers = list(keepers)
        self._changed = set(range(len(keepers)))  # a page may have got or lost a slot

    def decided(self) -> None:
        """What is resident now is shown where it may have changed."""
        resident = self.tiers.resident
        for number in range(len(self.keepers)) if self.tables.stages else sorted(self._changed):
            keeper = self.keepers[number]
            residency = keeper.manager.residency
            self.tables.show(keeper.by_request(residency.table), keeper.part)
            if resident is not None:
                resident.list(keeper.by_request(residency.slots), keeper.part)
        self._changed.clear()

    def ahead_pages(self, request: int) -> int:
        return max(max(size.ahead) for size in self.tiers.entries.sizes[self.keepers[request].part])

    def wrote(self, request: int, moves: Moves) -> None:
        """The model writes entries through to both tiers itself."""
        keeper = self.keepers[request]
        self.tiers.take(keeper.by_request(moves.slots), keeper.part)
        self._changed.add(request)

    def recall(self, request: int, moves: Moves) -> None:
        """No keeper waits for what another's recall brings late."""
        keeper = self.keepers[request]
        pages, slots = keeper.by_request(moves.pages), keeper.by_request(moves.slots)
        self.tiers.recall(pages, slots, keeper.part, late=True)
        self._changed.add(request)

    def recall_ahead(self, request: int, pages: Tensor, part: int) -> None:
        number = self.keepers[request].part.start + part
        self.tiers.recall_ahead(pages[:, None], slice(number, number + 1))

    def settle(self, request: int, moves: Moves) -> None:
        self._changed.add(request)
        if self.tables.stages:
            self.keepers[request].settle_moves(moves, self.tiers, self.tables.rows)

    def moved_bytes(self) -> Tensor:
        return self.tiers.moved_bytes()


class SharedTiers:
    """`fmsim.replay.decode_loop.Tiers` of equal requests that follow one residency in step.

    The loop knows them as one request. With `copies` no model writes the entries that close, so
    they are copied from the mirror, which has their bytes. `changed` is set when a page may have
    got or lost a slot. Where misses are loaded, a GPU computes a step on the `model_stream`, and
    the bookkeeping goes `beside_model`.
    """

    def __init__(self, tiers: PairedTiers, tables: StepTables, copies: bool) -> None:
        self.tiers = tiers
        self.tables = tables
        self.copies = copies
        self.changed = True
        device = tiers.entries.device
        aside = tables.stages and not copies and device.type == "cuda"
        self.model_stream = torch.cuda.current_stream(device) if aside else None

    @contextmanager
    def beside_model(self) -> Iterator[None]:
        """What is launched within runs beside what is launched on the `model_stream`. It is little
        and waited for soon, so it goes first.
        """
        if self.model_stream is None:
            yield
            return
        stream = torch.cuda.Stream(self.model_stream.device, priority=SideStream.APPEND.value)
        stream.wait_stream(self.model_stream)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            self.model_stream.wait_stream(stream)

    def wait_for_model(self) -> None:
        """What is launched from now on comes after what the model was given."""
        if self.model_stream is not None:
            torch.cuda.current_stream(self.model_stream.device).wait_stream(self.model_stream)

    def ahead_pages(self, request: int) -> int:
        return max(self.tiers.entries.sizes[0].ahead)

    def wrote(self, request: int, moves: Moves) -> None:
        self.tiers.take(moves.slots)
        self.changed = True
        if self.copies:
            copy_uncounted(self.tiers, moves.pages, moves.slots)

    def recall(self, request: int, moves: Moves) -> None:
        self.changed = True
        self.tiers.recall(moves.pages, moves.slots, late=not self.copies)

    def recall_ahead(self, request: int, pages: Tensor, part: int) -> None:
        self.tiers.recall_ahead(pages)

    def decided(self) -> None:
        """What a step shows is entered when it is known what it selects."""

    def settle(self, request: int, moves: Moves) -> None:
        if not self.tables.stages:
            return
        self.wait_for_model()
        self.tiers.settle(moves.pages, moves.slots, self.tables.rows, all_staged=True)

    def moved_bytes(self) -> Tensor:
        return self.tiers.moved_bytes()


def copy_uncounted(tiers: PairedTiers, pages: Tensor, slots: Tensor) -> None:
    """Copy from the mirror into slots, both [G, m], what no link would carry."""
    before = [cache.recalled_pages.clone() for cache in tiers.caches]
    tiers.fetch(pages, slots)
    for cache, count in zip(tiers.caches, before, strict=True):
        cache.recalled_pages.copy_(count)
