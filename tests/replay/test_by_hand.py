"""What a replay tells a policy, and where it ends, worked by hand."""

import pytest
from hand_trace import HandTrace, stream
from made_trace import make_trace

from fmsim.indexer.labels import LabelRule, step_votes
from fmsim.policies import registry
from fmsim.policies.base import Policy
from fmsim.replay.replayer import Replayer


def hits(trace, spec):
    return Replayer(trace).run(registry.build(spec)).hit[:, 0].tolist()


def test_h2o_keeps_what_it_saw_attended():
    """Four slots, two of them for the newest. At step 3 entry 8 closes and one of 4, 5, 6 goes.

    4 was attended to, so 5 goes, the lower of the two that were not. A policy that does not look
    would give up 4, the lowest of all.
    """
    trace = HandTrace([[[4]]] * 5, prompt_entries=8, still=False)
    assert hits(trace, {"policy": "h2o", "budget": "4 entries"}) == [1, 1, 1, 1, 1]
    trace = HandTrace([[[4]], [[4]], [[4]], [[5]], [[6]]], prompt_entries=8, still=False)
    assert hits(trace, {"policy": "h2o", "budget": "4 entries"}) == [1, 1, 1, 0, 1]


def test_lfu_counts_a_fetch_once_and_a_hit_once_more():
    """Two slots. 3 takes the place of 2, which was fetched only; 2 that of 1, used longer ago than
    3, which was used as often.
    """
    spec = {"policy": "lfu", "budget": "2 entries"}
    ledger = Replayer(stream([1, 1, 2, 3, 1, 3, 3, 2, 3], 10), cold=True).run(registry.build(spec))
    assert ledger.hit[:, 0].tolist() == [0, 1, 0, 0, 1, 1, 1, 0, 1]


def test_recency_keeps_the_newest_to_the_entry():
    """Three slots: the sink and the two newest of the eight, 6 and 7."""
    trace = HandTrace([[[0, 5, 6, 7]]], prompt_entries=8)
    ledger = Replayer(trace).run(registry.build({"policy": "recency", "budget": "3 entries"}))
    assert (ledger.hit.tolist(), ledger.resident.tolist()) == ([[3]], [[3]])


def test_sets_at_the_starts_of_windows_are_compared_with_the_one_before():
    """Two slots, windows of two steps: 6 and 7; then 0 and 7; then 0 and 1. One of three is common
    each time, and none of the first and the last.
    """
    trace = HandTrace([[[0]], [[0]], [[1]], [[0]], [[0]]], prompt_entries=8, tau=2)
    ledger = Replayer(trace).run(registry.build("lru:budget=2 entries"))
    assert ledger.set_overlap.tolist() == pytest.approx([1 / 3, 1 / 3])


def test_where_all_have_slots_all_that_closes_is_kept():
    """Entries 8 and 9 close at steps 3 and 7; whatever is selected is there, in both layers."""
    steps = [[[*range(6)], [*range(2, 8)]]] * 4 + [[[0, 1, 8], [7, 8]]] * 4 + [[[1, 9], [8, 9]]]
    trace = HandTrace(steps, prompt_entries=8, still=False)
    whole = Replayer(trace).run(registry.build("lru:budget=10 entries"))
    assert (whole.hit == whole.accessed).all() and whole.demand_loads.sum() == 0
    assert whole.scored.tolist() == [0] * 9  # no memory indexer has a part in it
    assert whole.resident.tolist() == [[8, 8]] * 3 + [[9, 9]] * 4 + [[10, 10]] * 2


def test_only_the_first_steps_are_replayed():
    trace = stream([1, 2, 3, 4, 5], 10)
    replayer = Replayer(trace, max_steps=3)
    assert replayer.run(registry.build("lru")).n_steps == 3 == len(replayer.entries)


def test_the_lookahead_state_is_of_the_last_token_before_its_window():
    """After 256 tokens, windows of 64: window 1 begins with position 320, its state is of 319,
    when 80 entries are closed.
    """
    seen = {}

    class Looks(Policy):
        name = "looks"
        action, evidence, decision_scope = "hierarchical", "predicted_future", "layer"

        def reset(self, ctx):
            super().reset(ctx)
            seen.update({window: ctx.lookahead(window) for window in (0, 1)})

        def worth(self, step, pages):
            return self.ctx.xp.astype(pages, self.ctx.xp.float32)

    trace = make_trace(prompt_tokens=256, n_steps=130, n_layers=1)
    assert trace.header.tau == 64
    Replayer(trace).run(Looks())
    assert [(state.position, state.n_entries) for state in seen.values()] == [(255, 64), (319, 80)]
    assert seen[1].keys.shape[1] == 80
    assert (seen[1].hidden == trace.hidden[1]).all()


def test_entry_zero_is_voted_for_as_any_other():
    ids, layers = step_votes([[0, 3], [0, -1]], [[0.9, 0.1], [0.5, 0.0]], LabelRule(0.6, 1))
    assert (ids.tolist(), layers.tolist()) == ([0], [2])
