"""Walls by hand, what moves them, and where KV on the host begins to pay."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hand_ledger import FLASH, H100, ledger, loads
from hand_tables import round_link

from fmsim.hw import replace_figure
from fmsim.hw.deployment import Deployment
from fmsim.hw.spec import LINK_FIGURE
from fmsim.sim.serving.capacity.plan import (
    CapacityQuestion,
    _changes,
    _compare,
    _Load,
    _smallest_batch,
    crossover,
    goodput,
    moves,
    plan,
)
from fmsim.sim.serving.capacity.steady import Steady, SteadyState
from fmsim.sim.serving.demand import Demand
from fmsim.sim.serving.spec import Server
from fmsim.sim.step_cost import memory_indexer_s

ENTRIES = 32_000
FULL = Demand(
    ledger(prompt_entries=ENTRIES, slots=ENTRIES + 32, on_miss="fetch", params={"budget": "100%"}),
    FLASH,
)
RECALLS = {f"s{step}": 1600 for step in range(64, 256, 64)}
TENTH = Demand(
    ledger(
        n_steps=256,
        prompt_entries=ENTRIES,
        slots=3200,
        lookahead_loads=loads(256, **RECALLS),
        params={"budget": "10%"},
    ),
    FLASH,
)


def question(demand, tokens=524_288, tpot_s=0.05, hw=H100, **options):
    return CapacityQuestion(hw, FLASH, demand, Server(**options), tokens, 1024, tpot_s)


def test_memory_walls_are_pools_over_a_requests_bytes():
    walls = question(TENTH).walls()
    pools = TENTH.pools(524_288, 1024)
    assert walls["GPU memory"] == int(H100.kv_pool_bytes(FLASH) // pools.gpu_bytes)
    assert walls["host memory"] == int(H100.host_bytes_per_gpu // FLASH.host_kv_bytes(525_312))
    assert question(TENTH, mirror="shared").walls()["host memory"] == int(
        8 * H100.host_bytes_per_gpu // FLASH.host_kv_bytes(525_312)
    )
    assert question(TENTH, max_batch=7).walls()["batch limit"] == 7
    assert "host memory" not in question(FULL).walls() and "PCIe" not in question(FULL).walls()


def test_the_links_wall_is_where_recalls_fill_their_window():
    slow = question(TENTH, recall_bytes_per_s=2e9)
    wall, state = slow.walls()["PCIe"], slow.state()
    per_window = 1600 * 21 * 716 * 525_312 / 4 / ENTRIES  # bytes, grown to the request's length
    link_s = lambda batch: batch * per_window / 2e9
    assert link_s(wall) <= 64 * state.at(wall).compute_s * (1 + 1e-9)
    assert link_s(wall + 1) > 64 * state.at(wall + 1).compute_s * (1 - 1e-9)
    beyond = state.at(4 * wall)
    assert beyond.step_s == pytest.approx(link_s(4 * wall) / 64) and beyond.wait_share > 0.2


def test_computes_wall_keeps_the_time_a_token():
    asked = question(FULL, tokens=8192, tpot_s=0.012)
    wall, state = asked.walls()["compute"], asked.state()
    assert state.at(wall).step_s <= 0.012 < state.at(wall + 1).step_s
    exactly = asked.changed(tpot_s=state.at(wall - 3).token_s)
    assert exactly.walls()["compute"] == wall - 3
    assert asked.changed(tpot_s=1e9).walls()["compute"] == 4096  # more is no wall


def test_a_plan_names_the_wall_and_what_moves_it():
    found = plan(question(FULL), FULL)
    assert (
        found["max_requests_bound"] == "GPU memory"
        and found["max_requests"] == found["walls"]["GPU memory"]
        and found["crossover"] is None
    )
    moves = {move["change"]: move["max_requests"] for move in found["moves"]}
    assert moves["twice the GPU memory"] > 2 * found["max_requests"]
    assert moves["twice the link to the host"] == found["max_requests"] < moves["half the context"]
    found = plan(question(TENTH, tokens=10**6, tpot_s=1.0), FULL)
    assert found["max_requests_bound"] == "host memory"
    moves = {
        move["change"]: (move["max_requests"], move["max_requests_bound"])
        for move in found["moves"]
    }
    assert (
        moves["twice the host memory"]
        == moves["one mirror that all GPUs share"]
        == (found["walls"]["GPU memory"], "GPU memory")
    )


def test_kv_on_the_host_pays_where_the_full_cache_no_longer_fits():
    found = plan(question(TENTH, tpot_s=1.0), FULL)["crossover"]
    pays = [row["pays"] for row in found["by_context"]]
    assert pays == sorted(pays) and pays[-1]
    edge = found["context_tokens"]
    assert edge % 1024 == 0  # between powers of two, halved until 1,024 are left
    assert edge is not None and found["by_context"][pays.index(True)]["context_tokens"] >= edge
    assert 1 <= found["batch"] <= question(FULL).walls()["GPU memory"] + 1


def test_nothing_fits_is_said_not_divided_by():
    found = plan(question(FULL, tokens=2**28, tpot_s=1.0), FULL)
    assert (
        found["max_requests"] == 0
        and found["max_requests_bound"] == "GPU memory"
        and found["speed"] is None
    )
    assert (found["goodput"]["requests_per_s"], found["goodput"]["batch"]) == (0.0, 0)


def load(prefill, n_chunks, prompt_s, tpot_s=1e9, ttft_s=1e9, dp=2, servers=1):
    """Of requests of 100 tokens on two ranks."""
    asked = SimpleNamespace(
        options=Server(prefill=prefill, prefill_servers=servers),
        engine=SimpleNamespace(placed=SimpleNamespace(dp=dp)),
        output_tokens=100,
        tpot_s=tpot_s,
        ttft_s=ttft_s,
    )
    return _Load(asked, n_chunks, prompt_s)


def steady(batch=10, step_s=0.01):
    return Steady(batch, compute_s=step_s, stall_s=0.0, link_s=0.0)


def test_chunks_beside_decode_lengthen_a_step_where_any_rank_has_one():
    """Ten requests of 4 chunks and 100 steps on two ranks: a rank has a chunk in 0.2 of the steps,
    one of both in 0.36, and a chunk takes 0.5 s: 0.19 s a token. A prompt takes 2 s and four steps
    of 0.01; it waits for 0.2 / (2 x 0.8) of that: 2.295 s.
    """
    found = load("chunked", 4, 2.0)
    assert found.requests_per_s(steady()) == pytest.approx(10 / (0.19 * 100))
    for tpot_s, ttft_s, keeps in (
        (0.1901, 2.2951, True),
        (0.1899, 2.2951, False),
        (0.1901, 2.2949, False),
    ):
        assert load("chunked", 4, 2.0, tpot_s, ttft_s).keeps(steady()) is keeps
    assert load("chunked", 4, 2.0).keeps(steady(batch=49))
    assert not load("chunked", 4, 2.0).keeps(steady(batch=50))  # a chunk in every step
    full = load("chunked", 4, 2.0).requests_per_s(steady(batch=100))
    assert full == pytest.approx(100 / (0.51 * 100))  # in every step, and no more


def test_prompts_on_servers_of_their_own_queue_there():
    """Ten requests a second on two servers of 0.1 s: each is busy half of the time, and a prompt
    waits for half of 0.1 s: 0.15 s in all.
    """
    found = load("separate", 4, 0.1, servers=2)
    assert found.requests_per_s(steady()) == pytest.approx(10.0)
    assert load("separate", 4, 0.1, 0.01, 0.1501, servers=2).keeps(steady())
    assert not load("separate", 4, 0.1, 0.01, 0.1499, servers=2).keeps(steady())
    assert not load("separate", 4, 0.1, 0.0099, 0.1501, servers=2).keeps(steady())
    assert not load("separate", 4, 0.1, servers=1).keeps(steady())  # busy all the time


def test_prompts_that_are_done_cost_nothing():
    found = load("done", 4, 1e6, tpot_s=0.01, ttft_s=1e-9)
    assert found.keeps(steady()) and found.requests_per_s(steady()) == pytest.approx(10.0)
    assert not found.keeps(steady(step_s=0.0101))


def test_goodput_is_of_the_most_that_keep_their_times_and_fit():
    asked = question(FULL, tokens=8192, tpot_s=0.012, prefill="done")
    for tpot_s, wall in ((0.012, "compute"), (100.0, "GPU memory")):
        one = asked.changed(tpot_s=tpot_s)
        found, batch = goodput(one), one.walls()[wall]
        token_s = one.state().at(batch).token_s
        assert found["batch"] == batch == min(one.walls().values())
        assert found["requests_per_s"] == pytest.approx(batch / (token_s * 1024))
        assert found["prompt_s"] == one.prompt_chunks_s().sum()


def test_a_steady_step_is_the_longest_of_what_runs_side_by_side():
    for parts, step_s in (
        ({"compute_s": 3.0, "stall_s": 1.0, "link_s": 2.0, "nvme_s": 2.0}, 4.0),
        ({"compute_s": 1.0, "stall_s": 1.0, "link_s": 5.0, "nvme_s": 2.0}, 5.0),
        ({"compute_s": 1.0, "stall_s": 1.0, "link_s": 5.0, "nvme_s": 8.0}, 8.0),
    ):
        found = Steady(4, **parts)
        assert (found.step_s, found.tokens_per_s) == (step_s, 4 / step_s)
        assert found.wait_share == pytest.approx(1 - parts["compute_s"] / step_s)


def test_the_largest_batch_that_holds():
    state = SteadyState(H100, FLASH, FULL, 8192, 10)
    asked = []
    for wall in (0, 1, 5, 16, 17):
        holds = lambda found, wall=wall: asked.append(found.batch) or found.batch <= wall
        assert state.largest(holds, 16) == min(wall, 16)
    assert state.largest(lambda found: True, 0) == 0 and set(asked) <= set(range(1, 17))


def test_what_each_change_would_give():
    """Every change that a server with a mirror can make, in order, and each the plan of a server
    that has it.
    """
    asked = question(TENTH, tokens=10**6, tpot_s=0.3, max_batch=2, recall_bytes_per_s=2e9)
    found = {row["change"]: row["max_requests"] for row in plan(asked, FULL)["moves"]}
    assert set(found.values()) <= set(range(1, 4096))
    alone = lambda **changes: min(asked.changed(**changes).walls().values())
    changes = dict(_changes(asked))
    assert changes["half the context"].tokens == 500_000
    assert changes["twice the GPU memory"].hw.hbm_bytes.value == 2 * H100.hbm_bytes.value
    assert changes["twice the time a token"].tpot_s == 0.6
    link = changes["twice the link to the host"]
    assert link.options.recall_bytes_per_s == 4e9
    assert link.hw.link.bandwidth_bytes_per_s.value == 2 * H100.link.bandwidth_bytes_per_s.value
    assert changes["twice the host memory"].hw.host_bytes.value == 2 * H100.host_bytes.value
    options = asked.options
    expected = {
        "twice the GPU memory": alone(hw=doubled("hbm_bytes")),
        "twice the host memory": alone(hw=doubled("host_bytes")),
        "one mirror that all GPUs share": alone(
            options=options.model_copy(update={"mirror": "shared"})
        ),
        "twice the link to the host": alone(
            hw=doubled(LINK_FIGURE),
            options=options.model_copy(update={"recall_bytes_per_s": 4e9}),
        ),
        "half the context": alone(tokens=500_000),
        "twice the time a token": alone(tpot_s=0.6),
        "NVMe below host memory": alone(options=options.model_copy(update={"nvme": True})),
        "no batch limit": alone(options=options.model_copy(update={"max_batch": None})),
    }
    if H100.nvme_bytes is None:
        del expected["NVMe below host memory"]
    assert found == expected and list(found) == list(expected)


def test_mirrors_are_shared_by_several_gpus_that_have_one_each():
    one = question(TENTH, hw=H100.deployed(Deployment(dp=8)))
    for asked, offered in ((question(TENTH), 1), (question(TENTH, mirror="shared"), 0), (one, 0)):
        names = [name for name, _ in _changes(asked)]
        assert names.count("one mirror that all GPUs share") == offered


def doubled(name):
    figure = H100.link.bandwidth_bytes_per_s if name == LINK_FIGURE else getattr(H100, name)
    return replace_figure(H100, name, 2 * figure.value)


def test_drives_are_an_answer_where_both_their_size_and_their_rate_are_known():
    bare = H100.model_copy(update={"nvme_bytes": None, "nvme_bytes_per_s": None})
    size = replace_figure(bare, "nvme_bytes", 8e12)
    rate = replace_figure(bare, "nvme_bytes_per_s", 54e9)
    both = replace_figure(size, "nvme_bytes_per_s", 54e9)
    named = lambda hw: "NVMe below host memory" in dict(_changes(question(TENTH, hw=hw)))
    assert [named(hw) for hw in (bare, size, rate, both)] == [False, False, False, True]
    twice = dict(_changes(question(TENTH, hw=both, nvme=True)))["twice the NVMe drives"].hw
    assert (twice.nvme_bytes.value, twice.nvme_bytes_per_s.value) == (16e12, 108e9)
    unpriced = both.model_copy(update={"nvme_usd_per_tb": None})
    priced = replace_figure(both, "nvme_usd_per_tb", 90.0)
    for hw, usd in ((unpriced, None), (priced, 720.0)):
        rows = {row["change"]: row.get("usd") for row in moves(question(TENTH, hw=hw))}
        assert rows.pop("NVMe below host memory") == usd and not any(rows.values())


def test_a_plan_for_one_request_gives_its_speed_and_one_for_none_gives_none():
    """At a batch limit of one; and where the weights leave no room for a request of a million."""
    found = plan(question(TENTH, tpot_s=1.0, max_batch=1), FULL)
    assert (found["max_requests"], found["max_requests_bound"]) == (1, "batch limit")
    assert found["speed"]["batch"] == 1 and found["ttft_slo_s"] is None
    alone = question(TENTH, tpot_s=1.0).state().at(1)
    assert found["speed"]["tokens_per_s"] == pytest.approx(alone.tokens_per_s)
    small = question(TENTH, tokens=10**6, tpot_s=1.0)
    need = TENTH.pools(10**6, 1024).gpu_bytes
    less = H100.kv_pool_bytes(FLASH) - 1.5 * need
    small = small.changed(hw=replace_figure(H100, "hbm_bytes", H100.hbm_bytes.value - less))
    row = _compare(small, FULL)
    assert (row["policy_requests"], row["full_requests"], row["full_tokens_per_s"]) == (1, 0, 0.0)
    assert row["pays"] and _smallest_batch(small, FULL) == 1


def test_who_never_makes_more_tokens_has_no_smallest_batch():
    """Against itself, at up to two requests and no further."""
    asked = question(TENTH, tpot_s=1.0, max_batch=2)
    assert _smallest_batch(asked, TENTH) is None
    wider = asked.changed(options=asked.options.model_copy(update={"max_batch": 3}))
    assert _smallest_batch(wider, TENTH) is None
    assert not _compare(asked, TENTH)["pays"]


def test_what_arrives_takes_its_part_of_the_memorys_rate():
    """Misses of 40 rows in each of 21 layers at each step, and 6,400 recalled in one of 128."""
    demand_loads, lookahead_loads = np.full((128, 1), 40, np.int32), loads(128, s64=6400)
    plain, missed, both = (
        SteadyState(H100, FLASH, Demand(ledger(on_miss="fetch", **moved), FLASH), 32_000, 128).at(4)
        for moved in (
            {},
            {"demand_loads": demand_loads},
            {"demand_loads": demand_loads, "lookahead_loads": lookahead_loads},
        )
    )
    rate = H100.hbm_bytes_per_s.value
    missed_s = missed.compute_s - plain.compute_s
    assert missed_s == pytest.approx(4 * 40 * 21 * 584 / rate)
    recalled_s = both.compute_s - missed.compute_s
    assert recalled_s == pytest.approx(4 * 6400 / 64 * 21 * 584 / rate)
    assert missed.token_s == missed.compute_s + missed.stall_s


def test_who_fits_whole_waits_for_nothing_and_a_masked_layer_scores_what_is_there():
    """800 slots and 1,000 tokens: 250 entries are there, and 250 are scored; of 64,000 tokens
    it scores 800.
    """
    missing = ledger(
        on_miss="fetch",
        demand_loads=np.full((128, 1), 40, np.int32),
        params={"budget": "800 entries"},
    )
    for tokens, waits in ((1000, False), (64_000, True)):
        state = SteadyState(H100, FLASH, Demand(missing, FLASH), tokens, 0)
        assert (state.at(2).stall_s > 0) is waits
    halves = H100.deployed(Deployment(tp=4, cp=2))  # each has half of two requests' misses
    both, one = (SteadyState(hw, FLASH, Demand(missing, FLASH), 64_000, 0) for hw in (halves, H100))
    assert both.at(2).stall_s == pytest.approx(one.at(1).stall_s)
    indexer = np.full(128, 24_000)
    for budget, tokens, scored, ratio in (
        ("800 entries", 1000, 250, 1 / 32),
        ("800 entries", 64_000, 800, 2),
        ("10%", 64_000, 1600, 2),
    ):
        masked = Demand(ledger(params={"budget": budget}, scored=indexer), FLASH)
        state = SteadyState(H100, FLASH, masked, tokens, 0)
        plain = state.model.equal(2, np.array([tokens]), np.array([scored]))
        expected_s = plain.total_s(FLASH.n_selecting) + memory_indexer_s(
            H100, FLASH, np.array([2 * 24_000 * ratio])
        )
        assert state.at(2).compute_s == pytest.approx(expected_s[0])


def who_misses(n_entries):
    made = ledger(
        n_steps=256,
        prompt_entries=ENTRIES,
        slots=3200,
        on_miss="fetch",
        demand_loads=np.full((256, 1), n_entries, np.int32),
        params={"budget": "10%"},
    )
    return question(Demand(made, FLASH), tpot_s=1.0)


def test_the_smallest_context_that_pays_is_found_to_1024_tokens():
    asked = who_misses(200)
    edge = crossover(asked, FULL)["context_tokens"]
    around = [_compare(asked.changed(tokens=tokens), FULL) for tokens in (edge - 1024, edge)]
    assert edge % 1024 == 0 and [row["pays"] for row in around] == [False, True]
    assert 32_768 < edge < 65_536


def test_who_is_slower_pays_once_the_full_cache_is_full():
    """Misses make a step longer at every batch, but more requests fit."""
    asked = who_misses(60)
    rival = asked.changed(demand=FULL)
    most = min(rival.walls().values())
    at_most = rival.state().at(most).tokens_per_s
    batch = _smallest_batch(asked, FULL)
    assert batch > most
    assert (
        asked.state().at(batch - 1).tokens_per_s <= at_most < asked.state().at(batch).tokens_per_s
    )


def test_what_lies_on_drives_is_read_at_their_rate():
    """Four mirrors and host memory for one: three quarters are on drives. Each step misses 40 rows
    of 584 bytes in 21 layers for each request, and reads 4,096 bytes for a row, at 54 / 8 GB/s;
    90 us of latency in every layer.
    """
    missed = np.full((128, 1), 40, np.int32)
    made = ledger(on_miss="fetch", cadence=1, demand_loads=missed, params={"budget": "10%"})
    demand = Demand(made, FLASH)
    mirror = FLASH.host_kv_bytes(32_000)
    hw = replace_figure(round_link(H100, 584), "host_reserve_bytes", 1)
    hw = replace_figure(hw, "host_bytes", 8 * mirror + 1)
    hw = replace_figure(replace_figure(hw, "nvme_bytes", 8e12), "nvme_bytes_per_s", 54e9)
    state = SteadyState(hw, FLASH, demand, 32_000, 128)
    rows = 4 * 40 * 21
    read_s = 21 * 90e-6 + 0.75 * rows * 4096 / (54e9 / 8)
    link_s = 21 * (10e-6 + 4 * 40 * 584 / 50e9)
    found = state.at(4)
    assert found.nvme_s == pytest.approx(read_s, rel=1e-6)
    assert found.stall_s == pytest.approx(link_s + read_s, rel=1e-6)
    assert found.link_s == pytest.approx(link_s)
    assert state.at(1).nvme_s == 0.0
    # a recall of 64 rows at every 64th step is one row a step more, in 21 layers
    recalls = ledger(
        on_miss="fetch",
        demand_loads=missed,
        lookahead_loads=loads(128, s64=64),
        params={"budget": "10%"},
    )
    state = SteadyState(hw, FLASH, Demand(recalls, FLASH), 32_000, 128)
    missed_s, recalled_s = state._from_nvme_s(4.0, 4 * 40 * 21 * 584, 4 * 21 * 584)
    assert recalled_s == pytest.approx(0.75 * 4 * 21 * 4096 / (54e9 / 8), rel=1e-3)
    assert missed_s == pytest.approx(read_s, rel=1e-6)
    assert state._from_nvme_s(4.0, 0.0, 4 * 21 * 584) == (0.0, recalled_s)
    assert state.at(4).nvme_s == pytest.approx(missed_s + recalled_s, rel=1e-3)


def test_a_crossover_is_the_first_that_makes_more_tokens():
    """Against every batch, the full cache's at most what fits; at eight contexts to a million."""
    asked = question(TENTH, tpot_s=1.0)
    found = plan(asked, FULL)["crossover"]
    other, rival = asked.changed(demand=FULL), asked.changed(demand=FULL).state()
    most = min(other.walls().values())
    pays = lambda batch: (
        asked.state().at(batch).tokens_per_s > rival.at(min(batch, most)).tokens_per_s
    )
    assert found["batch"] == next(filter(pays, range(1, 4097)))
    powers = [2**k for k in range(13, 21)]
    contexts = [row["context_tokens"] for row in found["by_context"]]
    assert contexts == [*powers[:-1], 2**20 - 1024]
    unbound = asked.changed(geometry=replace(FLASH, max_positions=None))
    contexts = [row["context_tokens"] for row in crossover(unbound, FULL)["by_context"]]
    assert contexts == powers  # a million where a model has no last position
