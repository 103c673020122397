"""PyramidKV on cases worked out by hand."""

import pytest
from hand_trace import HandTrace

from fmsim.errors import FmsimError
from fmsim.policies.pyramid import Pyramid
from fmsim.replay.replayer import Replayer
from fmsim.testing import check_policy

# by mass 2, 5, 7, 11, 13, 3; the last four tokens of the prompt are entry 19
MASS = [[9 if n == 2 else {5: 8, 7: 7, 11: 6, 13: 5, 3: 4}.get(n, 0) for n in range(20)]] * 3
HEAVY = [2, 3, 5, 7, 11, 13, 19]


def test_the_first_layer_keeps_most_and_each_its_heaviest():
    """4 slots a layer: one for entry 19, and 9 to share, 5 to 3 to 1."""
    trace = HandTrace([[HEAVY] * 3], prompt_entries=20, prompt_mass=MASS)
    kept = []

    def watch(manager):
        kept.extend(sorted(row[row >= 0].tolist()) for row in manager.residency.slots)

    ledger = Replayer(trace).run(Pyramid(budget="4 entries", beta=3, window_tokens=4), watch)
    assert kept == [[2, 5, 7, 11, 13, 19], [2, 5, 7, 19], [2, 19]]
    assert ledger.hit.tolist() == [[6, 4, 2]] and ledger.group_slots == [6, 4, 2]


def test_what_is_decoded_takes_the_place_of_the_least():
    """Entry 20 closes at the fourth step: 13, 7 and 2 go; 19 stays in all."""
    steps = [[HEAVY] * 3] * 3 + [[[2, 7, 13, 19, 20]] * 3]
    trace = HandTrace(steps, prompt_entries=20, prompt_mass=MASS, still=False)
    ledger = Replayer(trace).run(Pyramid(budget="4 entries", beta=3, window_tokens=4))
    assert ledger.hit.tolist() == [[6, 4, 2]] * 3 + [[4, 3, 2]]
    assert ledger.evicted.tolist() == [[0, 0, 0]] * 3 + [[1, 1, 1]]
    assert ledger.demand_loads.sum() == ledger.lookahead_loads.sum() == 0


def test_the_defaults_are_the_papers():
    """10% of 100 entries, of which the last 8 tokens are 2, and 24 are left for three layers: the
    last has a twentieth of the mean of 8, the first as much more: 15.6, 8 and 0.4.
    """
    trace = HandTrace([[[0]] * 3], prompt_entries=100)
    assert Replayer(trace).run(Pyramid()).group_slots == [18, 10, 2]
    assert Replayer(trace).run(Pyramid(beta=1)).group_slots == [10, 10, 10]


def test_a_single_layer_has_the_budget():
    assert Replayer(HandTrace([[[0]]], prompt_entries=100)).run(Pyramid()).group_slots == [10]


def test_what_it_cannot_do_is_told():
    with pytest.raises(FmsimError, match="policy pyramid: scope"):
        Pyramid(scope="shared")
    with pytest.raises(FmsimError, match="policy pyramid: on_miss"):
        Pyramid(on_miss="fetch")


def test_conformance():
    check_policy(Pyramid)
