"""Index keys that come and go with their entries, in the layers that no memory indexer scores: the
same decode as with all keys on the GPU.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the engine needs fmsim[model]")
pytest.importorskip("transformers", reason="the engine needs fmsim[model]")


from tiered_decode import LAYERS, LENGTHS, OPTIONS, STEPS, TARGETS, TAU, TIERED, Decoded
from tiny_indexer import lookahead

from fmsim.exec.kernels.layout import KEY, plain, read_entries
from fmsim.exec.kernels.selection.index_score import GROUP, new_scores
from fmsim.exec.kv.keys import AllKeys, ResidentKeys
from fmsim.exec.kv.resident import ResidentPages
from fmsim.exec.kv.tiered import RequestSize, TieredCache

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("options", "kernels"),
    [*((options, None) for options in OPTIONS), (OPTIONS[0], True), (OPTIONS[-1], True)],
    ids=lambda value: "kernels" if value is True else str(value or ""),
)
def test_both_places_of_keys_select_the_same_step_for_step(decoded, options, kernels, device):
    everything, tiered = (decoded(options, where, device, kernels) for where in ("all", "tiered"))
    assert tiered.batch.keys.tiered == TIERED
    assert torch.equal(tiered.ids, everything.ids)
    assert tiered.tokens == everything.tokens
    for one, other in zip(everything.ledgers, tiered.ledgers):
        assert one.lookahead_loads.sum() > 1 and one.evicted.sum() > 1
        assert (
            one.hit[:, TIERED] < one.accessed[:, TIERED]
        ).mean() > 0.2  # the selections among all keys would have been others
        for name in (
            "resident",
            "initial",
            "lookahead_loads",
            "demand_loads",
            "written",
            "evicted",
            "set_overlap",
            "scored",
        ):
            assert np.array_equal(getattr(one, name), getattr(other, name)), name
    if device == "cpu":
        assert torch.equal(tiered.batch.logits, everything.batch.logits)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=20, deadline=None)
@given(
    granularity=st.sampled_from([1, 4, 16, 64]),
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    share=st.floats(0, 1),
    layout=st.sampled_from([plain(torch.float32, 32), plain(torch.bfloat16, 32), KEY]),
    seed=st.integers(0, 2**32),
)
def test_scores_beside_entries_are_those_of_all_keys_where_pages_are(
    device, granularity, lengths, share, layout, seed
):
    generator = torch.Generator().manual_seed(seed)
    pages = [-(-length // granularity) for length in lengths]
    slots = [max(1, round(share * count)) for count in pages]
    tiers = TieredCache(
        layout,
        1,
        granularity,
        [RequestSize(count, (some,), 0, (0,)) for count, some in zip(pages, slots)],
        device,
    )
    tables = [torch.full((count + 1,), -1, dtype=torch.int32) for count in pages]
    blocks = torch.full((len(lengths), max(pages) + 1), -1, dtype=torch.int32, device=device)
    for b, (table, count, some) in enumerate(zip(tables, pages, slots)):
        table[torch.randperm(count, generator=generator)[:some]] = torch.arange(
            some, dtype=torch.int32
        )
        tables[b] = table.to(device)
        tiers.blocks(tables[b][None], blocks[None, b : b + 1, : count + 1], b)
    buffers = [new_scores(len(lengths), -(-max(lengths) // 64) * 64, device) for _ in range(2)]
    # which a selection takes; scores need none
    listing = ResidentPages(
        slots, [tiers.slot_start[0][:-1]], max(pages), granularity, torch.device(device)
    )
    everything, resident = (
        AllKeys(layout, buffers[0], device),
        ResidentKeys(tiers, 0, tables, blocks, buffers[1], listing, 0),
    )
    for b, length in enumerate(lengths):
        rows = torch.randn(length, layout.width, generator=generator).to(device)
        for keys in (everything, resident):
            keys.fill(b, rows[:-1])
            keys.append(b, rows[-1:], torch.tensor([length - 1], device=device))
    dtype = layout.dtype if layout.kind == "plain" else torch.bfloat16
    queries, weights = (
        torch.randn(len(lengths), 1, *shape, generator=generator).to(device, dtype)
        for shape in ((4, layout.width), (4,))
    )
    known, found = (
        keys.scores(queries, weights, torch.tensor(lengths, dtype=torch.int32, device=device))
        for keys in (everything, resident)
    )
    entries = torch.arange(buffers[0].scores.shape[1], device=device)
    here = blocks[:, (entries // granularity).clamp(max=blocks.shape[1] - 1)] >= 0
    # pages of other sizes may be multiplied in other blocks
    rtol, atol = (0, 0) if device == "cpu" else (1e-3, 1e-4)
    torch.testing.assert_close(
        found.scores, known.scores.masked_fill(~here, float("-inf")), rtol=rtol, atol=atol
    )
    assert torch.equal(found.maxima, found.scores.unflatten(1, (-1, GROUP)).amax(2))


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: the engine ran on the CPU only"
)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_graph_of_kernels_decodes_as_torch_does(prompts, tmp_path, options):
    spec = lookahead(tmp_path, "28 entries", TARGETS, **options)
    one, other = (Decoded(prompts(device), spec, "tiered") for device in ("cpu", "cuda"))
    assert other.tokens == one.tokens and torch.equal(other.ids, one.ids)
    torch.testing.assert_close(other.batch.logits.cpu(), one.batch.logits, atol=1e-3, rtol=0)
    assert other.batch.h2d_bytes == one.batch.h2d_bytes


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_with_room_for_everything_nothing_is_lost(prompts, tmp_path, device):
    spec = lookahead(tmp_path, "64 entries", TARGETS, threshold=1e-300)
    tiered, everything = (Decoded(prompts(device), spec, where) for where in ("tiered", "all"))
    full = Decoded(prompts(device), "full", "all")
    assert tiered.tokens == everything.tokens == full.tokens
    assert torch.equal(tiered.ids, full.ids)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{}, {"granularity": 4}], ids=str)
def test_a_page_of_keys_is_where_its_entries_are_and_the_mirror_has_them_all(
    prompts, decoded, tmp_path, options, device
):
    """At every step: new keys were written through, and recalled ones, ahead of a decision or not,
    came whole.
    """
    spec, granularity = (
        lookahead(tmp_path, "28 entries", TARGETS, **options),
        options.get("granularity", 1),
    )

    def compare(batch):
        cache, layout = batch.tiers.keys, batch.tiers.keys.layout
        for b, request in enumerate(batch.requests):
            closed = (len(request.prompt.tokens) + request.step) // 4
            table = request.residency.table[0, :-1]
            for number in range(len(TIERED)):
                ids = torch.arange(closed, device=table.device)
                places = cache.page_start[b] * granularity + ids.to(cache.mirror.device)
                kept = read_entries(cache.mirror[number], layout, places).to(ids.device)
                assert kept.abs().amax(1).min() > 0
                slot = table[ids // granularity]
                here = read_entries(
                    cache.pool[number],
                    layout,
                    (cache.slot_start[number][b] + slot) * granularity + ids % granularity,
                )
                assert (
                    torch.equal(here[slot >= 0], kept[slot >= 0])
                    and (slot >= 0).any()
                    and ((slot < 0).any() or b > 0)
                )

    tiered = Decoded(prompts(device), spec, "tiered", compare)
    everything = decoded(options, "all", device)
    for b, closed in enumerate((length + STEPS) // 4 for length in LENGTHS):
        for number, layer in enumerate(TIERED):
            cache = tiered.batch.tiers.keys
            kept = read_entries(
                cache.mirror[number],
                cache.layout,
                cache.page_start[b] * granularity + torch.arange(closed),
            )
            torch.testing.assert_close(
                kept,
                everything.batch.keys.kept[layer].read(b, closed).cpu(),
                atol=0 if device == "cpu" else 1e-5,
                rtol=0,
            )


def test_what_a_decision_will_recall_is_copied_ahead_keys_too(prompts, tmp_path):
    spec, seen = lookahead(tmp_path, "28 entries", TARGETS), []

    def watch(batch):
        seen.append(tuple(int(cache.recalled_pages) for cache in batch.tiers.caches))

    batch = Decoded(prompts("cpu")[:1], spec, "tiered", watch).batch
    loads = batch.requests[0].ledger().lookahead_loads[:, 0]
    first = np.flatnonzero(loads)[0]
    entries, keys = np.array(seen).T
    assert first > TAU and keys[first - TAU - 1] == 0
    assert 0 < keys[first - 1] <= loads[first] * len(TIERED)  # of the decision that is yet to come
    assert keys[-1] == loads.sum() * len(TIERED)
    assert (entries * len(TIERED) == keys * LAYERS).all()
