"""LRU-K: the K-th last use counts."""

from __future__ import annotations

from pydantic import Field

from fmsim.policies import prompt
from fmsim.policies.base import Array, Context, Observation, Policy, PolicyParams

STEP_BITS = 18  # 262,144 steps


class LRUK(Policy):
    """Evict the page whose K-th last use is longest ago; those used less often go first.

    Source: O'Neil, O'Neil, Weikum, "The LRU-K page replacement algorithm for database disk
    buffering", SIGMOD 1993. With one access a step its hits are libCacheSim's `LRUK`: uses count
    since the page came in, and pages with fewer than K leave in the order in which they came. Of
    pages that were used at the same step, the one of lower number leaves. Exact: a miss stalls and
    is loaded. A page written at its closing counts as used then.
    """

    name = "lruk"
    action = "hierarchical"
    evidence = "attention_history"
    decision_scope = "layer"
    by_row = True

    class Params(PolicyParams):
        k: int = Field(2, ge=1, le=16, description="which use counts, from the last one")
        prompt_history: bool = Field(
            False, description="until a page is used, it ranks by the prompt's attention to it"
        )

    params: Params

    def reset(self, ctx: Context) -> None:
        super().reset(ctx)
        self.uses = [
            ctx.table(0, "int64") for _ in range(self.params.k)
        ]  # steps from 1, last first
        self.came = ctx.table(0, "int64")  # the step of the first use, from 1
        self.prior = ctx.table(0, "int64")
        if self.params.prompt_history:
            self.prior[:, : ctx.n_pages] = prompt.ranks(ctx, self.name, STEP_BITS)

    def observe(self, step: int, obs: Observation) -> None:
        xp, read, put = self.ctx.xp, self.ctx.read, self.ctx.put
        for newer, older in reversed(list(zip(self.uses, self.uses[1:]))):
            put(older, obs.pages, xp.where(obs.fetched, 0, read(newer, obs.pages)))
        put(self.uses[0], obs.pages, step + 1)
        came = read(self.came, obs.pages)
        put(self.came, obs.pages, xp.where(obs.fetched | (came == 0), step + 1, came))

    def wrote(self, step: int, pages: Array) -> None:
        self.ctx.put(self.uses[0], pages, step + 1)
        self.ctx.put(self.came, pages, step + 1)

    def worth(self, step: int, pages: Array) -> Array:
        xp, read = self.ctx.xp, self.ctx.read
        kth, came = read(self.uses[-1], pages), read(self.came, pages)
        seldom = xp.where(came > 0, came + (1 << STEP_BITS), read(self.prior, pages))
        return xp.where(kth > 0, kth + (2 << STEP_BITS), seldom)
