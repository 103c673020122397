"""Curves over budget and granularity against the ledgers of the run that they belong to."""

import json

import numpy as np
import pytest
from made_trace import make_trace

from fmsim.experiments.curves import GRANULARITIES, compute, lost_share, missed_share
from fmsim.policies import registry
from fmsim.replay.replayer import Replayer

LAYER_MAP = (0, 0, 0, 1, 2)  # the first trace layer weighs three times the others
WEIGHTS = np.array([3.0, 1.0, 1.0])
SPECS = {
    "full": {"policy": "full"},
    "lru": {"policy": "lru", "budget": "64 entries"},
    "belady": {"policy": "belady", "budget": "64 entries"},
    "wide": {"policy": "lru", "budget": "256 entries", "granularity": 4},
    "h2o": {"policy": "h2o", "budget": "10%"},
    "oracle": {"policy": "oracle", "budget": "5%"},
    "sinks": {
        "policy": "lsa",
        "budget": "20%",
        "recent_entries": 32,
    },  # no checkpoint fits this trace: it cannot be replayed
}


@pytest.fixture(scope="module")
def ledgers():
    replayer = Replayer(make_trace())
    found = {
        label: replayer.run(registry.build(spec))
        for label, spec in SPECS.items()
        if label != "sinks"
    }
    return found | {
        "sinks": (
            found["h2o"].__class__(
                **vars(found["h2o"])
                | {
                    "policy": "lsa",
                    "params": SPECS["sinks"] | {"policy": "lsa"},
                }
            )
        )
    }


@pytest.fixture(scope="module")
def curves(ledgers):
    ticks = []
    found = compute(
        make_trace(), ledgers, LAYER_MAP, lambda done, total: ticks.append((done, total))
    )
    assert [done for done, _ in ticks] == list(range(ticks[0][1] + 1))
    return json.loads(json.dumps(found))  # plain values


def test_the_one_pass_curve_passes_through_the_runs_own_points(ledgers, curves):
    for label, granularity in (("lru", "1"), ("wide", "4")):
        curve = curves["misses"]["lru"][granularity]
        at = ledgers[label].n_slots * ledgers[label].granularity
        below, above = (
            bound(x for x in curve["x"] if side(x))
            for bound, side in ((max, lambda x: x <= at), (min, lambda x: x >= at))
        )
        low, high = (curve["y"][curve["x"].index(x)] for x in (above, below))
        assert low <= missed_share(ledgers[label], WEIGHTS) <= high
        if above == below:
            assert missed_share(ledgers[label], WEIGHTS) == pytest.approx(low)


def test_belady_is_below_lru_at_every_budget_and_page_size(curves):
    for granularity in map(str, GRANULARITIES):
        lru, belady = curves["misses"]["lru"][granularity], curves["misses"]["belady"][granularity]
        assert lru["y"] == sorted(lru["y"], reverse=True) and lru["y"][-1] == 0
        for x, y in zip(belady["x"], belady["y"]):
            at_most = [one for size, one in zip(lru["x"], lru["y"]) if size <= x]
            assert y <= at_most[-1] + 1e-12
        assert belady["x"]


def test_lost_mass_falls_with_the_budget_for_the_oracle_and_matches_the_run(ledgers, curves):
    assert set(curves["lost_mass"]) == {"h2o", "oracle", "sinks"}
    assert curves["lost_mass"]["sinks"]["x"] == [ledgers["sinks"].budget_entries]  # as it ran
    oracle = curves["lost_mass"]["oracle"]
    assert oracle["y"] == sorted(oracle["y"], reverse=True)
    at = oracle["x"].index(51)  # 5% of 1,024
    assert oracle["y"][at] == pytest.approx(lost_share(ledgers["oracle"], WEIGHTS))


def test_granularity_curves_pass_through_the_run(ledgers, curves):
    for label, share in (("lru", missed_share), ("h2o", lost_share), ("wide", missed_share)):
        curve = curves["granularity"][label]
        assert curve["x"] == list(GRANULARITIES)
        assert curve["y"][curve["x"].index(ledgers[label].granularity)] == pytest.approx(
            share(ledgers[label], WEIGHTS)
        )
    assert "full" not in curves["granularity"]


def test_regret_by_layer_is_measured_against_the_bound_at_the_same_budget(ledgers, curves):
    regret = curves["regret"]
    assert set(regret) == {"lru", "belady", "wide", "h2o", "oracle", "sinks"}
    assert regret["belady"]["own"] == regret["belady"]["bound"] == regret["lru"]["bound"]
    assert regret["oracle"]["own"] == regret["oracle"]["bound"]
    assert all(own >= bound for own, bound in zip(regret["lru"]["own"], regret["lru"]["bound"]))
    by_hand = 1 - ledgers["lru"].hit[:, 2].sum() / ledgers["lru"].accessed[:, 2].sum()
    assert regret["lru"]["own"][2] == pytest.approx(by_hand) and len(regret["lru"]["own"]) == 3
    assert (regret["h2o"]["kind"], regret["h2o"]["bound_policy"], regret["wide"]["kind"]) == (
        "lost_mass",
        "oracle",
        "misses",
    )
