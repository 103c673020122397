"""The residency manager against a plain Python model of what it promises."""

import array_api_compat.numpy as xp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmsim import arrays
from fmsim.errors import FmsimError
from fmsim.replay.residency import Residency

PAGES = 12


def by_table(worth):
    """A worth function over pages from one row of numbers; padding reads the last."""
    table = np.append(np.asarray(worth, np.float32), 0)[None]
    return lambda pages: table[0][pages]


def content(residency):
    """What each group holds, and that slots and table tell the same story."""
    held = [set(row[row >= 0].tolist()) for row in residency.slots]
    for group, row in enumerate(residency.slots):
        assert len(held[group]) == (row >= 0).sum() == residency.filled[group]
        for slot, page in enumerate(row):
            assert page < 0 or residency.table[group, page] == slot
        assert (residency.table[group] >= 0).sum() == len(held[group])
    return held


def test_free_slots_go_first_then_the_least_worth():
    residency = Residency(1, PAGES, 3, xp)
    worth = by_table([5, 1, 7, 3, 9, 2, 0, 0, 0, 0, 0, 0])
    moves = residency.admit(np.array([[0, 1]], np.int32), np.array([[True, True]]), worth)
    assert content(residency) == [{0, 1}] and moves.evicted.tolist() == [0]
    moves = residency.admit(np.array([[2, 4]], np.int32), np.array([[True, True]]), worth)
    assert (
        content(residency) == [{0, 2, 4}]
        and moves.loaded.tolist() == [2]
        and moves.evicted.tolist() == [1]
    )
    assert moves.pages.tolist() == [[2, 4]] and residency.slots[0, moves.slots[0]].tolist() == [
        2,
        4,
    ]


def test_pages_in_use_and_pinned_stay_and_the_rest_pass_through():
    residency = Residency(1, PAGES, 3, xp)
    worth = by_table(np.zeros(PAGES))
    residency.admit(np.array([[0, 1, 2]], np.int32), np.ones((1, 3), bool), worth)
    used = residency.lookup(np.array([[1]]))
    moves = residency.admit(
        np.array([[5, 6]], np.int32), np.ones((1, 2), bool), worth, lambda pages: pages == 0, used
    )
    assert content(residency) == [{0, 1, 5}]
    assert moves.loaded.tolist() == [2] and moves.evicted.tolist() == [
        2
    ]  # page 2 left; page 6 came and went


def test_choose_takes_the_best_above_the_floor_and_pinned_pages():
    residency = Residency(1, PAGES, 4, xp)
    residency.admit(np.array([[3, 8]], np.int32), np.ones((1, 2), bool), by_table(np.zeros(PAGES)))
    worth = np.array([[0, 6, 5, 9, 0, 0, 2, 0, 1]], np.float32)
    moves = residency.choose(worth, floor=2.0, pinned=lambda pages: pages == 0)
    assert (
        content(residency) == [{0, 1, 2, 3}]
        and moves.loaded.tolist() == [3]
        and moves.evicted.tolist() == [1]
    )
    residency.choose(worth, floor=7.0)
    assert content(residency) == [{3}]


def test_more_pages_than_a_key_can_number_is_an_error():
    with pytest.raises(FmsimError, match="larger granularity"):
        Residency(1, arrays.MAX_PAGES, 4, xp)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=20))
def test_keys_order_as_worth_then_page(worth):
    worth, pages = np.array([worth], np.float32), np.arange(len(worth))[None]
    key = arrays.order_key(worth, pages)[0]
    expected = sorted(range(worth.size), key=lambda i: (worth[0, i], i))
    assert (
        np.argsort(key).tolist() == expected and (key >= 0).all() and (key < arrays.PROTECTED).all()
    )


step = st.tuples(
    st.lists(st.integers(0, PAGES - 1), unique=True, min_size=1, max_size=6),
    st.lists(st.integers(0, 3), min_size=PAGES, max_size=PAGES),
)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, PAGES), st.lists(st.tuples(step, step), min_size=1, max_size=8))
def test_admit_matches_a_plain_model(n_slots, steps):
    """Two groups; each step admits what is missing of its pages, and the hits stay."""
    residency, model = Residency(2, PAGES, n_slots, xp), [set(), set()]
    for pair in steps:
        width = max(len(asked) for asked, _ in pair)
        pages = np.array(
            [sorted(asked) + [-1] * (width - len(asked)) for asked, _ in pair], np.int32
        )
        table = np.array([[*worth, 0] for _, worth in pair], np.float32)
        before = [set(held) for held in model]
        slots = residency.lookup(pages)
        incoming = (pages >= 0) & (slots < 0)
        moves = residency.admit(
            pages,
            incoming,
            lambda asked, table=table: np.take_along_axis(table, asked, 1),
            None,
            slots,
        )
        for group, (asked, worth) in enumerate(pair):
            hits, misses = (
                model[group] & set(asked),
                [page for page in sorted(asked) if page not in model[group]],
            )
            for page in misses:
                if len(model[group]) == n_slots:
                    victims = sorted(
                        model[group] - hits - set(misses), key=lambda p, worth=worth: (worth[p], p)
                    )
                    if not victims:
                        continue
                    model[group].remove(victims[0])
                model[group].add(page)
            assert moves.loaded[group] == len(misses)
            assert moves.loaded[group] - moves.evicted[group] == len(model[group]) - len(
                before[group]
            )
        assert content(residency) == model


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, PAGES),
    st.lists(st.integers(0, 3), min_size=PAGES, max_size=PAGES),
    st.integers(0, 3),
    st.sets(st.integers(0, PAGES - 1)),
)
def test_choose_matches_a_plain_model(n_slots, worth, floor, resident):
    residency = Residency(1, PAGES, n_slots, xp)
    first = sorted(resident)[:n_slots]
    if first:
        residency.admit(
            np.array([first], np.int32), np.ones((1, len(first)), bool), by_table(np.zeros(PAGES))
        )
    places = {page: slot for slot, page in enumerate(residency.slots[0])}
    moves = residency.choose(np.array([worth], np.float32), floor)
    best = sorted(
        (page for page in range(PAGES) if worth[page] >= floor), key=lambda p: (worth[p], p)
    )[::-1][:n_slots]
    assert content(residency) == [set(best)]
    assert moves.loaded[0] == len(set(best) - set(first)) and moves.evicted[0] == len(
        set(first) - set(best)
    )
    assert all(
        residency.table[0, page] == places[page] for page in set(best) & set(first)
    )  # who stays keeps the slot


def test_overlap_is_the_jaccard_index():
    residency = Residency(1, PAGES, 4, xp)
    assert residency.overlap(residency.present()).tolist() == [1.0]
    residency.choose(np.array([[1, 1, 1, 0]], np.float32), 1.0)
    earlier = residency.present()
    residency.choose(np.array([[0, 1, 1, 1]], np.float32), 1.0)
    assert residency.overlap(earlier).tolist() == [2 / 4]
