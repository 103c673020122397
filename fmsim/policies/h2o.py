"""Heavy hitters and a recent half; eviction is for good."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fmsim.policies.base import Array, Context, Observation, Pins, Policy, PolicyParams
from fmsim.policies.budget import Budget


class H2O(Policy):
    """Half of the budget for the newest entries, half for the rest with the largest running sum of
    attention.

    Source: Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference", arXiv
    2306.14048, algorithm 1: a sum of post-softmax attention, the prompt's queries included, without
    decay; budgets fixed at prompt time. The original keeps a set per head; one latent KV head
    serves all here, so the sum is over heads.
    """

    name = "h2o"
    action = "evict"
    evidence = "attention_history"
    decision_scope = "layer"
    needs_mass = True
    by_row = True

    class Params(PolicyParams):
        budget: Budget = Field(
            Budget(0.1, "share"), description="heavy hitters and recent entries together, half each"
        )
        on_miss: Literal["mask"] = Field("mask", description="what was evicted is gone")
        cadence: Literal[1] = Field(1, description="evicts one page for each that closes")

    def reset(self, ctx: Context) -> None:
        super().reset(ctx)
        self.sum = ctx.table()
        if ctx.prompt_mass is not None:
            self.sum[:, : ctx.n_pages] = ctx.prompt_mass

    def pins(self) -> Pins:
        return Pins(recent=self.ctx.n_slots // 2)

    def observe(self, step: int, obs: Observation) -> None:
        self.ctx.put(self.sum, obs.pages, self.ctx.read(self.sum, obs.pages) + obs.mass)

    def worth(self, step: int, pages: Array) -> Array:
        return self.ctx.read(self.sum, pages)
