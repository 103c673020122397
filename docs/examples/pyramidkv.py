"""PyramidKV, written from docs/reference/policy.md alone."""

from typing import Literal

from pydantic import Field

from fmsim import Pins, Policy, PolicyParams


class PyramidKV(Policy):
    """Keep what the prompt's last queries attended to: much in the first layers, little in the
    last.

    Cai et al., "PyramidKV: dynamic KV cache compression based on pyramidal information
    funneling", 2024 (arXiv 2406.02069).
    """

    name = "example-pyramidkv"
    action = "evict"
    evidence = "attention_history"
    decision_scope = "request"
    needs_mass = True

    class Params(PolicyParams):
        on_miss: Literal["mask"] = Field("mask", description="what is gone is gone")
        scope: Literal["per_layer"] = Field("per_layer", description="each layer its own set")
        beta: float = Field(20, gt=1, description="the last layer has 1/beta of an even share")

    def layer_shares(self, n_layers):
        last = 1 / self.params.beta
        step = 2 * (1 - last) / max(1, n_layers - 1)
        return [2 - last - step * layer for layer in range(n_layers)]

    def reset(self, ctx):
        super().reset(ctx)
        self.mass = ctx.table()
        self.mass[:, : ctx.n_pages] = ctx.prompt_mass

    def pins(self):
        return Pins(decoded=True)

    def worth(self, step, pages):
        return self.ctx.read(self.mass, pages)
