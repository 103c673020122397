"""The product of one row with a large float8 weight, a few rows of it at a time.

Its values take nearly as long to multiply as to read. So a program reads the next rows while it
multiplies these. As of `one_row` otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.lang import (
    after_previous,
    let_next_begin,
    next_power_of_2,
    overlapped,
    tl,
    triton,
    wait_for_previous,
)
from fmsim.exec.kernels.weights import BLOCK


class HeadTurn(NamedTuple):
    """RoPE of a product's outputs, heads of ``head`` channels: cosine and sine, float32 [1, pairs],
    as `norm_rope` takes them.
    """

    cos: Tensor
    sin: Tensor
    head: int


def _rows_and_turns(weight: Tensor, tune: tuning.OneRowTuning) -> tuple[int, int]:
    """Of a program: powers of two, so that its rows share scales."""
    outputs, inputs = weight.shape
    rows = max(1, min(tune.turn_bytes // inputs, BLOCK))
    turns = 1 << (max(1, outputs // rows // tune.programs).bit_length() - 1)
    return rows, min(turns, BLOCK // rows)


def _is_whole(weight: Tensor, groups: int) -> bool:
    """Whether a float8 ``weight`` [out, in] is of whole blocks, each of one group."""
    outputs, inputs = weight.shape
    return inputs == max(BLOCK, next_power_of_2(inputs)) and outputs // groups % BLOCK == 0


def takes_turn(weight: Tensor, head: int, tune: tuning.OneRowTuning = tuning.ONE_ROW) -> bool:
    """Whether the outputs, heads of so many, can be turned."""
    rows, _ = _rows_and_turns(weight, tune)
    return _is_whole(weight, 1) and rows > 1 and head % rows == 0


def takes(
    weight: Tensor, groups: int, tune: tuning.OneRowTuning, turn: HeadTurn | None = None
) -> bool:
    """Whether this is the way for a float8 ``weight``: large, or its outputs turned."""
    if turn is not None:
        return groups == 1 and takes_turn(weight, turn.head, tune)
    return _is_whole(weight, groups) and _rows_and_turns(weight, tune)[1] > 1


def product(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    groups: int,
    norm: nn.Module | None,
    alongside: bool,
    turn: HeadTurn | None,
    out: Tensor,
    tune: tuning.OneRowTuning,
) -> None:
    """As `one_row.one_row_reference`, into ``out``."""
    outputs, inputs = weight.shape
    rows, turns = _rows_and_turns(weight, tune)
    cos, sin, head = turn or (scale, scale, 1)
    _one_row_in_turns[(outputs // (rows * turns),)](
        x,
        weight,
        scale,
        weight if norm is None else norm.weight,
        cos,
        sin,
        out,
        0.0 if norm is None else norm.eps,
        INPUTS=inputs,
        OF_GROUP=outputs // groups,
        SCALES=scale.shape[1],
        BLOCK=BLOCK,
        ROWS=rows,
        TURNS=turns,
        HEAD=head,
        PAIRS=0 if turn is None else cos.shape[-1],
        NORM=norm is not None,
        ALONGSIDE=alongside,
        num_warps=tune.warps,
        **overlapped(x),
    )


@triton.jit
def _one_row_in_turns(
    x,
    weight,
    scale,
    norm,
    cos,
    sin,
    out,
    eps,
    INPUTS: tl.constexpr,
    OF_GROUP: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TURNS: tl.constexpr,
    HEAD: tl.constexpr,
    PAIRS: tl.constexpr,
    NORM: tl.constexpr,
    ALONGSIDE: tl.constexpr,
):
    """One program: TURNS times ROWS outputs of one group, whose weights share scales. Of the last
    PAIRS of each HEAD of outputs, RoPE is done.

    ALONGSIDE as in `one_row.rows_of`.
    """
    start = tl.program_id(0) * (ROWS * TURNS)
    row, block, lane = tl.arange(0, ROWS), tl.arange(0, INPUTS // BLOCK), tl.arange(0, BLOCK)
    place = block[:, None] * BLOCK + lane[None, :]
    places = weight + (start + row).to(tl.int64)[:, None, None] * INPUTS + place[None, :, :]
    weights = tl.load(places, eviction_policy="evict_first")
    level = tl.load(scale + start // BLOCK * SCALES + block)
    if NORM:
        share = tl.load(norm + place).to(tl.float32)
    if ALONGSIDE:
        let_next_begin()
    else:
        after_previous()
    values = tl.load(x + start // OF_GROUP * INPUTS + place).to(tl.float32)
    if NORM:
        values = normalised(values, share, INPUTS, eps, x.dtype.element_ty)
    for turn in tl.static_range(TURNS):
        if turn + 1 < TURNS:
            next_weights = tl.load(
                places + (turn + 1) * ROWS * INPUTS, eviction_policy="evict_first"
            )
        sums = tl.sum(weights.to(tl.float32) * values[None, :, :], 2) * level[None, :]
        total = tl.sum(sums, 1).to(out.dtype.element_ty)
        if PAIRS:  # angles are made at a step's start
            first = (start + turn * ROWS) % HEAD // 2 - (HEAD // 2 - PAIRS)
            pair = first + tl.arange(0, ROWS // 2)
            c = tl.load(cos + pair, mask=pair >= 0, other=1.0)
            s = tl.load(sin + pair, mask=pair >= 0, other=0.0)
            even, odd = tl.split(tl.reshape(total.to(tl.float32), [ROWS // 2, 2]))
            total = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), [ROWS])
            total = total.to(out.dtype.element_ty)
        tl.store(out + start + turn * ROWS + row, total)
        if turn + 1 < TURNS:
            weights = next_weights
    if ALONGSIDE:
        wait_for_previous()


@triton.jit
def normalised(values, share, INPUTS: tl.constexpr, eps, TYPE: tl.constexpr):
    """RMSNorm with the weights ``share``, rounded to TYPE."""
    square = tl.sum(tl.sum(values * values, 1), 0)
    values = values * tl.rsqrt(square / INPUTS + eps) * share
    return values.to(TYPE).to(tl.float32)
