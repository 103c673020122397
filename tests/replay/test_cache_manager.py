"""What a policy sees and can say: moves, residents, prefetches, and what a server would know."""

from types import SimpleNamespace

import numpy as np
import pytest
from hand_trace import HandTrace
from hypothesis import given, settings
from hypothesis import strategies as st
from tapered import Tapered

from fmsim.errors import FmsimError
from fmsim.policies.base import Context, Pins, Policy
from fmsim.policies.lru import LRU
from fmsim.replay.cache_manager import CacheManager
from fmsim.replay.context import RequestShape, build_context
from fmsim.replay.paging import Accesses
from fmsim.replay.replayer import Replayer
from fmsim.testing import sample_trace


class Shadow(LRU):
    """LRU that rebuilds the resident set from what it is told."""

    name = "shadow"

    def reset(self, ctx):
        super().reset(ctx)
        self.known = [set() for _ in range(ctx.n_groups)]

    def moved(self, step, loaded, evicted):
        for group, (came, left) in enumerate(zip(loaded, evicted)):
            gone = set(left[left >= 0].tolist())
            assert gone <= self.known[group]
            self.known[group] -= gone
            new = set(came[came >= 0].tolist())
            assert not new & self.known[group]
            self.known[group] |= new
        for group, pages in enumerate(self.ctx.residents.pages):
            assert set(pages[pages >= 0].tolist()) == self.known[group]


@settings(max_examples=30, deadline=None)
@given(
    budget=st.sampled_from(["4 entries", "20 entries", "10%", "100%"]),
    scope=st.sampled_from(["per_layer", "shared"]),
    granularity=st.sampled_from([1, 4]),
    cadence=st.sampled_from([1, 16]),
    on_miss=st.sampled_from(["fetch", "mask", "fallback"]),
)
def test_moves_tell_the_resident_set(budget, scope, granularity, cadence, on_miss):
    """After every change, all that was told adds up to what is resident."""
    trace = sample_trace(prompt_tokens=400, n_steps=40)
    policy = Shadow(
        budget=budget,
        scope=scope,
        granularity=granularity,
        cadence=cadence,
        on_miss=on_miss,
        sees="all",
    )

    def watch(manager):
        for group, pages in enumerate(manager.residency.slots):
            assert set(pages[pages >= 0].tolist()) == policy.known[group]

    Replayer(trace).run(policy, watch)


def test_residents_answer_for_any_page():
    seen = []

    class Asks(LRU):
        name = "asks"

        def observe(self, step, obs):
            super().observe(step, obs)
            pages = np.array([[0, 1, 2, -1]])
            seen.append(self.ctx.residents.has(pages)[0].tolist())

    Replayer(HandTrace([[[1]], [[2]]], still=True), cold=True).run(Asks(budget="1 entries"))
    assert seen == [[False] * 4, [False, True, False, False]]


class Sees(LRU):
    """LRU that notes which pages it is shown."""

    name = "sees"

    def reset(self, ctx):
        super().reset(ctx)
        self.shown = []

    def observe(self, step, obs):
        super().observe(step, obs)
        self.shown.append(sorted(obs.pages[obs.pages >= 0].tolist()))
        assert obs.count[obs.pages < 0].sum() == 0  # of what is not shown nothing is counted


@pytest.mark.parametrize(("sees", "shown"), [("resident", [[], [], []]), ("all", [[1], [2], [1]])])
def test_who_masks_is_shown_residents_unless_it_keeps_all_keys(sees, shown):
    policy = Sees(budget="1 entries", on_miss="mask", sees=sees)
    ledger = Replayer(HandTrace([[[1]], [[2]], [[1]]], still=True), cold=True).run(policy)
    assert policy.shown == shown
    used = policy.used[0, :-1].tolist()  # of what is not shown nothing is learnt
    assert any(used) == (sees == "all") and used[3:] == [0] * 5
    assert ledger.all_keys is (sees == "all")


class Fetches(LRU):
    """Loads the next entry that the trace will ask for, one step ahead."""

    name = "fetches"

    def prefetch(self, step):
        return np.array([[step + 1]])


def test_a_prefetch_comes_before_the_step_and_costs_no_miss():
    trace = HandTrace([[[1]], [[2]], [[3]]], still=True)
    ledger = Replayer(trace, cold=True).run(Fetches(budget="2 entries"))
    assert ledger.hit[:, 0].tolist() == [1, 1, 1]
    assert ledger.lookahead_loads[:, 0].tolist() == [1, 1, 1]
    assert ledger.demand_loads.sum() == 0


@pytest.mark.parametrize("asked", [6, 7, 8])
def test_what_is_there_or_not_visible_yet_is_not_prefetched(asked):
    """6 and 7, the newest of eight, are there; 8 closes at step 3."""

    class Asks(LRU):
        name = "asks-for-one"

        def prefetch(self, step):
            return np.array([[asked]]) if step < 3 else None

    trace = HandTrace([[[7]]] * 4, prompt_entries=8, still=False)
    ledger = Replayer(trace).run(Asks(budget="2 entries"))
    assert ledger.lookahead_loads.sum() == ledger.demand_loads.sum() == 0
    assert ledger.written[:, 0].tolist() == [0, 0, 0, 1]


def test_a_masked_page_is_not_attended_to_though_it_is_the_first():
    trace = HandTrace([[[0, 7]]], masses=[[[0.5, 0.25]]], prompt_entries=8)
    ledger = Replayer(trace).run(LRU(budget="2 entries", on_miss="mask"))
    assert (ledger.mass_kept.tolist(), ledger.heaviest_lost.tolist()) == ([[0.25]], [[0.5]])


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (np.array([[1, 1]]), "asks for a page twice"),
        (np.array([1]), "shape"),
        (np.array([[0.5]]), "array of integers"),
        ([[1]], "array of integers"),
    ],
)
def test_a_prefetch_that_is_none_is_told(answer, says):
    class Wrong(LRU):
        name = "wrong"

        def prefetch(self, step):
            return answer

    with pytest.raises(FmsimError, match=f"policy wrong, step 0: prefetch .*{says}"):
        Replayer(HandTrace([[[1]]])).run(Wrong())


def test_what_a_policy_is_handed_cannot_be_written_to():
    class Writes(LRU):
        name = "writes"

        def observe(self, step, obs):
            obs.hit[:] = True

    with pytest.raises(FmsimError, match="policy writes, step 0: observe raised ValueError"):
        Replayer(HandTrace([[[1]]])).run(Writes())

    class WritesSlots(LRU):
        name = "writes_slots"

        def moved(self, step, loaded, evicted):
            self.ctx.residents.pages[:] = 0

    with pytest.raises(FmsimError, match="policy writes_slots, step 0: moved raised ValueError"):
        Replayer(HandTrace([[[1]]])).run(WritesSlots())


def test_a_worth_in_float64_is_refused():
    class Wide(Policy):
        name = "wide"
        action = "evict"
        evidence = "position"
        decision_scope = "layer"

        def worth(self, step, pages):
            return np.zeros(pages.shape)

    with pytest.raises(FmsimError, match="worth has dtype float64; it must be float32"):
        Replayer(HandTrace([[[1]]])).run(Wide())


@pytest.mark.parametrize(
    ("pins", "n_entries", "view"),
    [
        # Pages of four entries; the prompt's ten fill two of them.
        (Pins(), 12, (3, 3)),
        (Pins(), 13, (4, 3)),  # the page that is being filled
        (Pins(recent=1), 13, (4, 3)),
        (Pins(recent=3), 12, (3, 0)),
        (Pins(recent=2), 13, (4, 2)),
        (Pins(decoded=True), 12, (3, 2)),
        (Pins(decoded=True), 33, (9, 2)),
        (Pins(recent=2, decoded=True), 12, (3, 1)),
        (Pins(recent=1, decoded=True), 17, (5, 2)),
    ],
)
def test_what_is_visible_and_where_its_pinned_tail_begins(pins, n_entries, view):
    ctx = Context(1, 1, 12, 6, 4, 10, 2, 16, tau=4)
    assert CacheManager._view(SimpleNamespace(ctx=ctx, pins=pins), n_entries) == view


class Ahead(Policy):
    """Keeps the highest pages, and will keep the lowest."""

    name = "ahead"
    action, evidence, decision_scope = "hierarchical", "position", "layer"

    @property
    def decides_ahead(self):
        return True

    def layer_shares(self, n_layers):
        return [2.0, 1.0]

    def worth(self, step, pages):
        return pages.astype(np.float32)

    def ahead(self, step, n):
        return -np.broadcast_to(np.arange(n, dtype=np.float32), (2, n)).copy()


def test_what_a_decision_will_recall_is_foreseen_as_far_as_each_layer_has_spare_slots():
    """Eight slots for two layers, one each for what is being filled: five and three. They hold
    pages 7 to 11, and 9 to 11; 0 to 4, and 0 to 2, will be best. A spare slot for every four:
    two, and one.
    """
    seen = []

    def watch(manager):
        if not seen:
            slots = manager.residency.slots
            seen.append([sorted(row[row >= 0].tolist()) for row in slots])
            seen.append(manager.foresee(4, 12, 3).tolist())
            seen.append(manager.foresee(8, 12, 3))

    trace = HandTrace([[[0], [0]]] * 8, prompt_entries=12)
    Replayer(trace).run(Ahead(budget="4 entries", cadence=4, on_miss="mask"), watch)
    assert seen[0] == [[7, 8, 9, 10, 11], [9, 10, 11]]
    assert seen[1] == [[0, 1, -1], [0, -1, -1]]
    assert seen[2] is None  # the run ends before


def test_what_layers_loaded_themselves_is_told_afterwards():
    """Pages 10 and 11 are resident; 0, 1 and 2 are not, and 0 and 2 were loaded."""
    told = []

    def watch(manager):
        pages = np.array([[0, 1, 2, 10, -1]], np.int32)
        use = Accesses(pages, np.ones_like(pages), np.ones(pages.shape, np.float32))
        attended = np.array([[True, False, True, True, True]])
        told.append(manager.look_back(use, attended))

    trace = HandTrace([[[11]]], prompt_entries=12)
    Replayer(trace).run(Newest(budget="2 entries"), watch)
    [served] = told
    assert served.hit.tolist() == [[False, False, False, True, False]]
    assert served.fetched.tolist() == [[True, False, True, False, False]]
    assert served.attended.tolist() == [[True, False, True, True, False]]


class Newest(Policy):
    name = "newest"
    action, evidence, decision_scope = "hierarchical", "position", "layer"

    def worth(self, step, pages):
        return pages.astype(np.float32)


class Decoded(Newest):
    """Keeps all that is decoded."""

    name = "decoded"

    def pins(self):
        return Pins(decoded=True)


class Tapers(Newest):
    """Keeps all that is decoded; the first layer has twice the slots of the second."""

    name = "tapers"

    def layer_shares(self, n_layers):
        return [1.0, 0.5]

    def pins(self):
        return Pins(decoded=True)


def test_pages_that_decode_begins_are_pinned_beside_the_prompts_whole_ones():
    """Of 22 entries five pages of four are whole; at the end, at 32, there are eight."""
    trace = HandTrace([[[0]]] * 40, prompt_entries=22, still=False)

    def replayed(entries):
        policy = Decoded(budget=f"{entries} entries", granularity=4, on_miss="mask")
        return Replayer(trace).run(policy)

    assert replayed(12).n_slots == 3
    with pytest.raises(FmsimError, match="holds 2 pages, but 3 are pinned by the end of 40 steps"):
        replayed(8)


def test_the_first_entry_of_all_is_written_as_any_other():
    """A prompt of three tokens closes none; entry 0 closes with the first that is decoded."""
    policy = Newest(budget="2 entries")
    shape = RequestShape(
        n_layers=1, prompt_entries=0, n_entries=2, topk=1, n_steps=8, entry_tokens=4, tau=4
    )
    manager = CacheManager(policy, build_context(policy, shape))
    moves = manager.write(0, 1)
    assert (moves.loaded.tolist(), manager.residency.slots.tolist()) == ([1], [[0, -1]])


def test_not_all_is_kept_where_one_layer_has_a_slot_less_than_pages():
    """12 pages: of 20 slots the first layer takes all it can use, the second has eight."""
    trace = HandTrace([[[0], [0]]], prompt_entries=12)
    ledger = Replayer(trace).run(Tapered(budget="10 entries"))
    assert max(ledger.group_slots) == 12 > min(ledger.group_slots)
    assert ledger.comes_back and ledger.miss_slots == 1
    whole = Replayer(trace).run(Tapered(budget="12 entries"))
    assert whole.group_slots == [12, 12] and not whole.comes_back and whole.miss_slots == 0


@pytest.mark.parametrize(("budget", "slots"), [("16 entries", [4, 4]), ("24 entries", [7, 5])])
def test_uneven_shares_in_pages_of_four_entries(budget, slots):
    """22 entries fill five pages; at the end there are eight, so three are pinned in each layer.
    Of 4 slots a layer two are left to share: 4/3 and 2/3, one and, since it lost more, one. Of 6
    there are six: four and two.
    """
    trace = HandTrace([[[0], [0]]] * 40, prompt_entries=22, still=False)
    ledger = Replayer(trace).run(Tapers(budget=budget, granularity=4, on_miss="mask"))
    assert ledger.group_slots == slots
