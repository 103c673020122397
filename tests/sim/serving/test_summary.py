"""Every figure of a serving run, on two servers whose logs are made by hand."""

from collections import defaultdict
from dataclasses import fields
from types import SimpleNamespace

import hand_request
import pytest
from hand_ledger import FLASH, ledger

from fmsim.sim.serving.demand import Demand
from fmsim.sim.serving.log import SAMPLE, Log, keeps, request_rows, tpot_s, ttft_s
from fmsim.sim.serving.prefix import FoundBlocks, Pinned
from fmsim.sim.serving.requests import Arrival
from fmsim.sim.serving.spec import Slo
from fmsim.sim.serving.summary import summary

SLO = Slo(ttft_s=1.0, tpot_s=0.5)


def sample(t_s, **given):
    return tuple(({"t_s": t_s} | given).get(name, 0) for name in SAMPLE)


def request(number, arrival_s, first_s, finished_s, output, **given):
    common = {
        "number": number,
        "rank": 0,
        "asked": Arrival(arrival_s, 100, output, session=3, turn=number),
        "arrival_s": arrival_s,
        "admitted_s": arrival_s + 0.25,
        "first_token_s": first_s,
        "finished_s": finished_s,
        "prompt_tokens": 100,
        "output_tokens": output,
        "refused": None,
        "reused_tokens": 0,
        "found": FoundBlocks(),
        "waits_s": {},
        "stall_s": 0.0,
    }
    return SimpleNamespace(**common | given)


def rank(moved, read):
    pool = lambda capacity: SimpleNamespace(capacity=capacity)
    return SimpleNamespace(
        hbm=pool(100),
        host=pool(200),
        nvme=pool(400),
        to_gpu=SimpleNamespace(moved_bytes=moved, bytes_per_s=10),
        from_nvme=SimpleNamespace(moved_bytes=read),
    )


def run(log, *ranks):
    source = SimpleNamespace(window_s=5.0, workload=SimpleNamespace(slo=SLO))
    prefill = SimpleNamespace(lower_bound=False)
    demand = SimpleNamespace(tokens_per_step=1.5)
    return SimpleNamespace(log=log, ranks=ranks, source=source, prefill=prefill, demand=demand)


def two_servers():
    one = Log(
        requests=[
            request(0, 0.5, 1.0, 3.0, 5, reused_tokens=32, found=FoundBlocks((1, 2), (3,), ())),
            request(1, 1.0, 2.5, 4.0, 1),  # its first token comes too late
        ],
        tokens=6,
        busy_s=4.0,
        stall_s=1.0,
        recall_wait_s=0.5,
        prefix_wait_s=0.25,
        prefill_s=1.0,
        missed_entries=4,
        selected_entries=16,
        block_tokens=16,
        written_back_bytes=11,
        waited_s=defaultdict(float, {"GPU memory": 1.0}),
        samples=[
            sample(0.0, admitted=1, gpu_bytes=50, host_bytes=20, nvme_bytes=40),
            sample(2.0, admitted=2, gpu_bytes=100, host_bytes=40, tokens=2),
            sample(4.0, tokens=6),
        ],
    )
    other = Log(
        requests=[
            request(
                0, 2.0, 2.5, 9.5, 8, found=FoundBlocks((), (), (9, 8))
            ),  # a token takes a second
            request(1, 3.0, None, None, 5, admitted_s=None, refused="GPU memory"),
        ],
        tokens=9,
        busy_s=8.0,
        stall_s=1.0,
        prefill_s=2.0,
        missed_entries=2,
        selected_entries=8,
        block_tokens=16,
        written_back_bytes=5,
        waited_s=defaultdict(float, {"GPU memory": 2.0, "PCIe": 4.0}),
        samples=[sample(0.0, admitted=1, gpu_bytes=20), sample(10.0, tokens=9)],
    )
    return run(one, rank(30, 7)), run(other, rank(50, 0))


def test_every_figure_of_two_servers():
    found = summary(*two_servers())
    over_time = found.pop("over_time")
    assert len(over_time["t_s"]) == 120 and over_time["t_s"][-1] == 10
    assert found == {
        "requests": {"arrived": 4, "finished": 3, "refused": 1},
        "served_s": 9.0,  # from 0.5 to 9.5
        "held": 3,
        "held_mean": 1.5 + 1,
        "tokens": 15,
        "tokens_per_step": 1.5,
        "tokens_per_s": 15 / 9,
        "arriving_tokens_per_s": (6 + 4.5) / 5,
        "ttft_s": {
            "mean": pytest.approx(2.5 / 3),
            "p50": 0.5,
            "p95": pytest.approx(1.4),
            "p99": pytest.approx(1.48),
        },
        "tpot_s": {
            "mean": pytest.approx(0.75),
            "p50": pytest.approx(0.75),
            "p95": pytest.approx(0.975),
            "p99": pytest.approx(0.995),
        },
        "goodput_per_s": 1 / 9,
        "slo_share": 1 / 4,
        "stall_share": pytest.approx(2.75 / 12),
        "bound": "PCIe",
        "waited_share": {"GPU memory": 3 / 20, "PCIe": 4 / 20},
        "in_use": {
            "GPU memory": {"mean": (75 + 20) / 200, "peak": 120 / 200},
            "host memory": {"mean": 30 / 400, "peak": 40 / 400},
            "NVMe": {"mean": 20 / 800, "peak": 40 / 800, "read_bytes": 7},
            "PCIe": {"mean": 80 / (20 * 10), "bytes_per_s": 20},
            "compute": {"mean": pytest.approx(9.25 / 20)},
        },
        "h2d_bytes": 80,
        "d2h_bytes": 16,
        "prefill_share": 3 / 12,
        "miss_rate": 6 / 24,
        "prefix": {
            "reused_share": 32 / 300,
            "hit_tokens": {"GPU": 32, "host": 16, "NVMe": 32},
            "wait_s": 0.25,
        },
        "prefill_lower_bound": False,
        "simulated_s": 10.0,
    }


def test_where_nobody_waited_it_is_what_running_requests_waited_for_or_did():
    """More than half of the busy time."""
    for stall_s, bound in ((2.0, "compute"), (2.1, "PCIe")):
        log = Log(
            requests=[request(0, 0.0, 1.0, 4.0, 2)],
            busy_s=4.0,
            stall_s=stall_s,
            samples=[sample(0.0), sample(4.0)],
        )
        assert summary(run(log, rank(0, 0)))["bound"] == bound


def test_a_run_in_which_every_request_is_refused_has_rates_of_0():
    log = Log(
        requests=[request(0, 0.0, None, None, 2, admitted_s=None, refused="GPU memory")],
        samples=[sample(0.0), sample(0.0)],
    )
    found = summary(run(log, rank(0, 0)))
    for name in ("tokens_per_s", "goodput_per_s", "slo_share", "stall_share", "prefill_share"):
        assert found[name] == 0
    assert found["served_s"] == found["arriving_tokens_per_s"] == found["miss_rate"] == 0
    assert found["in_use"]["PCIe"]["mean"] == found["in_use"]["compute"]["mean"] == 0
    assert found["in_use"]["GPU memory"]["mean"] == found["held_mean"] == 0
    assert found["ttft_s"] == dict.fromkeys(("mean", "p50", "p95", "p99"))
    assert found["prefix"] is None and found["bound"] == "GPU memory"


def test_a_server_without_drives_says_nothing_of_them():
    made = rank(0, 0)
    made.nvme = None
    log = Log(requests=[request(0, 0.0, 1.0, 4.0, 2)], samples=[sample(0.0), sample(4.0)])
    assert "NVMe" not in summary(run(log, made))["in_use"]


def test_both_times_are_kept_up_to_their_bounds():
    """A first token after 1 s, later ones every 0.5 s."""
    assert keeps(request(0, 1.0, 2.0, 4.0, 5), SLO)
    assert not keeps(request(0, 1.0, 2.01, 4.0, 5), SLO)
    assert not keeps(request(0, 1.0, 2.0, 4.01, 5), SLO)
    assert keeps(request(0, 1.0, 2.0, 9.0, 1), SLO)  # of one token there are no later ones
    assert not keeps(request(0, 1.0, 2.0, None, 5), SLO)
    assert not keeps(request(0, 1.0, None, None, 5), SLO)
    assert ttft_s(request(0, 1.0, None, None, 5)) is None
    assert tpot_s(request(0, 1.0, 2.0, None, 5)) is None
    assert tpot_s(request(0, 1.0, 2.0, 4.0, 2)) == 2.0


def test_a_row_a_request():
    one, other = (each.log for each in two_servers())
    one.requests[0].waits_s = {"queue": 0.25, "GPU memory": 1.5}
    one.requests[0].stall_s = 0.125
    rows = request_rows([one, other], SLO)
    assert [(row["server"], row["request"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert rows[0] == {
        "request": 0,
        "server": 0,
        "rank": 0,
        "session": 3,
        "turn": 0,
        "prompt_tokens": 100,
        "output_tokens": 5,
        "arrival_s": 0.5,
        "admitted_s": 0.75,
        "first_token_s": 1.0,
        "finished_s": 3.0,
        "ttft_s": 0.5,
        "tpot_s": 0.5,
        "good": True,
        "refused": "",
        "wait_queue_s": 0.25,
        "wait_GPU_memory_s": 1.5,
        "stall_s": 0.125,
        "reused_tokens": 32,
        "hit_gpu_tokens": 32,
        "hit_host_tokens": 16,
        "hit_nvme_tokens": 0,
    }
    assert [row["good"] for row in rows] == [True, False, False, False]
    assert rows[1]["wait_GPU_memory_s"] == rows[1]["wait_queue_s"] == 0.0
    assert rows[2]["hit_nvme_tokens"] == 32 and rows[3]["refused"] == "GPU memory"


def test_a_log_and_a_request_begin_with_nothing():
    for field in fields(Log):
        value = getattr(Log(), field.name)
        assert not value, field.name
    made = Demand(ledger(), FLASH)
    asked = hand_request.request(made)
    of_the_request = {"number", "asked", "arrival_s", "prompt_tokens", "output_tokens", "steps"}
    begun = {field.name for field in fields(asked) if field.name not in of_the_request}
    nothing = begun - {"pools", "found", "pinned"}
    assert all(not getattr(asked, name) for name in nothing)
    assert asked.found == FoundBlocks() and asked.pinned == Pinned()
    assert Arrival(0.0, 1, 1)[3:] == ((), 0, 0)


def test_time_is_booked_to_what_is_busy_and_what_is_waited_for():
    log = Log()
    log.pass_to(2.0, busy=True)
    log.waits_for = "PCIe"
    log.pass_to(5.0, busy=False)
    log.pass_to(6.0, busy=True)
    assert log.busy_s == 3.0 and dict(log.waited_s) == {"PCIe": 4.0}
