"""A fixed random subset: the floor any policy has to beat."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from fmsim.policies.base import Array, Context, Pins, Policy, PolicyParams
from fmsim.policies.budget import Budget


class Random(Policy):
    """Pages drawn once, uniformly, when the prompt ends; what is decoded later stays.

    Source: the random baseline of arXiv 2606.09079 (10% of the entries, the last 8K tokens, and all
    decoded ones); `recent_tokens: 8192` and a budget that much larger give the paper's setting.
    """

    name = "random"
    action = "evict"
    evidence = "position"
    decision_scope = "request"

    class Params(PolicyParams):
        budget: Budget = Field(
            Budget(0.1, "share"), description="drawn, recent and decoded pages together"
        )
        on_miss: Literal["mask"] = Field("mask", description="what was not drawn is gone")
        recent_tokens: int = Field(
            0, ge=0, description="newest tokens that always stay, decoded ones aside"
        )

    params: Params

    def reset(self, ctx: Context) -> None:
        super().reset(ctx)
        drawn = np.random.default_rng(ctx.seed).random(
            (ctx.n_groups, ctx.n_pages + 1), dtype=np.float32
        )
        self.drawn = ctx.xp.asarray(drawn, device=ctx.device)

    def pins(self) -> Pins:
        return Pins(
            recent=self.ctx.pages(-(-self.params.recent_tokens // self.ctx.entry_tokens)),
            decoded=True,
        )

    def worth(self, step: int, pages: Array) -> Array:
        return self.ctx.read(self.drawn, pages)
