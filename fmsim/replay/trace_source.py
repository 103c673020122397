"""A trace as the source of a decode's accesses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fmsim.replay.cache_manager import CacheManager, Served
from fmsim.replay.ledger import Ledger
from fmsim.replay.ledger_builder import LedgerBuilder
from fmsim.replay.paging import Accesses, Paged

Array = Any


class TraceSource:
    """What a trace says that one request selects, in the arrays of the cache manager's library.

    `entries[t]` are visible in step t. `hit` and `attended` bool [T, G, n], beside the trace's
    pages, say what became of each access.
    """

    def __init__(self, paged: Paged, entries: Sequence[int], manager: CacheManager) -> None:
        self.paged = paged
        self.entries = entries
        self.manager = manager
        self.book = LedgerBuilder(manager, len(paged.pages))
        self.parts = [self._there(part) for part in (paged.pages, paged.count, paged.mass)]
        xp, device = manager.ctx.xp, manager.ctx.device
        self.hit = xp.zeros(paged.pages.shape, dtype=xp.bool, device=device)
        self.attended = xp.zeros(paged.pages.shape, dtype=xp.bool, device=device)

    def n_entries(self, request: int, step: int) -> int:
        return self.entries[step]

    def serve(self, step: int) -> list[Served | None]:
        return [self.look_up(step)]

    def look_up(self, step: int) -> Served:
        """The step's accesses, and which of them are there or are loaded."""
        served = self.manager.look_up(Accesses(*(part[step] for part in self.parts)))
        self.hit[step] = served.hit
        self.attended[step] = served.attended
        return served

    def ledger(self, trace: Any) -> Ledger:
        """The ledger of a whole run; `trace` has `ids`, `mass` and `golden` [T, L, K], and says
        whether it `has_mass`.
        """
        hit, attended = (
            self.paged.by_entry(_numpy(flag), trace.n_layers) for flag in (self.hit, self.attended)
        )
        return self.book.ledger(
            trace.ids,
            trace.mass,
            hit,
            attended,
            golden=trace.golden,
            masses=trace.has_mass,
        )

    def _there(self, array: np.ndarray) -> Array:
        ctx = self.manager.ctx
        if isinstance(self.manager.residency.table, np.ndarray):
            return array
        return ctx.xp.asarray(np.array(array), device=ctx.device)


def _numpy(array: Array) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()
