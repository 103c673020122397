"""What a request has on the GPU: vLLM's hybrid rule and SGLang's, against sums by hand."""

import numpy as np
import pytest
from hand_ledger import FLASH, H100, ledger
from hypothesis import given, settings
from hypothesis import strategies as st

from fmsim.hw.deployment import Deployment
from fmsim.sim.serving.banner import concurrency, request_limits
from fmsim.sim.serving.demand import Demand
from fmsim.sim.serving.server import ServerRun
from fmsim.sim.serving.spec import Bursts, Server
from fmsim.sim.serving.summary import summary
from fmsim.sim.serving.workload import RequestGenerator

MISSES = Demand(
    ledger(
        on_miss="fetch",
        params={"budget": "800 entries"},
        demand_loads=np.full((128, 1), 100, np.int32),
    ),
    FLASH,
)
PROMPT, OUTPUT = 32_000, 100
WHOLE, HOT = MISSES.whole_bytes(PROMPT, OUTPUT), MISSES.pools(PROMPT, OUTPUT).gpu_bytes


def served(pool_bytes, requests, residency, output=OUTPUT, prefill="done", seed=0):
    hw = H100.deployed(Deployment(kv_pool_bytes=pool_bytes))
    workload = Bursts(
        kind="bursts",
        burst=requests,
        every_s=10,
        prompt_tokens=PROMPT,
        output_tokens=output,
        duration_s=1,
        seed=seed,
    )
    options = Server(prefill=prefill, residency=residency)
    run = ServerRun(hw, FLASH, MISSES, options, RequestGenerator(workload))
    run.run()
    return run


def test_vllms_formula_in_blocks():
    """1,000 blocks, 400 to come in, 50 to stay: 1 + 600 / 50; 300 blocks do not take one whole."""
    assert concurrency(1000, 400, 50) == 13
    assert min(concurrency(1000, 400, 50), 5200 / 520) == 10  # a host of 5,200 blocks, 520 each
    assert concurrency(300, 400, 50) == 0.75
    assert concurrency(1000, 50, 50) == 20


@pytest.mark.parametrize("pool", [1.0, 1.5, 3.2, 6.0])
def test_the_server_holds_what_the_formula_says(pool):
    run = served(pool * WHOLE, 40, "hybrid")
    expected = int(concurrency(pool * WHOLE, WHOLE, HOT))
    assert summary(run)["held"] == expected
    limits = request_limits(run.hw, FLASH, MISSES, run.options, PROMPT, OUTPUT)
    assert limits["GPU memory"] == expected


def test_without_pressure_nothing_misses_and_under_it_the_oldest_give_way():
    calm = served(10 * WHOLE, 3, "hybrid")
    assert calm.log.stall_s == 0 and calm.log.missed_entries == 0
    assert all(request.whole for request in calm.log.requests)
    tight = served(3.2 * WHOLE, 3, "hybrid")
    first, _, last = tight.log.requests
    assert not first.whole and last.whole
    slots = served(3.2 * WHOLE, 3, "policy")
    assert 0 < tight.log.missed_entries < slots.log.missed_entries


def test_hisparse_writes_the_whole_prompt_before_it_decodes():
    plain, written = (served(1e10, 1, how, prefill="chunked") for how in ("policy", "hisparse"))
    wait_s = FLASH.host_kv_bytes(PROMPT) / H100.link.bandwidth_bytes_per_s.value
    first, second = plain.log.requests[0], written.log.requests[0]
    assert second.first_token_s == first.first_token_s
    assert second.finished_s - first.finished_s == pytest.approx(wait_s)


@settings(max_examples=20, deadline=None)
@given(
    pool=st.floats(1, 12),
    requests=st.integers(1, 30),
    seed=st.integers(0, 99),
    prefill=st.sampled_from(["done", "chunked"]),
)
def test_hybrid_loses_nothing_and_misses_no_more_than_slots_do(pool, requests, seed, prefill):
    runs = [
        served(pool * WHOLE, requests, how, [1, 200], prefill, seed) for how in ("hybrid", "policy")
    ]
    for run in runs:
        for rank in run.ranks:
            assert rank.hbm.level == pytest.approx(rank.hbm.capacity)
            assert rank.host.level == pytest.approx(rank.host.capacity)
        counts = summary(run)["requests"]
        assert counts["finished"] + counts["refused"] == requests
    hybrid, slots = runs
    assert (
        hybrid.log.missed_entries <= slots.log.missed_entries * (1 + 1e-9)
        or summary(hybrid)["requests"] != summary(slots)["requests"]
    )
