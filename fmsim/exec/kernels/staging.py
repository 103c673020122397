"""What a layer's misses become in one launch: the list of rows to copy into spare pages, and the
block table that finds them there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fmsim.exec.kernels.lang import next_power_of_2, runs_compiled, tl, triton


class Staged(NamedTuple):
    """Moves for `gather.copy_rows` in one group: ``pages`` of the mirror and ``to`` pages of the
    pool, int32 [1, B x n], -1 where nothing is fetched; ``count`` int32 [1], their number.
    """

    pages: Tensor
    to: Tensor
    count: Tensor


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
    return Staged(
        *(part.flatten()[None].int() for part in moves),
        torch.full((1,), pages.numel(), dtype=torch.int32, device=pages.device),
    )


def stage_triton(pages, fetched, first_page, first_stage, blocks, staged) -> Staged:
    batch, count = pages.shape
    out = Staged(
        *(
            torch.empty(1, size, dtype=torch.int32, device=pages.device)
            for size in (batch * count, batch * count)
        ),
        staged.new_empty(1, dtype=torch.int32),
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
    count_out,
    count,
    pages_stride,
    fetched_stride,
    blocks_stride,
    BLOCK: tl.constexpr,
):
    """One program: one request."""
    b, place = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = place < count
    page = tl.load(pages + b * pages_stride + place, mask=inside, other=-1)
    taken = tl.load(fetched + b * fetched_stride + place, mask=inside, other=0) != 0
    to = tl.load(first_stage + b) + place
    tl.store(
        pages_out + b * count + place,
        tl.where(taken, page + tl.load(first_page + b), -1).to(tl.int32),
        mask=inside,
    )
    tl.store(to_out + b * count + place, tl.where(taken, to, -1).to(tl.int32), mask=inside)
    tl.store(blocks + b * blocks_stride + page, to.to(tl.int32), mask=taken)
    tl.atomic_add(staged, tl.sum(taken.to(tl.int64), 0))
    tl.store(count_out, count * tl.num_programs(0), mask=b == 0)
