"""What the next window will use: the bound of any lookahead."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fmsim.policies.base import Array, LookaheadPolicy, PolicyParams
from fmsim.policies.budget import Budget

USED = 2.0**-24  # float16's smallest mass, so that a used page outranks every unused one


class Oracle(LookaheadPolicy):
    """At each decision, the true union of the entries selected until the next, ranked by their
    attention mass.

    Source: the oracle of arXiv 2606.09079 ("oracle entries"). It looks into the trace, so it is a
    bound and no policy to deploy. Pages that the window does not use are not kept even where there
    is room.
    """

    name = "oracle"
    action = "hierarchical"
    evidence = "future"
    decision_scope = "layer"
    needs_mass = True
    floor = USED
    decides_ahead = True  # it knows every window

    class Params(PolicyParams):
        budget: Budget = Field(
            Budget(0.1, "share"), description="at most this many; fewer when the window uses fewer"
        )
        cadence: int = Field(64, ge=1, description="steps between decisions, and how far it sees")
        on_miss: Literal["fetch", "mask", "fallback"] = Field(
            "mask", description="only what exceeds the budget is missed"
        )

    def score(self, step: int) -> Array:
        assert self.ctx.future is not None  # given to policies whose evidence is "future"
        mass, used = self.ctx.future.window(step, self.params.cadence)
        return self.ctx.xp.where(used, mass + USED, 0.0)
