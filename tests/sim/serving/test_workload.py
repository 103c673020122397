"""When requests come and how long they are: what is drawn, and what is worked by hand."""

import numpy as np
import pytest
from hand_ledger import FLASH, H100, ledger

from fmsim.errors import FmsimError
from fmsim.sim.serving.demand import Demand
from fmsim.sim.serving.requests import Arrival
from fmsim.sim.serving.server import ServerRun
from fmsim.sim.serving.spec import (
    Bursts,
    ClosedLoop,
    Poisson,
    RequestFile,
    Server,
    SessionWorkload,
)
from fmsim.sim.serving.workload import RequestGenerator, _Turn

SIZES = {"prompt_tokens": [10, 12], "output_tokens": [3, 4], "duration_s": 100.0}
SESSIONS = SIZES | {"kind": "sessions", "turn_tokens": [20, 21], "block_tokens": 16}


def poisson(**changes):
    return RequestGenerator(Poisson(kind="poisson", **SIZES | {"rate_per_s": 5} | changes))


def closed_loop(**changes):
    given = SIZES | {"requests": 3, "ramp_s": 10} | changes
    return RequestGenerator(ClosedLoop(kind="closed_loop", **given))


def test_lengths_are_drawn_with_both_ends():
    rows = poisson().first
    assert {row.prompt_tokens for row in rows} == {10, 11, 12}
    assert {row.output_tokens for row in rows} == {3, 4}


def test_gaps_are_exponential_with_the_rates_mean():
    """Mean and standard deviation of 5,000 gaps are 1/50 s each, within 5%."""
    at_s = np.array([row.arrival_s for row in poisson(rate_per_s=50).first])
    assert at_s[0] > 0 and at_s[-1] < 100
    gaps_s = np.diff(at_s)
    assert [gaps_s.mean(), gaps_s.std()] == pytest.approx([0.02, 0.02], rel=0.05)


def test_requests_come_to_the_end_of_the_duration():
    """Of 5,000 on average: within 20 mean gaps of it, whatever the seed."""
    for seed in range(8):
        assert poisson(rate_per_s=50, seed=seed).first[-1].arrival_s > 100 - 20 / 50


def test_clients_begin_within_the_ramp_and_ask_as_their_seed_says():
    source = closed_loop(requests=200)
    at_s = [row.arrival_s for row in source.first]
    assert at_s == sorted(at_s) and 0 <= at_s[0] < 1 and 9 < at_s[-1] <= 10
    assert closed_loop(ramp_s=0).first[-1].arrival_s == 0


@pytest.mark.parametrize(
    ("build", "window_s"),
    [(poisson, 100.0), (closed_loop, 100.0)],
)
def test_requests_arrive_within_the_duration(build, window_s):
    assert build().window_s == window_s


def test_a_file_without_a_duration_has_its_last_arrivals(tmp_path):
    path = tmp_path / "requests"
    line = '{"timestamp": %d, "input_length": 700, "output_length": 2, "hash_ids": [7]}\n'
    path.write_text(line % 0 + line % 4000)
    made = lambda **more: RequestGenerator(RequestFile(kind="file", file=path, **more))
    assert made().window_s == 4.0 and made(speed=2).window_s == 2.0
    assert made(duration_s=4).first == [Arrival(0.0, 700, 2, (7,))]  # 4 s is past it
    assert made(duration_s=4.5).window_s == 4.5
    assert (made().block_tokens, made(lengths=0.5).block_tokens) == (512, 256)
    assert made(lengths=0.5).first[0].prompt_tokens == 350
    tiny = made(lengths=1e-6)
    assert (tiny.block_tokens, tiny.first[0].prompt_tokens) == (1, 1)
    path.write_text(line % 0)
    assert made().window_s == 1e-9


def test_requests_are_dealt_in_turn_and_clients_stay():
    source = closed_loop(requests=5)
    assert source.dealt(1) == [source]
    parts = source.dealt(2)
    assert [part.first for part in parts] == [source.first[0::2], source.first[1::2]]
    assert [len(part.first) for part in source.dealt(9)] == [1] * 5
    answers = [part.after(50.0, part.first[0]) for part in (*parts, *source.dealt(2))]
    assert answers[:2] == answers[2:]  # each part's own stream
    drawn = [[part.after(50.0, part.first[0]) for _ in range(20)] for part in parts]
    assert drawn[0] != drawn[1]


def test_nobody_asks_again_in_an_open_workload():
    source = poisson()
    assert source.after(1.0, source.first[0]) is None


def test_bursts_come_at_multiples_and_not_at_the_end():
    source = RequestGenerator(Bursts(kind="bursts", burst=2, every_s=50, **SIZES))
    assert [row.arrival_s for row in source.first] == [0, 0, 50, 50]


def test_turns_of_a_session_by_hand():
    """Sixteen tokens a block, 32 shared ones that all sessions begin with: blocks 0 and 1. The
    first prompt is 32 + 10 tokens and its answer 6: 48, a third block of the session's own. The
    next turn's 20 tokens come behind these 48; with its answer of 12 there are 80, five blocks.
    """
    workload = SessionWorkload(rate_per_s=1, shared_tokens=32, think_s=2, **SESSIONS)
    source = RequestGenerator(workload)
    source._turns[1] = [_Turn(10, 6, 0.0), _Turn(20, 12, 5.0), _Turn(1, 1, 90.0)]
    first = source._turn(workload, 7.0, 1, 0, 32)
    own = 2 << 32
    assert first == Arrival(7.0, 42, 6, (0, 1, own + 2), 1, 0)
    second = source.after(9.0, first)
    assert second == Arrival(14.0, 68, 12, (0, 1, own + 2, own + 3, own + 4), 1, 1)
    assert source.after(10.0, second) is None  # it would come at 100 s
    third = source.after(9.5, second)
    assert (third.arrival_s, third.prompt_tokens, third.turn) == (99.5, 81, 2)
    assert source.after(99.6, third) is None  # it was the last


def test_the_next_turn_comes_when_the_last_answer_has_been_read():
    workload = SessionWorkload(rate_per_s=0.2, turns=[2, 3], think_s=4, **SESSIONS)
    source = RequestGenerator(workload)
    demand = Demand(ledger(slots=8032, on_miss="fetch"), FLASH)
    requests = ServerRun(H100, FLASH, demand, Server(), source).run().requests
    ended = {(each.asked.session, each.asked.turn): each.finished_s for each in requests}
    later = [each for each in requests if each.asked.turn]
    assert len(later) > 3
    for each in later:
        session, turn = each.asked.session, each.asked.turn
        read_s = source._turns[session][turn].think_s
        assert each.arrival_s == pytest.approx(ended[session, turn - 1] + read_s)


def test_sessions_draw_turns_of_their_own():
    workload = SessionWorkload(rate_per_s=2, turns=[2, 3], think_s=4, **SESSIONS)
    source = RequestGenerator(workload)
    assert {len(turns) for turns in source._turns} == {2, 3}
    firsts = {turns[0].new_tokens for turns in source._turns}
    later = {turn.new_tokens for turns in source._turns for turn in turns[1:]}
    assert (firsts, later) == ({10, 11, 12}, {20, 21})
    outputs = {turn.output_tokens for turns in source._turns for turn in turns}
    assert outputs == {3, 4}
    thinks = [turn.think_s for turns in source._turns for turn in turns]
    assert np.mean(thinks) == pytest.approx(4, rel=0.2)
    assert source.first[0].prompt_tokens in (10, 11, 12) and source.block_tokens == 16
    assert source._turns[0] != source._turns[1]


@pytest.mark.parametrize(
    ("build", "fits", "refused", "says"),
    [
        # 100 s at a rate: so many, and ten standard deviations
        (poisson, {"rate_per_s": 5, "max_requests": 600}, {"rate_per_s": 9}, "about 900 requests"),
        (poisson, {"max_requests": 600}, {"rate_per_s": 8.6}, "about 860 requests"),
        (poisson, {"max_requests": 600}, {"rate_per_s": 8.4}, "^8.. requests; a run takes at most"),
        (
            poisson,
            {"max_requests": 600},
            {"max_requests": 400},
            "requests; a run takes at most 400",
        ),
        # a hundred seconds of clients that wait that long at most
        (closed_loop, {"requests": 30, "max_requests": 30}, {"requests": 31}, "31 requests"),
        (
            closed_loop,
            {"requests": 5, "duration_s": 1000.0, "max_requests": 19},
            {"requests": 7},
            "about 70 requests",
        ),
    ],
)
def test_what_is_more_than_a_run_takes_is_refused(build, fits, refused, says):
    build(**fits)
    with pytest.raises(FmsimError, match=says):
        build(**fits | refused)


def test_bursts_and_sessions_are_counted_before_they_are_drawn():
    with pytest.raises(FmsimError, match="about 1,000 requests"):
        RequestGenerator(Bursts(kind="bursts", burst=20, every_s=2, max_requests=400, **SIZES))
    with pytest.raises(FmsimError, match="about 1,500 requests"):
        RequestGenerator(SessionWorkload(rate_per_s=5, turns=[1, 3], max_requests=400, **SESSIONS))


def test_a_closed_loop_that_asks_too_often_is_refused_then():
    source = closed_loop(requests=3, max_requests=5)
    asked = source.first[0]
    assert source.after(1.0, asked) and source.after(2.0, asked)
    with pytest.raises(FmsimError, match="more than 5 requests"):
        source.after(3.0, asked)


def test_no_request_within_the_duration_is_said():
    with pytest.raises(FmsimError, match="no request arrives within"):
        poisson(rate_per_s=1e-9)
