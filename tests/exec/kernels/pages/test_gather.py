"""Row copies by a list: the kernel against its reference over row sizes, paddings and counts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_pools import on_each_device

from fmsim.exec.kernels.pages.gather import copy_rows_reference, copy_rows_triton
from fmsim.exec.kernels.tuning import GatherTuning


@on_each_device
@settings(max_examples=40 if torch.cuda.is_available() else 8, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    groups=st.integers(1, 3),
    row_bytes=st.sampled_from([8, 16, 132, 584, 716 * 4, 2336]),
    moves=st.integers(1, 40),
    padding=st.sampled_from([0.0, 0.3, 1.0]),
    ids=st.sampled_from([torch.int32, torch.int64]),
    programs=st.integers(1, 5),
    stages=st.sampled_from([1, 4]),
    shared=st.booleans(),
)
def test_the_kernel_is_the_reference(
    device, seed, groups, row_bytes, moves, padding, ids, programs, stages, shared
):
    """Groups with memories of their own, or that share one."""
    generator = torch.Generator().manual_seed(seed)
    memories = 1 if shared else groups
    source, target = (
        torch.randint(0, 256, (memories, rows, row_bytes), dtype=torch.uint8, generator=generator)
        for rows in (50, 125)
    )
    pages = torch.randint(0, 50, (groups, moves), generator=generator)
    slots = torch.randperm(125, generator=generator)[: groups * moves].view(groups, moves)
    for part in (pages, slots):
        part.masked_fill_(torch.rand(part.shape, generator=generator) < padding / 2, -1)
    counts = torch.randint(0, moves + 1, (groups,), generator=generator).to(torch.int32)
    lists = [part.to(ids).to(device) for part in (pages, slots)] + [counts.to(device)]
    expected = target.clone()
    every = lambda rows: rows.expand(groups, -1, -1)
    copy_rows_reference(every(source), every(expected), *lists)
    if device == "cuda":  # recall: the source stays in host memory, but for copies within the GPU
        source, target = (
            source.to(device) if stages == 1 else source.pin_memory(),
            target.to(device),
        )
    copy_rows_triton(
        every(source),
        every(target),
        *lists,
        tune=GatherTuning(segment_words=64, tile_words=256, programs=programs, stages=stages),
    )
    assert torch.equal(target.cpu(), expected)


def test_by_hand():
    source, target = (
        torch.arange(32, dtype=torch.uint8).view(1, 4, 8),
        torch.zeros(1, 3, 8, dtype=torch.uint8),
    )
    pages, slots = torch.tensor([[3, -1, 0, 2]]), torch.tensor([[1, 0, -1, 2]])
    copy_rows_reference(source, target, pages, slots, torch.tensor([3], dtype=torch.int32))
    assert target[0].tolist() == [[0] * 8, list(range(24, 32)), [0] * 8]


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no CUDA device: pinned memory and its addresses beyond 2^31 bytes need one",
)
def test_rows_beyond_two_gib_of_pinned_memory():
    rows = 2**31 // 37_376 + 1000
    source = torch.zeros(1, rows, 37_376, dtype=torch.uint8, pin_memory=True)
    source[0, -1] = 7
    target = torch.zeros(1, 2, 37_376, dtype=torch.uint8, device="cuda")
    lists = [torch.tensor([[value]], device="cuda") for value in (rows - 1, 1)]
    copy_rows_triton(source, target, *lists, torch.ones(1, dtype=torch.int32, device="cuda"))
    assert (target[0, 1] == 7).all() and (target[0, 0] == 0).all()
