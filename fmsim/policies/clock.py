"""Second chance: FIFO that passes over what was used."""

from __future__ import annotations

from fmsim.policies.base import Array, Context, DemandParams, Observation, Policy


class Clock(Policy):
    """A hand goes round the slots and evicts the first page not used since it last passed.

    Source: Corbato, "A paging experiment with the Multics system", MIT MAC-M-384, 1968. With one
    access a step its hits are libCacheSim's `Clock` (one bit). With many, all hits of a step are
    marked first, then the hand finds a slot for each miss; a page in use is not evicted, though the
    hand takes its mark. Exact: a miss stalls and is loaded.
    """

    name = "clock"
    action = "hierarchical"
    evidence = "attention_history"
    decision_scope = "layer"
    rows_apart = True

    class Params(DemandParams):
        pass

    def reset(self, ctx: Context) -> None:
        super().reset(ctx)
        xp = ctx.xp
        self.used = ctx.table(0, "int64")
        self.slot = ctx.table(0, "int64")
        self.slots = xp.arange(ctx.n_slots, dtype=xp.int64, device=ctx.device)[None, :]
        # of each group
        self.count = xp.asarray(ctx.group_slots, dtype=xp.int64, device=ctx.device)[:, None]
        self.hand = xp.zeros((ctx.n_groups, 1), dtype=xp.int64, device=ctx.device)

    def observe(self, step: int, obs: Observation) -> None:
        hit = self.ctx.xp.astype(obs.hit, self.ctx.xp.int64)
        self.ctx.put(self.used, obs.pages, self.ctx.read(self.used, obs.pages) | hit)

    def moved(self, step: int, loaded: Array, evicted: Array) -> None:
        xp, put, residents = self.ctx.xp, self.ctx.put, self.ctx.residents
        turn = xp.where(evicted >= 0, self.worth(step, evicted), -1)
        last = xp.max(turn, axis=1, keepdims=True)
        # Pages that the hand left behind on its way; all of them where it went round.
        passed = self.worth(step, residents.pages) - self.count < last
        used = self.ctx.read(self.used, residents.pages)
        put(self.used, residents.pages, xp.where(passed, 0, used))
        self.hand = xp.where(last >= 0, (self.hand + last + 1) % self.count, self.hand)
        put(self.used, loaded, 0)
        put(self.slot, residents.pages, self.slots)

    def worth(self, step: int, pages: Array) -> Array:
        """The way of the hand to the page, in slots; a used page is evicted in its second round."""
        way = (self.ctx.read(self.slot, pages) - self.hand) % self.count
        return way + self.ctx.read(self.used, pages) * self.count
