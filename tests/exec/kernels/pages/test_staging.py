"""A layer's misses in spare pages, and from there in slots: kernels against their references."""

from functools import partial

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_pools import on_each_device

from fmsim.exec.kernels.pages.staging import (
    keep_reference,
    keep_triton,
    stage_reference,
    stage_triton,
)
from fmsim.exec.kernels.tuning import StagingTuning


@on_each_device
@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    batch=st.integers(1, 4),
    width=st.integers(1, 40),
    share=st.floats(0, 1),
    alike=st.booleans(),
    row_bytes=st.sampled_from([132, 584, 2336]),
    programs=st.sampled_from([1, 8]),
)
def test_staging_is_its_reference(device, seed, batch, width, share, alike, row_bytes, programs):
    generator = torch.Generator().manual_seed(seed)
    rows = 1 if alike else batch
    pages = torch.stack([torch.randperm(50, generator=generator)[:width] for _ in range(rows)])
    fetched = torch.rand(rows, width, generator=generator) < share
    pages = pages.masked_fill(~fetched & (torch.rand(rows, width, generator=generator) < 0.3), -1)
    first_page, first_stage = torch.arange(batch) * 50, 3 + torch.arange(batch) * width
    source, target = (
        torch.randint(0, 256, (count, row_bytes), dtype=torch.uint8, generator=generator)
        for count in (50 * batch, 4 + batch * width)
    )
    blocks = torch.randint(-1, 200, (batch, 51), generator=generator, dtype=torch.int32)
    blocks[:, -1] = -1
    given = [part.to(device).expand(batch, -1) for part in (pages, fetched)] + [
        first_page.to(device),
        first_stage.to(device),
    ]
    if device == "cuda":  # the source stays in host memory
        source = source.pin_memory()
    tune = StagingTuning(segment_words=64, tile_words=256, programs=programs, most_places=16)
    found = []
    for run in (stage_reference, partial(stage_triton, tune=tune)):
        table, staged = blocks.to(device), torch.full((), 7, dtype=torch.int64, device=device)
        pool = target.to(device, copy=True)
        run(source, pool, *given, table, staged)
        found.append((pool, table, staged))
    for expected, part in zip(*found):
        assert torch.equal(part, expected) and part.dtype == expected.dtype


@on_each_device
@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    layers=st.integers(1, 3),
    batch=st.integers(1, 3),
    width=st.integers(1, 40),
    share=st.floats(0, 1),
    alike=st.booleans(),
    row_bytes=st.sampled_from([132, 584, 2336]),
    programs=st.sampled_from([1, 100]),
)
def test_keeping_is_its_reference(
    device, seed, layers, batch, width, share, alike, row_bytes, programs
):
    """Of each request 45 slots, then as many spare pages, in layers one after another."""
    generator = torch.Generator().manual_seed(seed)
    of_requests = (layers, 1 if alike else batch)
    rows = [torch.randperm(45, generator=generator)[:width] for _ in range(of_requests[1] * layers)]
    pages = torch.stack(rows).view(*of_requests, width)
    slots = pages[..., torch.randperm(width, generator=generator)]
    slots = slots.masked_fill(torch.rand(slots.shape, generator=generator) > share, -1)
    blocks = 45 * (batch + torch.arange(batch)[:, None]) + torch.arange(46)
    blocks = blocks.expand(layers, -1, -1).int().contiguous()
    blocks = blocks.masked_fill(torch.rand(blocks.shape, generator=generator) < 0.2, -1)
    first = 90 * batch * torch.arange(layers)
    slot_page = first[:, None] + 45 * torch.arange(batch)
    pool = torch.randint(
        0, 256, (90 * batch * layers, row_bytes), dtype=torch.uint8, generator=generator
    )
    given = [first, slot_page, *(part.expand(-1, batch, -1) for part in (pages, slots)), blocks]
    given = [part.to(device) for part in given]
    tune = StagingTuning(segment_words=64, tile_words=256, programs_within=programs, most_places=16)
    expected, found = (pool.to(device, copy=True) for _ in range(2))
    keep_reference(expected, *given)
    keep_triton(found, *given, tune=tune)
    assert torch.equal(found, expected)


def test_by_hand():
    blocks, staged = (
        torch.tensor([[4, -1, -1, -1]], dtype=torch.int32),
        torch.zeros((), dtype=torch.int64),
    )
    pages, fetched = torch.tensor([[0, 2, -1, 1]]), torch.tensor([[False, True, False, True]])
    source = torch.arange(13, dtype=torch.uint8)[:, None].repeat(1, 8)
    target = torch.zeros(11, 8, dtype=torch.uint8)
    starts = torch.tensor([10]), torch.tensor([6])
    stage_reference(source, target, pages, fetched, *starts, blocks, staged)
    assert target[:, 0].tolist() == [0] * 7 + [12, 0, 11, 0]
    assert blocks.tolist() == [[4, 9, 7, -1]] and staged == 2
    one = torch.zeros(1, dtype=torch.int64)
    pages, slots = torch.tensor([[[2, 1, 0, -1]]]), torch.tensor([[[1, -1, 2, -1]]])
    keep_reference(target, one, one[None], pages, slots, blocks[None])
    assert target[:, 0].tolist() == [0, 12, 0, 0, 0, 0, 0, 12, 0, 11, 0]
    blocks[0, 0] = -1  # it was not staged
    target[4] = 7
    keep_reference(target, one, one[None], pages, slots, blocks[None])
    assert target[2, 0] == 0
