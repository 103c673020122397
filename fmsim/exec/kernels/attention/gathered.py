"""Attention of many requests: rows are first gathered and widened, side by side, then read by
products as the matrix units take them.

So each row is decoded once for all heads, and the registers are left to the products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.attention.rows import Parts, Rows, balanced_splits, finished, matrix_type
from fmsim.exec.kernels.lang import cdiv, next_power_of_2, tl, triton
from fmsim.exec.kernels.layout import alignment, load_latents, load_rotated, triton_kind


def attend_gathered(
    queries: Tensor,
    rows: Rows,
    sinks: Tensor,
    scale: float,
    want_logits: bool,
    tune: tuning.GatheredAttentionTuning,
    out: Tensor,
) -> Parts:
    """As `attend_in_place`."""
    batch, heads, size = queries.shape
    dense, bias = _gathered(rows, tune)
    fitting = tune.block_bytes // (size * dense.element_size())
    block_heads, block_rows = (
        min(tune.block_heads, max(16, next_power_of_2(heads)), fitting),
        min(tune.block_rows, fitting),
    )
    blocks, head_blocks = dense.shape[1] // block_rows, cdiv(heads, block_heads)
    splits = balanced_splits(blocks, batch * head_blocks, tune.programs)
    parts = Parts.new(queries, splits, rows, want_logits, out)
    _attend[(batch, head_blocks, splits)](
        queries,
        dense,
        bias,
        sinks,
        parts.values,
        parts.sums,
        parts.logits if want_logits else parts.sums,
        scale,
        rows.count,
        dense.shape[1],
        HEADS=heads,
        WIDTH=size,
        BLOCK_HEADS=block_heads,
        BLOCK_ROWS=block_rows,
        ALONE=splits == 1,
        LOGITS=want_logits,
        STAGES=tune.stages,
        num_warps=tune.warps if block_heads >= 64 else 4,
    )
    return parts


def _gathered(rows: Rows, tune: tuning.GatheredAttentionTuning) -> tuple[Tensor, Tensor]:
    """The rows [B, N, C] in their `matrix_type`, and a bias float32 [B, N]: -inf for what is not
    there.

    N is padded to whole blocks.
    """
    layout, batch = rows.layout, len(rows.ids)
    count = cdiv(rows.count, tune.block_rows) * tune.block_rows
    dense = torch.empty(
        batch, count, layout.width, dtype=matrix_type(layout), device=rows.ids.device
    )
    bias = torch.empty(batch, count, dtype=torch.float32, device=rows.ids.device)
    _gather[(batch, cdiv(count, tune.gather_rows))](
        rows.window,
        rows.window_lengths,
        rows.pool,
        rows.table,
        rows.ids,
        dense,
        bias,
        rows.table.stride(0),
        rows.ids.shape[1],
        count,
        WIDTH=layout.width,
        KIND=triton_kind(layout),
        VALUE_BYTES=layout.value_bytes,
        SCALE_BYTES=layout.scale_bytes,
        WINDOW=rows.window_rows,
        WINDOW_BYTES=rows.window.stride(0),
        PER_PAGE=layout.per_page(rows.pool),
        PAGE_BYTES=rows.pool.stride(0),
        ALIGN=alignment(rows.window, rows.pool),
        BLOCK_ROWS=tune.gather_rows,
        num_warps=4,
    )
    return dense, bias


@triton.jit
def _gather(
    window,
    window_lengths,
    pool,
    table,
    ids,
    dense,
    bias,
    table_stride,
    selected,
    count,
    WIDTH: tl.constexpr,
    KIND: tl.constexpr,
    VALUE_BYTES: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    WINDOW: tl.constexpr,
    WINDOW_BYTES: tl.constexpr,
    PER_PAGE: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """One program: some rows of one sequence.

    A latent's rotated values, which are bfloat16 among float8, are loaded apart.
    """
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
    values, scales = start + number * VALUE_BYTES, start + of * VALUE_BYTES + number * SCALE_BYTES
    places, lane = dense + (b * count + row)[:, None] * WIDTH, tl.arange(0, WIDTH)[None, :]
    latent = load_latents(values, scales, known, KIND, WIDTH, ALIGN).to(dense.dtype.element_ty)
    if KIND == "latent":
        tl.store(places + lane, latent, mask=inside[:, None] & (lane < WIDTH - 64))
        tl.store(
            places + (WIDTH - 64 + tl.arange(0, 64))[None, :],
            load_rotated(values, known, WIDTH, ALIGN),
            mask=inside[:, None],
        )
    else:
        tl.store(places + lane, latent, mask=inside[:, None])
    tl.store(bias + b * count + row, tl.where(known, 0.0, float("-inf")), mask=inside)


@triton.jit
def _attend(
    queries,
    dense,
    bias,
    sinks,
    parts,
    part_sums,
    logits_out,
    scale,
    n_rows,
    count,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    ALONE: tl.constexpr,
    LOGITS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: a block of heads of one sequence against a run of blocks of rows."""
    b, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    lane, exists = tl.arange(0, WIDTH), head < HEADS
    query = tl.load(
        queries + (b * HEADS + head)[:, None] * WIDTH + lane[None, :],
        mask=exists[:, None],
        other=0.0,
    )
    dense, bias = dense + b * count * WIDTH, bias + b * count
    splits = tl.num_programs(2)
    share = tl.cdiv(count // BLOCK_ROWS, splits) * BLOCK_ROWS
    highest = tl.full([BLOCK_HEADS], float("-inf"), tl.float32)
    summed = tl.zeros([BLOCK_HEADS], tl.float32)
    attended = tl.zeros([BLOCK_HEADS, WIDTH], tl.float32)
    for start in tl.range(
        split * share, tl.minimum((split + 1) * share, count), BLOCK_ROWS, num_stages=STAGES
    ):
        row = start + tl.arange(0, BLOCK_ROWS)
        latent = tl.load(dense + row[:, None] * WIDTH + lane[None, :])
        # [BLOCK_HEADS, BLOCK_ROWS]
        logits = (
            tl.dot(query, tl.trans(latent), input_precision="ieee") * scale
            + tl.load(bias + row)[None, :]
        )
        if LOGITS:
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
        attended = tl.dot(
            weights.to(latent.dtype), latent, attended * fade[:, None], input_precision="ieee"
        )
        highest = risen
    factor, logarithm = finished(highest, summed, sinks, head, HEADS, ALONE)
    places = (b * splits + split) * HEADS + head
    tl.store(part_sums + places, logarithm, mask=exists)
    tl.store(
        parts + places[:, None] * WIDTH + lane[None, :],
        (attended * factor[:, None]).to(parts.dtype.element_ty),
        mask=exists[:, None],
    )
