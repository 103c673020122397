import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fmsim.indexer.labels import LabelRule, golden_mask, labels, step_votes, voted_labels
from fmsim.replay import golden


def test_the_head_holds_the_entry_that_reaches_the_share():
    mass = np.array(
        [[0.1, 0.5, 0.3, 0.1], [0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25], [0, 0, 0, 0]]
    )
    expected = [[0, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert golden_mask(mass, 0.6).astype(int).tolist() == expected
    assert golden_mask(mass, 0.0).sum(-1).tolist() == [
        1,
        1,
        1,
        0,
    ]  # at least one, where there is mass at all


def test_the_indexer_and_the_ledger_call_the_same_entries_golden():
    random = np.random.default_rng(0)
    mass = (
        random.dirichlet(np.full(40, 0.1), (70, 2)) * 64
    ).round() / 64  # many equal masses, exact sums
    ids = np.tile(np.arange(40), (70, 2, 1))
    assert np.array_equal(golden_mask(mass, golden.GOLDEN_SHARE), golden.golden_mask(ids, mass))


def test_positives_are_the_causal_union_of_what_enough_layers_choose():
    ids = np.array([[[0, 2, -1], [2, 5, 9]], [[1, 2, 3], [1, 9, 11]]])  # two steps, two layers
    mass = np.array([[[0.2, 0.8, 0.9], [0.6, 0.3, 0.1]], [[0.1, 0.1, 0.8], [0.1, 0.2, 0.7]]])
    any_layer = labels(ids, mass, 10, LabelRule())
    assert np.flatnonzero(any_layer.golden).tolist() == [
        2,
        3,
    ]  # 11 is golden in step 1, and younger than the query
    both = labels(ids, mass, 10, LabelRule(min_layers=2))
    assert np.flatnonzero(both.golden).tolist() == [2]  # 3 is chosen by one layer only
    np.testing.assert_allclose(
        any_layer.mass, [0.2, 0.2, 1.5, 0.8, 0, 0.3, 0, 0, 0, 0.3], rtol=1e-6
    )
    assert labels(ids[:0], mass[:0], 4, LabelRule()).golden.tolist() == [False] * 4
    one = np.zeros((3, 1, 1), dtype=int)  # one entry alone, golden in each of three steps
    assert labels(one, one + 1.0, 1, LabelRule()).golden.tolist() == [True]


def naive(ids, mass, entries, share, min_layers):
    positives = set()
    for step_ids, step_mass in zip(ids, mass, strict=True):
        votes = {}
        for layer_ids, layer_mass in zip(step_ids, step_mass, strict=True):
            listed = sorted(
                (-m, place, i)
                for place, (i, m) in enumerate(zip(layer_ids, layer_mass, strict=True))
                if i >= 0
            )
            total, gathered = sum(-m for m, _, _ in listed), 0.0
            for negative, _, entry in listed:
                if gathered >= share * total:
                    break
                gathered -= negative
                votes[entry] = votes.get(entry, 0) + 1
        positives |= {
            entry for entry, count in votes.items() if count >= min_layers and entry < entries
        }
    return sorted(positives)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_labels_equal_a_naive_rendering(data):
    steps, layers, width = (
        data.draw(st.integers(1, 4)),
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 6)),
    )
    seed, entries = data.draw(st.integers(0, 9999)), data.draw(st.integers(1, 16))
    random = np.random.default_rng(seed)
    ids = np.stack(
        [np.sort(random.permutation(16)[:width]) for _ in range(steps * layers)]
    ).reshape(steps, layers, width)
    ids[random.random(ids.shape) < 0.2] = -1
    mass = random.integers(1, 16, ids.shape) / 64.0  # sums are exact, ties are common
    share, min_layers = (
        data.draw(st.sampled_from([0.25, 0.5, 0.75])),
        data.draw(st.integers(1, layers)),
    )
    found = labels(ids, mass, entries, LabelRule(share, min_layers))
    assert np.flatnonzero(found.golden).tolist() == naive(ids, mass, entries, share, min_layers)


def test_votes_are_shares_of_the_layers_and_enough_of_them_make_a_positive():
    """Four layers: a share of 0.5 is two of them. 9 is younger than the query."""
    ids = np.array([[0, 2, -1], [2, 5, 9]])
    share = np.array([[0.25, 0.5, 0.9], [0.75, 0.25, 1.0]])
    golden = lambda rule: np.flatnonzero(voted_labels(ids, share, 6, rule, 4).golden).tolist()
    assert golden(LabelRule()) == [0, 2, 5]
    assert golden(LabelRule(min_layers=2)) == golden(LabelRule(min_layers=3)) == [2]
    assert golden(LabelRule(min_layers=4)) == []
    found = voted_labels(ids, share, 6, LabelRule(), 4).mass
    assert found.tolist() == [0.25, 0, 1.25, 0, 0, 0.25] and found.dtype == np.float32


def test_a_steps_votes_count_layers_and_entry_0_too():
    """Heads of 0.6: {0, 3} in the first layer, {3} in the second; padding has no vote."""
    ids = np.array([[0, 3, 5], [-1, 3, 5]])
    mass = np.array([[0.5, 0.4, 0.1], [0.9, 0.7, 0.3]])
    found, layers = step_votes(ids, mass, LabelRule())
    assert (found.tolist(), layers.tolist()) == ([0, 3], [1, 2])
    found, layers = step_votes(ids, mass, LabelRule(min_layers=2))
    assert (found.tolist(), layers.tolist()) == ([3], [2])


def test_the_papers_rule_is_what_is_not_said():
    assert LabelRule() == LabelRule(head_share=0.6, min_layers=1, horizon_steps=None, state_age=0)
