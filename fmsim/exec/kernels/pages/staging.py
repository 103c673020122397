"""A layer's misses in one launch: rows of the pinned host memory into spare pages of the pool, and
the block table that finds them there.

Most pages that a step selects are here. So each program packs those of its part that are not, and
copies rows alone that are missed: several of them at once, since the link's latency times its
bandwidth is over 100 KB. As in `gather.py` a row may have any size that is a multiple of 4 bytes,
and is read by lines of the source.
"""

from __future__ import annotations

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
from fmsim.exec.kernels.pages.gather import row_parts


def stage(
    source: Tensor,
    target: Tensor,
    pages: Tensor,
    fetched: Tensor,
    first_page: Tensor,
    first_stage: Tensor,
    blocks: Tensor,
    staged: Tensor,
) -> None:
    """Of each request's ``pages`` int64 [B, n], those ``fetched`` bool [B, n] are copied: page i of
    them to page ``first_stage[b] + i`` of ``target``, which is entered in ``blocks`` int32 [B, P +
    1]. ``staged`` int64 [] counts them.

    ``source`` uint8 [pages, row bytes], which may be pinned host memory, and ``target`` uint8
    [pages, row bytes] are contiguous. ``first_page`` int64 [B]: where a request's pages begin in
    the source.
    """
    run = stage_triton if runs_compiled(pages) else stage_reference
    run(source, target, pages, fetched, first_page, first_stage, blocks, staged)


def stage_reference(
    source, target, pages, fetched, first_page, first_stage, blocks, staged
) -> None:
    request, place = fetched.nonzero(as_tuple=True)
    page, to = pages[request, place], first_stage[request] + place
    rows = source[(first_page[request] + page).to(source.device)]
    target[to.to(target.device)] = rows.to(target.device)
    blocks[request, page] = to.int()
    staged += len(to)


def stage_triton(
    source,
    target,
    pages,
    fetched,
    first_page,
    first_stage,
    blocks,
    staged,
    tune: tuning.StagingTuning | None = None,
) -> None:
    tune = tune or tuning.STAGING
    batch, count = pages.shape
    assert pages.stride(1) == fetched.stride(1) == blocks.stride(1) == 1, (
        "a request's pages lie side by side"
    )
    _launch(
        _stage,
        (source, target),
        batch,
        count,
        tune,
        tune.programs,
        pages,
        fetched.view(torch.uint8),
        first_page,
        first_stage,
        blocks,
        staged,
        count,
        pages.stride(0),
        fetched.stride(0),
        blocks.stride(0),
    )


def _launch(kernel, memories, lists, count, tune, programs, *given) -> None:
    """``kernel`` on rows of ``memories``, of which it writes the last, and on what is ``given``.

    So many ``lists`` of ``count`` places are cut into about ``programs`` parts.
    """
    row = row_parts(memories[0].shape[1], tune.segment_words)
    tile = tune.tile_words // row.segment
    places = next_power_of_2(cdiv(lists * count, programs))
    places = max(min(places, tune.most_places), tile)
    kernel[(cdiv(count, places), lists, cdiv(row.segments, tile))](
        *(memory.view(row.word) for memory in memories),
        *given,
        ROW_WORDS=row.words,
        LINE_WORDS=row.line_words,
        SEGMENT=row.segment,
        SEGMENTS=row.segments,
        TILE=tile,
        PLACES=places,
        num_warps=tune.warps,
        **overlapped(memories[-1]),
    )


@triton.jit
def _stage(
    source,
    target,
    pages,
    fetched,
    first_page,
    first_stage,
    blocks,
    staged,
    count,
    pages_stride,
    fetched_stride,
    blocks_stride,
    ROW_WORDS: tl.constexpr,
    LINE_WORDS: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    TILE: tl.constexpr,
    PLACES: tl.constexpr,
):
    """One program: of the misses at some places of one request every n-th tile."""
    b, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * PLACES
    pages += b * pages_stride
    place = first + tl.arange(0, PLACES)
    after_previous()
    taken = tl.load(fetched + b * fetched_stride + place, mask=place < count, other=0) != 0
    page = tl.load(pages + place, mask=place < count, other=-1)
    source_page, spare = tl.load(first_page + b), tl.load(first_stage + b)
    moves = tl.sum(taken.to(tl.int32), 0)
    part, parts = tl.program_id(2), tl.num_programs(2)
    if moves > 0:
        if part == 0:
            tl.store(blocks + b * blocks_stride + page, (spare + place).to(tl.int32), mask=taken)
            tl.atomic_add(staged, moves.to(tl.int64))
        so_far = tl.cumsum(taken.to(tl.int32), 0)
        lane = tl.arange(0, SEGMENT)[None, :]
        for tile in range(part, tl.cdiv(moves * SEGMENTS, TILE), parts):
            segment = tile * TILE + tl.arange(0, TILE)
            move = segment // SEGMENTS
            # the first place up to which there are more moves than come before this one
            at = first + tl.sum((so_far[None, :] <= move[:, None]).to(tl.int32), 1)
            moved = move < moves
            begin = (source_page + tl.load(pages + at, mask=moved, other=0)) * ROW_WORDS
            in_row = segment % SEGMENTS * SEGMENT - (begin % LINE_WORDS).to(tl.int32)
            word = in_row[:, None] + lane
            inside = moved[:, None] & (word >= 0) & (word < ROW_WORDS)
            value = tl.load(source + (begin[:, None] + word), mask=inside)
            tl.store(target + (((spare + at) * ROW_WORDS)[:, None] + word), value, mask=inside)


def keep(
    pool: Tensor,
    first: Tensor,
    slot_page: Tensor,
    pages: Tensor,
    slots: Tensor,
    blocks: Tensor,
) -> None:
    """Of each layer and request, staged ``pages`` [L, B, m] are copied into their ``slots`` [L, B,
    m], -1 for none; both int64, and a row's side by side. ``blocks`` int32 [L, B, P + 1] say where
    they were staged, -1 where they were not: those are left out.

    ``pool`` uint8 [pages, row bytes] is all layers', a layer's from ``first`` int64 [L] on;
    ``slot_page`` int64 [L, B]: the page of it that is a request's first slot.
    """
    run = keep_triton if runs_compiled(pages) else keep_reference
    run(pool, first, slot_page, pages, slots, blocks)


def keep_reference(pool, first, slot_page, pages, slots, blocks) -> None:
    layer, request, place = (slots >= 0).nonzero(as_tuple=True)
    spare = blocks[layer, request, pages[layer, request, place]].long()
    to = slot_page[layer, request] + slots[layer, request, place]
    there = spare >= 0
    pool[to[there]] = pool[(first[layer] + spare)[there]]


def keep_triton(
    pool, first, slot_page, pages, slots, blocks, tune: tuning.StagingTuning | None = None
) -> None:
    tune = tune or tuning.STAGING
    layers, batch, count = pages.shape
    assert pages.stride(2) == slots.stride(2) == blocks.stride(2) == slot_page.stride(1) == 1
    _launch(
        _keep,
        (pool,),
        layers * batch,
        count,
        tune,
        tune.programs_within,
        first,
        slot_page,
        pages,
        slots,
        blocks,
        count,
        batch,
        slot_page.stride(0),
        pages.stride(0),
        pages.stride(1),
        slots.stride(0),
        slots.stride(1),
        blocks.stride(0),
        blocks.stride(1),
    )


@triton.jit
def _keep(
    pool,
    first,
    slot_page,
    pages,
    slots,
    blocks,
    count,
    batch,
    slot_page_stride,
    pages_layer,
    pages_request,
    slots_layer,
    slots_request,
    blocks_layer,
    blocks_request,
    ROW_WORDS: tl.constexpr,
    LINE_WORDS: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    TILE: tl.constexpr,
    PLACES: tl.constexpr,
):
    """One program: of what stays at some places of one layer and request every n-th tile."""
    layer, b = (tl.program_id(1) // batch).to(tl.int64), (tl.program_id(1) % batch).to(tl.int64)
    pages += layer * pages_layer + b * pages_request
    slots += layer * slots_layer + b * slots_request
    blocks += layer * blocks_layer + b * blocks_request
    begins = tl.program_id(0) * PLACES
    place = begins + tl.arange(0, PLACES)
    after_previous()
    stays = tl.load(slots + place, mask=place < count, other=-1) >= 0
    layer_page, slot = tl.load(first + layer), tl.load(slot_page + layer * slot_page_stride + b)
    moves = tl.sum(stays.to(tl.int32), 0)
    if moves > 0:
        so_far = tl.cumsum(stays.to(tl.int32), 0)
        for tile in range(tl.program_id(2), tl.cdiv(moves * SEGMENTS, TILE), tl.num_programs(2)):
            segment = tile * TILE + tl.arange(0, TILE)
            move = segment // SEGMENTS
            at = begins + tl.sum((so_far[None, :] <= move[:, None]).to(tl.int32), 1)
            moved = move < moves
            page = tl.load(pages + at, mask=moved, other=0)
            spare = tl.load(blocks + page, mask=moved, other=-1)
            to = slot + tl.load(slots + at, mask=moved, other=0)
            begin = (layer_page + tl.maximum(spare, 0)) * ROW_WORDS
            in_row = segment % SEGMENTS * SEGMENT - (begin % LINE_WORDS).to(tl.int32)
            word = in_row[:, None] + tl.arange(0, SEGMENT)[None, :]
            inside = (moved & (spare >= 0))[:, None] & (word >= 0) & (word < ROW_WORDS)
            value = tl.load(pool + (begin[:, None] + word), mask=inside)
            tl.store(pool + ((to * ROW_WORDS)[:, None] + word), value, mask=inside)
