"""Copies rows between two memories by a list of moves: recall from pinned host memory, and
write-through to it.

The kernel reads pinned memory directly over the link. It has a persistent grid of a few programs,
so that it leaves the other multiprocessors to the decode beside it, and each has several tiles of
rows on the way, since the link's latency times its bandwidth is over 100 KB. A row (a slot of
entries, or of 132-byte keys) may have any size that is a multiple of 4 bytes. It is read by lines
of 128 bytes of the source, since a line read in two parts crosses the link in two.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.lang import (
    after_previous,
    cdiv,
    next_power_of_2,
    overlapped,
    runs_compiled,
    tl,
    triton,
)

LINE_BYTES = 128


class RowParts(NamedTuple):
    """How a row is read: it has ``words`` of type ``word``, of which a line has ``line_words``, and
    ``segments`` of ``segment`` words from the start of its first line.
    """

    word: torch.dtype
    words: int
    line_words: int
    segment: int
    segments: int


def row_parts(row_bytes: int, segment_words: int) -> RowParts:
    """Of a row in segments of at most ``segment_words`` of 8 bytes."""
    word = torch.int32 if row_bytes % 8 else torch.int64
    words, line_words = row_bytes // word.itemsize, LINE_BYTES // word.itemsize
    reach = words + (line_words - 1 if words % line_words else 0)
    segment = min(segment_words, max(next_power_of_2(reach), line_words))
    return RowParts(word, words, line_words, segment, cdiv(reach, segment))


def copy_rows(
    source: Tensor,
    target: Tensor,
    pages: Tensor,
    slots: Tensor,
    counts: Tensor,
    tune: tuning.GatherTuning | None = None,
) -> None:
    """``target[g, slots[g, i]] = source[g, pages[g, i]]`` for the first ``counts[g]`` moves of each
    group g (a layer).

    ``source`` uint8 [G, pages, row bytes] and ``target`` uint8 [G, slots, row bytes], a group's
    contiguous; groups may share one (`Tensor.expand`). Either may be pinned host memory. ``pages``
    and ``slots`` [G, n], int32 or int64, with -1 in either for a move to be left out; ``counts``
    int32 [G]; the three on the device. Slots of a target are distinct.
    """
    if runs_compiled(pages):
        copy_rows_triton(source, target, pages, slots, counts, tune)
    else:
        copy_rows_reference(source, target, pages, slots, counts)


def copy_rows_reference(source, target, pages, slots, counts) -> None:
    for group, count in enumerate(counts.tolist()):
        page, slot = pages[group, :count].long(), slots[group, :count].long()
        moved = (page >= 0) & (slot >= 0)
        rows = source[group, page[moved].to(source.device)]
        target[group][slot[moved].to(target.device)] = rows.to(target.device)


def copy_rows_triton(
    source, target, pages, slots, counts, tune: tuning.GatherTuning | None = None
) -> None:
    tune = tune or tuning.GATHER
    groups, _, row_bytes = source.shape
    row = row_parts(row_bytes, tune.segment_words)
    source, target = source.view(row.word), target.view(row.word)
    _copy_rows[(tune.programs,)](
        source,
        target,
        pages,
        slots,
        counts,
        groups,
        pages.shape[1],
        source.stride(0),
        target.stride(0),
        pages.stride(0),
        slots.stride(0),
        ROW_WORDS=row.words,
        LINE_WORDS=row.line_words,
        GROUPS_PADDED=next_power_of_2(groups),
        SEGMENT=row.segment,
        SEGMENTS=row.segments,
        TILE=tune.tile_words // row.segment,
        STAGES=tune.stages,
        num_warps=tune.warps,
        **overlapped(pages),
    )


@triton.jit
def _tile(
    number,
    pages,
    slots,
    rows,
    tiles,
    groups,
    moves,
    source_words,
    target_words,
    pages_stride,
    slots_stride,
    ROW_WORDS: tl.constexpr,
    LINE_WORDS: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Of the segments of a tile, each [TILE]: where their rows begin in source and target, and
    their first word, counted in the row.

    Tiles are counted through all groups' lists, of ``rows`` and ``tiles`` each [GROUPS_PADDED]; a
    tile lies in one group. A segment that is not to be moved begins at the row's end. Lists of
    ``moves`` are read whole, so that with one group no read of them waits for its count.
    """
    past = tl.cumsum(tiles, 0) <= number
    group = tl.sum(past.to(tl.int32), 0) if GROUPS_PADDED > 1 else tl.zeros([], tl.int32)
    tile = number - tl.sum(tl.where(past, tiles, 0), 0) if GROUPS_PADDED > 1 else number
    segment = tile * TILE + tl.arange(0, TILE)
    move = segment // SEGMENTS
    listed = (move < moves) & (group < groups)
    page = tl.load(pages + group.to(tl.int64) * pages_stride + move, mask=listed, other=-1).to(
        tl.int64
    )
    slot = tl.load(slots + group.to(tl.int64) * slots_stride + move, mask=listed, other=-1).to(
        tl.int64
    )
    exists = move < tl.sum(tl.where(tl.arange(0, GROUPS_PADDED) == group, rows, 0), 0)
    page = tl.where(exists, page, -1)
    begin = group.to(tl.int64) * source_words + tl.maximum(page, 0) * ROW_WORDS
    first = segment % SEGMENTS * SEGMENT - (begin % LINE_WORDS).to(tl.int32)
    return (
        begin,
        group.to(tl.int64) * target_words + slot * ROW_WORDS,
        tl.where((page >= 0) & (slot >= 0), first, ROW_WORDS),
    )


@triton.jit
def _copy_rows(
    source,
    target,
    pages,
    slots,
    counts,
    groups,
    moves,
    source_words,
    target_words,
    pages_stride,
    slots_stride,
    ROW_WORDS: tl.constexpr,
    LINE_WORDS: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: every n-th tile.

    A tile's moves are read a turn ahead, so that STAGES - 1 tiles of rows are on the way.
    """
    group = tl.arange(0, GROUPS_PADDED)
    after_previous()
    rows = tl.load(counts + group, mask=group < groups, other=0)
    tiles = tl.cdiv(rows * SEGMENTS, TILE)
    step = tl.num_programs(0)
    lane = tl.arange(0, SEGMENT)[None, :]
    next_begin, next_place, next_first = _tile(
        tl.program_id(0),
        pages,
        slots,
        rows,
        tiles,
        groups,
        moves,
        source_words,
        target_words,
        pages_stride,
        slots_stride,
        ROW_WORDS,
        LINE_WORDS,
        GROUPS_PADDED,
        SEGMENT,
        SEGMENTS,
        TILE,
    )
    for number in tl.range(tl.program_id(0), tl.sum(tiles, 0), step, num_stages=STAGES):
        begin, place, first = next_begin, next_place, next_first
        next_begin, next_place, next_first = _tile(
            number + step,
            pages,
            slots,
            rows,
            tiles,
            groups,
            moves,
            source_words,
            target_words,
            pages_stride,
            slots_stride,
            ROW_WORDS,
            LINE_WORDS,
            GROUPS_PADDED,
            SEGMENT,
            SEGMENTS,
            TILE,
        )
        word = first[:, None] + lane
        inside = (word >= 0) & (word < ROW_WORDS)
        value = tl.load(source + (begin[:, None] + word), mask=inside)
        tl.store(target + (place[:, None] + word), value, mask=inside)
