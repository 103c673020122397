"""The residency manager against a plain Python model of what it promises."""

import importlib

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
    moves = residency.admit(np.zeros((1, 0), np.int32), np.zeros((1, 0), bool), worth)
    assert moves.pages.shape == moves.slots.shape == moves.out.shape == (1, 0)
    assert (moves.loaded.tolist(), moves.evicted.tolist()) == ([0], [0])
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
    with np.errstate(all="raise"):
        assert residency.overlap(residency.present()).tolist() == [1.0]
    residency.choose(np.array([[1, 1, 1, 0]], np.float32), 1.0)
    earlier = residency.present()
    residency.choose(np.array([[0, 1, 1, 1]], np.float32), 1.0)
    assert residency.overlap(earlier).tolist() == [2 / 4]


class NaiveGroup:
    """One group in plain Python: a list of slots, each with a page or None."""

    def __init__(self, n_slots, in_order):
        self.slots, self.in_order = [None] * n_slots, in_order  # page p always in slot p

    def admit(self, incoming, worth, pinned, in_use):
        """-> loaded, evicted."""
        if self.in_order:
            for page in incoming:
                self.slots[page] = page
            return len(incoming), 0
        empty = [slot for slot, page in enumerate(self.slots) if page is None]
        full = [
            (worth[page], page, slot)
            for slot, page in enumerate(self.slots)
            if page is not None and page not in pinned and page not in in_use
        ]
        places = (empty + [slot for *_, slot in sorted(full)])[: len(incoming)]
        left = sum(self.slots[slot] is not None for slot in places)
        for page, slot in zip(incoming, places):
            self.slots[slot] = page
        return len(incoming), left + len(incoming) - len(places)

    def choose(self, worth, floor, pinned):
        """-> loaded, evicted."""
        fit = [page for page in range(len(worth)) if page in pinned or worth[page] >= floor]
        fit.sort(key=lambda page: (page in pinned, worth[page] if page not in pinned else 0, page))
        best = set(fit[::-1][: len(self.slots)])
        held = {page for page in self.slots if page is not None}
        self.slots = [page if page in best else None for page in self.slots]
        for page in sorted(best - held):
            self.slots[page if self.in_order else self.slots.index(None)] = page
        return len(best - held), len(held - best)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(2, PAGES), min_size=1, max_size=4),
    st.lists(st.sampled_from(["admit", "choose"]), min_size=1, max_size=8),
    st.integers(0, 2**32),
)
def test_groups_with_slots_of_their_own_match_a_naive_model(library, group_slots, calls, seed):
    """Slot for slot, whatever the library: closed slots stay empty, and none is counted."""
    if library == "torch":
        pytest.importorskip("torch", reason="the engine needs fmsim[model]")
    namespace = importlib.import_module(f"array_api_compat.{library}")
    rng, groups = np.random.default_rng(seed), len(group_slots)
    residency = Residency(groups, PAGES, group_slots, namespace)
    in_order = min(group_slots) == PAGES
    naive = [NaiveGroup(slots, in_order) for slots in group_slots]
    for call in calls:
        worth = rng.integers(0, 4, (groups, PAGES)).astype(np.float32)
        table = namespace.asarray(np.pad(worth, ((0, 0), (0, 1))))
        pinned = set(rng.choice(PAGES, 2, replace=False).tolist())
        is_pinned = lambda pages, pinned=pinned: sum(pages == page for page in pinned) > 0
        if call == "choose":
            newest = int(np.asarray(residency.slots).max())  # what is resident is visible
            n, floor = int(rng.integers(max(1, newest + 1), PAGES + 1)), float(rng.integers(0, 3))
            moves = residency.choose(namespace.asarray(worth[:, :n]), floor, is_pinned)
            expected = [group.choose(worth[g, :n], floor, pinned) for g, group in enumerate(naive)]
        else:
            width = int(rng.integers(1, PAGES + 1))
            pages = np.sort(np.argsort(rng.random((groups, PAGES)), axis=1)[:, :width], axis=1)
            slots = np.asarray(residency.lookup(namespace.asarray(pages)))
            moves = residency.admit(
                namespace.asarray(pages),
                namespace.asarray(slots < 0),
                lambda asked, table=table: read_table(namespace, table, asked),
                is_pinned,
                namespace.asarray(slots),
            )
            expected = [
                group.admit(pages[g][slots[g] < 0].tolist(), worth[g], pinned, set(pages[g]))
                for g, group in enumerate(naive)
            ]
        assert list(zip(moves.loaded.tolist(), moves.evicted.tolist())) == expected
        held = content(Numpy(residency))
        for g, group in enumerate(naive):
            closed = [-1] * (residency.n_slots - len(group.slots))
            found = [-1 if page is None else page for page in group.slots]
            assert np.asarray(residency.slots)[g].tolist() == found + closed
            assert held[g] == set(found) - {-1}


def read_table(namespace, table, pages):
    """table[g, pages[g, i]]; the last column for -1."""
    at = namespace.where(pages < 0, table.shape[1] - 1, pages)
    return namespace.take_along_axis(table, namespace.astype(at, namespace.int64), axis=1)


class Numpy:
    """A residency's arrays in numpy."""

    def __init__(self, residency):
        self.slots, self.table, self.filled = (
            np.asarray(part) for part in (residency.slots, residency.table, residency.filled)
        )


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_what_will_come_is_foreseen_by_each_groups_own_slots(library):
    """Slots for one page and for three, of four pages: the best one, and the best three."""
    if library == "torch":
        pytest.importorskip("torch", reason="the engine needs fmsim[model]")
    namespace = importlib.import_module(f"array_api_compat.{library}")
    residency = Residency(2, PAGES, (1, 3), namespace)
    worth = namespace.asarray(np.array([[3, 9, 5, 7]] * 2, np.float32))
    foreseen = residency.foresee(worth, None, None, 4)
    assert foreseen.tolist() == [[1, -1, -1, -1], [1, 2, 3, -1]]
    residency.choose(worth)
    assert residency.slots.tolist() == [[1, -1, -1], [1, 2, 3]]


def test_some_groups_of_a_whole_are_looked_at_as_if_they_were_alone():
    """Two slots and six pages beside three slots and twelve: of the second they see their own, and
    what the whole moves.
    """
    parts = [Residency(1, 6, 2, xp), Residency(1, PAGES, 3, xp)]
    for part, worth in zip(parts, (range(6), range(PAGES))):
        part.choose(np.array([worth], np.float32))
    whole = Residency.stacked(parts, [2, 3])
    assert whole.slots.tolist() == [[4, 5, -1], [9, 10, 11]]
    views = [whole.of_rows(slice(0, 1), 6, 2), whole.of_rows(slice(1, 2), PAGES, 3)]
    for view, part in zip(views, parts):
        assert view.slots.tolist() == part.slots.tolist() and content(view) == content(part)
        assert view.present().tolist() == part.present().tolist()
        assert view.room.tolist() == [[part.n_slots]]
        assert (view.n_groups, view.n_pages, view.n_slots) == (1, part.n_pages, part.n_slots)
        looked_up = view.lookup(np.array([[4, 5, 0, -1]]))
        assert looked_up.tolist() == part.lookup(np.array([[4, 5, 0, -1]])).tolist()
    whole.choose(-np.arange(PAGES, dtype=np.float32)[None].repeat(2, 0))
    assert [content(view) for view in views] == [[{0, 1}], [{0, 1, 2}]]
    ranked = np.array([[0, 1, 2, 9]], np.float32)
    # of their best two and three pages those that are not there
    foreseen = [view.foresee(ranked, None, None, 3).tolist() for view in views]
    assert foreseen == [[[2, 3, -1]], [[3, -1, -1]]]


@pytest.mark.parametrize("share", [0.0, 0.02, 0.7, 1.0])
def test_values_are_put_where_a_mask_says_so_in_numpy_as_in_torch(share):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(round(100 * share))
    table = rng.integers(0, 2**50, (3, 17))
    mask = rng.random((3, 17)) < share
    for values in (arrays.PROTECTED, rng.integers(-17, 0, (1, 17))):
        expected = np.where(mask, values, table)
        own = table.copy()
        assert arrays.replaced(own, mask, values) is own
        assert np.array_equal(own, expected)
        theirs = values if isinstance(values, int) else torch.tensor(values)
        found = arrays.replaced(torch.tensor(table), torch.tensor(mask), theirs)
        assert np.array_equal(found.numpy(), expected)
