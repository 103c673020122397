"""Least recently used, with the misses of a step below its hits."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fmsim.policies import prompt
from fmsim.policies.base import Array, Context, Evidence, Observation, Policy, PolicyParams

STEP_BITS = 18  # 262,144 steps; two steps fit the 37 bits of a worth


class LRU(Policy):
    """Keep what was selected last. Exact: a miss stalls and is loaded.

    Source: HiSparse (SGLang, vLLM): a hot buffer of 2 x top-k rows a layer and request over a full
    copy in host memory; within a step, hits rank above the rows just fetched. So of the pages of
    one step those rank higher that were used later before it. That order does not depend on the
    budget, so a larger one always holds what a smaller one does, and one pass over a trace gives
    the misses at all budgets (`fmsim.experiments.curves`). A page written at its closing counts as
    used then. Ties: the newer page stays.
    """

    name = "lru"
    action = "hierarchical"
    evidence: ClassVar[Evidence] = "attention_history"
    decision_scope = "layer"
    by_row = True

    class Params(PolicyParams):
        prompt_history: bool = Field(
            False, description="until a page is used, it ranks by the prompt's attention to it"
        )

    params: Params

    def reset(self, ctx: Context) -> None:
        super().reset(ctx)
        self.used = ctx.table(
            0, "int64"
        )  # last use and the use before it, as steps from 1, in one number
        if self.params.prompt_history:
            self.used[:, : ctx.n_pages] = prompt.ranks(ctx, self.name, STEP_BITS)

    def observe(self, step: int, obs: Observation) -> None:
        self.ctx.put(
            self.used,
            obs.pages,
            ((step + 1) << STEP_BITS) + (self.ctx.read(self.used, obs.pages) >> STEP_BITS),
        )

    def wrote(self, step: int, pages: Array) -> None:
        self.ctx.put(
            self.used, pages, ((step + 1) << STEP_BITS) - 1
        )  # before the uses of this step

    def worth(self, step: int, pages: Array) -> Array:
        return self.ctx.read(self.used, pages)
