"""Attention of one decode token over its window and its selected entries: shared K = V latent, a sink a head (eqs. 18-19).

The rows (the window's, then the entries') are split over programs, each of which keeps a running softmax, by one of two kernels as there are few
requests or many. Another combines the splits by their log-sum-exp and adds the sink, which takes part in the sum and has no value. A last one gives
each row's probability, mean over heads, where a trace or a policy needs it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.attention_gathered import attend_gathered
from fmsim.exec.kernels.attention_in_place import attend_in_place
from fmsim.exec.kernels.attention_rows import Rows, matrix_type
from fmsim.exec.kernels.lang import cdiv, next_power_of_2, runs_compiled, tl, triton
from fmsim.exec.kernels.layout import read_entries, slots_of

MASS_ROWS = 128  # of one program


class Masses(NamedTuple):
    """Probabilities, mean over heads: ``entries`` float32 [B, K], ``window`` and ``sink`` float32 [B]; the three sum to 1."""

    entries: Tensor
    window: Tensor
    sink: Tensor


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


def sparse_attention_triton(
    queries, rows: Rows, sinks, scale, want_masses=False, tune: tuning.Attention | tuning.GatheredAttention | None = None
) -> tuple[Tensor, Masses | None]:
    (batch, heads, size), tune = queries.shape, tune or tuning.attention(*queries.shape[:2], packed=rows.layout.kind == "latent")
    attend = attend_in_place if isinstance(tune, tuning.Attention) else attend_gathered
    # queries in the rows' own type: converted in the kernel they would fill the registers
    parts = attend(queries.to(matrix_type(rows.layout)), rows, scale, want_masses, tune)
    splits, float32 = parts.sums.shape[1], {"dtype": torch.float32, "device": queries.device}
    out, total = torch.empty_like(queries), torch.empty(batch, heads, **float32)
    _combine[(batch, heads)](
        parts.values, parts.sums, sinks, out, total, splits, HEADS=heads, WIDTH=size, SPLITS_PADDED=next_power_of_2(splits), num_warps=4
    )
    if not want_masses:
        return out, None
    shares = torch.empty(batch, rows.count, **float32)
    _row_masses[(batch, cdiv(rows.count, MASS_ROWS))](parts.logits, total, shares, rows.count, HEADS=heads, BLOCK=MASS_ROWS, num_warps=4)
    return out, _masses(shares, total, sinks, rows.window_rows)


@triton.jit
def _combine(parts, part_sums, sinks, out, total_out, splits, HEADS: tl.constexpr, WIDTH: tl.constexpr, SPLITS_PADDED: tl.constexpr):
    """One program: one head of one sequence."""
    b, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split, lane = tl.arange(0, SPLITS_PADDED), tl.arange(0, WIDTH)
    places = (b * splits + split) * HEADS + head
    sums = tl.load(part_sums + places, mask=split < splits, other=float("-inf"))
    sink = tl.load(sinks + head).to(tl.float32)
    level = tl.maximum(tl.max(sums, 0), sink)
    total = level + tl.log(tl.sum(tl.exp(sums - level), 0) + tl.exp(sink - level))
    tl.store(total_out + b * HEADS + head, total)
    part = tl.load(parts + places[:, None] * WIDTH + lane[None, :], mask=(split < splits)[:, None], other=0.0)
    whole = tl.sum(part * tl.exp(sums - total)[:, None], 0)
    tl.store(out + (b * HEADS + head) * WIDTH + lane, whole.to(out.dtype.element_ty))


@triton.jit
def _row_masses(logits, total, shares, rows, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """One program: a block of one sequence's rows, over all heads."""
    b = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    share = tl.zeros([BLOCK], tl.float32)
    for head in range(HEADS):
        logit = tl.load(logits + (b * HEADS + head) * rows + row, mask=row < rows, other=float("-inf"))
        share += tl.exp(logit - tl.load(total + b * HEADS + head))
    tl.store(shares + b * rows + row, share / HEADS, mask=row < rows)
