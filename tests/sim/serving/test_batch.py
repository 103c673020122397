"""What a running batch asks for, summed by hand."""

import numpy as np
from hand_ledger import FLASH, ledger, loads

from fmsim.sim.serving.batch import RunningBatch, ServedRequest
from fmsim.sim.serving.demand import Demand
from fmsim.sim.serving.requests import Arrival

PROMPT = 32_000  # tokens of the hand-made ledger's prompt: 8,000 entries


def request(demand, prompt=PROMPT, output=64, rank=0):
    return ServedRequest(
        number=0,
        asked=Arrival(0.0, prompt, output),
        arrival_s=0.0,
        prompt_tokens=prompt,
        output_tokens=output,
        offset=0,
        steps=output,
        pools=demand.pools(prompt, output),
        rank=rank,
    )


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
