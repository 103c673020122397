"""What a running batch asks for, summed by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
from hand_ledger import FLASH, H100, ledger, loads
from hand_request import PROMPT, request

from fmsim.hw.deployment import Deployment
from fmsim.sim.serving.batch import RunningBatch, mean_step_s
from fmsim.sim.serving.demand import Demand
from fmsim.sim.step_cost import StepModel


def test_a_request_of_twice_the_length_has_twice_the_resident_entries():
    """A tenth of 8,000 entries is 800; of 16,000 it is 1,600, which a masked layer scores."""
    demand = Demand(ledger(params={"budget": "10%"}), FLASH)
    batch = RunningBatch(demand)
    batch.add(request(demand))
    batch.add(request(demand, 2 * PROMPT))
    found = batch.load(2)
    assert found.scored[0].total.tolist() == [2400, 2400]
    assert found.scored[0].largest.tolist() == [1600, 1600]
    assert found.tokens[0].total.tolist() == [96_002, 96_004]
    assert found.tokens[0].largest.tolist() == [64_001, 64_002]


def test_a_step_that_makes_two_tokens_lengthens_contexts_by_two():
    demand = Demand(ledger(slots=8032), FLASH).drafted(1, 1.0)
    assert demand.tokens_per_step == 2
    batch = RunningBatch(demand)
    batch.add(request(demand))
    assert batch.steps == 0
    assert batch.load(3).tokens[0].total.tolist() == [PROMPT + 1, PROMPT + 3, PROMPT + 5]


def test_a_request_that_had_all_its_entries_misses_once_it_shrinks_and_it_alone():
    """40 rows of 584 bytes a step; twice the length has twice the misses."""
    demand = Demand(ledger(on_miss="fetch", demand_loads=np.full((128, 1), 40)), FLASH)
    batch, requests = RunningBatch(demand), [request(demand), request(demand)]
    for each in requests:
        each.whole = True
        batch.add(each)
    assert not batch.load(1).miss_bytes.any()
    changes = batch.changes
    batch.shrink(requests[1])
    assert batch.load(1).miss_bytes.tolist() == [[[40 * 584]]] and batch.changes == changes + 1
    batch.shrink(request(demand))  # of no request of the batch
    assert batch.load(1).miss_bytes.tolist() == [[[40 * 584]]] and batch.changes == changes + 1
    batch.shrink(requests[0])
    assert batch.load(1).miss_bytes.tolist() == [[[2 * 40 * 584]]]


def test_a_masked_layer_scores_the_mean_resident_set_grown_to_each_length():
    """Of 8,000 entries 800 to 1,600, 1,200 on average; 64,000 tokens are twice as many, and 400
    tokens have 100 entries. Ranks are asked apart, and the slower counts.
    """

    class Asked:
        def __init__(self):
            self.of = []

        def mixed(self, n, tokens, scored, batch):
            self.of.append((n, int(tokens.total[0]), float(scored.total[0]), batch))
            return SimpleNamespace(total_s=lambda n_layers: np.array([float(n) / n_layers]))

    made = ledger(n_steps=2, params={"budget": "10%"}, resident=np.array([[800], [1600]]))
    demand, model = Demand(made, FLASH), Asked()
    tokens = np.array([32_000, 64_000, 400])
    found = mean_step_s(model, demand, tokens, np.array([0, 0, 1]))
    small = min(1200 * demand.growth(400), 100)
    assert demand.growth(64_000) == 2 * demand.growth(32_000) == 2
    assert model.of == [(2, 96_000, 1200 + 2400, 3), (1, 400, pytest.approx(small), 3)]
    assert found == 2 / FLASH.n_selecting


def test_two_ranks_are_summed_apart():
    demand = Demand(ledger(on_miss="fetch", demand_loads=loads(128, s0=40)), FLASH)
    batch = RunningBatch(demand)
    for rank, prompt in ((3, PROMPT), (1, 2 * PROMPT), (3, PROMPT)):
        batch.add(request(demand, prompt, rank=rank))
    found = batch.load(2)
    assert (found.ranks, found.requests) == ([1, 3], [1, 2])
    assert [each.total.tolist() for each in found.tokens] == [[64_001, 64_002], [64_002, 64_004]]
    assert found.miss_bytes[:, :, 0].tolist() == [[40 * 584, 0], [80 * 584, 0]]


def test_steps_go_on_and_the_shortest_leaves():
    demand = Demand(ledger(slots=8032), FLASH)
    batch = RunningBatch(demand)
    short, long = request(demand, output=5), request(demand, output=9)
    batch.add(short)
    batch.add(long)
    assert (batch.least_left, len(batch)) == (5, 2)
    assert batch.advance(3, first_s=0.25) == []
    assert (short.first_token_s, long.first_token_s, batch.least_left) == (0.25, 0.25, 2)
    assert batch.advance(2, first_s=0.5) == [short] and short.first_token_s == 0.25
    assert (batch.least_left, len(batch)) == (4, 1)
    assert batch.load(1).tokens[0].total.tolist() == [PROMPT + 6]
    assert batch.advance(4, first_s=1.0) == [long] and len(batch) == 0
    assert np.all(batch.changes == 4)


RECALLS = {"params": {"budget": "10%"}, "lookahead_loads": loads(128, s0=7, s64=100)}
ROW = 584 + 132  # bytes of a recalled entry and its key


def test_windows_begin_by_each_requests_own_count_of_steps():
    """Of 64 steps. The second request joins ten steps later, and has twice the length: its first
    set is there; the next window recalls 100 rows in 21 layers, twice over.
    """
    demand = Demand(ledger(**RECALLS), FLASH)
    batch = RunningBatch(demand)
    first, second = request(demand, output=200), request(demand, 2 * PROMPT, output=128)
    batch.add(first)
    [start] = batch.window_starts()
    assert (start.request, start.own_bytes, start.next_bytes) == (first, 0, 100 * 21 * ROW)
    assert batch.quiet_steps() == 64
    batch.advance(10, first_s=0.0)
    assert batch.window_starts() == [] and batch.quiet_steps() == 54
    batch.add(second)
    [start] = batch.window_starts()
    assert (start.request, start.own_bytes, start.next_bytes) == (second, 0, 200 * 21 * ROW)
    assert batch.quiet_steps() == 54  # until the first one's next window
    batch.advance(54, first_s=0.0)
    [start] = batch.window_starts()
    assert (start.request, start.own_bytes, start.next_bytes) == (first, *[100 * 21 * ROW] * 2)
    assert batch.quiet_steps() == 10
    batch.advance(10, first_s=0.0)
    [start] = batch.window_starts()
    # its second window is its last: nothing follows
    assert (start.request, start.own_bytes, start.next_bytes) == (second, 200 * 21 * ROW, 0)
    batch.advance(54, first_s=0.0)
    assert batch.quiet_steps() == 10
    assert batch.advance(10, first_s=0.0) == [second]
    assert batch.requests == [first] and batch.quiet_steps() == 54
    assert batch.window_starts() == []  # the one whose window it would be is done
    assert batch.advance(54, first_s=0.0) == [] and batch.quiet_steps() == 8 == batch.least_left
    assert batch.advance(8, first_s=0.0) == [first]


def test_what_a_step_moves_and_scores_grows_with_the_request():
    """At the window's first step 100 rows are recalled, of a request of twice the length twice as
    many, and none where the budget holds all; a memory indexer scores 24,000 entries, of twice the
    length twice as many.
    """
    scored = np.zeros(128, np.int64)
    scored[::64] = 24_000
    demand = Demand(ledger(**RECALLS, scored=scored), FLASH)
    batch = RunningBatch(demand)
    batch.add(request(demand, output=128))
    batch.add(request(demand, 2 * PROMPT, output=128))
    found = batch.load(66)
    moved = found.recalled_bytes[0]
    assert moved[0] == 0 and moved[64] == pytest.approx(3 * 100 * 21 * ROW)  # 0: it is there
    assert np.flatnonzero(moved).tolist() == [64] and not found.miss_bytes.any()
    assert found.indexer_scored[0][[0, 1, 64]].tolist() == [72_000, 0, 72_000]
    whole = Demand(ledger(**RECALLS | {"params": {"budget": "9000 entries"}}), FLASH)
    whole_batch = RunningBatch(whole)
    whole_batch.add(request(whole, 2000, output=128))  # 532 entries, and 800 slots
    assert not whole_batch.load(66).recalled_bytes.any()
    [start] = whole_batch.window_starts()
    assert (start.own_bytes, start.next_bytes) == (0, 0)


def test_a_batchs_step_is_the_busiest_ranks_in_every_part():
    """One rank has the longer context, the other the more requests."""
    demand = Demand(ledger(slots=8032, on_miss="fetch"), FLASH)
    batch = RunningBatch(demand)
    for rank, prompt in ((0, 8 * PROMPT), (1, 4000), (1, 4000), (1, 4000)):
        batch.add(request(demand, prompt, rank=rank))
    model = StepModel(H100.deployed(Deployment(dp=8)), FLASH)
    found = batch.load(1)
    costs = found.costs(model)
    each = [
        model.mixed(requests, tokens, scored, 4)
        for requests, tokens, scored in zip(found.requests, found.tokens, found.scored)
    ]
    assert found.requests == [1, 3]
    assert costs.csa_s[0] == max(part.csa_s[0] for part in each)
    assert costs.rest_s[0] == max(part.rest_s[0] for part in each)
    tokens = np.array([8 * PROMPT + 1, 4001, 4001, 4001])
    mean = mean_step_s(model, demand, tokens, np.array([0, 1, 1, 1]))
    assert mean == max(float(part.total_s(21)[0]) for part in each)
