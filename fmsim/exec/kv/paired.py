"""CSA entries in two tiers, and the index keys of some layers beside them, moved by the same
decisions.

As in the published FlashMemory engine (arXiv 2606.09079): the layers that a memory indexer scores
keep all their keys on the GPU, and in the others a page's keys come and go with its entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fmsim.exec.kernels.layout import Layout
from fmsim.exec.kv.home import Requests
from fmsim.exec.kv.resident import ResidentPages
from fmsim.exec.kv.tiered import RequestSize, TieredCache


class PairedTiers:
    """`entries` of all CSA layers, and `keys` of the layers ``tiered``, or None where there are
    none.

    CSA layer j follows a residency's group ``groups[j]``: pages and slots come by group, [G, m] for
    one request, or for all alike, or [G, B, m] for several, and go to every layer, and ``sizes``
    have a number of slots a group. Both caches have the same pages and slots, so one block table
    serves both; `resident` lists the pages that are there, where keys are tiered. The other
    arguments are `TieredCache`'s. Raises ValueError for keys in tiers where a step's misses are
    loaded: what is loaded is chosen by the scores of all keys.
    """

    def __init__(
        self,
        entry: Layout,
        key: Layout,
        groups: Sequence[int],
        tiered: Sequence[int],
        granularity: int,
        sizes: Sequence[RequestSize],
        device: torch.device | str = "cpu",
        *,
        mirrored: bool = True,
        one_text: bool = False,
        shared_name: str | None = None,
    ):
        if tiered and any(size.staged for size in sizes):
            raise ValueError(
                "misses are chosen by the scores of all index keys, so none of these can be away"
                " from the GPU"
            )

        self.tiered, self.mirrored = tuple(tiered), mirrored
        self.entries = TieredCache(
            entry,
            len(groups),
            granularity,
            [size.of(groups) for size in sizes],
            device,
            mirrored,
            one_text,
            shared_name and f"{shared_name}-entries",
        )
        # What is recalled ahead comes one after the other, so that a decode has only one gather
        # beside it.
        self.keys = (
            TieredCache(
                key,
                len(tiered),
                granularity,
                [size.of([groups[layer] for layer in tiered]) for size in sizes],
                device,
                mirrored,
                one_text,
                shared_name and f"{shared_name}-keys",
                beside=self.entries.beside,
            )
            if tiered
            else None
        )
        self.caches = [self.entries] if self.keys is None else [self.entries, self.keys]
        self.resident = None
        if tiered:
            first_slots = [[0] * len(sizes) for _ in sizes[0].slots]
            for group, starts in zip(groups, self.entries.slot_start, strict=True):
                first_slots[group] = starts[:-1]
            self.resident = ResidentPages(
                [max(size.slots) for size in sizes],
                first_slots,
                max(size.pages for size in sizes),
                granularity,
                self.entries.device,
            )
        self._groups = [
            _index(list(groups), device),
            _index([groups[layer] for layer in tiered], device),
        ]

    def fetch(self, pages: Tensor, slots: Tensor, request: Requests = None) -> None:
        """`TieredCache.fetch`, of groups' pages into their slots."""
        for number, cache in enumerate(self.caches):
            cache.fetch(self._moved(pages, number), self._moved(slots, number), request)

    def recall(
        self, pages: Tensor, slots: Tensor, request: Requests = None, late: bool = False
    ) -> None:
        """`TieredCache.recall`, of groups' pages into their slots. Keys go first: a layer scores
        all of its own, and attends to few entries.
        """
        for number, cache in reversed(list(enumerate(self.caches))):
            moves = self._moved(pages, number), self._moved(slots, number)
            cache.recall(*moves, request, late)

    def wait_for(self, layer: int) -> None:
        """`TieredCache.wait_for`, of entries."""
        self.entries.wait_for(layer)

    def take(self, slots: Tensor, request: Requests = None) -> None:
        """`TieredCache.take`, of groups' slots."""
        for number, cache in enumerate(self.caches):
            cache.take(self._moved(slots, number), request)

    def recall_ahead(self, pages: Tensor, request: Requests = None) -> None:
        """`TieredCache.recall_ahead`, of groups' pages."""
        for number, cache in enumerate(self.caches):
            cache.recall_ahead(self._moved(pages, number), request)

    def settle(
        self,
        pages: Tensor,
        slots: Tensor,
        blocks: Tensor,
        request: Requests = None,
        all_staged: bool = False,
    ) -> None:
        """`TieredCache.settle`, of groups' pages into their slots: entries alone, since keys are
        never staged.
        """
        self.entries.settle(self.by_layer(pages), self.by_layer(slots), blocks, request, all_staged)

    @property
    def slot_bytes(self) -> int:
        """What the slots alone take of GPU memory."""
        return sum(cache.slot_bytes for cache in self.caches)

    @property
    def pool_bytes(self) -> int:
        """What the pools take of GPU memory, pages for misses and for what is recalled ahead
        included.
        """
        return sum(cache.pool_bytes for cache in self.caches)

    @property
    def full_bytes(self) -> int:
        """What the pools would take if every page had a slot."""
        return sum(cache.full_bytes for cache in self.caches)

    @property
    def mirror_bytes(self) -> int:
        return sum(cache.mirror_bytes for cache in self.caches)

    def moved_bytes(self) -> Tensor:
        """Copied from the mirrors so far, int64 on the device."""
        return sum(
            (cache.recalled_pages + cache.staged_pages) * cache.page_bytes for cache in self.caches
        )

    def _moved(self, of_groups: Tensor, number: int) -> Tensor:
        """What `by_layer` says, or one row for all layers where they follow one group."""
        return of_groups if len(of_groups) == 1 else self.by_layer(of_groups, number)

    def by_layer(self, of_groups: Tensor, number: int = 0) -> Tensor:
        """[G, ...] -> [layers of cache ``number``, ...]: each layer's group's."""
        return (
            of_groups.expand(self.caches[number].layers, *of_groups.shape[1:])
            if len(of_groups) == 1
            else of_groups[self._groups[number]]
        )


def _index(groups: list[int], device: torch.device | str) -> slice | Tensor:
    """What picks these rows: nothing is copied where they are all, in order."""
    return (
        slice(None)
        if groups == list(range(len(groups)))
        else torch.tensor(groups, dtype=torch.int64, device=device)
    )
