"""Steps that draft tokens: their number and time by hand, and what they may not lose."""

import numpy as np
import pytest
from hand_ledger import FLASH, H100, ledger, loads
from hand_request import Given
from hypothesis import given, settings
from hypothesis import strategies as st

from fmsim.sim.serving.capacity.behaviour import BEHAVIOURS
from fmsim.sim.serving.capacity.plan import CapacityQuestion
from fmsim.sim.serving.demand import Demand, tokens_per_step
from fmsim.sim.serving.log import request_rows
from fmsim.sim.serving.requests import Arrival
from fmsim.sim.serving.server import ServerRun
from fmsim.sim.serving.spec import Bursts, Server
from fmsim.sim.serving.summary import summary
from fmsim.sim.serving.workload import RequestGenerator
from fmsim.sim.step_cost import StepModel

FULL, LRU, LSA = (Demand(each.ledger(FLASH), FLASH) for each in BEHAVIOURS)


def served(demand, outputs, seed=0, requests=4, **options):
    workload = Bursts(
        kind="bursts",
        burst=requests,
        every_s=10,
        prompt_tokens=32_000,
        output_tokens=outputs,
        duration_s=1,
        seed=seed,
    )
    run = ServerRun(
        H100, FLASH, demand, Server(prefill="done", **options), RequestGenerator(workload)
    )
    run.run()
    return run


def test_three_drafts_of_which_half_are_accepted_make_1_875_tokens_a_step():
    assert tokens_per_step(3, 0.5) == 1 + 1 / 2 + 1 / 4 + 1 / 8
    assert tokens_per_step(0, 0.9) == tokens_per_step(3, 0) == 1
    run = served(FULL, 1500, requests=1, draft_tokens=3, acceptance=0.5)
    assert run.log.requests[0].steps == 1500 / 1.875 == 800
    assert run.log.tokens == pytest.approx(1500)


def test_a_drafting_step_computes_its_positions_and_three_layers_more():
    """At one request: the step of four requests' rows, and three times a layer with its head."""
    tokens = np.array([32_000])
    plain, drafting = StepModel(H100, FLASH), StepModel(H100, FLASH, 3)
    four = plain.mixed(4, *(_alike(tokens), _alike(tokens // 4)), batch=4)
    step = drafting.equal(1, tokens, tokens // 4)
    drafts_s = 3e-3 * (plain.modules.draft_ms(1, 1) + plain.modules.hca.of_batch(1)[0])
    n = FLASH.n_selecting
    # the four share one request's keys, so three requests' reads are saved
    saved = float(four.total_s(n)[0] + drafts_s - step.total_s(n)[0])
    assert 0 <= saved < 0.05 * float(step.total_s(n)[0])
    one_s = float(plain.equal(1, tokens, tokens // 4).total_s(n)[0])
    assert one_s < float(step.total_s(n)[0]) < 2.5 * one_s


def _alike(tokens):
    from fmsim.sim.step_cost import Spread

    return Spread(4 * tokens, tokens)


def test_misses_of_all_positions_and_recalls_of_a_window_by_hand():
    """Cadence 64 and 1.75 tokens a step: 37 steps a window, 64 / 37 tokens each."""
    misses = np.arange(128, dtype=np.int32)[:, None]
    made = Demand(ledger(on_miss="fallback", lookahead_loads=loads(128, s64=300)), FLASH)
    made.miss_bytes = misses.astype(float)
    found = made.drafted(2, 0.5)
    assert (found.cadence, found.positions) == (round(64 / 1.75), 3) == (37, 3)
    assert found.tokens_per_step == 64 / 37
    assert found.miss_bytes[:3, 0].tolist() == [0 + 1 + 2, 1 + 2 + 3, 3 + 4 + 5]
    assert found.recall_bytes[37] == made.recall_bytes[64] > 0
    assert found.recall_bytes.sum() == made.recall_bytes.sum()
    assert made.drafted(0, 0.5) is made
    every_step = Demand(ledger(n_steps=9, cadence=1), FLASH).drafted(1, 1.0)
    assert (every_step.cadence, every_step.tokens_per_step) == (1, 2)
    assert every_step.offsets.tolist() == [0, 1, 2, 3]
    rising = ledger(n_steps=9, cadence=1, on_miss="fetch", demand_loads=np.arange(9)[:, None])
    halves = Demand(rising, FLASH).drafted(1, 0.5)  # steps of 1.5 tokens, at 0, 1, 3, 4, 6 and 7
    assert (halves.miss_bytes[:, 0] / 584).tolist() == [1, 3, 7, 9, 13, 15]
    short = Demand(ledger(n_steps=16, cadence=4), FLASH).drafted(6, 1.0)
    assert (short.cadence, short.tokens_per_step) == (1, 4)  # of a window's four tokens at most


@settings(max_examples=20, deadline=None)
@given(
    which=st.sampled_from([FULL, LRU, LSA]),
    drafts=st.integers(0, 6),
    acceptance=st.floats(0, 1),
    seed=st.integers(0, 100),
)
def test_every_token_that_was_wanted_is_made_once(which, drafts, acceptance, seed):
    run = served(which, [1, 400], seed, draft_tokens=drafts, acceptance=acceptance)
    wanted = sum(request.output_tokens for request in run.log.requests)
    assert run.log.tokens == pytest.approx(wanted) and summary(run)["tokens"] == wanted
    for row in request_rows([run.log], run.source.workload.slo):
        assert row["finished_s"] > row["arrival_s"]
    for rank in run.ranks:
        assert rank.hbm.level == rank.hbm.capacity and rank.host.level == rank.host.capacity


def test_a_request_takes_whole_steps_the_last_one_perhaps_for_less():
    """101 tokens, of which the prefill makes one; 1.5 a step."""
    options = Server(draft_tokens=1, acceptance=0.5)
    run = ServerRun(H100, FLASH, FULL, options, Given(Arrival(0.0, 1000, 101)))
    run.run()
    assert run.log.requests[0].steps == 67 and run.log.tokens == 101


@settings(max_examples=20, deadline=None)
@given(which=st.sampled_from([FULL, LRU, LSA]), low=st.floats(0, 1), high=st.floats(0, 1))
def test_more_accepted_drafts_never_take_longer_a_token(which, low, high):
    def token_s(acceptance):
        asked = CapacityQuestion(
            H100,
            FLASH,
            which,
            Server(prefill="done", draft_tokens=3, acceptance=acceptance),
            128_000,
            1024,
            0.05,
        )
        return asked.state().at(8).token_s

    slow, fast = sorted((low, high))
    # a window's whole number of steps rounds by up to half of one in 16
    assert token_s(fast) <= token_s(slow) * (1 + 1 / 16)
