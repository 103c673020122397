"""A budget shared unevenly over layers: whole slots, and what a policy and its ledger know."""

import numpy as np
import pytest
from hand_trace import HandTrace
from hypothesis import given
from hypothesis import strategies as st
from tapered import Tapered

from fmsim.errors import FmsimError, PolicyError
from fmsim.policies.base import Pins
from fmsim.replay.layer_slots import check_shares, divide
from fmsim.replay.ledger import Ledger
from fmsim.replay.replayer import Replayer


@pytest.mark.parametrize(
    ("n_slots", "shares", "n_pages", "least", "slots"),
    [
        (4, [5, 3, 1], 20, 1, (6, 4, 2)),  # 9 slots are left to share
        (4, [1, 1, 1], 20, 1, (4, 4, 4)),
        (3, [2, 1], 20, 1, (4, 2)),  # 4 left: 2.67 and 1.33; the first loses more by rounding
        (2, [1, 1, 1, 0], 20, 1, (3, 2, 2, 1)),  # 4 left for three equals: the first has one more
        (5, [5, 3, 1], 6, 1, (6, 6, 3)),  # 12 left: 5 fit the first, then 5 the second
        (5, [1, 0], 6, 1, (6, 1)),  # a share of nothing stays that, whatever is left over
        (3, [1, 9], 3, 1, (3, 3)),
        (3, [1, 9], 8, 3, (3, 3)),  # pins need all there is
    ],
)
def test_slots_by_hand(n_slots, shares, n_pages, least, slots):
    assert divide(n_slots, shares, n_pages, least) == slots


@given(
    shares=st.lists(st.floats(0, 1e6), min_size=1, max_size=30).filter(any),
    sizes=st.lists(st.integers(1, 500), min_size=3, max_size=3).map(sorted),
)
def test_the_budget_holds_and_is_used(shares, sizes):
    least, n_slots, n_pages = sizes
    slots = divide(n_slots, shares, n_pages, least)
    assert all(least <= count <= n_pages for count in slots)
    open_to_more = [n for n, share in zip(slots, shares) if share and n < n_pages]
    total = n_slots * len(shares)
    assert sum(slots) == total if open_to_more else sum(slots) <= total
    for one, count in zip(shares, slots):
        for other, more in zip(shares, slots):
            assert (
                one > other or count <= more + 1
            )  # a smaller share never has more, rounding aside


def test_a_policy_knows_its_slots_and_so_does_its_ledger(tmp_path):
    trace = HandTrace([[[0], [0], [0]]], prompt_entries=20)
    policy = Tapered(budget="5 entries")
    ledger = Replayer(trace).run(policy)
    # one each is pinned, and 12 are left to share by 4, 2 and 1: 6.86, 3.43 and 1.71
    assert policy.ctx.group_slots == (8, 4, 3) and policy.ctx.n_slots == 8
    assert ledger.group_slots == [8, 4, 3] and ledger.n_slots == 8
    assert ledger.resident[0].tolist() == [8, 4, 3] and ledger.budget_entries == 5
    ledger.save(tmp_path / "it.npz")
    assert Ledger.load(tmp_path / "it.npz").group_slots == [8, 4, 3]


def test_what_is_pinned_comes_before_shares():
    class Pinned(Tapered):
        def pins(self):
            return Pins(sink=2, recent=2)

    trace = HandTrace([[[0], [0], [0]]], prompt_entries=20)
    policy = Pinned(budget="5 entries")
    Replayer(trace).run(policy)
    assert policy.ctx.group_slots == (6, 5, 4)  # 3 to share: 1.71, 0.86 and 0.43
    with pytest.raises(FmsimError, match="budget 3 entries holds 3 pages, but 4 are pinned"):
        Replayer(trace).run(Pinned(budget="3 entries"))


def test_one_set_for_all_layers_cannot_be_shared_unevenly():
    with pytest.raises(FmsimError, match="policy tapered: shares .* set scope: per_layer"):
        Replayer(HandTrace([[[0], [0]]])).run(Tapered(scope="shared"))


def test_a_layer_may_have_no_share():
    check_shares("some", [1.0, 0.0], 2, "per_layer")


def test_shares_may_be_numbers_of_numpy():
    shares = np.array([3, 0.5], np.float32)
    check_shares("some", shares, 2, "per_layer")
    assert divide(7, shares, 100, 1) == divide(7, [3.0, 0.5], 100, 1)


@pytest.mark.parametrize(
    "shares",
    [
        [1.0],
        [1.0, -1.0],
        [0.0, 0.0],
        [1.0, np.nan],
        [1.0, np.inf],
        [1, 1, 1],
        "ab",
        3,
        ["1", "2"],
        np.array(3.0),
        np.ones((2, 1)),
    ],
)
def test_shares_that_divide_nothing_are_told(shares):
    class Wrong(Tapered):
        name = "wrong"

        def layer_shares(self, n_layers):
            return shares

    with pytest.raises(PolicyError, match="policy wrong: layer_shares must give 2 numbers"):
        Replayer(HandTrace([[[0], [0]]])).run(Wrong())
