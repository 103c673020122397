"""Least recently used, with the misses of a step below its hits."""

from __future__ import annotations

from fmsim.policies.base import Array, Context, Observation, Policy


class LRU(Policy):
    """Keep what was selected last. Exact: a miss stalls and is loaded.

    Source: HiSparse (SGLang, vLLM): a hot buffer of 2 x top-k rows a layer and request over a full copy in host memory; within
    a step, hits rank above the rows just fetched. A page written at its closing counts as used then. Ties: the newer page stays.
    """

    name = "lru"
    action = "hierarchical"
    evidence = "attention_history"
    decision_scope = "layer"

    def reset(self, ctx: Context) -> None:
        super().reset(ctx)
        self.used = ctx.table(0, "int32")  # 2 x (step + 1), and 1 more for a hit

    def observe(self, step: int, obs: Observation) -> None:
        xp = self.ctx.xp
        self.ctx.put(self.used, obs.pages, 2 * (step + 1) + xp.astype(obs.hit, xp.int32))

    def wrote(self, step: int, pages: Array) -> None:
        self.ctx.put(self.used, pages, 2 * (step + 1))

    def worth(self, step: int, pages: Array) -> Array:
        return self.ctx.read(self.used, pages)
