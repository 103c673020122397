"""A trace's selected entries, seen by pages: what every policy of one granularity and scope
replays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from fmsim import arrays

Array = Any

CHUNK_STEPS = 64  # bounds the temporaries


@dataclass(frozen=True)
class Accesses:
    """What one step's native indexer selected, by page: [G, n], pages int32 unique in a row, -1 =
    padding.
    """

    pages: Array
    count: Array  # int32: entries selected in the page
    mass: Array  # float32: attention mass on them


@dataclass(frozen=True)
class Paged:
    """T steps, G groups, at most n pages a step and group; -1 = padding."""

    pages: np.ndarray  # [T, G, n] int32, ascending and unique in a row
    count: np.ndarray  # [T, G, n] int32: entries selected in the page
    mass: np.ndarray  # [T, G, n] float32: attention mass on them
    # [T, L, K] int32: where each entry's page stands in its row; None where it is the same place
    column: np.ndarray | None
    n_pages: int

    def by_entry(self, flag: np.ndarray, layers: int) -> np.ndarray:
        """Spread flags of pages, bool [t, G, n] of the first t steps, over entries: [t, L, K].

        Padding's are meaningless.
        """
        if self.column is None:
            return flag
        steps, _, k = self.column.shape[0], *self.column.shape[1:]
        wide = np.take_along_axis(
            flag.reshape(steps, -1, flag.shape[-1]),
            self.column.reshape(steps, flag.shape[1], -1),
            axis=2,
        )
        return wide.reshape(steps, layers, k)


class PagedFuture:
    """`policies.base.Future` over a Paged trace, in the arrays that `there` makes of numpy's."""

    def __init__(self, paged: Paged, there: Callable[[np.ndarray], Any] = lambda array: array):
        self.paged = paged
        self.there = there
        self.never = len(paged.pages)

    def window(self, step: int, horizon: int) -> tuple[Any, Any]:
        paged, steps = self.paged, slice(step, step + horizon)
        groups = paged.pages.shape[1]
        at = np.where(paged.pages[steps] < 0, paged.n_pages, paged.pages[steps])
        at = (at + (np.arange(groups) * (paged.n_pages + 1))[:, None]).reshape(-1)
        size = groups * (paged.n_pages + 1)
        # float64 sums of float16 masses are exact, so their order does not matter
        mass = np.bincount(at, weights=paged.mass[steps].reshape(-1), minlength=size).astype(
            np.float32
        )
        used = np.zeros(size, dtype=bool)
        used[at] = True
        mass, used = (part.reshape(groups, -1)[:, :-1] for part in (mass, used))
        return self.there(mass), self.there(used)

    def first_use(self) -> Any:
        return self.there(self._next[1])

    def next_use(self, step: int) -> Any:
        return self.there(self._next[0][step])

    @cached_property
    def _next(self) -> tuple[np.ndarray, np.ndarray]:
        """Backwards through the trace: next use of each access [T, G, n], and first use of each
        page [G, P].
        """
        pages = self.paged.pages
        start = (np.arange(pages.shape[1]) * (self.paged.n_pages + 1))[:, None]
        table = np.full(pages.shape[1] * (self.paged.n_pages + 1), self.never, dtype=np.int32)
        later = np.empty_like(pages)
        for step in range(len(pages) - 1, -1, -1):
            at = np.where(pages[step] < 0, self.paged.n_pages, pages[step]) + start
            later[step] = table[at]
            table[at] = step
        return later, table.reshape(pages.shape[1], -1)[:, :-1]


def read_trace(trace: Any) -> tuple[np.ndarray, np.ndarray]:
    """(entry ids int32, mass float32), both [T, L, K]; mass 0 where the id is -1, and everywhere
    where the trace has none.
    """
    ids = np.ascontiguousarray(trace.entry_ids, dtype=np.int32)
    if trace.mass is None:  # a capture: no array of zeros is made
        return ids, np.broadcast_to(np.float32(0), ids.shape)
    mass = np.ascontiguousarray(trace.mass, dtype=np.float32)
    if (ids < 0).any():
        mass = np.where(ids < 0, np.float32(0), mass)
    return ids, mass


def page_trace(
    ids: np.ndarray, mass: np.ndarray, granularity: int, shared: bool, n_pages: int
) -> Paged:
    """Group `ids` [T, L, K] (sorted, unique in a row, -1 = padding) by page, over all layers where
    they share.
    """
    if granularity == 1 and not shared:
        return Paged(ids, np.broadcast_to(np.int32(1), ids.shape), mass, None, n_pages)
    steps, layers, k = ids.shape
    groups, m = (1, layers * k) if shared else (layers, k)
    parts = [
        _page_rows(
            ids[i : i + CHUNK_STEPS].reshape(-1, m) // granularity,
            mass[i : i + CHUNK_STEPS].reshape(-1, m),
        )
        for i in range(0, steps, CHUNK_STEPS)
    ]
    n = max(part[0].shape[1] for part in parts)
    pages, count, weight = (
        np.concatenate(
            [
                np.pad(part[i], ((0, 0), (0, n - part[i].shape[1])), constant_values=fill)
                for part in parts
            ]
        ).reshape(steps, groups, n)
        for i, fill in ((0, -1), (1, 0), (2, 0))
    )
    column = np.concatenate([part[3] for part in parts]).reshape(steps, layers, k)
    return Paged(pages, count, weight, column, n_pages)


def _page_rows(
    keys: np.ndarray, mass: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows [R, m] of page ids (negative = padding) -> pages, count, mass [R, n], and column [R, m]
    of each key.
    """
    order = np.argsort(keys, axis=1, kind="stable")
    ranked = np.take_along_axis(keys, order, axis=1)
    first = ranked >= 0
    first[:, 1:] &= ranked[:, 1:] != ranked[:, :-1]
    n = max(1, int(first.sum(axis=1).max()))
    at = np.cumsum(first, axis=1) - 1
    at = np.where(ranked < 0, n, at)
    rows = np.arange(len(keys))[:, None] * (n + 1)
    pages = np.full((len(keys), n + 1), -1, dtype=np.int32)
    pages.reshape(-1)[at + rows] = ranked
    flat = (at + rows).reshape(-1)
    count = np.bincount(flat, minlength=pages.size).reshape(pages.shape).astype(np.int32)
    weight = np.bincount(
        flat, weights=np.take_along_axis(mass, order, axis=1).reshape(-1), minlength=pages.size
    )
    column = np.empty(keys.shape, dtype=np.int32)
    np.put_along_axis(column, order, np.minimum(at, n - 1).astype(np.int32), axis=1)
    return pages[:, :n], count[:, :n], weight.astype(np.float32).reshape(pages.shape)[:, :n], column


def page_step(ids: Any, mass: Any, granularity: int, shared: bool) -> Accesses:
    """One step's `ids` [L, K] (unique in a row, -1 = padding) and their mass, by page: as
    `page_trace`, in any library.

    Rows are as wide as they could be, K or L x K. Sums of float16 masses are exact, so they do not
    depend on the order.
    """
    xp = array_namespace(ids)
    if granularity == 1 and not shared:  # an entry is a page
        return Accesses(
            xp.astype(ids, xp.int32), xp.astype(ids >= 0, xp.int32), xp.where(ids < 0, 0.0, mass)
        )
    if shared:
        ids, mass = xp.reshape(ids, (1, -1)), xp.reshape(mass, (1, -1))
    return page_rows(ids, mass, granularity)


def page_rows(ids: Any, mass: Any, granularity: int) -> Accesses:
    """The same of rows [G, n], in which an entry may come several times."""
    xp = array_namespace(ids)
    beyond = arrays.MAX_PAGES
    pages = xp.where(ids < 0, beyond, xp.astype(ids, xp.int64) // granularity)
    order = xp.argsort(pages, axis=1, stable=True)
    start, width = arrays.offsets(pages, xp), pages.shape[1]
    pages = arrays.read(pages, start, order)
    summed = xp.cumulative_sum(xp.astype(arrays.read(mass, start, order), xp.float64), axis=1)
    last = pages < beyond
    last[:, :-1] &= pages[:, 1:] != pages[:, :-1]
    at = arrays.pack(
        xp.arange(width, dtype=xp.int64, device=ids.device)[None, :], last, width
    )  # where each page's run ends
    before = xp.concat((xp.full_like(at[:, :1], -1), at[:, :-1]), axis=1)
    none = at < 0
    to_here, to_before = (
        xp.where(place < 0, 0.0, arrays.read(summed, start, place)) for place in (at, before)
    )
    return Accesses(
        pages=xp.astype(xp.where(none, -1, arrays.read(pages, start, at)), xp.int32),
        count=xp.astype(xp.where(none, 0, at - before), xp.int32),
        mass=xp.astype(xp.where(none, 0.0, to_here - to_before), xp.float32),
    )


def page_mass(mass: np.ndarray, granularity: int, n_pages: int, shared: bool) -> np.ndarray:
    """Mass of entries float [L, E] -> of pages, float32 [G, n_pages]; entries beyond are left
    out.
    """
    mass = np.asarray(mass, dtype=np.float64)[:, : n_pages * granularity]
    mass = np.pad(mass, ((0, 0), (0, n_pages * granularity - mass.shape[1])))
    mass = mass.reshape(len(mass), n_pages, granularity).sum(axis=2)
    return (mass.sum(axis=0, keepdims=True) if shared else mass).astype(np.float32)
