"""Times and bytes worked by hand, at sizes that occur."""

from itertools import pairwise

import numpy as np
import pytest
import simpy
from hand_ledger import FLASH, H100, ledger, loads
from hand_tables import round_link, tabled

from fmsim.errors import FmsimError
from fmsim.hw import load_hardware, replace_figure
from fmsim.hw.memory import FairLink
from fmsim.sim.decode import simulate
from fmsim.sim.footprint import footprint
from fmsim.sim.metrics import exact
from fmsim.sim.step_cost import memory_indexer_s


def test_a_link_takes_bytes_over_bandwidth():
    """55 GB at 27.5 GB/s are 2 s; two transfers at once share it, and take 4 s."""
    env = simpy.Environment()
    link = FairLink(env, 27.5e9)
    env.run(link.transfer(55e9))
    assert env.now == pytest.approx(2.0)
    both = [link.transfer(55e9), link.transfer(55e9)]
    env.run(env.all_of(both))
    assert env.now == pytest.approx(6.0)


def test_a_step_whose_misses_share_the_link_with_a_recall():
    """Two transfers share 60 GB/s, though each could do 50: 30 each. 21 layers miss 4,000 rows of
    716 bytes: each waits 10 us and 2,864,000 / 30e9 s. Alone the rate would be 50 GB/s.
    """
    hw = round_link(H100, 716)
    moves = {"demand_loads": loads(128, s0=4000), "on_miss": "fallback", "all_keys": False}
    alone = simulate(ledger(**moves), FLASH, hw)
    assert alone.stall_s[0] == pytest.approx(21 * (10e-6 + 2_864_000 / 50e9))
    recall = loads(128, s64=2_000_000)  # 30 GB, far longer than a step
    beside = simulate(ledger(**moves, lookahead_loads=recall), FLASH, hw)
    stall_s = 21 * (10e-6 + 2_864_000 / 30e9)
    assert beside.stall_s[0] == pytest.approx(stall_s)
    compute_s = alone.step_s[0] - alone.stall_s[0]
    assert beside.step_s[0] == pytest.approx(compute_s + stall_s)
    rows = [each for each in beside.transfers if each.kind == "misses"]
    assert len(rows) == 21 and all(each.n_bytes == 2_864_000 for each in rows)
    gaps_s = [later.start_s - each.end_s for each, later in pairwise(rows)]
    assert gaps_s == pytest.approx([compute_s / 21] * 20)


def test_pages_of_four_entries_take_the_bytes_of_four_entries():
    """At 32,001 tokens, 200 slots of 4 entries in each of 21 CSA layers and 10 spare ones for
    misses, all index keys there.

    Windows 43 x 128 x 584 = 3,214,336; HCA 20 x 250 x 584 = 2,920,000; entries 21 x 800 x 584 =
    9,811,200; spare 21 x 40 x 584 = 490,560; keys 21 x 8,000 x 132 = 22,176,000.
    """
    made = ledger(n_steps=1, slots=200, granularity=4, on_miss="fetch", miss_slots=10)
    found = footprint(made, FLASH).allocated
    assert (found.slots, found.spare, found.index_keys) == (9_811_200, 490_560, 22_176_000)
    assert found.total == 38_612_096


def test_a_layer_without_mass_loses_nothing():
    total = np.full((2, 3), 0.5, np.float32)
    total[:, 1] = 0
    assert exact(ledger(n_steps=2, mass_total=total, mass_kept=total)) is True
    kept = total.copy()
    kept[1, 2] = 0.499
    assert exact(ledger(n_steps=2, mass_total=total, mass_kept=kept)) is False


def test_without_masses_exact_means_that_misses_are_fetched_or_do_not_occur():
    hit = np.full((2, 3), 512, np.int32)
    for on_miss, hits, lossless in (
        ("fetch", hit - 1, True),
        ("mask", hit, True),
        ("mask", hit - 1, False),
        ("mask", hit - np.eye(2, 3, dtype=np.int32), False),
    ):
        made = ledger(n_steps=2, masses=False, on_miss=on_miss, hit=hits, accessed=hit)
        assert exact(made) is lossless, (on_miss, hits[0, 0])


def test_a_server_without_host_memory_decodes_what_needs_none():
    hw = replace_figure(H100, "host_bytes", 511)
    timeline = simulate(ledger(slots=8032, on_miss="fetch"), FLASH, hw)
    assert (
        timeline.end_s == simulate(ledger(slots=8032, on_miss="fetch"), FLASH, H100).end_s
    ).all()
    with pytest.raises(FmsimError, match="host memory"):
        simulate(ledger(lookahead_loads=loads(128, s64=1)), FLASH, hw)


def test_gpus_that_share_out_the_context_move_and_score_their_parts(monkeypatch):
    """8 requests on two GPUs times four that hold a quarter each: two requests' bytes on each."""
    hw = tabled(H100, monkeypatch, tp=2, cp=4, ep=1)
    scored = np.zeros(128, np.int64)
    scored[64] = 24_000
    moves = {"scored": scored, "comes_back": True}
    still = simulate(ledger(**moves), FLASH, hw, batch=8)
    moved = simulate(ledger(lookahead_loads=loads(128, s64=300), **moves), FLASH, hw, batch=8)
    assert (still.h2d_bytes.sum(), moved.h2d_bytes[64]) == (0, 2 * 300 * 21 * 716)
    written = FLASH.host_kv_bytes(32_065) - FLASH.host_kv_bytes(32_001)
    assert moved.d2h_bytes[64] == moved.d2h_bytes.sum() == 2 * written
    indexer_s = 2 * memory_indexer_s(hw, FLASH, np.array([24_000]))[0]
    plain = simulate(ledger(target_layers=[0, 1, 2], comes_back=True), FLASH, hw, batch=8)
    assert still.step_s[64] - plain.step_s[64] == pytest.approx(indexer_s)


def test_a_recall_of_a_few_rows_ends():
    """On H200, where 64 rows of 716 bytes were timed faster than 32."""
    made = ledger(lookahead_loads=loads(128, s64=2), params={"stale": False})
    timeline = simulate(made, FLASH, load_hardware("h200"))
    assert 5e-6 < timeline.recall_wait_s[64] < 20e-6
