"""S3-FIFO: a small queue on probation, a main queue, and a memory of what left."""

from __future__ import annotations

from pydantic import Field

from fmsim import arrays
from fmsim.policies.base import Array, Context, DemandParams, Observation, Policy

MOST = 3  # uses are counted in two bits
LEVELS = 8  # more than the order of eviction tells apart


class S3FIFO(Policy):
    """What was used twice while in a small queue moves to the main one; the rest leaves soon.

    Source: Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023, in the
    version of libCacheSim, whose `S3FIFO` has the same hits with one access a step (from 20 slots
    on; it refuses fewer). A page that comes back while the ghost queue remembers it goes to the
    main queue at once, and so do pages that come before the first eviction once the small queue is
    full. The main queue is a clock of two bits.

    With many accesses a step: all hits count first. For the step's misses the main queue gives up
    what it has too much, then the small one what was not used, then the main one what the clock
    says. Exact: a miss stalls and is loaded.
    """

    name = "s3fifo"
    action = "hierarchical"
    evidence = "attention_history"
    decision_scope = "layer"
    rows_apart = True

    class Params(DemandParams):
        small_share: float = Field(0.1, gt=0, lt=1, description="of the slots, the small queue's")
        ghost_share: float = Field(
            0.9, gt=0, description="pages remembered after they left, as a share of the slots"
        )
        uses_to_stay: int = Field(
            2, ge=1, le=MOST, description="uses in the small queue that lead to the main one"
        )

    params: Params

    def reset(self, ctx: Context) -> None:
        super().reset(ctx)
        xp = ctx.xp
        # int64 [G, 1]: slots of each queue, and ghosts
        small = [max(1, int(count * self.params.small_share)) for count in ctx.group_slots]
        # a page is remembered once, so there are no more than pages
        most = [int(min(ctx.n_pages, n * self.params.ghost_share)) for n in ctx.group_slots]
        self.small_size, slots, self.most_ghosts = (
            xp.asarray(sizes, dtype=xp.int64, device=ctx.device)[:, None]
            for sizes in (small, ctx.group_slots, [max(1, count) for count in most])
        )
        self.main_size = slots - self.small_size
        ghosts = max(1, *most)
        # both queues, pages in the order in which they came
        self.queue = xp.full((ctx.n_groups, ctx.n_slots), -1, dtype=xp.int64, device=ctx.device)
        # what left the small queue, oldest first
        self.ghosts = xp.full((ctx.n_groups, ghosts), -1, dtype=xp.int64, device=ctx.device)
        self.at = xp.arange(ctx.n_slots, dtype=xp.int64, device=ctx.device)[None, :]
        self.uses = ctx.table(0, "int64")
        self.main = ctx.table(0, "bool")
        self.remembered = ctx.table(0, "bool")
        self.turn = ctx.table(0, "int64")
        self.has_evicted = xp.zeros((ctx.n_groups, 1), dtype=xp.bool, device=ctx.device)

    def observe(self, step: int, obs: Observation) -> None:
        xp = self.ctx.xp
        uses = self.ctx.read(self.uses, obs.pages) + xp.astype(obs.hit, xp.int64)
        self.ctx.put(self.uses, obs.pages, xp.clip(uses, max=MOST))

    def worth(self, step: int, pages: Array) -> Array:
        self.ctx.put(self.turn, self.queue, self._order()[0])
        return self.ctx.read(self.turn, pages)

    def moved(self, step: int, loaded: Array, evicted: Array) -> None:
        xp, put = self.ctx.xp, self.ctx.put
        order, level = self._order()
        main, uses, ripe = self._queued()
        gone = (self.queue >= 0) & ~self.ctx.residents.has(self.queue)
        stays = (self.queue >= 0) & ~gone

        # The small queue was searched up to its last victim, or to its end.
        probation = ~main & ~ripe
        searched = self._furthest(gone & probation, self.at)
        emptied = xp.any(gone & (order >= 2 * LEVELS * self.ctx.n_slots), axis=1, keepdims=True)
        promoted = stays & ripe & ((self.at < searched) | emptied)

        # The main queue's clock took a use for each time it passed.
        hand = self._furthest(gone & (main | ripe), level * self.ctx.n_slots + self.at)
        rounds = xp.clip(hand // self.ctx.n_slots - 1, min=0)
        at_ripe = hand // self.ctx.n_slots == 1
        passed = stays & main & ((self.at < hand % self.ctx.n_slots) | at_ripe) & (hand >= 0)
        left = xp.clip(uses - rounds - xp.astype(passed, xp.int64), min=0)
        put(self.uses, self.queue, xp.where(main & (hand >= 0), left, xp.where(promoted, 0, uses)))
        put(self.main, self.queue, main | promoted)

        # New pages: those remembered go to the main queue, the others to the small one.
        known = self.ctx.read(self.remembered, loaded) & (loaded >= 0)
        self.has_evicted = self.has_evicted | xp.any(gone, axis=1, keepdims=True)
        new = xp.astype((loaded >= 0) & ~known, xp.int64)
        in_small = xp.sum(xp.astype(stays & ~main & ~promoted, xp.int64), axis=1, keepdims=True)
        no_room = in_small + xp.cumulative_sum(new, axis=1) > self.small_size
        put(self.main, loaded, known | (no_room & ~self.has_evicted))
        put(self.uses, loaded, 0)

        self._remember(known, loaded, xp.where(gone & probation, self.queue, -1))
        parts = [
            xp.where(mask, self.queue, -1)
            for mask in (stays & ~promoted & ~passed, promoted, passed)
        ]
        self.queue = self._packed([*parts, loaded], self.ctx.n_slots)

    def _furthest(self, mask: Array, key: Array) -> Array:
        """The largest key where `mask`, [G, 1], or -1."""
        xp = self.ctx.xp
        return xp.max(xp.where(mask, key, -1), axis=1, keepdims=True)

    def _queued(self) -> tuple[Array, Array, Array]:
        """Of the queues' pages [G, S]: in the main one; uses; in the small one with enough uses."""
        main = self.ctx.read(self.main, self.queue) & (self.queue >= 0)
        uses = self.ctx.read(self.uses, self.queue)
        return main, uses, ~main & (self.queue >= 0) & (uses >= self.params.uses_to_stay)

    def _order(self) -> tuple[Array, Array]:
        """Of the queues' pages, int64 [G, S]: the order of eviction, and the clock's level, which
        orders pages in the main queue and those on their way there.
        """
        xp = self.ctx.xp
        main, uses, ripe = self._queued()
        level = xp.where(main, xp.where(uses > 0, uses + 1, 0), 1)
        excess = xp.sum(xp.astype(main, xp.int64), axis=1, keepdims=True) - self.main_size
        for uses_left in range(MOST + 1):  # what of the main queue is beyond its size
            here = xp.astype(main & (uses == uses_left), xp.int64)
            taken = (here > 0) & (xp.cumulative_sum(here, axis=1) <= excess)
            excess = excess - xp.sum(here, axis=1, keepdims=True)
            main = main & ~taken
        kind = xp.where(main | ripe, 2, xp.where(self.ctx.read(self.main, self.queue), 0, 1))
        return (kind * LEVELS + level) * self.ctx.n_slots + self.at, level

    def _remember(self, known: Array, loaded: Array, left: Array) -> None:
        """What came back is remembered no longer, and what `left` [G, S] is, instead of the oldest
        where there are too many.
        """
        xp, put, read = self.ctx.xp, self.ctx.put, self.ctx.read
        put(self.remembered, xp.where(known, loaded, -1), False)
        ghosts = xp.where(read(self.remembered, self.ghosts), self.ghosts, -1)
        put(self.remembered, ghosts, False)
        both = xp.concat([ghosts, left], axis=1)
        held = xp.astype(both >= 0, xp.int64)
        after = xp.sum(held, axis=1, keepdims=True) - xp.cumulative_sum(held, axis=1)
        newest = xp.where(after < self.most_ghosts, both, -1)
        self.ghosts = self._packed([newest], self.ghosts.shape[1])
        put(self.remembered, self.ghosts, True)
        self.remembered[:, self.ctx.n_pages] = False

    def _packed(self, rows: list[Array], n: int) -> Array:
        """The pages of `rows` in order, without padding, int64 [G, n]."""
        pages = self.ctx.xp.concat(rows, axis=1)
        return arrays.pack(pages, pages >= 0, n)
