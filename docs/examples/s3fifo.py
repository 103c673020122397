"""S3-FIFO, written from docs/reference/policy.md alone: a small queue, a main one, and ghosts."""

from fmsim import Policy

# MAIN is added to the uses of what is in the main queue. Who leaves first: old small pages, main
# ones by their uses, young small ones: a LEVEL each.
MAIN, LEVEL = 4, 2**34


class S3FIFO(Policy):
    """Evict what was not used twice soon after it came in; keep the rest in a queue of its own.

    Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023. The small queue has a
    tenth of the slots; nine times as many pages are remembered.
    """

    name, action = "example-s3fifo", "hierarchical"
    evidence, decision_scope = "attention_history", "layer"

    def reset(self, ctx):
        super().reset(ctx)
        self.came, self.uses, self.left = (ctx.table(0, "int64") for _ in range(3))
        self.old, self.gone = ctx.table(0, "int64")[:, :1], ctx.table(10**9, "int64")[:, :1]
        self.small, self.ghosts, self.moves = max(1, ctx.n_slots // 10), ctx.n_slots * 9 // 10, 0

    def observe(self, step, obs):
        uses = self.ctx.read(self.uses, obs.pages)  # up to 3; from MAIN on in the main queue
        self.ctx.put(self.uses, obs.pages, uses + (obs.hit & (uses % MAIN < 3)))

    def worth(self, step, pages):
        where = self.ctx.xp.where
        came, uses = self.ctx.read(self.came, pages), self.ctx.read(self.uses, pages)
        # An old small page that was used twice moves to the main queue's end before it goes.
        small = where(came > self.old, 5 * LEVEL, where(uses > 1, 3 * LEVEL // 2, 0))
        return came + where(uses >= MAIN, LEVEL * (1 + uses - MAIN), small)

    def moved(self, step, loaded, evicted):
        xp, read, put, here = self.ctx.xp, self.ctx.read, self.ctx.put, self.ctx.residents.pages
        last = xp.max(xp.where(evicted < 0, 0, self.worth(step, evicted)), axis=1, keepdims=True)
        # What left the small queue is remembered until so many others have.
        from_small = xp.astype((read(self.uses, evicted) < MAIN) & (evicted >= 0), xp.int64)
        self.gone = self.gone + xp.sum(from_small, axis=1, keepdims=True)
        put(self.left, evicted, from_small * self.gone)
        put(self.uses, loaded, xp.where(self.gone - read(self.left, loaded) < self.ghosts, MAIN, 0))
        # Places in both queues: by move, then what the hands passed, then what is new.
        self.moves += 1
        number = self.moves * 2 * self.ctx.n_pages
        put(self.came, loaded, number + self.ctx.n_pages + loaded)
        order = xp.argsort(read(self.uses, here) // MAIN * LEVEL + read(self.came, here), axis=1)
        here = xp.take_along_axis(here, order, axis=1)
        came, uses = read(self.came, here), read(self.uses, here)
        # What the hands passed goes to the end of the main queue, with fewer uses.
        rounds, first = last // LEVEL, came < last % LEVEL
        up = (uses < MAIN) & (uses > 1) & (came <= self.old) & (first | (rounds > 0))
        fewer = xp.clip(uses - xp.clip(rounds - 1 + first, 0, MAIN), MAIN, None)
        put(self.uses, here, xp.where(up, MAIN, xp.where(uses < MAIN, uses, fewer)))
        again = up | (uses >= MAIN) & first & (rounds > 0)
        column = xp.cumulative_sum(xp.ones_like(came), axis=1)
        put(self.came, here, xp.where(again, number + column, came))
        ages = xp.sort(xp.where((uses < MAIN) & (here >= 0) & ~up, -came, 0), axis=1)
        self.old = -ages[:, self.small - 1 : self.small]
