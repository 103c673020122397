"""What the way back out of a hyper-connection's block needs: write weights, and the doubly
stochastic mixing of the streams by Sinkhorn's iterations (section 2.2).

All that takes longer than what enters the block. `hyper_connection` works it out beside that, or
leaves it `due`: then the next product of one row has a program more, which does it meanwhile.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fmsim.exec.kernels.lang import (
    after_previous,
    let_next_begin,
    next_power_of_2,
    overlapped,
    tl,
    triton,
    wait_for_previous,
)


class Gates(NamedTuple):
    """One token's, still to be worked out: of ``parts`` float32 [1, tiles, rows], each tile's part
    of the products with the connection's weights, then of the sum of squares of its ``values``
    numbers; ``base`` and ``scale`` of the connection; into ``write`` float32 [1, 1, R] and ``mix``
    float32 [1, 1, R, R].
    """

    parts: Tensor
    base: Tensor
    scale: Tensor
    write: Tensor
    mix: Tensor
    eps: float
    norm_eps: float
    values: int
    iterations: int


class Extra(NamedTuple):
    """What a launch takes for the program that it has more: how many there are, what it reads and
    writes, and its sizes, as `gates_beside` takes them; no sizes, no program.
    """

    programs: int
    tensors: tuple[Tensor, ...]
    sizes: tuple[float, ...] | None


class Due:
    """Where a connection leaves its gates, so that a product of the block that it enters takes
    them: both have it. Empty most often.
    """

    def __init__(self) -> None:
        self._gates: Gates | None = None

    @property
    def empty(self) -> bool:
        return self._gates is None

    def leave(self, gates: Gates) -> None:
        self._gates = gates

    def take(self, like: Tensor) -> Extra:
        """For the caller's launch. What it reads was made two launches before."""
        gates, self._gates = self._gates, None
        if gates is None:
            return Extra(0, (like,), None)
        _, tiles, padded = gates.parts.shape
        sizes = (
            gates.eps,
            gates.norm_eps,
            len(gates.base),
            padded,
            gates.values,
            gates.write.shape[-1],
            tiles,
            next_power_of_2(tiles),
            gates.iterations,
        )
        return Extra(1, gates[:5], sizes)

    def finish(self) -> None:
        """In a launch of its own, where no product took them."""
        if self._gates is not None:
            like = self._gates.parts
            _, tensors, sizes = self.take(like)
            _gates_alone[(1,)](tensors, sizes, num_warps=4, **overlapped(like))


@triton.jit
def _gates_alone(gates, SIZES: tl.constexpr):
    """One program."""
    after_previous()
    _gates(gates, SIZES)


@triton.jit
def gates_beside(gates, SIZES: tl.constexpr):
    """What is due, by the one program that a launch has more for it.

    It waits only at its end. It begins once the launch before has passed its wait, so ``parts`` is
    made; and what it writes was new before that launch, which reads none of it.
    """
    let_next_begin()
    _gates(gates, SIZES)
    wait_for_previous()


@triton.jit
def _gates(gates, SIZES: tl.constexpr):
    parts, base, scale, write_out, mix_out = gates
    rows: tl.constexpr = SIZES[2]
    padded: tl.constexpr = SIZES[3]
    streams: tl.constexpr = SIZES[5]
    bases, scales = levels_of(base, scale, streams, rows, padded)
    work_out(
        parts,
        bases,
        scales,
        write_out,
        mix_out,
        SIZES[0],
        SIZES[1],
        0,
        rows,
        padded,
        SIZES[4],
        streams,
        SIZES[6],
        SIZES[7],
        SIZES[8],
    )


@triton.jit
def levels_of(base, scale, STREAMS: tl.constexpr, ROWS: tl.constexpr, ROWS_PADDED: tl.constexpr):
    """What is added to each product with a connection's weights, and what it is multiplied by."""
    row = tl.arange(0, ROWS_PADDED)
    bases = tl.load(base + row, mask=row < ROWS, other=0.0).to(tl.float32)
    scales = tl.load(scale + tl.minimum(row // STREAMS, 2), mask=row < ROWS, other=0.0)
    return bases, scales


@triton.jit
def work_out(
    parts,
    bases,
    scales,
    write_out,
    mix_out,
    eps,
    norm_eps,
    token,
    GATES: tl.constexpr,
    GATES_PADDED: tl.constexpr,
    VALUES: tl.constexpr,
    STREAMS: tl.constexpr,
    TILES: tl.constexpr,
    TILES_PADDED: tl.constexpr,
    ITERATIONS: tl.constexpr,
):
    """The write weights and the mixing of a ``token``, in registers; `levels_of` its connection."""
    row = tl.arange(0, GATES_PADDED)
    sums = products(parts, token, norm_eps, VALUES, GATES, GATES_PADDED, TILES, TILES_PADDED)
    gates = sums * scales + bases
    write = (row >= STREAMS) & (row < 2 * STREAMS)
    tl.store(write_out + token * STREAMS + row - STREAMS, 2 * tl.sigmoid(gates), mask=write)
    # Every thread has all of the mixing: sums over threads would take longer than all else.
    mix = ()
    for i in tl.static_range(STREAMS):
        cells, highest = (), float("-inf")
        for j in tl.static_range(STREAMS):
            cell = tl.sum(tl.where(row == (2 + i) * STREAMS + j, gates, 0.0), 0)
            cells, highest = cells + (cell,), tl.maximum(highest, cell)
        powers = ()
        for j in tl.static_range(STREAMS):
            powers = powers + (tl.exp(cells[j] - highest),)
        shares = _over_their_sum(powers, 0.0, STREAMS)
        for j in tl.static_range(STREAMS):
            mix = mix + (shares[j] + eps,)
    mix = _columns_scaled(mix, eps, STREAMS)
    for _ in range(ITERATIONS - 1):
        mix = _rows_and_columns_scaled(mix, eps, STREAMS)
    for cell in tl.static_range(STREAMS * STREAMS):
        tl.store(mix_out + token * STREAMS * STREAMS + cell, mix[cell])


@triton.jit
def products(
    parts,
    token,
    eps,
    VALUES: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_PADDED: tl.constexpr,
    TILES: tl.constexpr,
    TILES_PADDED: tl.constexpr,
):
    """float32 [ROWS_PADDED]: a token's products with the weights, after its streams' RMSNorm."""
    tile, row = tl.arange(0, TILES_PADDED), tl.arange(0, ROWS_PADDED)
    places = (token * TILES + tile)[:, None] * ROWS_PADDED + row[None, :]
    sums = tl.sum(tl.load(parts + places, mask=(tile < TILES)[:, None], other=0.0), 0)
    square = tl.sum(tl.where(row == ROWS, sums, 0.0), 0)
    return sums * tl.rsqrt(square / VALUES + eps)


@triton.jit
def _rows_and_columns_scaled(mix, eps, COUNT: tl.constexpr):
    rows = ()
    for i in tl.static_range(COUNT):
        rows = rows + _over_their_sum(mix[i * COUNT : (i + 1) * COUNT], eps, COUNT)
    return _columns_scaled(rows, eps, COUNT)


@triton.jit
def _over_their_sum(values, eps, COUNT: tl.constexpr):
    """Each of a tuple of numbers over the sum of all."""
    total = values[0] + eps
    for i in tl.static_range(1, COUNT):
        total += values[i]
    scaled, factor = (), 1.0 / total
    for i in tl.static_range(COUNT):
        scaled = scaled + (values[i] * factor,)
    return scaled


@triton.jit
def _columns_scaled(mix, eps, COUNT: tl.constexpr):
    """Each of mix, a tuple of COUNT rows end to end, over its column's sum."""
    factors = ()
    for j in tl.static_range(COUNT):
        total = mix[j] + eps
        for i in tl.static_range(1, COUNT):
            total += mix[i * COUNT + j]
        factors = factors + (1.0 / total,)
    scaled = ()
    for cell in tl.static_range(COUNT * COUNT):
        scaled = scaled + (mix[cell] * factors[cell % COUNT],)
    return scaled
