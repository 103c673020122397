"""The token that a model's logits favour."""

from __future__ import annotations

import torch
from torch import Tensor

from fmsim.exec.kernels.lang import (
    after_previous,
    cdiv,
    next_power_of_2,
    overlapped,
    runs_compiled,
    tl,
    triton,
)

BLOCK = 1024  # logits of a program


def likeliest(logits: Tensor) -> Tensor:
    """The place of the greatest of each row of ``logits`` [B, V] -> int64 [B]; the first of equals,
    and of those that are nan or infinite.
    """
    run = likeliest_triton if runs_compiled(logits) else likeliest_reference
    return run(logits)


def likeliest_reference(logits) -> Tensor:
    return logits.nan_to_num(float("inf"), float("inf"), float("-inf")).argmax(-1)


def likeliest_triton(logits) -> Tensor:
    """The greatest of each block, then of these: one program would read a row for long."""
    rows, width = logits.shape
    assert logits.is_contiguous()
    blocks = cdiv(width, BLOCK)
    best = torch.empty(rows, blocks, dtype=torch.float32, device=logits.device)
    places = torch.empty(rows, blocks, dtype=torch.int32, device=logits.device)
    found = torch.empty(rows, dtype=torch.int64, device=logits.device)
    how = {"num_warps": 4, **overlapped(logits)}
    _best_of_block[(rows, blocks)](logits, best, places, WIDTH=width, BLOCK=BLOCK, **how)
    padded = next_power_of_2(blocks)
    _best_of_all[(rows,)](best, places, found, BLOCKS=blocks, BLOCKS_PADDED=padded, **how)
    return found


@triton.jit
def _best_of_block(logits, best_out, places_out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One program: the greatest of a block of a row, and the first place that has it."""
    after_previous()
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = block * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits + row * WIDTH + place, mask=place < WIDTH, other=float("-inf"))
    value = value.to(tl.float32)
    value = tl.where(value == value, value, float("inf"))
    best = tl.max(value, 0)
    at = row * tl.num_programs(1) + block
    tl.store(best_out + at, best)
    tl.store(places_out + at, tl.min(tl.where(value == best, place, WIDTH), 0))


@triton.jit
def _best_of_all(best, places, out, BLOCKS: tl.constexpr, BLOCKS_PADDED: tl.constexpr):
    """One program: a row's blocks."""
    after_previous()
    row, block = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCKS_PADDED)
    at = row * BLOCKS + block
    value = tl.load(best + at, mask=block < BLOCKS, other=float("-inf"))
    place = tl.load(places + at, mask=block < BLOCKS, other=2**31 - 1)
    first = tl.min(tl.where(value == tl.max(value, 0), place, 2**31 - 1), 0)
    tl.store(out + row, first.to(tl.int64))
