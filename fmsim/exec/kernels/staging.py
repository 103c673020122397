"""What a layer's misses become in one launch: lists of rows to copy into spare pages, and the block
table that finds them there.

The lists have misses alone. A copy that went through all pages that a step selects, most of which
are here, would take longer than the misses.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fmsim.exec.kernels.lang import (
    after_previous,
    next_power_of_2,
    overlapped,
    runs_compiled,
    tl,
    triton,
)


class Staged(NamedTuple):
    """Moves for `gather.copy_rows`, a request's as a group: ``pages`` of the mirror and ``to``
    pages of the pool, int32 [B, n]; ``counts`` int32 [B], how many of them there are. What is
    behind means nothing.
    """

    pages: Tensor
    to: Tensor
    counts: Tensor


def stage(
    pages: Tensor,
    fetched: Tensor,
    first_page: Tensor,
    first_stage: Tensor,
    blocks: Tensor,
    staged: Tensor,
) -> Staged:
    """Of each request's ``pages`` int64 [B, n], those ``fetched`` bool [B, n] get the spare pages
    ``first_stage[b]``, ... of the pool, in their order: they are entered in ``blocks`` int32 [B, P
    + 1] and counted in ``staged`` int64 [].

    ``first_page`` int64 [B]: where a request's pages begin in the mirror.
    """
    run = stage_triton if runs_compiled(pages) else stage_reference
    return run(pages, fetched, first_page, first_stage, blocks, staged)


def stage_reference(pages, fetched, first_page, first_stage, blocks, staged) -> Staged:
    to = torch.where(
        fetched, first_stage[:, None] + torch.arange(pages.shape[1], device=pages.device), -1
    )
    staged += fetched.sum()
    blocks.scatter_(1, torch.where(fetched, pages, blocks.shape[1] - 1), to.int())
    blocks[:, -1] = -1
    moves = (torch.where(fetched, pages + first_page[:, None], -1), to)
    to_front = torch.argsort(~fetched, dim=1, stable=True)
    return Staged(
        *(part.gather(1, to_front).int() for part in moves), fetched.sum(1, dtype=torch.int32)
    )


def stage_triton(pages, fetched, first_page, first_stage, blocks, staged) -> Staged:
    batch, count = pages.shape
    out = Staged(
        *(
            torch.empty(shape, dtype=torch.int32, device=pages.device)
            for shape in (pages.shape, pages.shape, (batch,))
        )
    )
    assert pages.stride(1) == fetched.stride(1) == blocks.stride(1) == 1, (
        "a request's pages lie side by side"
    )
    _stage[(batch,)](
        pages,
        fetched.view(torch.uint8),
        first_page,
        first_stage,
        blocks,
        staged,
        *out,
        count,
        pages.stride(0),
        fetched.stride(0),
        blocks.stride(0),
        BLOCK=next_power_of_2(count),
        num_warps=4,
        **overlapped(pages),
    )
    return out


@triton.jit
def _stage(
    pages,
    fetched,
    first_page,
    first_stage,
    blocks,
    staged,
    pages_out,
    to_out,
    counts_out,
    count,
    pages_stride,
    fetched_stride,
    blocks_stride,
    BLOCK: tl.constexpr,
):
    """One program: one request."""
    b, place = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = place < count
    after_previous()
    page = tl.load(pages + b * pages_stride + place, mask=inside, other=-1)
    taken = tl.load(fetched + b * fetched_stride + place, mask=inside, other=0) != 0
    to = tl.load(first_stage + b) + place
    rank = tl.cumsum(taken.to(tl.int32), 0) - 1
    moves = tl.sum(taken.to(tl.int32), 0)
    tl.store(counts_out + b, moves)
    source = page + tl.load(first_page + b)
    tl.store(pages_out + b * count + rank, source.to(tl.int32), mask=taken)
    tl.store(to_out + b * count + rank, to.to(tl.int32), mask=taken)
    tl.store(blocks + b * blocks_stride + page, to.to(tl.int32), mask=taken)
    tl.atomic_add(staged, moves.to(tl.int64))
