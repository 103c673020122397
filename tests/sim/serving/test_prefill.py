"""Prompts that are prefilled in chunks, beside decode or elsewhere."""

import numpy as np
import pytest
from hand_ledger import FLASH, H100, ledger, loads
from hand_request import PROMPT, serve
from hypothesis import given, settings
from hypothesis import strategies as st

from fmsim.hw import load_hardware
from fmsim.hw.deployment import Deployment
from fmsim.sim.footprint import footprint
from fmsim.sim.serving.prefill import PrefillModel
from fmsim.sim.step_cost import StepModel
from fmsim.sim.transfer_cost import GatherCurve

PREFILL = PrefillModel(H100, FLASH)
WHOLE = ledger(slots=8032, on_miss="fetch")
RECALL = ledger(lookahead_loads=loads(128, s64=300))


def test_a_prompt_prefilled_in_chunks_shares_steps_with_decode():
    server = serve(WHOLE, (0, PROMPT, 65), prefill="chunked", prefill_chunk_tokens=8192)
    start = np.array([0, 8192, 16_384, 24_576])
    length = np.array([8192, 8192, 8192, PROMPT - 24_576])
    request = server.log.requests[0]
    assert request.first_token_s == pytest.approx(float(PREFILL.seconds(start, length).sum()))
    assert server.log.tokens == 65
    place = footprint(WHOLE, FLASH)
    costs = StepModel(H100, FLASH).equal(1, place.tokens, place.scored_entries)
    decode_s = costs.total_s(FLASH.n_csa)[:64].sum()
    assert request.finished_s == pytest.approx(request.first_token_s + decode_s)
    both = serve(WHOLE, (0, PROMPT, 65), (0, PROMPT, 65), prefill="chunked")
    first, second = both.log.requests
    assert first.first_token_s < second.first_token_s < 2.5 * first.first_token_s
    assert first.finished_s > request.finished_s


def test_chunks_of_a_prompt_take_as_long_as_the_whole():
    whole = PREFILL.seconds(np.array([0]), np.array([65_536]))
    parts = np.array([seconds for _, seconds in PREFILL.prompt(65_536, 8192)])
    assert parts.sum() == pytest.approx(float(whole[0]), rel=0.07)
    assert (np.diff(parts) > 0).all()


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["h100", "h200", "b200", "h20"]),
    prompt=st.integers(1, 1_000_000),
    chunk=st.sampled_from([100, 512, 8192, 20_000]),
    share_done=st.floats(0, 1),
)
def test_a_prompts_chunks_are_those_of_the_arrays(name, prompt, chunk, share_done):
    prefill = PrefillModel(load_hardware(name), FLASH)
    done = int(share_done * prompt)
    found = prefill.prompt(prompt, chunk, done)
    start = np.arange(done, prompt, chunk)
    length = np.minimum(chunk, prompt - start)
    assert [tokens for tokens, _ in found] == length.tolist()
    assert [seconds for _, seconds in found] == pytest.approx(prefill.seconds(start, length))


def test_a_prompt_prefilled_elsewhere_arrives_through_network_mirror_and_link():
    server = serve(RECALL, (0, PROMPT, 65), prefill="separate", network_bytes_per_s=1e9)
    request = server.log.requests[0]
    there_s = (
        sum(seconds for _, seconds in PREFILL.prompt(PROMPT, 8192))
        + (FLASH.full_kv_bytes(PROMPT) + FLASH.window_bytes) / 1e9
    )
    first_set_s = float(GatherCurve(H100.link).seconds(716, 800 * 21 * 716))
    assert request.first_token_s == pytest.approx(there_s + first_set_s)
    assert server.log.tokens == 65


def test_two_gpus_that_share_out_a_prompt_receive_and_write_half_of_it_each():
    hw = H100.deployed(Deployment(tp=4, cp=2))
    prompt_s = sum(seconds for _, seconds in PrefillModel(hw, FLASH).prompt(PROMPT, 8192))
    server = serve(RECALL, (0, PROMPT, 65), hw=hw, prefill="separate", network_bytes_per_s=1e9)
    sent_s = (FLASH.full_kv_bytes(PROMPT) + FLASH.window_bytes) / 2 / 1e9
    first_set_s = float(GatherCurve(H100.link).seconds(716, 800 * 21 * 716 / 2))
    first_s = server.log.requests[0].first_token_s
    assert first_s == pytest.approx(prompt_s + sent_s + first_set_s)
    missing = ledger(
        on_miss="fetch",
        params={"budget": "800 entries"},
        demand_loads=np.full((128, 1), 100, np.int32),
    )
    plain, written = (
        serve(missing, (0, PROMPT, 10), hw=hw, prefill="chunked", residency=how).log.requests[0]
        for how in ("policy", "hisparse")
    )
    wait_s = FLASH.host_kv_bytes(PROMPT) / 2 / hw.link.bandwidth_bytes_per_s.value
    assert written.finished_s - plain.finished_s == pytest.approx(wait_s)


def test_the_time_of_chunks_is_booked_where_one_of_two_ranks_has_any():
    for layout in ({}, {"dp": 2, "tp": 4}):
        hw = H100.deployed(Deployment(**layout))
        server = serve(WHOLE, (0, PROMPT, 65), hw=hw, prefill="chunked")
        chunks = PrefillModel(hw, FLASH).prompt(PROMPT, 8192)
        assert server.log.prefill_s == pytest.approx(sum(seconds for _, seconds in chunks))


def test_what_is_in_use_is_sampled_when_a_prompt_arrives_from_elsewhere():
    """The server has waited until then, and its first step takes a while."""
    server = serve(RECALL, (0, PROMPT, 65), prefill="separate", network_bytes_per_s=1e9)
    first_s = server.log.requests[0].first_token_s
    assert first_s in [sample[0] for sample in server.log.samples]
    assert server.log.tokens_by(first_s) == 1


def test_where_nobody_timed_it_a_chunk_takes_its_operations_or_the_reading_of_weights():
    """Projections and experts are split over eight GPUs; attention is not, at the chunk's mean
    context.
    """
    model = PrefillModel(H100, FLASH)
    assert not model.lower_bound
    model._timed = None
    assert model.lower_bound
    found = model.seconds(np.array([0, 8192]), np.array([8191, 4095]))
    for start, chunk, seconds in ((0, 8191, found[0]), (8192, 4095, found[1])):
        context = start + (chunk + 1) / 2
        attended = FLASH.attention_flops_per_token(context, context / 4, 2.0)
        flops = chunk * (FLASH.split_flops_per_token / 8 + attended)
        assert seconds == pytest.approx(flops / H100.matmul_flops.value)
    one = model.seconds(np.array([0]), np.array([1]))[0]
    assert one == pytest.approx(H100.weight_bytes(FLASH) / H100.hbm_bytes_per_s.value)
    assert model.prompt(12_287, 8191, 0) == [
        (8191, pytest.approx(found[0])),
        (4096, pytest.approx(float(model.seconds(np.array([8191]), np.array([4096]))[0]))),
    ]
