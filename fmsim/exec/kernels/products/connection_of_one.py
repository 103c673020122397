"""The hyper-connection of a single token (`hyper_connection`), whose launches both are split over
channels.

No program of the second has all channels: the mean square of the block's input comes of the
streams' products with one another, of which the first launch has parts too. It is of the input
before it is rounded, and loses digits where streams cancel: 5e-4 of it where they leave 1% of their
size. With more tokens, whose programs are many anyway, this takes longer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.lang import (
    after_previous,
    cdiv,
    next_power_of_2,
    overlapped,
    tl,
    triton,
)
from fmsim.exec.kernels.norms.rounded_rows import Float8Rows, destination, store_rounded
from fmsim.exec.kernels.products import mixing
from fmsim.exec.kernels.weights import BLOCK


def leave_and_project(
    flat: Tensor,
    of_block: tuple[Tensor, ...],
    fn: Tensor,
    left: Tensor,
    leaves: bool,
    shares: int,
    top_k: int,
    tune: tuning.HyperConnectionTuning,
) -> tuple[Tensor, Tensor]:
    """Of streams ``flat`` [1, R, D], what is pending ``of_block`` into ``left`` [1, 1, R, D] where
    anything ``leaves``; -> float32 [1, tiles, rows], each tile's part of the products with the rows
    of ``fn``, then of the sum of squares; and float32 [1, tiles, R, R], its part of the streams'
    products with one another.
    """
    _, count, width = flat.shape
    tiles, float32 = cdiv(width, tune.tile_channels), {"dtype": torch.float32}
    parts = fn.new_empty(1, tiles, next_power_of_2(len(fn) + 1), **float32)
    grams = fn.new_empty(1, tiles, count, count, **float32)
    _leave_one_and_project[(tiles,)](
        flat,
        *of_block,
        fn,
        left,
        parts,
        grams,
        flat.stride(1),
        STREAMS=count,
        WIDTH=width,
        ROWS=len(fn),
        ROWS_PADDED=parts.shape[2],
        BLOCK=tune.tile_channels,
        LEAVE=leaves,
        SHARES=shares,
        TOP_K=top_k,
        num_warps=tune.project_warps,
        **overlapped(flat),
    )
    return parts, grams


def join(
    flat: Tensor,
    parts: Tensor,
    grams: Tensor,
    base: Tensor,
    scale: Tensor,
    module: nn.Module,
    norm: nn.Module,
    x: Tensor,
    made: Float8Rows | None,
    gates: tuple[Tensor, Tensor] | None,
    tune: tuning.HyperConnectionTuning,
) -> None:
    """The block's input of streams ``flat`` [1, R, D], as `hyper_connection` has it."""
    _, count, width = flat.shape
    write, mix = (parts, parts) if gates is None else gates
    channels = min(next_power_of_2(width), tune.input_channels)
    splits = cdiv(width, channels)
    _enter_one[(splits + (gates is not None),)](
        parts,
        grams,
        base,
        scale,
        flat,
        norm.weight,
        x,
        *destination(made, x),
        write,
        mix,
        flat.stride(1),
        module.eps,
        module.norm_eps,
        norm.eps,
        STREAMS=count,
        WIDTH=width,
        CHANNELS=channels,
        SPLITS=splits,
        ROWS=len(base),
        ROWS_PADDED=parts.shape[2],
        TILES=parts.shape[1],
        TILES_PADDED=next_power_of_2(parts.shape[1]),
        ITERATIONS=0 if gates is None else module.iterations,
        ROUNDED=made is not None,
        BLOCK=BLOCK,
        num_warps=tune.project_warps,
        **overlapped(flat),
    )


@triton.jit
def _leave_one_and_project(
    streams,
    out,
    share_weights,
    write,
    mix,
    fn,
    left,
    parts,
    grams,
    stream_stride,
    STREAMS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    LEAVE: tl.constexpr,
    SHARES: tl.constexpr,
    TOP_K: tl.constexpr,
):
    """One program: a tile, BLOCK channels of all streams."""
    tile, stream, row = tl.program_id(0), tl.arange(0, STREAMS), tl.arange(0, ROWS_PADDED)
    channel = tile * BLOCK + tl.arange(0, BLOCK)
    inside = channel < WIDTH
    at = stream[:, None] * WIDTH + channel[None, :]
    places = row[:, None, None] * (STREAMS * WIDTH) + at[None, :, :]
    known = (row < ROWS)[:, None, None] & inside[None, None, :]
    weights = tl.load(fn + places, mask=known, other=0.0).to(tl.float32)
    after_previous()
    if LEAVE:
        if SHARES:
            part = tl.zeros([BLOCK], tl.float32)
            for slot in tl.static_range(SHARES):
                value = tl.load(out + slot * WIDTH + channel, mask=inside, other=0.0)
                if slot < TOP_K:
                    value *= tl.load(share_weights + slot)
                part += value
            part = part.to(left.dtype.element_ty).to(tl.float32)
        else:
            part = tl.load(out + channel, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(write + stream)[:, None] * part[None, :]
        for other in tl.static_range(STREAMS):
            share = tl.load(mix + other * STREAMS + stream)
            held = tl.load(streams + other * stream_stride + channel, mask=inside, other=0.0)
            x += share[:, None] * held.to(tl.float32)[None, :]
        kept = x.to(left.dtype.element_ty)
        tl.store(left + at, kept, mask=inside[None, :])
        x = kept.to(tl.float32)  # what the connection reads is what the streams hold
    else:
        of_all = streams + stream[:, None] * stream_stride + channel[None, :]
        x = tl.load(of_all, mask=inside[None, :], other=0.0).to(tl.float32)
    gram = tl.sum(x[:, None, :] * x[None, :, :], 2)
    products = tl.sum(tl.sum(weights * x[None, :, :], 2), 1)
    products = tl.where(row == ROWS, _trace(gram, stream), products)
    tl.store(parts + tile * ROWS_PADDED + row, products)
    pair = stream[:, None] * STREAMS + stream[None, :]
    tl.store(grams + tile * STREAMS * STREAMS + pair, gram)


@triton.jit
def _trace(matrix, index):
    """Of a square ``matrix`` with rows and columns ``index``."""
    own = index[:, None] == index[None, :]
    return tl.sum(tl.sum(tl.where(own, matrix, 0.0), 1), 0)


@triton.jit
def _enter_one(
    parts,
    grams,
    base,
    scale,
    streams,
    weight,
    x_out,
    codes,
    levels,
    level_stride,
    write_out,
    mix_out,
    stream_stride,
    eps,
    norm_eps,
    out_eps,
    STREAMS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_PADDED: tl.constexpr,
    TILES: tl.constexpr,
    TILES_PADDED: tl.constexpr,
    ITERATIONS: tl.constexpr,
    ROUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """SPLITS programs, each some CHANNELS of the block's input; and where there is one more, the
    write weights and the mixing.

    All that a program reads is on its way before it adds anything up.
    """
    split = tl.program_id(0)
    if split < SPLITS:
        stream, tile = tl.arange(0, STREAMS), tl.arange(0, TILES_PADDED)
        channel = split * CHANNELS + tl.arange(0, CHANNELS)
        inside, known = channel < WIDTH, (tile < TILES)[:, None]
        weights = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
        added, level = tl.load(base + stream).to(tl.float32), tl.load(scale).to(tl.float32)
        after_previous()
        places = stream[:, None] * stream_stride + channel[None, :]
        held = tl.load(streams + places, mask=inside[None, :], other=0.0).to(tl.float32)
        of = tile[:, None]
        reads = tl.load(parts + of * ROWS_PADDED + stream[None, :], mask=known, other=0.0)
        pair = tl.arange(0, STREAMS * STREAMS)[None, :]
        products = tl.load(grams + of * STREAMS * STREAMS + pair, mask=known, other=0.0)
        gram = tl.reshape(tl.sum(products, 0), [STREAMS, STREAMS])
        mean = _trace(gram, stream) / (STREAMS * WIDTH)
        read = tl.sum(reads, 0) * tl.rsqrt(mean + norm_eps) * level + added
        read = tl.sigmoid(read) + eps
        x = tl.sum(read[:, None] * held, 0)
        mean = tl.sum(tl.sum(read[:, None] * read[None, :] * gram, 1), 0) / WIDTH
        x = x * tl.rsqrt(tl.maximum(mean, 0.0) + out_eps) * weights
        x = x.to(x_out.dtype.element_ty)
        tl.store(x_out + channel, x, mask=inside)
        if ROUNDED:
            first = split * CHANNELS
            store_rounded(
                x.to(tl.float32),
                codes,
                levels,
                tl.zeros([], tl.int64),
                level_stride,
                first,
                WIDTH,
                BLOCK,
            )
    else:
        bases, scales = mixing.levels_of(base, scale, STREAMS, ROWS, ROWS_PADDED)
        after_previous()
        mixing.work_out(
            parts,
            bases,
            scales,
            write_out,
            mix_out,
            eps,
            norm_eps,
            0,
            ROWS,
            ROWS_PADDED,
            STREAMS * WIDTH,
            STREAMS,
            TILES,
            TILES_PADDED,
            ITERATIONS,
        )
