"""Policies of which no trace was replayed, as ledgers."""

import numpy as np
from hand_ledger import FLASH

from fmsim.sim.serving.capacity.behaviour import BEHAVIOURS


def test_what_policies_are_taken_to_do_where_none_was_replayed():
    """V4-Flash: 32,768 entries of 131,072 tokens, and a top-k of 512; three windows of 64 steps."""
    full, lru, lsa = (each.ledger(FLASH) for each in BEHAVIOURS)
    for made in (full, lru, lsa):
        assert (made.n_steps, made.prompt_entries, made.tau, made.topk) == (192, 32_768, 64, 512)
        assert (made.granularity, made.scope, made.n_groups, made.entry_tokens) == (
            1,
            "shared",
            1,
            4,
        )
        assert (made.resident == made.n_slots).all() and made.accessed.max() == 512
        assert made.set_overlap.shape == (0,)  # nothing was replayed
        made.check()
    assert full.all_keys and lru.all_keys
    assert (full.n_slots, full.on_miss, full.comes_back) == (32_960, "fetch", False)
    assert full.params == {"budget": "all"} and not full.demand_loads.any()
    # of 512 selected entries 8.2% are missed at every step
    assert (lru.n_slots, lru.params, lru.miss_slots) == (1024, {"budget": "2x topk"}, 512)
    assert lru.demand_loads.tolist() == [[42]] * 192 and lru.cadence == 1
    assert (lru.on_miss, lru.comes_back) == ("fetch", True)
    # a tenth is kept; of successive sets 0.47 is common to what either has: 0.53 / 1.47 is new
    assert (lsa.n_slots, lsa.params, lsa.cadence) == (3277, {"budget": "10%"}, 64)
    new = np.zeros((192, 1), int)
    new[128] = round(3277 * 0.53 / 1.47)
    assert lsa.lookahead_loads.tolist() == new.tolist() and new[128] == 1182
    assert np.flatnonzero(lsa.scored).tolist() == [0, 64, 128] and lsa.scored[64] == 2 * 32_768
    assert (lsa.on_miss, lsa.all_keys, lsa.decides_ahead) == ("mask", False, True)
    assert (lsa.ahead_slots, lsa.target_layers, lsa.comes_back) == ([820], [0, 1], True)
    assert [each.exact for each in BEHAVIOURS] == [True, True, False]
    assert [each.mass_kept for each in BEHAVIOURS] == [1.0, 1.0, 0.72]
