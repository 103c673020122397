"""Times of coming steps, worked by hand on a link of 10 us and 50 GB/s."""

import numpy as np
import pytest
from hand_ledger import FLASH, H100, ledger, loads
from hand_request import PROMPT, request
from hand_tables import round_link

from fmsim.hw import replace_figure
from fmsim.hw.deployment import Deployment
from fmsim.sim.serving.batch import RunningBatch
from fmsim.sim.serving.demand import Demand
from fmsim.sim.serving.steps import DecodeTimes
from fmsim.sim.step_cost import StepModel, memory_indexer_s
from fmsim.sim.transfer_cost import GatherCurve

MISSED = np.zeros((128, 1), np.int32)
MISSED[::2] = 40
MISSES = Demand(ledger(on_miss="fetch", demand_loads=MISSED, params={"budget": "10%"}), FLASH)


def times(hw, demand=MISSES, n_requests=2, spilled=0.0, ranks=(0,)):
    batch = RunningBatch(demand)
    for number in range(n_requests):
        batch.add(request(demand, output=64, rank=ranks[number % len(ranks)]))
    model = StepModel(hw, FLASH)
    found = DecodeTimes(batch, model, GatherCurve(hw.link), lambda rank: spilled)
    return found, batch, model


def test_misses_of_two_requests():
    """At every other step each of 21 layers misses 2 x 40 rows of 584 bytes."""
    found = times(round_link(H100, 584))[0].ahead(3, np.zeros(3))
    n_bytes = 80 * 584
    stall_s = 21 * (10e-6 + n_bytes / 50e9)
    assert found.ranks == [0]
    assert found.stall_s[0] == pytest.approx([stall_s, 0, stall_s])
    assert found.gathers.tolist() == [[21, 0, 21]]
    assert found.miss_bytes.tolist() == [[21 * n_bytes, 0, 21 * n_bytes]]
    never = times(H100, Demand(ledger(), FLASH))[0].ahead(3, np.zeros(3))
    for part in (never.stall_s, never.gathers, never.miss_bytes):
        assert part.tolist() == [[0, 0, 0]]


def test_two_gpus_that_share_out_the_kv_miss_half_each():
    hw = round_link(H100, 584).deployed(Deployment(tp=4, cp=2))
    found = times(hw)[0].ahead(1, np.zeros(1))
    assert found.miss_bytes.tolist() == [[21 * 40 * 584]]
    assert found.stall_s[0, 0] == pytest.approx(21 * (10e-6 + 40 * 584 / 50e9))


def test_two_gpus_that_share_out_the_keys_score_half_each():
    scored = np.zeros(128, np.int64)
    scored[0] = 24_000
    hw = round_link(H100, 584).deployed(Deployment(tp=4, cp=2))
    made = {"on_miss": "fetch", "params": {"budget": "10%"}}
    plain, scoring = (
        times(hw, Demand(ledger(**made, **more), FLASH))[0].ahead(1, np.zeros(1)).compute_s[0]
        for more in ({}, {"scored": scored})
    )
    of_two_s = memory_indexer_s(hw, FLASH, np.array([2 * 24_000 / 2]))[0]
    assert scoring - plain == pytest.approx(of_two_s)


def test_what_lies_on_drives_is_read_before_it_crosses_the_link():
    """Half of the rows: 40 reads of 4,096 bytes in each of 21 layers at 54 / 8 GB/s, and 90 us a
    layer.
    """
    hw = replace_figure(round_link(H100, 584), "nvme_bytes", 8e12)
    hw = replace_figure(hw, "nvme_bytes_per_s", 54e9)
    idle, read = (times(hw, spilled=share)[0].ahead(2, np.zeros(2)) for share in (0.0, 0.5))
    more_s = 21 * (90e-6 + 40 * 4096 / (54e9 / 8))
    assert (read.stall_s - idle.stall_s)[0] == pytest.approx([more_s, 0])


def test_the_rank_whose_mirrors_lie_on_drives_waits_for_them_alone():
    hw = replace_figure(round_link(H100, 584), "nvme_bytes", 8e12)
    hw = replace_figure(hw, "nvme_bytes_per_s", 54e9).deployed(Deployment(dp=8))
    decode, _, _ = times(hw, ranks=(0, 1))
    decode.spilled_share = lambda rank: 0.5 * rank
    more_s = 21 * (90e-6 + 20 * 4096 / (54e9 / 8))
    plain_s = 21 * (10e-6 + 40 * 584 / 50e9)
    found = decode.ahead(1, np.zeros(1)).stall_s[:, 0]
    assert found == pytest.approx([plain_s, plain_s + more_s])


def test_what_arrives_and_what_is_scored_take_part_of_a_step():
    """Recalled rows and missed ones pass HBM; a memory indexer scores; both on the busiest rank."""
    moved = loads(128, s0=10, s64=100)
    scored = np.zeros(128, np.int64)
    scored[::64] = 24_000
    made = ledger(
        on_miss="fallback",
        params={"budget": "10%"},
        lookahead_loads=moved,
        demand_loads=MISSED,
        scored=scored,
        decides_ahead=False,
        target_layers=[],
    )
    demand = Demand(made, FLASH)
    hw = H100.deployed(Deployment(dp=8))
    decode, batch, model = times(hw, demand, n_requests=3, ranks=(0, 1))
    found = decode.ahead(1, np.zeros(1))
    arriving = 2 * 21 * 40 * 584  # two requests on rank 0; at step 0 the first set is there
    beside_s = memory_indexer_s(hw, FLASH, np.array([48_000.0])) + arriving / 3.35e12
    assert hw.hbm_bytes_per_s.value == 3.35e12
    plain_s = batch.load(1).costs(model).total_s(FLASH.n_selecting)
    assert found.compute_s == pytest.approx(plain_s + beside_s, rel=1e-12)
    assert found.ranks == [0, 1] and found.miss_bytes[:, 0].tolist() == [arriving, arriving / 2]


def test_times_hold_until_the_batch_changes():
    decode, batch, _ = times(round_link(H100, 584))
    asked = []
    worked_out = decode._worked_out
    decode._worked_out = lambda n: asked.append(n) or worked_out(n)
    chunk_s = np.array([0.5])
    assert decode.ahead(1, chunk_s).prefill_s is chunk_s and asked == [1]
    for step in range(1, 12):
        batch.advance(1, first_s=0.0)
        found = decode.ahead(1, np.zeros(1))
        assert (found.stall_s[0, 0] > 0) == (step % 2 == 0)
    assert asked == [1, 3, 7, 15]  # as long again as they held, and one
    batch.advance(1, first_s=0.0)
    whole = decode.ahead(30, np.zeros(30))
    assert len(whole.compute_s) == 30 and asked[-1] == 30
    batch.add(request(MISSES, PROMPT))
    decode.ahead(2, np.zeros(2))
    assert asked[-1] == 2
    batch.advance(40, first_s=0.0)
    decode.ahead(1, np.zeros(1))
    assert asked[-1] == batch.least_left == 12  # 32 at most, and no more than are left
