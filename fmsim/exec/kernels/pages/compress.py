"""Entry compression and append: pools a window of tokens into one entry and writes it into its page
(eqs. 9-12, 20-23).

A compressor's projections of a token are ``kv`` and ``gate``. An entry is their softmax-gated mean,
channel by channel, over its own ``rate`` tokens and, with two overlapping series, over the ``rate``
tokens before; then RMSNorm, RoPE at the entry's first token, and the layout's quantisation. The
projections of the last tokens, whose entries are still open, live in a ring. So all that a layer
appends of a decode step's token is one launch, whether entries close or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.lang import (
    let_next_begin,
    overlapped,
    runs_compiled,
    tl,
    triton,
    wait_for_previous,
)
from fmsim.exec.kernels.layout import Layout, slots_of, store_entry, triton_kind, write_entries


class Ring(NamedTuple):
    """Projections of the last ``series * rate`` tokens, each [B, series * rate, series * width];
    token t lies at t modulo their number.
    """

    kv: Tensor
    gate: Tensor


class Pooling(NamedTuple):
    """A compressor's parameters: ``rate`` tokens an entry, 1 or 2 ``series``, ``bias`` float32
    [rate, series * width] added to the gate, ``norm`` [width] and ``eps`` of the RMSNorm.
    """

    rate: int
    series: int
    bias: Tensor
    norm: Tensor
    eps: float

    @property
    def width(self) -> int:
        return len(self.norm)

    @property
    def span(self) -> int:
        """Tokens that an entry is made of."""
        return self.series * self.rate

    def new_ring(self, batch: int, dtype: torch.dtype) -> Ring:
        shape = (batch, self.span, self.series * self.width)
        return Ring(*(torch.zeros(shape, dtype=dtype, device=self.norm.device) for _ in range(2)))


class Append(NamedTuple):
    """One compressor's part of a step: a token of each of B sequences.

    ``kv`` and ``gate`` [B, 1, series * width] are the token's projections (rows may be parts of
    longer ones). ``rotation``: cosine and sine, float32 [B, 1, pairs], at the first token of the
    entry that it is in. ``pool`` and ``table`` as in `index_scores`; an entry whose page is missing
    is not written. The pool and the ring change.
    """

    kv: Tensor
    gate: Tensor
    pooling: Pooling
    ring: Ring
    rotation: tuple[Tensor, Tensor]
    pool: Tensor
    layout: Layout
    table: Tensor


def append(appends: Sequence[Append], positions: Tensor, alongside: bool = False) -> None:
    """Take the token at ``positions`` int32 [B], on the device: write every entry that it closes,
    and remember what stays open. No two of the ``appends`` write one pool. Two may share a ring,
    with one projection: both write the same token at its place, and read the others.

    ``alongside`` the launch before this one in its stream, which must have begun when projections
    were there.
    """
    run = append_triton if runs_compiled(positions) else append_reference
    run(appends, positions, alongside)


def append_reference(appends, positions, alongside=False) -> None:
    for of in appends:
        for b, position in enumerate(positions.tolist()):
            if (position + 1) % of.pooling.rate == 0:
                _close(of, b, position)
            for part, new in zip(of.ring, (of.kv, of.gate), strict=True):
                part[b, position % of.pooling.span] = new[b, 0].to(part.dtype)


def _close(of: Append, b: int, position: int) -> None:
    """Write the entry whose last token is at ``position``."""
    pooling, span = of.pooling, of.pooling.span
    before = torch.arange(position + 1 - span, position, device=of.kv.device) % span
    known = [
        torch.cat((part[b, before], new[b])).float()
        for part, new in zip(of.ring, (of.kv, of.gate), strict=True)
    ]
    pooled = _pool(*known, pooling, missing=max(0, span - 1 - position))
    row = pooled * torch.rsqrt(pooled.square().mean() + pooling.eps) * pooling.norm.float()
    row = _rotate(row, *(part[b, 0] for part in of.rotation))
    entry = torch.tensor([[position // pooling.rate]], device=of.kv.device)
    slot = slots_of(of.table[b : b + 1], entry, of.layout.per_page(of.pool))[0]
    write_entries(of.pool, of.layout, slot, row[None])


def _pool(kv: Tensor, gate: Tensor, pooling: Pooling, missing: int) -> Tensor:
    """The gated mean of one entry's tokens, kv and gate [series * rate, series * width] -> [width].

    The first ``missing`` do not exist.
    """
    rate, width = pooling.rate, pooling.width
    parts = []
    for part in (kv, gate + pooling.bias.float().repeat(pooling.series, 1)):
        earlier, own = (
            part[:-rate, :width],
            part[-rate:, -width:],
        )  # the series for the window before, and its own
        parts.append(torch.cat((earlier, own)))
    return (parts[0][missing:] * parts[1][missing:].softmax(0)).sum(0)


def _rotate(row: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on the trailing pairs of row [width], interleaved."""
    dims = 2 * len(cos)
    even, odd = row[len(row) - dims :: 2], row[len(row) - dims + 1 :: 2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten()
    return torch.cat((row[: len(row) - dims], turned))


def append_triton(
    appends, positions, alongside=False, tune: tuning.CompressTuning = tuning.COMPRESS
) -> None:
    kvs, gates, poolings, rings, rotations, pools, layouts, tables = zip(*appends, strict=True)
    cosines, sines = zip(*rotations, strict=True)
    assert all(part.shape[1] == part.stride(2) == 1 for part in (*kvs, *gates)), (
        "one token, whose channels lie side by side"
    )
    _append[(len(positions), len(appends))](
        kvs,
        gates,
        positions,
        tuple(pooling.bias for pooling in poolings),
        tuple(pooling.norm for pooling in poolings),
        tuple(ring.kv for ring in rings),
        tuple(ring.gate for ring in rings),
        cosines,
        sines,
        pools,
        tables,
        tuple(table.stride(0) for table in tables),  # more pages are no other kernel
        EPS=tuple(pooling.eps for pooling in poolings),
        KV_STRIDES=tuple(part.stride(0) for part in kvs),
        GATE_STRIDES=tuple(part.stride(0) for part in gates),
        RATES=tuple(pooling.rate for pooling in poolings),
        SERIES=tuple(pooling.series for pooling in poolings),
        WIDTHS=tuple(pooling.width for pooling in poolings),
        PAIRS=tuple(part.shape[2] for part in cosines),
        KINDS=tuple(triton_kind(layout) for layout in layouts),
        VALUE_BYTES=tuple(layout.value_bytes for layout in layouts),
        SCALE_BYTES=tuple(layout.scale_bytes for layout in layouts),
        PER_PAGE=tuple(of.per_page(pool) for of, pool in zip(layouts, pools, strict=True)),
        PAGE_BYTES=tuple(pool.stride(0) for pool in pools),
        BLOCKS=tuple(min(tune.block_tokens, pooling.span) for pooling in poolings),
        COUNT=len(appends),
        ALONGSIDE=alongside,
        num_warps=tune.warps,
        **(overlapped(positions) if alongside else {}),
    )


@triton.jit
def _append(
    kvs,
    gates,
    positions,
    biases,
    norms,
    ring_kvs,
    ring_gates,
    cosines,
    sines,
    pools,
    tables,
    table_strides,
    EPS: tl.constexpr,
    KV_STRIDES: tl.constexpr,
    GATE_STRIDES: tl.constexpr,
    RATES: tl.constexpr,
    SERIES: tl.constexpr,
    WIDTHS: tl.constexpr,
    PAIRS: tl.constexpr,
    KINDS: tl.constexpr,
    VALUE_BYTES: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    PER_PAGE: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    BLOCKS: tl.constexpr,
    COUNT: tl.constexpr,
    ALONGSIDE: tl.constexpr,
):
    """One program: one sequence's token, and the entry that it may close, of the n-th of COUNT
    compressors.

    ALONGSIDE the launch before it: that one began when all that both read was there, so it is
    waited for only that none ends before it.
    """
    let_next_begin()
    b, own = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions + b)
    for n in tl.static_range(COUNT):
        if own == n:
            _append_one(
                b,
                position,
                kvs[n] + b * KV_STRIDES[n],
                gates[n] + b * GATE_STRIDES[n],
                biases[n],
                norms[n],
                ring_kvs[n],
                ring_gates[n],
                cosines[n],
                sines[n],
                pools[n],
                tables[n] + b * table_strides[n],
                EPS[n],
                RATES[n],
                SERIES[n],
                WIDTHS[n],
                PAIRS[n],
                tl.constexpr(KINDS[n]),
                VALUE_BYTES[n],
                SCALE_BYTES[n],
                PER_PAGE[n],
                PAGE_BYTES[n],
                BLOCKS[n],
            )
    if ALONGSIDE:
        wait_for_previous()


@triton.jit
def _append_one(
    b,
    position,
    new_kv,
    new_gate,
    bias,
    norm,
    ring_kv,
    ring_gate,
    cos,
    sin,
    pool,
    table,
    eps,
    RATE: tl.constexpr,
    SERIES: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    KIND: tl.constexpr,
    VALUE_BYTES: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    PER_PAGE: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of one compressor; ``new_kv``, ``new_gate`` and ``table`` are sequence b's."""
    SPAN: tl.constexpr = SERIES * RATE
    channel = tl.arange(0, WIDTH)
    ring_kv, ring_gate = ring_kv + b * SPAN * SERIES * WIDTH, ring_gate + b * SPAN * SERIES * WIDTH
    for series in tl.static_range(SERIES):  # in the place of one that no open entry needs
        column = series * WIDTH + channel
        place = (position % SPAN) * SERIES * WIDTH + column
        tl.store(ring_kv + place, tl.load(new_kv + column).to(ring_kv.dtype.element_ty))
        tl.store(ring_gate + place, tl.load(new_gate + column).to(ring_gate.dtype.element_ty))
    entry, ends = position // RATE, position + 1
    page = tl.load(table + entry // PER_PAGE, mask=ends % RATE == 0, other=-1)
    if page >= 0:
        highest = tl.full([WIDTH], float("-inf"), tl.float32)
        summed = tl.zeros([WIDTH], tl.float32)
        pooled = tl.zeros([WIDTH], tl.float32)
        for first in range(0, SPAN, BLOCK):
            of = first + tl.arange(0, BLOCK)
            token = ends - SPAN + of
            half = tl.where(of < SPAN - RATE, 0, SERIES - 1)
            columns = (half * WIDTH)[:, None] + channel[None, :]
            at_ring = (token % SPAN)[:, None] * (SERIES * WIDTH) + columns
            new = (token == position)[:, None]
            old = (token >= 0)[:, None] & (token < position)[:, None]
            value = tl.load(new_kv + columns, mask=new, other=0.0).to(tl.float32)
            value += tl.load(ring_kv + at_ring, mask=old, other=0.0).to(tl.float32)
            level = tl.load(new_gate + columns, mask=new, other=0.0).to(tl.float32)
            level += tl.load(ring_gate + at_ring, mask=old, other=0.0).to(tl.float32)
            level += tl.load(bias + (of % RATE)[:, None] * (SERIES * WIDTH) + columns).to(
                tl.float32
            )
            level = tl.where((token >= 0)[:, None], level, float("-inf"))
            risen = tl.maximum(highest, tl.max(level, 0))
            base = tl.where(risen == float("-inf"), 0.0, risen)
            weight, fade = tl.exp(level - base[None, :]), tl.exp(highest - base)
            summed = summed * fade + tl.sum(weight, 0)
            pooled = pooled * fade + tl.sum(weight * value, 0)
            highest = risen
        row = pooled / summed
        share = tl.load(norm + channel).to(tl.float32)
        row = row * tl.rsqrt(tl.sum(row * row, 0) / WIDTH + eps) * share
        pair = tl.arange(0, WIDTH // 2) - (WIDTH // 2 - PAIRS)
        c = tl.load(cos + b * PAIRS + pair, mask=pair >= 0, other=1.0)
        s = tl.load(sin + b * PAIRS + pair, mask=pair >= 0, other=0.0)
        even, odd = tl.split(tl.reshape(row, [WIDTH // 2, 2]))
        row = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), [WIDTH])
        home, in_page = pool + page.to(tl.int64) * PAGE_BYTES, entry % PER_PAGE
        store_entry(
            home + in_page * VALUE_BYTES,
            home + PER_PAGE * VALUE_BYTES + in_page * SCALE_BYTES,
            row,
            KIND,
            WIDTH,
        )
