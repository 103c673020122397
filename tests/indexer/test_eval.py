from types import SimpleNamespace

import numpy as np
import pytest

from fmsim.indexer.checkpoint import Checkpoint
from fmsim.indexer.eval import evaluate, rankings, recall_curve
from fmsim.indexer.scorer import LayerWeights, ScorerConfig
from fmsim.indexer.windows import Windows


def windows_of(
    golden: list[list[int]], mass: list[list[float]], entries: list[int], keys: np.ndarray
) -> Windows:
    positions = 4 * np.array(entries) - 1
    hidden = np.ones((len(entries), 1, 1), dtype=np.float32)
    wanted = np.array(golden, dtype=bool), np.array(mass, dtype=np.float32)
    return Windows("made", positions, np.array(entries), hidden, keys.astype(np.float32), *wanted)


def one_head() -> Checkpoint:
    """Its logit is relu(key), for keys and states of width 1."""
    one = np.ones((1, 1), np.float32)
    return Checkpoint(
        {0: LayerWeights(one, one[0], one, one)},
        ScorerConfig(rope_dims=0, rope_theta=1e4),
        threshold=0.8,
    )


def test_recall_of_a_ranking_by_hand():
    windows = windows_of([[0, 1, 0, 1]], [[0.1, 0.4, 0.2, 0.3]], [4], np.zeros((1, 4, 1)))
    found = recall_curve(np.array([3.0, 2.0, 0.0, 1.0]), windows, 0, [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(found, [[0, 0.5, 1, 1], [0.1, 0.5, 0.8, 1]], rtol=1e-6)
    assert np.isnan(
        recall_curve(
            np.zeros(3), windows_of([[0] * 3], [[0] * 3], [3], np.zeros((1, 3, 1))), 0, [0.5]
        )
    ).all()


def test_rankings_know_the_past_and_not_the_window():
    windows = windows_of(
        [[1, 0, 0, 0], [0, 1, 0, 1]],
        np.ones((2, 4)).tolist(),
        [3, 4],
        np.arange(4.0).reshape(1, 4, 1),
    )
    trace = SimpleNamespace(
        header=SimpleNamespace(tau=2),
        prompt_mass=np.array([[0.5, 0.0, 0.25]]),
        entry_ids=np.array([[[0, 2, -1]], [[0, 1, -1]], [[0, 1, 3]]]),
        mass=np.array([[[0.1, 0.2, 0.0]], [[0.3, 0.4, 0.0]], [[9.0, 9.0, 9.0]]]),
    )
    (_, first), (_, second) = rankings(one_head(), trace, windows)
    assert first["h2o"].tolist() == [0.5, 0.0, 0.25] and first["lru"].tolist() == [0, 0, 0]
    np.testing.assert_allclose(second["h2o"], [0.9, 0.4, 0.45, 0.0])
    assert second["lru"].tolist() == [2, 2, 1, 0]
    assert second["recency"].tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(second["lsa (max)"], [0, 1, 2, 3], rtol=1e-5)
    np.testing.assert_allclose(second["lsa (l0)"], second["lsa (mean)"])
    assert sorted(np.argsort(-second["oracle"])[:2]) == [1, 3]


def test_the_native_indexer_held_is_the_union_of_its_layers_lists():
    one = np.ones((1, 1), np.float32)
    native = Checkpoint(
        dict.fromkeys((0, 1), LayerWeights(one, one[0], one, one)),
        ScorerConfig(rope_dims=0, rope_theta=1e4),
    )
    keys = np.array([[5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 30.0, 4.0, 5.0]])[..., None]
    windows = windows_of([[1, 0, 1, 0, 1]], [[1.0] * 5], [5], keys)._replace(
        hidden=np.ones((1, 2, 1), np.float32)
    )
    empty = np.zeros((1, 2, 1))
    trace = SimpleNamespace(
        header=SimpleNamespace(tau=2), prompt_mass=None, entry_ids=empty.astype(int) - 1, mass=empty
    )
    [(_, ranked)] = rankings(one_head(), trace, windows, native)
    assert ranked["native, held"].tolist() == [
        0,
        -1,
        0,
        -2,
        -1,
    ]  # firsts: 0 and 2; seconds: 1 and 4
    found = evaluate(one_head(), [(trace, windows)], shares=[0.4], native=native)
    assert found["golden_recall"]["native, held"] == pytest.approx([2 / 3])


def test_evaluate_means_over_windows_and_reads_the_threshold():
    keys = np.array([0.0, 3.0, 1.0, 2.0]).reshape(
        1, 4, 1
    )  # scores .5 .95 .73 .88: two are above the threshold
    windows = windows_of(
        [[0, 1, 0, 0], [1, 0, 0, 1]], [[0, 1, 0, 0], [0.5, 0, 0, 0.5]], [4, 4], keys
    )
    empty = np.zeros((4, 1, 1))
    trace = SimpleNamespace(
        header=SimpleNamespace(tau=2), prompt_mass=None, entry_ids=empty.astype(int), mass=empty
    )
    found = evaluate(one_head(), [(trace, windows)], shares=[0.25, 0.5])
    assert found["queries"] == 2 and found["kept_shares"] == [0.25, 0.5]
    assert found["golden_recall"]["lsa (max)"] == pytest.approx([0.5, 0.75])
    assert found["golden_recall"]["oracle"] == pytest.approx([0.75, 1.0])
    row = found["threshold"]
    assert (row["kept_share"], row["golden_recall"], row["mass_recall"]) == pytest.approx(
        (0.5, 0.75, 0.75)
    )
