"""Attention sinks and a sliding window."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fmsim.policies.base import Array, Pins, Policy, PolicyParams
from fmsim.policies.budget import Budget


class Recency(Policy):
    """The first few tokens and as many of the newest as the budget holds; the rest is given up for
    good.

    Source: StreamingLLM, Xiao et al., "Efficient Streaming Language Models with Attention Sinks",
    arXiv 2309.17453, section 3.2: four sink tokens (one compressed entry) and a rolling window.
    """

    name = "recency"
    action = "evict"
    evidence = "position"
    decision_scope = "step"
    by_row = True

    class Params(PolicyParams):
        budget: Budget = Field(Budget(0.1, "share"), description="sink and window together")
        on_miss: Literal["mask"] = Field("mask", description="what left the window is gone")
        sink_tokens: int = Field(4, ge=0, description="first tokens of the prompt that always stay")

    params: Params

    def pins(self) -> Pins:
        return Pins(sink=self.ctx.pages(-(-self.params.sink_tokens // self.ctx.entry_tokens)))

    def worth(self, step: int, pages: Array) -> Array:
        return self.ctx.xp.astype(pages, self.ctx.xp.float32)
