"""Activations as float8, the way DeepSeek's release multiplies them: each 128 values of a row share
a power of two, the smallest that brings them within 448.

The launch that makes rows can round them as it writes them (`store_rounded`), once for all products
that read them. Rows that are there already take a launch of their own (`round_rows`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fmsim.exec.kernels.lang import (
    after_previous,
    cdiv,
    overlapped,
    runs_compiled,
    tl,
    triton,
)
from fmsim.exec.kernels.layout import (
    power,
    power_of_two_exponent,
    scale_exponent,
    to_float8,
)
from fmsim.exec.kernels.weights import BLOCK

ROWS = 8  # of one program
ALIGNED = 16  # cuBLAS takes codes and scales in multiples of so many rows
# beyond so many, of these: it multiplies 144 rows more slowly than 192 (float8-products-h200.json)
MANY, MANY_ALIGNED = 128, 64
BEYOND = 256  # scales that may be read behind the last: no block of rows in a product has more


class Float8Rows(NamedTuple):
    """Rows [..., in] rounded to float8.

    ``codes`` float8_e4m3fn [n and more, in]; ``scales`` float32 [ceil(in / 128), n and more], so
    that a program reads those of many rows at a time; what stands beyond the n rows is anything.
    ``leading`` is the rows' shape without ``in``, ``dtype`` their type. ``wide`` [..., in] are the
    rows as they were, where something reads them too.
    """

    codes: Tensor
    scales: Tensor
    leading: torch.Size
    dtype: torch.dtype
    wide: Tensor | None = None

    @classmethod
    def empty(
        cls,
        leading: Sequence[int],
        columns: int,
        dtype: torch.dtype,
        device: torch.device,
        wide: Tensor | None = None,
    ) -> Float8Rows:
        leading, blocks = torch.Size(leading), cdiv(columns, BLOCK)
        multiple = ALIGNED if leading.numel() <= MANY else MANY_ALIGNED
        room = cdiv(leading.numel(), multiple) * multiple
        codes = torch.empty(room, columns, dtype=torch.float8_e4m3fn, device=device)
        scales = torch.empty(blocks * room + BEYOND, dtype=torch.float32, device=device)
        return cls(codes, scales[:-BEYOND].view(blocks, room), leading, dtype, wide)

    @property
    def count(self) -> int:
        """n."""
        return self.leading.numel()

    def widened(self) -> Tensor:
        """The rounded rows [..., in] in their type."""
        codes, scales = self.codes[: self.count], self.scales[:, : self.count]
        wide = codes.float() * scales.T.repeat_interleave(BLOCK, 1)[:, : codes.shape[1]]
        return wide.to(self.dtype).view(*self.leading, codes.shape[1])


Activations = Tensor | Float8Rows  # rows of a product's input


def wide_rows(x: Activations) -> Tensor:
    """The rows as they were before rounding, [..., in]."""
    if isinstance(x, Tensor):
        return x
    assert x.wide is not None, "only their float8 values were kept"
    return x.wide


def round_rows(x: Tensor) -> Float8Rows:
    """x [..., in], whose rows' values lie side by side."""
    return (round_rows_triton if runs_compiled(x) else round_rows_reference)(x)


def round_rows_reference(x: Tensor) -> Float8Rows:
    found = Float8Rows.empty(x.shape[:-1], x.shape[-1], x.dtype, x.device, x)
    padded = torch.nn.functional.pad(x.flatten(0, -2).float(), (0, -x.shape[-1] % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK))
    exponent = power_of_two_exponent(blocks.abs().amax(2))
    codes = (blocks * power(254 - exponent)[..., None]).to(torch.float8_e4m3fn)
    found.codes[: found.count] = codes.flatten(1)[:, : x.shape[-1]]
    found.scales[:, : found.count] = power(exponent).T
    return found


def round_rows_triton(x: Tensor) -> Float8Rows:
    rows = x.flatten(0, -2)
    assert rows.stride(1) == 1, "a row's values lie side by side"
    count, columns = rows.shape
    found = Float8Rows.empty(x.shape[:-1], columns, x.dtype, x.device, x)
    _round_rows[(cdiv(count, ROWS), cdiv(columns, BLOCK))](
        rows,
        found.codes.view(torch.uint8),
        found.scales,
        rows.stride(0),
        found.scales.stride(0),
        count,
        COLUMNS=columns,
        ROWS=ROWS,
        BLOCK=BLOCK,
        num_warps=4,
        **overlapped(x),
    )
    return found


def destination(made: Float8Rows | None, unused: Tensor) -> tuple[Tensor, Tensor, int]:
    """Codes, scales and their stride, as a kernel takes them that calls `store_rounded`."""
    if made is None:
        return unused, unused, 0
    return made.codes.view(torch.uint8), made.scales, made.scales.stride(0)


@triton.jit
def rounded(values):
    """float32 [N, 128 or fewer] -> uint8 codes of the same shape, and scales float32 [N]."""
    exponent = scale_exponent(tl.max(tl.abs(values), 1))
    values *= ((254 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
    codes = to_float8(values).to(tl.uint8, bitcast=True)
    return codes, (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def store_rounded(
    values, codes, scales, row, scale_stride, first, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):
    """Round a run of one row of COLUMNS values: float32 [a power of two], zero beyond the row's
    end, from column ``first`` on, where one of its blocks of 128 begins. ``codes`` and ``scales``
    are those of all rows.
    """
    SIDE: tl.constexpr = BLOCK if values.shape[0] > BLOCK else values.shape[0]
    COUNT: tl.constexpr = values.shape[0] // SIDE
    coded, levels = rounded(tl.reshape(values, [COUNT, SIDE]))
    block = first // BLOCK + tl.arange(0, COUNT)
    column = block[:, None] * BLOCK + tl.arange(0, SIDE)[None, :]
    row = row.to(tl.int64)
    tl.store(codes + row * COLUMNS + column, coded, mask=column < COLUMNS)
    tl.store(scales + block * scale_stride + row, levels, mask=block * BLOCK < COLUMNS)


@triton.jit
def _round_rows(
    x,
    codes,
    scales,
    row_stride,
    scale_stride,
    rows,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one block of columns of some rows."""
    after_previous()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = (row < rows)[:, None] & (column < COLUMNS)[None, :]
    values = tl.load(
        x + row.to(tl.int64)[:, None] * row_stride + column[None, :], mask=known, other=0.0
    ).to(tl.float32)
    coded, levels = rounded(values)
    tl.store(codes + row.to(tl.int64)[:, None] * COLUMNS + column[None, :], coded, mask=known)
    tl.store(scales + tl.program_id(1) * scale_stride + row, levels, mask=row < rows)
