"""Products of few rows with float8 weights as they are released (`weights`): a decode step's
projections, bound by reading the weights.

Weights become float16 on the way to the matrix units, which holds float8 exactly, and each 128
columns' partial product gets its block's scale in float32. Where there are fewer blocks of outputs
than a GPU needs to read at its bandwidth, several programs share the columns, and a second launch
adds their sums up, in a fixed order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.lang import cdiv, next_power_of_2, runs_compiled, tl, triton
from fmsim.exec.kernels.layout import product_operand
from fmsim.exec.kernels.weights import BLOCK, dequantise

MOST_ROWS = 128  # beyond them widening the weights once costs less
FEWEST_OUTPUTS = 16  # of a program: a matrix instruction's


def linear(x: Tensor, weight: Tensor, scale: Tensor, groups: int = 1) -> Tensor:
    """x [..., in], bfloat16 of ordinary size (it meets the weights as float16), times ``weight``
    float8_e4m3fn [out, in] with ``scale`` float32 [ceil(out / 128), ceil(in / 128)] -> [..., out]
    in x's type.

    With ``groups``, group g is the g-th part of the weight's rows, and its input the g-th slice of
    x [..., groups * in]. Any number of rows is right; `MOST_ROWS` of them are fast.
    """
    few = x.shape[:-1].numel() <= MOST_ROWS
    aligned = groups == 1 or len(weight) // groups % FEWEST_OUTPUTS == 0
    run = linear_triton if runs_compiled(x) and few and aligned else linear_reference
    return run(x, weight, scale, groups)


def linear_reference(x, weight, scale, groups=1) -> Tensor:
    return grouped_product(x, dequantise(weight, scale, dtype=x.dtype), groups)


def grouped_product(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """As `linear`, with a weight of x's type."""
    if groups == 1:
        return torch.nn.functional.linear(x, weight)
    return torch.einsum(
        "...gi,goi->...go", x.unflatten(-1, (groups, -1)), weight.unflatten(0, (groups, -1))
    ).flatten(-2)


def linear_triton(x, weight, scale, groups=1, tune: tuning.LinearTuning | None = None) -> Tensor:
    rows, (outputs, inputs) = x.flatten(0, -2), weight.shape
    total, of_group = len(rows), outputs // groups
    tune = tune or (tuning.LINEAR if total <= tuning.FEW_ROWS else tuning.LINEAR_OF_MANY)
    assert rows.stride(1) == 1 and weight.is_contiguous() and scale.is_contiguous(), (
        "a row's values lie side by side"
    )
    # of one group, and of one scale
    block = tune.block_outputs if groups == 1 else math.gcd(tune.block_outputs, of_group)
    blocks, turns = cdiv(outputs, block), cdiv(inputs, tune.block_inputs)
    share = cdiv(turns, max(1, min(turns, tune.programs // blocks)))
    splits = cdiv(turns, share)
    out = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype, device=x.device)
    parts = (
        out
        if splits == 1
        else torch.empty(splits, total, outputs, dtype=torch.float32, device=x.device)
    )
    _linear[(blocks, splits)](
        rows,
        weight.view(torch.uint8),
        scale,
        parts,
        rows.stride(0),
        total,
        OUTPUTS=outputs,
        INPUTS=inputs,
        OF_GROUP=of_group,
        SCALES=scale.shape[1],
        SCALED=BLOCK,
        ROWS=max(16, next_power_of_2(total)),
        BLOCK_OUTPUTS=block,
        BLOCK_INPUTS=tune.block_inputs,
        SHARE=share,
        STAGES=tune.stages,
        num_warps=tune.warps,
    )
    if splits > 1:
        _add_up[(cdiv(out.numel(), tune.block_sums),)](
            parts,
            out,
            out.numel(),
            SPLITS=splits,
            SPLITS_PADDED=next_power_of_2(splits),
            BLOCK=tune.block_sums,
            num_warps=4,
        )
    return out


@triton.jit
def _linear(
    x,
    weight,
    scale,
    out,
    row_stride,
    rows,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    OF_GROUP: tl.constexpr,
    SCALES: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    SHARE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: a block of outputs of all rows, over SHARE blocks of inputs.

    A block of outputs and a block of inputs lie in one scale's block, so a scale is one number; it
    is read a block ahead.
    """
    start, split = tl.program_id(0) * BLOCK_OUTPUTS, tl.program_id(1)
    TURNS: tl.constexpr = (INPUTS + BLOCK_INPUTS - 1) // BLOCK_INPUTS
    first, last = split * SHARE, tl.minimum((split + 1) * SHARE, TURNS)
    output, column, row = (
        start + tl.arange(0, BLOCK_OUTPUTS),
        tl.arange(0, BLOCK_INPUTS),
        tl.arange(0, ROWS),
    )
    exists, asked = output < OUTPUTS, row < rows
    x += (start // OF_GROUP) * INPUTS
    scale += (start // SCALED) * SCALES
    sums = tl.zeros([BLOCK_OUTPUTS, ROWS], tl.float32)
    next_level = tl.load(scale + first * BLOCK_INPUTS // SCALED)
    for turn in tl.range(first, last, num_stages=STAGES):
        place = turn * BLOCK_INPUTS + column
        inside = place < INPUTS
        level, next_level = (
            next_level,
            tl.load(scale + tl.minimum(turn + 1, TURNS - 1) * BLOCK_INPUTS // SCALED),
        )
        codes = tl.load(
            weight + output[:, None] * INPUTS + place[None, :],
            mask=exists[:, None] & inside[None, :],
            other=0,
        )
        part = tl.load(
            x + row[None, :] * row_stride + place[:, None],
            mask=asked[None, :] & inside[:, None],
            other=0.0,
        )
        operand = product_operand(part)
        values = codes.to(tl.float8e4nv, bitcast=True).to(operand.dtype)
        sums += tl.dot(values, operand, input_precision="ieee") * level
    places = (split * rows + row)[None, :] * OUTPUTS + output[:, None]
    tl.store(out + places, sums.to(out.dtype.element_ty), mask=exists[:, None] & asked[None, :])


@triton.jit
def _add_up(
    parts, out, count, SPLITS: tl.constexpr, SPLITS_PADDED: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: a block of outputs, whose splits are added in one order whatever the run."""
    split, place = (
        tl.arange(0, SPLITS_PADDED)[:, None],
        (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :],
    )
    sums = tl.load(
        parts + split * count + place, mask=(split < SPLITS) & (place < count), other=0.0
    )
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place, tl.sum(sums, 0).to(out.dtype.element_ty), mask=place < count)
