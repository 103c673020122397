"""Policies that are queues, step by step against plain lists: one access a step, an empty cache to
start with.
"""

import numpy as np
import pytest
from hand_trace import HandTrace, stream
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fmsim.policies.clock import Clock
from fmsim.policies.fifo import FIFO
from fmsim.policies.lfu import LFU
from fmsim.policies.lru import LRU
from fmsim.policies.lruk import LRUK
from fmsim.policies.s3fifo import S3FIFO
from fmsim.policies.sieve import Sieve
from fmsim.replay.replayer import Replayer


class PlainClock:
    """The oldest goes; if it was used, it becomes the newest instead."""

    def __init__(self, slots):
        self.slots, self.queue, self.used = slots, [], set()

    def access(self, page):
        if page in self.queue:
            self.used.add(page)
            return True
        while len(self.queue) == self.slots:
            oldest = self.queue.pop(0)
            if oldest in self.used:
                self.used.remove(oldest)
                self.queue.append(oldest)
        self.queue.append(page)
        return False


class PlainSieve:
    """A hand goes from the oldest to the newest, takes marks, and evicts where there is none."""

    def __init__(self, slots):
        self.slots, self.queue, self.used, self.hand = slots, [], set(), 0

    def access(self, page):
        if page in self.queue:
            self.used.add(page)
            return True
        if len(self.queue) == self.slots:
            while self.queue[self.hand % self.slots] in self.used:
                self.used.remove(self.queue[self.hand % self.slots])
                self.hand += 1
            self.hand %= self.slots
            del self.queue[self.hand]
            if self.hand == len(self.queue):  # it was the newest: start again
                self.hand = 0
        self.queue.append(page)
        return False


class PlainS3FIFO:
    def __init__(self, slots, small_share=0.1, ghost_share=0.9, uses_to_stay=2):
        self.slots, self.uses_to_stay = slots, uses_to_stay
        self.small_size = max(1, int(slots * small_share))
        self.main_size = slots - self.small_size
        self.n_ghosts = max(1, int(slots * ghost_share))
        self.small, self.main, self.ghosts, self.uses = [], [], [], {}
        self.evicted = False

    def access(self, page):
        if page in self.uses:
            self.uses[page] = min(3, self.uses[page] + 1)
            return True
        known = page in self.ghosts
        if known:
            self.ghosts.remove(page)
        if len(self.uses) == self.slots:
            self.evicted = True
            victim = self._of_small() if len(self.main) <= self.main_size else None
            del self.uses[self._of_main() if victim is None else victim]
        filled = not self.evicted and len(self.small) >= self.small_size
        (self.main if known or filled else self.small).append(page)
        self.uses[page] = 0
        return False

    def _of_small(self):
        while self.small:
            page = self.small.pop(0)
            if self.uses[page] < self.uses_to_stay:
                self.ghosts = [*self.ghosts, page][-self.n_ghosts :]
                return page
            self.main.append(page)
            self.uses[page] = 0
        return None

    def _of_main(self):
        while True:
            page = self.main.pop(0)
            if not self.uses[page]:
                return page
            self.uses[page] -= 1
            self.main.append(page)


class PlainRank:
    """Evicts the page whose rank, made of its uses since it came, is least."""

    def __init__(self, slots, rank):
        self.slots, self.rank, self.uses, self.step = slots, rank, {}, 0

    def access(self, page):
        self.step += 1
        hit = page in self.uses
        if not hit and len(self.uses) == self.slots:
            del self.uses[min(self.uses, key=lambda each: self.rank(self.uses[each]))]
        self.uses.setdefault(page, []).append(self.step)
        return hit


PAIRS = {
    "clock": (Clock, PlainClock),
    "sieve": (Sieve, PlainSieve),
    "s3fifo": (S3FIFO, PlainS3FIFO),
    "lru": (LRU, lambda slots: PlainRank(slots, lambda uses: uses[-1])),
    "fifo": (FIFO, lambda slots: PlainRank(slots, lambda uses: uses[0])),
    "lfu": (LFU, lambda slots: PlainRank(slots, lambda uses: (len(uses), uses[-1]))),
    "lruk": (
        LRUK,
        lambda slots: PlainRank(
            slots, lambda uses: (len(uses) > 1, uses[-2] if len(uses) > 1 else uses[0])
        ),
    ),
}


def hits(policy, entries, n_entries):
    ledger = Replayer(stream(entries, n_entries), cold=True).run(policy)
    return [bool(n) for n in ledger.hit[:, 0]]


@pytest.mark.parametrize("name", PAIRS)
@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 11), min_size=1, max_size=120), st.integers(1, 10))
def test_every_hit_is_that_of_a_plain_list(name, entries, slots):
    ours, plain = PAIRS[name]
    cache = plain(slots)
    expected = [cache.access(entry) for entry in entries]
    assert hits(ours(budget=f"{slots} entries"), entries, 12) == expected


@pytest.mark.parametrize("name", ["clock", "sieve", "s3fifo", "lru", "fifo"])
@example([0, 1, 0], 2)  # 0 evicts 10, and 1 evicts 11, though the text has 0 before both
@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 11), min_size=1, max_size=120), st.integers(1, 10))
def test_a_decode_begins_with_the_prompts_end_as_if_it_had_come_page_by_page(name, entries, slots):
    ours, plain = PAIRS[name]
    cache = plain(slots)
    for entry in range(12 - slots, 12):
        assert not cache.access(entry)
    expected = [cache.access(entry) for entry in entries]
    ledger = Replayer(stream(entries, 12)).run(ours(budget=f"{slots} entries"))
    assert [bool(n) for n in ledger.hit[:, 0]] == expected


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 19), min_size=1, max_size=200),
    st.integers(1, 16),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([0.1, 0.25, 0.5, 0.9]),
    st.sampled_from([0.1, 0.5, 2.0]),
)
def test_s3fifo_of_any_shares_is_its_plain_lists(entries, slots, uses, small, ghosts):
    shares = {"small_share": small, "ghost_share": ghosts, "uses_to_stay": uses}
    cache = PlainS3FIFO(slots, **shares)
    expected = [cache.access(entry) for entry in entries]
    assert hits(S3FIFO(budget=f"{slots} entries", **shares), entries, 20) == expected


def test_s3fifo_remembers_no_more_pages_than_there_are():
    entries = np.random.default_rng(0).integers(0, 20, 300).tolist()
    found = [
        hits(S3FIFO(budget="5 entries", ghost_share=share), entries, 20)
        for share in (4.0, 1e6, 1e308)
    ]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=120), st.integers(1, 8))
def test_the_kth_last_use_counts(k, entries, slots):
    cache = PlainRank(slots, lambda uses: (len(uses) >= k, uses[-k] if len(uses) >= k else uses[0]))
    expected = [cache.access(entry) for entry in entries]
    assert hits(LRUK(budget=f"{slots} entries", k=k), entries, 10) == expected


@pytest.mark.parametrize("name", ["clock", "sieve", "s3fifo"])
@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=60))
def test_layers_are_queues_of_their_own(name, steps):
    """Two layers with accesses of their own hit as each alone does."""
    ours, plain = PAIRS[name]
    trace = HandTrace([[[first], [second]] for first, second in steps], prompt_entries=8)
    found = Replayer(trace, cold=True).run(ours(budget="4 entries")).hit
    for layer in range(2):
        cache = plain(4)
        assert [bool(n) for n in found[:, layer]] == [cache.access(step[layer]) for step in steps]


@pytest.mark.parametrize(
    ("slots", "small", "uses"),
    [(6, 0.5, 1), (10, 0.9, 1), (10, 0.9, 2), (5, 0.25, 1), (12, 0.5, 3)],
)
def test_s3fifo_where_many_pages_are_used_often(slots, small, uses):
    """Main queues of pages that all have uses left, beside ripe ones that wait to join them."""
    random = np.random.default_rng(slots)
    often = random.integers(0, slots + 2, 900)
    entries = np.where(random.random(900) < 0.2, random.integers(0, 30, 900), often).tolist()
    shares = {"small_share": small, "uses_to_stay": uses}
    cache = PlainS3FIFO(slots, **shares)
    expected = [cache.access(entry) for entry in entries]
    assert hits(S3FIFO(budget=f"{slots} entries", **shares), entries, 30) == expected
