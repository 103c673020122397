from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from fmsim import bootstrap
from fmsim.errors import FmsimError
from fmsim.indexer.checkpoint import Checkpoint
from fmsim.indexer.eval import KEPT_SHARES, History, evaluate, rankings, recall_curve
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
    # nothing was decoded yet: what ranks by use goes by the prompt's attention
    assert first["h2o"].tolist() == [0.5, 0.0, 0.25]
    assert np.argsort(-first["lru"]).tolist() == np.argsort(-first["lfu"]).tolist() == [0, 2, 1]
    assert first["lru"].tolist() == pytest.approx([0.5 / 1.5, 0, 0.25 / 1.5])  # below any use
    np.testing.assert_allclose(second["h2o"], [0.9, 0.4, 0.45, 0.0])
    assert second["lru"].tolist() == [2, 2, 1, 0]
    # 0 was used twice; of 1 and 2, once each, 1 was the later; 3 never
    assert np.argsort(-second["lfu"]).tolist() == [0, 1, 2, 3]
    uses = np.array([0.5 / 2 + 2, 1, 0.25 / 2 + 1, 0])
    by_hand = np.arange(4.0) + np.log2(1 + uses)
    np.testing.assert_allclose(second["lsa + history"], by_hand, rtol=1e-5)
    _, (_, stale) = rankings(one_head(), trace, windows._replace(state_age=1))
    by_hand = np.arange(4.0) + np.log2(1 + np.array([0.5, 0, 0.25, 0]))  # the prompt's alone
    np.testing.assert_allclose(stale["lsa + history"], by_hand, rtol=1e-5)
    assert second["recency"].tolist() == [0, 1, 2, 3]
    drawn = np.random.default_rng(0).random(7)  # one stream, the same for all
    assert [*first["random"], *second["random"]] == drawn.tolist()
    np.testing.assert_allclose(second["lsa (max)"], [0, 1, 2, 3], rtol=1e-5)
    np.testing.assert_allclose(second["lsa (l0)"], second["lsa (mean)"])
    assert second["oracle"].tolist() == [1, 6, 1, 6]  # golden: above the mass of all


def test_what_was_never_used_ranks_by_the_prompt_below_what_was_and_ties_by_the_last_use():
    trace = SimpleNamespace(prompt_mass=np.array([[4.0, 0.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0]]))
    history = History(trace, 6)  # entries 4 and 5 come after the prompt
    prior = [4 / 5, 1 / 5, 2 / 5, 0, 0, 0]
    assert history.by_last_use().tolist() == history.by_count().tolist() == pytest.approx(prior)
    ids = np.array([[[1, 4, -1]], [[4, 6, 5]], [[1, 3, 3]]])  # there is no entry 6
    history.add(ids, np.full(ids.shape, 0.5), first_step=2)  # steps 3, 4 and 5, from 1
    assert history.count.tolist() == [0, 2, 0, 1, 2, 1]
    assert history.mass.tolist() == [4, 2, 2, 1, 1, 0.5]
    by_last = [4 / 5, 5, 2 / 5, 5, 4, 4]
    assert history.by_last_use().tolist() == pytest.approx(by_last)
    by_count = [4 / 5, 2 + 5 / 6, 2 / 5, 1 + 5 / 6, 2 + 4 / 6, 1 + 4 / 6]
    assert history.by_count().tolist() == pytest.approx(by_count)
    history.add(ids[:1], np.full((1, 1, 3), 0.5), first_step=5)
    assert [each.tolist() for each in history.faded] == [
        [4, 1, 2, 0, 0, 0],
        [2, 2.5, 1, 1, 2, 1],
        [1, 2.25, 0.5, 0.5, 2, 0.5],
    ]


def test_the_native_indexer_held_is_the_union_of_its_layers_lists():
    one = np.ones((1, 1), np.float32)
    native = Checkpoint(
        dict.fromkeys((0, 1), LayerWeights(one, one[0], one, one)),
        ScorerConfig(rope_dims=0, rope_theta=1e4),
    )
    keys = np.array([[5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 30.0, 4.0, 5.0]])[..., None]
    twice = [[1, 0, 1, 0, 1]] * 2
    windows = windows_of(twice, [[1.0] * 5] * 2, [5, 5], keys)._replace(
        hidden=np.ones((2, 2, 1), np.float32)
    )
    empty = np.zeros((4, 2, 1))
    trace = SimpleNamespace(
        header=SimpleNamespace(tau=2), prompt_mass=None, entry_ids=empty.astype(int) - 1, mass=empty
    )
    (_, ranked), _ = rankings(one_head(), trace, windows, native)
    assert ranked["native, held"].tolist() == [
        0,
        -1,
        0,
        -2,
        -1,
    ]  # firsts: 0 and 2; seconds: 1 and 4
    found = evaluate(one_head(), [(trace, windows)], shares=[0.4], native=native)
    assert found["golden_recall"]["native, held"] == pytest.approx([2 / 3])


KEYS = np.array([0.0, 3.0, 1.0, 2.0]).reshape(1, 4, 1)  # scores .5 .95 .73 .88: two above 0.8


def trace_of(steps: int) -> SimpleNamespace:
    empty = np.zeros((steps, 1, 1))
    return SimpleNamespace(
        header=SimpleNamespace(tau=2), prompt_mass=None, entry_ids=empty.astype(int), mass=empty
    )


def test_evaluate_means_over_windows_and_reads_the_threshold():
    windows = windows_of(
        [[0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 1]],
        [[0, 0, 1, 0], [0, 1, 0, 0], [0.5, 0, 0, 0.5]],
        [4, 4, 4],
        KEYS,
    )
    found = evaluate(one_head(), [(trace_of(6), windows)], shares=[0.25, 0.5])
    assert found["queries"] == 2 and found["kept_shares"] == [0.25, 0.5]
    assert found["golden_recall"]["lsa (max)"] == pytest.approx([0.5, 0.75])
    assert found["golden_recall"]["oracle"] == pytest.approx([0.75, 1.0])
    row = found["threshold"]
    assert (row["kept_share"], row["golden_recall"], row["mass_recall"]) == pytest.approx(
        (0.5, 0.75, 0.75)
    )
    # window 0 stands apart: its one golden entry is third
    assert found["first_window"]["golden_recall"]["lsa (max)"] == [0.0, 0.0]
    assert found["first_window"]["golden_recall"]["oracle"] == [1.0, 1.0]
    # two windows of 1 and 0, and of 1 and 0.5
    by_hand = [bootstrap.mean(values).half_width for values in ((1.0, 0.0), (1.0, 0.5))]
    assert found["half_width"]["golden_recall"]["lsa (max)"] == pytest.approx(by_hand)


def test_a_score_at_the_threshold_is_kept():
    """Key 0 has the logit 0, the score 0.5."""
    windows = windows_of([[0, 1, 0, 0]] * 2, [[0, 1, 0, 0]] * 2, [4] * 2, KEYS)
    found = evaluate(replace(one_head(), threshold=0.5), [(trace_of(4), windows)], shares=[0.25])
    assert found["threshold"]["kept_share"] == 1.0


def test_nothing_is_evaluated_of_no_trace_and_nothing_of_other_widths():
    assert evaluate(one_head(), [])["state_age"] == 0
    windows = windows_of([[1]], [[1]], [1], np.zeros((1, 1, 2)))
    with pytest.raises(FmsimError, match="made: its head_dim is 2"):
        evaluate(one_head(), [(trace_of(2), windows)])


def test_of_several_traces_the_traces_are_the_blocks():
    one = windows_of([[0, 1, 0, 0]] * 3, [[0, 1, 0, 0]] * 3, [4] * 3, KEYS)
    other = windows_of([[1, 0, 0, 0]] * 3, [[1, 0, 0, 0]] * 3, [4] * 3, KEYS)
    both = [(trace_of(6), one), (trace_of(6), other)]
    found = evaluate(one_head(), both, shares=[0.25])
    assert found["queries"] == 4 and found["golden_recall"]["lsa (max)"] == [0.5]
    spread = found["half_width"]["golden_recall"]["lsa (max)"]
    assert spread == pytest.approx([bootstrap.mean([1.0, 0.0]).half_width])
    brief = (trace_of(2), windows_of([[0, 1, 0, 0]], [[0, 1, 0, 0]], [4], KEYS))
    behind = evaluate(one_head(), [brief, *both], shares=[0.25])  # one window: the prompt's
    assert behind["half_width"]["golden_recall"]["lsa (max)"] == [pytest.approx(spread[0])]
    assert behind["golden_recall"]["lsa (max)"] == [0.5]
    alone = evaluate(one_head(), both[:1], shares=[0.25])
    assert alone["half_width"]["golden_recall"]["lsa (max)"] == [0.0]


def test_a_last_window_of_few_steps_and_a_trace_of_one_window_tell_nothing():
    windows = windows_of([[0, 1, 0, 0]] * 3, [[0, 1, 0, 0]] * 3, [4] * 3, KEYS)
    trace = trace_of(9)
    trace.header.tau = 4  # windows of 4, 4 and 1 steps
    found = evaluate(one_head(), [(trace, windows)])
    assert found["queries"] == 1
    assert found["kept_shares"] == list(KEPT_SHARES) == [0.01, 0.02, 0.05, 0.1, 0.2, 0.4]
    trace = trace_of(10)  # 4, 4 and 2: a half counts
    trace.header.tau = 4
    assert evaluate(one_head(), [(trace, windows)])["queries"] == 2
    trace = trace_of(12)  # 5, 5 and 2: less than a half
    trace.header.tau = 5
    assert evaluate(one_head(), [(trace, windows)])["queries"] == 1
    first = windows_of([[0, 1, 0, 0]], [[0, 1, 0, 0]], [4], KEYS)
    found = evaluate(one_head(), [(trace_of(2), first)], shares=[0.5])
    assert found["queries"] == 0 and found["threshold"] is None
    assert found["mass_recall"]["oracle"] == [None]
    assert found["first_window"]["mass_recall"]["oracle"] == [1.0]


def test_means_of_three_windows_of_two_shares():
    """Golden entries third, first, and first and last; of four by key the order is 1, 3, 2, 0."""
    windows = windows_of(
        [[0] * 4, [0, 0, 1, 0], [0, 1, 0, 0], [1, 1, 0, 0]],
        [[0] * 4, [0, 0, 1, 0], [0, 0, 0, 0], [0.25, 0.75, 0, 0]],
        [4] * 4,
        KEYS,
    )
    found = evaluate(one_head(), [(trace_of(8), windows)], shares=[0.25, 0.75])
    assert found["queries"] == 3
    assert found["golden_recall"]["lsa (max)"] == pytest.approx([(0 + 1 + 0.5) / 3, 2.5 / 3])
    # the second window has no mass to recall, and says nothing
    assert found["mass_recall"]["lsa (max)"] == pytest.approx([0.75 / 2, 1.75 / 2])
    golden = bootstrap.mean([0.0, 1.0, 0.5]).half_width
    assert found["half_width"]["golden_recall"]["lsa (max)"][0] == pytest.approx(golden)
    assert found["first_window"]["golden_recall"]["lsa (max)"] == [None, None]
    assert found["half_width"]["mass_recall"]["lsa (max)"][0] > 0  # of the two that have mass
