"""Attention of one decode token over its window and its selected entries: shared K = V latent, a
sink a head (eqs. 18-19).

Many requests' packed entries are FlashMLA's where its wheel is installed (`flash_mla`). Else the
rows (the window's, then the entries') are split over programs, each of which keeps a running
softmax, by one of two kernels as there are few requests or many. Where rows were split, another
combines the parts by their log-sum-exp and adds the sink, which takes part in the sum and has no
value. A last one gives each row's probability, mean over heads, where a trace or a policy needs it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.attention import flash_mla
from fmsim.exec.kernels.attention.gathered import attend_gathered
from fmsim.exec.kernels.attention.in_place import attend_in_place
from fmsim.exec.kernels.attention.rows import Parts, Rows, matrix_type
from fmsim.exec.kernels.lang import (
    after_previous,
    after_previous_with_next,
    cdiv,
    next_power_of_2,
    overlapped,
    runs_compiled,
    tl,
    triton,
)
from fmsim.exec.kernels.layout import read_entries, slots_of, triton_type
from fmsim.exec.kernels.norms.norm_rope import Turn, norm_rope, norm_rope_reference
from fmsim.exec.kernels.norms.rounded_rows import (
    Activations,
    Float8Rows,
    destination,
    round_rows,
    round_rows_reference,
    round_rows_triton,
    store_rounded,
)
from fmsim.exec.kernels.weights import BLOCK

MASS_ROWS = 128  # of one program
COMBINED = 8192  # values of parts that a program adds up: 64 a thread


class Masses(NamedTuple):
    """Probabilities, mean over heads: ``entries`` float32 [B, K], ``window`` and ``sink`` float32
    [B]; the three sum to 1.
    """

    entries: Tensor
    window: Tensor
    sink: Tensor


def sparse_attention(
    queries: Tensor,
    rows: Rows,
    sinks: Tensor,
    scale: float,
    want_masses: bool = False,
    turn: Turn | None = None,
    dtype: torch.dtype | None = None,
    rounded: bool = False,
    known: bool = False,
) -> tuple[Activations, Masses | None]:
    """``queries`` [B, H, C] rotated, of `matrix_type` or bfloat16, ``sinks`` float32 [H]
    -> output [B, H, C] in ``dtype``, the queries' unless given, and the masses where wanted.
    ``rounded``: as rows [B, H * C] of float8 alone.

    With ``turn``, the queries' angles as `norm_rope` takes them, the values' RoPE is undone. The
    ids are ``known`` where they, their table and the window's lengths were there before the launch
    that makes the queries.
    """
    run = sparse_attention_triton if runs_compiled(queries) else sparse_attention_reference
    return run(queries, rows, sinks, scale, want_masses, turn, dtype, rounded, known)


def sparse_attention_reference(
    queries,
    rows: Rows,
    sinks,
    scale,
    want_masses=False,
    turn=None,
    dtype=None,
    rounded=False,
    known=False,
) -> tuple[Activations, Masses | None]:
    batch, width = len(queries), rows.layout.per_page(rows.window)
    places = torch.arange(width, device=queries.device)
    near = read_entries(
        rows.window,
        rows.layout,
        torch.arange(batch, device=queries.device)[:, None] * width + places,
    )
    slots = slots_of(rows.table, rows.ids, rows.layout.per_page(rows.pool))
    values = torch.cat((near, read_entries(rows.pool, rows.layout, slots)), 1)  # [B, W + K, C]
    known = torch.cat((places < rows.window_lengths[:, None], slots >= 0), 1)
    values = values.masked_fill(~known[..., None], 0.0)  # what lies there need not be a number
    logits = torch.einsum("bhc,brc->bhr", queries.float(), values) * scale
    logits = logits.masked_fill(~known[:, None], float("-inf"))
    total = torch.logaddexp(logits.logsumexp(2), sinks.float())
    shares = (logits - total[..., None]).exp()
    out, dtype = shares @ values, dtype or queries.dtype
    if turn is not None:
        out = norm_rope_reference(out, turn, inverse=True)
    masses = Masses(
        shares.mean(1)[:, width:],
        shares.mean(1)[:, :width].sum(1),
        (sinks.float() - total).exp().mean(1),
    )
    out = out.to(dtype)
    return round_rows_reference(out.flatten(1)) if rounded else out, masses if want_masses else None


def sparse_attention_triton(
    queries,
    rows: Rows,
    sinks,
    scale,
    want_masses=False,
    turn=None,
    dtype=None,
    rounded=False,
    known=False,
    tune: tuning.AttentionTuning | tuning.GatheredAttentionTuning | None = None,
) -> tuple[Activations, Masses | None]:
    batch, heads, _ = queries.shape
    served = flash_mla.serves(batch, heads, rows.layout, rows.window, rows.pool, rows.count)
    if tune is None and served and not want_masses:
        return _finished(flash_mla.attend(queries, rows, sinks, scale), turn, dtype, rounded), None
    tune = tune or tuning.attention(batch, heads, packed=rows.layout.kind == "latent")
    out = torch.empty_like(queries)
    # queries in the rows' own type: converted in the kernel they would fill the registers
    wanted = queries.to(matrix_type(rows.layout))
    given = wanted, rows, sinks, scale, want_masses, tune, out
    if isinstance(tune, tuning.AttentionTuning):
        parts = attend_in_place(*given, known)
    else:
        parts = attend_gathered(*given)
    total = parts.sums[:, 0]
    if parts.values is not out:
        done, total = _combined(parts, sinks, turn, dtype or out.dtype, rounded)
    else:
        done = _finished(out, turn, dtype, rounded)
    if not want_masses:
        return done, None
    float32 = {"dtype": torch.float32, "device": queries.device}
    masses = Masses(
        torch.empty(rows.ids.shape, **float32),
        torch.empty(batch, **float32),
        torch.empty(batch, **float32),
    )
    # the first program has the whole window
    block = max(MASS_ROWS, next_power_of_2(rows.window_rows))
    _row_masses[(batch, cdiv(rows.count, block))](
        parts.logits,
        total,
        sinks,
        *masses,
        rows.count,
        WINDOW=rows.window_rows,
        HEADS=heads,
        HEADS_PADDED=next_power_of_2(heads),
        BLOCK=block,
        num_warps=8,
        **overlapped(queries),
    )
    return done, masses


def _finished(
    out: Tensor, turn: Turn | None, dtype: torch.dtype | None, rounded: bool
) -> Activations:
    """An output [B, H, C] that nothing is left to combine of, with its RoPE undone."""
    if turn is not None:
        return norm_rope(out, turn, inverse=True, dtype=dtype, rounded=rounded)
    out = out if dtype is None else out.to(dtype)
    return round_rows(out.flatten(1)) if rounded else out


def _combined(
    parts: Parts, sinks: Tensor, turn: Turn | None, dtype: torch.dtype, rounded: bool
) -> tuple[Activations, Tensor]:
    """The output [B, H, C] of several parts, or rows [B, H * C] of float8 where ``rounded``, and
    the logarithm float32 [B, H] of what its exponentials add up to, the sink's with them.
    """
    cos, sin = (sinks, sinks) if turn is None else turn
    assert cos.is_contiguous() and sin.is_contiguous()  # a copy would not be waited for
    batch, splits, heads, size = parts.values.shape
    device = parts.values.device
    total = torch.empty(batch, heads, dtype=torch.float32, device=device)
    padded = next_power_of_2(splits)
    block = min(size, max(64, COMBINED // padded))
    made, out = None, parts.values
    if rounded and block % BLOCK == 0:  # a program has all of what is scaled
        made = Float8Rows.empty((batch,), heads * size, dtype, device)
    else:
        out = torch.empty(batch, heads, size, dtype=dtype, device=device)
    _combine[(batch, heads, cdiv(size, block))](
        parts.values,
        parts.sums,
        sinks,
        cos,
        sin,
        out,
        *destination(made, out),
        total,
        splits,
        HEADS=heads,
        WIDTH=size,
        BLOCK=block,
        SPLITS_PADDED=padded,
        PAIRS=0 if turn is None else cos.shape[1],
        TYPE=triton_type(dtype),
        ROUNDED=made is not None,
        SCALED=BLOCK,
        num_warps=4,
        **overlapped(out),
    )
    if made is not None:
        return made, total
    return round_rows_triton(out.flatten(1)) if rounded else out, total


@triton.jit
def _combine(
    parts,
    part_sums,
    sinks,
    cos,
    sin,
    out,
    codes,
    scales,
    scale_stride,
    total_out,
    splits,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    PAIRS: tl.constexpr,
    TYPE: tl.constexpr,
    ROUNDED: tl.constexpr,
    SCALED: tl.constexpr,
):
    """One program: a block of channels of one head of one sequence; of the last PAIRS of all, RoPE
    is undone.
    """
    b, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    sink = tl.load(sinks + head).to(tl.float32)
    if PAIRS:  # angles are made at a step's start
        pair = tl.program_id(2) * (BLOCK // 2) + tl.arange(0, BLOCK // 2) - (WIDTH // 2 - PAIRS)
        turned = (pair >= 0) & (pair < PAIRS)
        c = tl.load(cos + b * PAIRS + pair, mask=turned, other=1.0)
        s = tl.load(sin + b * PAIRS + pair, mask=turned, other=0.0)
    after_previous_with_next()
    split, lane = tl.arange(0, SPLITS_PADDED), tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    places = (b * splits + split) * HEADS + head
    sums = tl.load(part_sums + places, mask=split < splits, other=float("-inf"))
    part = tl.load(
        parts + places[:, None] * WIDTH + lane[None, :],
        mask=(split < splits)[:, None] & (lane < WIDTH)[None, :],
        other=0.0,
    )
    level = tl.maximum(tl.max(sums, 0), sink)
    total = level + tl.log(tl.sum(tl.exp(sums - level), 0) + tl.exp(sink - level))
    tl.store(total_out + b * HEADS + head, total, mask=tl.program_id(2) == 0)
    whole = tl.sum(part * tl.exp(sums - total)[:, None], 0)
    if PAIRS:
        even, odd = tl.split(tl.reshape(whole, [BLOCK // 2, 2]))
        whole = tl.reshape(tl.join(even * c + odd * s, odd * c - even * s), [BLOCK])
    whole = whole.to(TYPE)
    if ROUNDED:
        first = head * WIDTH + tl.program_id(2) * BLOCK
        run = whole.to(tl.float32)
        store_rounded(run, codes, scales, b, scale_stride, first, HEADS * WIDTH, SCALED)
    else:
        tl.store(out + (b * HEADS + head) * WIDTH + lane, whole, mask=lane < WIDTH)


@triton.jit
def _row_masses(
    logits,
    total,
    sinks,
    entries_out,
    window_out,
    sink_out,
    rows,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: a block of one sequence's rows, over all heads; the first, of the window and the
    sink too.
    """
    after_previous()
    b, first = tl.program_id(0).to(tl.int64), tl.program_id(1) == 0
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    head = tl.arange(0, HEADS_PADDED)
    exists = head < HEADS
    of_head = tl.load(total + b * HEADS + head, mask=exists, other=0.0)
    places = (b * HEADS + head)[:, None] * rows + row[None, :]
    logit = tl.load(
        logits + places, mask=exists[:, None] & (row < rows)[None, :], other=float("-inf")
    )
    share = tl.sum(tl.exp(logit - of_head[:, None]), 0)
    sink = tl.sum(
        tl.exp(tl.load(sinks + head, mask=exists, other=float("-inf")).to(tl.float32) - of_head), 0
    )
    tl.store(
        entries_out + b * (rows - WINDOW) + row - WINDOW,
        share / HEADS,
        mask=(row >= WINDOW) & (row < rows),
    )
    tl.store(window_out + b, tl.sum(tl.where(row < WINDOW, share, 0.0), 0) / HEADS, mask=first)
    tl.store(sink_out + b, sink / HEADS, mask=first)
