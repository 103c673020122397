"""Furthest next use goes first: the bound of any demand policy."""

from __future__ import annotations

from fmsim.policies.base import Array, Context, Observation, Policy


class Belady(Policy):
    """Evict the page that is needed again last, or never.

    No policy that loads on demand has fewer misses.

    Source: Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems
    Journal 5(2), 1966 (MIN). It needs the future of the trace. Ties (never used again): the newer
    page stays.
    """

    name = "belady"
    action = "hierarchical"
    evidence = "future"
    decision_scope = "layer"

    def reset(self, ctx: Context) -> None:
        super().reset(ctx)
        assert ctx.future is not None  # given to policies whose evidence is "future"
        self.future = ctx.future
        self.next_use = ctx.table(self.future.never, "int32")
        self.next_use[:, : ctx.n_pages] = self.future.first_use()

    def observe(self, step: int, obs: Observation) -> None:
        self.ctx.put(self.next_use, obs.pages, self.future.next_use(step))

    def worth(self, step: int, pages: Array) -> Array:
        return self.future.never - self.ctx.read(self.next_use, pages)
