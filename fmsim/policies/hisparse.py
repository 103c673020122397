"""HiSparse as SGLang runs it: LRU by steps, hits above what was just loaded."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from fmsim import arrays
from fmsim.policies.base import Array, Context, DemandParams, Observation, Pins, Policy


class HiSparse(Policy):
    """A hot buffer over a full copy in host memory, as in SGLang. Exact: a miss is loaded.

    Source: SGLang 0.5.23, kernels/jit/csrc/kvcacheio/hisparse.cuh and
    srt/managers/hisparse_coordinator.py. The buffer's slots are a list. At each step the hits move
    to its end in the order that they had; what was just loaded comes right below them; the rest
    stays in front, and the misses take the slots at the front that were not hit. The newest entry
    lies in a slot of its own beside the budget, always hits, and leaves when the next one closes.
    With `initial: oldest` (prefill on the same node) the buffer starts with the prompt's first
    entries, the first of them in front; with `empty` (prefill elsewhere) with nothing, unless the
    whole prompt fits.

    Two departures. SGLang assigns victims in top-k order; a trace has no order within a step, so
    pages are loaded in the order of the text. While slots of an empty buffer are free, what was the
    newest entry takes one; SGLang drops it. `lru` ranks what a step loads by its earlier uses.
    """

    name = "hisparse"
    action = "hierarchical"
    evidence = "attention_history"
    decision_scope = "layer"
    rows_apart = True

    class Params(DemandParams):
        on_miss: Literal["fetch"] = Field("fetch", description="stall and load")
        initial: Literal["oldest", "empty"] = Field(
            "oldest", description="what the buffer holds when the decode begins"
        )

    params: Params

    def n_slots(self, n_pages: int, **sizes: Any) -> int:
        return min(n_pages, super().n_slots(n_pages, **sizes) + 1)

    def reset(self, ctx: Context) -> None:
        super().reset(ctx)
        xp = ctx.xp
        self.list = xp.full((ctx.n_groups, ctx.n_slots), -1, dtype=xp.int64, device=ctx.device)
        self.place = xp.arange(1, ctx.n_slots + 1, dtype=xp.int64, device=ctx.device)[None, :]
        # Until the decode begins: the order in which the buffer is filled, from the end.
        text = xp.arange(ctx.n_pages, 0, -1, dtype=xp.int64, device=ctx.device)
        self.rank = ctx.table(0, "int64")
        self.rank[:, : ctx.n_pages] = text
        self.hit = ctx.table(0, "bool")
        too_long = ctx.n_slots < ctx.n_pages and ctx.pages(ctx.prompt_entries) >= ctx.n_slots
        self.floor = ctx.n_pages + 1 if self.params.initial == "empty" and too_long else None

    def pins(self) -> Pins:
        return Pins(recent=1)

    def observe(self, step: int, obs: Observation) -> None:
        self.ctx.put(self.hit, obs.pages, obs.hit)

    def wrote(self, step: int, pages: Array) -> None:
        before = self.ctx.xp.where(pages > 0, pages - 1, -1)
        self.ctx.put(self.rank, before, 0)  # the newest until now makes way

    def moved(self, step: int, loaded: Array, evicted: Array) -> None:
        xp, put = self.ctx.xp, self.ctx.put
        stays = self.ctx.residents.has(self.list)
        hit = self.ctx.read(self.hit, self.list) & stays
        put(self.hit, self.list, False)
        parts = [xp.where(mask, self.list, -1) for mask in (stays & ~hit, hit)]
        pages = xp.concat([parts[0], loaded, parts[1]], axis=1)
        self.list = arrays.pack(pages, pages >= 0, self.ctx.n_slots)
        put(self.rank, self.list, self.place)

    def worth(self, step: int, pages: Array) -> Array:
        return self.ctx.read(self.rank, pages)
