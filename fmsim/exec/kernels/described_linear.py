"""Products of float8 rows with float8 weights as in `linear`, but through tensor descriptors (TMA):
one thread asks for a whole block of rows, weights or scales, and none passes through registers.
That takes longer to begin, and less from then on: from about a hundred rows on it is faster.

Where blocks of outputs and rows are fewer than a GPU's multiprocessors, several programs share a
block's inputs. Each leaves its sums in memory, waits for the others', and adds up its part of the
block's rows over all of them, in a fixed order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fmsim.exec.kernels import arrivals, tuning
from fmsim.exec.kernels.lang import (
    COMPILED,
    TensorDescriptor,
    after_previous,
    cdiv,
    next_power_of_2,
    overlapped,
    tl,
    triton,
)
from fmsim.exec.kernels.rounded_rows import Float8Rows
from fmsim.exec.kernels.weights import BLOCK

FEWEST_ROWS = 16  # of a block
ALIGNED = 16  # bytes: what a descriptor's rows lie apart is a multiple of


def described_linear_triton(
    rows: Float8Rows,
    weight: Tensor,
    scale: Tensor,
    groups: int = 1,
    tune: tuning.DescribedLinearTuning = tuning.DESCRIBED_LINEAR["described, 64 x 64"],
) -> Tensor:
    """``rows`` [..., groups * in] times ``weight`` [out, in] with ``scale``, as `linear` -> [...,
    out] in the rows' type. ``in`` is a multiple of 16; with groups of 128, and out / groups of 16.
    """
    (outputs, inputs), count = weight.shape, rows.count
    assert inputs % ALIGNED == 0 and weight.is_contiguous() and scale.is_contiguous(), (
        "a descriptor's rows begin at multiples of 16 bytes"
    )
    block = tune.block_outputs if groups == 1 else math.gcd(tune.block_outputs, outputs // groups)
    block_rows = min(tune.block_rows, max(FEWEST_ROWS, next_power_of_2(count)))
    row_blocks = cdiv(count, block_rows)
    blocks, turns = cdiv(outputs, block) * row_blocks, cdiv(inputs, BLOCK)
    # a GPU is full without splits where there are so many blocks
    most = min(1 << turns.bit_length() - 1, block_rows) if blocks <= arrivals.MOST else 1
    splits = min(tune.splits, most)
    out = torch.empty(*rows.leading, outputs, dtype=rows.dtype, device=weight.device)
    parts, arrived = out, scale
    if splits > 1:
        parts = torch.empty(splits, count, outputs, dtype=torch.float32, device=weight.device)
        arrived = arrivals.arrivals(weight.device)
    # programs of one block follow one another: those that wait do so for the next to begin. In one
    # dimension, for the others end at 65,535
    _described_linear[(splits * blocks,)](
        TensorDescriptor.from_tensor(rows.codes, [block_rows, BLOCK]),
        TensorDescriptor.from_tensor(rows.scales, [1, block_rows]),
        TensorDescriptor.from_tensor(weight, [block, BLOCK]),
        scale,
        parts,
        arrived,
        out,
        count,
        row_blocks,
        OUTPUTS=outputs,
        INPUTS=inputs,
        OF_GROUP=outputs // groups,
        SCALED=BLOCK,
        BLOCK_ROWS=block_rows,
        BLOCK_OUTPUTS=block,
        NEAR_ROWS=tune.near_rows,
        STAGES=tune.stages,
        SPLITS=splits,
        num_warps=tune.warps,
        **overlapped(weight),
    )
    return out


# compiled once for a kind of rows, however many there are
@triton.jit(do_not_specialize=["rows", "row_blocks"])
def _described_linear(
    x,
    x_scale,
    weight,
    scale,
    parts,
    arrived,
    out,
    rows,
    row_blocks,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    OF_GROUP: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    NEAR_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One program: a block of outputs of a block of rows, over one of SPLITS parts of the inputs.

    Blocks of the same outputs and NEAR_ROWS blocks of rows follow one another, so that they find
    the weights in the L2. A weight's scale is one number for a block; it is read a turn ahead.
    """
    after_previous()
    OUTPUT_BLOCKS: tl.constexpr = (OUTPUTS + BLOCK_OUTPUTS - 1) // BLOCK_OUTPUTS
    split, block = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS
    near = block // (NEAR_ROWS * OUTPUT_BLOCKS) * NEAR_ROWS
    of_near = tl.minimum(row_blocks - near, NEAR_ROWS)
    number = block % (NEAR_ROWS * OUTPUT_BLOCKS)
    first_row = (near + number % of_near) * BLOCK_ROWS
    start = number // of_near * BLOCK_OUTPUTS
    TURNS: tl.constexpr = (INPUTS + SCALED - 1) // SCALED
    OF_SPLIT: tl.constexpr = (TURNS + SPLITS - 1) // SPLITS
    first, last = split * OF_SPLIT, tl.minimum((split + 1) * OF_SPLIT, TURNS)
    group = start // OF_GROUP
    scale += start // SCALED * TURNS
    sums = tl.zeros([BLOCK_OUTPUTS, BLOCK_ROWS], tl.float32)
    next_level = tl.load(scale + tl.minimum(first, TURNS - 1))
    for turn in tl.range(first, last, num_stages=STAGES):
        level = next_level
        next_level = tl.load(scale + tl.minimum(turn + 1, TURNS - 1))
        codes = weight.load([start, turn * SCALED])
        part = x.load([first_row, group * INPUTS + turn * SCALED])
        of_row = tl.reshape(x_scale.load([group * TURNS + turn, first_row]), [BLOCK_ROWS])
        # the weights are the left operand: many, they fill the matrix units
        sums += tl.dot(codes, part.T) * (of_row * level)[None, :]
    output = start + tl.arange(0, BLOCK_OUTPUTS)
    row = first_row + tl.arange(0, BLOCK_ROWS)
    exists = (output < OUTPUTS)[:, None] & (row < rows)[None, :]
    if SPLITS == 1:
        places = row.to(tl.int64)[None, :] * OUTPUTS + output[:, None]
        tl.store(out + places, sums.to(out.dtype.element_ty), mask=exists)
    else:
        of_part = (split * rows + row).to(tl.int64)[None, :] * OUTPUTS + output[:, None]
        tl.store(parts + of_part, sums, mask=exists)
        tl.debug_barrier()  # all threads' sums are there before one of them says so
        before = tl.atomic_add(arrived + block, 1, sem="acq_rel")
        given = parts, out, first_row, rows, output
        if COMPILED:
            while before < SPLITS - 1:
                before = tl.atomic_add(arrived + block, 0, sem="acquire") - 1
            _add_up(*given, split, OUTPUTS, BLOCK_ROWS // SPLITS, SPLITS)
            over = tl.atomic_add(arrived + block, 1, sem="relaxed") == 2 * SPLITS - 1
        else:  # programs run one after another there: the last does it all
            over = before == SPLITS - 1
            if over:
                _add_up(*given, 0, OUTPUTS, BLOCK_ROWS, SPLITS)
        if over:  # as it was
            tl.store(arrived + block, 0)


@triton.jit
def _add_up(
    parts,
    out,
    first_row,
    rows,
    output,
    share,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The ``share``-th ROWS rows of a block, over all parts."""
    row = first_row + share * ROWS + tl.arange(0, ROWS)
    exists = (row < rows)[:, None] & (output < OUTPUTS)[None, :]
    sums = tl.zeros([ROWS, output.shape[0]], tl.float32)
    for part in tl.static_range(SPLITS):
        of_part = (part * rows + row).to(tl.int64)[:, None] * OUTPUTS + output[None, :]
        sums += tl.load(parts + of_part, mask=exists, other=0.0, cache_modifier=".cg")
    places = row.to(tl.int64)[:, None] * OUTPUTS + output[None, :]
    tl.store(out + places, sums.to(out.dtype.element_ty), mask=exists)
