"""A policy at the wheel of a residency.

`fmsim.replay.decode_loop` says in which order a step asks it for what.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from array_api_compat import array_namespace

from fmsim import arrays
from fmsim.errors import DoesNotFit, PolicyError
from fmsim.policies.base import Context, Observation, Policy
from fmsim.policies.guard import Guarded
from fmsim.replay import needs
from fmsim.replay.paging import Accesses
from fmsim.replay.residency import Moves, Residency, ResidentView

Array = Any


@dataclass(frozen=True)
class Served:
    """One step's accesses and what the cache had of them: [G, n], beside `Accesses.pages`."""

    use: Accesses
    slot: Array  # int32: where the page lay when the step began, or -1
    hit: Array  # bool: it was resident
    fetched: Array  # bool: it was loaded for this step

    @property
    def attended(self) -> Array:
        """bool: attention could read it."""
        return self.hit | self.fetched


class CacheManager:
    """One policy, reset with `ctx`, and its residency.

    Unless `cold`, the first set is what the prefill leaves on the GPU. That is no traffic, since
    the prefill wrote it there.
    """

    def __init__(self, policy: Policy | Guarded, ctx: Context, *, cold: bool = False) -> None:
        self.policy = policy
        self.residency = Residency(ctx.n_groups, ctx.n_pages, ctx.group_slots, ctx.xp, ctx.device)
        self.ctx = replace(ctx, residents=ResidentView(self.residency))
        policy.reset(self.ctx)
        self.needs = needs.needs_of(policy, self.ctx, tuple(policy.target_layers()))
        self.pins = policy.pins()
        self._check_pins()
        self._see(ctx.prompt_entries)
        if not cold:
            self.decide(0)

    @property
    def passive(self) -> bool:
        """What a step selects changes nothing: it is never loaded, and the policy does not look."""
        never_loads = self.policy.params.on_miss == "mask" or self.needs.keeps_all
        return never_loads and not self.policy.observes

    def _check_pins(self) -> None:
        """Pinned pages must fit the budget to the end of the run."""
        ctx, least = self.ctx, min(self.ctx.group_slots)
        needed = self.pins.most(ctx.n_pages, ctx.prompt_entries // ctx.granularity)
        if needed > least:
            where = "" if self.residency.room is None else " in the layer that has fewest"
            raise DoesNotFit(
                f"policy {self.policy.name}: budget {self.policy.params.budget} holds"
                f" {least} pages{where}, but {needed} are pinned by the end of"
                f" {ctx.n_steps} steps; raise budget"
            )

    def _see(self, n_entries: int) -> None:
        """From now on the first `n_entries` entries are visible."""
        self.visible, self.tail = self._view(n_entries)

    def _seen(self) -> Any:
        """Pages that are visible, of all groups or [G, 1]."""
        return self.visible

    def _view(self, n_entries: int) -> tuple[int, int]:
        """Pages visible when `n_entries` entries are, and the first of the pinned tail.

        The page that is still being filled counts as pinned.
        """
        visible = self.ctx.pages(n_entries)
        open_page = 1 if n_entries % self.ctx.granularity else 0
        tail = visible - max(self.pins.recent, open_page)
        return visible, (
            min(tail, self.ctx.prompt_entries // self.ctx.granularity)
            if self.pins.decoded
            else tail
        )

    def _pinned(self, view: tuple[int, int] | None = None) -> Any:
        """The test for pinned pages, or None where none can be; of a later `_view`, if given."""
        visible, tail = view or (self.visible, self.tail)
        if self.pins.sink == 0 and tail >= visible:
            return None
        return lambda pages: (pages < self.pins.sink) | (pages >= tail)

    def write(self, step: int, n_entries: int) -> Moves | None:
        """`n_entries` are visible at this step: give newly begun pages a slot.

        None where none began.
        """
        first = self.visible
        self._see(n_entries)
        if self.visible == first:
            return None
        xp = self.ctx.xp
        new = xp.arange(first, self.visible, dtype=xp.int32, device=self.ctx.device)
        new = xp.broadcast_to(new[None, :], (self.ctx.n_groups, self.visible - first))
        self.policy.wrote(step, new)
        return self._admit(step, new, new >= 0)

    def decide(self, step: int) -> Moves:
        """Choose the resident set anew among all visible pages."""
        self.policy.decide(step)
        worth = self._ranked(step, self.policy.worth_of_first(step, self.visible))
        return self._told(step, self.residency.choose(worth, self.policy.floor, self._pinned()))

    def prefetch(self, step: int) -> Moves | None:
        """Bring in what the policy asks for before the step's accesses; None where it asks for
        nothing.
        """
        pages = self.policy.prefetch(step)
        if pages is None:
            return None
        wanted = (pages >= 0) & (pages < self._seen()) & (self.residency.lookup(pages) < 0)
        return self._admit(step, pages, wanted)

    @property
    def parts(self) -> int:
        """Requests whose decisions are foreseen one by one."""
        return 1

    def foresee(self, step: int, n_entries: int, most: int, part: int = 0) -> Array | None:
        """Up to `most` pages that the decision at the later `step`, when `n_entries` are visible,
        will recall: int64 [G, most], -1 = padding.

        None for a policy that decides from what it cannot know yet. What is foreseen will be
        recalled; a page that is evicted until then can be recalled without having been foreseen.
        """
        if not self.policy.decides_ahead or step >= self.ctx.n_steps:
            return None
        view = self._view(n_entries)
        worth = self.policy.ahead(step, view[0])
        worth[:, self.visible :] = float("inf")  # will be written before then, so they are there
        pages = self.residency.foresee(worth, self.policy.floor, self._pinned(view), most)
        if self.residency.room is None:
            return pages
        number = self.ctx.xp.arange(most, dtype=self.ctx.xp.int64, device=self.ctx.device)
        spare = (self.residency.room + needs.AHEAD - 1) // needs.AHEAD  # the groups' `ahead_slots`
        return self.ctx.xp.where(number < spare, pages, -1)

    def look_up(self, use: Accesses) -> Served:
        """Which of a step's pages are here, and which of the missing ones `on_miss` loads."""
        slot = self.residency.lookup(use.pages)
        hit = slot >= 0
        return Served(use, slot, hit, self.to_fetch(use, (use.pages >= 0) & ~hit))

    def look_back(self, use: Accesses, attended: Array) -> Served:
        """The same of a step whose layers loaded what they missed: bool `attended` [G, n]."""
        slot = self.residency.lookup(use.pages)
        hit = slot >= 0
        return Served(use, slot, hit, attended & (use.pages >= 0) & ~hit)

    def to_fetch(self, use: Accesses, missing: Array) -> Array:
        """Which of the missing pages `on_miss` loads: bool [G, n]."""
        params = self.policy.params
        if params.on_miss == "fallback":
            return heaviest_missing(use, missing, params.fallback_above, params.fallback_below)
        return missing if params.on_miss == "fetch" else use.pages < -1

    def settle(self, step: int, served: Served) -> Moves | None:
        """End a step: let the policy see, and give slots to what was fetched.

        None where `on_miss` never loads.
        """
        if self.policy.observes:
            self.policy.observe(step, self._observation(served))
        if self.policy.params.on_miss == "mask":
            return None
        return self._admit(step, served.use.pages, served.fetched, served.slot)

    def _observation(self, served: Served) -> Observation:
        """What a server would know of the step: without all index keys, what is resident alone."""
        xp, use = self.ctx.xp, served.use
        mass = xp.where(served.attended, use.mass, 0.0)
        if self.needs.all_keys:
            return Observation(use.pages, use.count, mass, served.hit, served.fetched)
        pages = xp.where(served.hit, use.pages, -1)
        count = xp.where(served.hit, use.count, 0)
        return Observation(pages, count, mass, served.hit, served.fetched)

    def _admit(
        self, step: int, pages: Array, incoming: Array, in_use: Array | None = None
    ) -> Moves:
        """Slots for the `incoming` of pages [G, n]; the slots `in_use` are not taken."""
        moves = self.residency.admit(
            pages,
            incoming,
            lambda resident: self._ranked(step, self.policy.worth(step, resident)),
            self._pinned(),
            in_use,
        )
        return self._told(step, moves)

    def _ranked(self, step: int, worth: Array) -> Array:
        """The same worth, if it is of a type that can be ranked; a GPU is not waited for."""
        xp = self.ctx.xp
        if worth.dtype == xp.float32 or xp.isdtype(worth.dtype, "integral"):
            return worth
        raise PolicyError(
            f"policy {self.policy.name}, step {step}: worth has dtype {worth.dtype}; it must be"
            " float32 or an integer"
        )

    def _told(self, step: int, moves: Moves) -> Moves:
        """The same moves, once a policy that follows them was told."""
        if self.policy.watches:
            self.policy.moved(
                step, self._with_a_column(moves.pages), self._with_a_column(moves.out)
            )
        return moves

    def _with_a_column(self, pages: Array) -> Array:
        """`pages` [G, n], or one column of padding where n is 0, so that a policy may take the
        largest of a row.
        """
        if pages.shape[1]:
            return pages
        xp = self.ctx.xp
        return xp.full((self.ctx.n_groups, 1), -1, dtype=xp.int64, device=self.ctx.device)


def heaviest_missing(use: Accesses, missing: Array, above: float, below: float) -> Array:
    """Which missing pages to fetch: those that carry more than `above` of the step's mass, and
    further ones, heaviest first, until `below` of its selected entries (by count) are there; bool
    [G, n].

    The signal is one that a serving engine has: its native indexer scores every entry, so it knows
    which it selected and how much each of them matters, and the lookup table says which are
    resident. `use.mass` is the trace's attention mass; in an engine its indexer's softmax over the
    selection.
    """
    xp = array_namespace(missing)
    mass = xp.astype(
        xp.where(use.pages >= 0, use.mass, 0.0), xp.float64
    )  # sums of float16 are exact, so libraries agree
    heavy = missing & (mass > xp.sum(mass, axis=1, keepdims=True) * above)
    if not below:
        return heavy
    count = xp.astype(xp.where(use.pages >= 0, use.count, 0), xp.int64)
    present = xp.sum(xp.where(missing, 0, count), axis=1, keepdims=True)
    wanted = xp.ceil(xp.astype(xp.sum(count, axis=1, keepdims=True), xp.float64) * below)
    key = xp.where(missing, arrays.order_key(use.mass, xp.where(missing, use.pages, 0)), -1)
    order = xp.argsort(key, axis=1, descending=True)
    start = arrays.offsets(order, xp)
    sorted_count = xp.where(arrays.read(missing, start, order), arrays.read(count, start, order), 0)
    before = xp.cumulative_sum(sorted_count, axis=1) - sorted_count
    take = xp.zeros_like(missing)
    arrays.put(take, start, order, (present + before < wanted) & (sorted_count > 0))
    return take | heavy
