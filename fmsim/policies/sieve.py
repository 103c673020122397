"""SIEVE: a queue that nothing moves in, and a hand that sieves it."""

from __future__ import annotations

from fmsim.arrays import PAGE_BITS
from fmsim.policies.base import Array, Context, DemandParams, Observation, Policy

STEP_BITS = 19  # 524,287 steps


class Sieve(Policy):
    """A hand goes from old pages to new and evicts the first not used since it last passed.

    Source: Zhang et al., "SIEVE is Simpler than LRU", NSDI 2024. Unlike in `clock`, what is used
    keeps its place in the queue and new pages come in at its end, not behind the hand. With one
    access a step its hits are libCacheSim's `Sieve`. With many, all hits of a step are marked
    first, then the hand finds a page for each miss; a page in use is not evicted, though the hand
    takes its mark. Pages of one step queue in the order of the text. Exact: a miss is loaded.
    """

    name = "sieve"
    action = "hierarchical"
    evidence = "attention_history"
    decision_scope = "layer"
    rows_apart = True

    class Params(DemandParams):
        pass

    def reset(self, ctx: Context) -> None:
        super().reset(ctx)
        xp = ctx.xp
        self.came = ctx.table(0, "int64")  # the step, from 1; 0 for the prefill
        self.used = ctx.table(0, "int64")
        self.decodes = False
        self.hand = xp.full((ctx.n_groups, 1), -1, dtype=xp.int64, device=ctx.device)

    def observe(self, step: int, obs: Observation) -> None:
        hit = self.ctx.xp.astype(obs.hit, self.ctx.xp.int64)
        self.ctx.put(self.used, obs.pages, self.ctx.read(self.used, obs.pages) | hit)

    def moved(self, step: int, loaded: Array, evicted: Array) -> None:
        xp, read, put, residents = self.ctx.xp, self.ctx.read, self.ctx.put, self.ctx.residents
        put(self.came, loaded, step + 1 if self.decodes else 0)
        self.decodes = True  # what the prefill leaves is told first
        turn = xp.where(evicted >= 0, self._turn(step, evicted), -1)
        last = xp.max(turn, axis=1, keepdims=True)
        second_round = last >= 1 << (STEP_BITS + 1 + PAGE_BITS)
        # Pages that the hand left behind on its way; all of them where it went round.
        way = self._turn(step, residents.pages) & ~(1 << (STEP_BITS + 1 + PAGE_BITS))
        used = read(self.used, residents.pages)
        put(self.used, residents.pages, xp.where((way < last) | second_round, 0, used))
        # It stands above its last victim, or starts again where that was the newest.
        place = last & ((1 << (STEP_BITS + PAGE_BITS)) - 1)
        old = (residents.pages >= 0) & (read(self.came, residents.pages) <= step)
        above = old & (self._place(residents.pages) > place)
        on = xp.where(xp.any(above, axis=1, keepdims=True), place, -1)
        self.hand = xp.where(last >= 0, on, self.hand)
        put(self.used, loaded, 0)

    def worth(self, step: int, pages: Array) -> Array:
        return self._turn(step, pages) >> PAGE_BITS

    def _turn(self, step: int, pages: Array) -> Array:
        """int64 [G, n], in the order of eviction: used, behind the hand, place in the queue."""
        xp, place = self.ctx.xp, self._place(pages)
        behind = xp.astype(place <= self.hand, xp.int64) << (STEP_BITS + PAGE_BITS)
        used = self.ctx.read(self.used, pages) << (STEP_BITS + 1 + PAGE_BITS)
        return used + behind + place

    def _place(self, pages: Array) -> Array:
        """int64 [G, n]: when the page came, and of one step its number."""
        page = self.ctx.xp.astype(self.ctx.xp.where(pages < 0, 0, pages), self.ctx.xp.int64)
        return (self.ctx.read(self.came, pages) << PAGE_BITS) + page
