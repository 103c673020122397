"""Copies rows between two memories by a list of moves: recall from pinned host memory, and write-through to it.

The kernel reads pinned memory directly over the link. It has a persistent grid of a few programs, so that it leaves the other
multiprocessors to the decode beside it. A row (a slot of entries) may have any size that is a multiple of 8 bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.lang import runs_compiled, tl, triton


def copy_rows(source: Tensor, target: Tensor, pages: Tensor, slots: Tensor, counts: Tensor, programs: int | None = None) -> None:
    """``target[g, slots[g, i]] = source[g, pages[g, i]]`` for the first ``counts[g]`` moves of each group g (a layer).

    ``source`` uint8 [G, pages, row bytes] and ``target`` uint8 [G, slots, row bytes], contiguous; either may be pinned host
    memory. ``pages`` and ``slots`` [G, n], int32 or int64, with -1 in either for a move to be left out; ``counts`` int32 [G]; the three
    on the device. Slots of a group are distinct. ``programs``: how many the copy may take, at most a multiprocessor each.
    """
    if runs_compiled(pages):
        copy_rows_triton(source, target, pages, slots, counts, tune=tuning.GATHER._replace(programs=programs or tuning.GATHER.programs))
    else:
        copy_rows_reference(source, target, pages, slots, counts)


def copy_rows_reference(source, target, pages, slots, counts) -> None:
    for group, count in enumerate(counts.tolist()):
        page, slot = pages[group, :count].long(), slots[group, :count].long()
        moved = (page >= 0) & (slot >= 0)
        rows = source[group, page[moved].to(source.device)]
        target[group, slot[moved].to(target.device)] = rows.to(target.device)


def copy_rows_triton(source, target, pages, slots, counts, tune=tuning.GATHER) -> None:
    groups, source_rows, row_bytes = source.shape
    row_words = row_bytes // 8
    _copy_rows[(tune.programs,)](
        source.view(torch.int64), target.view(torch.int64), pages, slots, counts, groups, pages.stride(0), slots.stride(0),
        ROW_WORDS=row_words, SOURCE_WORDS=source_rows * row_words, TARGET_WORDS=target.shape[1] * row_words,
        BLOCK=tune.block_words, STAGES=tune.stages, num_warps=tune.warps,
    )  # fmt: skip


@triton.jit
def _copy_rows(
    source, target, pages, slots, counts, groups, pages_stride, slots_stride,
    ROW_WORDS: tl.constexpr, SOURCE_WORDS: tl.constexpr, TARGET_WORDS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: every n-th block of words, counted through the rows of a group's list; group after group."""
    for group in range(groups):
        words = tl.load(counts + group).to(tl.int64) * ROW_WORDS
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for start in tl.range(first, words, tl.num_programs(0) * BLOCK, num_stages=STAGES):
            word = start + tl.arange(0, BLOCK)
            row = word // ROW_WORDS
            page = tl.load(pages + row, mask=word < words, other=-1).to(tl.int64)
            slot = tl.load(slots + row, mask=word < words, other=-1).to(tl.int64)
            moved = (page >= 0) & (slot >= 0)
            value = tl.load(source + page * ROW_WORDS + word % ROW_WORDS, mask=moved)
            tl.store(target + slot * ROW_WORDS + word % ROW_WORDS, value, mask=moved)
        source += SOURCE_WORDS
        target += TARGET_WORDS
        pages += pages_stride
        slots += slots_stride
