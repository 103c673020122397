"""SIEVE, written from docs/reference/policy.md alone: a queue, a bit for each page, and a hand."""

from fmsim import Policy

USED = 2**36  # the hand spares a page once for its bit
BEHIND = 2**35  # the hand has passed it in this round


class Sieve(Policy):
    """Evict the first page from the hand on that was not used since it came in.

    Zhang et al., "SIEVE is simpler than LRU", NSDI 2024.
    """

    name = "example-sieve"
    action = "hierarchical"
    evidence = "attention_history"
    decision_scope = "layer"

    def reset(self, ctx):
        super().reset(ctx)
        self.came = ctx.table(0, "int64")  # place in the queue
        self.used = ctx.table(0, "int64")
        self.hand = ctx.table(0, "int64")[:, :1]
        self.moves = 0  # the prefill's come first, with step 0 too

    def observe(self, step, obs):
        used = self.ctx.read(self.used, obs.pages)
        self.ctx.put(self.used, obs.pages, self.ctx.xp.where(obs.hit, 1, used))

    def moved(self, step, loaded, evicted):
        xp, read, put = self.ctx.xp, self.ctx.read, self.ctx.put
        last = xp.where(evicted >= 0, self.worth(step, evicted), -1)
        last = xp.max(last, axis=1, keepdims=True)  # -1: none left
        put(self.came, loaded, 0)
        put(self.used, loaded, 0)
        here = self.ctx.residents.pages
        used, came = read(self.used, here), xp.where(here < 0, 0, read(self.came, here))
        passed = self.worth(step, here) - used * USED < last
        put(self.used, here, xp.where(passed, 0, used))
        ahead = xp.max(came, axis=1, keepdims=True) > last % BEHIND
        hand = xp.where(ahead, last % BEHIND + 1, 0)  # above its last victim, or from the start
        self.hand = xp.where(last < 0, self.hand, hand)
        self.moves += 1
        put(self.came, loaded, self.moves * self.ctx.n_pages + loaded)

    def worth(self, step, pages):
        came = self.ctx.read(self.came, pages)
        return self.ctx.read(self.used, pages) * USED + (came < self.hand) * BEHIND + came
