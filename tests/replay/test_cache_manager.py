"""What a policy sees and can say: moves, residents, prefetches, and what a server would know."""

import numpy as np
import pytest
from hand_trace import HandTrace
from hypothesis import given, settings
from hypothesis import strategies as st

from fmsim.errors import FmsimError
from fmsim.policies.base import Policy
from fmsim.policies.lru import LRU
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


@pytest.mark.parametrize(("sees", "shown"), [("resident", [[], [], []]), ("all", [[1], [2], [1]])])
def test_who_masks_is_shown_residents_unless_it_keeps_all_keys(sees, shown):
    policy = Sees(budget="1 entries", on_miss="mask", sees=sees)
    ledger = Replayer(HandTrace([[[1]], [[2]], [[1]]], still=True), cold=True).run(policy)
    assert policy.shown == shown
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
