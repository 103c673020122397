"""Attention of one decode token over its window and its selected entries: shared K = V latent, a sink a head (eqs. 18-19).

One pass splits the rows (the window's, then the entries') over programs, each of which keeps a running softmax; a second
combines the splits by their log-sum-exp and adds the sink, which takes part in the sum and has no value. A third gives
each row's probability, mean over heads, where a trace or a policy needs it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.lang import cdiv, next_power_of_2, runs_compiled, tl, triton
from fmsim.exec.kernels.layout import Layout, load_latents, load_rotated, product_operand, read_entries, slots_of, triton_kind


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


def sparse_attention(queries: Tensor, rows: Rows, sinks: Tensor, scale: float, want_masses: bool = False) -> tuple[Tensor, Masses | None]:
    """``queries`` [B, H, C] rotated, bfloat16 (float32 or float16 too for plain entries of that type), ``sinks`` float32 [H]
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


def sparse_attention_triton(queries, rows: Rows, sinks, scale, want_masses=False, tune: tuning.Attention | None = None) -> tuple[Tensor, Masses | None]:
    batch, heads, size = queries.shape
    tune = tune or (tuning.ATTENTION_OF_MANY if batch >= tuning.MANY_REQUESTS and heads >= 64 and rows.layout.kind == "latent" else tuning.ATTENTION)
    window, selected = rows.layout.per_page(rows.window), rows.ids.shape[1]
    n_rows, head_blocks = window + selected, cdiv(heads, tune.block_heads)
    splits = max(1, min(cdiv(n_rows, tune.block_rows), tune.programs // (batch * head_blocks)))
    float32 = {"dtype": torch.float32, "device": queries.device}
    parts = torch.empty(batch, splits, heads, size, **float32)
    part_sums = torch.empty(batch, splits, heads, **float32)
    logits = torch.empty(batch, heads, n_rows, **float32) if want_masses else part_sums
    _attend[(batch, head_blocks, splits)](
        queries, rows.window, rows.window_lengths, rows.pool, rows.table, rows.ids, parts, part_sums, logits, scale, rows.table.stride(0),
        HEADS=heads, WIDTH=size, KIND=triton_kind(rows.layout), VALUE_BYTES=rows.layout.value_bytes, SCALE_BYTES=rows.layout.scale_bytes,
        WINDOW=window, WINDOW_BYTES=rows.window.stride(0), SELECTED=selected,
        PER_PAGE=rows.layout.per_page(rows.pool), PAGE_BYTES=rows.pool.stride(0),
        BLOCK_HEADS=tune.block_heads, BLOCK_ROWS=tune.block_rows, SPLITS=splits, LOGITS=want_masses, STAGES=tune.stages, num_warps=tune.warps,
    )  # fmt: skip
    out, total = torch.empty_like(queries), torch.empty(batch, heads, **float32)
    _combine[(batch, heads)](
        parts, part_sums, sinks, out, total, HEADS=heads, WIDTH=size, SPLITS=splits, SPLITS_PADDED=next_power_of_2(splits), num_warps=tune.warps
    )
    if not want_masses:
        return out, None
    shares = torch.empty(batch, n_rows, **float32)
    _row_masses[(batch, cdiv(n_rows, tune.mass_rows))](logits, total, shares, HEADS=heads, ROWS=n_rows, BLOCK=tune.mass_rows, num_warps=tune.warps)
    return out, _masses(shares, total, sinks, window)


@triton.jit
def _attend(
    queries, window, window_lengths, pool, table, ids, parts, part_sums, logits_out, scale, table_stride,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr, VALUE_BYTES: tl.constexpr, SCALE_BYTES: tl.constexpr,
    WINDOW: tl.constexpr, WINDOW_BYTES: tl.constexpr, SELECTED: tl.constexpr, PER_PAGE: tl.constexpr, PAGE_BYTES: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_ROWS: tl.constexpr, SPLITS: tl.constexpr, LOGITS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: a block of heads of one sequence against a run of blocks of rows.

    A latent's rotated values, which are bfloat16 among float8, go by products of their own, so that no value is converted twice.
    """
    b, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    lane = tl.arange(0, WIDTH)
    query_places = (b * HEADS + head)[:, None] * WIDTH + lane[None, :]
    query = product_operand(tl.load(queries + query_places, mask=(head < HEADS)[:, None], other=0.0))
    apart: tl.constexpr = KIND == "latent"
    turn = WIDTH - 64 + tl.arange(0, 64)
    if apart:
        query_turned = product_operand(tl.load(queries + (b * HEADS + head)[:, None] * WIDTH + turn[None, :], mask=(head < HEADS)[:, None], other=0.0))
    length = tl.load(window_lengths + b)
    blocks: tl.constexpr = (WINDOW + SELECTED + BLOCK_ROWS - 1) // BLOCK_ROWS
    share: tl.constexpr = (blocks + SPLITS - 1) // SPLITS
    highest = tl.full([BLOCK_HEADS], float("-inf"), tl.float32)
    summed = tl.zeros([BLOCK_HEADS], tl.float32)
    attended, attended_turned = tl.zeros([BLOCK_HEADS, WIDTH], tl.float32), tl.zeros([BLOCK_HEADS, 64], tl.float32)
    for block in tl.range(split * share, tl.minimum((split + 1) * share, blocks), num_stages=STAGES):
        row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        near = row < WINDOW
        entry = tl.load(ids + b * SELECTED + (row - WINDOW), mask=(row >= WINDOW) & (row < WINDOW + SELECTED), other=-1)
        page = tl.load(table + b * table_stride + entry // PER_PAGE, mask=entry >= 0, other=-1)
        known = (near & (row < length)) | (page >= 0)
        start = tl.where(near, window + b * WINDOW_BYTES, pool + page.to(tl.int64) * PAGE_BYTES)
        number, of = tl.where(near, row, entry % PER_PAGE), tl.where(near, WINDOW, PER_PAGE)
        places = start + number * VALUE_BYTES, start + of * VALUE_BYTES + number * SCALE_BYTES
        latent = product_operand(load_latents(places[0], places[1], known, KIND, WIDTH))
        logits = tl.dot(query, tl.trans(latent), input_precision="ieee")  # [BLOCK_HEADS, BLOCK_ROWS]
        if apart:
            rotated = load_rotated(places[0], known, WIDTH)
            logits = tl.dot(query_turned, tl.trans(rotated), logits)
        logits *= scale
        logits = tl.where(known[None, :], logits, float("-inf"))
        if LOGITS:
            out_places = (b * HEADS + head)[:, None] * (WINDOW + SELECTED) + row[None, :]
            tl.store(logits_out + out_places, logits, mask=(head < HEADS)[:, None] & (row < WINDOW + SELECTED)[None, :])
        risen = tl.maximum(highest, tl.max(logits, 1))
        level = tl.where(risen == float("-inf"), 0.0, risen)  # nothing known yet: exp(-inf), not exp(nan)
        weights = tl.exp(logits - level[:, None])
        fade = tl.exp(highest - level)
        summed = summed * fade + tl.sum(weights, 1)
        attended = attended * fade[:, None] + tl.dot(weights.to(latent.dtype), latent, input_precision="ieee")
        if apart:
            attended_turned = attended_turned * fade[:, None] + tl.dot(weights.to(rotated.dtype), rotated)
        highest = risen
    some = summed > 0
    summed = tl.where(some, summed, 1.0)
    places = (b * SPLITS + split) * HEADS + head
    tl.store(part_sums + places, tl.where(some, highest + tl.log(summed), float("-inf")), mask=head < HEADS)
    tl.store(
        parts + places[:, None] * WIDTH + lane[None, :], attended / summed[:, None], mask=(head < HEADS)[:, None] & (lane < (WIDTH - 64 if apart else WIDTH))[None, :]
    )
    if apart:
        tl.store(parts + places[:, None] * WIDTH + turn[None, :], attended_turned / summed[:, None], mask=(head < HEADS)[:, None])


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
