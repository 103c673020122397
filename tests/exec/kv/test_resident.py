"""Selecting among the listed resident pages: the same ids as the best of all entries' scores with
the absent ones left out.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the engine needs fmsim[model]")

from kernel_pools import on_each_device

from fmsim.exec.kernels.layout import KEY, slots_of, write_entries
from fmsim.exec.kernels.selection.index_score import index_scores_reference
from fmsim.exec.kernels.selection.top_k import top_k_reference
from fmsim.exec.kv.resident import ResidentPages


def test_a_listing_by_hand():
    """Two groups of one request, pages of 4 entries, 10 of them visible: page 2 holds two so
    far.
    """
    listing = ResidentPages([3], [[5], [5]], 3, 4, torch.device("cpu"))
    listing.list(torch.tensor([[2, -1, 0], [-1, -1, -1]], dtype=torch.int32))
    listing.see(10)
    assert listing.entries[:, 0].tolist() == [[0, 1, 2, 3, 8, 9, 10, 11, *[-1] * 5], [-1] * 13]
    assert listing.table[:, 0].tolist() == [[7, 5, -1], [-1, -1, -1]]
    assert listing.lengths[:, 0].tolist() == [6, 0]
    assert listing.kept_table[:, 0].tolist() == [[0, 2, -1], [-1, -1, -1]]
    listing.list(torch.tensor([[0, 1, -1], [2, 1, 0]], dtype=torch.int32), request=0)
    listing.see(10)
    assert listing.lengths[:, 0].tolist() == [8, 10]
    assert listing.table[:, 0].tolist() == [[5, 6, -1], [7, 6, 5]]


@on_each_device
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    granularity=st.sampled_from([1, 4, 64]),
    batch=st.integers(1, 3),
    top_k=st.sampled_from([1, 24]),
    alike=st.booleans(),
    together=st.booleans(),
)
def test_it_selects_as_among_all_with_the_absent_left_out(
    device, seed, granularity, batch, top_k, alike, together
):
    generator = torch.Generator().manual_seed(seed)
    visible, slots = (
        torch.randint(1, 300, (batch,), generator=generator),
        int(torch.randint(1, 90, (), generator=generator)),
    )
    visible = visible[:1].expand(batch) if alike else visible
    pages = -(-int(visible.max()) // granularity)
    held = torch.full((batch, slots), -1, dtype=torch.int32)
    for b in range(batch):
        there = -(-int(visible[b]) // granularity)
        some = torch.randperm(there, generator=generator)[:slots]
        # the page being filled is always there
        some = torch.cat((torch.tensor([there - 1]), some[some != there - 1]))[:slots]
        held[b, torch.randperm(slots, generator=generator)[: len(some)]] = some.int()
    held = held[:1].expand(batch, -1) if alike else held
    pool, table = (
        KEY.new_pool(batch * slots, granularity),
        torch.full((batch, pages), -1, dtype=torch.int32),
    )
    for b in range(batch):
        for slot, page in enumerate(held[b].tolist()):
            if page >= 0:
                table[b, page] = b * slots + slot
    ids = torch.arange(pages * granularity)
    places = slots_of(table, ids.expand(batch, -1), granularity)
    # few values: scores are exact, and some are equal
    keys = torch.randn(batch, len(ids), KEY.width, generator=generator).round() / 4
    write_entries(pool, KEY, places.flatten(), keys.flatten(0, 1))
    queries, weights = (
        torch.randn(batch, 4, *size, generator=generator).round() for size in ((KEY.width,), ())
    )
    queries, lengths = queries.to(torch.bfloat16), visible.int()
    expected = top_k_reference(
        index_scores_reference(queries, weights, pool, KEY, table, lengths).scores, lengths, top_k
    )
    listing = ResidentPages(
        [slots] * batch,
        [[b * slots for b in range(batch)]],
        pages,
        granularity,
        torch.device(device),
    )
    if alike:
        listing.list(held[:1].to(device))
        listing.see(int(visible[0]))
    elif together:
        listing.list(held[None].to(device), slice(0, batch))
        listing.see(lengths.to(device))
    else:
        for b in range(batch):
            listing.list(held[b : b + 1].to(device), b)
        listing.see(lengths.to(device))
    of = queries.to(device), weights.to(device)
    assert torch.equal(listing.best(0, *of, pool.to(device), KEY, top_k).cpu(), expected)
    every = KEY.new_pool(batch * pages, granularity)
    write_entries(every, KEY, torch.arange(batch * pages * granularity), keys.flatten(0, 1))
    assert torch.equal(
        listing.best(0, *of, every.to(device), KEY, top_k, kept=True).cpu(), expected
    )
