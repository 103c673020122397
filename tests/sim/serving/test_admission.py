"""Who may enter, and what is taken: by hand, on GPUs that share out a request's KV."""

from types import SimpleNamespace

import hand_request
import numpy as np
import pytest
from hand_ledger import FLASH, H100, ledger, loads
from hand_tables import round_link

from fmsim.hw import replace_figure
from fmsim.hw.deployment import Deployment
from fmsim.hw.spec import LINK_FIGURE
from fmsim.sim.serving.batch import mean_step_s
from fmsim.sim.serving.demand import Demand
from fmsim.sim.serving.prefix import FoundBlocks
from fmsim.sim.serving.requests import Arrival
from fmsim.sim.serving.server import ServerRun
from fmsim.sim.serving.spec import ClosedLoop, Server, Slo
from fmsim.sim.serving.workload import RequestGenerator
from fmsim.sim.step_cost import StepModel
from fmsim.sim.transfer_cost import nvme_read_bytes

PROMPT, OUTPUT = 32_000, 64
PARTS = H100.deployed(Deployment(tp=4, cp=2))


def serve(hw, made, n_requests, slo=None, blocks=(), **options):
    workload = ClosedLoop(
        kind="closed_loop",
        requests=1,
        prompt_tokens=1,
        output_tokens=1,
        duration_s=1e-9,
        slo=slo or Slo(),
    )
    source = RequestGenerator(workload)
    source.first = [Arrival(0.0, PROMPT, OUTPUT, blocks)] * n_requests
    server = Server(**{"prefill": "done"} | options)
    run = ServerRun(hw, FLASH, Demand(made, FLASH), server, source)
    run.run()
    return run


def compute_s(hw, made, batch):
    tokens, ranks = np.full(batch, PROMPT + OUTPUT), np.zeros(batch, int)
    return mean_step_s(StepModel(hw, FLASH), Demand(made, FLASH), tokens, ranks)


def test_a_link_for_two_admits_two_where_each_gpu_moves_half_of_the_bytes():
    """128,000 rows at the one window that repeats are 2,000 a step; two GPUs share them out."""
    made = ledger(lookahead_loads=loads(128, s64=6000))
    row_bytes = 584 + 132
    a_step = 21 * 6000 / 64 * row_bytes
    two, three = (compute_s(PARTS, made, batch) for batch in (2, 3))
    rate = 2.5 * a_step / 2 / two
    assert 2 * a_step / 2 / rate < two and 3 * a_step / 2 / rate > three
    hw = replace_figure(PARTS, LINK_FIGURE, rate)
    run = serve(hw, made, 6, admit_by_link=True)
    assert run.log.most("admitted") == 2
    assert set(run.log.waited_s) == {"PCIe"}
    assert serve(hw, made, 6).log.most("admitted") == 6


def test_a_time_a_token_for_two_admits_two():
    made = ledger(slots=8032)
    two, three = (compute_s(PARTS, made, batch) for batch in (2, 3))
    assert two < three
    slo = Slo(tpot_s=(two + three) / 2)
    run = serve(PARTS, made, 6, slo, admit_by_slo=True)
    assert run.log.most("admitted") == 2
    assert set(run.log.waited_s) == {"time a token"}


def test_a_request_holds_its_part_on_each_gpu_and_gives_it_back():
    made = ledger(lookahead_loads=loads(128, s64=100))
    run = serve(PARTS, made, 3)
    pools = Demand(made, FLASH).pools(PROMPT, OUTPUT)
    assert run.log.most("gpu_bytes") == pytest.approx(3 * pools.gpu_bytes / 2)
    assert run.log.most("host_bytes") == pytest.approx(3 * pools.mirror / 2)
    assert run.ranks[0].hbm.level == pytest.approx(run.ranks[0].hbm.capacity)
    assert run.ranks[0].host.level == pytest.approx(run.ranks[0].host.capacity)


def test_the_rank_with_the_fewest_requests_is_next_and_each_has_its_own_memory():
    made = ledger(slots=8032)
    hw = H100.deployed(Deployment(dp=8))
    run = serve(hw, made, 10)
    assert [request.rank for request in run.log.requests] == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]


def test_a_request_too_large_for_the_memory_is_refused_and_names_it():
    made = ledger(lookahead_loads=loads(128, s64=100))
    pools = Demand(made, FLASH).pools(PROMPT, OUTPUT)
    fixed = PARTS.hbm_bytes.value - PARTS.kv_pool_bytes(FLASH)
    for share, refused in ((1.001, None), (0.999, "GPU memory")):
        hw = replace_figure(PARTS, "hbm_bytes", fixed + share * pools.gpu_bytes / 2)
        assert serve(hw, made, 1).log.requests[0].refused == refused
    small = replace_figure(PARTS, "host_reserve_bytes", 1)
    for share, refused in ((1.001, None), (0.999, "host memory")):
        hw = replace_figure(small, "host_bytes", share * pools.mirror / 2 * 8 + 1)
        assert serve(hw, made, 1).log.requests[0].refused == refused


def test_without_blocks_kept_ranks_take_turns_whatever_a_prompt_begins_with():
    made = ledger(slots=8032)
    hw = H100.deployed(Deployment(dp=8))
    run = serve(hw, made, 3, blocks=(1, 2, 3), reuse_prefixes=False)
    assert [request.rank for request in run.log.requests] == [0, 1, 2]


def test_a_step_waits_for_the_rank_that_misses_most():
    """Three requests on two ranks: two on the first, which miss twice as much."""
    made = ledger(
        on_miss="fetch",
        params={"budget": "800 entries"},
        demand_loads=np.full((128, 1), 40, np.int32),
    )
    hw = round_link(H100, 584).deployed(Deployment(dp=8, tp=1))
    for n_requests, most in ((8, 1), (9, 2)):
        run = serve(hw, made, n_requests)
        stall_s = 21 * (10e-6 + most * 40 * 584 / 50e9)
        assert run.log.stall_s == pytest.approx(OUTPUT * stall_s)


def test_the_share_of_the_mirrors_that_lies_on_drives():
    """Room for one mirror's half in host memory: each of two GPUs holds half of each mirror."""
    made = ledger(lookahead_loads=loads(128, s64=100))
    half = Demand(made, FLASH).pools(PROMPT, OUTPUT).mirror / 2
    hw = replace_figure(PARTS, "host_reserve_bytes", 1)
    hw = replace_figure(hw, "host_bytes", 8 * half + 1)
    hw = replace_figure(replace_figure(hw, "nvme_bytes", 8e12), "nvme_bytes_per_s", 5e10)
    run = serve(hw, made, 0, nvme=True)
    admission = run.admission
    for number in range(2):
        request = hand_request.request(run.demand, output=OUTPUT)
        request.number = number
        admission.queue.append(request)
    assert len(list(admission.enter(0.0))) == 2
    held = [(each.host_bytes, each.nvme_bytes) for each in admission.admitted.values()]
    assert held[0] == (half, 0.0) and held[1] == pytest.approx((0, half), abs=1)
    memory = run.ranks[0]
    levels = memory.host.level, memory.nvme.level
    assert levels == pytest.approx((0, 8e12 / 8 - half), abs=1)
    assert admission.spilled_share(0) == pytest.approx(0.5)
    # a recall of 7,160 bytes is 5 rows on each GPU, half of which are read in pages of 4,096 bytes
    before = memory.from_nvme.moved_bytes
    run.env.run(run.links.recall(0, 7160))
    assert memory.from_nvme.idle and memory.to_gpu.idle  # it is there once both have come
    assert memory.from_nvme.moved_bytes - before == pytest.approx(2.5 * nvme_read_bytes(716))
    admission.release(admission.admitted[1])
    assert admission.spilled_share(0) == 0.0


@pytest.mark.parametrize("recalled", [0, 2_000_000])
def test_a_time_a_token_holds_the_waits_too(recalled):
    """Two requests: a step's computing, or its recalls where they take longer, and behind either
    the wait for 2 x 40 missed rows in each of 21 layers.
    """
    made = ledger(
        on_miss="fallback",
        params={"budget": "800 entries"},
        demand_loads=np.full((128, 1), 40, np.int32),
        lookahead_loads=loads(128, s64=recalled),
    )
    hw = round_link(H100, 584)
    stall_s = 21 * (10e-6 + 80 * 584 / 50e9)
    link_s = 2 * recalled / 64 * 21 * 584 / 60e9
    two_s = compute_s(hw, made, 2)
    assert (link_s > two_s) == bool(recalled)
    both_s = max(two_s, link_s) + stall_s
    for tpot_s, held in ((1.0001 * both_s, 2), (0.9999 * both_s, 1)):
        admission = serve(hw, made, 0, Slo(tpot_s=tpot_s), admit_by_slo=True).admission
        for number in range(3):
            request = hand_request.request(admission.demand, output=OUTPUT)
            request.number = number
            admission.queue.append(request)
        assert len(list(admission.enter(0.0))) == held
        assert admission.waits_for == "time a token"


def test_what_fits_to_the_byte_fits():
    made = ledger(lookahead_loads=loads(128, s64=100))
    hw = replace_figure(PARTS, "host_reserve_bytes", 1)
    admission = serve(replace_figure(hw, "host_bytes", 8e9), made, 0).admission
    memory = admission.ranks[0]
    gpu, host = 2 * memory.hbm.capacity, 2 * memory.host.capacity  # of which each GPU has half
    for gpu_more, host_more, wall in ((0, 0, None), (2, 0, "GPU memory"), (0, 2, "host memory")):
        request = hand_request.request(admission.demand, output=OUTPUT)
        request.pools = SimpleNamespace(gpu_bytes=gpu + gpu_more, mirror=host + host_more)
        assert admission.never_fits(request) == wall
        assert admission._place(request) == ((0, None) if wall is None else (None, wall))


def test_a_step_may_take_as_long_as_its_recalls_or_as_is_asked(monkeypatch):
    made = ledger(lookahead_loads=loads(128, s64=6000))
    for what, seconds in (("admit_by_link", "link_s"), ("admit_by_slo", "tpot_s")):
        admission = serve(H100, made, 0, Slo(tpot_s=2.0), **{what: True}).admission
        bytes_a_step = admission.demand.recall_bytes_per_step(PROMPT)
        link_s = (bytes_a_step + bytes_a_step) / 1 / admission.ranks[0].to_gpu.bytes_per_s
        exactly = {"link_s": link_s, "tpot_s": 2.0}[seconds]
        for taken_s, held in ((exactly, 2), (exactly * (1 - 1e-9), 1 + (seconds == "tpot_s"))):
            monkeypatch.setattr(
                "fmsim.sim.serving.admission.mean_step_s", lambda *given, s=taken_s: s
            )
            admission.queue.clear()
            for number in range(2):
                request = hand_request.request(admission.demand, output=OUTPUT)
                request.number = number
                admission.queue.append(request)
            assert len(list(admission.enter(0.0))) == held
            for request in [*admission.admitted.values()]:
                admission.release(request)
            admission._verdicts.clear()


def test_nobody_gives_up_entries_where_there_is_room_to_the_byte():
    missed = np.full((128, 1), 40, np.int32)
    made = ledger(on_miss="fetch", params={"budget": "800 entries"}, demand_loads=missed)
    admission = serve(PARTS, made, 0, residency="hybrid").admission
    for number in range(2):
        request = hand_request.request(admission.demand, output=OUTPUT)
        request.number = number
        admission.queue.append(request)
    assert len(list(admission.enter(0.0))) == 2
    free = admission.ranks[0].hbm.level
    admission._shrink_until(0, free, besides=None)
    assert not admission.shrunk
    admission._shrink_until(0, free + 1, besides=None)
    assert [request.number for request in admission.shrunk] == [0]
    assert admission.ranks[0].hbm.level == free + admission._beyond_slots(request)
    assert admission.admitted[0].gpu_bytes == pytest.approx(request.pools.gpu_bytes / 2)


@pytest.mark.parametrize("by", ["admit_by_link", "admit_by_slo"])
def test_who_is_weighed_has_its_whole_length(by, monkeypatch):
    weighed = []
    monkeypatch.setattr(
        "fmsim.sim.serving.admission.mean_step_s",
        lambda model, demand, tokens, ranks: weighed.append((tokens.tolist(), list(ranks))) or 1e-9,
    )
    made = ledger(lookahead_loads=loads(128, s64=6000))
    admission = serve(H100, made, 0, Slo(tpot_s=1.0), **{by: True}).admission
    for number, prompt in enumerate((PROMPT, 2 * PROMPT)):
        request = hand_request.request(admission.demand, prompt, OUTPUT)
        request.number = number
        admission.queue.append(request)
    assert len(list(admission.enter(0.0))) == (1 if by == "admit_by_link" else 2)
    assert weighed == [([PROMPT + OUTPUT, 2 * PROMPT + OUTPUT], [0, 0])]


def test_a_rank_that_has_half_of_the_prompt_comes_first():
    """64 blocks of 512 tokens, of which the second rank has 32, or 31."""
    made = ledger(slots=8032, on_miss="fetch")
    hw = H100.deployed(Deployment(dp=8))
    blocks = tuple(range(100, 164))
    for known, first in ((32, 1), (31, 0)):
        run = serve(hw, made, 1, blocks=blocks, prefill="chunked")
        admission = run.admission
        for store in run.stores:
            for tier in (store.gpu, store.host):
                tier.make_room(float(tier.pool.capacity))
        run.stores[1].host.store(blocks[:known])
        request = hand_request.request(run.demand, prompt=64 * 512)
        request.asked = Arrival(0.0, 64 * 512, OUTPUT, blocks)
        assert admission._in_order(request)[0] == first
        admission._held[0] = 3
        assert admission._in_order(request)[0] == 1


def test_blocks_that_are_there_are_not_needed_again_and_ranks_end_empty():
    """Of 512 tokens: a GPU's half of a block, and a mirror's."""
    made = ledger(lookahead_loads=loads(128, s64=100))
    run = serve(PARTS, made, 1, blocks=(1, 2, 3), prefill="chunked")
    assert run.stores and run.admission._held == [0]
    request = hand_request.request(run.demand)
    gpu, host = request.pools.gpu_bytes / 2, request.pools.mirror / 2
    assert run.admission._needs(request, FoundBlocks()) == (gpu, host)
    found = run.admission._needs(request, FoundBlocks(gpu=(1, 2), host=(3,)))
    block, mirrored = FLASH.full_kv_bytes(512) / 2, FLASH.host_kv_bytes(512) / 2
    assert found == (gpu - 2 * block, host - mirrored)


def test_a_request_that_comes_whole_needs_all_its_entries_and_gives_back_what_is_beyond_its_slots():
    missed = np.full((128, 1), 40, np.int32)
    made = ledger(on_miss="fetch", params={"budget": "800 entries"}, demand_loads=missed)
    admission = serve(PARTS, made, 1, residency="hybrid").admission
    request = hand_request.request(admission.demand, output=OUTPUT)
    whole = FLASH.full_gpu_bytes(PROMPT + OUTPUT)
    assert admission._needs(request, FoundBlocks())[0] == pytest.approx(whole / 2)
    beyond = (whole - request.pools.gpu_bytes) / 2
    assert admission._beyond_slots(request) == pytest.approx(beyond) and beyond > 0
    most = ledger(on_miss="fetch", slots=7990, demand_loads=missed, miss_slots=512)
    admission = serve(PARTS, most, 0, residency="hybrid").admission
    request = hand_request.request(admission.demand, output=OUTPUT)
    assert request.pools.gpu_bytes > whole  # with its spare pages
    assert admission._beyond_slots(request) == 0


@pytest.mark.parametrize("tight", [False, True])
def test_a_request_that_comes_whole_makes_room_for_itself_and_then_for_the_next(monkeypatch, tight):
    """First for all that it needs; then for slots of another, or a tenth of the memory."""
    missed = np.full((128, 1), 40, np.int32)
    made = ledger(on_miss="fetch", slots=7000, demand_loads=missed)
    hw, slots = PARTS, Demand(made, FLASH).pools(PROMPT, OUTPUT).gpu_bytes / 2
    if tight:  # room for four
        beyond = serve(hw, made, 0).ranks[0].hbm.capacity - 4 * slots
        hw = replace_figure(hw, "hbm_bytes", hw.hbm_bytes.value - beyond)
    admission = serve(hw, made, 0, residency="hybrid").admission
    request = hand_request.request(admission.demand, output=OUTPUT)
    asked = []
    monkeypatch.setattr(
        admission, "_shrink_until", lambda rank, n_bytes, besides: asked.append(n_bytes)
    )
    admission.queue.append(request)
    assert list(admission.enter(0.0)) == [request]
    tenth = admission.ranks[0].hbm.capacity // 10
    assert (slots > tenth) is tight
    assert asked == [admission._needs(request, FoundBlocks())[0], slots if tight else tenth]


def test_who_makes_room_for_another_misses_from_then_on():
    """Memory for 2.7 whole requests: the third takes what the first has beyond its
    slots, and the first then misses 40 rows of 584 bytes a step, half of them on each GPU.
    """
    missed = np.full((128, 1), 40, np.int32)
    made = ledger(on_miss="fetch", params={"budget": "800 entries"}, demand_loads=missed)
    whole = FLASH.full_gpu_bytes(PROMPT + OUTPUT) / 2
    beyond = serve(PARTS, made, 0).ranks[0].hbm.capacity - 2.7 * whole
    hw = replace_figure(PARTS, "hbm_bytes", PARTS.hbm_bytes.value - beyond)
    run = serve(hw, made, 0, residency="hybrid")
    for number in range(3):
        request = hand_request.request(run.demand, output=OUTPUT)
        request.number = number
        run.admission.queue.append(request)
        run._join()
    assert [each.whole for each in run.admission.admitted.values()] == [False, True, True]
    assert len(run.batch) == 3 and not run.admission.shrunk
    assert run.batch.load(1).miss_bytes.tolist() == [[[40 * 584]]]


def test_only_who_misses_and_keeps_all_keys_may_come_whole():
    missed = np.full((128, 1), 40, np.int32)
    fetches = ledger(on_miss="fetch", demand_loads=missed)
    for made, may in ((fetches, True), (ledger(slots=8032, on_miss="fetch"), False)):
        assert Demand(made, FLASH).may_be_whole is may
    assert not Demand(ledger(), FLASH).may_be_whole  # masks, and moves keys with entries


def test_a_request_takes_the_place_of_blocks_on_the_gpu():
    hw = H100.deployed(Deployment(kv_pool_bytes=1e9))
    run = serve(hw, ledger(slots=8032, on_miss="fetch"), 1, blocks=(1, 2, 3), prefill="chunked")
    tier, pool = run.stores[0].gpu, run.ranks[0].hbm
    tier.store(range(1000, 1000 + int(pool.capacity / tier.block_bytes)))
    assert pool.level < tier.block_bytes
    request = hand_request.request(run.demand, output=OUTPUT)
    run.admission.queue.append(request)
    assert list(run.admission.enter(0.0)) == [request]
    held = len(tier) * tier.block_bytes + request.gpu_bytes
    assert request.gpu_bytes > tier.block_bytes and pool.capacity - pool.level == pytest.approx(
        held
    )


def test_a_request_may_take_what_blocks_on_drives_hold():
    """Blocks fill host memory and drives; a mirror takes the place of the oldest."""
    made = ledger(lookahead_loads=loads(128, s64=100))
    half = Demand(made, FLASH).pools(PROMPT, OUTPUT).mirror / 2
    hw = replace_figure(PARTS, "host_reserve_bytes", 1)
    hw = replace_figure(hw, "host_bytes", 8 * half / 2)
    hw = replace_figure(replace_figure(hw, "nvme_bytes", 8 * half), "nvme_bytes_per_s", 5e10)
    run = serve(hw, made, 1, blocks=(1, 2, 3), prefill="chunked", nvme=True)
    store, memory = run.stores[0], run.ranks[0]
    block = FLASH.full_kv_bytes(512) / 2
    store.host.store(range(1000, 1000 + int(2 * half / block)))
    assert memory.host.level < block and memory.nvme.level < half / 2
    room = run.admission._room(0, FoundBlocks())
    assert room[1] == pytest.approx(memory.host.capacity + memory.nvme.capacity)
    request = hand_request.request(run.demand, output=OUTPUT)
    run.admission.queue.append(request)
    assert list(run.admission.enter(0.0)) == [request]
    assert request.host_bytes == pytest.approx(half / 2)
    assert request.nvme_bytes == pytest.approx(half / 2)
    for pool, tier, held in (
        (memory.host, store.host, request.host_bytes),
        (memory.nvme, store.nvme, request.nvme_bytes),
    ):  # what blocks and the request have is what is not free
        taken = len(tier) * tier.block_bytes + held
        assert pool.capacity - pool.level == pytest.approx(taken, abs=1)
