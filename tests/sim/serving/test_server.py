"""Many requests on one server: against one decode, against sums worked by hand, and what must hold
whatever comes.
"""

import json

import hand_request
import numpy as np
import pytest
from hand_ledger import FLASH, H100, ledger, loads
from hand_request import PROMPT, FromTheStart, Given, serve
from hypothesis import given, settings
from hypothesis import strategies as st

from fmsim.hw import replace_figure
from fmsim.hw.deployment import Deployment
from fmsim.sim.decode import simulate
from fmsim.sim.footprint import footprint
from fmsim.sim.metrics import capacity
from fmsim.sim.serving.demand import Demand
from fmsim.sim.serving.requests import Arrival
from fmsim.sim.serving.server import ServerRun
from fmsim.sim.serving.spec import Poisson, Server, Slo
from fmsim.sim.serving.summary import summary
from fmsim.sim.serving.workload import RequestGenerator
from fmsim.sim.step_cost import Spread, StepModel
from fmsim.sim.transfer_cost import GatherCurve

DONE = Server(prefill="done")
ONE_WINDOW = {"lookahead_loads": loads(128, s64=300)}


LEDGERS = {
    "full": ledger(slots=8032, on_miss="fetch"),
    "misses": ledger(
        n_groups=3, on_miss="fetch", cadence=1, demand_loads=loads(128, 3, s10=40, s11=400)
    ),
    "recall": ledger(**ONE_WINDOW),
    "recall that is late": ledger(lookahead_loads=loads(128, s64=2_000_000)),
    "recall not begun early": ledger(**ONE_WINDOW, params={"stale": False}),
    "scored by an indexer": ledger(
        **ONE_WINDOW, scored=np.where(np.arange(128) % 64 == 0, 24_000, 0)
    ),
}


@pytest.mark.parametrize("name", LEDGERS)
def test_one_request_of_the_ledgers_size_takes_what_one_decode_takes(name):
    made = LEDGERS[name]
    timeline = simulate(made, FLASH, H100)
    server = serve(made, (0, PROMPT, 128))
    assert server.log.requests[0].finished_s == pytest.approx(timeline.end_s[-1], rel=1e-9)
    assert server.log.stall_s == pytest.approx(timeline.stall_s.sum())
    assert server.log.recall_wait_s == pytest.approx(timeline.recall_wait_s.sum(), rel=1e-6)
    assert server.ranks[0].to_gpu.moved_bytes == pytest.approx(timeline.h2d_bytes.sum())
    assert server.demand.pools(PROMPT, 128).gpu == footprint(made, FLASH).allocated


def test_misses_beside_a_recall_wait_for_their_part_of_the_link():
    made = ledger(
        on_miss="fallback", demand_loads=loads(128, s0=200), lookahead_loads=loads(128, s64=20_000)
    )
    alone = ledger(on_miss="fallback", demand_loads=loads(128, s0=200))
    stall_s, stall_alone_s = (serve(each, (0, PROMPT, 128)).log.stall_s for each in (made, alone))
    assert stall_alone_s < stall_s < 2.1 * stall_alone_s


def test_two_equal_requests_take_what_a_batch_of_two_takes():
    timeline = simulate(LEDGERS["recall"], FLASH, H100, batch=2)
    server = serve(LEDGERS["recall"], (0, PROMPT, 128), (0, PROMPT, 128))
    assert [request.finished_s for request in server.log.requests] == pytest.approx(
        [timeline.end_s[-1]] * 2, rel=1e-9
    )
    assert server.ranks[0].to_gpu.moved_bytes == pytest.approx(timeline.h2d_bytes.sum())


def test_two_recalls_share_the_link_by_hand():
    """Each recall alone takes a little less than its window; both together take twice that, and the
    batch waits for the rest.
    """
    seconds = GatherCurve(H100.link).seconds
    made = ledger(lookahead_loads=loads(128, s64=900_000))
    one, two = serve(made, (0, PROMPT, 128)), serve(made, (0, PROMPT, 128), (0, PROMPT, 128))
    n_bytes = 900_000 * 21 * 716
    rate = min(H100.link.bandwidth_bytes_per_s.value / 2, n_bytes / float(seconds(716, n_bytes)))
    assert one.log.recall_wait_s == pytest.approx(
        max(0.0, float(seconds(716, n_bytes)) - window_s(made, 1)), rel=1e-6
    )
    assert two.log.recall_wait_s == pytest.approx(n_bytes / rate - window_s(made, 2), rel=1e-6)


def window_s(made, batch):
    return float(
        simulate(made, FLASH, H100, batch=batch).step_s[:64].sum()
        if batch == 1
        else steps_s(made, batch)[:64].sum()
    )


def steps_s(made, batch):
    place = footprint(made, FLASH)
    return (
        StepModel(H100, FLASH).equal(batch, place.tokens, place.scored_entries).total_s(FLASH.n_csa)
    )


@pytest.mark.parametrize("begun_s", [0, 7.0])
def test_a_newcomer_joins_at_the_end_of_the_step_under_way(begun_s):
    alone_s = simulate(LEDGERS["full"], FLASH, H100).step_s
    arrival_s = begun_s + float(alone_s[:3].sum()) + 1e-4
    server = serve(LEDGERS["full"], (begun_s, PROMPT, 100), (arrival_s, PROMPT, 20))
    joined_s = begun_s + float(alone_s[:4].sum())
    context = PROMPT + 1 + np.array([4, 0])
    costs = StepModel(H100, FLASH).mixed(
        2,
        *(Spread(np.array([v.sum()]), np.array([v.max()])) for v in (context, context // 4)),
    )
    assert server.log.requests[1].first_token_s == pytest.approx(
        joined_s + float(costs.total_s(21)[0]), rel=1e-6
    )


def test_what_does_not_fit_waits_and_what_never_fits_is_refused():
    limit = capacity(footprint(LEDGERS["full"], FLASH), FLASH, H100)[0]
    server = serve(LEDGERS["full"], *[(0, PROMPT, 128)] * (limit + 1), (0, 4 * 10**9, 10))
    first, last, refused = (
        server.log.requests[0],
        server.log.requests[limit],
        server.log.requests[limit + 1],
    )
    assert summary(server)["held"] == limit
    assert last.admitted_s == first.finished_s and server.log.waited_s[
        "GPU memory"
    ] == pytest.approx(first.finished_s)
    assert refused.refused == "the model's positions" and refused.admitted_s is None
    assert summary(server)["requests"] == {
        "arrived": limit + 2,
        "finished": limit + 1,
        "refused": 1,
    }


@pytest.mark.parametrize(
    ("n_long", "n_large", "bound"), [(2, 1, "the model's positions"), (1, 2, "GPU memory")]
)
def test_where_all_are_refused_rates_are_0_and_what_most_were_refused_for_is_named(
    n_long, n_large, bound
):
    small = replace_figure(H100, "hbm_bytes", H100.hbm_bytes.value - 31e9)
    capacity_bytes = serve(LEDGERS["full"], (0, 10, 10), hw=small).ranks[0].hbm.capacity
    assert capacity_bytes < 3.8e9 < Demand(LEDGERS["full"], FLASH).pools(1_000_000, 10).gpu.total
    long, large = (0, 1_048_570, 7), (0, 1_000_000, 10)  # 1,048,577 positions; 3.86 GB
    row = summary(serve(LEDGERS["full"], *[long] * n_long, *[large] * n_large, hw=small))
    assert row["requests"] == {"arrived": 3, "finished": 0, "refused": 3}
    assert (row["tokens_per_s"], row["goodput_per_s"], row["slo_share"]) == (0, 0, 0)
    assert (row["bound"], row["stall_share"], row["waited_share"]) == (bound, 0, {})
    assert summary(serve(LEDGERS["full"], (0, PROMPT, 128), long))["bound"] == "compute"


def test_idle_time_is_not_busy_and_the_log_reaches_to_the_last_event():
    """Served from 5 s on; at 100 s somebody comes who is refused at once."""
    server = serve(LEDGERS["full"], (5, PROMPT, 64), (100, 2 * 10**6, 10))
    served = server.log.requests[0]
    assert server.log.busy_s == pytest.approx(served.finished_s - 5)
    assert (server.log.samples[0][0], server.log.samples[-1][0]) == (0.0, 100.0)
    assert summary(server)["simulated_s"] == 100.0


def test_a_prompts_chunks_and_decoded_tokens_are_written_to_the_mirror():
    server = serve(LEDGERS["recall"], (0, PROMPT, 65), prefill="chunked")
    written = (PROMPT + 64) * FLASH.paged_bytes_per_token
    assert server.log.written_back_bytes == pytest.approx(written)


def test_misses_share_the_link_where_any_ranks_is_busy(monkeypatch):
    """Of two ranks the second has a recall under way."""
    hw = H100.deployed(Deployment(dp=2))
    server = FromTheStart(hw, FLASH, Demand(LEDGERS["misses"], FLASH), DONE, Given())
    server.batch.add(hand_request.request(server.demand))
    contended = []

    def noted(times):
        contended.append(True)
        return 0.0
        yield

    monkeypatch.setattr(server.links, "contended_stall", noted)
    next(server._span())
    assert not contended
    server.ranks[1].to_gpu.transfer(1e9)
    next(server._span())
    assert contended


def test_host_memory_batch_limit_and_link_bind_by_name():
    host_bound = ledger(n_steps=128, prompt_entries=128_000, slots=100, **ONE_WINDOW)
    limit = int(H100.host_bytes_per_gpu // Demand(host_bound, FLASH).pools(512_000, 128).mirror)
    row = summary(serve(host_bound, *[(0, 512_000, 128)] * (limit + 5)))
    assert (row["held"], row["bound"]) == (limit, "host memory")
    row = summary(serve(host_bound, *[(0, 512_000, 128)] * (limit + 5), mirror="shared"))
    assert row["held"] == limit + 5
    row = summary(serve(LEDGERS["full"], *[(0, PROMPT, 128)] * 5, max_batch=3))
    assert (row["held"], row["bound"]) == (3, "batch limit")
    heavy = ledger(n_steps=256, lookahead_loads=loads(256, s64=120_000, s128=120_000, s192=120_000))
    held = {
        admits: summary(serve(heavy, *[(0, PROMPT, 256)] * 40, admit_by_link=admits))
        for admits in (False, True)
    }
    assert held[True]["bound"] == "PCIe" and held[True]["held"] < held[False]["held"] == 40
    assert held[True]["stall_share"] < 0.01 < held[False]["stall_share"]


def test_a_request_replays_windows_again_when_it_outlasts_its_ledger():
    made = ledger(n_steps=192, lookahead_loads=loads(192, s64=100, s128=200))
    demand = Demand(made, FLASH)
    assert list(demand.at(np.array([0, 64, 128, 191, 192, 256, 320]))) == [
        0,
        64,
        128,
        191,
        64,
        128,
        64,
    ]
    server = serve(made, (0, PROMPT, 384))
    assert server.ranks[0].to_gpu.moved_bytes == pytest.approx(
        (100 + 200 + 100 + 200 + 100) * 21 * 716
    )


def test_other_lengths_keep_the_ledgers_shares():
    share = Demand(ledger(params={"budget": "10%"}, **ONE_WINDOW), FLASH)
    twice, once = (share.pools(tokens, 128).gpu.slots for tokens in (2 * PROMPT, PROMPT))
    assert twice == 2 * once
    assert share.recall_bytes_per_step(2 * PROMPT) == pytest.approx(
        2 * share.recall_bytes_per_step(PROMPT)
    )
    fixed = Demand(
        ledger(params={"budget": "800 entries"}, on_miss="fetch", demand_loads=loads(128, s5=50)),
        FLASH,
    )
    for tokens in (PROMPT, 2 * PROMPT):
        assert fixed.pools(tokens, 128).gpu.slots == 21 * 800 * 584
    assert serve_misses(fixed, 4 * PROMPT) == serve_misses(fixed, PROMPT) == 21 * 50 * 584
    assert serve_misses(fixed, 2000) == 0  # 500 entries fit the budget whole
    of_topk = Demand(
        ledger(
            params={"budget": "2x topk"},
            topk=64,
            slots=128,
            on_miss="fetch",
            demand_loads=loads(128, s5=50),
        ),
        FLASH,
    )
    assert of_topk.pools(PROMPT, 128).gpu.slots == 21 * 1024 * 584
    assert serve_misses(of_topk, PROMPT) == 21 * 400 * 584


def serve_misses(demand, prompt):
    server = FromTheStart(
        H100, FLASH, demand, Server(prefill="done"), Given(Arrival(0, prompt, 128))
    )
    server.run()
    return round(server.ranks[0].to_gpu.moved_bytes)


def test_gpu_bytes_are_those_of_the_geometry():
    pools = Demand(LEDGERS["recall"], FLASH).pools(PROMPT, 128)
    assert pools.mirror == FLASH.host_kv_bytes(PROMPT + 128)
    fixed = FLASH.window_bytes + 20 * 251 * 584
    assert pools.gpu_bytes == fixed + 21 * 800 * (584 + 132)
    full = Demand(LEDGERS["full"], FLASH).pools(PROMPT, 128)
    assert full.mirror == full.gpu.spare == 0
    assert full.gpu_bytes == fixed + 21 * 8032 * (584 + 132)


@pytest.mark.parametrize(
    ("budget", "prompt", "slots"),
    [
        # Of 32,128 tokens the windows take 43 x 128 x 584 = 3,214,336, HCA entries 20 x 251 x 584
        # = 2,931,680, keys 21 x 8032 x 132 = 22,264,704, the full cache 126,915,168 in all. What
        # half of that leaves, 35,046,864, is 2,857 entries in 21 layers; 512 are for misses.
        ("50% gpu", PROMPT, 2345),
        ("0.05 GiB gpu", PROMPT, 1549),
        ("0.1 GiB gpu", 2 * PROMPT, 3880),  # 501 HCA entries, 16,032 keys
        ("0.05 GiB gpu", 2 * PROMPT, 1),  # 14 entries are left, too few for the misses
    ],
)
def test_a_budget_on_the_gpu_is_solved_for_each_length(budget, prompt, slots):
    made = ledger(on_miss="fetch", params={"budget": budget}, miss_slots=512)
    gpu = Demand(made, FLASH).pools(prompt, 128).gpu
    assert gpu.slots == slots * 21 * 584 and gpu.spare == 512 * 21 * 584


MIX = {
    "kind": "poisson",
    "rate_per_s": 3.0,
    "prompt_tokens": [1, 60_000],
    "output_tokens": [1, 160],
    "duration_s": 6.0,
}


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    prefill=st.sampled_from(["done", "chunked", "separate"]),
    on_miss=st.sampled_from(["fetch", "mask", "fallback"]),
    misses=st.integers(0, 300),
    recalled=st.integers(0, 4000),
    budget=st.sampled_from(["10%", "800 entries"]),
    max_batch=st.sampled_from([None, 1, 7]),
    hbm_bytes=st.sampled_from([85.5e9, 57.5e9]),
)
def test_whatever_comes_is_served_within_the_pools(
    seed, prefill, on_miss, misses, recalled, budget, max_batch, hbm_bytes
):
    at_64 = loads(128, s64=recalled)
    made = ledger(
        on_miss=on_miss,
        params={"budget": budget},
        lookahead_loads=at_64,
        demand_loads=np.full((128, 1), misses, np.int32) * (on_miss != "mask"),
    )
    hw = H100.model_copy(
        update={"hbm_bytes": H100.hbm_bytes.model_copy(update={"value": hbm_bytes})}
    )
    server = ServerRun(
        hw,
        FLASH,
        Demand(made, FLASH),
        Server(prefill=prefill, max_batch=max_batch),
        RequestGenerator(Poisson(**MIX, seed=seed)),
    )
    log = server.run()
    row = summary(server)
    assert (
        row["requests"]["finished"] + row["requests"]["refused"]
        == row["requests"]["arrived"]
        == len(server.source.first)
    )
    assert log.tokens == sum(
        request.output_tokens for request in log.requests if not request.refused
    )
    assert max(row["in_use"]["GPU memory"]["peak"], row["in_use"]["host memory"]["peak"]) <= 1
    assert row["held"] <= (max_batch or 10**9)
    assert server.ranks[0].hbm.level == pytest.approx(
        server.ranks[0].hbm.capacity
    )  # all was given back
    assert server.ranks[0].to_gpu.moved_bytes <= server.ranks[0].to_gpu.bytes_per_s * row[
        "simulated_s"
    ] * (1 + 1e-9)
    assert (
        server.ranks[0].to_gpu.idle and not server.admission.admitted and not server.admission.queue
    )
    for request in log.requests:
        if not request.refused:
            assert (
                request.arrival_s
                <= request.admitted_s
                <= request.first_token_s
                <= request.finished_s
            )
    assert log.busy_s <= row["simulated_s"] * (1 + 1e-9)
    assert 0 <= row["stall_share"] <= 1 and row["slo_share"] <= 1
    served = [made for made in log.requests if not made.refused]
    assert sum(served_bytes(server, each) for each in served) == pytest.approx(
        server.ranks[0].to_gpu.moved_bytes, rel=1e-6, abs=1
    )


def served_bytes(server, request):
    """What a request must have moved to the GPU, step by step."""
    demand, prompt = server.demand, request.prompt_tokens
    if demand.fits_whole(prompt, request.output_tokens):
        moved = 0.0
    else:
        position = request.offset + np.arange(request.steps)
        at = demand.at(position)
        moved = float((demand.miss_bytes[at] @ demand.group_layers).sum())
        moved += float(demand.recall_bytes[at][position > request.offset].sum()) * demand.growth(
            prompt
        )
    if server.options.prefill == "separate" and demand.mirrored:
        moved += demand.first_set_bytes(prompt, request.output_tokens)
    return moved


def test_the_same_seed_gives_the_same_bytes():
    def text(seed):
        server = ServerRun(
            H100,
            FLASH,
            Demand(LEDGERS["recall"], FLASH),
            Server(prefill="separate"),
            RequestGenerator(Poisson(**MIX, seed=seed)),
        )
        server.run()
        return json.dumps(summary(server))

    assert text(3) == text(3) != text(4)


def loose(*arrivals):
    """Goodput counts every finished request."""
    source = Given(*(Arrival(*each) for each in arrivals))
    slo = {"ttft_s": 1e9, "tpot_s": 1e9}
    source.workload = source.workload.model_copy(update={"slo": Slo(**slo)})
    server = ServerRun(H100, FLASH, Demand(LEDGERS["full"], FLASH), Server(prefill="done"), source)
    server.run()
    return summary(server)


def test_rates_are_over_the_time_that_serving_took():
    """One request of 200 tokens takes about 1.4 s, so it makes some 144 tokens a second; it is not
    a billion requests a second because it came at one instant.
    """
    row = loose((0, PROMPT, 200))
    assert row["served_s"] == pytest.approx(1.4, rel=0.1)
    assert row["tokens_per_s"] == pytest.approx(200 / row["served_s"])
    assert row["goodput_per_s"] == pytest.approx(1 / row["served_s"])
    eight = loose(*[(5, PROMPT, 200)] * 8)
    assert eight["tokens_per_s"] == pytest.approx(1600 / eight["served_s"])
    assert row["goodput_per_s"] < eight["goodput_per_s"] == pytest.approx(8 / eight["served_s"])
    late = loose(*[(0.05 * n, PROMPT, 1000) for n in range(400)])
    assert late["goodput_per_s"] == pytest.approx(400 / late["served_s"])
    assert late["served_s"] > 40 and late["tokens_per_s"] == pytest.approx(
        1000 * late["goodput_per_s"]
    )


def test_a_slow_copy_path_slows_misses_on_an_idle_link_too():
    made = ledger(n_groups=3, on_miss="fetch", demand_loads=loads(128, 3, s10=400))
    fast, slow = (
        serve(made, (0, PROMPT, 128), recall_bytes_per_s=rate).log.stall_s for rate in (None, 1e9)
    )
    assert slow == pytest.approx(400 * 21 * 584 / 1e9, rel=0.05) and slow > 5 * fast


def test_a_server_that_knows_the_slo_admits_no_more_than_keep_it():
    made = ledger(n_groups=3, on_miss="fetch", demand_loads=np.full((128, 3), 500, np.int32))
    arrivals = [(0, PROMPT, 128)] * 400
    without, with_slo = (
        serve(made, *arrivals, admit_by_slo=admits).log for admits in (False, True)
    )
    tpot = lambda log: max(
        (request.finished_s - request.admitted_s) / 128 for request in log.requests
    )
    assert tpot(without) > 0.05 >= tpot(with_slo) * 0.99
    assert set(with_slo.waited_s) == {"time a token"}
