"""LSA's scores, and what was used of late."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fmsim.policies import prompt
from fmsim.policies.base import Array, Context, Observation
from fmsim.policies.lsa import LSA


class LSAHistory(LSA):
    """Keep what the memory indexer scores high or what was selected of late, by one sum.

    A page's worth is the indexer's logit (see `lsa`) plus `weight` x log2(1 + uses): the steps that
    selected it, each worth `fade` of it from one decision to the next. There is no threshold: the
    budget is filled. With `stale`, uses are those until one window ago, as the state is. With
    `sees: all` they are all that the native indexer selects, and all index keys stay on the GPU;
    else those of resident pages alone. Own work, to tell what either signal adds to the other.
    """

    name = "lsa-history"

    class Params(LSA.Params):
        page_rank: Literal["max"] = Field("max", description="pages go by their best entry")
        weight: float = Field(1.0, ge=0, description="of a use's logarithm, in logits")
        fade: float = Field(
            0.5, ge=0, le=1, description="what is left of a use from one decision to the next"
        )
        prompt_history: bool = Field(
            False, description="begin with the prompt's attention, as uses of its mass"
        )

    params: Params

    def reset(self, ctx: Context) -> None:
        super().reset(ctx)
        self.floor = None
        self.uses = ctx.table()
        if self.params.prompt_history:
            self.uses[:, : ctx.n_pages] = prompt.attention(ctx, self.name)
        self.past = ctx.xp.asarray(self.uses, copy=True)

    def observe(self, step: int, obs: Observation) -> None:
        used = self.ctx.xp.astype(obs.count > 0, self.uses.dtype)
        self.ctx.put(self.uses, obs.pages, self.ctx.read(self.uses, obs.pages) + used)

    def decide(self, step: int) -> None:
        if not self.params.stale:
            self._pass_on(step)
        super().decide(step)
        if self.params.stale:
            self._pass_on(step)

    def _pass_on(self, step: int) -> None:
        """What was used until now is what the next scores know."""
        if step:
            self.past = self.ctx.xp.asarray(self.uses, copy=True)
            self.uses = self.uses * self.params.fade

    def score(self, step: int) -> Array:
        xp, scores = self.ctx.xp, super().score(step)
        uses = xp.astype(self.past[:, : scores.shape[1]], xp.float64)
        bonus = xp.log2(1 + uses) * self.params.weight  # float64: libraries round alike to float32
        return xp.astype(xp.astype(scores, xp.float64) + bonus, xp.float32)
