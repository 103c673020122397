"""What a run's windows tell, on ledgers made by hand."""

import numpy as np
import pytest
from hand_ledger import FLASH, H100, ledger, loads

from fmsim import bootstrap
from fmsim.sim import metrics, windows
from fmsim.sim.decode import simulate

LAYER_MAP = (0,) * 15 + (1,) * 3 + (2,) * 3


@pytest.mark.parametrize(
    ("steps", "steady", "blocks"),
    [
        (520, (128, 512), 8),
        (512, (128, 512), 8),
        (390, (128, 384), 6),
        (258, (128, 256), 4),
        (192, (128, 192), 3),
        (191, (0, 191), 3),  # no third whole window
        (128, (0, 128), 2),
        (10, (0, 10), 1),
    ],
)
def test_the_steady_state_are_whole_windows_from_the_third_on(steps, steady, blocks):
    found = windows.steady_steps(steps, 64)
    assert (found.start, found.stop) == steady
    assert windows.n_windows(steps, 64) == blocks


def test_what_the_first_windows_recall_is_left_out():
    """Windows 0 and 1 share a state: a set that never changes at step 64 says nothing."""
    overlap = np.array([1.0, 0.5, 0.25, 0.75], np.float32)
    moved = loads(260, s64=1000, s128=100, s192=300, s256=500)
    made = ledger(n_steps=260, lookahead_loads=moved, set_overlap=overlap)
    timeline = simulate(made, FLASH, H100)
    row = metrics.row(made, timeline, FLASH, H100)
    assert row["set_overlap"] == 0.5
    assert row["h2d_bytes"] == timeline.h2d_bytes.sum()
    per_slot = row["h2d_bytes"] / 1900
    assert row["h2d_bytes_per_step"] == pytest.approx(per_slot * (100 + 300) / 128)
    waited = timeline.recall_wait_s[128:256].sum() + timeline.stall_s[128:256].sum()
    assert row["stall_ratio"] == pytest.approx(
        waited / (timeline.end_s[255] - timeline.start_s[128])
    )


def test_golden_entries_are_counted_pooled_and_step_by_step():
    """Half of the steps have 30 golden entries and find them all, half have 10 and find none."""
    made = ledger()
    made.golden[::2], made.golden_hit[::2] = 30, 30
    made.golden[1::2], made.golden_hit[1::2] = 10, 0
    found = metrics.kept(made, LAYER_MAP)
    assert found["entry_recall"] == pytest.approx(0.75)
    assert found["entry_recall_per_step"] == pytest.approx(0.5)


def test_intervals_are_the_bootstraps_of_sums_by_window():
    random = np.random.default_rng(7)
    made = ledger(n_steps=400, set_overlap=np.array([1, 0.2, 0.4, 0.5, 0.3, 0.6], np.float32))
    made.mass_kept[:] = made.mass_total * random.random((400, 3))
    made.hit[:] = random.integers(0, 513, (400, 3))
    found = windows.intervals(made, LAYER_MAP)
    weights = np.array([15, 3, 3])
    kept, mass, missed = np.zeros(6), np.zeros(6), np.zeros(6)
    for step in range(400):
        window = min(step // 64, 5)  # the last 16 steps go with the sixth window
        for layer in range(3):
            kept[window] += weights[layer] * float(made.mass_kept[step, layer])
            mass[window] += weights[layer] * float(made.mass_total[step, layer])
            missed[window] += weights[layer] * (512 - int(made.hit[step, layer]))
    assert found["mass_kept"] == pytest.approx(bootstrap.ratio(kept, mass).plain(0.0, 1.0))
    steps = np.array([64, 64, 64, 64, 64, 80])
    misses = bootstrap.ratio(missed, steps)
    assert found["misses"]["half_width"] == pytest.approx(400 * misses.half_width)
    assert found["misses"]["blocks"] == 6
    row = metrics.row(made, simulate(made, FLASH, H100, LAYER_MAP), FLASH, H100, LAYER_MAP)
    assert row["ci95"] == found
    middle = (found["misses"]["low"] + found["misses"]["high"]) / 2
    assert middle == pytest.approx(row["misses"])
    overlap = bootstrap.mean(made.set_overlap[1:])
    assert found["set_overlap"]["half_width"] == pytest.approx(overlap.half_width)
    assert windows.intervals(made, LAYER_MAP) == found  # same input, same bytes


def test_of_a_trace_without_masses_only_hits_and_misses_have_intervals():
    made = ledger(n_steps=256, masses=False)
    assert set(windows.intervals(made, LAYER_MAP)) == {"hit_rate", "misses", "set_overlap"}
    assert set(windows.intervals(ledger(unmeasured=[0, 1, 2]), LAYER_MAP)) == {"set_overlap"}
    parts = windows.intervals(ledger(n_steps=256, unmeasured=[1]), LAYER_MAP)
    assert {"mass_kept", "entry_recall", "hit_rate", "misses", "set_overlap"} <= set(parts)
    some, none = ledger(n_steps=256, unmeasured=[1]), ledger(n_steps=256, unmeasured=[0, 1, 2])
    rows = windows.differences({"a": some, "b": some, "none": none}, LAYER_MAP)
    assert {(row["policy"], row["other"]) for row in rows} == {("a", "b")}


def test_one_window_has_figures_without_an_interval():
    found = windows.intervals(ledger(n_steps=10), LAYER_MAP)
    assert found["hit_rate"]["half_width"] is None and found["misses"]["half_width"] is None


def test_of_traces_without_masses_hits_alone_are_compared():
    one, other = ledger(n_steps=256, masses=False), ledger(n_steps=256, masses=False)
    rows = windows.differences({"one": one, "other": other}, LAYER_MAP)
    assert [row["figure"] for row in rows] == ["hit_rate"]


def test_differences_are_paired_by_window():
    random = np.random.default_rng(2)
    hard = np.repeat(random.uniform(0.3, 0.7, 8), 64)[:, None]
    one, other = ledger(n_steps=512), ledger(n_steps=512)
    one.mass_kept[:] = one.mass_total * hard
    other.mass_kept[:] = other.mass_total * (hard + 0.1)
    rows = windows.differences({"one": one, "other": other}, LAYER_MAP)
    assert [row["figure"] for row in rows] == ["mass_kept", "entry_recall", "hit_rate"]
    row = rows[0]
    assert (row["policy"], row["other"]) == ("one", "other")
    assert row["difference"] == pytest.approx(-0.1, abs=1e-6)
    assert row["half_width"] < 1e-6  # each window differs by as much
    assert windows.intervals(one, LAYER_MAP)["mass_kept"]["half_width"] > 0.05


def test_a_difference_of_shares_lies_between_minus_1_and_1():
    """Of a request that hits nothing in one window and all in the others, and its opposite."""
    one, other = ledger(n_steps=256), ledger(n_steps=256)
    one.hit[:], other.hit[:] = one.accessed, 0
    one.hit[64:128] = 0
    rows = {
        (row["policy"], row["figure"]): row
        for pair in ({"one": one, "other": other}, {"other": other, "one": one})
        for row in windows.differences(pair, LAYER_MAP)
    }
    share = windows.intervals(one, LAYER_MAP)["hit_rate"]
    assert (share["high"], share["low"]) == (1.0, 0.0) and share["half_width"] > 0.75
    up, down = rows["one", "hit_rate"], rows["other", "hit_rate"]
    assert up["difference"] == 0.75 == -down["difference"] and up["half_width"] > 0.25
    assert (up["high"], down["low"]) == (1.0, -1.0)
    assert up["low"] == 0.75 - up["half_width"] == -down["high"]


def test_mass_is_told_layer_by_layer():
    made = ledger()
    made.mass_kept[:] = [0.5, 0.25, 0.0]
    assert metrics.mass_by_layer(made) == pytest.approx([1.0, 0.5, 0.0])
    assert metrics.mass_by_layer(ledger(unmeasured=[1]))[1] is None
