"""LSA's decisions by hand: two layers of width 1, whose logit is relu(key) x the sign of the hidden
state.
"""

import array_api_compat.torch as torch_namespace
import numpy as np
import pytest
import torch

from fmsim.errors import FmsimError
from fmsim.indexer import checkpoint
from fmsim.indexer.checkpoint import Checkpoint
from fmsim.indexer.scorer import LayerWeights, ScorerConfig, logit, sigmoid
from fmsim.policies.base import Context, LookaheadState
from fmsim.policies.lsa import LSA

KEYS = np.array([[0, 3, 1, 0, 2, 0, 4, 0], [0, 0, 2, 0, 0, 5, 0, 0]], dtype=np.float32)[
    ..., None
]  # [L, E, 1]


@pytest.fixture
def weights(tmp_path):
    one = np.ones((1, 1), np.float32)
    layers = {layer: LayerWeights(one, one[0], one, one) for layer in (0, 1)}
    path = tmp_path / "indexer.safetensors"
    threshold = float(sigmoid(np.float64(1.5)))
    checkpoint.save(Checkpoint(layers, ScorerConfig(rope_dims=0, rope_theta=1e4), threshold), path)
    return path


def state(window: int) -> LookaheadState:
    """Window 0 sees 6 entries, window 1 sees 7 and window 2 all 8, each with its own scale of the
    hidden state.
    """
    seen = 6 + window
    hidden = np.full((2, 1), 1.0 + window, np.float32)
    return LookaheadState(hidden, 4 * seen - 1, KEYS[:, :seen], seen)


def started(weights, granularity=1, groups=1, lookahead=state, xp=None, **params) -> LSA:
    policy = LSA(checkpoint=weights, granularity=granularity, cadence=4, **params)
    context = Context(
        2, groups, -(-8 // granularity), 8, granularity, 6, 2, 12, tau=4, lookahead=lookahead, xp=xp
    )
    policy.reset(context)
    return policy


def worths(policy: LSA, step: int) -> list:
    policy.decide(step)
    pages = np.tile(np.arange(policy.ctx.n_pages), (policy.ctx.n_groups, 1))
    found = np.asarray(policy.worth(step, policy.ctx.xp.asarray(pages)))
    return found.round(3).tolist()[0] if len(found) == 1 else found.round(3).tolist()


INF = float("inf")


def test_a_page_is_worth_its_best_layer_and_the_unscored_are_young(weights):
    policy = started(weights)
    assert worths(policy, 0) == pytest.approx([0, 3, 2, 0, 2, 5, INF, INF], rel=1e-4)
    assert policy.floor is None  # the budget is filled
    assert policy.scored_entries(0) == 12


def test_stale_recall_scores_with_the_state_of_the_window_before(weights):
    """Hidden states of windows 0, 1, 2 make logits 1, 2 and 3 times the key."""
    stale, fresh = started(weights), started(weights, stale=False)
    assert worths(stale, 4)[1] == pytest.approx(3, rel=1e-4)
    assert worths(fresh, 4)[1] == pytest.approx(6, rel=1e-4)
    assert worths(stale, 8)[5:] == pytest.approx([10, 8, INF], rel=1e-4)
    assert worths(fresh, 8)[5:] == pytest.approx([15, 12, 0], rel=1e-4)
    assert worths(fresh, 6)[1] == pytest.approx(
        6, rel=1e-4
    )  # within a window, its own start's state
    assert (stale.scored_entries(8), fresh.scored_entries(8)) == (14, 16)


def test_layers_combine_by_mean_or_alone_or_each_for_itself(weights):
    assert worths(started(weights, combine="mean"), 0)[:6] == pytest.approx(
        [0, 1.5, 1.5, 0, 1, 2.5], rel=1e-4
    )
    assert worths(started(weights, layers=[1]), 0)[:6] == pytest.approx(
        [0, 0, 2, 0, 0, 5], rel=1e-4
    )
    each = worths(started(weights, scope="per_layer", groups=2), 0)
    assert [row[:6] for row in each] == [
        pytest.approx([0, 3, 1, 0, 2, 0], rel=1e-4),
        pytest.approx([0, 0, 2, 0, 0, 5], rel=1e-4),
    ]


def test_pages_go_by_their_best_entry_or_by_entries_above_the_threshold(weights):
    assert worths(started(weights, granularity=4), 0) == pytest.approx([3, 5], rel=1e-4)
    by_count = started(weights, granularity=4, page_rank="count", fill=False)
    assert by_count.floor == 1.0
    assert worths(by_count, 0) == pytest.approx(
        [2 + 0.5 * sigmoid(np.float32(3)), 2 + 0.5 * sigmoid(np.float32(5))], abs=1e-3
    )
    stricter = started(
        weights, granularity=4, page_rank="count", threshold=float(sigmoid(np.float64(4.0)))
    )
    first, second = worths(stricter, 0)
    assert first < stricter.floor <= second


def test_threshold_is_the_users_then_the_checkpoints(weights):
    assert started(weights, threshold=0.9).floor == pytest.approx(logit(0.9))
    assert started(weights, fill=False).floor == pytest.approx(1.5)  # the checkpoint's
    loaded = checkpoint.load(weights)
    checkpoint.save(Checkpoint(loaded.layers, loaded.config), weights)
    assert started(weights, fill=False).floor == 0.0  # a score of 0.5
    assert started(weights).floor is None


def test_pins_and_kmax_are_counted_in_pages(weights):
    pins = started(weights, granularity=4, sink_entries=1, recent_entries=5).pins()
    assert (pins.sink, pins.recent, pins.decoded) == (1, 2, True)
    params = LSA(checkpoint=weights, granularity=64, kmax=96).params
    assert (params.budget.amount, params.budget.unit) == (96 * 64, "entries")
    assert LSA.Params(**params.model_dump(mode="json")) == params
    with pytest.raises(FmsimError, match="kmax is a budget"):
        LSA(kmax=96, budget="10%")


def test_torch_takes_the_same_decision(weights):
    def as_torch(window: int) -> LookaheadState:
        made = state(window)
        return LookaheadState(
            torch.from_numpy(made.hidden),
            made.position,
            torch.from_numpy(made.keys),
            made.n_entries,
        )

    plain, on_torch = (
        started(weights, granularity=4),
        started(weights, granularity=4, lookahead=as_torch, xp=torch_namespace),
    )
    assert worths(on_torch, 8) == pytest.approx(worths(plain, 8), rel=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lookahead": None}, "no hidden states"),
        (
            {"lookahead": lambda w: LookaheadState(np.ones((2, 3), np.float32), 23, KEYS, 8)},
            "hidden_size is 3",
        ),
        (
            {
                "lookahead": lambda w: LookaheadState(
                    np.ones((2, 1), np.float32), 23, np.ones((2, 8, 4)), 8
                )
            },
            "head_dim is 4",
        ),
        ({"layers": [0, 5]}, r"no retriever for CSA layers \[5\]"),
        ({"layers": [1], "scope": "per_layer"}, "per_layer needs"),
    ],
)
def test_what_it_cannot_score_is_one_clear_error(weights, wrong, message):
    with pytest.raises(FmsimError, match=message):
        started(weights, **wrong)
    with pytest.raises(FmsimError, match="no such indexer checkpoint"):
        started(weights.with_name("none.safetensors"))
