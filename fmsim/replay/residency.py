"""Which page sits in which slot of GPU memory. Pure bookkeeping: no clock, no I/O, no policy.

The replay and the GPU engine use this same class, the one with numpy arrays and the other with
torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

from array_api_compat import is_numpy_array

from fmsim import arrays
from fmsim.errors import FmsimError

Array = Any


@dataclass(frozen=True)
class Moves:
    """Slots moved, int64 [G] each.

    A page that finds no slot passes through: it counts as loaded and as evicted.

    `pages` and `slots` [G, m] say where each incoming page went (-1 = padding): what an engine has
    to copy. `out` [G, k] are the pages that left their slots.
    """

    loaded: Array
    evicted: Array
    pages: Array
    slots: Array
    out: Array


class Residency:
    """G groups of S slots over P pages.

    slots int32 [G, S]: the page in each slot, or -1; table int32 [G, P + 1]: slot of the page, or
    -1 (last column: always -1).

    `n_slots` is S, or each group's own number: S is the most of any then, and the slots that a
    group lacks are closed. Nothing is ever put into them. `room` int64 [G, 1] are the groups'
    numbers, or None where they are alike.
    """

    def __init__(
        self,
        n_groups: int,
        n_pages: int,
        n_slots: int | Sequence[int],
        xp: Any,
        device: Any = None,
    ) -> None:
        if n_pages >= arrays.MAX_PAGES:
            raise FmsimError(
                f"{n_pages} pages are more than {arrays.MAX_PAGES}; use a larger granularity"
            )
        by_group = (n_slots,) * n_groups if isinstance(n_slots, int) else tuple(n_slots)
        self.n_groups, self.n_pages, self.n_slots, self.xp = n_groups, n_pages, max(by_group), xp
        self._least = min(by_group)  # slots of the group that has fewest
        self.room: Array | None = None
        if self._least < self.n_slots:
            self.room = xp.asarray(by_group, dtype=xp.int64, device=device)[:, None]
        self._slots = xp.full(
            (n_groups, self.n_slots + 1), -1, dtype=xp.int32, device=device
        )  # the last column is padding's
        self.table = xp.full((n_groups, n_pages + 1), -1, dtype=xp.int32, device=device)
        self._table_start = arrays.offsets(self.table, xp)
        self._slots_start = arrays.offsets(self._slots, xp)
        self.filled = xp.zeros((n_groups,), dtype=xp.int64, device=device)  # slots that hold a page
        self._slot_ids = xp.arange(self.n_slots + 1, dtype=xp.int64, device=device)[None, :]
        # bool [G, S + 1]: slots that a group lacks, padding's among them
        self._closed: Array | None = None if self.room is None else self._slot_ids >= self.room

    @classmethod
    def stacked(cls, parts: Sequence[Residency], by_group: Sequence[int]) -> Residency:
        """What `parts` hold, their groups one after another's; `by_group` are the slots of each."""
        first = parts[0]
        whole = cls(
            len(by_group),
            max(part.n_pages for part in parts),
            by_group,
            first.xp,
            first.table.device,
        )
        start = 0
        for part in parts:
            rows = slice(start, start + part.n_groups)
            whole._slots[rows, : part.n_slots] = part.slots
            whole.table[rows, : part.n_pages] = part.table[:, : part.n_pages]
            whole.filled[rows] = part.filled
            start = rows.stop
        return whole

    def of_rows(self, rows: slice, n_pages: int, n_slots: int) -> Residency:
        """Some groups, to look at: they share their memory with the whole, which moves pages."""
        part = copy(self)
        part._slots = self._slots[rows, : n_slots + 1]
        part.table = self.table[rows]
        part.filled = self.filled[rows]
        if self.room is not None:
            part.room = self.room[rows]
        part.n_groups, part.n_pages, part.n_slots = len(part.table), n_pages, n_slots
        part._table_start = arrays.offsets(part.table, self.xp)
        return part

    @property
    def slots(self) -> Array:
        """int32 [G, S], a view: the page in each slot, or -1 where it is empty or closed."""
        return self._slots[:, : self.n_slots]

    def lookup(self, pages: Array) -> Array:
        """Slot of each page [G, n], int32, or -1."""
        return arrays.read(self.table, self._table_start, pages)

    def present(self) -> Array:
        """bool [G, P], a new array: which pages are resident."""
        return self.table[:, : self.n_pages] >= 0

    def overlap(self, earlier: Array) -> Array:
        """Jaccard index of the present set with an `earlier` one (bool [G, P]), float64 [G]; 1
        where both are empty.
        """
        xp, now = self.xp, self.present()
        both = xp.sum(xp.astype(now & earlier, xp.float64), axis=1)
        either = xp.sum(xp.astype(now | earlier, xp.float64), axis=1)
        return xp.where(either > 0, both / xp.where(either > 0, either, 1), 1.0)

    def admit(
        self,
        pages: Array,
        incoming: Array,
        worth: Callable[[Array], Array],
        pinned: Callable[[Array], Array] | None = None,
        in_use: Array | None = None,
    ) -> Moves:
        """Bring in `pages` [G, n] where `incoming`, in place of the resident pages of least worth.

        worth(pages [G, S + 1]) is asked for the resident pages (-1 = none); pinned(pages) says
        which must stay, and the slots `in_use` [G, n] (-1 = none) must stay as well. Free slots go
        first. Where slots run out, the later pages pass through.
        """
        xp, n = self.xp, arrays.width(incoming, min(incoming.shape[1], self.n_slots))
        loaded = xp.sum(xp.astype(incoming, xp.int64), axis=1)
        if n == 0:
            nothing = xp.full((self.n_groups, 0), -1, dtype=xp.int64)
            return Moves(loaded, loaded, nothing, nothing, nothing)
        chosen = arrays.pack(pages, incoming, n)
        if self._least >= self.n_pages:  # every page has the slot of its own number
            return self._place(
                chosen, chosen, xp.full_like(chosen, -1), loaded, xp.zeros_like(loaded)
            )
        key = self._victim_key(worth, pinned, in_use)
        victims = arrays.smallest(key, n)
        enters = (chosen >= 0) & (arrays.read(key, self._slots_start, victims) < arrays.PROTECTED)
        old = xp.where(enters, arrays.read(self._slots, self._slots_start, victims), -1)
        left = xp.sum(xp.astype(old >= 0, xp.int64), axis=1)
        passed = loaded - xp.sum(xp.astype(enters, xp.int64), axis=1)
        return self._place(
            xp.where(enters, chosen, -1), xp.where(enters, victims, -1), old, loaded, left + passed
        )

    def choose(
        self,
        worth: Array,
        floor: float | None = None,
        pinned: Callable[[Array], Array] | None = None,
        among: Array | None = None,
    ) -> Moves:
        """Make the resident set the pages of highest worth among the first n, as many as a group
        has slots; worth [G, n].

        Pinned pages come first; others of less than `floor` stay out. Pages that stay keep their
        slots. `among` int64 [G, 1]: a group's own n, where that is less.
        """
        xp, n = self.xp, worth.shape[1]
        if n == 0:  # a prompt too short for one entry
            nothing = xp.full((self.n_groups, 0), -1, dtype=xp.int64, device=worth.device)
            none = xp.zeros_like(self.filled)
            return Moves(none, none, nothing, nothing, nothing)
        pages, keep = self._best(worth, floor, pinned, among)
        incoming = keep & (self.table[:, :n] < 0)
        out = self._drop(keep)
        evicted = xp.sum(xp.astype(out >= 0, xp.int64), axis=1)
        m = arrays.width(incoming, min(n, self.n_slots))
        chosen = arrays.pack(pages, incoming, m)
        places = (
            chosen
            if self._least >= self.n_pages
            else arrays.pack(self._slot_ids[:, : self.n_slots], self._empty(), m)
        )
        loaded = xp.sum(xp.astype(incoming, xp.int64), axis=1)
        moves = self._place(
            chosen, xp.where(chosen >= 0, places, -1), xp.full_like(chosen, -1), loaded, evicted
        )
        return replace(moves, out=out)

    def foresee(
        self, worth: Array, floor: float | None, pinned: Callable[[Array], Array] | None, most: int
    ) -> Array:
        """The first `most` pages that `choose` would bring in, int64 [G, most] padded with -1;
        pages without a worth yet count as resident.
        """
        pages, keep = self._best(worth, floor, pinned)
        return arrays.pack(
            pages, keep & (self.table[:, : worth.shape[1]] < 0) & (worth < float("inf")), most
        )

    def _best(
        self,
        worth: Array,
        floor: float | None,
        pinned: Callable[[Array], Array] | None,
        among: Array | None = None,
    ) -> tuple[Array, Array]:
        """The numbers of the first n pages, int64 [1, n], and which of them `choose` makes the
        resident set, bool [G, n].
        """
        xp, n = self.xp, worth.shape[1]
        pages = xp.arange(n, dtype=xp.int64, device=worth.device)[None, :]
        key = arrays.order_key(worth, pages)
        if floor is not None:
            key = xp.where(worth >= floor, key, -1)
        if pinned is not None:
            key = xp.where(pinned(pages), arrays.PROTECTED + pages, key)
        if among is not None:
            key = xp.where(pages < among, key, -1)
        keep = key >= 0
        if self._least < n:
            lowest = (
                arrays.nth_largest(key, self.n_slots)
                if self.room is None
                else arrays.nth_largest_of_each(key, self.room)
            )
            keep = keep & (key >= lowest)
        return pages, keep

    def _empty(self) -> Array:
        """bool [G, S]: slots that a page can be put into without giving one up."""
        empty = self.slots < 0
        return empty if self._closed is None else empty & ~self._closed[:, : self.n_slots]

    def _victim_key(
        self,
        worth: Callable[[Array], Array],
        pinned: Callable[[Array], Array] | None,
        in_use: Array | None,
    ) -> Array:
        """[G, S + 1] int64: slots in the order in which they are given up; empty ones first,
        PROTECTED ones never.
        """
        slots = self._slots
        empty = slots < 0
        key = arrays.order_key(worth(slots), slots)
        key = arrays.replaced(key, empty, self._slot_ids - self.n_slots)
        if pinned is not None:
            key = arrays.replaced(key, pinned(slots) & ~empty, arrays.PROTECTED)
        if in_use is not None:
            arrays.put(key, self._slots_start, in_use, arrays.PROTECTED)
        if self._closed is not None:
            key = arrays.replaced(key, self._closed, arrays.PROTECTED)
        key[:, self.n_slots] = arrays.PROTECTED
        return key

    def _drop(self, keep: Array) -> Array:
        """Empty the slots of pages outside keep [G, n]; returns these pages, [G, S], -1 = none."""
        xp = self.xp
        goes = (self.slots >= 0) & ~arrays.read(keep, arrays.offsets(keep, xp), self.slots)
        out = xp.where(goes, self.slots, -1)
        arrays.put(self.table, self._table_start, out, -1)
        self._slots[:, : self.n_slots] = xp.where(goes, -1, self.slots)
        return out

    def _place(
        self, pages: Array, slots: Array, old: Array, loaded: Array, evicted: Array
    ) -> Moves:
        """Put pages[g, i] into slots[g, i] in place of old[g, i] (-1 = padding), and book the rest
        of the arguments.
        """
        xp = self.xp
        arrays.put(self.table, self._table_start, old, -1)
        arrays.put(self._slots, self._slots_start, slots, xp.astype(pages, xp.int32))
        arrays.put(self.table, self._table_start, pages, xp.astype(slots, xp.int32))
        self.table[:, self.n_pages] = -1
        self._slots[:, self.n_slots] = -1
        self.filled += loaded - evicted
        return Moves(loaded, evicted, pages, slots, old)


class ResidentView:
    """`policies.base.Residents` of a residency."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency

    def look_at(self, residency: Residency) -> None:
        """From now on another, which holds the same."""
        self._residency = residency

    def has(self, pages: Array) -> Array:
        return self._residency.lookup(pages) >= 0

    @property
    def pages(self) -> Array:
        slots = self._residency.slots
        if is_numpy_array(slots):
            slots = slots.view()
            slots.flags.writeable = False
        return slots
