"""SnapKV, written from docs/reference/policy.md alone."""

from typing import Literal

from pydantic import Field

from fmsim import Pins, Policy, PolicyParams


class SnapKV(Policy):
    """Keep what the prompt's last queries attended to, its neighbours, and what is decoded.

    Li et al., "SnapKV: LLM knows what you are looking for before generation", NeurIPS 2024.
    """

    name = "example-snapkv"
    action = "evict"
    evidence = "attention_history"
    decision_scope = "request"
    needs_mass = True

    class Params(PolicyParams):
        on_miss: Literal["mask"] = Field("mask", description="what is gone is gone")
        window_tokens: int = Field(32, ge=1, description="the end of the prompt, always kept")
        reach: int = Field(1, ge=0, description="neighbours that a page's mass covers, each side")

    def reset(self, ctx):
        super().reset(ctx)
        self.kept = ctx.table()
        mass, n = ctx.prompt_mass, ctx.pages(ctx.prompt_entries)
        for shift in range(-self.params.reach, self.params.reach + 1):
            low, high = max(0, shift), min(n, n + shift)
            pooled = self.kept[:, low:high]
            self.kept[:, low:high] = ctx.xp.maximum(pooled, mass[:, low - shift : high - shift])
        window = ctx.pages(-(-self.params.window_tokens // ctx.entry_tokens))
        self.kept[:, max(0, n - window) : n] = float("inf")

    def pins(self):
        return Pins(decoded=True)

    def worth(self, step, pages):
        return self.ctx.read(self.kept, pages)
