"""Activations as float8, the way DeepSeek's release multiplies them: each 128 values of a row share
a power of two, the smallest that brings them within 448.
"""

from __future__ import annotations

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
    float8_codes,
    power,
    power_of_two_exponent,
    scale_exponent,
)
from fmsim.exec.kernels.weights import BLOCK

ROWS = 8  # of one program
PADDED = 256  # rows of the scales: no block of rows in a product has more


def round_rows(x: Tensor, multiple: int = PADDED) -> tuple[Tensor, Tensor]:
    """x [rows, in] -> codes float8_e4m3fn [rows and more, in], and their scales float32 [ceil(in /
    128), rows and more], so that a program reads those of many rows at a time; what stands beyond
    the rows, up to a ``multiple``, is anything.
    """
    return (round_rows_triton if runs_compiled(x) else round_rows_reference)(x, multiple)


def round_rows_reference(x: Tensor, multiple: int = PADDED) -> tuple[Tensor, Tensor]:
    columns = x.shape[1]
    blocks = torch.nn.functional.pad(x.float(), (0, -columns % BLOCK)).unflatten(1, (-1, BLOCK))
    exponent = power_of_two_exponent(blocks.abs().amax(2))
    codes = (blocks * power(254 - exponent)[..., None]).to(torch.float8_e4m3fn)
    more = -len(x) % multiple
    scales = torch.nn.functional.pad(power(exponent).T, (0, more)).contiguous()
    codes = codes.flatten(1)[:, :columns]
    return torch.cat((codes, codes.new_zeros(more, columns))), scales


def rounded_reference(x: Tensor) -> Tensor:
    """x [..., in] rounded to float8 and back, in its type."""
    codes, scales = round_rows_reference(x.flatten(0, -2))
    rows = x.shape[:-1].numel()
    wide = scales.T[:rows].repeat_interleave(BLOCK, 1)[:, : x.shape[-1]]
    return (codes[:rows].float() * wide).to(x.dtype).view_as(x)


def round_rows_triton(x: Tensor, multiple: int = PADDED) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    blocks, room = cdiv(columns, BLOCK), cdiv(rows, multiple) * multiple
    codes = torch.empty(room, columns, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(blocks, room, dtype=torch.float32, device=x.device)
    _round_rows[(cdiv(rows, ROWS), blocks)](
        x,
        codes.view(torch.uint8),
        scales,
        x.stride(0),
        scales.stride(0),
        rows,
        COLUMNS=columns,
        ROWS=ROWS,
        BLOCK=BLOCK,
        num_warps=4,
        **overlapped(x),
    )
    return codes, scales


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
    exponent = scale_exponent(tl.max(tl.abs(values), 1))
    coded = float8_codes(values * ((254 - exponent) << 23).to(tl.float32, bitcast=True)[:, None])
    tl.store(codes + row.to(tl.int64)[:, None] * COLUMNS + column[None, :], coded, mask=known)
    tl.store(
        scales + tl.program_id(1) * scale_stride + row,
        (exponent << 23).to(tl.float32, bitcast=True),
        mask=row < rows,
    )
