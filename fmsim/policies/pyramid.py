"""More slots for the first layers than for the last, and in each what the prompt attended to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from fmsim.policies.base import Array, Context, Pins, Policy, PolicyParams
from fmsim.policies.budget import Budget


class Pyramid(Policy):
    """What the prompt's last queries attended to most, chosen once; the first layers keep most of
    it, the last ones least.

    Source: Cai et al., "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information
    Funneling", arXiv 2406.02069, section 4: budgets fall linearly from layer to layer, the last
    layer's is the mean over `beta`, and each layer takes what the prompt's last queries attended to
    most, as SnapKV does (arXiv 2404.14469). Those queries' own entries stay as well, and so does
    what is decoded, in the place of the prompt's least. The original keeps a set per head; one
    latent KV head serves all here.
    """

    name = "pyramid"
    action = "evict"
    evidence = "attention_history"
    decision_scope = "request"

    class Params(PolicyParams):
        budget: Budget = Field(
            Budget(0.1, "share"), description="mean over layers, decoded entries included"
        )
        scope: Literal["per_layer"] = Field(
            "per_layer", description="each layer has a budget of its own"
        )
        on_miss: Literal["mask"] = Field("mask", description="what was not chosen is gone")
        cadence: Literal[1] = Field(1, description="chosen once, when the prompt ends")
        beta: float = Field(
            20, ge=1, description="the mean layer's budget over the last layer's; 1 = all alike"
        )
        window_tokens: int = Field(
            8, ge=0, description="last tokens of the prompt, whose entries all layers keep"
        )

    params: Params

    def layer_shares(self, n_layers: int) -> Sequence[float]:
        last = 1 / self.params.beta
        fall = 2 * (1 - last) / max(1, n_layers - 1)  # so that the mean is 1
        return [last + fall * (n_layers - 1 - layer) for layer in range(n_layers)]

    def reset(self, ctx: Context) -> None:
        super().reset(ctx)
        self.window = ctx.pages(-(-self.params.window_tokens // ctx.entry_tokens))
        self.mass = ctx.table()
        if ctx.prompt_mass is not None:
            self.mass[:, : ctx.n_pages] = ctx.prompt_mass
        end = ctx.pages(ctx.prompt_entries)
        self.mass[:, max(0, end - self.window) : end] = float("inf")

    def pins(self) -> Pins:
        return Pins(recent=self.window, decoded=True)

    def worth(self, step: int, pages: Array) -> Array:
        return self.ctx.read(self.mass, pages)
