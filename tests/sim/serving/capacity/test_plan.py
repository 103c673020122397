"""Walls by hand, what moves them, and where KV on the host begins to pay."""

import pytest
from hand_ledger import FLASH, H100, ledger, loads

from fmsim.sim.serving.capacity.plan import CapacityQuestion, plan
from fmsim.sim.serving.demand import Demand
from fmsim.sim.serving.spec import Server

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


def test_a_plan_names_the_wall_and_what_moves_it():
    found = plan(question(FULL), FULL)
    assert (
        found["wall"] == "GPU memory"
        and found["requests"] == found["walls"]["GPU memory"]
        and found["crossover"] is None
    )
    moves = {move["change"]: move["requests"] for move in found["moves"]}
    assert moves["twice the GPU memory"] > 2 * found["requests"]
    assert moves["twice the link to the host"] == found["requests"] < moves["half the context"]
    found = plan(question(TENTH, tokens=10**6, tpot_s=1.0), FULL)
    assert found["wall"] == "host memory"
    moves = {move["change"]: (move["requests"], move["wall"]) for move in found["moves"]}
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
    assert edge is not None and found["by_context"][pays.index(True)]["context_tokens"] >= edge
    assert 1 <= found["batch"] <= question(FULL).walls()["GPU memory"] + 1


def test_nothing_fits_is_said_not_divided_by():
    found = plan(question(FULL, tokens=2**34, tpot_s=1.0), FULL)
    assert found["requests"] == 0 and found["wall"] == "GPU memory" and found["speed"] is None
