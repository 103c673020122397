"""Who keeps the pages of a batch: one cache manager for all requests where the policy allows it,
else one for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fmsim.exec.decode.request import Request
from fmsim.exec.decode.selections import Selections
from fmsim.exec.kv.paired import PairedTiers
from fmsim.replay.cache_manager import CacheManager, Served
from fmsim.replay.ledger_builder import LedgerBuilder
from fmsim.replay.of_each import PolicyOfEach
from fmsim.replay.paging import Accesses, page_rows, page_step
from fmsim.replay.residency import Moves
from fmsim.replay.stacked import StackedManager, captured


def keepers_of(requests: Sequence[Request], selections: Selections, steps: int) -> list[Keeper]:
    """The keepers of a batch that decodes at most `steps`: one for all."""
    inside = captured(requests[0].policy)
    if len(requests) == 1 and not inside:
        [one] = requests
        return [Keeper([one], one.manager, one.book, selections, False)]
    entries = [[request.n_entries(step) for request in requests] for step in range(steps)]
    manager = StackedManager([one.manager for one in requests], np.array(entries, dtype=np.int64))
    book = LedgerBuilder(manager, steps)
    for number, request in enumerate(requests):
        request.book = book.of_rows(manager.rows[number], request.manager)
        if not isinstance(manager.policy, PolicyOfEach):  # its tables are the stack's now
            request.policy = type(request.policy)(request.policy.params)
            request.manager.policy = request.policy
    return [Keeper(requests, manager, book, selections, inside)]


class Keeper:
    """`manager` and `book` of `requests`, which follow one another in their batch: G groups of
    each are rows of theirs.

    Where it `settles_inside`, a step's bookkeeping is part of what a CUDA graph holds (`settle`).
    """

    def __init__(
        self,
        requests: Sequence[Request],
        manager: CacheManager,
        book: LedgerBuilder,
        selections: Selections,
        settles_inside: bool,
    ) -> None:
        self.requests = list(requests)
        self.manager = manager
        self.book = book
        self.selections = selections
        self.settles_inside = settles_inside
        first = self.requests[0]
        self.part = slice(first.index, first.index + len(self.requests))
        self.shared = first.shared
        self._loaded = torch.zeros_like(manager.residency.filled)
        self._evicted = torch.zeros_like(manager.residency.filled)

    def by_request(self, rows: Tensor) -> Tensor:
        """[R x G, n] -> [G, R, n], a view."""
        return rows.unflatten(0, (len(self.requests), -1)).transpose(0, 1)

    def n_entries(self, step: int) -> int:
        """Entries that are visible in a step, to the first of the requests."""
        return self.requests[0].n_entries(step)

    def served(self) -> Served | None:
        """All layers have attended in the step under way: what they selected, and what was loaded
        for it. None where that changes nothing.
        """
        if self.manager.passive:
            return None
        ctx, picked = self.manager.ctx, self.selections
        mass = self._rows(picked.seen_mass)
        use = self._paged(self._rows(picked.ids), mass)
        if self.requests[0].among_resident and not self.manager.needs.all_keys:
            return self.manager.look_back(use, use.pages >= 0)
        # The policy sees all that was selected, and the mass of what was attended to.
        masses = ctx.table()
        ctx.put(masses, use.pages, use.mass)
        attended = ctx.table(0, "bool")
        ctx.put(attended, use.pages, True)
        use = self._paged(self._rows(picked.wanted), mass)
        use = replace(use, mass=ctx.read(masses, use.pages))
        return self.manager.look_back(use, ctx.read(attended, use.pages))

    def settle(self, step: Tensor, tiers: PairedTiers, blocks: Tensor) -> None:
        """The policy sees the step, whose number is on the device, and what was fetched gets slots;
        `blocks` int32 [L, B, P + 1] say where it was staged.
        """
        served = self.served()
        if served is None:
            return
        moves = self.manager.settle(step, served)  # type: ignore[arg-type]
        if moves is None:
            return
        if tiers.entries.stage_pages:
            self.settle_moves(moves, tiers, blocks)
        self._loaded.copy_(moves.loaded)
        self._evicted.copy_(moves.evicted)

    def settle_moves(self, moves: Moves, tiers: PairedTiers, blocks: Tensor) -> None:
        """What was fetched gets slots: in a layer of its own all of it was staged."""
        tiers.settle(
            self.by_request(moves.pages),
            self.by_request(moves.slots),
            blocks[:, self.part],
            self.part,
            all_staged=not self.shared,
        )

    def settled(self, step: int) -> None:
        """Count what `settle` moved in a step."""
        if not self.manager.passive and self.manager.policy.params.on_miss != "mask":
            self.book.count(step, "demand_loads", self._loaded, self._evicted)

    def _rows(self, picked: Tensor) -> Tensor:
        """Of layers [L, B, K] this keeper's rows: [R x L, K], or [R, L x K] where layers share."""
        mine = picked[:, self.part].transpose(0, 1)
        return mine.flatten(1) if self.shared else mine.flatten(0, 1)

    def _paged(self, ids: Tensor, mass: Tensor) -> Accesses:
        granularity = self.manager.ctx.granularity
        if self.shared:
            return page_rows(ids.long(), mass, granularity)
        return page_step(ids.long(), mass, granularity, shared=False)
