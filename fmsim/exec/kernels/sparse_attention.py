"""Attention of one decode token over its window and its selected entries: shared K = V latent, a sink a head (eqs. 18-19).

The rows attended to (the window's, then the entries') are first gathered and widened, side by side: so each is decoded once for all heads, and
the products read what the matrix units take. One pass then splits them over programs, each of which keeps a running softmax; another
combines the splits by their log-sum-exp and adds the sink, which takes part in the sum and has no value. A last one gives
each row's probability, mean over heads, where a trace or a policy needs it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.lang import cdiv, next_power_of_2, runs_compiled, tl, triton
from fmsim.exec.kernels.layout import Layout, load_latents, load_rotated, read_entries, slots_of, triton_kind


class Rows(NamedTuple):
    """What a token attends to.

    ``window`` uint8 [B, page bytes]: a sequence's last W tokens, each sequence's one page of W entries, in any order, of which
    the first ``window_lengths[b]`` (int32 [B]) exist. ``pool`` uint8 [pages, page bytes] and ``table`` int32 [B, max pages]
    as in `index_scores`; ``ids`` int32 [B, K] the selected entries, -1 for none. An entry whose page is missing is left out.
    All of one ``layout``, LATENT or plain.
    """

    layout: Layout
    window: Tensor
    window_lengths: Tensor
    pool: Tensor
    table: Tensor
    ids: Tensor


class Masses(NamedTuple):
    """Probabilities, mean over heads: ``entries`` float32 [B, K], ``window`` and ``sink`` float32 [B]; the three sum to 1."""

    entries: Tensor
    window: Tensor
    sink: Tensor


def matrix_type(layout: Layout) -> torch.dtype:
    """What entries are multiplied as; queries of this type need no conversion."""
    return torch.float32 if layout.dtype == torch.float32 else torch.float16


def sparse_attention(queries: Tensor, rows: Rows, sinks: Tensor, scale: float, want_masses: bool = False) -> tuple[Tensor, Masses | None]:
    """``queries`` [B, H, C] rotated, of `matrix_type` or bfloat16, ``sinks`` float32 [H]
    -> output [B, H, C] in the queries' type, RoPE not yet undone, and the masses where wanted."""
    run = sparse_attention_triton if runs_compiled(queries) else sparse_attention_reference
    return run(queries, rows, sinks, scale, want_masses)


def sparse_attention_reference(queries, rows: Rows, sinks, scale, want_masses=False) -> tuple[Tensor, Masses | None]:
    batch, width = len(queries), rows.layout.per_page(rows.window)
    places = torch.arange(width, device=queries.device)
    near = read_entries(rows.window, rows.layout, torch.arange(batch, device=queries.device)[:, None] * width + places)
    slots = slots_of(rows.table, rows.ids, rows.layout.per_page(rows.pool))
    values = torch.cat((near, read_entries(rows.pool, rows.layout, slots)), 1)  # [B, W + K, C]
    known = torch.cat((places < rows.window_lengths[:, None], slots >= 0), 1)
    values = values.masked_fill(~known[..., None], 0.0)  # what lies there need not be a number
    logits = torch.einsum("bhc,brc->bhr", queries.float(), values) * scale
    logits = logits.masked_fill(~known[:, None], float("-inf"))
    total = torch.logaddexp(logits.logsumexp(2), sinks.float())
    shares = (logits - total[..., None]).exp()
    out = (shares @ values).to(queries.dtype)
    return out, _masses(shares.mean(1), total, sinks, width) if want_masses else None


def _masses(rows: Tensor, total: Tensor, sinks: Tensor, width: int) -> Masses:
    """From each row's probability [B, W + K] and the log of each head's sum [B, H]."""
    return Masses(rows[:, width:], rows[:, :width].sum(1), (sinks.float() - total).exp().mean(1))


def sparse_attention_triton(queries, rows: Rows, sinks, scale, want_masses=False, tune: tuning.Attention = tuning.ATTENTION) -> tuple[Tensor, Masses | None]:
    batch, heads, size = queries.shape
    dense, bias = _gathered(rows, tune)
    n_rows, window = rows.layout.per_page(rows.window) + rows.ids.shape[1], rows.layout.per_page(rows.window)
    fitting = tune.block_bytes // (size * dense.element_size())
    block_heads, block_rows = min(tune.block_heads, max(16, next_power_of_2(heads)), fitting), min(tune.block_rows, fitting)
    blocks, head_blocks = dense.shape[1] // block_rows, cdiv(heads, block_heads)
    splits = max(1, min(blocks, tune.programs // (batch * head_blocks)))
    float32 = {"dtype": torch.float32, "device": queries.device}
    parts = torch.empty(batch, splits, heads, size, **float32)
    part_sums = torch.empty(batch, splits, heads, **float32)
    logits = torch.empty(batch, heads, n_rows, **float32) if want_masses else part_sums
    # queries in the rows' own type: converted in the kernel they would fill the registers
    _attend[(batch, head_blocks, splits)](
        queries.to(dense.dtype), dense, bias, parts, part_sums, logits, scale, n_rows, HEADS=heads, WIDTH=size, ROWS=dense.shape[1],
        BLOCK_HEADS=block_heads, BLOCK_ROWS=block_rows, SHARE=cdiv(blocks, splits), SPLITS=splits, LOGITS=want_masses, STAGES=tune.stages,
        num_warps=tune.warps if block_heads >= 64 else 4,
    )  # fmt: skip
    out, total = torch.empty_like(queries), torch.empty(batch, heads, **float32)
    _combine[(batch, heads)](
        parts, part_sums, sinks, out, total, HEADS=heads, WIDTH=size, SPLITS=splits, SPLITS_PADDED=next_power_of_2(splits), num_warps=4
    )
    if not want_masses:
        return out, None
    shares = torch.empty(batch, n_rows, **float32)
    _row_masses[(batch, cdiv(n_rows, tune.mass_rows))](logits, total, shares, HEADS=heads, ROWS=n_rows, BLOCK=tune.mass_rows, num_warps=4)
    return out, _masses(shares, total, sinks, window)


def _gathered(rows: Rows, tune: tuning.Attention) -> tuple[Tensor, Tensor]:
    """The rows [B, N, C] in their `matrix_type`, and a bias float32 [B, N]: -inf for what is not there. N is
    padded to whole blocks."""
    layout, (batch, selected) = rows.layout, rows.ids.shape
    window = layout.per_page(rows.window)
    count = cdiv(window + selected, tune.block_rows) * tune.block_rows
    dense = torch.empty(batch, count, layout.width, dtype=matrix_type(layout), device=rows.ids.device)
    bias = torch.empty(batch, count, dtype=torch.float32, device=rows.ids.device)
    _gather[(batch, cdiv(count, tune.gather_rows))](
        rows.window, rows.window_lengths, rows.pool, rows.table, rows.ids, dense, bias, rows.table.stride(0), count,
        WIDTH=layout.width, KIND=triton_kind(layout), VALUE_BYTES=layout.value_bytes, SCALE_BYTES=layout.scale_bytes,
        WINDOW=window, WINDOW_BYTES=rows.window.stride(0), SELECTED=selected, PER_PAGE=layout.per_page(rows.pool), PAGE_BYTES=rows.pool.stride(0),
        BLOCK_ROWS=tune.gather_rows, num_warps=4,
    )  # fmt: skip
    return dense, bias


@triton.jit
def _gather(
    window, window_lengths, pool, table, ids, dense, bias, table_stride, count,
    WIDTH: tl.constexpr, KIND: tl.constexpr, VALUE_BYTES: tl.constexpr, SCALE_BYTES: tl.constexpr,
    WINDOW: tl.constexpr, WINDOW_BYTES: tl.constexpr, SELECTED: tl.constexpr, PER_PAGE: tl.constexpr, PAGE_BYTES: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """One program: some rows of one sequence. A latent's rotated values, which are bfloat16 among float8, are loaded apart."""
    b, row = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    near, inside = row < WINDOW, row < count
    entry = tl.load(ids + b * SELECTED + (row - WINDOW), mask=(row >= WINDOW) & (row < WINDOW + SELECTED), other=-1)
    page = tl.load(table + b * table_stride + entry // PER_PAGE, mask=entry >= 0, other=-1)
    known = (near & (row < tl.load(window_lengths + b))) | (page >= 0)
    start = tl.where(near, window + b * WINDOW_BYTES, pool + page.to(tl.int64) * PAGE_BYTES)
    number, of = tl.where(near, row, entry % PER_PAGE), tl.where(near, WINDOW, PER_PAGE)
    values, scales = start + number * VALUE_BYTES, start + of * VALUE_BYTES + number * SCALE_BYTES
    places, lane = dense + (b * count + row)[:, None] * WIDTH, tl.arange(0, WIDTH)[None, :]
    latent = load_latents(values, scales, known, KIND, WIDTH).to(dense.dtype.element_ty)
    if KIND == "latent":
        tl.store(places + lane, latent, mask=inside[:, None] & (lane < WIDTH - 64))
        tl.store(places + (WIDTH - 64 + tl.arange(0, 64))[None, :], load_rotated(values, known, WIDTH), mask=inside[:, None])
    else:
        tl.store(places + lane, latent, mask=inside[:, None])
    tl.store(bias + b * count + row, tl.where(known, 0.0, float("-inf")), mask=inside)


@triton.jit
def _attend(
    queries, dense, bias, parts, part_sums, logits_out, scale, n_rows,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_ROWS: tl.constexpr, SHARE: tl.constexpr,
    SPLITS: tl.constexpr, LOGITS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: a block of heads of one sequence against a run of blocks of rows."""
    b, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    lane, exists = tl.arange(0, WIDTH), head < HEADS
    query = tl.load(queries + (b * HEADS + head)[:, None] * WIDTH + lane[None, :], mask=exists[:, None], other=0.0)
    dense, bias = dense + b * ROWS * WIDTH, bias + b * ROWS
    highest = tl.full([BLOCK_HEADS], float("-inf"), tl.float32)
    summed = tl.zeros([BLOCK_HEADS], tl.float32)
    attended = tl.zeros([BLOCK_HEADS, WIDTH], tl.float32)
    for start in tl.range(split * SHARE * BLOCK_ROWS, tl.minimum((split + 1) * SHARE * BLOCK_ROWS, ROWS), BLOCK_ROWS, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_ROWS)
        latent = tl.load(dense + row[:, None] * WIDTH + lane[None, :])
        logits = tl.dot(query, tl.trans(latent), input_precision="ieee") * scale + tl.load(bias + row)[None, :]  # [BLOCK_HEADS, BLOCK_ROWS]
        if LOGITS:
            tl.store(logits_out + (b * HEADS + head)[:, None] * n_rows + row[None, :], logits, mask=exists[:, None] & (row < n_rows)[None, :])
        risen = tl.maximum(highest, tl.max(logits, 1))
        level = tl.where(risen == float("-inf"), 0.0, risen)  # nothing known yet: exp(-inf), not exp(nan)
        weights = tl.exp(logits - level[:, None])
        fade = tl.exp(highest - level)
        summed = summed * fade + tl.sum(weights, 1)
        attended = tl.dot(weights.to(latent.dtype), latent, attended * fade[:, None], input_precision="ieee")
        highest = risen
    some = summed > 0
    summed = tl.where(some, summed, 1.0)
    places = (b * SPLITS + split) * HEADS + head
    tl.store(part_sums + places, tl.where(some, highest + tl.log(summed), float("-inf")), mask=exists)
    tl.store(parts + places[:, None] * WIDTH + lane[None, :], attended / summed[:, None], mask=exists[:, None])


@triton.jit
def _combine(parts, part_sums, sinks, out, total_out, HEADS: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr, SPLITS_PADDED: tl.constexpr):
    """One program: one head of one sequence."""
    b, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split, lane = tl.arange(0, SPLITS_PADDED), tl.arange(0, WIDTH)
    places = (b * SPLITS + split) * HEADS + head
    sums = tl.load(part_sums + places, mask=split < SPLITS, other=float("-inf"))
    sink = tl.load(sinks + head).to(tl.float32)
    level = tl.maximum(tl.max(sums, 0), sink)
    total = level + tl.log(tl.sum(tl.exp(sums - level), 0) + tl.exp(sink - level))
    tl.store(total_out + b * HEADS + head, total)
    part = tl.load(parts + places[:, None] * WIDTH + lane[None, :], mask=(split < SPLITS)[:, None], other=0.0)
    whole = tl.sum(part * tl.exp(sums - total)[:, None], 0)
    tl.store(out + (b * HEADS + head) * WIDTH + lane, whole.to(out.dtype.element_ty))


@triton.jit
def _row_masses(logits, total, shares, HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """One program: a block of one sequence's rows, over all heads."""
    b = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    share = tl.zeros([BLOCK], tl.float32)
    for head in range(HEADS):
        logit = tl.load(logits + (b * HEADS + head) * ROWS + row, mask=row < ROWS, other=float("-inf"))
        share += tl.exp(logit - tl.load(total + b * HEADS + head))
    tl.store(shares + b * ROWS + row, share / HEADS, mask=row < ROWS)
