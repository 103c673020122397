"""Entries that a layer attends to before their pages are here: each is read from the mirror by
itself, into the place where its page will bring it again.
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
from fmsim.exec.kernels.layout import Layout

WORD_BYTES = 4


def bring_entries(
    ids: Tensor,
    blocks: Tensor,
    on_the_way: Tensor,
    first_page: Tensor,
    mirror: Tensor,
    pool: Tensor,
    layout: Layout,
) -> None:
    """Copy entries ``ids`` int32 [B, K] (-1 = none) whose page is ``on_the_way`` (int32 [pool
    pages], not 0) from ``mirror`` into ``pool``, both uint8 [pages, page bytes] in ``layout``.

    A request's page p lies in page ``blocks[b, p]`` of the pool (int32 [B, P + 1], -1 = not there)
    and in page ``first_page[b] + p`` of the mirror, int64 [B]. The mirror may be pinned host
    memory; all else is on the device. Sizes of values and scales are multiples of 4 bytes.
    """
    run = bring_entries_triton if runs_compiled(ids) else bring_entries_reference
    run(ids, blocks, on_the_way, first_page, mirror, pool, layout)


def bring_entries_reference(ids, blocks, on_the_way, first_page, mirror, pool, layout) -> None:
    per_page = layout.per_page(pool)
    page = torch.where(ids < 0, blocks.shape[1] - 1, ids // per_page).long()
    block = torch.where(ids < 0, -1, blocks.gather(1, page)).long()
    late = (block >= 0) & (on_the_way[block.clamp(min=0)] != 0)
    source, to = (page + first_page[:, None])[late].to(mirror.device), block[late]
    number = (ids[late] % per_page).long()[:, None]
    values = number * layout.value_bytes + torch.arange(layout.value_bytes, device=ids.device)
    scales = number * layout.scale_bytes + torch.arange(layout.scale_bytes, device=ids.device)
    at = torch.cat([values, per_page * layout.value_bytes + scales], 1)
    pool[to[:, None], at] = mirror[source[:, None], at.to(mirror.device)].to(pool.device)


def bring_entries_triton(ids, blocks, on_the_way, first_page, mirror, pool, layout) -> None:
    batch, count = ids.shape
    assert ids.stride(1) == blocks.stride(1) == 1, "a request's entries lie side by side"
    mirror, pool = mirror.view(torch.int32), pool.view(torch.int32)
    value_words, scale_words = (
        size // WORD_BYTES for size in (layout.value_bytes, layout.scale_bytes)
    )
    tile = min(tuning.LATE_ENTRIES, next_power_of_2(count))
    _bring_entries[(batch, cdiv(count, tile))](
        ids,
        blocks,
        on_the_way,
        first_page,
        mirror,
        pool,
        count,
        ids.stride(0),
        blocks.stride(0),
        mirror.stride(0),
        pool.stride(0),
        PER_PAGE=pool.shape[1] * WORD_BYTES // layout.entry_bytes,
        VALUE_WORDS=value_words,
        SCALE_WORDS=scale_words,
        WORDS=next_power_of_2(value_words + scale_words),
        TILE=tile,
        num_warps=4,
        **overlapped(ids),
    )


@triton.jit
def _bring_entries(
    ids,
    blocks,
    on_the_way,
    first_page,
    mirror,
    pool,
    count,
    ids_stride,
    blocks_stride,
    mirror_stride,
    pool_stride,
    PER_PAGE: tl.constexpr,
    VALUE_WORDS: tl.constexpr,
    SCALE_WORDS: tl.constexpr,
    WORDS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: TILE of a request's entries. Most often none of them is late."""
    b = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * TILE + tl.arange(0, TILE)
    after_previous()
    entry = tl.load(ids + b * ids_stride + place, mask=place < count, other=-1)
    page = tl.maximum(entry, 0) // PER_PAGE
    block = tl.load(blocks + b * blocks_stride + page, mask=entry >= 0, other=-1)
    # a copy that runs beside this changes it meanwhile
    late = tl.load(on_the_way + block, mask=block >= 0, other=0, volatile=True) != 0
    if tl.max(late.to(tl.int32), 0) != 0:
        number = tl.maximum(entry, 0) % PER_PAGE
        word = tl.arange(0, WORDS)[None, :]
        of_scales = PER_PAGE * VALUE_WORDS + number[:, None] * SCALE_WORDS + word - VALUE_WORDS
        at = tl.where(word < VALUE_WORDS, number[:, None] * VALUE_WORDS + word, of_scales)
        moved = late[:, None] & (word < VALUE_WORDS + SCALE_WORDS)
        source = (page + tl.load(first_page + b)) * mirror_stride
        to = block.to(tl.int64) * pool_stride
        value = tl.load(mirror + (source[:, None] + at), mask=moved)
        tl.store(pool + (to[:, None] + at), value, mask=moved)
