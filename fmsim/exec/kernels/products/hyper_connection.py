"""Hyper-connections of few tokens (section 2.2): the last block's output into the streams, and the
next block's input out of them.

A connection's weights are as large as the streams of a hundred tokens, and its arithmetic is a
chain of small steps, so two launches do one: the first, split over channels, writes the pending
output back and takes its part of every product with the weights ``fn``; the second, a token a
program, adds the parts up, and ends with the RMSNorm before the block. A second program of each
token does what only the way back needs (`mixing`), or the next product of one row does. A single
token's launches are `connection_of_one`'s.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.lang import (
    after_previous,
    cdiv,
    next_power_of_2,
    overlapped,
    runs_compiled,
    tl,
    triton,
)
from fmsim.exec.kernels.norms.rms_norm import rms_norm_reference
from fmsim.exec.kernels.norms.rounded_rows import (
    Activations,
    Float8Rows,
    destination,
    store_rounded,
)
from fmsim.exec.kernels.products import connection_of_one, mixing, one_row
from fmsim.exec.kernels.weights import BLOCK


class Shares(NamedTuple):
    """A block's output as its experts left it: ``values`` float32 [N, P, D], of which the first are
    multiplied by ``weights`` float32 [N, top_k], and all of a token's P are added up.
    """

    values: Tensor
    weights: Tensor

    def whole(self, like: Tensor) -> Tensor:
        """The output [B, S, D] for streams ``like`` [B, S, R, D], in their type."""
        one = self.weights.new_ones(len(self.values), self.values.shape[1] - self.weights.shape[1])
        summed = (self.values * torch.cat((self.weights, one), 1)[..., None]).sum(1)
        return summed.to(like.dtype).view_as(like[:, :, 0])


class Pending(NamedTuple):
    """A block's output that is not yet in the streams: ``out`` [B, S, D] of the block of
    ``connection`` (`model.HyperConnection`), or its shares, and what `enter` gave for it: ``write``
    float32 [B, S, R], ``mix`` float32 [B, S, R, R].
    """

    connection: nn.Module
    out: Tensor | Shares
    write: Tensor
    mix: Tensor


def enter(
    streams: Tensor,
    pending: Pending | None,
    connection: nn.Module,
    norm: nn.Module,
    rounded: bool = False,
    then: Tensor | None = None,
) -> tuple[Tensor, Activations, Tensor, Tensor]:
    """Write what is ``pending`` into ``streams`` [B, S, R, D], then enter the block of
    ``connection`` (`model.HyperConnection`).

    -> the streams [B, S, R, D], the block's input after ``norm`` (`model.RMSNorm`) [B, S, D], both
    in the streams' type, and the block's write weights and mixing, as in `Pending`. The input is
    ``rounded`` to float8 beside that if so. R is a power of two. For up to some 128 tokens; S is 1
    in decode. ``then``: the weight that the input meets in the next launch, where that is a
    product; weights and mixing may be there no sooner than what that one makes.
    """
    run = enter_triton if runs_compiled(streams) else enter_reference
    return run(streams, pending, connection, norm, rounded, then)


def read_out(streams: Tensor, pending: Pending | None, head: nn.Module, norm: nn.Module) -> Tensor:
    """After the last layer: write what is ``pending``, join the streams by ``head``
    (`model.HyperHead`), and ``norm``; -> [B, S, D].
    """
    run = read_out_triton if runs_compiled(streams) else read_out_reference
    return run(streams, pending, head, norm)


def enter_reference(
    streams, pending, connection, norm, rounded=False, then=None
) -> tuple[Tensor, Activations, Tensor, Tensor]:
    """Weights and mixing are there at once, so ``then`` is of no account."""
    streams = _left(streams, pending)
    x, write, mix = connection.enter(streams)
    return streams, rms_norm_reference(x, norm, rounded), write, mix


def read_out_reference(streams, pending, head, norm) -> Tensor:
    return norm(head(_left(streams, pending)))


def _left(streams: Tensor, pending: Pending | None) -> Tensor:
    if pending is None:
        return streams
    connection, out, write, mix = pending
    if isinstance(out, Shares):
        out = out.whole(streams)
    return connection.leave(streams, out, write, mix)


def enter_triton(
    streams, pending, connection, norm, rounded=False, then=None, tune=tuning.HYPER_CONNECTION
) -> tuple[Tensor, Activations, Tensor, Tensor]:
    count, of = streams.shape[2], streams.shape[:2]
    streams, *parts = _project(streams, pending, connection.fn, tune)
    x = torch.empty_like(streams[:, :, 0])
    write = torch.empty(*of, count, dtype=torch.float32, device=streams.device)
    mix = torch.empty(*of, count, count, dtype=torch.float32, device=streams.device)
    made = Float8Rows.empty(of, x.shape[2], x.dtype, x.device, x) if rounded else None
    of_connection = connection.base, connection.scale, connection
    due = then is not None and one_row.fits(x, then)
    if due:
        connection.due.leave(
            mixing.Gates(
                parts[0],
                connection.base,
                connection.scale,
                write,
                mix,
                connection.eps,
                connection.norm_eps,
                streams.shape[2:].numel(),
                connection.iterations,
            )
        )
    gates = None if due else (write, mix)
    _join(streams, parts, *of_connection, norm, x, made, gates, tune)
    return streams, x if made is None else made, write, mix


def read_out_triton(streams, pending, head, norm, tune=tuning.HYPER_CONNECTION) -> Tensor:
    streams, *parts = _project(streams, pending, head.hc_fn, tune)
    x = torch.empty_like(streams[:, :, 0])
    _join(streams, parts, head.hc_base, head.hc_scale, head, norm, x, None, None, tune)
    return x


def _project(streams: Tensor, pending: Pending | None, fn: Tensor, tune) -> tuple[Tensor, ...]:
    """-> the streams [B, S, R, D] with what was pending, and float32 [N, tiles, rows]: each tile's
    part of the products with the rows of ``fn``, then of the sum of squares. Of one token also what
    `connection_of_one` has of each tile.
    """
    if pending is not None:
        pending.connection.due.finish()
    batch, tokens, count, width = streams.shape
    flat = streams.flatten(0, 1)
    total, rows, blocks = len(flat), len(fn), cdiv(width, tune.block_channels)
    assert flat.stride(2) == 1, "a stream's channels lie side by side"
    left = (
        streams
        if pending is None
        else torch.empty(batch, tokens, count, width, dtype=streams.dtype, device=streams.device)
    )
    of_block, shares, top_k = (flat,) * 4, 0, 0
    if pending is not None and isinstance(pending.out, Shares):
        of_block = (*pending.out, pending.write, pending.mix)
        shares, top_k = pending.out.values.shape[1], pending.out.weights.shape[1]
    elif pending is not None:
        of_block = (pending.out.contiguous(), flat, pending.write, pending.mix)
    if total == 1:
        leaves = pending is not None, shares, top_k
        return left, *connection_of_one.leave_and_project(flat, of_block, fn, left, *leaves, tune)
    parts = torch.empty(
        total, count * blocks, next_power_of_2(rows + 1), dtype=torch.float32, device=streams.device
    )
    per_program = cdiv(total * count * blocks, tune.programs)
    _leave_and_project[(count * blocks, cdiv(total, per_program))](
        flat,
        *of_block,
        fn,
        left,
        parts,
        total,
        flat.stride(0),
        flat.stride(1),
        STREAMS=count,
        WIDTH=width,
        ROWS=rows,
        ROWS_PADDED=parts.shape[2],
        BLOCKS=blocks,
        BLOCK=tune.block_channels,
        TOKENS=per_program,
        LEAVE=pending is not None,
        SHARES=shares,
        TOP_K=top_k,
        num_warps=tune.project_warps,
        **overlapped(streams),
    )
    return left, parts


def _join(streams, parts, base, scale, module, norm, x, made, gates, tune) -> None:
    """The block's input into ``x``, and where there is one into ``made``, as float8; where
    ``gates`` are given, the write weights and the mixing into them.
    """
    flat = streams.flatten(0, 1)
    total, count, width = flat.shape
    if total == 1:
        given = base, scale, module, norm, x, made, gates, tune
        return connection_of_one.join(flat, *parts, *given)
    [parts] = parts
    write, mix = (parts, parts) if gates is None else gates
    _enter[(total, 1 if gates is None else 2)](
        parts,
        base,
        scale,
        flat,
        norm.weight,
        x,
        *destination(made, x),
        write,
        mix,
        flat.stride(0),
        flat.stride(1),
        module.eps,
        module.norm_eps,
        norm.eps,
        STREAMS=count,
        WIDTH=width,
        WIDTH_PADDED=next_power_of_2(width),
        ROWS=len(base),
        ROWS_PADDED=parts.shape[2],
        TILES=parts.shape[1],
        TILES_PADDED=next_power_of_2(parts.shape[1]),
        ITERATIONS=0 if gates is None else module.iterations,
        ROUNDED=made is not None,
        BLOCK=BLOCK,
        num_warps=tune.enter_warps,
        **overlapped(streams),
    )


@triton.jit
def _leave_and_project(
    streams,
    out,
    share_weights,
    write,
    mix,
    fn,
    left,
    parts,
    total,
    token_stride,
    stream_stride,
    STREAMS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_PADDED: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    LEAVE: tl.constexpr,
    SHARES: tl.constexpr,
    TOP_K: tl.constexpr,
):
    """One program: a block of one stream's channels, of a run of tokens."""
    tile, first = tl.program_id(0), tl.program_id(1) * TOKENS
    stream = tile // BLOCKS
    channel, row = (tile % BLOCKS) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, ROWS_PADDED)
    inside = channel < WIDTH
    places = row[:, None] * (STREAMS * WIDTH) + (stream * WIDTH + channel)[None, :]
    weights = tl.load(fn + places, mask=(row < ROWS)[:, None] & inside[None, :], other=0.0).to(
        tl.float32
    )
    after_previous()
    for token in range(first, tl.minimum(first + TOKENS, total)):
        source = streams + token * token_stride + channel
        if LEAVE:
            if SHARES:
                part = tl.zeros([BLOCK], tl.float32)
                for slot in tl.static_range(SHARES):
                    place = (token * SHARES + slot) * WIDTH + channel
                    value = tl.load(out + place, mask=inside, other=0.0)
                    if slot < TOP_K:
                        value *= tl.load(share_weights + token * TOP_K + slot)
                    part += value
                part = part.to(left.dtype.element_ty).to(tl.float32)
            else:
                part = tl.load(out + token * WIDTH + channel, mask=inside, other=0.0).to(tl.float32)
            x = part * tl.load(write + token * STREAMS + stream)
            for other in tl.static_range(STREAMS):
                share = tl.load(mix + (token * STREAMS + other) * STREAMS + stream)
                x += share * tl.load(source + other * stream_stride, mask=inside, other=0.0).to(
                    tl.float32
                )
            kept = x.to(left.dtype.element_ty)
            tl.store(left + (token * STREAMS + stream) * WIDTH + channel, kept, mask=inside)
            x = kept.to(tl.float32)  # what the connection reads is what the streams hold
        else:
            x = tl.load(source + stream * stream_stride, mask=inside, other=0.0).to(tl.float32)
        products = tl.sum(weights * x[None, :], 1)
        products = tl.where(row == ROWS, tl.sum(x * x, 0), products)
        tl.store(parts + (token * (STREAMS * BLOCKS) + tile) * ROWS_PADDED + row, products)


@triton.jit
def _enter(
    parts,
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
    token_stride,
    stream_stride,
    eps,
    norm_eps,
    out_eps,
    STREAMS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_PADDED: tl.constexpr,
    TILES: tl.constexpr,
    TILES_PADDED: tl.constexpr,
    ITERATIONS: tl.constexpr,
    ROUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One or two programs a token: its block input, and its write weights and mixing.

    All that a program reads is on its way before it adds anything up.
    """
    token, row = tl.program_id(0), tl.arange(0, ROWS_PADDED)
    bases, scales = mixing.levels_of(base, scale, STREAMS, ROWS, ROWS_PADDED)
    if tl.program_id(1) == 0:
        channel = tl.arange(0, WIDTH_PADDED)
        inside = channel < WIDTH
        weights = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
        after_previous()
        held = ()
        for stream in tl.static_range(STREAMS):
            places = streams + token * token_stride + stream * stream_stride + channel
            held = held + (tl.load(places, mask=inside, other=0.0),)
        products = mixing.products(
            parts, token, norm_eps, STREAMS * WIDTH, ROWS, ROWS_PADDED, TILES, TILES_PADDED
        )
        read = tl.sigmoid(products * scales + bases) + eps
        x = tl.zeros([WIDTH_PADDED], tl.float32)
        for stream in tl.static_range(STREAMS):
            x += tl.sum(tl.where(row == stream, read, 0.0), 0) * held[stream].to(tl.float32)
        x = x.to(x_out.dtype.element_ty).to(tl.float32)
        x = x * tl.rsqrt(tl.sum(x * x, 0) / WIDTH + out_eps) * weights
        x = x.to(x_out.dtype.element_ty)
        tl.store(x_out + token * WIDTH + channel, x, mask=inside)
        if ROUNDED:
            store_rounded(x.to(tl.float32), codes, levels, token, level_stride, 0, WIDTH, BLOCK)
    else:
        after_previous()
        mixing.work_out(
            parts,
            bases,
            scales,
            write_out,
            mix_out,
            eps,
            norm_eps,
            token,
            ROWS,
            ROWS_PADDED,
            STREAMS * WIDTH,
            STREAMS,
            TILES,
            TILES_PADDED,
            ITERATIONS,
        )
