"""Bytes of a request, layer by layer, worked by hand.

V4-Flash: 21 CSA layers; an entry has 584 bytes and its index key 132; 20 HCA layers; windows.
"""

import numpy as np
import pytest
from hand_ledger import FLASH, ledger, loads

from fmsim.errors import FmsimError
from fmsim.sim.footprint import Allocation, ModelMemory, allocation, footprint, spread

WINDOWS = 43 * 128 * 584
THREE = {"n_groups": 3, "slots": 1200, "group_slots": [1200, 800, 400]}


def test_layers_of_a_trace_stand_for_a_models_in_order():
    assert spread(3, 7) == (0, 0, 0, 1, 1, 2, 2)
    assert spread(5, 3) == (0, 1, 3) and spread(1, 2) == (0, 0)


def test_layers_that_keep_their_keys_come_first():
    """Seven layers of each group; the first three keep all keys of 8,032 entries, so their slots
    hold none.
    """
    found = allocation(ledger(**THREE, target_layers=[0, 1, 2]), FLASH)
    slots = 3 * 1200 * 584 + (4 * 1200 + 7 * 800 + 7 * 400) * 716
    assert found == Allocation(slots, 0, 3 * 8032 * 132, 20 * 251 * 584, WINDOWS)
    assert found.kv_bytes == found.total == slots + 3 * 8032 * 132 + 20 * 251 * 584 + WINDOWS


def test_a_single_layers_keys_may_come_and_go():
    for n_keyed, tiered in ((20, True), (21, False), (30, False)):
        made = ledger(target_layers=list(range(n_keyed)), all_keys=False)
        assert footprint(made, FLASH).keys_tiered is tiered


def test_spare_pages_of_uneven_groups():
    """A quarter of each group's slots with their keys, and four pages for misses without."""
    made = ledger(**THREE, ahead_slots=[300, 200, 100], miss_slots=4, granularity=4)
    found = allocation(made, FLASH)
    assert found.slots == 4 * 7 * 2400 * 716
    assert found.spare == 4 * (7 * 600 * 716 + 21 * 4 * 584)
    assert found.total == found.kv_bytes + found.spare


def test_a_layer_map_says_who_drives_whom():
    """Group 0 drives one layer, group 2 all others."""
    layer_map = (0,) + (2,) * 20
    place = footprint(ledger(**THREE, all_keys=True), FLASH, layer_map)
    assert place.layer_map == layer_map and place.groups.tolist() == list(layer_map)
    assert place.allocated.slots == (1200 + 20 * 400) * 584
    shared = footprint(ledger(), FLASH, layer_map)
    assert shared.groups.tolist() == [0] * 21  # one set for all


@pytest.mark.parametrize("layer_map", [(0,) * 20, (0,) * 22, (3,) * 21, (-1,) * 21])
def test_a_layer_map_that_does_not_fit_is_told(layer_map):
    with pytest.raises(FmsimError, match="layer_map: give 21 numbers"):
        footprint(ledger(), FLASH, layer_map)


def test_contexts_grow_a_token_a_step_or_as_entries_of_another_length_close():
    assert footprint(ledger(n_steps=5), FLASH).tokens.tolist() == [32_001 + n for n in range(5)]
    other = footprint(ledger(n_steps=9, entry_tokens=2), FLASH).tokens
    assert (other - 32_000).tolist() == [0, 4, 4, 8, 8, 12, 12, 16, 16]


def test_kept_shares_scored_entries_and_the_mirror():
    """800 of 8,000 entries in every layer; later 8,000 slots hold the 8,000 that are there."""
    made = ledger(n_steps=4, lookahead_loads=loads(4, s0=1))
    made.resident[1] = 9000
    made.resident[2] = 0
    place = footprint(made, FLASH)
    assert place.keys_tiered
    assert place.full_bytes.tolist() == [FLASH.full_kv_bytes(32_001 + n) for n in range(4)]
    shares = (place.logical_bytes / place.full_bytes).tolist()
    assert shares == pytest.approx([0.1, 1.0, 0.0, 800 / 8001])
    assert place.scored_entries.tolist() == [800, 8000, 0, 800]
    assert place.host_bytes == FLASH.host_kv_bytes(32_004)
    kept = footprint(ledger(n_steps=4, all_keys=True), FLASH)
    assert not kept.keys_tiered and kept.host_bytes == 0
    assert kept.scored_entries.tolist() == [8000, 8000, 8000, 8001]


def test_what_takes_the_bytes_is_named():
    memory = ModelMemory(FLASH)
    assert (memory.entry_bytes, memory.model_layers) == (584, 21)
    made = ledger(slots=1, all_keys=True, miss_slots=2, n_steps=1)
    request = made
    assert memory.full_bytes(request) == FLASH.full_gpu_bytes(32_001)
    assert memory.taken_bytes(made, request) == allocation(made, FLASH).total
    keys = 21 * 8000 * 132
    assert memory.shortage(made, request, keys - 1).startswith("index keys alone take ")
    said = memory.shortage(made, request, keys)
    assert said.startswith("leaves no room for a page: index keys ")
    assert "spare pages " in said and "HCA entries and windows " in said
    bare = ledger(slots=1, n_steps=1, prompt_entries=0)
    assert memory.shortage(bare, bare, 0).startswith("HCA entries and windows alone take ")
    assert "index keys" not in memory.shortage(bare, bare, 10**9)
    assert np.isclose(memory.taken_bytes(bare, bare), WINDOWS + 21 * 716)
