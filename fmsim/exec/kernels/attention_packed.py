"""Attention of many requests over packed latents: a first launch finds where each row lies, and a
second reads the rows as float8, once for all heads, and widens them in shared memory.

What `attention_in_place` looks up beside its products, page, number and scales, would take the
registers that many heads' sums need. `attention_gathered` writes every row in float16 and reads it
again, four times the bytes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.attention_rows import Parts, Rows, balanced_splits, finished
from fmsim.exec.kernels.lang import cdiv, next_power_of_2, tl, triton
from fmsim.exec.kernels.layout import load_rotated

# bytes, at whose multiples every row must begin: a copy into shared memory takes 16 or 8 at a time
WIDEST, NARROWEST = 16, 8
UNKNOWN = tl.constexpr(-(2**60))


class Located(NamedTuple):
    """Of each row, [B, N] with N whole blocks: ``places`` int64, from the pool's start in steps of
    8 or 16 bytes, below `UNKNOWN` of what is not known (a window may lie before the pool);
    ``factors`` float16 [B, N, 8], the scales of its chunks.
    """

    places: Tensor
    factors: Tensor


def takes(rows: Rows) -> bool:
    """Whether rows are packed latents that copies into shared memory can begin at."""
    return rows.layout.kind == "latent" and _step(rows) >= NARROWEST


def _step(rows: Rows) -> int:
    """Bytes, up to 16, at whose multiples every row begins."""
    starts = rows.window.data_ptr(), rows.pool.data_ptr()
    strides = rows.window.stride(0), rows.pool.stride(0), rows.layout.value_bytes
    return math.gcd(WIDEST, *starts, *strides)


def attend_packed(
    queries: Tensor,
    rows: Rows,
    sinks: Tensor,
    scale: float,
    want_logits: bool,
    tune: tuning.PackedAttentionTuning,
    out: Tensor,
) -> Parts:
    """As `attend_in_place`, of rows that `takes` accepts."""
    batch, heads, size = queries.shape
    located = _located(rows, tune)
    count = located.places.shape[1]
    block_heads = min(tune.block_heads, max(16, next_power_of_2(heads)))
    blocks, head_blocks = count // tune.block_rows, cdiv(heads, block_heads)
    splits = balanced_splits(blocks, batch * head_blocks, tune.programs)
    parts = Parts.new(queries, splits, rows, want_logits, out)
    _attend_packed[(batch, head_blocks, splits)](
        queries,
        rows.pool,
        located.places,
        located.factors,
        sinks,
        parts.values,
        parts.sums,
        parts.logits if want_logits else parts.sums,
        scale,
        rows.count,
        count,
        HEADS=heads,
        WIDTH=size,
        STEP=_step(rows),
        BLOCK_HEADS=block_heads,
        BLOCK_ROWS=tune.block_rows,
        ALONE=splits == 1,
        LOGITS=want_logits,
        STAGES=tune.stages,
        num_warps=tune.warps if block_heads >= 64 else 4,
    )
    return parts


def _located(rows: Rows, tune: tuning.PackedAttentionTuning) -> Located:
    batch, layout = len(rows.ids), rows.layout
    count = cdiv(rows.count, tune.block_rows) * tune.block_rows
    device = rows.ids.device
    located = Located(
        torch.empty(batch, count, dtype=torch.int64, device=device),
        torch.empty(batch, count, layout.scale_bytes, dtype=torch.float16, device=device),
    )
    _locate[(batch, cdiv(count, tune.locate_rows))](
        rows.window,
        rows.window_lengths,
        rows.pool,
        rows.table,
        rows.ids,
        *located,
        rows.table.stride(0),
        rows.ids.shape[1],
        count,
        VALUE_BYTES=layout.value_bytes,
        SCALE_BYTES=layout.scale_bytes,
        WINDOW=rows.window_rows,
        WINDOW_BYTES=rows.window.stride(0),
        PER_PAGE=layout.per_page(rows.pool),
        PAGE_BYTES=rows.pool.stride(0),
        STEP=_step(rows),
        BLOCK_ROWS=tune.locate_rows,
        num_warps=4,
    )
    return located


@triton.jit
def _locate(
    window,
    window_lengths,
    pool,
    table,
    ids,
    places,
    factors,
    table_stride,
    selected,
    count,
    VALUE_BYTES: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    WINDOW: tl.constexpr,
    WINDOW_BYTES: tl.constexpr,
    PER_PAGE: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """One program: some rows of one sequence."""
    b, row = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    near, inside = row < WINDOW, row < count
    entry = tl.load(
        ids + b * selected + (row - WINDOW),
        mask=(row >= WINDOW) & (row < WINDOW + selected),
        other=-1,
    )
    page = tl.load(table + b * table_stride + entry // PER_PAGE, mask=entry >= 0, other=-1)
    known = (near & (row < tl.load(window_lengths + b))) | (page >= 0)
    start = tl.where(near, window + b * WINDOW_BYTES, pool + page.to(tl.int64) * PAGE_BYTES)
    number, of = tl.where(near, row, entry % PER_PAGE), tl.where(near, WINDOW, PER_PAGE)
    place = (start + number * VALUE_BYTES).to(tl.int64) - pool.to(tl.int64)
    at = places + b * count + row
    tl.store(at, tl.where(known, place // STEP, 2 * UNKNOWN), mask=inside)
    lane = tl.arange(0, SCALE_BYTES)[None, :]
    scales = start + of * VALUE_BYTES + number * SCALE_BYTES
    exponent = tl.load(scales[:, None] + lane, mask=known[:, None], other=0).to(tl.int32)
    factor = (exponent << 23).to(tl.float32, bitcast=True).to(tl.float16)
    tl.store(
        factors + (b * count + row)[:, None] * SCALE_BYTES + lane, factor, mask=inside[:, None]
    )


@triton.jit
def _attend_packed(
    queries,
    pool,
    places,
    factors,
    sinks,
    parts,
    part_sums,
    logits_out,
    scale,
    n_rows,
    count,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    ALONE: tl.constexpr,
    LOGITS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: a block of heads of one sequence against a run of blocks of rows.

    Where the next block's rows lie is read a block ahead. Rotated values, which are bfloat16 among
    float8, go by products of their own.
    """
    b, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    lane, exists, within = tl.arange(0, WIDTH), head < HEADS, tl.arange(0, BLOCK_ROWS)
    turn, chunk = WIDTH - 64 + tl.arange(0, 64), tl.arange(0, WIDTH // 64)
    at_head = queries + (b * HEADS + head)[:, None] * WIDTH
    query = tl.load(at_head + lane[None, :], mask=exists[:, None], other=0.0)
    query_turned = tl.load(at_head + turn[None, :], mask=exists[:, None], other=0.0)
    places += b * count
    factors += b * count * (WIDTH // 64)
    splits = tl.num_programs(2)
    share = tl.cdiv(count // BLOCK_ROWS, splits) * BLOCK_ROWS
    first, last = split * share, tl.minimum((split + 1) * share, count)
    highest = tl.full([BLOCK_HEADS], float("-inf"), tl.float32)
    summed = tl.zeros([BLOCK_HEADS], tl.float32)
    attended = tl.zeros([BLOCK_HEADS, WIDTH], tl.float32)
    attended_turned = tl.zeros([BLOCK_HEADS, 64], tl.float32)
    place = tl.load(places + first + within)
    for start in tl.range(first, last, BLOCK_ROWS, num_stages=STAGES):
        known = place > UNKNOWN
        row = place * STEP
        codes = tl.load(
            (pool + row)[:, None] + lane[None, :],
            mask=known[:, None] & (lane < WIDTH - 64)[None, :],
            other=0,
        )
        rotated = load_rotated(pool + row, known, WIDTH)
        at = factors + (start + within)[:, None] * (WIDTH // 64) + chunk[None, :]
        factor = tl.load(at)
        # the last block's is not used
        place = tl.load(places + tl.minimum(start + BLOCK_ROWS, count - BLOCK_ROWS) + within)
        latent = codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
        latent = tl.reshape(
            tl.reshape(latent, [BLOCK_ROWS, WIDTH // 64, 64]) * factor[:, :, None],
            [BLOCK_ROWS, WIDTH],
        )
        # [BLOCK_HEADS, BLOCK_ROWS]
        logits = tl.dot(query, tl.trans(latent))
        logits = tl.dot(query_turned, tl.trans(rotated), logits) * scale
        logits = tl.where(known[None, :], logits, float("-inf"))
        if LOGITS:
            row = start + within
            tl.store(
                logits_out + (b * HEADS + head)[:, None] * n_rows + row[None, :],
                logits,
                mask=exists[:, None] & (row < n_rows)[None, :],
            )
        risen = tl.maximum(highest, tl.max(logits, 1))
        # nothing known yet: exp(-inf), not exp(nan)
        level = tl.where(risen == float("-inf"), 0.0, risen)
        weights = tl.exp(logits - level[:, None])
        fade = tl.exp(highest - level)
        summed = summed * fade + tl.sum(weights, 1)
        weights = weights.to(tl.float16)
        attended = tl.dot(weights, latent, attended * fade[:, None])
        attended_turned = tl.dot(weights, rotated, attended_turned * fade[:, None])
        highest = risen
    factor, logarithm = finished(highest, summed, sinks, head, HEADS, ALONE)
    at = (b * splits + split) * HEADS + head
    tl.store(part_sums + at, logarithm, mask=exists)
    kind = parts.dtype.element_ty
    tl.store(
        parts + at[:, None] * WIDTH + lane[None, :],
        (attended * factor[:, None]).to(kind),
        mask=exists[:, None] & (lane < WIDTH - 64)[None, :],
    )
    tl.store(
        parts + at[:, None] * WIDTH + turn[None, :],
        (attended_turned * factor[:, None]).to(kind),
        mask=exists[:, None],
    )
