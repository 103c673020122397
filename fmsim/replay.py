"""Replay a trace against a policy: what moves, what is kept. It runs no clock, so its ledger is the same on every machine."""

from __future__ import annotations

from typing import Any

import numpy as np

from fmsim import accesses
from fmsim.keeper import Accesses, Keeper
from fmsim.ledger import Ledger
from fmsim.policies.base import Context, LookaheadState, Policy
from fmsim.policies.guard import Guarded

ENTRY_TOKENS = 4  # the CSA rate: entry i is visible from position 4 * i + 3


class Replayer:
    """One trace, read once and replayed against any number of policies.

    entry_bytes and model_layers (KV bytes of one entry in one CSA layer, and the layers that share the GPU) turn a budget in
    bytes into slots; they default to V4-Flash's 584 B and the trace's own layers. `cold` starts with nothing
    resident, as a cache benchmark does; otherwise the prefill leaves what the policy chooses at step 0.
    """

    def __init__(self, trace: Any, *, entry_bytes: float = 584, model_layers: int | None = None, cold: bool = False) -> None:
        self.trace, self.header, self.cold = trace, trace.header, cold
        self.ids, self.mass = accesses.read_trace(trace)
        self.n_steps, self.n_layers, self.topk = self.ids.shape
        self.entries = [int(trace.n_entries(step)) for step in range(self.n_steps)]
        self.prompt_entries = self.header.prompt_tokens // ENTRY_TOKENS
        self.entry_bytes, self.model_layers = entry_bytes, model_layers or self.n_layers
        self.valid = self.ids >= 0
        self.golden = accesses.golden_mask(self.ids, self.mass)
        self._paged: dict[tuple[int, bool], accesses.Paged] = {}
        self.has_lookahead = trace.hidden is not None and trace.index_keys is not None  # dense models have none
        self._keys: np.ndarray | None = None

    def run(self, policy: Policy) -> Ledger:
        """Replay one policy. Raises FmsimError, naming policy and step, where the policy misbehaves."""
        paged = self.paged(policy.params.granularity, policy.params.scope == "shared")
        guarded = Guarded(policy)
        ctx = self.context(policy, paged)
        keeper = Keeper(guarded, ctx)
        if not self.cold:
            keeper.start()
        return Run(self, paged, keeper).ledger()

    def paged(self, granularity: int, shared: bool) -> accesses.Paged:
        """The trace by pages; kept for the next policy of the same granularity and scope."""
        key = (granularity, shared)
        if key not in self._paged:
            n_pages = -(-max(self.entries[-1], self.prompt_entries) // granularity)
            self._paged[key] = accesses.page_trace(self.ids, self.mass, granularity, shared, n_pages)
        return self._paged[key]

    def context(self, policy: Policy, paged: accesses.Paged) -> Context:
        """What `policy` may know before the first step."""
        params = policy.params
        sizes = {
            "prompt_entries": self.prompt_entries,
            "topk": self.topk,
            "entry_bytes": self.entry_bytes,
            "model_layers": self.model_layers,
        }
        return Context(
            n_layers=self.n_layers,
            n_groups=paged.pages.shape[1],
            n_pages=paged.n_pages,
            n_slots=policy.n_slots(paged.n_pages, **sizes),
            granularity=params.granularity,
            prompt_entries=self.prompt_entries,
            topk=self.topk,
            n_steps=self.n_steps,
            tau=self.header.tau,
            seed=self.header.seed,
            prompt_mass=self._prompt_mass(params.granularity, paged),
            lookahead=self._lookahead if self.has_lookahead else None,
            future=accesses.PagedFuture(paged) if policy.evidence == "future" else None,
        )

    def _prompt_mass(self, granularity: int, paged: accesses.Paged) -> np.ndarray | None:
        """[G, P] float32, or None where the trace has none."""
        if self.trace.prompt_mass is None:
            return None
        mass = np.asarray(self.trace.prompt_mass, dtype=np.float64)[:, : paged.n_pages * granularity]
        mass = np.pad(mass, ((0, 0), (0, paged.n_pages * granularity - mass.shape[1])))
        mass = mass.reshape(self.n_layers, paged.n_pages, granularity).sum(axis=2)
        return (mass if paged.pages.shape[1] == self.n_layers else mass.sum(axis=0, keepdims=True)).astype(np.float32)

    def _lookahead(self, window: int) -> LookaheadState:
        """The state at the last token before decode window `window`; index keys are decoded once, on first use."""
        if self._keys is None:
            self._keys = self.trace.keys(self.entries[-1])
        position = self.header.prompt_tokens + self.header.tau * window - 1
        n_entries = (position + 1) // ENTRY_TOKENS
        return LookaheadState(np.asarray(self.trace.hidden[window], dtype=np.float32), position, self._keys[:, :n_entries], n_entries)


class Run:
    """One policy's way through the trace."""

    def __init__(self, source: Replayer, paged: accesses.Paged, keeper: Keeper) -> None:
        self.source, self.paged, self.keeper = source, paged, keeper
        steps, groups, n = paged.pages.shape
        self.hit = np.zeros((steps, groups, n), dtype=bool)
        self.attended = np.zeros((steps, groups, n), dtype=bool)
        self.counts = {
            name: np.zeros((steps, groups), dtype=np.int32) for name in ("resident", "demand_loads", "lookahead_loads", "written", "evicted")
        }
        self.scored = np.zeros(steps, dtype=np.int64)
        self.overlap: list[float] = []

    def ledger(self) -> Ledger:
        """Run all steps."""
        residency = self.keeper.residency
        initial = residency.filled.astype(np.int32)
        params, tau = self.keeper.policy.params, self.source.header.tau
        before = residency.present()
        for step in range(len(self.hit)):
            self._count(step, "written", self.keeper.write(step, self.source.entries[step]))
            if params.cadence > 1 and step % params.cadence == 0 and step:
                self._count(step, "lookahead_loads", self.keeper.decide(step))
            if step % params.cadence == 0 and params.cadence > 1 or step == 0:
                self.scored[step] = self.keeper.policy.scored_entries(step)
            if step % tau == 0 and step:
                self.overlap.append(float(residency.overlap(before).mean()))
                before = residency.present()
            self._access(step)
            self.counts["resident"][step] = residency.filled
        return self._finish(initial)

    def _count(self, step: int, name: str, moves: Any) -> None:
        if moves is not None:
            self.counts[name][step] += moves.loaded.astype(np.int32)
            self.counts["evicted"][step] += moves.evicted.astype(np.int32)

    def _access(self, step: int) -> None:
        paged = self.paged
        outcome = self.keeper.access(step, Accesses(paged.pages[step], paged.count[step], paged.mass[step]))
        self.hit[step] = outcome.hit
        self.attended[step] = outcome.hit | outcome.fetched
        self._count(step, "demand_loads", outcome.moves)

    def _finish(self, initial: np.ndarray) -> Ledger:
        """From pages back to entries."""
        source, policy, ctx = self.source, self.keeper.policy, self.keeper.ctx
        layers = source.n_layers
        hit = self.paged.by_entry(self.hit, layers) & source.valid
        attended = self.paged.by_entry(self.attended, layers)
        return Ledger(
            policy=policy.name,
            params=policy.params.model_dump(mode="json"),
            granularity=ctx.granularity,
            scope=policy.params.scope,
            on_miss=policy.params.on_miss,
            cadence=policy.params.cadence,
            tau=ctx.tau,
            n_steps=source.n_steps,
            n_layers=layers,
            n_groups=ctx.n_groups,
            n_slots=ctx.n_slots,
            prompt_entries=ctx.prompt_entries,
            topk=ctx.topk,
            accessed=source.valid.sum(axis=2, dtype=np.int32),
            hit=hit.sum(axis=2, dtype=np.int32),
            golden=source.golden.sum(axis=2, dtype=np.int32),
            golden_hit=(source.golden & hit).sum(axis=2, dtype=np.int32),
            mass_total=source.mass.sum(axis=2),
            mass_kept=np.einsum("tlk,tlk->tl", source.mass, attended),
            initial=initial,
            set_overlap=np.array(self.overlap, dtype=np.float32),
            scored=self.scored,
            **self.counts,
        )


def replay(trace: Any, policy: Policy, **options: Any) -> Ledger:
    """Replay one policy against `trace`; `options` are Replayer's. Make one Replayer for several policies of a trace."""
    return Replayer(trace, **options).run(policy)
