"""What a request of another length asks, from a ledger recorded at one."""

import numpy as np
import pytest
from hand_ledger import FLASH, H100, ledger, loads
from hand_tables import round_link

from fmsim.hw.deployment import Deployment
from fmsim.sim.serving.demand import Demand

PROMPT = 32_000  # tokens of the hand-made ledger's prompt


def test_a_layer_has_no_more_than_a_short_request_gives_it():
    """Three layers of 1200, 800 and 400 slots, for seven of the model's layers each."""
    counts = np.tile(np.array([1200, 800, 400], np.int32), (128, 1))
    demand = Demand(
        ledger(
            n_groups=3,
            slots=1200,
            group_slots=[1200, 800, 400],
            resident=counts,
            params={"budget": "800 entries"},
            on_miss="fetch",
            demand_loads=loads(128, 3, s5=50),
        ),
        FLASH,
    )
    assert demand.pools(PROMPT, 128).gpu.slots == 7 * 2400 * 584
    prompt = 4 * 600 - 128
    assert demand.pools(prompt, 128).gpu.slots == 7 * (600 + 600 + 400) * 584
    assert not demand.fits_whole(prompt, 128)  # the last layers miss
    assert demand.fits_whole(4 * 400 - 128, 128)


def test_a_ledger_of_one_window_repeats_whole():
    """Decisions at 0 and 64 alone: 64 steps hold no window that a decision filled."""
    positions = np.array([0, 63, 64, 70, 128])
    one = Demand(ledger(n_steps=64, lookahead_loads=loads(64, s0=1)), FLASH)
    assert one.at(positions).tolist() == [0, 63, 0, 6, 0]
    two = Demand(ledger(n_steps=128, lookahead_loads=loads(128, s64=1)), FLASH)
    assert two.at(np.array([64, 127, 128, 191, 192])).tolist() == [64, 127, 64, 127, 64]


def test_uneven_shares_in_pages_of_four_entries():
    """Three groups of 300, 200 and 100 pages, at 32,000 tokens.

    32,000 tokens of prompt grow them by 1; 16,000 by a half: 150, 100 and 50 pages for seven layers
    each, 4 x 584 bytes a page, 700 pages in all.
    """
    sizes = [300, 200, 100]
    counts = np.tile(np.array(sizes, np.int32), (128, 1))
    made = ledger(
        n_groups=3,
        slots=300,
        group_slots=sizes,
        granularity=4,
        resident=counts,
        params={"budget": "10%"},
        on_miss="fetch",
        demand_loads=loads(128, 3, s5=50),
        miss_slots=10,
    )
    demand = Demand(made, FLASH)
    whole, half = (demand.pools(prompt, 128) for prompt in (PROMPT, PROMPT // 2))
    assert whole.gpu.slots == 7 * 600 * 4 * 584
    assert half.gpu.slots == 7 * 300 * 4 * 584
    assert whole.gpu.spare == half.gpu.spare == 21 * 10 * 4 * 584
    assert whole.gpu.index_keys == 21 * 8032 * 132
    # at the fullest step (1,200 + 800 + 400) / 3 = 800 entries a layer
    assert demand.first_set_bytes(PROMPT, 128) == 800 * 21 * 584
    assert demand.first_set_bytes(PROMPT // 2, 128) == 400 * 21 * 584
    assert demand.miss_bytes[5].tolist() == [50 * 4 * 584] * 3
    # 200 tokens have 50 entries, 13 pages: 1 of 300 x 200 / 32,000 = 1.875, and one at least
    assert demand.pools(200, 4).gpu.slots == 7 * 3 * 4 * 584


def test_a_budget_on_the_gpu_is_solved_in_pages_for_each_length():
    """Of 64,128 tokens in all, pages of 4 entries in 21 layers, 49,056 B each: 40% of the full
    cache, less the keys, the dense entries and the windows, hold so many and no more.
    """
    made = ledger(
        slots=400, granularity=4, params={"budget": "40% gpu"}, on_miss="fetch", all_keys=True
    )
    demand = Demand(made, FLASH)
    tokens = 64_128
    found = demand.pools(64_000, 128).gpu
    keys, dense = 21 * 16_032 * 132, 20 * (tokens // 128) * 584
    assert (found.index_keys, found.hca, found.spare) == (keys, dense, 0)
    windows = 43 * 128 * 584
    full = 21 * 16_032 * (584 + 132) + dense + windows
    pages = (int(0.4 * full) - keys - dense - windows) // (21 * 4 * 584)
    assert found.slots == pages * 21 * 4 * 584
    assert 1 < pages < 4008


def test_the_mean_wait_for_misses_of_a_rank_by_hand():
    """Half of the steps miss 40 rows in each of 21 layers, the others none: a wait of 21 x (10 us
    + n x 40 x 584 / 50e9 s) for n requests that miss, in half of the steps. One that fits whole
    misses nothing. Two GPUs that share out the KV move half of it each.
    """
    hw = round_link(H100, 584)
    missed = np.zeros((128, 1), np.int32)
    missed[::2] = 40
    made = ledger(on_miss="fetch", params={"budget": "800 entries"}, demand_loads=missed)
    demand = Demand(made, FLASH)
    short, long = (2000, 100), (32_000, 100)
    wait_s = lambda n: 0.5 * 21 * (10e-6 + n * 40 * 584 / 50e9)
    for requests, n in (([long], 1), ([long, short, long], 2), ([short], 0), ([], 0)):
        found = demand.mean_stall_s(hw, requests)
        assert found == pytest.approx(wait_s(n) if n else 0.0), requests
    halved = demand.mean_stall_s(hw.deployed(Deployment(tp=4, cp=2)), [long, long])
    assert halved == pytest.approx(wait_s(1))
    counts, shares = demand.miss_counts
    assert counts.tolist() == [[0], [40 * 584]] and shares.tolist() == [0.5, 0.5]


def test_recalls_a_step_are_means_over_the_windows_that_repeat():
    """Windows of 64 steps: the first is the prefill's, the second repeats: 6,400 rows are 100 a
    step, twice as many for twice the length.
    """
    moved = loads(128, s0=1000, s64=6400)
    made = ledger(lookahead_loads=moved, params={"budget": "10%"})
    demand = Demand(made, FLASH)
    assert demand.recall_bytes_per_step(32_000) == pytest.approx(100 * 21 * 716)
    assert demand.recall_bytes_per_step(64_000) == pytest.approx(200 * 21 * 716)
    assert demand.recalled_at(64) == demand.recalled_at(128) == demand.recalled_at(192)
    assert demand.recalled_at(64) == 6400 * 21 * 716 and demand.recalled_at(65) == 0
    assert demand.recalled_at(0) == 1000 * 21 * 716
    assert demand.offsets.tolist() == [0, 64]


def test_what_grows_with_a_request_is_what_its_budget_says():
    """Twice the ledger's length: shares double; entries stay; a multiple of top-k follows the
    model's 512 over the ledger's 256.
    """
    twice = 64_000
    for budget, growth in (("10%", 2.0), ("all", 2.0), ("800 entries", 1.0), ("2x topk", 2.0)):
        made = ledger(params={"budget": budget}, topk=256)
        assert Demand(made, FLASH).growth(twice) == growth, budget
    assert Demand(ledger(params={"budget": "2x topk"}), FLASH).growth(twice) == 1.0
    everything = ledger(slots=8032, params={"budget": "9000 entries"})
    assert Demand(everything, FLASH).growth(twice) == 2.0  # it keeps all, whatever it is called
    assert Demand(ledger(prompt_entries=0), FLASH).length_ratio(400) == 100.0


def test_misses_are_shares_of_the_models_top_k():
    made = ledger(on_miss="fetch", topk=256, demand_loads=loads(128, s3=10), miss_slots=7)
    demand = Demand(made, FLASH)
    assert demand.miss_bytes[3].tolist() == [10 * 584 * 2]
    assert demand.pools(PROMPT, 128).gpu.spare == 21 * 14 * 584
    of_384 = Demand(ledger(on_miss="fetch", topk=384, miss_slots=7), FLASH)
    assert of_384.pools(PROMPT, 128).gpu.spare == 21 * 10 * 584  # 9.33, rounded up


def test_what_recalls_ahead_has_spare_pages_for_a_quarter_of_its_slots():
    """800 slots and a quarter of them, grown by half for half the length: 400 and 100."""
    made = ledger(lookahead_loads=loads(128, s64=10), ahead_slots=[200], params={"budget": "10%"})
    demand = Demand(made, FLASH)
    assert demand.pools(PROMPT, 128).gpu.spare == 21 * 200 * 716
    assert demand.pools(PROMPT // 2, 128).gpu.spare == 21 * 100 * 716
    assert demand.mirrored and demand.pools(PROMPT, 128).mirror == FLASH.host_kv_bytes(32_128)
    assert Demand(ledger(), FLASH).pools(PROMPT, 128).mirror == 0


def test_what_fits_whole_keeps_all_keys_and_nothing_spare_unless_it_recalls_ahead():
    """2,100 tokens have 525 entries, and there are 800 slots: a quarter of 525 is 132."""
    budget = {"params": {"budget": "800 entries"}}
    recalled = {"lookahead_loads": loads(128, s64=10), "ahead_slots": [200]}
    for made, spare, key_bytes in (
        (ledger(**budget), 0, 0),
        (ledger(**budget, on_miss="fetch", demand_loads=loads(128, s5=9), miss_slots=512), 0, 0),
        (ledger(**budget, **recalled), 132 * 716, 132),
    ):
        gpu = Demand(made, FLASH).pools(2000, 100).gpu  # in no group more than there are
        assert (gpu.slots, gpu.spare) == (21 * 525 * (584 + key_bytes), 21 * spare)
        assert gpu.index_keys == (0 if key_bytes else 21 * 525 * 132)
    misses = {"on_miss": "fetch", "miss_slots": 512}
    few = ledger(slots=50, params={"budget": "50 entries"}, demand_loads=loads(128, s5=9), **misses)
    assert Demand(few, FLASH).pools(300, 100).gpu.spare == 21 * 100 * 584  # of 100 entries
    sizes = {"n_groups": 3, "slots": 1200, "group_slots": [1200, 800, 400]}
    uneven = ledger(**sizes, **budget, demand_loads=loads(128, 3, s5=9), **misses)
    assert Demand(uneven, FLASH).pools(2000, 100).gpu.spare == 21 * 512 * 584  # the last one misses


def test_windows_of_two_steps_repeat_and_steps_of_one_do_not():
    """Of five steps: the windows at 0 and 2 are whole, and the second repeats."""
    for cadence, at in ((2, [0, 3, 2, 3, 2]), (1, [0, 3, 4, 0, 1])):
        demand = Demand(ledger(n_steps=5, cadence=cadence, tau=2), FLASH)
        assert demand.at(np.array([0, 3, 4, 5, 6])).tolist() == at
    stale = {"decides_ahead": True, "target_layers": [0]}
    late = Demand(ledger(n_steps=6, cadence=2, tau=2, **stale), FLASH)
    assert late.at(np.array([5, 6, 7])).tolist() == [5, 4, 5]  # nothing new at its second decision
    ahead = Demand(ledger(n_steps=6, cadence=2, tau=2, decides_ahead=True), FLASH)
    assert ahead.at(np.array([6, 8, 9])).tolist() == [2, 4, 5]


def test_what_keeps_all_does_so_at_every_step():
    made = ledger(n_steps=8, slots=9000, params={"budget": "9000 entries"})
    assert Demand(made, FLASH).holds_all and Demand(made, FLASH).growth(64_000) == 2.0
    made.resident[5] = 7000
    assert not Demand(made, FLASH).holds_all and Demand(made, FLASH).growth(64_000) == 1.0


def test_a_first_set_is_no_more_than_each_layer_has():
    """Layers of 1,200, 800 and 400 slots, seven each, and 600 entries: 600, 600 and 400."""
    counts = np.tile(np.array([1200, 800, 400], np.int32), (128, 1))
    sizes = {"n_groups": 3, "slots": 1200, "group_slots": [1200, 800, 400]}
    made = ledger(**sizes, resident=counts, params={"budget": "800 entries"}, on_miss="fetch")
    demand = Demand(made, FLASH)
    found = demand.first_set_bytes(2272, 128)
    assert found == pytest.approx(7 * (600 + 600 + 400) * 584)
    assert demand.first_set_bytes(32_000, 128) == pytest.approx(7 * 2400 * 584)


def late_counts(demand):
    """Misses of steps that make one token and select for four positions, each kind once."""
    return demand.drafted(3, 0.0).miss_counts[0].tolist()


def test_a_first_set_is_that_of_the_fullest_step():
    """Of 800 slots 400 are filled at first; 600 entries of a shorter request all have one."""
    made = ledger(params={"budget": "800 entries"}, on_miss="fetch")
    made.resident[0] = 400
    demand = Demand(made, FLASH)
    assert demand.first_set_bytes(2272, 128) == pytest.approx(21 * 600 * 584)
    assert demand.first_set_bytes(32_000, 128) == pytest.approx(21 * 800 * 584)


def test_drafts_may_miss_at_every_position_and_the_last_steps_positions_end_with_the_ledger():
    missed = np.zeros((6, 1), np.int32)
    missed[5] = 9
    made = ledger(n_steps=6, cadence=1, on_miss="fetch", demand_loads=missed, miss_slots=7)
    demand = Demand(made, FLASH)
    assert demand.pools(PROMPT, 128).gpu.spare == 21 * 7 * 584
    drafting = demand.drafted(2, 1.0)  # three tokens a step: steps 0 and 3
    assert drafting.pools(PROMPT, 128).gpu.spare == 21 * 3 * 7 * 584
    assert drafting.miss_bytes.tolist() == [[0], [9 * 584]]
    assert drafting.tokens_per_step == 3.0
    assert demand.miss_counts[0].tolist() == [[0], [9 * 584]] and demand.recalled_at(5) == 0
    assert late_counts(demand) == [[0], [9 * 584], [18 * 584], [27 * 584], [36 * 584]]
    moved = ledger(n_steps=6, cadence=1, lookahead_loads=loads(6, s1=2, s5=3), scored=np.arange(6))
    moving = Demand(moved, FLASH).drafted(2, 1.0)  # what its steps 0 to 2, and 3 to 5, recall
    assert moving.recall_bytes.tolist() == [2 * 21 * 716, 3 * 21 * 716]
    assert moving.indexer_scored.tolist() == [3, 12]
    half = Demand(moved, FLASH).drafted(1, 0.5)  # of 1.5 tokens: steps 0, 1 and 2, 3, 4 and 5
    assert half.indexer_scored.tolist() == [0, 1 + 2, 3, 4 + 5]
    late = demand.drafted(3, 0.0)  # a token a step, and four positions: the last ones stay at 5
    assert late.miss_bytes[:, 0].tolist() == [0, 0, 9 * 584, 18 * 584, 27 * 584, 36 * 584]
