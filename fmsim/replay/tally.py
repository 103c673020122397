"""One decode under a policy, step by step, and the count of what moved.

The replay and the engine both go through it.

Counts stay arrays of the keeper's own library until `ledger` is asked for, so that an engine's
steps never wait for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fmsim.replay.cache_manager import Accesses, Keeper, Outcome
from fmsim.replay.ledger import Ledger
from fmsim.replay.paging import golden_mask
from fmsim.replay.residency import Moves

Array = Any
COUNTS = ("resident", "demand_loads", "lookahead_loads", "written", "evicted")


class Tally:
    """`keeper` at the start of a decode of at most `n_steps` steps."""

    def __init__(self, keeper: Keeper, n_steps: int) -> None:
        self.keeper, self.residency = keeper, keeper.residency
        xp, shape = keeper.ctx.xp, (n_steps, keeper.ctx.n_groups)
        self.counts = {
            name: xp.zeros(shape, dtype=xp.int64, device=keeper.ctx.device) for name in COUNTS
        }
        self.scored = np.zeros(n_steps, dtype=np.int64)
        self.initial = self.residency.filled + 0
        self.overlap: list[Array] = []
        self._before = self.residency.present()

    def begin(self, step: int, n_entries: int) -> tuple[Moves | None, Moves | None]:
        """`n_entries` are visible from now on: what begins new pages, and what the decision
        recalls, if there is one.
        """
        keeper, cadence = self.keeper, self.keeper.policy.params.cadence
        written = self._count(step, "written", keeper.write(step, n_entries))
        decides = cadence > 1 and step % cadence == 0
        recalled = (
            self._count(step, "lookahead_loads", keeper.decide(step)) if decides and step else None
        )
        if decides or step == 0:
            self.scored[step] = keeper.policy.scored_entries(step)
        if step and step % keeper.ctx.tau == 0:
            self.overlap.append(self.residency.overlap(self._before))
            self._before = self.residency.present()
        return written, recalled

    def access(self, step: int, use: Accesses) -> Outcome:
        """The step's accesses are known: deal with the misses as `on_miss` says."""
        return self._accessed(step, self.keeper.access(step, use))

    def settle(self, step: int, use: Accesses, fetched: Array) -> Outcome:
        """The same where the caller has already decided what to fetch; bool beside `use.pages`."""
        return self._accessed(step, self.keeper.settle(step, use, fetched))

    def rest(self, step: int) -> None:
        """The step's accesses changed nothing, and the policy learns nothing of them."""
        self.counts["resident"][step] = self.residency.filled

    def _accessed(self, step: int, outcome: Outcome) -> Outcome:
        self._count(step, "demand_loads", outcome.moves)
        self.counts["resident"][step] = self.residency.filled
        return outcome

    def _count(self, step: int, name: str, moves: Moves | None) -> Moves | None:
        if moves is not None:
            self.counts[name][step] += moves.loaded
            self.counts["evicted"][step] += moves.evicted
        return moves

    def ledger(
        self,
        ids: np.ndarray,
        mass: np.ndarray,
        hit: np.ndarray,
        attended: np.ndarray,
        golden: np.ndarray | None = None,
        unmeasured: Sequence[int] = (),
    ) -> Ledger:
        """The ledger of the steps that ids [T, L, K] has: entries selected (-1 = none, and all of
        them in layers `unmeasured`), their mass, and bool of the same shape: resident when the step
        began; attended to.

        `golden` where it is known already.
        """
        policy, ctx, steps = self.keeper.policy, self.keeper.ctx, len(ids)
        valid = ids >= 0
        golden, hit = golden_mask(ids, mass) if golden is None else golden, hit & valid
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
            prompt_entries=ctx.prompt_entries,
            topk=ctx.topk,
            accessed=valid.sum(axis=2, dtype=np.int32),
            hit=hit.sum(axis=2, dtype=np.int32),
            golden=golden.sum(axis=2, dtype=np.int32),
            golden_hit=(golden & hit).sum(axis=2, dtype=np.int32),
            mass_total=mass.sum(axis=2),
            mass_kept=np.einsum("tlk,tlk->tl", mass, attended),
            heaviest_lost=np.where(attended, 0, mass).max(axis=2, initial=0),
            initial=_int32(self.initial),
            set_overlap=np.array([float(part.mean()) for part in self.overlap], dtype=np.float32),
            scored=self.scored[:steps],
            unmeasured=list(unmeasured),
            **{name: _int32(count)[:steps] for name, count in self.counts.items()},
        )


def _int32(counts: Array) -> np.ndarray:
    """Counts of any library and device as int32 numpy."""
    return np.asarray(counts if isinstance(counts, np.ndarray) else counts.cpu()).astype(np.int32)
