"""Deployments: bytes worked by hand, what has no table, and what must hold whatever the layout."""

import numpy as np
import pytest
from hand_kernels import kernel_table
from hand_ledger import FLASH, H100, ledger, loads
from hypothesis import given, settings
from hypothesis import strategies as st

from fmsim.errors import FmsimError
from fmsim.hw import hardware_names, load_hardware, replace_figure
from fmsim.hw.deployment import WEIGHT_BYTES, Deployment, pool_of_log
from fmsim.hw.modules import stand_in
from fmsim.hw.spec import LINK_FIGURE
from fmsim.hw.tables import Curve, load_table
from fmsim.sim.serving.capacity.behaviour import BEHAVIOURS
from fmsim.sim.serving.capacity.plan import CapacityQuestion, goodput
from fmsim.sim.serving.demand import Demand
from fmsim.sim.serving.server import ServerRun
from fmsim.sim.serving.spec import Poisson, Server, Slo
from fmsim.sim.serving.summary import summary
from fmsim.sim.serving.workload import RequestGenerator
from fmsim.sim.step_cost import StepModel

GIB = 2**30
FULL, LRU, LSA = (Demand(each.ledger(FLASH), FLASH) for each in BEHAVIOURS)


def question(hw=H100, demand=FULL, tokens=500_000, **changes):
    asked = {"output_tokens": 1024, "tpot_s": 0.05} | changes
    return CapacityQuestion(hw, FLASH, demand, Server(prefill="done"), tokens, **asked)


def step_s(hw, batch, tokens):
    costs = StepModel(hw, FLASH).equal(batch, np.array([tokens]), np.array([tokens // 4]))
    return float(costs.total_s(FLASH.n_csa)[0])


def test_weights_on_a_gpu_by_format_and_parallelism():
    experts, others = FLASH.expert_parameters, FLASH.shared_parameters
    for name, (expert, other) in WEIGHT_BYTES.items():
        tensor = H100.deployed(Deployment(weights=name)).weight_bytes(FLASH)
        assert tensor == pytest.approx((experts * expert + others * other) / 8)
        ranks = H100.deployed(Deployment(weights=name, dp=8)).weight_bytes(FLASH)
        assert ranks == pytest.approx(experts * expert / 8 + others * other)
    fp8, fp4 = (
        H100.deployed(Deployment(weights=name)).weight_bytes(FLASH) / 1e9 for name in ("fp8", "fp4")
    )
    assert fp8 == pytest.approx(35.5, abs=0.1) and fp4 == pytest.approx(19.3, abs=0.1)


def test_data_parallel_ranks_hold_their_own_kv_and_tensor_parallel_gpus_copies():
    bytes_each = FULL.pools(500_000, 1024).gpu_bytes
    one = H100.kv_pool_bytes(FLASH)
    assert question().walls()["GPU memory"] == one // bytes_each
    ranks = H100.deployed(Deployment(dp=8))
    own = one - FLASH.shared_parameters * (1 - 1 / 8)
    assert ranks.kv_pool_bytes(FLASH) == pytest.approx(own)
    assert question(ranks).walls()["GPU memory"] == 8 * (own // bytes_each)
    shared_out = H100.deployed(Deployment(tp=2, cp=4))
    pool = shared_out.kv_pool_bytes(FLASH)
    assert question(shared_out).walls()["GPU memory"] == 4 * pool // bytes_each


@pytest.mark.parametrize("n_gpus", [2, 4])
def test_fewer_gpus_take_longer(n_gpus):
    """A copy of a preset with another number of GPUs, and a deployment on fewer of them."""
    b200 = load_hardware("b200")
    other = b200.model_copy(update={"n_gpus": n_gpus}).deployed(Deployment())
    assert other.placed.tp == n_gpus
    assert step_s(other, 16, 500_000) > 1.05 * step_s(b200, 16, 500_000)
    assert step_s(b200.deployed(Deployment(n_gpus=n_gpus)), 16, 500_000) == step_s(
        other, 16, 500_000
    )


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"tp": 3, "n_gpus": 8}, "tp 3 x dp 1 x cp 1 are 3 GPUs, and there are 8"),
        ({"dp": 3}, "are 6 GPUs, and there are 8"),
        ({"ep": 5}, "ep 5 does not divide 8"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(given, says):
    with pytest.raises(FmsimError, match=says):
        H100.deployed(Deployment(**given))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"n_gpus": 16}, "no table has attention over 16 tensor-parallel GPUs on h100"),
        ({"weights": "bf16"}, "no table has bf16 experts"),
        ({"ep": 2, "engine": "vllm"}, "no table has experts as tp4 x ep2 on h100"),
    ],
)
def test_what_was_not_timed_is_refused(given, says):
    with pytest.raises(FmsimError, match=says):
        StepModel(H100.deployed(Deployment(**given)), FLASH)


@pytest.mark.parametrize(("ep", "split"), [(2, "tp4 x ep2"), (4, "tp2 x ep4"), (8, "ep8")])
def test_experts_in_groups_take_what_their_table_says(ep, split):
    """8,192 requests: the experts take longer than the shared one, which runs beside them."""
    experts = load_table("h100", "sglang")["models"]["v4-flash"]["experts"]["fp8"]
    took_ms = [float(Curve.of(experts[name]["power_law_1.01"])(8192)) for name in (split, "tp8")]
    steps = [step_s(H100.deployed(Deployment(ep=n)), 8192, 1024) for n in (ep, 1)]
    assert steps[0] - steps[1] == pytest.approx((took_ms[0] - took_ms[1]) * 43 / 1e3)
    ranks = H100.deployed(Deployment(dp=8, ep=ep))
    assert 1e-3 < step_s(ranks, 64, 8192) < step_s(ranks, 8192, 8192)


def test_a_model_that_does_not_fit_is_told_with_the_figures():
    from fmsim.geometry import PRESETS

    with pytest.raises(FmsimError, match="v4-pro does not fit H100 SXM 80 GB, TP8: 18"):
        H100.kv_pool_bytes(PRESETS["v4-pro"])


def test_every_preset_runs_the_usual_deployments():
    for name in hardware_names():
        hw = load_hardware(name)
        for layout in (Deployment(), Deployment(tp=1, dp=hw.n_gpus)):
            placed = hw.deployed(layout)
            assert 1e-3 < step_s(placed, 8, 8192) < 1
            assert placed.kv_pool(FLASH) is None or placed.kv_pool(FLASH).value > 0


def test_a_reserve_that_nobody_measured_is_a_guess_until_the_pool_is_given():
    assert H100.kv_pool(FLASH).guess and not load_hardware("h20").kv_pool(FLASH).guess
    for pool in ({"kv_pool_bytes": 2e10}, {"kv_pool_tokens": 10**6}, {"mem_fraction": 0.8}):
        assert not H100.deployed(Deployment(**pool)).kv_pool(FLASH).guess
    fraction = H100.deployed(Deployment(mem_fraction=0.8)).kv_pool(FLASH).value
    assert fraction == pytest.approx(0.8 * 81_559 * 2**20 - H100.weight_bytes(FLASH))
    tokens = H100.deployed(Deployment(kv_pool_tokens=2**20)).kv_pool(FLASH).value
    assert tokens == FLASH.full_kv_bytes(2**20)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("Available KV cache memory: 8.11 GiB", ("bytes", 8.11 * GIB)),
        (
            "KV Cache is allocated. #tokens: 367404, K size: 8.23 GB, V size: 8.23 GB",
            ("bytes", 16.46 * GIB),
        ),
        ("KV Cache is allocated. #tokens: 510000, KV size: 36.11 GB", ("bytes", 36.11 * GIB)),
        ("max_total_num_tokens=178880, chunked_prefill_size=8192", ("tokens", 178_880)),
        ("GPU KV cache size: 1,009,661 tokens", ("tokens", 1_009_661)),
    ],
)
def test_a_start_log_names_the_pool(tmp_path, line, found):
    path = tmp_path / "server.log"
    path.write_text(f"INFO 01-01 loading\nINFO {line}\nmore\n")
    kind, size = pool_of_log(path)
    assert (kind, size) == (found[0], pytest.approx(found[1]))
    assert "start log" in H100.deployed(Deployment(start_log=path)).kv_pool(FLASH).source


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("Available KV cache memory: 0 GiB", "its KV pool is 0 bytes"),
        ("Available KV cache memory: 0.0000000001 GiB", "its KV pool is 0.107374 bytes"),
        ("Available KV cache memory: 999999999.0 GiB", r"its KV pool is 1.07374e\+18 bytes"),
        ("Available KV cache memory: 8.1.1 GiB", "names no KV pool"),
        ("max_total_num_tokens=0", "its KV pool is 0 tokens"),
        ("max_total_num_tokens=" + "9" * 400, "its KV pool is inf tokens"),
    ],
)
def test_a_pool_that_no_server_has_is_refused(tmp_path, line, says):
    path = tmp_path / "server.log"
    path.write_text(f"INFO {line}\n")
    with pytest.raises(FmsimError, match=says):
        H100.deployed(Deployment(start_log=path)).kv_pool(FLASH)


def test_a_log_without_a_pool_says_what_to_look_for(tmp_path):
    (tmp_path / "no.log").write_text("nothing\n")
    with pytest.raises(FmsimError, match="names no KV pool"):
        pool_of_log(tmp_path / "no.log")
    with pytest.raises(FmsimError, match="start log .*none.log"):
        pool_of_log(tmp_path / "none.log")


def test_uneven_experts_take_longer_where_all_are_asked():
    even, uneven = (
        step_s(H100.deployed(Deployment(dp=8, imbalance=name)), 8192, 1024)
        for name in ("balanced", "power_law_1.2")
    )
    assert uneven > even


def test_a_calibrated_preset_has_one_gpu():
    hw = H100.model_copy(
        update={"kernel_tables": None, "kernels": {"v4-flash": kernel_table()}, "n_gpus": 1}
    ).deployed(Deployment())
    assert hw.placed.title == "TP1" and step_s(hw, 1, 8192) > 0
    kernels = hw.kernels["v4-flash"]
    for ms, told in ((0.01, None), (0.0, "no exchange between GPUs was timed on h100")):
        table = kernels.model_copy(update={"all_reduce_batch_ms": {1: ms, 8: ms}})
        two = hw.model_copy(update={"kernels": {"v4-flash": table}})
        said = stand_in(two.deployed(Deployment(n_gpus=2, dp=2)), FLASH)
        assert said == told or (told and said.startswith(told))
        assert stand_in(two.deployed(Deployment()), FLASH) is None


def test_ranks_admit_by_themselves_and_a_step_is_the_busiest_ones():
    made = ledger(slots=8100, on_miss="fetch")
    hw = H100.deployed(Deployment(dp=8))
    poisson = Poisson(
        kind="poisson",
        rate_per_s=200,
        prompt_tokens=32_000,
        output_tokens=100,
        duration_s=1,
        slo=Slo(ttft_s=1e9, tpot_s=1e9),
    )
    run = ServerRun(
        hw, FLASH, Demand(made, FLASH), Server(prefill="done"), RequestGenerator(poisson)
    )
    log = run.run()
    ranks = np.bincount([request.rank for request in log.requests], minlength=8)
    assert len(run.ranks) == 8 and (ranks > 0).all() and ranks.max() <= 2 * ranks.min()
    assert all(rank.hbm.level == pytest.approx(rank.hbm.capacity) for rank in run.ranks)
    row = summary(run)
    assert row["requests"]["finished"] == row["requests"]["arrived"]


# What must hold whatever the hardware


def scaled(hw, **factors):
    for name, factor in factors.items():
        figure = hw.link.bandwidth_bytes_per_s if name == LINK_FIGURE else getattr(hw, name)
        hw = replace_figure(hw, name, factor * figure.value)
    return hw


@settings(max_examples=25, deadline=None)
@given(
    which=st.sampled_from([FULL, LRU, LSA]),
    tokens=st.integers(4096, 900_000),
    layout=st.sampled_from([{}, {"dp": 8}, {"tp": 2, "dp": 4}, {"tp": 4, "cp": 2}]),
    name=st.sampled_from(["hbm_bytes", LINK_FIGURE, "host_bytes"]),
    factor=st.floats(1.0, 4.0),
)
def test_more_of_anything_never_holds_fewer_nor_takes_longer(which, tokens, layout, name, factor):
    hw = H100.deployed(Deployment(**layout))
    before, after = (question(each, which, tokens) for each in (hw, scaled(hw, **{name: factor})))
    less, more = before.walls(), after.walls()
    assert all(more[wall] >= less[wall] for wall in less)
    batch = max(1, min(less.values()))
    assert after.state().at(batch).step_s <= before.state().at(batch).step_s * (1 + 1e-9)


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 512),
    tokens=st.integers(4096, 2**20),
    layout=st.sampled_from([{}, {"dp": 8}, {"tp": 2, "dp": 4}]),
)
def test_longer_contexts_and_more_servers_never_take_less(batch, tokens, layout):
    hw = H100.deployed(Deployment(**layout))
    assert step_s(hw, batch, tokens) >= step_s(hw, batch, tokens // 2) * (1 - 0.02)


@settings(max_examples=10, deadline=None)
@given(
    rate=st.floats(1.0, 30.0),
    seed=st.integers(0, 1000),
    layout=st.sampled_from([{}, {"dp": 8}, {"tp": 2, "dp": 4}, {"tp": 4, "cp": 2}]),
    misses=st.integers(0, 300),
    recalled=st.integers(0, 3000),
)
def test_bytes_are_conserved_and_littles_law_holds(rate, seed, layout, misses, recalled):
    """Requests in the system, mean over time, are arrivals times their mean stay; every byte that a
    request's steps ask for has come, once, over its rank's link.
    """
    at_64 = loads(128, s64=recalled)
    made = ledger(
        on_miss="fallback",
        params={"budget": "800 entries"},
        decides_ahead=True,
        lookahead_loads=at_64,
        demand_loads=np.full((128, 1), misses, np.int32),
    )
    hw = H100.deployed(Deployment(**layout))
    workload = Poisson(
        kind="poisson",
        rate_per_s=rate,
        prompt_tokens=[20_000, 40_000],
        output_tokens=[5, 120],
        duration_s=4,
        seed=seed,
    )
    run = ServerRun(
        hw, FLASH, Demand(made, FLASH), Server(prefill="done"), RequestGenerator(workload)
    )
    log = run.run()
    stays = sum(request.finished_s - request.arrival_s for request in log.requests)
    table = np.array(log.samples)
    held_s = np.diff(table[:, 0])
    present = float(table[:-1, 2:4].sum(axis=1) @ held_s)
    arrivals = sum(request.arrival_s < request.admitted_s for request in log.requests)
    assert present == pytest.approx(stays, rel=0.05, abs=0.05 + 0.02 * arrivals)
    asked = 0.0
    for request in log.requests:
        position = request.offset + np.arange(request.steps)
        at = run.demand.at(position)
        asked += float((run.demand.miss_bytes[at] @ run.demand.group_layers).sum())
        after = position > request.offset
        asked += float(run.demand.recall_bytes[at][after].sum())
    moved = sum(rank.to_gpu.moved_bytes for rank in run.ranks)
    assert moved * hw.placed.cp == pytest.approx(asked, rel=1e-6, abs=1)


@pytest.mark.parametrize("layout", [{}, {"dp": 8}])
def test_a_server_keeps_the_times_at_the_goodput_that_was_found(layout):
    hw = load_hardware("h200").deployed(Deployment(**layout))
    asked = CapacityQuestion(
        hw, FLASH, FULL, Server(admit_by_slo=True), 32_000, 200, tpot_s=0.05, ttft_s=10
    )
    found = goodput(asked)
    assert found["requests_per_s"] > 0
    workload = Poisson(
        kind="poisson",
        rate_per_s=0.7 * found["requests_per_s"],
        prompt_tokens=32_000,
        output_tokens=200,
        duration_s=60 / found["requests_per_s"],
        slo=Slo(ttft_s=10, tpot_s=0.05),
    )
    run = ServerRun(hw, FLASH, FULL, asked.options, RequestGenerator(workload))
    run.run()
    row = summary(run)
    assert row["slo_share"] > 0.8
    assert row["goodput_per_s"] < 1.3 * found["requests_per_s"]


def test_requests_are_dealt_out_to_servers():
    workload = Poisson(
        kind="poisson",
        rate_per_s=20,
        prompt_tokens=32_000,
        output_tokens=[10, 100],
        duration_s=3,
    )
    source = RequestGenerator(workload)
    parts = source.dealt(3)
    assert sorted(row for part in parts for row in part.first) == sorted(source.first)
    done = Server(prefill="done")
    runs = [ServerRun(H100, FLASH, FULL, done, part) for part in parts]
    for run in runs:
        run.run()
    row = summary(*runs)
    assert row["requests"] == {
        "arrived": len(source.first),
        "finished": len(source.first),
        "refused": 0,
    }
    assert row["tokens"] == sum(arrival.output_tokens for arrival in source.first)
    one = ServerRun(H100, FLASH, FULL, done, source)
    one.run()
    assert row["tpot_s"]["p50"] < summary(one)["tpot_s"]["p50"]


@settings(max_examples=10, deadline=None)
@given(which=st.sampled_from([FULL, LRU, LSA]), tokens=st.integers(4096, 900_000))
def test_more_gpus_never_hold_fewer(which, tokens):
    b200 = load_hardware("b200")
    held = [
        question(b200.deployed(Deployment(n_gpus=n)), which, tokens).walls()["GPU memory"]
        for n in (2, 4, 8)
    ]
    assert held == sorted(held)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), rate=st.floats(2.0, 40.0))
def test_a_higher_rate_never_holds_fewer_at_a_time(seed, rate):
    def held(faster):
        workload = Poisson(
            kind="poisson",
            rate_per_s=faster * rate,
            prompt_tokens=32_000,
            output_tokens=100,
            duration_s=40 / rate / faster,
            seed=seed,
        )
        source = RequestGenerator(workload)
        run = ServerRun(H100, FLASH, FULL, Server(prefill="done"), source)
        run.run()
        return summary(run)["held_mean"], len(source.first)

    (slow, n_slow), (fast, n_fast) = held(1.0), held(4.0)
    assert n_slow == n_fast  # the same requests, four times as close
    assert fast >= slow * 0.99
