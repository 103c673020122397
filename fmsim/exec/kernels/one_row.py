"""The product of one row with a weight: a decode step's projections at batch 1.

Such a product is as fast as its weight is read, so a program holds whole rows of it in registers,
all its reads on the way at once, and no second launch adds anything up. It reads the weight before
it waits for the launch that makes its input (`lang.after_previous`).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.lang import (
    after_previous,
    cdiv,
    let_next_begin,
    next_power_of_2,
    overlapped,
    runs_compiled,
    tl,
    triton,
    wait_for_previous,
)
from fmsim.exec.kernels.weights import BLOCK, dequantise


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether x [..., in] is one row on a GPU, without gradients, and a ``weight`` of its width is
    bfloat16 or float8, of which a program can hold a row.
    """
    return (
        runs_compiled(x)
        and x.shape[:-1].numel() == 1
        and weight.dtype in (torch.bfloat16, torch.float8_e4m3fn)
        and weight.shape[1] <= tuning.ONE_ROW.most_inputs
        and not torch.is_grad_enabled()
    )


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] times a ``weight`` [out, in] of its type -> [..., out]."""
    if takes(x, weight):
        return one_row_triton(x, weight)
    return F.linear(x, weight)


def one_row_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    groups: int = 1,
    norm: nn.Module | None = None,
    alongside: bool = False,
) -> Tensor:
    """x [..., groups * in] of one row times ``weight`` [out, in], bfloat16, or float8_e4m3fn with
    ``scale`` float32 [ceil(out / 128), ceil(in / 128)] -> [..., out] in x's type.

    With ``groups``, group g is the g-th part of the weight's rows, and its input the g-th slice.
    ``norm`` (`model.RMSNorm`) of x before. ``alongside``: the launch before this one in its stream
    is another product of the same x, and both may run at once.
    """
    if norm is not None:
        x = norm(x)
    wide = weight if scale is None else dequantise(weight, scale)
    values = x.flatten().float().unflatten(0, (groups, -1))
    out = torch.einsum("gi,goi->go", values, wide.float().unflatten(0, (groups, -1)))
    return out.to(x.dtype).view(*x.shape[:-1], -1)


def one_row_triton(
    x,
    weight,
    scale=None,
    groups=1,
    norm=None,
    alongside=False,
    tune: tuning.OneRowTuning = tuning.ONE_ROW,
) -> Tensor:
    outputs, inputs = weight.shape
    of_group, blocks = outputs // groups, next_power_of_2(cdiv(inputs, BLOCK))
    assert weight.is_contiguous() and x.is_contiguous()
    # of one group, and of one scale
    most = max(1, tune.block_bytes // (blocks * BLOCK * weight.itemsize))
    rows = math.gcd(most, of_group) if groups > 1 else min(most, BLOCK)
    out = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype, device=x.device)
    _one_row[(cdiv(outputs, rows),)](
        x,
        weight,
        weight if scale is None else scale,
        weight if norm is None else norm.weight,
        out,
        0.0 if norm is None else norm.eps,
        OUTPUTS=outputs,
        INPUTS=inputs,
        OF_GROUP=of_group,
        SCALES=0 if scale is None else scale.shape[1],
        BLOCK=BLOCK,
        ROWS=rows,
        BLOCKS=blocks,
        NORM=norm is not None,
        ALONGSIDE=alongside,
        num_warps=tune.warps,
        **overlapped(x),
    )
    return out


@triton.jit
def _one_row(
    x,
    weight,
    scale,
    norm,
    out,
    eps,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    OF_GROUP: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    NORM: tl.constexpr,
    ALONGSIDE: tl.constexpr,
):
    """One program: ROWS outputs of one group, whose weights share scales, over all inputs, in
    BLOCKS of 128.

    ALONGSIDE the launch before it: that one began when x was there, so it is waited for only that
    none ends before it.
    """
    start = tl.program_id(0) * ROWS
    output, block, lane = start + tl.arange(0, ROWS), tl.arange(0, BLOCKS), tl.arange(0, BLOCK)
    place = block[:, None] * BLOCK + lane[None, :]
    places = output.to(tl.int64)[:, None, None] * INPUTS + place[None, :, :]
    if INPUTS == BLOCKS * BLOCK and OUTPUTS % ROWS == 0:
        weights = tl.load(weight + places, eviction_policy="evict_first")
    else:
        inside = (output < OUTPUTS)[:, None, None] & (place < INPUTS)[None, :, :]
        weights = tl.load(weight + places, mask=inside, other=0.0)
    if SCALES:
        level = tl.load(scale + start // BLOCK * SCALES + block, mask=block < SCALES, other=0.0)
    if NORM:
        share = tl.load(norm + place, mask=place < INPUTS, other=0.0).to(tl.float32)
    if ALONGSIDE:
        let_next_begin()
    else:
        after_previous()
    values = tl.load(x + start // OF_GROUP * INPUTS + place, mask=place < INPUTS, other=0.0).to(
        tl.float32
    )
    if NORM:
        square = tl.sum(tl.sum(values * values, 1), 0)
        values = values * tl.rsqrt(square / INPUTS + eps) * share
        values = values.to(x.dtype.element_ty).to(tl.float32)
    if SCALES:
        values *= level[:, None]
    sums = tl.sum(tl.sum(weights.to(tl.float32) * values[None, :, :], 2), 1)
    tl.store(out + output, sums.to(out.dtype.element_ty), mask=output < OUTPUTS)
    if ALONGSIDE:
        wait_for_previous()
