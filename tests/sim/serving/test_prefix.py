"""Prefixes that are kept: two requests by hand, and what must hold whatever comes."""

import hand_request
import numpy as np
import pytest
import simpy
from hand_ledger import FLASH, H100, ledger
from hand_request import Given
from hypothesis import given, settings
from hypothesis import strategies as st

from fmsim.hw import replace_figure
from fmsim.hw.deployment import Deployment
from fmsim.hw.spec import LINK_FIGURE
from fmsim.sim.serving.capacity.behaviour import BEHAVIOURS
from fmsim.sim.serving.demand import Demand
from fmsim.sim.serving.prefill import PrefillModel
from fmsim.sim.serving.prefix import BlockTier, FoundBlocks, Pinned, PrefixStore
from fmsim.sim.serving.requests import Arrival, repeated_share
from fmsim.sim.serving.server import ServerRun
from fmsim.sim.serving.spec import Server, SessionWorkload
from fmsim.sim.serving.workload import RequestGenerator

FULL, LRU, LSA = (Demand(each.ledger(FLASH), FLASH) for each in BEHAVIOURS)
BLOCK = 512
PREFILL = PrefillModel(H100, FLASH)


def asked(at_s, n_blocks, output=10, first=0, own=0):
    """A prompt of whole blocks from `first` on, the last `own` of them no other's."""
    common = tuple(range(first, first + n_blocks - own))
    private = tuple(10**9 + int(at_s * 1000) * 1000 + i for i in range(own))
    return Arrival(at_s, n_blocks * BLOCK, output, common + private)


def serve(demand, *arrivals, hw=H100, **options):
    run = ServerRun(
        hw, FLASH, demand, Server(prefill_chunk_tokens=8192, **options), Given(*arrivals)
    )
    run.run()
    return run


def prompt_s(tokens, done=0):
    return sum(seconds for _, seconds in PREFILL.prompt(tokens, 8192, done))


def test_a_prompt_that_the_gpu_still_has_is_prefilled_from_its_new_part_on():
    run = serve(FULL, asked(0, 64), asked(1000, 96, own=32))
    first, second = run.log.requests
    assert first.first_token_s == pytest.approx(prompt_s(64 * BLOCK))
    assert (second.reused_tokens, len(second.found.gpu)) == (64 * BLOCK, 64)
    assert second.first_token_s - 1000 == pytest.approx(prompt_s(96 * BLOCK, 64 * BLOCK))
    # 96 blocks' bytes lie there when both are done, on the GPU and, written through, on the host
    block_bytes = FLASH.full_kv_bytes(BLOCK)
    assert block_bytes == 21 * 128 * (584 + 132) + 20 * 4 * 584 == 1_971_328
    memory = run.ranks[0]
    for pool in (memory.hbm, memory.host):
        assert pool.capacity - pool.level == pytest.approx(96 * block_bytes)
    assert run.log.written_back_bytes == 96 * block_bytes


def test_a_prompt_that_the_host_has_comes_over_the_link_beside_the_first_chunk():
    """64 blocks of 1,971,328 bytes at 55.1 GB/s: 2.29 ms, less than the rest takes to compute."""
    run = serve(LRU, asked(0, 64), asked(1000, 96, own=32))
    _, second = run.log.requests
    assert pytest.approx(0.00229, rel=1e-3) == 64 * 1_971_328 / 55.1e9
    assert second.first_token_s - 1000 == pytest.approx(prompt_s(96 * BLOCK, 64 * BLOCK))
    assert len(second.found.host) == 64 and not second.found.gpu
    assert second.waits_s == {"queue": 0}
    assert run.ranks[0].to_gpu.moved_bytes >= 64 * 1_971_328


def test_a_slow_link_holds_the_first_chunk_up():
    """At 1 MB/s the blocks take 126 s."""
    hw = replace_figure(H100, LINK_FIGURE, 1e6)
    run = serve(LSA, asked(0, 64, output=1), asked(1000, 65, output=1, own=1), hw=hw)
    _, second = run.log.requests
    assert second.first_token_s - 1000 == pytest.approx(64 * 1_971_328 / 1e6)
    chunk_s = prompt_s(65 * BLOCK, 64 * BLOCK)
    assert second.waits_s["prefix"] == pytest.approx(64 * 1_971_328 / 1e6 - chunk_s)
    assert run.log.prefix_wait_s == second.waits_s["prefix"]


def test_the_whole_prompt_again_computes_one_token():
    run = serve(FULL, asked(0, 64), asked(1000, 64))
    assert run.log.requests[1].reused_tokens == 64 * BLOCK - 1
    assert run.log.requests[1].first_token_s - 1000 == pytest.approx(
        prompt_s(64 * BLOCK, 64 * BLOCK - 1)
    )


def test_a_prompt_is_there_for_others_once_it_has_been_read():
    """A second after the first one's first token, which decodes for many more."""
    come_s = prompt_s(64 * BLOCK) + 1
    first, second = serve(FULL, asked(0, 64, output=3000), asked(come_s, 64)).log.requests
    assert second.reused_tokens == 64 * BLOCK - 1
    assert second.first_token_s < first.finished_s


def test_what_lies_on_drives_is_read_and_all_of_it_crosses_the_link():
    """Two blocks in host memory and three on drives."""
    hw = replace_figure(replace_figure(H100, "nvme_bytes", 8e12), "nvme_bytes_per_s", 5e10)
    run = serve(LRU, asked(0, 4), hw=hw, nvme=True)
    memory, size = run.ranks[0], run.stores[0].host.block_bytes
    before = memory.to_gpu.moved_bytes, memory.from_nvme.moved_bytes
    request = hand_request.request(run.demand, prompt=8 * BLOCK)
    request.found = FoundBlocks(host=(1, 2), nvme=(3, 4, 5))
    run._begin_prefill(request)
    run.env.run(request.prefix)
    moved = memory.to_gpu.moved_bytes, memory.from_nvme.moved_bytes
    assert np.subtract(moved, before) == pytest.approx([5 * size, 3 * size])
    assert memory.to_gpu.idle and memory.from_nvme.idle


def test_without_reuse_every_prompt_is_computed():
    run = serve(FULL, asked(0, 64), asked(1000, 64), reuse_prefixes=False)
    assert run.log.requests[1].first_token_s - 1000 == pytest.approx(prompt_s(64 * BLOCK))
    assert not run.stores


def test_one_request_whose_blocks_are_known_is_enough_to_keep_them():
    run = serve(FULL, Arrival(0, 32_000, 10), asked(1, 64), asked(1000, 64))
    assert [request.reused_tokens for request in run.log.requests] == [0, 0, 64 * BLOCK - 1]


def tier(n_blocks, below=None):
    return BlockTier(simpy.Container(simpy.Environment(), n_blocks, n_blocks), 1.0, below)


def test_the_least_recently_used_block_goes_first_and_of_a_prompt_the_last():
    host = tier(4)
    host.store([1, 2])
    host.store([3, 4])
    host.store([1])  # used again
    host.store([5])
    assert [block in host for block in (1, 2, 3, 4, 5)] == [True, False, True, True, True]
    host.store([6])
    assert 4 not in host and 3 in host


def test_what_the_host_gives_up_lies_below_until_that_is_full():
    nvme = tier(2)
    host = tier(2, nvme)
    store = PrefixStore(None, host, nvme, BLOCK)
    host.store([1, 2])
    host.store([3])
    assert store.find([1, 2, 3]) == FoundBlocks(host=(1, 3), nvme=(2,))
    host.store([4, 5])
    assert store.find([1, 2]) == FoundBlocks() or store.find([1]).nvme == (1,)
    assert len(host) == len(nvme) == 2


def test_a_pinned_block_stays():
    host = tier(2)
    host.store([1, 2])
    pinned = Pinned()
    store = PrefixStore(None, host, None, BLOCK)
    store.pin(store.find([1, 2]), pinned)
    assert host.store([3]) == 0 and host.room() == 0
    store.unpin(pinned)
    assert host.store([3]) == 1 and 1 in host and 2 not in host


SESSIONS = {
    "kind": "sessions",
    "rate_per_s": 0.5,
    "turns": [2, 5],
    "think_s": 5,
    "shared_tokens": 2048,
    "prompt_tokens": [500, 4000],
    "turn_tokens": [100, 2000],
    "output_tokens": [5, 300],
    "duration_s": 60,
}


def test_a_turns_prompt_is_all_that_was_said_and_new_tokens():
    source = RequestGenerator(SessionWorkload(**SESSIONS))
    first = source.first[0]
    second = source.after(10.0, first)
    said = first.prompt_tokens + first.output_tokens
    assert 100 <= second.prompt_tokens - said <= 2000 and second.arrival_s > 10
    assert first.blocks[:4] == (0, 1, 2, 3) == source.first[1].blocks[:4]
    assert second.blocks[: len(first.blocks)] == first.blocks
    assert not set(first.blocks[4:]) & set(source.first[1].blocks[4:])
    again = RequestGenerator(SessionWorkload(**SESSIONS))
    assert again.first == source.first and again.after(10.0, first) == second


@settings(max_examples=25, deadline=None)
@given(
    which=st.sampled_from([FULL, LRU, LSA]),
    seed=st.integers(0, 1000),
    rate=st.floats(0.2, 3),
    host_gb=st.sampled_from([0.2, 0.5, 3, 300]),
    layout=st.sampled_from([{}, {"dp": 2, "tp": 4}, {"tp": 4, "cp": 2}]),
)
def test_what_is_reused_is_not_computed_and_capacities_hold(which, seed, rate, host_gb, layout):
    hw = replace_figure(replace_figure(H100, "host_reserve_bytes", 1), "host_bytes", 8e9 * host_gb)
    hw = hw.deployed(Deployment(**layout))
    changes = {"seed": seed, "rate_per_s": rate, "duration_s": 25}
    source = RequestGenerator(SessionWorkload(**SESSIONS | changes))
    run = ServerRun(hw, FLASH, which, Server(prefill_chunk_tokens=2048), source)
    computed = []
    chunks = run._chunks
    run._chunks = lambda request: computed.append(chunks(request)) or computed[-1]
    log = run.run()
    done = [request for request in log.requests if not request.refused]
    prompts = sum(request.prompt_tokens for request in done)
    reused = sum(request.reused_tokens for request in done)
    assert sum(tokens for each in computed for tokens, _ in each) == prompts - reused
    for request in done:
        assert request.finished_s is not None and request.reused_tokens < request.prompt_tokens
        assert request.reused_tokens <= request.found.n_blocks * 512
        if request.asked.turn and host_gb == 300 and len(run.ranks) == 1:
            # its session's earlier turns are there: nothing had to go
            new = 2000 + 512
            assert request.found.n_blocks * 512 >= request.prompt_tokens - new
    table = np.array(log.samples)
    for column, pools in ((4, "hbm"), (5, "host")):
        capacity = sum(getattr(rank, pools).capacity for rank in run.ranks)
        assert (table[:, column] >= -1).all() and (table[:, column] <= capacity * (1 + 1e-9)).all()
    for rank, store in zip(run.ranks, run.stores):
        held = [(rank.host, store.host)] + ([(rank.hbm, store.gpu)] if store.gpu else [])
        for pool, blocks in held:
            kept = len(blocks) * blocks.block_bytes
            assert pool.capacity - pool.level == pytest.approx(kept, abs=1)
            assert not blocks._pins


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=8, unique=True), max_size=40))
def test_a_tier_without_end_finds_what_ever_was_there(prompts):
    """One after another, as the share of repeated leading blocks counts them."""
    host, seen = tier(10**6), set()
    store = PrefixStore(None, host, None, BLOCK)
    for blocks in prompts:
        leading = 0
        while leading < len(blocks) and blocks[leading] in seen:
            leading += 1
        assert store.find(blocks).n_blocks == leading
        host.store(blocks)
        seen.update(blocks)
    arrivals = [Arrival(0.0, 1, 1, tuple(blocks)) for blocks in prompts]
    share = repeated_share(arrivals)
    assert share is None or 0 <= share <= 1


class PlainTier:
    """`BlockTier` with blocks of one byte, as lists: those that may go, the next one first, and one
    name for each pin.
    """

    def __init__(self, size, below=None):
        self.size, self.below, self.loose, self.pins, self.written = size, below, [], [], 0

    def free(self):
        return self.size - len(self.loose) - len(set(self.pins))

    def make_room(self, n_blocks):
        while self.free() < n_blocks and self.loose:
            gone = self.loose.pop(0)
            if self.below:
                self.below.store([gone])

    def store(self, blocks):
        came = 0
        for block in blocks[::-1]:
            if block in self.pins:
                continue
            if block in self.loose:
                self.loose.remove(block)
            else:
                self.make_room(1)
                if not self.free():
                    break
                came += 1
            self.loose.append(block)
        self.written += came
        return came

    def pin(self, blocks):
        for block in blocks:
            self.loose = [each for each in self.loose if each != block]
            self.pins.append(block)

    def unpin(self, blocks):
        for block in blocks[::-1]:
            self.pins.remove(block)
            if block not in self.pins:
                self.loose.append(block)


BLOCKS = st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True)


@settings(max_examples=60, deadline=None)
@given(
    calls=st.lists(
        st.tuples(st.sampled_from(["store", "pin", "unpin", "make_room"]), BLOCKS), max_size=25
    ),
    size=st.integers(1, 6),
    below=st.integers(1, 4),
)
def test_a_tier_keeps_what_plain_lists_keep(calls, size, below):
    lower, plain_lower = tier(below), PlainTier(below)
    upper, plain = tier(size, lower), PlainTier(size, plain_lower)
    pinned = []
    for call, blocks in calls:
        if call == "pin":
            blocks = [block for block in blocks if block in upper]
            pinned.append(blocks)
        elif call == "unpin":
            blocks = pinned.pop(0) if pinned else []
        given = len(blocks) if call == "make_room" else blocks
        assert getattr(upper, call)(given) == getattr(plain, call)(given)
        for found, expected in ((upper, plain), (lower, plain_lower)):
            assert list(found._unpinned) == expected.loose and found.written == expected.written
            assert {block for block in range(10) if block in found} == {
                *expected.loose,
                *expected.pins,
            }
            assert (found.pool.level, found.room()) == (
                expected.free(),
                expected.free() + len(expected.loose),
            )


def test_a_decode_of_a_given_ledger_is_as_before_where_no_block_has_an_id():
    made = Demand(ledger(slots=8100, on_miss="fetch"), FLASH)
    run = serve(made, Arrival(0, 32_000, 10), Arrival(0, 32_000, 10))
    assert not run.stores and all(request.reused_tokens == 0 for request in run.log.requests)


def test_a_block_that_a_request_made_is_given_to_the_tier():
    """A pool of four blocks of 10 bytes. A request holds 6 bytes of a block: the tier takes the
    other 4 of it; of one that it has already, the request's 6 are free again.
    """
    pool = simpy.Container(simpy.Environment(), 40, 40)
    blocks = BlockTier(pool, 10.0)
    pool.get(6)  # the request's own part
    assert blocks.adopt(1, 6.0)
    assert (pool.level, blocks.written, 1 in blocks) == (30, 1, True)
    pool.get(6)
    assert blocks.adopt(1, 6.0)
    assert (pool.level, blocks.written) == (30, 1)
    blocks.unpin([1])
    assert blocks.room() == 30  # it is pinned once more
    blocks.unpin([1])
    assert blocks.room() == 40 and blocks.room([1]) == 30
    pool.get(30)
    assert blocks.adopt(2, 0.0) and 1 not in blocks  # which made room
    assert not blocks.adopt(3, 0.0) and 3 not in blocks
    assert (pool.level, len(blocks)) == (0, 1)


def test_a_request_gives_whole_blocks_as_far_as_it_has_their_part():
    """It holds 15 bytes: two parts of 6; what is pinned already is left out."""
    pool = simpy.Container(simpy.Environment(), 100, 100)
    blocks = BlockTier(pool, 10.0)
    pool.get(15)
    pinned = [7]
    blocks.store([7])
    blocks.pin([7])
    assert blocks.adopt_all([7, 1, 2, 3], pinned, 6.0, 15.0) == 12.0
    assert pinned == [7, 1, 2] and 3 not in blocks
    assert pool.level == 100 - 15 - 10 - 2 * 4
    assert blocks.adopt_all([1, 2], pinned, 6.0, 3.0) == 0.0
    exact = BlockTier(simpy.Container(simpy.Environment(), 100, 88), 10.0)
    assert exact.adopt_all([1, 2], [], 6.0, 12.0) == 12.0
    full = BlockTier(simpy.Container(simpy.Environment(), 10, 4), 10.0)
    assert full.adopt_all([1, 2, 3], [], 6.0, 100.0) == 6.0  # no room for the rest of a second


def test_what_is_stored_counts_what_came_in_and_stops_where_nothing_may_go():
    host = tier(3)
    assert host.store([1, 2]) == 2 and host.store([2, 3]) == 1
    assert host.written == 3
    host.pin([1, 2, 3])
    assert host.store([4]) == 0 and host.store([1]) == 0 and len(host) == 3
    host.unpin([1, 2])
    assert host.store([4, 5]) == 2 and 3 in host
    assert host.room() == 2 and host.room([4]) == 1


def test_blocks_are_found_from_above_and_only_the_leading_ones():
    gpu, host, nvme = tier(9), tier(9), tier(9)
    gpu.store([1, 2])
    host.store([2, 3])
    nvme.store([3, 4, 6])
    store = PrefixStore(gpu, host, nvme, BLOCK)
    assert store.find([1, 2, 3, 4, 5, 6]) == FoundBlocks(gpu=(1, 2), host=(3,), nvme=(4,))
    assert store.find([5, 1]) == FoundBlocks() and store.find([]) == FoundBlocks()
    assert FoundBlocks((1, 2), (3,), (4,)).n_blocks == 4
    pinned = Pinned()
    store.pin(store.find([1, 3, 4]), pinned)
    assert (pinned.gpu, pinned.host, pinned.nvme) == ([1], [3], [4])
    assert [each.room() for each in (gpu, host, nvme)] == [8, 8, 8]
    store.unpin(pinned)
    assert (pinned.gpu, pinned.host, pinned.nvme) == ([], [], [])
    assert [each.room() for each in (gpu, host, nvme)] == [9, 9, 9]


def test_prefixes_are_kept_where_any_request_has_one_in_each_gpus_part():
    """Two GPUs share out the KV. Of 1,100 tokens two blocks of 512 are whole."""
    hw = H100.deployed(Deployment(tp=4, cp=2))
    plain, known = Arrival(0, 1100, 10), Arrival(0, 1100, 10, (1, 2, 3))
    server = ServerRun(hw, FLASH, FULL, Server(), Given(plain, known))
    [store] = server.stores
    assert store.gpu.block_bytes == store.host.block_bytes == FLASH.full_kv_bytes(512) / 2
    server.run()
    assert store.find((1, 2, 3)).n_blocks == 2
    assert not ServerRun(hw, FLASH, FULL, Server(), Given(plain)).stores


def test_what_lies_on_drives_and_on_the_host_comes_beside_the_first_chunk():
    """Of a prompt of 1,600 tokens three blocks: one on the host, two on drives, which are read
    there and then go over the link like the first. The last token of a whole prompt is computed.
    """
    hw = replace_figure(replace_figure(H100, "nvme_bytes", 8e12), "nvme_bytes_per_s", 54e9)
    hw = hw.deployed(Deployment(tp=4, cp=2))
    source = Given(Arrival(0, 10, 10, (7,)))
    run = ServerRun(hw, FLASH, FULL, Server(nvme=True, prefill_chunk_tokens=32), source)
    for tokens, reused, n_chunks in ((1600, 1536, 2), (1536, 1535, 1)):
        memory, request = run.ranks[0], hand_request.request(run.demand, prompt=tokens)
        request.found = FoundBlocks(host=(1,), nvme=(2, 3))
        before = memory.from_nvme.moved_bytes, memory.to_gpu.moved_bytes
        run._begin_prefill(request)
        assert (request.reused_tokens, len(request.prefill_left)) == (reused, n_chunks)
        run.env.run(request.prefix)
        block = FLASH.full_kv_bytes(512) / 2
        after = memory.from_nvme.moved_bytes, memory.to_gpu.moved_bytes
        assert np.subtract(after, before) == pytest.approx([2 * block, 3 * block])
        assert run.prefilling[0].pop() is request
    plain = hand_request.request(run.demand, prompt=100)
    run._begin_prefill(plain)
    assert plain.prefix is None and len(plain.prefill_left) == 4


def test_a_step_with_a_first_chunk_that_waits_is_taken_alone():
    """Four chunks are four steps without a change; beside blocks on their way the first is one."""
    source = Given(Arrival(0, 10, 10, (7,)))
    run = ServerRun(H100, FLASH, FULL, Server(prefill_chunk_tokens=32), source)
    request = hand_request.request(run.demand, prompt=128)
    run._begin_prefill(request)
    assert run._steps_ahead() == 4
    request.prefix = run.env.event()
    assert run._steps_ahead() == 1
    assert run.log.block_tokens == 512
