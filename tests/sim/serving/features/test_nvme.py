"""Host memory that spills to NVMe: bytes and seconds by hand, and what more of it may not do."""

import numpy as np
import pytest
from hand_ledger import FLASH, H100, ledger
from hypothesis import given, settings
from hypothesis import strategies as st

from fmsim.errors import FmsimError
from fmsim.hw import load_hardware, replace_figure
from fmsim.sim.serving.capacity.behaviour import BEHAVIOURS
from fmsim.sim.serving.capacity.plan import CapacityQuestion, plan
from fmsim.sim.serving.demand import Demand
from fmsim.sim.serving.server import ServerRun
from fmsim.sim.serving.spec import ClosedLoop, Server
from fmsim.sim.serving.summary import summary
from fmsim.sim.serving.workload import RequestGenerator

FULL, LRU, LSA = (Demand(each.ledger(FLASH), FLASH) for each in BEHAVIOURS)
MISSES = Demand(
    ledger(
        on_miss="fetch",
        params={"budget": "800 entries"},
        demand_loads=np.full((128, 1), 100, np.int32),
    ),
    FLASH,
)
MIRROR = FLASH.host_kv_bytes(32_100)


def with_host(n_bytes, nvme_bytes=30.72e12, rate=54e9):
    """Bytes of each GPU's part."""
    hw = replace_figure(replace_figure(H100, "host_reserve_bytes", 1), "host_bytes", 8 * n_bytes)
    hw = replace_figure(hw, "nvme_bytes", nvme_bytes)
    return replace_figure(hw, "nvme_bytes_per_s", rate)


def served(hw, requests=4, demand=MISSES, **options):
    workload = ClosedLoop(
        kind="closed_loop",
        requests=requests,
        prompt_tokens=32_000,
        output_tokens=100,
        duration_s=1e-3,
    )
    run = ServerRun(
        hw, FLASH, demand, Server(prefill="done", **options), RequestGenerator(workload)
    )
    run.run()
    return run


def test_half_of_the_mirrors_on_nvme_by_hand():
    """Two requests, host memory for one: half of each step's 2 x 100 missed rows a layer are
    read from drives, 4,096 bytes for a row of 584, at 54 / 8 GB/s a GPU, 90 us later in each of
    21 layers.
    """
    hw = with_host(MIRROR + 1)
    without, spilled = served(hw, 2), served(hw, 2, nvme=True)
    assert summary(without)["held"] == 1 and summary(spilled)["held"] == 2
    enough = served(with_host(3 * MIRROR), 2)
    more_s = 21 * (90e-6 + 0.5 * 200 * 4096 / (54e9 / 8))
    steps = 100
    assert spilled.log.stall_s - enough.log.stall_s == pytest.approx(steps * more_s, rel=1e-4)
    use = summary(spilled)["in_use"]["NVMe"]
    assert use["peak"] * 30.72e12 / 8 == pytest.approx(MIRROR - 1)


def test_drives_that_a_preset_lacks_are_asked_for():
    with pytest.raises(FmsimError, match="h20 names no drives"):
        served(load_hardware("h20"), nvme=True)


@settings(max_examples=15, deadline=None)
@given(
    host=st.floats(0.5, 5),
    nvme=st.floats(0.1, 10),
    requests=st.integers(1, 8),
    prefill=st.sampled_from(["done", "chunked"]),
)
def test_nothing_is_lost_and_more_is_held(host, nvme, requests, prefill):
    hw = with_host(host * MIRROR, 8 * nvme * MIRROR)
    plain, spilling = served(hw, requests), served(hw, requests, nvme=True)
    for run in (plain, spilling):
        for rank in run.ranks:
            for pool in (rank.hbm, rank.host, *([rank.nvme] if rank.nvme else [])):
                assert pool.level == pytest.approx(pool.capacity, abs=1)
        counts = summary(run)["requests"]
        assert counts["finished"] + counts["refused"] == requests
    held = summary(spilling)["held"]
    assert held >= summary(plain)["held"]
    assert held <= min(requests, int((host + nvme) * (1 + 1e-9)))
    table = np.array(spilling.log.samples)
    assert table[:, 6].max() <= nvme * MIRROR + 1


def question(hw, nvme, demand=LRU):
    options = Server(prefill="done", nvme=nvme)
    return CapacityQuestion(hw, FLASH, demand, options, 500_000, 1024, tpot_s=0.2)


def test_drives_that_read_slowly_are_a_wall_before_they_are_full():
    asked = question(with_host(10e9, rate=1e9), True)
    wall, state = asked.walls()["NVMe"], asked.state()
    assert state.at(wall).nvme_s <= state.at(wall).compute_s
    assert state.at(wall + 1).nvme_s > state.at(wall + 1).compute_s
    assert wall + 1 < (10e9 + 30.72e12 / 8) // LRU.pools(500_000, 1024).mirror


def test_a_plan_has_nvme_as_wall_and_as_mover():
    hw = with_host(10e9)
    mirror = LRU.pools(500_000, 1024).mirror
    found = plan(question(hw, False), FULL)
    assert found["max_requests_bound"] == "host memory" and found["max_requests"] == 10e9 // mirror
    move = next(move for move in found["moves"] if "NVMe" in move["change"])
    assert move["max_requests"] > found["max_requests"]
    assert move["usd"] == pytest.approx(150 * 30.72)
    walls = question(hw, True).walls()
    assert "host memory" not in walls and walls["NVMe"] >= found["max_requests"]
    state = question(hw, True).state()
    beyond = state.at(walls["NVMe"] + 1)
    capacity = int((10e9 + 30.72e12 / 8) // mirror)
    assert walls["NVMe"] == capacity or beyond.nvme_s > beyond.compute_s


@settings(max_examples=15, deadline=None)
@given(
    demand=st.sampled_from([LRU, LSA]),
    host=st.floats(1e9, 1e11),
    factor=st.floats(1, 8),
)
def test_faster_and_larger_drives_never_hold_fewer(demand, host, factor):
    slow, fast = with_host(host, 1e12, 1e10), with_host(host, factor * 1e12, factor * 1e10)
    less, more = (question(hw, True, demand).walls() for hw in (slow, fast))
    assert all(more[wall] >= less[wall] for wall in less)
