"""Admission and the service level, worked by hand."""

import pytest
from hand_ledger import FLASH, H100, ledger

from fmsim.hw.spec import Figure
from fmsim.sim.serving.demand import Demand
from fmsim.sim.serving.requests import Arrival
from fmsim.sim.serving.server import ServerRun
from fmsim.sim.serving.spec import ClosedLoop, Server, Slo
from fmsim.sim.serving.summary import summary
from fmsim.sim.serving.workload import RequestGenerator


def served(arrivals, hw=H100, slo=None, **options):
    made = ledger(slots=8032)  # the full cache: every entry to the end has a slot
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
    assert found["slo_share"] == 0.5 and found["goodput_per_s"] > 0
    waited_s = run.log.requests[1].first_token_s
    assert waited_s == pytest.approx(65 * step_s, rel=0.01)
    none = Slo(ttft_s=0.5 * step_s, tpot_s=2 * step_s)
    assert summary(served([(0.0, 32_000, 64)] * 2, slo=none, max_batch=1))["slo_share"] == 0
