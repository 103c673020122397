"""Entries that come before their pages: the kernel against its reference, and that against what
lies in the mirror.
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_pools import on_each_device

from fmsim.exec.kernels.layout import KEY, LATENT, plain
from fmsim.exec.kernels.pages.late_entries import bring_entries_reference, bring_entries_triton

LAYOUTS = (LATENT, KEY, plain(torch.bfloat16, 24))


def wanted(ids):
    """Requests and entries of those that are none of the padding."""
    b, place = (ids >= 0).nonzero(as_tuple=True)
    return b, ids[b, place]


@on_each_device
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    batch=st.integers(1, 3),
    count=st.integers(1, 140),
    per_page=st.sampled_from([1, 3, 64]),
    layout=st.sampled_from(LAYOUTS),
    share=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_late_entries_alone_are_brought(device, seed, batch, count, per_page, layout, share):
    pages, slots = 7, 4
    generator = torch.Generator().manual_seed(seed)

    def drawn(n):
        shape = (n, per_page * layout.entry_bytes)
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    mirror, before = drawn(batch * pages), drawn(batch * slots)
    blocks = torch.full((batch, pages + 1), -1, dtype=torch.int32)
    for b in range(batch):
        there = torch.randperm(pages, generator=generator)[:slots]
        blocks[b, there] = torch.arange(b * slots, (b + 1) * slots, dtype=torch.int32)
    on_the_way = (torch.rand(batch * slots, generator=generator) < share).to(torch.uint8)
    ids = torch.randint(-1, pages * per_page, (batch, count), generator=generator).int()
    first = torch.arange(batch) * pages
    given_ = [part.to(device) for part in (ids, blocks, on_the_way, first, mirror)]
    pools = [before.to(device) for _ in range(2)]
    for run, pool in zip((bring_entries_reference, bring_entries_triton), pools, strict=True):
        run(*given_, pool, layout)
    assert torch.equal(*pools)
    expected = before.clone()
    for b, entry in zip(*(part.tolist() for part in wanted(ids)), strict=True):
        block, number = int(blocks[b, entry // per_page]), entry % per_page
        if block >= 0 and on_the_way[block]:
            kept = mirror[b * pages + entry // per_page]
            values, scales = layout.value_bytes, layout.scale_bytes
            for start, size in ((0, values), (per_page * values, scales)):
                part = slice(start + number * size, start + (number + 1) * size)
                expected[block, part] = kept[part]
    assert torch.equal(pools[0].cpu(), expected)
