"""Steps against sums worked by hand: what overlaps, what stalls, and that no byte is lost or
counted twice.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
from hand_ledger import FLASH, H100, ledger, loads
from hypothesis import given, settings
from hypothesis import strategies as st

from fmsim.errors import FmsimError
from fmsim.geometry import PRESETS
from fmsim.hw import hardware_names, load_hardware
from fmsim.sim.decode import simulate
from fmsim.sim.footprint import allocation, footprint, spread
from fmsim.sim.step_cost import StepModel
from fmsim.sim.timeline import SimulatedTimeline
from fmsim.sim.transfer_cost import GatherCurve


def test_full_residency_is_the_sum_of_the_kernel_costs():
    full = ledger(slots=8100, on_miss="fetch")
    timeline = simulate(full, FLASH, H100)
    place = footprint(full, FLASH)
    costs = StepModel(H100, FLASH).equal(1, place.tokens, place.tokens // 4)
    np.testing.assert_allclose(timeline.step_s, costs.total_s(FLASH.n_csa))
    assert timeline.h2d_bytes.sum() == timeline.stall_s.sum() == 0


def test_a_miss_stalls_its_layer_for_one_gather():
    missing = ledger(n_groups=3, on_miss="fetch", cadence=1, demand_loads=loads(128, 3, s10=40))
    timeline = simulate(missing, FLASH, H100)
    one_layer_s = float(GatherCurve(H100.link).seconds(584, 40 * 584))
    assert timeline.stall_s[10] == pytest.approx(21 * one_layer_s)
    assert timeline.step_s[10] == pytest.approx(timeline.step_s[9] + 21 * one_layer_s, rel=1e-3)
    assert timeline.h2d_bytes[10] == 21 * 40 * 584
    assert np.count_nonzero(timeline.stall_s) == 1


def test_a_recall_in_the_window_before_costs_no_time_and_a_late_one_its_rest():
    recalled = ledger(lookahead_loads=loads(128, s64=300))
    timeline = simulate(recalled, FLASH, H100)
    assert timeline.h2d_bytes.sum() == 300 * 21 * (
        584 + 132
    )  # masked: keys move with their entries
    assert timeline.recall_wait_s.sum() == 0
    n_bytes = 300 * 21 * (584 + 132)
    late = simulate(
        ledger(lookahead_loads=loads(128, s64=300), params={"stale": False}), FLASH, H100
    )
    assert late.recall_wait_s[64] == pytest.approx(
        float(GatherCurve(H100.link).seconds(716, n_bytes))
    )
    assert late.step_s[64] == pytest.approx(timeline.step_s[64] + late.recall_wait_s[64])


def test_a_prefetch_between_decisions_is_waited_for_unless_it_is_known_a_step_ahead():
    at = loads(128, s10=300)
    late, ahead = (
        simulate(ledger(cadence=1, lookahead_loads=at, params={"stale": known}), FLASH, H100)
        for known in (False, True)
    )
    gather_s = float(GatherCurve(H100.link).seconds(716, 300 * 21 * 716))
    assert late.recall_wait_s[10] == late.recall_wait_s.sum() == pytest.approx(gather_s)
    assert ahead.recall_wait_s.sum() == 0  # it ran beside step 9


def test_a_recall_longer_than_its_window_is_waited_for():
    slots = 2_000_000  # far more than 64 steps can bring in
    timeline = simulate(ledger(lookahead_loads=loads(128, s64=slots)), FLASH, H100)
    gather_s = float(GatherCurve(H100.link).seconds(716, slots * 21 * 716))
    assert timeline.start_s[64] + timeline.recall_wait_s[64] == pytest.approx(gather_s, rel=1e-6)


def test_misses_beside_a_recall_share_the_link():
    alone = ledger(on_miss="fallback", demand_loads=loads(128, s0=200))
    beside = ledger(
        on_miss="fallback", demand_loads=loads(128, s0=200), lookahead_loads=loads(128, s64=20_000)
    )
    stall_alone, stall_beside = (simulate(each, FLASH, H100).stall_s[0] for each in (alone, beside))
    assert stall_alone < stall_beside < 2.1 * stall_alone


def test_a_batch_moves_its_bytes_and_needs_its_memory():
    moves = ledger(lookahead_loads=loads(128, s64=300))
    one, eight = simulate(moves, FLASH, H100), simulate(moves, FLASH, H100, batch=8)
    assert eight.h2d_bytes.sum() == 8 * one.h2d_bytes.sum()
    assert one.step_s.mean() < eight.step_s.mean() < 8 * one.step_s.mean()
    with pytest.raises(FmsimError, match=r"batch 100000.* GiB more than"):
        simulate(moves, FLASH, H100, batch=100_000)


@settings(max_examples=30, deadline=None)
@given(
    demand=st.lists(st.integers(0, 2000), min_size=96, max_size=96),
    recall=st.integers(0, 100_000),
    on_miss=st.sampled_from(["fetch", "mask", "fallback"]),
    granularity=st.sampled_from([1, 4, 16, 64]),
)
def test_time_only_grows_and_bytes_are_the_ledgers(demand, recall, on_miss, granularity):
    moves = ledger(
        n_steps=96,
        granularity=granularity,
        on_miss=on_miss,
        slots=8000 // granularity // 10,
        demand_loads=np.array(demand, np.int32)[:, None],
        lookahead_loads=loads(96, s64=recall),
    )
    timeline = simulate(moves, FLASH, H100)
    still = simulate(
        ledger(
            n_steps=96, granularity=granularity, on_miss=on_miss, slots=8000 // granularity // 10
        ),
        FLASH,
        H100,
    )
    row_bytes = granularity * (716 if on_miss == "mask" else 584)
    assert timeline.h2d_bytes.sum() == (sum(demand) + recall) * 21 * row_bytes
    assert (timeline.step_s >= still.step_s * (1 - 1e-12)).all()
    np.testing.assert_allclose(timeline.start_s[1:], timeline.end_s[:-1])
    link_s = timeline.h2d_bytes.sum() / H100.link.bandwidth_bytes_per_s.value
    assert timeline.end_s[-1] >= link_s * (1 - 1e-9)


@pytest.mark.parametrize("name", hardware_names())
def test_every_preset_costs_more_for_more(name):
    hw = load_hardware(name)
    contexts = np.array([1024, 65_536, 131_072, 524_288, 1_048_576])
    if any(times.engine for times in hw.kernels.values()):
        # fmsim's own engine: its top-k at 65,536 tokens is one program, which takes longer than
        # several do at 131,072
        contexts = contexts[contexts != 65_536]
    for geometry in (PRESETS["v4-flash"], PRESETS["v4-pro"]):
        one = StepModel(hw, geometry).equal(1, contexts, contexts // 4).total_s(geometry.n_csa)
        many = StepModel(hw, geometry).equal(100, contexts, contexts // 4).total_s(geometry.n_csa)
        assert (np.diff(one) > 0).all() and (many > one).all() and (many < 100 * one).all()


@pytest.mark.parametrize(
    ("tokens", "batch", "tokens_per_s"), [(262_144, 47, 1584), (524_288, 25, 1028)]
)
def test_h20_decodes_the_full_cache_at_the_published_rates(tokens, batch, tokens_per_s):
    """FlashMemory's serving table; one factor of h20.yaml is calibrated on both rows, so each may
    be off by 10%.
    """
    costs = StepModel(load_hardware("h20"), FLASH).equal(
        batch, np.array([tokens]), np.array([tokens // 4])
    )
    assert batch / costs.total_s(FLASH.n_csa)[0] == pytest.approx(tokens_per_s, rel=0.10)


def test_gathers_take_the_measured_times():
    curve = GatherCurve(H100.link)
    for gather in H100.link.gathers:
        for rows, rate in gather.bytes_per_s.items():
            n_bytes = rows * gather.row_bytes
            assert float(curve.seconds(gather.row_bytes, n_bytes)) == pytest.approx(n_bytes / rate)
    assert float(curve.seconds(584, 0)) == 0
    assert 5e-6 < float(curve.seconds(584, 584)) < 60e-6  # one entry costs the launch


def test_the_layer_map_is_spread_evenly_or_refused():
    assert spread(3, 21) == (0,) * 7 + (1,) * 7 + (2,) * 7
    assert spread(30, 21)[-1] == 28 and len(set(spread(30, 21))) == 21
    with pytest.raises(FmsimError, match="layer_map: give 21"):
        footprint(ledger(), FLASH, layer_map=[0, 1])


def test_a_timeline_is_written_whole(tmp_path):
    timeline = simulate(ledger(), FLASH, H100)
    timeline.save(tmp_path / "out" / "t.json")
    assert json.loads((tmp_path / "out" / "t.json").read_text())["end_s"] == timeline.end_s.tolist()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["t.json"]


def test_a_timeline_reads_back_equal_or_tells_what_is_wrong(tmp_path):
    path = tmp_path / "t.json"
    timeline = simulate(ledger(lookahead_loads=loads(128, s64=300)), FLASH, H100, batch=2)
    timeline.save(path)
    back = SimulatedTimeline.load(path)
    assert (back.policy, back.batch, back.transfers) == (timeline.policy, 2, timeline.transfers)
    for name in (
        "start_s",
        "end_s",
        "stall_s",
        "recall_wait_s",
        "h2d_bytes",
        "d2h_bytes",
        "kv_bytes",
    ):
        np.testing.assert_array_equal(getattr(back, name), getattr(timeline, name))
    path.write_text(path.read_text()[:-5])
    with pytest.raises(FmsimError, match="t.json: not valid JSON"):
        SimulatedTimeline.load(path)
    path.write_text('{"policy": "lru", "transfers": []}')
    with pytest.raises(FmsimError, match="not a whole fmsim timeline"):
        SimulatedTimeline.load(path)
    with pytest.raises(FmsimError, match="no such timeline"):
        SimulatedTimeline.load(tmp_path / "none.json")


def test_transfers_are_what_was_moved_and_waited_for():
    moves = ledger(
        on_miss="fallback",
        demand_loads=loads(128, s0=200, s70=40),
        lookahead_loads=loads(128, s64=20_000),
    )
    timeline = simulate(moves, FLASH, H100)
    by_kind = {
        kind: [move for move in timeline.transfers if move.kind == kind]
        for kind in ("misses", "recall", "write_back")
    }
    assert (
        sum(move.n_bytes for move in by_kind["misses"] + by_kind["recall"])
        == timeline.h2d_bytes.sum()
    )
    assert [move.step for move in by_kind["recall"]] == [64] and by_kind["recall"][0].start_s == 0
    assert [move.step for move in by_kind["misses"]] == [0] * 21 + [
        70
    ]  # layer by layer beside the recall, then alone on the link
    for step in (0, 70):
        waited_s = sum(move.end_s - move.start_s for move in by_kind["misses"] if move.step == step)
        assert waited_s == pytest.approx(timeline.stall_s[step])
    assert [move.n_bytes for move in by_kind["write_back"]] == [timeline.d2h_bytes[64]]
    assert all(
        timeline.start_s[0] <= move.start_s <= move.end_s <= timeline.end_s[-1]
        for move in timeline.transfers
    )


def test_bytes_of_layers_with_slots_of_their_own_by_hand():
    """Three of the trace's layers drive 15, 3 and 3 of the model's 21."""
    layer_map = (0,) * 15 + (1,) * 3 + (2,) * 3
    made = ledger(
        n_groups=3,
        group_slots=[1200, 800, 400],
        slots=1200,
        granularity=4,
        on_miss="fetch",
        ahead_slots=[300, 200, 100],
        miss_slots=512,
        resident=np.tile(np.array([1200, 800, 400], np.int32), (128, 1)),
    )
    planned = allocation(made, FLASH, layer_map)
    slots = 15 * 1200 + 3 * 800 + 3 * 400
    assert planned.slots == slots * 4 * 584
    assert planned.spare == (21 * 512 + 15 * 300 + 3 * 200 + 3 * 100) * 4 * 584
    masked = replace(made, all_keys=False, target_layers=[0, 1], on_miss="mask", miss_slots=0)
    planned = allocation(masked, FLASH, layer_map)  # keys beside all layers but the first two
    assert planned.slots == 4 * (slots * 584 + (slots - 2 * 1200) * 132)
    assert planned.index_keys == 2 * 8032 * 132
    with pytest.raises(FmsimError, match="layer_map: give 21"):
        allocation(made, FLASH, [0, 1])


@given(
    row_bytes=st.sampled_from([584, 716, 1000, 37_376]),
    n_bytes=st.floats(0, 1e9),
    big=st.booleans(),
)
def test_one_gather_takes_what_it_takes_among_many(row_bytes, n_bytes, big):
    curve = GatherCurve(H100.link)
    n_bytes = n_bytes * (10 if big else 1)
    among = curve.seconds(row_bytes, np.array([1.0, n_bytes, 1e6]))[1]
    assert curve.one_s(row_bytes, n_bytes) == pytest.approx(float(among), rel=1e-9)
