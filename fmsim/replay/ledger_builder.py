"""Counts what a decode moves, step by step, into a ledger.

Counts stay arrays of the cache manager's own library until `ledger` is asked for, so that an
engine's steps never wait for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np

from fmsim.replay.cache_manager import CacheManager
from fmsim.replay.golden import golden_mask
from fmsim.replay.ledger import Ledger
from fmsim.replay.residency import Moves

Array = Any
CAME = ("demand_loads", "lookahead_loads", "written")
COUNTS = (*CAME, "evicted")


class LedgerBuilder:
    """The counts of one request, from the start of a decode of at most `n_steps` steps."""

    def __init__(self, manager: CacheManager, n_steps: int) -> None:
        self.manager = manager
        self.residency = manager.residency
        xp = manager.ctx.xp
        shape = (n_steps, manager.ctx.n_groups)
        self.counts = {
            name: xp.zeros(shape, dtype=xp.int64, device=manager.ctx.device) for name in COUNTS
        }
        self.scored = np.zeros(n_steps, dtype=np.int64)
        self.initial = xp.asarray(self.residency.filled, copy=True)
        windows = n_steps // manager.ctx.tau
        self.overlap = xp.zeros(  # by window, from the second
            (windows, manager.ctx.n_groups), dtype=xp.float64, device=manager.ctx.device
        )
        self._before = self.residency.present()
        self._parts: list[LedgerBuilder] = []

    def score(self, step: int) -> None:
        """Count what a memory indexer scored at the step's decision, for each request."""
        for book in self._parts or [self]:
            book.scored[step] = book.manager.policy.scored_entries(step)

    def moved(self, step: int, name: str, moves: Moves | None) -> None:
        """Count what a part of the step brought in, under `name` of COUNTS, and what it evicted."""
        if moves is not None:
            self.count(step, name, moves.loaded, moves.evicted)

    def count(self, step: int, name: str, loaded: Array, evicted: Array) -> None:
        """The same by numbers, int64 [G] each."""
        self.counts[name][step] += loaded
        self.counts["evicted"][step] += evicted

    def window_began(self, step: int) -> None:
        """Compare the resident set with that of the window before."""
        self.overlap[step // self.manager.ctx.tau - 1] = self.residency.overlap(self._before)
        self._before = self.residency.present()

    def of_rows(self, rows: slice, manager: CacheManager) -> LedgerBuilder:
        """The counts of some groups, those of `manager`, to look at: they grow with the whole's."""
        part = copy(self)
        part.manager, part.residency = manager, manager.residency
        part.counts = {name: count[:, rows] for name, count in self.counts.items()}
        part.initial = self.initial[rows]
        part.overlap = self.overlap[:, rows]
        part.scored, part._parts = np.zeros_like(self.scored), []
        self._parts.append(part)
        return part

    def ledger(
        self,
        ids: np.ndarray,
        mass: np.ndarray,
        hit: np.ndarray,
        attended: np.ndarray,
        *,
        masses: bool,
        golden: np.ndarray | None = None,
        unmeasured: Sequence[int] = (),
        all_keys: bool | None = None,
    ) -> Ledger:
        """The ledger of the steps that ids [T, L, K] has.

        `ids` are the entries selected (-1 = none, and all of them in layers `unmeasured`), `mass`
        their attention mass; bool of the same shape says which were resident when the step began,
        and which were attended to. `golden` and `all_keys` are worked out where they are not
        given. Without `masses` nothing is known of attention mass, and `mass` holds zeros.
        """
        manager = self.manager
        policy, ctx, steps = manager.policy, manager.ctx, len(ids)
        valid = ids >= 0
        golden = golden_mask(ids, mass) if golden is None else golden
        counts = {name: _numpy(count)[:steps] for name, count in self.counts.items()}
        initial = _numpy(self.initial)
        change = sum(counts[name] for name in CAME) - counts["evicted"]
        counts["resident"] = initial + change.cumsum(axis=0)
        overlap = _numpy(self.overlap)[: max(0, steps - 1) // ctx.tau]
        hit = hit & valid
        return Ledger(
            policy=policy.name,
            params=policy.params.model_dump(mode="json"),
            granularity=ctx.granularity,
            scope=policy.params.scope,
            on_miss=policy.params.on_miss,
            cadence=policy.params.cadence,
            tau=ctx.tau,
            n_steps=steps,
            n_layers=ids.shape[1],
            n_groups=ctx.n_groups,
            n_slots=ctx.n_slots,
            group_slots=list(ctx.group_slots),
            prompt_entries=ctx.prompt_entries,
            topk=ctx.topk,
            accessed=valid.sum(axis=2, dtype=np.int32),
            hit=hit.sum(axis=2, dtype=np.int32),
            golden=golden.sum(axis=2, dtype=np.int32),
            golden_hit=(golden & hit).sum(axis=2, dtype=np.int32),
            mass_total=mass.sum(axis=2),
            mass_kept=np.einsum("tlk,tlk->tl", mass, attended),
            heaviest_lost=np.where(attended, 0, mass).max(axis=2, initial=0),
            initial=initial.astype(np.int32),
            set_overlap=overlap.mean(axis=1).astype(np.float32),
            scored=self.scored[:steps],
            unmeasured=list(unmeasured),
            decides_ahead=policy.decides_ahead,
            target_layers=list(manager.needs.target_layers),
            all_keys=manager.needs.all_keys if all_keys is None else all_keys,
            ahead_slots=list(manager.needs.ahead_slots),
            miss_slots=manager.needs.miss_slots,
            observes=policy.observes,
            observes_mass=policy.observes and policy.needs_mass,
            comes_back=manager.needs.comes_back,
            entry_tokens=ctx.entry_tokens,
            masses=masses,
            **{name: count.astype(np.int32) for name, count in counts.items()},
        )


def _numpy(counts: Array) -> np.ndarray:
    """Counts of any library and device."""
    return counts if isinstance(counts, np.ndarray) else np.asarray(counts.cpu())
