"""Keep everything: the exact baseline."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from fmsim.policies.base import Array, Policy, PolicyParams


class Full(Policy):
    """Every entry stays in GPU memory, as an engine without tiering does.

    It never misses, whatever the other switches say.
    """

    name = "full"
    action = "visibility_only"
    evidence = "position"
    decision_scope = "request"
    by_row = True

    class Params(PolicyParams):
        # No number of slots, so no `Budget`: `n_slots` below does not ask for one.
        budget: Literal["all"] = Field(  # type: ignore[assignment]
            "all", description="every entry there will be"
        )

    def n_slots(self, n_pages: int, **sizes: Any) -> int:
        return n_pages

    def worth(self, step: int, pages: Array) -> Array:
        return self.ctx.xp.astype(pages, self.ctx.xp.float32)
