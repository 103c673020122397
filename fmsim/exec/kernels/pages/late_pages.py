"""Pages that come into their slots while steps go on, and slots that are taken back meanwhile.

Each slot has a number: that of the copy which it waits for, its negative while the page is being
copied, and 0 when nothing is to come. A program claims a page before it copies it, by an atomic
compare-and-swap. Who gives the slot to another page does the same in the other direction: what is
not claimed yet stays away, and what is claimed is waited for, a page's copy long.

Programs stay few, so that they leave the other multiprocessors to the decode beside them. Each has
64 KiB of rows on the way, since the link's latency times its bandwidth is over 100 KB. As in
`gather.py` a row may have any size that is a multiple of 4 bytes, and is read by lines of the
source. No launch begins before the one before it ends: its programs would take multiprocessors
only to wait.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.lang import (
    cdiv,
    next_power_of_2,
    overlapped,
    runs_compiled,
    tl,
    triton,
    wait_for_previous,
)
from fmsim.exec.kernels.pages.gather import row_parts

TAKEN_BACK = 1024  # slots that a program looks at


def copy_late(
    source: Tensor,
    target: Tensor,
    pages: Tensor,
    slots: Tensor,
    counts: Tensor,
    waiting: Tensor,
    number: int,
) -> None:
    """``target[g, slots[g, i]] = source[g, pages[g, i]]`` for those of the first ``counts[g]``
    moves of each group g (a layer) whose slot still waits for copy ``number`` > 0.

    All but the last two are `copy_rows`' arguments. ``waiting`` int32 [G, slots + 1], on the
    device: 0 when the page is here; the last column is padding's.
    """
    run = copy_late_triton if runs_compiled(pages) else copy_late_reference
    run(source, target, pages, slots, counts, waiting, number)


def copy_late_reference(source, target, pages, slots, counts, waiting, number) -> None:
    for group, count in enumerate(counts.tolist()):
        page, slot = pages[group, :count].long(), slots[group, :count].long()
        moved = (page >= 0) & (slot >= 0)
        moved &= waiting[group, torch.where(moved, slot, -1)] == number
        rows = source[group, page[moved].to(source.device)]
        target[group][slot[moved].to(target.device)] = rows.to(target.device)
        waiting[group, slot[moved]] = 0


def copy_late_triton(source, target, pages, slots, counts, waiting, number) -> None:
    tune = tuning.LATE
    groups, _, row_bytes = source.shape
    row = row_parts(row_bytes, tune.tile_words)
    source, target = source.view(row.word), target.view(row.word)
    _copy_late[(tuning.late_programs(row_bytes),)](
        source,
        target,
        pages,
        slots,
        counts,
        waiting,
        number,
        groups,
        source.stride(0),
        target.stride(0),
        pages.stride(0),
        slots.stride(0),
        waiting.stride(0),
        ROW_WORDS=row.words,
        LINE_WORDS=row.line_words,
        GROUPS_PADDED=next_power_of_2(groups),
        SEGMENT=row.segment,
        SEGMENTS=row.segments,
        ROWS=tune.tile_words // row.segment,
        num_warps=tune.warps,
    )


@triton.jit(do_not_specialize=["number"])
def _copy_late(
    source,
    target,
    pages,
    slots,
    counts,
    waiting,
    number,
    groups,
    source_words,
    target_words,
    pages_stride,
    slots_stride,
    waiting_stride,
    ROW_WORDS: tl.constexpr,
    LINE_WORDS: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: every n-th tile of ROWS rows; a tile lies in one group."""
    groups_padded = tl.arange(0, GROUPS_PADDED)
    rows = tl.load(counts + groups_padded, mask=groups_padded < groups, other=0)
    tiles = tl.cdiv(rows, ROWS)
    lane = tl.arange(0, SEGMENT)[None, :]
    awaited = tl.zeros([ROWS], tl.int32) + number
    for tile in range(tl.program_id(0), tl.sum(tiles, 0), tl.num_programs(0)):
        past = tl.cumsum(tiles, 0) <= tile
        group = tl.sum(past.to(tl.int32), 0).to(tl.int64)
        first = (tile - tl.sum(tl.where(past, tiles, 0), 0)) * ROWS
        move = first + tl.arange(0, ROWS)
        listed = move < tl.sum(tl.where(groups_padded == group, rows, 0), 0)
        page = tl.load(pages + group * pages_stride + move, mask=listed, other=-1).to(tl.int64)
        slot = tl.load(slots + group * slots_stride + move, mask=listed, other=-1).to(tl.int64)
        moved = (page >= 0) & (slot >= 0)
        flag = waiting + group * waiting_stride + tl.where(moved, slot, waiting_stride - 1)
        moved &= tl.atomic_cas(flag, awaited, -awaited) == awaited
        begin = group * source_words + tl.maximum(page, 0) * ROW_WORDS
        place = group * target_words + slot * ROW_WORDS
        for segment in range(SEGMENTS):
            word = (segment * SEGMENT - (begin % LINE_WORDS).to(tl.int32))[:, None] + lane
            inside = moved[:, None] & (word >= 0) & (word < ROW_WORDS)
            value = tl.load(source + (begin[:, None] + word), mask=inside)
            tl.store(target + (place[:, None] + word), value, mask=inside)
        tl.debug_barrier()  # all of the program's rows are written
        tl.atomic_xchg(flag, tl.zeros([ROWS], tl.int32), mask=moved, sem="release")


def take_back(waiting: Tensor, slots: Tensor) -> None:
    """Nothing comes late into ``slots`` int64 [G, n] (-1 = none) from now on; ``waiting`` as in
    `copy_late`. The slots of a group are distinct.
    """
    run = take_back_triton if runs_compiled(slots) else take_back_reference
    run(waiting, slots)


def take_back_reference(waiting, slots) -> None:
    group, place = (slots >= 0).nonzero(as_tuple=True)
    waiting[group, slots[group, place]] = 0


def take_back_triton(waiting, slots) -> None:
    groups, count = slots.shape
    if count:
        _take_back[(cdiv(count, TAKEN_BACK), groups)](
            waiting,
            slots,
            count,
            waiting.stride(0),
            slots.stride(0),
            slots.stride(1),
            SLOTS=TAKEN_BACK,
            num_warps=4,
        )


# one kernel for all sizes: `fmsim.exec.kv.late` loads it at a decode's first decision
@triton.jit(do_not_specialize=["count", "waiting_stride", "slots_stride", "slot_stride"])
def _take_back(
    waiting,
    slots,
    count,
    waiting_stride,
    slots_stride,
    slot_stride,
    SLOTS: tl.constexpr,
):
    """One program: SLOTS of a group's. Most often nothing is to come into them."""
    group = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    slot = tl.load(
        slots + group * slots_stride + place.to(tl.int64) * slot_stride,
        mask=place < count,
        other=-1,
    )
    flag = waiting + group * waiting_stride + tl.where(slot >= 0, slot, waiting_stride - 1)
    found = tl.load(flag, mask=slot >= 0, other=0, volatile=True)
    if tl.max(tl.abs(found), 0) > 0:
        # the padding's flag may be anything; nobody looks at it
        then = tl.atomic_cas(flag, found, tl.minimum(found, 0))
        copied = (slot >= 0) & ((found < 0) | (then != found)) & (found != 0)
        while tl.max(copied.to(tl.int32), 0) > 0:
            now = tl.load(flag, mask=copied, other=0, volatile=True)
            copied = copied & (now != 0)


def wait_for_copy(come: Tensor, asked: Tensor) -> None:
    """What is launched after this waits until copy ``asked`` int32 [1] has ``come`` int32 [1].

    One program asks again and again. An event that a CUDA graph waits for would do. But a graph
    with such waits stood still until all that was late had come
    (benchmarks/results/bursts.md).
    """
    if runs_compiled(come):
        wait_for_copy_triton(come, asked)


def wait_for_copy_triton(come, asked) -> None:
    _wait_for_copy[(1,)](come, asked, num_warps=1, **overlapped(come))


@triton.jit
def _wait_for_copy(come, asked):
    """It lets the next launch begin at its end alone: programs of that one that wait would take the
    multiprocessors that the copy may need.
    """
    wait_for_previous()
    number = tl.load(asked)
    while tl.atomic_add(come, 0, sem="acquire") < number:
        pass
