"""Two GPUs of each rank share out the KV of its requests: each moves and holds half of it."""

import numpy as np
import pytest
from hand_ledger import FLASH, H100, ledger, loads
from hand_request import PROMPT, serve

from fmsim.hw.deployment import Deployment
from fmsim.sim.serving.prefill import PrefillModel
from fmsim.sim.serving.summary import summary
from fmsim.sim.transfer_cost import GatherCurve

PARTS = H100.deployed(Deployment(tp=4, cp=2))
MISSES = ledger(
    on_miss="fetch",
    cadence=1,
    params={"budget": "800 entries"},
    demand_loads=np.full((128, 1), 40, np.int32),
)


def test_a_prompt_from_elsewhere_comes_in_halves():
    made = ledger(lookahead_loads=loads(128, s64=300))
    options = {"prefill": "separate", "network_bytes_per_s": 1e9}
    [request] = serve(made, (0, PROMPT, 65), hw=PARTS, **options).log.requests
    there_s = sum(seconds for _, seconds in PrefillModel(PARTS, FLASH).prompt(PROMPT, 8192))
    network_s = (FLASH.full_kv_bytes(PROMPT) + FLASH.window_bytes) / 2 / 1e9
    first_set_s = float(GatherCurve(PARTS.link).seconds(716, 800 * 21 * 716 / 2))
    assert request.first_token_s == pytest.approx(there_s + network_s + first_set_s)


@pytest.mark.parametrize("hw", [H100, PARTS], ids=["one", "two"])
def test_misses_are_counted_once_and_each_gpu_moves_its_part(hw):
    """40 rows of 584 bytes in 21 layers at each of 64 steps, of 512 selected entries a layer."""
    server = serve(MISSES, (0, PROMPT, 64), hw=hw)
    moved = 64 * 40 * 21 * 584 / hw.placed.cp
    assert server.ranks[0].to_gpu.moved_bytes == pytest.approx(moved)
    assert server.log.missed_entries == pytest.approx(64 * 40 * 21)
    assert server.log.selected_entries == 64 * 21 * 512
    row = summary(server)
    assert row["miss_rate"] == pytest.approx(40 / 512)
    [request] = server.log.requests
    each_s = 21 * float(GatherCurve(hw.link).seconds(584, 40 * 584 / hw.placed.cp))
    assert request.stall_s == pytest.approx(server.log.stall_s) == pytest.approx(64 * each_s)
    assert server.log.busy_s == request.finished_s and row["stall_share"] == pytest.approx(
        64 * each_s / request.finished_s
    )


def test_hisparse_writes_each_gpus_half_of_the_mirror_before_the_first_decode_step():
    options = {"prefill": "chunked", "residency": "hisparse"}
    server = serve(MISSES, (0, PROMPT, 65), hw=PARTS, **options)
    half = FLASH.host_kv_bytes(PROMPT) / 2
    link = server.ranks[0].to_host
    assert link.moved_bytes == pytest.approx(half)
    [request] = server.log.requests
    plain = serve(MISSES, (0, PROMPT, 65), hw=PARTS, prefill="chunked").log.requests[0]
    assert request.first_token_s == plain.first_token_s
    later_s = request.finished_s - plain.finished_s
    assert later_s == pytest.approx(half / link.bytes_per_s)


def test_a_request_of_as_many_tokens_as_the_model_has_positions_is_served():
    made = ledger(slots=8032, on_miss="fetch")
    server = serve(made, (0, 2**20 - 8, 8), (0, 2**20 - 8, 9))
    fits, long = server.log.requests
    assert (fits.refused, long.refused) == (None, "the model's positions")
    assert fits.finished_s is not None and long.finished_s is None


def test_who_joins_later_waits_for_what_comes_later():
    """The first request's misses alone, before the second came, are none of its stalls."""
    server = serve(MISSES, (0, PROMPT, 128), (0.5, PROMPT, 32))
    first, second = server.log.requests
    assert 0.5 <= second.admitted_s < 0.53
    assert 0 < second.stall_s < first.stall_s == pytest.approx(server.log.stalled_s)
    alone = serve(MISSES, (0, PROMPT, 32)).log.requests[0].stall_s
    assert alone < second.stall_s < 3 * alone
