"""LRU that also loads, ahead of their misses, what a memory indexer scores high."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from fmsim import arrays
from fmsim.policies.base import Array, Context, DemandParams
from fmsim.policies.lru import LRU, STEP_BITS
from fmsim.policies.lsa import LSA


class LRUPrefetch(LRU):
    """LRU whose misses are partly loaded before they happen. Exact: other misses stall.

    Every `spacing` steps a memory indexer scores all entries, as in `lsa`, from the newest hidden
    state. The pages of highest score that are not resident are loaded, and rank as if used right
    before the step. Own work, from `lru` (HiSparse) and the scorer of arXiv 2606.09079: what
    prefetch alone adds to an exact policy. An engine keeps a state every `spacing` steps. A trace
    holds one every tau steps (64): its replay scores from the newest of those.
    """

    name = "lru-prefetch"
    evidence = "predicted_future"

    class Params(DemandParams, LRU.Params):
        spacing: int = Field(64, ge=1, description="steps between prefetches")
        most: int = Field(256, ge=1, description="pages in each layer that one prefetch may load")
        checkpoint: Path | None = Field(
            None, description="the indexer's weights; by default those shipped for nano"
        )

    params: Params

    def reset(self, ctx: Context) -> None:
        super().reset(ctx)
        self.indexer = self._indexer()
        self.indexer.reset(ctx)

    @property
    def state_steps(self) -> int:
        return self.params.spacing

    def target_layers(self) -> tuple[int, ...]:
        return self._indexer().target_layers()

    def _indexer(self) -> LSA:
        """The scorer: one score a page for all layers, from the state of the step's own window."""
        return LSA(
            checkpoint=self.params.checkpoint,
            granularity=self.params.granularity,
            cadence=self.params.spacing,
            stale=False,
        )

    def scored_entries(self, step: int) -> int:
        return 0 if step % self.params.spacing else self.indexer.scored_entries(step)

    def prefetch(self, step: int) -> Array | None:
        if step % self.params.spacing or self.ctx.n_slots >= self.ctx.n_pages:
            return None
        xp, ctx = self.ctx.xp, self.ctx
        scores = self.indexer.score(step)
        n = scores.shape[1]
        pages = xp.arange(n, dtype=xp.int64, device=ctx.device)[None, :]
        pages = xp.broadcast_to(pages, (ctx.n_groups, n))
        key = xp.broadcast_to(arrays.PROTECTED - arrays.order_key(scores, pages[:1]), pages.shape)
        key = xp.where(ctx.residents.has(pages), arrays.PROTECTED + pages, key)
        most = min(self.params.most, ctx.n_slots, n)
        best = arrays.smallest(key, most)
        taken = arrays.read(key, arrays.offsets(key, xp), best) < arrays.PROTECTED
        wanted = xp.astype(xp.where(taken, best, -1), xp.int32)
        ctx.put(self.used, wanted, ((step + 1) << STEP_BITS) - 1)
        return wanted
