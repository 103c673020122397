"""Attention of few requests: rows are read where they lie, and widened on the way to the products.
Each byte of float8 is read once for a block of heads.

Which page a row is in is looked up two blocks ahead, so that the row itself can be on its way while
the block before it is multiplied. Where rows need not be split, the program that has seen them all
writes the output.
"""

from __future__ import annotations

from torch import Tensor

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.attention.rows import Parts, Rows, finished
from fmsim.exec.kernels.lang import (
    after_previous_with_next,
    cdiv,
    overlapped,
    tl,
    triton,
)
from fmsim.exec.kernels.layout import (
    alignment,
    load_latents,
    load_rotated,
    product_operand,
    triton_kind,
)


def attend_in_place(
    queries: Tensor,
    rows: Rows,
    sinks: Tensor,
    scale: float,
    want_logits: bool,
    tune: tuning.AttentionTuning,
    out: Tensor,
    known: bool = False,
) -> Parts:
    """``queries`` [B, H, C] of the rows' `matrix_type`; ``out`` [B, H, C] is written where rows are
    not split; ``known`` as in `sparse_attention`.
    """
    batch, heads, size = queries.shape
    head_blocks = cdiv(heads, tune.block_heads)
    blocks = cdiv(rows.count, tune.block_rows)
    share = cdiv(blocks, max(1, tune.programs // (batch * head_blocks)))
    splits = cdiv(blocks, share)  # none of them without a block
    parts, layout = Parts.new(queries, splits, rows, want_logits, out), rows.layout
    _attend_in_place[(batch, head_blocks, splits)](
        queries,
        rows.window,
        rows.window_lengths,
        rows.pool,
        rows.table,
        rows.ids,
        sinks,
        parts.values,
        parts.sums,
        parts.logits if want_logits else parts.sums,
        scale,
        rows.table.stride(0),
        HEADS=heads,
        WIDTH=size,
        KIND=triton_kind(layout),
        VALUE_BYTES=layout.value_bytes,
        SCALE_BYTES=layout.scale_bytes,
        WINDOW=rows.window_rows,
        WINDOW_BYTES=rows.window.stride(0),
        SELECTED=rows.ids.shape[1],
        PER_PAGE=layout.per_page(rows.pool),
        PAGE_BYTES=rows.pool.stride(0),
        ALIGN=alignment(rows.window, rows.pool),
        BLOCK_HEADS=tune.block_heads,
        BLOCK_ROWS=tune.block_rows,
        SHARE=share,
        SPLITS=splits,
        LOGITS=want_logits,
        STAGES=tune.stages,
        AHEAD=known,
        num_warps=tune.warps,
        **overlapped(queries),
    )
    return parts


@triton.jit
def _entries_of(ids, row, WINDOW: tl.constexpr, SELECTED: tl.constexpr):
    """The entry of each row, -1 for none and for the window's."""
    selected = (row >= WINDOW) & (row < WINDOW + SELECTED)
    return tl.load(ids + (row - WINDOW), mask=selected, other=-1)


@triton.jit
def _pages_of(table, entry, PER_PAGE: tl.constexpr):
    """The page of each entry, -1 for none."""
    return tl.load(table + entry // PER_PAGE, mask=entry >= 0, other=-1)


@triton.jit
def _attend_in_place(
    queries,
    window,
    window_lengths,
    pool,
    table,
    ids,
    sinks,
    parts,
    part_sums,
    logits_out,
    scale,
    table_stride,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    KIND: tl.constexpr,
    VALUE_BYTES: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    WINDOW: tl.constexpr,
    WINDOW_BYTES: tl.constexpr,
    SELECTED: tl.constexpr,
    PER_PAGE: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    SHARE: tl.constexpr,
    SPLITS: tl.constexpr,
    LOGITS: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """One program: a block of heads of one sequence against a run of SHARE blocks of rows.

    A latent's rotated values, which are bfloat16 among float8, go by products of their own, so that
    no value is converted twice. Where ids are known AHEAD, it has found the first pages when
    queries come.
    """
    if not AHEAD:
        after_previous_with_next()
    b, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    lane, place = tl.arange(0, WIDTH), tl.arange(0, BLOCK_ROWS)
    apart: tl.constexpr = KIND == "latent"
    turn = WIDTH - 64 + tl.arange(0, 64)
    length = tl.load(window_lengths + b)
    ids += b * SELECTED
    table += b * table_stride
    window += b * WINDOW_BYTES
    blocks: tl.constexpr = (WINDOW + SELECTED + BLOCK_ROWS - 1) // BLOCK_ROWS
    first = split * SHARE
    entry = _entries_of(ids, first * BLOCK_ROWS + place, WINDOW, SELECTED)
    page, within = _pages_of(table, entry, PER_PAGE), entry % PER_PAGE
    entry = _entries_of(ids, (first + 1) * BLOCK_ROWS + place, WINDOW, SELECTED)
    if AHEAD:
        after_previous_with_next()
    query_places = (b * HEADS + head)[:, None] * WIDTH + lane[None, :]
    query = tl.load(queries + query_places, mask=(head < HEADS)[:, None], other=0.0)
    if apart:
        query_turned = tl.load(
            queries + (b * HEADS + head)[:, None] * WIDTH + turn[None, :],
            mask=(head < HEADS)[:, None],
            other=0.0,
        )
    highest = tl.full([BLOCK_HEADS], float("-inf"), tl.float32)
    summed = tl.zeros([BLOCK_HEADS], tl.float32)
    attended = tl.zeros([BLOCK_HEADS, WIDTH], tl.float32)
    attended_turned = tl.zeros([BLOCK_HEADS, 64], tl.float32)
    for block in tl.range(first, tl.minimum(first + SHARE, blocks), num_stages=STAGES):
        row = block * BLOCK_ROWS + place
        near = row < WINDOW
        known = (near & (row < length)) | (page >= 0)
        start = tl.where(near, window, pool + page.to(tl.int64) * PAGE_BYTES)
        number, of = tl.where(near, row, within), tl.where(near, WINDOW, PER_PAGE)
        values = start + number * VALUE_BYTES
        latent = product_operand(
            load_latents(
                values, start + of * VALUE_BYTES + number * SCALE_BYTES, known, KIND, WIDTH, ALIGN
            )
        )
        # of the next block, and of the one after it
        page, within = _pages_of(table, entry, PER_PAGE), entry % PER_PAGE
        entry = _entries_of(ids, row + 2 * BLOCK_ROWS, WINDOW, SELECTED)
        # [BLOCK_HEADS, BLOCK_ROWS]
        logits = tl.dot(query, tl.trans(latent), input_precision="ieee")
        if apart:
            rotated = load_rotated(values, known, WIDTH, ALIGN)
            logits = tl.dot(query_turned, tl.trans(rotated), logits)
        logits *= scale
        logits = tl.where(known[None, :], logits, float("-inf"))
        if LOGITS:
            out_places = (b * HEADS + head)[:, None] * (WINDOW + SELECTED) + row[None, :]
            tl.store(
                logits_out + out_places,
                logits,
                mask=(head < HEADS)[:, None] & (row < WINDOW + SELECTED)[None, :],
            )
        risen = tl.maximum(highest, tl.max(logits, 1))
        # nothing known yet: exp(-inf), not exp(nan)
        level = tl.where(risen == float("-inf"), 0.0, risen)
        weights = tl.exp(logits - level[:, None])
        fade = tl.exp(highest - level)
        summed = summed * fade + tl.sum(weights, 1)
        weights = weights.to(latent.dtype)
        attended = tl.dot(weights, latent, attended * fade[:, None], input_precision="ieee")
        if apart:
            attended_turned = tl.dot(weights, rotated, attended_turned * fade[:, None])
        highest = risen
    factor, logarithm = finished(highest, summed, sinks, head, HEADS, SPLITS == 1)
    places = (b * SPLITS + split) * HEADS + head
    tl.store(part_sums + places, logarithm, mask=head < HEADS)
    kind = parts.dtype.element_ty
    tl.store(
        parts + places[:, None] * WIDTH + lane[None, :],
        (attended * factor[:, None]).to(kind),
        mask=(head < HEADS)[:, None] & (lane < (WIDTH - 64 if apart else WIDTH))[None, :],
    )
    if apart:
        tl.store(
            parts + places[:, None] * WIDTH + turn[None, :],
            (attended_turned * factor[:, None]).to(kind),
            mask=(head < HEADS)[:, None],
        )
