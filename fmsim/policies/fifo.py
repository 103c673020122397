"""First in, first out."""

from __future__ import annotations

from fmsim.policies.base import Array, Context, DemandParams, Policy


class FIFO(Policy):
    """Evict what came in longest ago, used since or not. Exact: a miss stalls and is loaded.

    Source: Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems
    Journal 5(2), 1966, its FIFO. With one access a step its hits are libCacheSim's `FIFO`. Pages
    that came in at one step leave in the order of the text; the prefill's came in before the first.
    """

    name = "fifo"
    action = "hierarchical"
    evidence = "attention_history"
    decision_scope = "layer"
    rows_apart = True

    class Params(DemandParams):
        pass

    def reset(self, ctx: Context) -> None:
        super().reset(ctx)
        self.came = ctx.table(0, "int64")  # the step, from 1; 0 for the prefill
        self.decodes = False

    def moved(self, step: int, loaded: Array, evicted: Array) -> None:
        self.ctx.put(self.came, evicted, 0)
        self.ctx.put(self.came, loaded, step + 1 if self.decodes else 0)
        self.decodes = True  # what the prefill leaves is told first

    def worth(self, step: int, pages: Array) -> Array:
        return self.ctx.read(self.came, pages)
