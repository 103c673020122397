"""LRU's misses at every budget from one pass over a trace.

Source: Mattson, Gecsei, Slutz, Traiger, "Evaluation techniques for storage hierarchies", IBM
Systems Journal 9(2), 1970: where a larger cache always holds what a smaller one does, the contents
of all sizes are one list, of which a cache of S pages holds the first S. A page found at position d
(from 0) is a hit for every S > d and a miss for the others.

What is replayed is `policies/lru.py` as the decode loop drives it: all pages of a step at once,
pages that begin during decode written on the GPU, and the page that is still being filled pinned
there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fmsim.policies.lru import STEP_BITS
from fmsim.replay.paging import Paged


class Course(NamedTuple):
    """How the pages of one run come to be, for all groups alike."""

    granularity: int
    prompt_entries: int
    entries: list[int]  # visible at each step

    def pages(self, n_entries: int) -> int:
        return -(-n_entries // self.granularity)

    def open_page(self, n_entries: int) -> int:
        """The page that is still being filled, or -1."""
        return n_entries // self.granularity if n_entries % self.granularity else -1


def least_slots(paged: Paged, course: Course) -> int:
    """From how many slots on distances mean misses: a step's own pages must fit, beside the open
    one.
    """
    return int((paged.pages >= 0).sum(axis=2).max()) + (course.granularity > 1)


def distances(paged: Paged, course: Course) -> np.ndarray:
    """[T, G, n] int32: the position at which each of `paged.pages` was found, from 0; -1 where that
    is padding.
    """
    found: np.ndarray = np.full(paged.pages.shape, -1, dtype=np.int32)
    for group in range(found.shape[1]):
        stack = _Stack(paged.n_pages, course)
        for step, pages in enumerate(paged.pages[:, group]):
            stack.see(step)
            n = int((pages >= 0).sum())
            found[step, group, :n] = stack.use(step, pages[:n])
    return found


class _Stack:
    """The list of one group: sorted by last use, but for the open page, and for one that has just
    closed.

    A closed page has the place of its last use only once a miss has let other pages pass it; until
    then it is `loose`.
    """

    def __init__(self, n_pages: int, course: Course) -> None:
        self.course = course
        self.visible = course.pages(course.prompt_entries)
        self.stack = np.arange(self.visible - 1, -1, -1, dtype=np.int32)
        self.used = np.zeros(n_pages, dtype=np.int64)
        self.comes_up = np.zeros(n_pages, dtype=bool)
        self.pinned, self.loose = course.open_page(course.prompt_entries), -1

    def see(self, step: int) -> None:
        """The step's entries are visible: pages close, and begin."""
        open_page = self.course.open_page(self.course.entries[step])
        if self.pinned not in (-1, open_page):
            self.loose = self.pinned
        self.pinned = open_page
        visible = self.course.pages(self.course.entries[step])
        for page in range(self.visible, visible):
            self._settle(len(self.stack))
            self.used[page] = ((step + 1) << STEP_BITS) - 1
            self.stack = np.concatenate((np.array([page], dtype=np.int32), self.stack))
        self.visible = visible

    def use(self, step: int, pages: np.ndarray) -> np.ndarray:
        """Positions of `pages` (ascending), which then come to the front; the open page stays right
        behind them.
        """
        position = np.empty(len(pages), dtype=np.int32)
        if not len(pages):
            return position
        self.comes_up[pages] = True
        at = np.flatnonzero(self.comes_up[self.stack])
        position[np.searchsorted(pages, self.stack[at])] = at
        depth = int(at[-1])
        self.loose = -1 if self.loose in pages else self.loose
        self._settle(depth)
        self.used[pages] = ((step + 1) << STEP_BITS) + (self.used[pages] >> STEP_BITS)
        front = pages[np.lexsort((pages, self.used[pages]))[::-1]]
        if self.pinned >= 0 and self.pinned not in pages:
            front = np.append(front, np.int32(self.pinned))
            depth = max(depth, int(np.flatnonzero(self.stack == self.pinned)[0]))
        self.comes_up[front] = True
        upper = self.stack[: depth + 1]
        self.stack[: depth + 1] = np.concatenate((front, upper[~self.comes_up[upper]]))
        self.comes_up[front] = False
        return position

    def _settle(self, depth: int) -> None:
        """Let the loose page sink to the place of its last use, but no deeper than `depth`: what
        missed passes it only that far. It is the newest page, so of equals it stays above.
        """
        if self.loose < 0:
            return
        at = int(np.flatnonzero(self.stack == self.loose)[0])
        behind = self.stack[at + 1 : depth + 1]
        passed = int((self.used[behind] > self.used[self.loose]).sum())
        self.stack[at : at + passed + 1] = np.append(behind[:passed], self.loose)
        if passed < len(behind) or depth >= len(self.stack):
            self.loose = -1


def distances_plain(paged: Paged, course: Course) -> np.ndarray:
    """The same by Mattson's definition: each reference walks the list, and at every position the
    page of higher priority stays.
    """
    found: np.ndarray = np.full(paged.pages.shape, -1, dtype=np.int32)
    for group in range(found.shape[1]):
        visible = course.pages(course.prompt_entries)
        used = dict.fromkeys(range(paged.n_pages), 0)
        stack = list(range(visible))[::-1]
        for step, row in enumerate(paged.pages[:, group].tolist()):
            pages = [page for page in row if page >= 0]
            protected = {course.open_page(course.entries[step])}
            priority = lambda page: (page in protected, used[page], page)
            for page in range(visible, visible := course.pages(course.entries[step])):
                used[page] = ((step + 1) << STEP_BITS) - 1
                _reference(stack, page, priority)
            found[step, group, : len(pages)] = [stack.index(page) for page in pages]
            protected |= set(pages)
            for page in sorted(pages, key=stack.index):
                _reference(stack, page, priority)
            used |= {page: ((step + 1) << STEP_BITS) + (used[page] >> STEP_BITS) for page in pages}
    return found


def _reference(
    stack: list[int], page: int, priority: Callable[[int], tuple[bool, int, int]]
) -> None:
    """`page` comes to the front; whoever loses a place to it is carried down, past those of higher
    priority, to where it was.
    """
    depth = stack.index(page) if page in stack else len(stack)
    stack[depth : depth + 1] = []
    carried = page
    for place in range(depth):
        if place == 0 or priority(carried) > priority(stack[place]):
            stack[place], carried = carried, stack[place]
    stack.insert(depth, carried)
