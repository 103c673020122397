"""Spare pages for a step's misses: the kernel against its reference."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_pools import on_each_device

from fmsim.exec.kernels.staging import stage_reference, stage_triton


@on_each_device
@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    batch=st.integers(1, 4),
    width=st.integers(1, 40),
    share=st.floats(0, 1),
    alike=st.booleans(),
)
def test_the_kernel_is_the_reference(device, seed, batch, width, share, alike):
    generator = torch.Generator().manual_seed(seed)
    rows = 1 if alike else batch
    pages = torch.stack([torch.randperm(50, generator=generator)[:width] for _ in range(rows)])
    fetched = torch.rand(rows, width, generator=generator) < share
    pages = pages.masked_fill(~fetched & (torch.rand(rows, width, generator=generator) < 0.3), -1)
    first_page, first_stage = torch.arange(batch) * 50, 200 + torch.arange(batch) * width
    blocks = torch.randint(-1, 200, (batch, 51), generator=generator, dtype=torch.int32)
    blocks[:, -1] = -1
    given = [part.to(device).expand(batch, -1) for part in (pages, fetched)] + [
        first_page.to(device),
        first_stage.to(device),
    ]
    found = []
    for run in (stage_reference, stage_triton):
        table, staged = blocks.to(device), torch.full((), 7, dtype=torch.int64, device=device)
        moves = run(*given, table, staged)
        assert {part.dtype for part in moves} == {torch.int32}
        listed = torch.arange(width, device=device) < moves.counts[:, None]
        found.append([*(part[listed] for part in moves[:2]), moves.counts, table, staged])
    for expected, part in zip(*found):
        assert torch.equal(part, expected) and part.dtype == expected.dtype


def test_by_hand():
    blocks, staged = (
        torch.tensor([[4, -1, -1, -1]], dtype=torch.int32),
        torch.zeros((), dtype=torch.int64),
    )
    pages, fetched = torch.tensor([[0, 2, -1, 1]]), torch.tensor([[False, True, False, True]])
    moves = stage_reference(pages, fetched, torch.tensor([10]), torch.tensor([6]), blocks, staged)
    assert (
        moves.pages[0, :2].tolist() == [12, 11]
        and moves.to[0, :2].tolist() == [7, 9]
        and moves.counts.tolist() == [2]
    )
    assert blocks.tolist() == [[4, 9, 7, -1]] and staged == 2
