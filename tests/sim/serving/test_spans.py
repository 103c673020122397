"""Spans of many steps beside single steps."""

import numpy as np
import pytest
from hand_ledger import FLASH, H100, ledger, loads
from hand_request import FromTheStart, Given

from fmsim.hw.deployment import Deployment
from fmsim.sim.serving.demand import Demand
from fmsim.sim.serving.requests import Arrival
from fmsim.sim.serving.server import ServerRun
from fmsim.sim.serving.spec import Poisson, Server
from fmsim.sim.serving.workload import RequestGenerator

MIX = {
    "kind": "poisson",
    "rate_per_s": 3.0,
    "prompt_tokens": [1, 60_000],
    "output_tokens": [1, 160],
    "duration_s": 2.5,
}


def test_steps_pass_until_the_end_of_the_one_in_which_somebody_can_join():
    """Two steps end after 1 and 3 s: together, or the first where somebody waits already, or comes
    by then.
    """

    def passed(somebody, comes_s=None):
        server = FromTheStart(H100, FLASH, Demand(ledger(), FLASH), Server(), Given())
        server._somebody_can_join = lambda: somebody
        steps = server.env.process(server._pass(np.array([1.0, 3.0])))
        if comes_s is not None:
            server.env.run(comes_s)
            server._wake.succeed()
        return server.env.run(steps), server.env.now

    assert passed(False) == (2, 3.0)
    assert passed(True) == (1, 1.0)
    assert [passed(False, at_s) for at_s in (0.5, 1.0, 1.5)] == [(1, 1.0), (1, 1.0), (2, 3.0)]


def test_who_watches_is_told_of_each_request_that_ends():
    ended = []
    source = Given(*[Arrival(0, 32_000, 10)] * 3)
    demand = Demand(ledger(slots=8032, on_miss="fetch"), FLASH)
    ServerRun(H100, FLASH, demand, Server(), source, lambda: ended.append(True)).run()
    assert len(ended) == 3


@pytest.mark.parametrize(
    ("prefill", "misses", "recalled", "layout", "drafts"),
    [
        ("done", 0, 4000, {}, 0),
        ("chunked", 150, 2000, {"dp": 2, "tp": 4}, 0),
        ("separate", 150, 0, {"tp": 4, "cp": 2}, 2),
    ],
)
def test_many_steps_at_once_are_the_same_one_by_one(
    prefill, misses, recalled, layout, drafts, monkeypatch
):
    """A server takes as many steps at once as pass without a change."""
    made = ledger(
        on_miss="fetch",
        params={"budget": "10%"},
        demand_loads=np.arange(128)[:, None] % 3 * misses,
        lookahead_loads=loads(128, s0=recalled, s64=recalled),
        scored=np.where(np.arange(128) % 64 == 0, 24_000, 0),
    )

    def served(most_steps):
        monkeypatch.setattr("fmsim.sim.serving.server._MOST_STEPS", most_steps)
        server = ServerRun(
            H100.deployed(Deployment(**layout)),
            FLASH,
            Demand(made, FLASH).drafted(drafts, 0.5),
            Server(prefill=prefill, draft_tokens=drafts, acceptance=0.5),
            RequestGenerator(Poisson(**MIX, seed=5)),
        )
        log = server.run()
        names = ["admitted_s", "first_token_s", "finished_s", "stall_s"]
        times = [[getattr(each, name) for name in names] for each in log.requests]
        sums = "busy_s stall_s recall_wait_s prefill_s missed_entries selected_entries tokens"
        moved = sum(rank.to_gpu.moved_bytes for rank in server.ranks)
        return times, [getattr(log, name) for name in sums.split()] + [moved]

    at_once, one_by_one = served(1024), served(1)
    assert len(at_once[0]) > 3
    for found, expected in zip(at_once, one_by_one, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
