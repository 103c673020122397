"""Products with float8 weights as they are released (`weights`), from one row to a prompt's.

No weight is ever widened in memory. A program reads a block of weights as float8 and multiplies it
on the matrix units in one of two ways, and each 128 columns' partial product gets its block's scale
in float32:

- weights become float16 in registers, which holds float8 exactly, and meet rows of float16;
- or, where the model says that its activations are float8, weights stay as they are and meet rows
  of float8, with one scale for each 128 values of a row (`rounded_rows`): half the bytes and twice
  the rate. Such rows others multiply faster at some sizes (`float8_products`).

Where there are fewer blocks of outputs than a GPU needs to read at its bandwidth, several programs
share the columns. The last of them to end adds up the sums of all, in a fixed order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fmsim.exec.kernels import arrivals, tuning
from fmsim.exec.kernels.lang import (
    after_previous,
    cdiv,
    next_power_of_2,
    overlapped,
    runs_compiled,
    tl,
    triton,
)
from fmsim.exec.kernels.layout import product_operand
from fmsim.exec.kernels.norms.rounded_rows import (
    Activations,
    Float8Rows,
    round_rows,
    round_rows_reference,
    round_rows_triton,
)
from fmsim.exec.kernels.products import float8_products, one_row
from fmsim.exec.kernels.weights import BLOCK, dequantise

FEWEST_OUTPUTS = 16  # of a program: a matrix instruction's
MOST_SPLITS = 16
MANY_TURNS = 16  # of a program's loop: with fewer, programs should not crowd


def linear(
    x: Activations, weight: Tensor, scale: Tensor, groups: int = 1, float8_rows: bool = False
) -> Tensor:
    """x [..., in], bfloat16 of ordinary size (it meets the weights as float16), times ``weight``
    float8_e4m3fn [out, in] with ``scale`` float32 [ceil(out / 128), ceil(in / 128)] -> [..., out]
    in x's type.

    With ``groups``, group g is the g-th part of the weight's rows, and its input the g-th slice of
    x [..., groups * in]. With ``float8_rows``, as many rows as `are_rounded` says are rounded to
    float8 first, unless whoever made them did.
    """
    if isinstance(x, Tensor):
        if one_row.takes(x, weight):
            return one_row.one_row_triton(x, weight, scale, groups)
        if float8_rows and are_rounded(x.shape[:-1].numel(), weight, groups):
            x = round_rows(x)
    if isinstance(x, Float8Rows):
        found = float8_products.product(x, weight, scale, groups, own=linear_triton)
        if found is not None:
            return found
    aligned = groups == 1 or len(weight) // groups % FEWEST_OUTPUTS == 0
    on_gpu = runs_compiled(x if isinstance(x, Tensor) else x.codes)
    run = linear_triton if on_gpu and aligned else linear_reference
    return run(x, weight, scale, groups, float8_rows)


def are_rounded(rows: int, weight: Tensor, groups: int = 1) -> bool:
    """Whether so many rows are rounded to float8 before they meet a float8 ``weight``: more than
    `tuning.FEW_ROWS`, for fewer are bound by the weight's bytes and gain nothing by it, and where
    no scale of a row's would lie across two groups.
    """
    return rows > tuning.FEW_ROWS and (groups == 1 or weight.shape[1] % BLOCK == 0)


def linear_reference(x: Activations, weight, scale, groups=1, float8_rows=False) -> Tensor:
    if isinstance(x, Tensor) and float8_rows and are_rounded(x.shape[:-1].numel(), weight, groups):
        x = round_rows_reference(x)
    if isinstance(x, Float8Rows):
        x = x.widened()
    return grouped_product(x, dequantise(weight, scale, dtype=x.dtype), groups)


def grouped_product(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """As `linear`, with a weight of x's type."""
    if groups == 1:
        return torch.nn.functional.linear(x, weight)
    return torch.einsum(
        "...gi,goi->...go", x.unflatten(-1, (groups, -1)), weight.unflatten(0, (groups, -1))
    ).flatten(-2)


def linear_triton(
    x: Activations,
    weight,
    scale,
    groups=1,
    float8_rows=False,
    tune: tuning.LinearTuning | None = None,
) -> Tensor:
    (outputs, inputs), dtype = weight.shape, x.dtype
    leading = x.shape[:-1] if isinstance(x, Tensor) else x.leading
    total, of_group = leading.numel(), outputs // groups
    if isinstance(x, Tensor) and float8_rows and are_rounded(total, weight, groups):
        x = round_rows_triton(x)
    float8_rows = isinstance(x, Float8Rows)
    tune = tune or tuning.linear(total, dtype, float8_rows)
    if isinstance(x, Float8Rows):
        rows, levels = x.codes, x.scales
    else:
        rows, levels = x.flatten(0, -2), scale
        if dtype == torch.bfloat16 and total > tuning.FEW_ROWS:
            # once, and not by every program that reads them
            rows = rows.to(torch.float16)
    assert rows.stride(1) == 1 and weight.is_contiguous() and scale.is_contiguous(), (
        "a row's values lie side by side"
    )
    # of one group, and of one scale
    block = tune.block_outputs if groups == 1 else math.gcd(tune.block_outputs, of_group)
    block_rows = min(tune.block_rows, max(16, next_power_of_2(total)))
    row_blocks = cdiv(total, block_rows)
    blocks, turns = cdiv(outputs, block) * row_blocks, cdiv(inputs, tune.block_inputs)
    if total <= tuning.FEW_ROWS:
        splits = max(1, min(turns, tune.programs // blocks))
    else:
        splits = _splits(blocks, turns, tune)
    # a GPU is full without splits where there are so many blocks
    share = cdiv(turns, splits if blocks <= arrivals.MOST else 1)
    splits = cdiv(turns, share)
    out = torch.empty(*leading, outputs, dtype=dtype, device=rows.device)
    parts, arrived = out, scale
    if splits > 1:
        parts = torch.empty(splits, total, outputs, dtype=torch.float32, device=rows.device)
        arrived = arrivals.arrivals(rows.device)
    _linear[(blocks, splits)](
        rows,
        levels,
        weight,
        scale,
        parts,
        arrived,
        out,
        rows.stride(0),
        levels.stride(0),
        total,
        row_blocks,
        share,
        OUTPUTS=outputs,
        INPUTS=inputs,
        OF_GROUP=of_group,
        SCALES=scale.shape[1],
        SCALED=BLOCK,
        BLOCK_ROWS=block_rows,
        BLOCK_OUTPUTS=block,
        BLOCK_INPUTS=tune.block_inputs,
        NEAR_ROWS=tune.near_rows,
        STAGES=tune.stages,
        FLOAT8_ROWS=float8_rows,
        SPLIT=splits > 1,
        num_warps=tune.warps,
        **overlapped(rows),
    )
    return out


def _splits(blocks: int, turns: int, tune: tuning.LinearTuning) -> int:
    """In how many parts to cut the ``turns`` of each of the ``blocks``: as many as the programs
    that are set, or two thirds of them where turns are few.
    """

    def fits(splits: int) -> bool:
        share = cdiv(turns, splits)
        room = tune.programs if share >= MANY_TURNS else tune.programs * 2 // 3
        return share >= tune.fewest_turns and blocks * splits <= room

    return max(filter(fits, range(1, MOST_SPLITS + 1)), default=1)


# compiled once for a kind of rows, however many there are
@triton.jit(do_not_specialize=["rows", "row_blocks", "share"])
def _linear(
    x,
    x_scale,
    weight,
    scale,
    parts,
    arrived,
    out,
    row_stride,
    scale_stride,
    rows,
    row_blocks,
    share,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    OF_GROUP: tl.constexpr,
    SCALES: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    NEAR_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    FLOAT8_ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One program: a block of outputs of a block of rows, over ``share`` blocks of inputs.

    Programs of NEAR_ROWS blocks of rows and the same outputs follow one another, so that they find
    the weights in the L2. A block of outputs and a block of inputs lie in one scale's block, so a
    scale is one number; it is read a block ahead.
    """
    after_previous()
    # the weights are the left operand: many, they fill the matrix units, and may be in registers
    OUTPUT_BLOCKS: tl.constexpr = (OUTPUTS + BLOCK_OUTPUTS - 1) // BLOCK_OUTPUTS
    near = tl.program_id(0) // (NEAR_ROWS * OUTPUT_BLOCKS) * NEAR_ROWS
    of_near = tl.minimum(row_blocks - near, NEAR_ROWS)
    number = tl.program_id(0) % (NEAR_ROWS * OUTPUT_BLOCKS)
    first_row = (near + number % of_near) * BLOCK_ROWS
    start, split = number // of_near * BLOCK_OUTPUTS, tl.program_id(1)
    TURNS: tl.constexpr = (INPUTS + BLOCK_INPUTS - 1) // BLOCK_INPUTS
    first, last = split * share, tl.minimum((split + 1) * share, TURNS)
    output, column = start + tl.arange(0, BLOCK_OUTPUTS), tl.arange(0, BLOCK_INPUTS)
    row = first_row + tl.arange(0, BLOCK_ROWS)
    # What lies beyond the last is read as another, and not stored. Rows come round from the first,
    # so that of a tile with one row not every program reads one line of the L2 128 times.
    there = tl.minimum(output, OUTPUTS - 1)
    asked = row % rows
    x += (start // OF_GROUP) * INPUTS
    x_scale += (start // OF_GROUP) * (INPUTS // SCALED) * scale_stride
    scale += (start // SCALED) * SCALES
    weights = weight + there.to(tl.int64)[:, None] * INPUTS + column[None, :]
    values = x + asked.to(tl.int64)[None, :] * row_stride + column[:, None]
    sums = tl.zeros([BLOCK_OUTPUTS, BLOCK_ROWS], tl.float32)
    unit = 1.0
    next_level = tl.load(scale + first * BLOCK_INPUTS // SCALED)
    for turn in tl.range(first, last, num_stages=STAGES):
        place = turn * BLOCK_INPUTS
        level = next_level
        next_level = tl.load(scale + tl.minimum(turn + 1, TURNS - 1) * BLOCK_INPUTS // SCALED)
        if INPUTS % BLOCK_INPUTS == 0:
            codes = tl.load(weights + place)
            part = tl.load(values + place)
        else:
            inside = place + column < INPUTS
            codes = tl.load(weights + place, mask=inside[None, :], other=0.0)
            part = tl.load(values + place, mask=inside[:, None], other=0.0)
        if FLOAT8_ROWS:
            # float8's products are added up in fewer bits than float32's: 128 of them at most
            of_row = tl.load(x_scale + place // SCALED * scale_stride + row)
            sums += tl.dot(codes, part) * (of_row * level)[None, :]
        else:
            operand = product_operand(part)
            if BLOCK_ROWS <= 16:
                sums += tl.dot(codes.to(operand.dtype), operand, input_precision="ieee") * level
            else:  # in units of the block's scale, so that products are added to it in place
                level = tl.maximum(level, 1e-30)
                sums *= unit / level
                unit = level
                sums = tl.dot(codes.to(operand.dtype), operand, sums, input_precision="ieee")
    sums *= unit
    places = row.to(tl.int64)[None, :] * OUTPUTS + output[:, None]
    exists = (output < OUTPUTS)[:, None] & (row < rows)[None, :]
    if SPLIT:
        of_part = (split * rows + row).to(tl.int64)[None, :] * OUTPUTS + output[:, None]
        tl.store(parts + of_part, sums, mask=exists)
        tl.debug_barrier()  # all threads' sums are there before one of them says so
        before = tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel")
        if before == tl.num_programs(1) - 1:
            sums = tl.zeros([BLOCK_OUTPUTS, BLOCK_ROWS], tl.float32)
            for part in tl.range(0, tl.num_programs(1), loop_unroll_factor=4):
                of_part = (part * rows + row).to(tl.int64)[None, :] * OUTPUTS + output[:, None]
                sums += tl.load(parts + of_part, mask=exists, other=0.0, cache_modifier=".cg")
            tl.store(out + places, sums.to(out.dtype.element_ty), mask=exists)
            tl.store(arrived + tl.program_id(0), 0)
    else:
        tl.store(out + places, sums.to(out.dtype.element_ty), mask=exists)
