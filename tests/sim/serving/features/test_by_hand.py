"""Admission and the service level, worked by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
from hand_ledger import FLASH, H100, ledger, loads
from hand_tables import round_link

from fmsim.hw.spec import Figure
from fmsim.sim.decode import simulate
from fmsim.sim.serving.capacity.plan import CapacityQuestion, plan
from fmsim.sim.serving.demand import Demand
from fmsim.sim.serving.log import SAMPLE, Log, over_time
from fmsim.sim.serving.requests import Arrival
from fmsim.sim.serving.server import ServerRun
from fmsim.sim.serving.spec import ClosedLoop, Server, Slo
from fmsim.sim.serving.summary import summary
from fmsim.sim.serving.workload import RequestGenerator
from fmsim.sim.step_cost import Spread, StepModel

FULL = ledger(slots=8032)  # the full cache: every entry to the end has a slot


def served(arrivals, hw=H100, slo=None, made=FULL, **options):
    workload = ClosedLoop(
        kind="closed_loop",
        requests=1,
        prompt_tokens=1,
        output_tokens=1,
        duration_s=1e-9,
        slo=slo or Slo(),
    )
    source = RequestGenerator(workload)
    source.first = [Arrival(*arrival) for arrival in arrivals]
    server = ServerRun(hw, FLASH, Demand(made, FLASH), Server(prefill="done", **options), source)
    server._offsets = SimpleNamespace(choice=lambda offsets: offsets[0])  # from the ledger's start
    server.run()
    return server


def room_for(n_requests, prompt, output):
    """The hardware with GPU memory for so many requests beside weights and reserve."""
    each = Demand(ledger(slots=8032), FLASH).pools(prompt, output).gpu_bytes
    fixed = H100.hbm_bytes.value - H100.kv_pool_bytes(FLASH)
    figure = Figure(value=fixed + n_requests * each, source="worked by hand")
    return H100.model_copy(update={"hbm_bytes": figure})


def test_of_thirteen_requests_five_are_held_where_five_fit():
    server = served([(0.0, 32_000, 64)] * 13, room_for(5.5, 32_000, 64))
    assert server.log.most("admitted") == 5
    assert sum(request.finished_s is not None for request in server.log.requests) == 13


def test_nobody_overtakes_the_head_of_the_queue():
    """Room for 2.5: two large ones run; the third waits, and the small one behind it too."""
    hw = room_for(2.5, 32_000, 64)
    arrivals = [(0.0, 32_000, 64)] * 3 + [(0.0, 1000, 64)]
    admitted = [request.admitted_s for request in served(arrivals, hw).log.requests]
    assert admitted[0] == admitted[1] == 0 and 0 < admitted[2] <= admitted[3]


def test_half_of_the_requests_keep_a_service_level_that_the_second_waits_too_long_for():
    """One at a time: the second's first token comes after all 64 steps of the first, which is later
    than ten steps allow.
    """
    alone = served([(0.0, 32_000, 64)]).log.requests[0]
    step_s = alone.finished_s / 64
    slo = Slo(ttft_s=10 * step_s, tpot_s=2 * step_s)
    run = served([(0.0, 32_000, 64)] * 2, slo=slo, max_batch=1)
    found = summary(run)
    assert found["slo_share"] == 0.5
    assert found["goodput_per_s"] == pytest.approx(1 / (128 * step_s), rel=0.01)
    waited_s = run.log.requests[1].first_token_s
    assert waited_s == pytest.approx(65 * step_s, rel=0.01)
    none = Slo(ttft_s=0.5 * step_s, tpot_s=2 * step_s)
    assert summary(served([(0.0, 32_000, 64)] * 2, slo=none, max_batch=1))["slo_share"] == 0


def test_who_arrives_in_a_recalls_wait_joins_after_the_step_that_waited():
    """The first request's window of step 64 waits for its recall. The second comes in the middle of
    the wait, is admitted when step 64 ends, and makes its first token in the step behind.
    """
    made = ledger(lookahead_loads=loads(128, s64=100_000), params={"stale": False})
    timeline = simulate(made, FLASH, H100)
    wait_s = timeline.recall_wait_s[64]
    assert wait_s > 5 * timeline.step_s[0]
    arrival_s = timeline.start_s[64] + wait_s / 2
    run = served([(0.0, 32_000, 128), (arrival_s, 32_000, 2)], made=made)
    second = run.log.requests[1]
    assert second.arrival_s == pytest.approx(arrival_s)
    assert second.admitted_s == pytest.approx(timeline.end_s[64])
    assert second.first_token_s == pytest.approx(timeline.end_s[64] + both_s(64), rel=1e-3)


def both_s(at):
    """A step of two requests, one `at` steps further than the other, of 800 resident entries."""
    context, scored = np.array([[32_002 + at, 32_001]]).T, np.array([[800.0, 800.0]]).T
    spread = lambda values: Spread(values.sum(axis=0), values.max(axis=0))
    costs = StepModel(H100, FLASH).mixed(2, spread(context), spread(scored))
    return float(costs.total_s(FLASH.n_csa)[0])


def test_a_client_that_was_answered_asks_again_until_the_time_is_up():
    """Two clients, rounds of 64 steps, time for two rounds and a half: each asks three times."""
    round_s = served([(0.0, 32_000, 64)] * 2).log.requests[0].finished_s
    sizes = {"prompt_tokens": 32_000, "output_tokens": 64, "duration_s": 2.5 * round_s}
    workload = ClosedLoop(kind="closed_loop", requests=2, ramp_s=0, **sizes)
    options = Server(prefill="done")
    run = ServerRun(H100, FLASH, Demand(FULL, FLASH), options, RequestGenerator(workload))
    run.run()
    arrivals = [request.arrival_s for request in run.log.requests]
    assert arrivals == pytest.approx([0, 0, round_s, round_s, 2 * round_s, 2 * round_s], rel=0.01)
    assert all(request.finished_s is not None for request in run.log.requests)


def test_waits_are_a_share_of_all_servers_time():
    """Two servers of one place each. On the one a second request waits for half of the time; on the
    other nobody waits, and the time is half as long.
    """
    busy = served([(0.0, 32_000, 64)] * 2, max_batch=1)
    calm = served([(0.0, 32_000, 64)], max_batch=1)
    share = summary(busy, calm)["waited_share"]
    assert share == {"batch limit": pytest.approx(0.25, rel=0.01)}


def sample(t_s, **given):
    return tuple(({"t_s": t_s} | given).get(name, 0) for name in SAMPLE)


def test_samples_on_an_even_grid():
    """Levels hold until the next sample; sums become rates since the point before. The first server
    misses 4 of 16 entries, the other 2 of 4 in twice the time; later on it works alone.
    """
    one = Log(
        samples=[
            sample(0.0, running=1, waiting=3, gpu_bytes=4),
            sample(2.0, h2d_bytes=20, tokens=8, missed_entries=4, selected_entries=16),
        ]
    )
    other = Log(
        samples=[
            sample(0.0, running=1, waiting=1, gpu_bytes=1),
            sample(4.0, h2d_bytes=40, tokens=4, missed_entries=2, selected_entries=4),
        ]
    )
    found = over_time([one, other], 5)
    expected = {
        "t_s": [0, 1, 2, 3, 4],
        "running": [2, 2, 1, 1, 0],
        "waiting": [4, 4, 1, 1, 0],
        "gpu_bytes": [5, 5, 1, 1, 0],
        "h2d_bytes_per_s": [0, 20, 20, 10, 10],
        "tokens_per_s": [0, 5, 5, 1, 1],
        "miss_rate": [0, 2.5 / 9, 2.5 / 9, 0.5, 0.5],
    }
    assert {name: found[name] for name in expected} == expected
    coarse = over_time([one, other], 3)  # every 2 s
    assert coarse["h2d_bytes_per_s"] == [0, 20, 10] and coarse["tokens_per_s"] == [0, 5, 1]


def test_a_plan_of_a_policy_that_misses():
    """Each of 21 layers misses 40 rows of 584 bytes a request and step, on a link of 10 us and
    50 GB/s: ten requests wait 21 x (10 us + 233,600 / 50e9) = 308.112 us a step.
    """
    hw = round_link(H100, 584)
    made = ledger(on_miss="fetch", cadence=1, demand_loads=np.full((128, 1), 40, np.int32))
    asked = CapacityQuestion(
        hw, FLASH, Demand(made, FLASH), Server(), tokens=32_000, output_tokens=128, tpot_s=0.02
    )
    state = asked.state().at(10)
    assert state.stall_s == pytest.approx(308.112e-6)
    assert state.link_s == pytest.approx(308.112e-6)  # there are no recalls
    assert state.step_s == pytest.approx(state.compute_s + 308.112e-6)
    assert state.tokens_per_s == pytest.approx(10 / state.step_s)
    found = plan(asked, Demand(FULL, FLASH))
    assert found["ttft_slo_s"] is None and found["tpot_slo_s"] == 0.02
    at_wall = asked.state().at(found["walls"]["compute"])
    beyond = asked.state().at(found["walls"]["compute"] + 1)
    assert at_wall.step_s <= 0.02 < beyond.step_s
    stall_s = 21 * (10e-6 + at_wall.batch * 40 * 584 / 50e9)
    assert at_wall.step_s == pytest.approx(at_wall.compute_s + stall_s)
