"""Entry compression and append: pools a window of tokens into one entry and writes it into its page
(eqs. 9-12, 20-23).

A compressor's projections of a token are ``kv`` and ``gate``. An entry is their softmax-gated mean,
channel by channel, over its own ``rate`` tokens and, with two overlapping series, over the ``rate``
tokens before; then RMSNorm, RoPE at the entry's first token, for index keys optionally a Hadamard
transform, and the layout's quantisation. The projections of the last tokens, whose entries are
still open, live in a ring, so a decode step of one token is one launch, whether an entry closes or
not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.lang import (
    cdiv,
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
    [rate, series * width] added to the gate, ``norm`` [width] and ``eps`` of the RMSNorm;
    ``hadamard`` float32 [width, width] (`scorer.hadamard_matrix`) or None.
    """

    rate: int
    series: int
    bias: Tensor
    norm: Tensor
    eps: float
    hadamard: Tensor | None = None

    @property
    def width(self) -> int:
        return len(self.norm)

    def new_ring(self, batch: int, dtype: torch.dtype) -> Ring:
        shape = (batch, self.series * self.rate, self.series * self.width)
        return Ring(*(torch.zeros(shape, dtype=dtype, device=self.norm.device) for _ in range(2)))

    def most_closed(self, tokens: int) -> int:
        """The most entries that ``tokens`` new tokens of a sequence can close."""
        return cdiv(tokens, self.rate)


def compress_and_append(
    kv: Tensor,
    gate: Tensor,
    starts: Tensor,
    pooling: Pooling,
    ring: Ring,
    rotation: tuple[Tensor, Tensor],
    pool: Tensor,
    layout: Layout,
    table: Tensor,
    alongside: bool = False,
) -> None:
    """Take S new tokens of each sequence, write every entry that they close, and remember what
    stays open.

    ``kv`` and ``gate`` [B, S, series * width] are the projections (rows may be parts of longer
    ones), ``starts`` int32 [B] the position of each first token, on the device. ``rotation``:
    cosine and sine, float32 [B, most_closed(S), pairs], at the first token of the entries that may
    close, the i-th being entry ``starts // rate + i``. ``pool`` and ``table`` as in `index_scores`;
    an entry whose page is missing is not written. Nothing is returned: the pool and the ring
    change.

    ``alongside``: the launch before this one in its stream is another of these, of other pools and
    rings, and both may run at once.
    """
    if runs_compiled(kv):
        compress_and_append_triton(
            kv, gate, starts, pooling, ring, rotation, pool, layout, table, alongside
        )
    else:
        compress_and_append_reference(
            kv, gate, starts, pooling, ring, rotation, pool, layout, table
        )


def compress_and_append_reference(
    kv, gate, starts, pooling: Pooling, ring: Ring, rotation, pool, layout, table
) -> None:
    tokens, span = kv.shape[1], pooling.series * pooling.rate
    for b, start in enumerate(starts.tolist()):
        first, last = start // pooling.rate, (start + tokens) // pooling.rate
        # the ring, in the order of tokens
        before = torch.arange(start - span, start, device=kv.device)
        known = [
            torch.cat((part[b, before % span], new[b])).float()
            for part, new in zip(ring, (kv, gate), strict=True)
        ]
        for number, entry in enumerate(range(first, last)):
            ends = (entry + 1) * pooling.rate - start + span  # in `known`
            pooled = _pool(
                *(part[ends - span : ends] for part in known),
                pooling,
                missing=max(0, span - (entry + 1) * pooling.rate),
            )
            row = pooled * torch.rsqrt(pooled.square().mean() + pooling.eps) * pooling.norm.float()
            row = _rotate(row, *(part[b, number] for part in rotation))
            if pooling.hadamard is not None:
                row = row @ pooling.hadamard
            slot = slots_of(
                table[b : b + 1], torch.tensor([[entry]], device=kv.device), layout.per_page(pool)
            )[0]
            write_entries(pool, layout, slot, row[None])
    _remember(kv, gate, starts, ring)


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


def _remember(kv: Tensor, gate: Tensor, starts: Tensor, ring: Ring) -> None:
    """The last tokens' projections into the ring."""
    span, tokens = ring.kv.shape[1], kv.shape[1]
    last = torch.arange(max(0, tokens - span), tokens, device=kv.device)
    places = (starts.long()[:, None] + last) % span
    for part, new in zip(ring, (kv, gate), strict=True):
        part.scatter_(
            1, places[..., None].expand(-1, -1, part.shape[2]), new[:, last].to(part.dtype)
        )


def compress_and_append_triton(
    kv,
    gate,
    starts,
    pooling: Pooling,
    ring: Ring,
    rotation,
    pool,
    layout,
    table,
    alongside: bool = False,
    tune: tuning.CompressTuning | None = None,
) -> None:
    tune = tune or tuning.COMPRESS
    batch, tokens, _ = kv.shape
    cos, sin = rotation
    assert kv.stride(2) == gate.stride(2) == 1, "a token's channels lie side by side"
    span, one_token = pooling.series * pooling.rate, tokens == 1
    _compress[(batch, pooling.most_closed(tokens))](
        kv,
        gate,
        starts,
        pooling.bias,
        pooling.norm,
        ring.kv,
        ring.gate,
        cos,
        sin,
        pooling.norm if pooling.hadamard is None else pooling.hadamard,
        pool,
        table,
        *kv.stride()[:2],
        *gate.stride()[:2],
        table.stride(0),
        tokens,
        pooling.eps,
        RATE=pooling.rate,
        SERIES=pooling.series,
        WIDTH=pooling.width,
        PAIRS=cos.shape[2],
        HADAMARD=pooling.hadamard is not None,
        REMEMBER=one_token,
        KIND=triton_kind(layout),
        VALUE_BYTES=layout.value_bytes,
        SCALE_BYTES=layout.scale_bytes,
        PER_PAGE=layout.per_page(pool),
        PAGE_BYTES=pool.stride(0),
        BLOCK=min(tune.block_tokens, span),
        ALONGSIDE=alongside,
        num_warps=tune.warps,
        **(overlapped(kv) if alongside else {}),
    )
    if not one_token:
        _remember(kv, gate, starts, ring)


@triton.jit
def _compress(
    kv,
    gate,
    starts,
    bias,
    norm,
    ring_kv,
    ring_gate,
    cos,
    sin,
    hadamard,
    pool,
    table,
    kv_stride,
    kv_token_stride,
    gate_stride,
    gate_token_stride,
    table_stride,
    tokens,
    eps,
    RATE: tl.constexpr,
    SERIES: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    HADAMARD: tl.constexpr,
    REMEMBER: tl.constexpr,
    KIND: tl.constexpr,
    VALUE_BYTES: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    PER_PAGE: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
    ALONGSIDE: tl.constexpr,
):
    """One program: the n-th entry that one sequence's new tokens may close.

    ALONGSIDE the launch before it: that one began when all that both read was there, so it is
    waited for only that none ends before it.
    """
    let_next_begin()
    b, number = tl.program_id(0).to(tl.int64), tl.program_id(1)
    SPAN: tl.constexpr = SERIES * RATE
    start = tl.load(starts + b)
    channel = tl.arange(0, WIDTH)
    new_kv, new_gate = kv + b * kv_stride, gate + b * gate_stride
    ring_kv, ring_gate = ring_kv + b * SPAN * SERIES * WIDTH, ring_gate + b * SPAN * SERIES * WIDTH
    if REMEMBER:  # a single token takes the place of one that no open entry needs
        for series in tl.static_range(SERIES):
            place = (start % SPAN) * SERIES * WIDTH + series * WIDTH + channel
            tl.store(
                ring_kv + place,
                tl.load(new_kv + series * WIDTH + channel).to(ring_kv.dtype.element_ty),
            )
            tl.store(
                ring_gate + place,
                tl.load(new_gate + series * WIDTH + channel).to(ring_gate.dtype.element_ty),
            )
    entry = start // RATE + number
    ends = (entry + 1) * RATE
    page = tl.load(
        table + b * table_stride + entry // PER_PAGE, mask=ends <= start + tokens, other=-1
    )
    if page >= 0:
        highest = tl.full([WIDTH], float("-inf"), tl.float32)
        summed = tl.zeros([WIDTH], tl.float32)
        pooled = tl.zeros([WIDTH], tl.float32)
        for first in range(0, SPAN, BLOCK):
            of = first + tl.arange(0, BLOCK)
            token = ends - SPAN + of
            half = tl.where(of < SPAN - RATE, 0, SERIES - 1)
            exists, new = (token >= 0)[:, None], (token >= start)[:, None]
            column = (half * WIDTH)[:, None] + channel[None, :]
            at_kv, at_gate = (
                (token - start)[:, None] * kv_token_stride + column,
                (token - start)[:, None] * gate_token_stride + column,
            )
            at_ring = (token % SPAN)[:, None] * (SERIES * WIDTH) + column
            value = tl.load(new_kv + at_kv, mask=exists & new, other=0.0).to(tl.float32)
            value += tl.load(
                ring_kv + at_ring, mask=exists & (token < start)[:, None], other=0.0
            ).to(tl.float32)
            level = tl.load(new_gate + at_gate, mask=exists & new, other=0.0).to(tl.float32)
            level += tl.load(
                ring_gate + at_ring, mask=exists & (token < start)[:, None], other=0.0
            ).to(tl.float32)
            level += tl.load(bias + (of % RATE)[:, None] * (SERIES * WIDTH) + column).to(tl.float32)
            level = tl.where(exists, level, float("-inf"))
            risen = tl.maximum(highest, tl.max(level, 0))
            base = tl.where(risen == float("-inf"), 0.0, risen)
            weight, fade = tl.exp(level - base[None, :]), tl.exp(highest - base)
            summed = summed * fade + tl.sum(weight, 0)
            pooled = pooled * fade + tl.sum(weight * value, 0)
            highest = risen
        row = pooled / summed
        row = (
            row
            * tl.rsqrt(tl.sum(row * row, 0) / WIDTH + eps)
            * tl.load(norm + channel).to(tl.float32)
        )
        pair = tl.arange(0, WIDTH // 2) - (WIDTH // 2 - PAIRS)
        places = (b * tl.num_programs(1) + number) * PAIRS + pair
        c, s = (
            tl.load(cos + places, mask=pair >= 0, other=1.0),
            tl.load(sin + places, mask=pair >= 0, other=0.0),
        )
        even, odd = tl.split(tl.reshape(row, [WIDTH // 2, 2]))
        row = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), [WIDTH])
        if HADAMARD:
            matrix = tl.load(hadamard + channel[:, None] * WIDTH + channel[None, :])
            row = tl.sum(row[:, None] * matrix, 0)
        home, in_page = pool + page.to(tl.int64) * PAGE_BYTES, entry % PER_PAGE
        store_entry(
            home + in_page * VALUE_BYTES,
            home + PER_PAGE * VALUE_BYTES + in_page * SCALE_BYTES,
            row,
            KIND,
            WIDTH,
        )
    if ALONGSIDE:
        wait_for_previous()
