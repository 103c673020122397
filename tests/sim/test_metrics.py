"""Every figure of a row, against its formula worked on a ledger made by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
from hand_ledger import FLASH, H100, ledger, loads

from fmsim.hw import load_hardware
from fmsim.sim import metrics
from fmsim.sim.decode import simulate
from fmsim.sim.footprint import footprint

TOKENS = 512_000
ENTRIES = TOKENS // 4


def row_of(made, **options):
    return metrics.row(made, simulate(made, FLASH, H100, **options), FLASH, H100)


def test_logical_bytes_are_the_kept_share_of_the_full_cache():
    tenth = ledger(prompt_entries=ENTRIES, slots=ENTRIES // 10)
    row = row_of(tenth)
    # 12,800 of 128,032 entries with their keys, beside 4,001 HCA entries a layer and the windows
    fixed = FLASH.window_bytes + 20 * 4001 * 584
    assert row["gpu_bytes"] == fixed + 21 * 12_800 * 716
    assert row["gpu_ratio"] == row["gpu_bytes"] / (fixed + 21 * 128_032 * 716)
    assert row["kv_hbm_ratio"] == pytest.approx(0.1, rel=1e-3)
    assert row["kv_hbm_bytes"] == pytest.approx(0.1 * FLASH.full_kv_bytes(TOKENS), rel=1e-3)


def test_shares_are_sums_over_steps_weighted_by_the_layers_driven():
    """Of the 21 layers, trace layer 0 drives 15: its golden entries were all there, the others'
    were not.
    """
    layer_map = (0,) * 15 + (1,) * 3 + (2,) * 3
    made = ledger()
    made.golden_hit[:, 0], made.golden_hit[:, 1:] = 10, 0
    made.mass_kept[:, 0], made.mass_kept[:, 1:] = 0.5, 0.25
    row = metrics.row(made, simulate(made, FLASH, H100, layer_map), FLASH, H100, layer_map)
    assert row["entry_recall"] == pytest.approx(15 / 21)
    assert row["mass_kept"] == pytest.approx((15 + 6 * 0.5) / 21)
    assert row["set_overlap"] == 0.5
    assert (
        metrics.row(
            ledger(set_overlap=np.zeros(0, np.float32)), simulate(made, FLASH, H100), FLASH, H100
        )["set_overlap"]
        is None
    )


def test_rates_and_stalls_come_from_the_timeline():
    made = ledger(
        n_groups=3, on_miss="fetch", cadence=1, demand_loads=loads(128, 3, s10=40, s11=80)
    )
    timeline = simulate(made, FLASH, H100, batch=4)
    row = metrics.row(made, timeline, FLASH, H100)
    assert row["decode_tokens_per_s"] == pytest.approx(4 * 128 / timeline.end_s[-1])
    assert row["stall_ratio"] == pytest.approx(timeline.stall_s.sum() / timeline.end_s[-1])
    assert row["step_s"]["p50"] < row["step_s"]["p99"] <= timeline.step_s.max()
    assert row["h2d_bytes"] == 4 * 120 * 21 * 584


def test_figures_are_of_the_layers_that_were_measured():
    """Half of the mass is kept in the first layer, all in the last; the middle one is not known."""
    kept = np.array([[0.25, 0.0, 0.5]] * 128, np.float32)
    made = ledger(unmeasured=[1], mass_kept=kept)
    layer_map = (0,) * 7 + (1,) * 7 + (2,) * 7
    found = metrics.kept(made, layer_map) | metrics.hits(made, layer_map)
    assert found["mass_kept"] == pytest.approx(0.75)
    assert found["entry_recall"] == pytest.approx(0.8)
    assert found["entry_recall_per_step"] == pytest.approx(0.8)
    assert found["hit_rate"] == pytest.approx(400 / 512)
    assert found["misses"] == 128 * 14 * 112
    none = ledger(unmeasured=[0, 1, 2])
    found = metrics.kept(none, layer_map) | metrics.hits(none, layer_map)
    assert {name for name, value in found.items() if value is not None} == {"set_overlap"}


def test_the_99th_percentile_of_steps_of_1_to_101_ms_is_100():
    step_s = np.arange(101, 0, -1) / 1e3
    end_s = np.cumsum(step_s)
    timeline = SimpleNamespace(
        batch=2,
        step_s=step_s,
        start_s=end_s - step_s,
        end_s=end_s,
        h2d_bytes=step_s,
        stall_s=0 * step_s,
        recall_wait_s=0 * step_s,
    )
    row = metrics.timed(timeline)
    assert row["step_s"] == {"p50": pytest.approx(0.051), "p99": pytest.approx(0.1)}
    assert row["stall_ratio"] == 0
    assert row["decode_tokens_per_s"] == pytest.approx(2 * 101 / 5.151)
    assert (row["h2d_bytes"], row["h2d_bytes_per_step"]) == (5, pytest.approx(0.051))
    timeline.stall_s[0], timeline.recall_wait_s[100] = 0.01, 0.02  # the first and the last
    assert metrics.timed(timeline)["stall_ratio"] == pytest.approx(0.03 / 5.151)
    # the last 51 steps take 1 to 51 ms
    late = metrics.timed(timeline, slice(50, 101))
    assert late["stall_ratio"] == pytest.approx(0.02 / 1.326)
    assert late["h2d_bytes_per_step"] == pytest.approx(0.026)
    timeline.stall_s[7] = np.nan  # not known of one step
    assert metrics.timed(timeline)["stall_ratio"] is None


def test_index_keys_stay_where_misses_are_fetched_and_move_where_they_are_masked():
    pairs, hca = 21 * ENTRIES, 20 * (TOKENS // 128) * 584
    fixed = FLASH.window_bytes + hca
    fetched = footprint(
        ledger(n_steps=1, prompt_entries=ENTRIES, slots=1024, on_miss="fetch"), FLASH
    )
    assert fetched.allocated.total == fixed + 21 * 1024 * 584 + pairs * 132
    masked = footprint(ledger(n_steps=1, prompt_entries=ENTRIES, slots=1024), FLASH)
    assert masked.allocated.total == fixed + 21 * 1024 * (584 + 132)
    # a memory indexer scored three layers' keys, so those stay whole
    scored = footprint(
        ledger(n_steps=1, prompt_entries=ENTRIES, slots=1024, scored=np.array([3 * ENTRIES])), FLASH
    )
    assert scored.allocated.total == fixed + 21 * 1024 * 584 + (3 * ENTRIES + 18 * 1024) * 132


def test_capacity_names_what_binds():
    never_back = ledger(prompt_entries=ENTRIES, slots=ENTRIES // 10)
    pool = H100.kv_pool_bytes(FLASH)
    place = footprint(never_back, FLASH)
    assert place.host_bytes == 0
    assert metrics.capacity(place, FLASH, H100) == (
        int(pool // place.allocated.total),
        "GPU memory",
    )
    recalled = footprint(
        ledger(prompt_entries=ENTRIES, slots=ENTRIES // 100, lookahead_loads=loads(128, s64=1)),
        FLASH,
    )
    mirror = FLASH.host_kv_bytes(TOKENS + 128)
    assert metrics.capacity(recalled, FLASH, H100) == (
        int(H100.host_bytes_per_gpu // mirror),
        "host memory",
    )


def test_a_servers_requests_are_those_of_its_ranks_and_their_gpus():
    """Three ranks of two GPUs with 1,000 bytes each: 20 requests of 100 bytes a rank; in two parts
    of 950 bytes of host memory six mirrors of 300.
    """
    hw = SimpleNamespace(
        placed=SimpleNamespace(dp=3, cp=2),
        kv_pool_bytes=lambda geometry: 1000,
        host_bytes_per_gpu=950,
    )
    for host_bytes, expected in ((0, (60, "GPU memory")), (300, (18, "host memory"))):
        place = SimpleNamespace(allocated=SimpleNamespace(total=100), host_bytes=host_bytes)
        assert metrics.capacity(place, FLASH, hw) == expected


def test_where_nothing_matters_nothing_is_lost():
    found = metrics.kept(ledger(golden=np.zeros((128, 3), np.int32)), (0,) * 21)
    assert found["entry_recall"] == found["entry_recall_per_step"] == 1.0
    assert metrics.mass_by_layer(ledger(masses=False)) == [None] * 3
    one = np.ones((128, 3), np.int32)
    found = metrics.kept(ledger(golden=one, golden_hit=one), (0,) * 21)
    assert found["entry_recall_per_step"] == 1.0
    found = metrics.kept(ledger(masses=False), (0,) * 21)
    assert {name for name, value in found.items() if value is not None} == {"set_overlap"}


def test_exact_means_that_nothing_selected_was_left_out():
    assert not metrics.details(ledger(), FLASH, H100)["exact"]
    kept = ledger(mass_kept=np.full((128, 3), 0.5, np.float32))
    assert metrics.details(kept, FLASH, H100)["exact"]
    for lost, exact in ((0.9e-6, True), (1.1e-6, False)):  # rounding is no loss
        kept = ledger(
            mass_kept=np.full((128, 3), 0.5 * (1 - lost)), mass_total=np.full((128, 3), 0.5)
        )
        assert metrics.exact(kept) is exact
    for lost, exact in ((0.0, None), (0.1, False)):  # what is known of two of three layers
        kept = ledger(unmeasured=[1], mass_kept=np.full((128, 3), 0.5 - lost, np.float32))
        assert metrics.exact(kept) is exact


@pytest.mark.parametrize(("k_tokens", "admitted"), [(256, 47), (512, 25)])
def test_h20_admits_the_published_number_of_full_caches(k_tokens, admitted):
    """FlashMemory's serving table; the preset's reserve is derived from both rows, so each may be
    off by 5%.
    """
    hw, entries = load_hardware("h20"), k_tokens * 1024 // 4
    full = footprint(
        ledger(n_steps=1, prompt_entries=entries, slots=entries, on_miss="fetch"), FLASH
    )
    assert metrics.capacity(full, FLASH, hw)[0] == pytest.approx(admitted, rel=0.05)
