"""SnapKV: the prompt is cut down once, by what its end attended to."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fmsim.errors import FmsimError
from fmsim.policies import prompt
from fmsim.policies.base import Array, Context, Pins, Policy, PolicyParams
from fmsim.policies.budget import Budget


class SnapKV(Policy):
    """Keep the pages around which the prompt's last queries attended most; the rest is given up.

    Source: Li et al., "SnapKV: LLM knows what you are looking for before generation", arXiv
    2404.14469: attention of the prompt's last queries, summed over them, average-pooled by 5, the
    largest kept beside the window of these queries; once, after prefill. What is decoded stays.
    Three differences. Pooling runs over pages, not tokens. The queries are those that the trace
    summed: up to the last 1,024 (the paper: 32). The budget holds decoded pages as well, so prompt
    pages of least score make way for them. One latent KV head serves all, so the sum is over heads.
    """

    name = "snapkv"
    action = "evict"
    evidence = "attention_history"
    decision_scope = "request"

    class Params(PolicyParams):
        budget: Budget = Field(
            Budget(0.1, "share"), description="of the prompt and what is decoded, together"
        )
        on_miss: Literal["mask"] = Field("mask", description="what was not kept is gone")
        cadence: Literal[1] = Field(1, description="decides once, after prefill")
        pool: int = Field(5, ge=1, description="neighbouring pages whose scores are averaged; odd")
        window_tokens: int = Field(32, ge=0, description="last tokens of the prompt, always kept")

    params: Params

    def reset(self, ctx: Context) -> None:
        super().reset(ctx)
        if self.params.pool % 2 == 0:
            raise FmsimError(f"policy snapkv: pool must be odd, not {self.params.pool}")
        xp, side = ctx.xp, self.params.pool // 2
        pages = ctx.pages(ctx.prompt_entries)
        mass = xp.astype(
            prompt.attention(ctx, self.name)[:, :pages], xp.float64
        )  # sums that any order gives alike
        none = xp.zeros((ctx.n_groups, side), dtype=mass.dtype, device=ctx.device)
        wide = xp.concat((none, mass, none), axis=1)
        summed = sum(wide[:, i : i + pages] for i in range(self.params.pool))
        self.score = ctx.table()
        self.score[:, :pages] = xp.astype(summed / self.params.pool, xp.float32)
        window = ctx.pages(-(-self.params.window_tokens // ctx.entry_tokens))
        self.score[:, max(pages - window, 0) : pages] = float("inf")

    def pins(self) -> Pins:
        return Pins(decoded=True)

    def worth(self, step: int, pages: Array) -> Array:
        return self.ctx.read(self.score, pages)
