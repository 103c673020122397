"""Least frequently used since it came in; ties by last use."""

from __future__ import annotations

from pydantic import Field

from fmsim.policies import prompt
from fmsim.policies.base import Array, Context, Observation, Policy, PolicyParams

USE_BITS = 20  # last use, as 2 x (step + 1) + hit: half a million steps
MAX_COUNT = 2**17 - 1  # a float32-free worth has 37 bits in all


class LFU(Policy):
    """Keep what was selected in the most steps. A page that is fetched starts again at one.

    Source: the textbook in-cache LFU, with libCacheSim's tie-break: among equal counts the least
    recently used goes first. (Within a step, hits rank above the rows just fetched, as in `lru`.)
    Counts saturate at 131,071 steps.
    """

    name = "lfu"
    action = "hierarchical"
    evidence = "attention_history"
    decision_scope = "layer"
    by_row = True

    class Params(PolicyParams):
        prompt_history: bool = Field(
            False, description="until a page is used, it ranks by the prompt's attention to it"
        )

    params: Params

    def reset(self, ctx: Context) -> None:
        super().reset(ctx)
        self.rank = ctx.table(0, "int64")  # count << USE_BITS | last use
        if self.params.prompt_history:
            self.rank[:, : ctx.n_pages] = prompt.ranks(ctx, self.name, USE_BITS)

    def observe(self, step: int, obs: Observation) -> None:
        xp = self.ctx.xp
        before = self.ctx.read(self.rank, obs.pages) >> USE_BITS
        count = xp.where(obs.fetched, 1, xp.clip(before + 1, max=MAX_COUNT))
        self.ctx.put(
            self.rank,
            obs.pages,
            (count << USE_BITS) | (2 * (step + 1) + xp.astype(obs.hit, xp.int64)),
        )

    def wrote(self, step: int, pages: Array) -> None:
        self.ctx.put(self.rank, pages, 2 * (step + 1))

    def worth(self, step: int, pages: Array) -> Array:
        return self.ctx.read(self.rank, pages)
