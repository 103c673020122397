"""Random replacement."""

from __future__ import annotations

from fmsim.policies.base import Array, Context, DemandParams, Policy

BITS = 2**31 - 1  # products with MIXER stay below 2**63, so all libraries agree
MIXER = 0x45D9F3B


class RandomFetch(Policy):
    """Evict resident pages drawn anew at each miss. Exact: a miss stalls and is loaded.

    Source: Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems
    Journal 5(2), 1966, its RAND. Draws are a hash of seed, step, layer and page, so all array
    libraries draw alike. libCacheSim's `Random` has its own draws: rates agree, counts do not.
    """

    name = "random-fetch"
    action = "hierarchical"
    evidence = "position"
    decision_scope = "step"

    class Params(DemandParams):
        pass

    def reset(self, ctx: Context) -> None:
        super().reset(ctx)
        group = ctx.xp.arange(ctx.n_groups, dtype=ctx.xp.int64, device=ctx.device)
        self.salt = self._mix((group + (ctx.seed * 64) % BITS) & BITS)[:, None]

    def worth(self, step: int, pages: Array) -> Array:
        pages = self.ctx.xp.astype(pages, self.ctx.xp.int64) + 1
        return self._mix((self._mix((self.salt + step) & BITS) + pages) & BITS)

    def _mix(self, number: Array) -> Array:
        """A hash of 31 bits: two rounds of xor, shift and multiply (after Mueller's, public)."""
        for _ in range(2):
            number = ((number ^ (number >> 16)) * MIXER) & BITS
        return number ^ (number >> 16)
