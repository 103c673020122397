"""The cache policies of the textbooks, on streams worked out by hand.

`demand` gives the hits of one access a step from an empty cache.
"""

import numpy as np
import pytest
from hand_trace import HandTrace, stream

from fmsim.policies import registry
from fmsim.replay.replayer import Replayer


def hits(trace, spec, **options):
    return Replayer(trace, **options).run(registry.build(spec)).hit[:, 0].tolist()


def demand(name, entries, slots, **params):
    spec = {"policy": name, "budget": f"{slots} entries"} | params
    return hits(stream(entries, 30), spec, cold=True)


def test_fifo_does_not_look_at_uses():
    # 3 evicts 1, though it was just used; 1 evicts 2
    assert demand("fifo", [1, 2, 1, 3, 1, 2], 2) == [0, 0, 1, 0, 0, 0]


def test_fifo_pages_of_one_step_leave_in_the_order_of_the_text():
    trace = HandTrace([[[1, 2]], [[3]], [[2]], [[1]]])
    assert hits(trace, {"policy": "fifo", "budget": "2 entries"}, cold=True) == [0, 0, 1, 0]


def test_clock_gives_a_second_chance_and_moves_on():
    # 1 and 2 are used; 4 takes both marks and evicts 3; 5 evicts 1, where the hand stands
    assert demand("clock", [1, 2, 3, 1, 2, 4, 5, 2, 1], 3) == [0, 0, 0, 1, 1, 0, 0, 1, 0]


def test_clock_goes_round_where_all_were_used():
    # 3 takes all marks and evicts 1, where it began; 4 evicts 2, whose mark is gone
    assert demand("clock", [1, 2, 1, 2, 3, 2, 1, 2], 2) == [0, 0, 1, 1, 0, 1, 0, 1]


def test_clock_finds_a_slot_for_every_miss_of_a_step():
    # In slots: 1 2 3 4, of which 2 is used. 5 and 6 evict 1 and 3; the hand stands at 4.
    trace = HandTrace([[[1, 2, 3, 4]], [[2]], [[5, 6]], [[7]], [[2, 5, 6, 7]], [[1, 3, 4]]])
    spec = {"policy": "clock", "budget": "4 entries"}
    assert hits(trace, spec, cold=True) == [0, 1, 0, 0, 4, 0]


def test_sieve_keeps_old_pages_in_their_place():
    # 4 takes the marks of 1 and 2, evicts 3, the newest, and the hand starts again; 5 evicts 1
    assert demand("sieve", [1, 2, 3, 1, 2, 4, 5, 4, 2], 3) == [0, 0, 0, 1, 1, 0, 0, 1, 1]


def test_sieve_sifts_what_is_new():
    # The hand stands above 2's place once 3 evicted 2; 1 keeps its old place behind the hand, so
    # the new pages 4 and 5 evict each other's elders: 3, then 4
    assert demand("sieve", [1, 2, 9, 1, 3, 4, 5, 1, 9], 3) == [0, 0, 0, 1, 0, 0, 0, 1, 0]


def test_s3fifo_lets_one_hit_wonders_go_and_brings_back_what_it_remembers():
    # Small queue of 2, main queue of 6. Until the first eviction 3 to 8 go to the main queue.
    filled = [1, 2, 3, 4, 5, 6, 7, 8]
    params = {"small_share": 0.25}
    # 9 evicts 1; 1 is remembered, so it comes back to the main queue and evicts 2.
    # 10 finds the main queue too long by one and evicts 3, never used.
    entries = [*filled, 9, 1, 10, 9, 1, 4, 3]
    assert demand("s3fifo", entries, 8, **params) == [0] * 11 + [1, 1, 1, 0]


def test_s3fifo_moves_what_was_used_twice():
    params = {"small_share": 0.25}
    # 1 was used twice: 9 moves it to the main queue and evicts 2. Then 10 finds the main queue
    # too long and evicts 3 from it. 2 is remembered: the small queue gives up 9 for it.
    entries = [1, 2, 3, 4, 5, 6, 7, 8, 1, 1, 9, 10, 1, 2, 9]
    assert demand("s3fifo", entries, 8, **params) == [0] * 8 + [1, 1, 0, 0, 1, 0, 0]


def test_lruk_looks_at_the_use_before_the_last():
    # 3 evicts 2, used once; then 4 evicts 3, used once, though 1 was used longer ago
    assert demand("lruk", [1, 1, 2, 3, 4, 1], 2) == [0, 1, 0, 0, 0, 1]
    # second to last uses: 1 at step 0, 2 at step 2, so 3 evicts 1, which was used last
    assert demand("lruk", [1, 9, 2, 2, 1, 3, 2, 1], 3) == [0, 0, 0, 1, 1, 0, 1, 1]
    assert demand("lruk", [1, 2, 2, 1, 3, 2, 1], 2) == [0, 0, 1, 1, 0, 1, 0]


def test_random_fetch_evicts_every_resident_page_alike():
    """A page of 9 others' company is gone after one miss in one case of ten."""
    gone = []
    for seed in range(300):
        trace = HandTrace([[[*range(10)]], [[20]], [[*range(10)]]], prompt_entries=30)
        trace.header.seed = seed
        policy = registry.build({"policy": "random-fetch", "budget": "10 entries"})
        ledger = Replayer(trace, cold=True).run(policy)
        assert ledger.hit[:, 0].tolist() == [0, 0, 9]
        watched = []
        Replayer(trace, cold=True).run(
            policy, watch=lambda m: watched.append(m.residency.slots.copy())
        )
        gone.append(int(np.flatnonzero(watched[1][0] == 20)[0]))
    counts = np.bincount(gone, minlength=10)
    assert counts.min() > 10 and counts.max() < 55  # 30 each, give or take 5.2


@pytest.mark.parametrize("name", ["lru", "lfu", "lruk"])
def test_a_history_may_begin_with_the_prompts_attention(name):
    mass = [[0, 5, 0, 4, 0, 0, 1, 2]]
    trace = HandTrace([[[1, 3]], [[6]], [[3]], [[1]]], prompt_mass=mass)
    spec = {"policy": name, "budget": "2 entries"}
    assert hits(trace, spec) == [0, 0, 1, 0]  # at first the newest two, 6 and 7
    assert hits(trace, spec | {"prompt_history": True}) == [2, 0, 1, 0]


def test_hisparse_puts_hits_above_what_was_just_loaded_and_the_rest_in_front():
    # A buffer of 4 and a slot for entry 11, the newest: it starts with 0 1 2 3.
    # Step 0: 1 is hit, 5 takes 0's slot: 2 3 5 1. Step 1: 6 and 7 take 2's and 3's: 5 1 6 7.
    # Step 2: 5 is hit, 8 takes 1's: 6 7 8 5. Step 3: 0 takes 6's: 7 8 5 0.
    steps = [[1, 5], [6, 7], [5, 8], [0, 11], [5, 7, 8], [1, 6]]
    trace = HandTrace([[step] for step in steps], prompt_entries=12)
    spec = {"policy": "hisparse", "budget": "4 entries"}
    assert hits(trace, spec) == [1, 0, 1, 1, 3, 0]


def test_hisparse_starts_with_the_oldest_entries_or_with_none():
    trace = HandTrace([[[0, 1, 2, 3, 11]]], prompt_entries=12)
    spec = {"policy": "hisparse", "budget": "3 entries"}
    assert hits(trace, spec) == [4]  # 0, 1, 2 and the newest
    assert hits(trace, spec | {"initial": "empty"}) == [1]
    fits = {"policy": "hisparse", "budget": "12 entries", "initial": "empty"}
    assert hits(trace, fits) == [5]
    grows = HandTrace([[[*range(12)]]] * 4, prompt_entries=12, still=False)
    for budget, there in (("12 entries", 12), ("11 entries", 1)):  # the newest has its own slot
        assert hits(grows, fits | {"budget": budget})[0] == there


def test_hisparses_newest_entry_leaves_when_the_next_one_closes():
    # Entry 8 closes at step 3: it takes the slot of 7, the newest until then, and of no other.
    trace = HandTrace([[[0, 1]]] * 3 + [[[0, 1, 7, 8]]], prompt_entries=8, still=False)
    spec = {"policy": "hisparse", "budget": "2 entries"}
    assert hits(trace, spec) == [2, 2, 2, 3]
    # also where it is the last that was used
    used = HandTrace([[[7]]] * 3 + [[[0, 1, 8]]], prompt_entries=8, still=False)
    assert hits(used, spec) == [1, 1, 1, 3]
