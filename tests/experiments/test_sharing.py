"""Mass kept by how many layers share one set."""

import numpy as np
import pytest

from fmsim.experiments.sharing import layer_sets, mass_by_sharing
from fmsim.policies import registry
from fmsim.replay.replayer import Replayer, replay
from fmsim.testing import sample_trace


def oracle(layers):
    return registry.build({"policy": "oracle", "scope": "shared", "budget": "60 entries"})


def test_one_set_for_more_layers_keeps_less():
    trace = sample_trace()
    one, both = mass_by_sharing(trace, oracle, 3)
    assert (one.layers, one.sets, both.layers, both.sets) == (1, 2, 2, 1)
    assert one.mass.value > both.mass.value > 0.1
    whole = replay(trace, oracle((0, 1)))
    assert both.mass.value == pytest.approx(whole.mass_kept.sum() / whole.mass_total.sum())


def test_a_replay_of_some_layers_is_that_of_a_trace_of_these():
    """With sets of their own, a layer's figures do not depend on which others are there."""
    trace = sample_trace()
    for policy in ("lru", "h2o"):
        spec = {"policy": policy, "budget": "40 entries", "scope": "per_layer"}
        whole = Replayer(trace).run(registry.build(spec))
        for layer in range(trace.n_layers):
            alone = Replayer(trace, layers=[layer]).run(registry.build(spec))
            for name in ("hit", "accessed", "golden", "mass_kept", "mass_total"):
                assert np.array_equal(getattr(alone, name)[:, 0], getattr(whole, name)[:, layer])


def test_a_set_may_be_chosen_by_other_layers_than_it_serves():
    trace = sample_trace()
    part = Replayer(trace, layers=[1])
    for shown, whole in zip(part._lookahead(1), Replayer(trace)._lookahead(1), strict=True):
        assert np.array_equal(shown, whole)
    assert part.shape.csa_numbers == (trace.csa_numbers[1],)


def test_layers_are_chosen_in_all_ways_where_these_are_few():
    assert layer_sets(3, 2) == [(0, 1), (0, 2), (1, 2)]
    sets = layer_sets(21, 3)
    assert len(sets) == 6 and sets[0] == (0, 1, 2) and sets[-1] == (18, 19, 20)
