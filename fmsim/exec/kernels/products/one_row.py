"""The product of one row with a weight: a decode step's projections at batch 1.

Such a product is as fast as its weight is read, so a program holds whole rows of it in registers,
all its reads on the way at once, and no second launch adds anything up. It reads the weight before
it waits for the launch that makes its input (`lang.after_previous`). A large float8 weight's is
`in_turns`. The first product of a block's input may have a program more, for what the way back
needs (`mixing`).
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
from fmsim.exec.kernels.norms.norm_rope import norm_rope_reference
from fmsim.exec.kernels.products import few_rows, in_turns
from fmsim.exec.kernels.products.in_turns import HeadTurn, normalised
from fmsim.exec.kernels.products.mixing import Due, gates_beside
from fmsim.exec.kernels.weights import BLOCK, dequantise


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether x [..., in] is on a GPU and `fits`."""
    return runs_compiled(x) and fits(x, weight)


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether x [..., in] is one row, without gradients, and a ``weight`` of its width is bfloat16
    or float8, of which a program can hold a row.
    """
    return (
        x.shape[:-1].numel() == 1
        and weight.dtype in (torch.bfloat16, torch.float8_e4m3fn)
        and weight.shape[1] <= tuning.ONE_ROW.most_inputs
        and not torch.is_grad_enabled()
    )


def turns(x: Tensor, weight: Tensor, head: int) -> bool:
    """Whether `one_row_triton` can turn the outputs, heads of so many, of a float8 ``weight``."""
    return (
        takes(x, weight)
        and weight.dtype == torch.float8_e4m3fn
        and in_turns.takes_turn(weight, head)
    )


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] times a ``weight`` [out, in] of its type -> [..., out]."""
    if takes(x, weight):
        return one_row_triton(x, weight)
    if few_rows.takes(x, weight):
        return few_rows.few_rows_triton(x, weight)
    return F.linear(x, weight)


def one_row_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    groups: int = 1,
    norm: nn.Module | None = None,
    alongside: bool = False,
    turn: HeadTurn | None = None,
) -> Tensor:
    """x [..., groups * in] of one row times ``weight`` [out, in], bfloat16, or float8_e4m3fn with
    ``scale`` float32 [ceil(out / 128), ceil(in / 128)] -> [..., out] in x's type.

    With ``groups``, group g is the g-th part of the weight's rows, and its input the g-th slice.
    ``norm`` (`model.RMSNorm`) of x before. ``alongside``: the launch before this one in its stream
    is another product of the same x, and both may run at once. ``turn`` of the outputs, where
    `turns` says so.
    """
    if norm is not None:
        x = norm(x)
    wide = weight if scale is None else dequantise(weight, scale)
    values = x.flatten().float().unflatten(0, (groups, -1))
    out = torch.einsum("gi,goi->go", values, wide.float().unflatten(0, (groups, -1)))
    out = out.to(x.dtype)
    if turn is not None:
        out = norm_rope_reference(out.view(1, -1, turn.head), turn[:2])
    return out.view(*x.shape[:-1], -1)


def one_row_triton(
    x,
    weight,
    scale=None,
    groups=1,
    norm=None,
    alongside=False,
    turn=None,
    tune: tuning.OneRowTuning = tuning.ONE_ROW,
    due: Due | None = None,
) -> Tensor:
    """``due`` gates are worked out beside it, but where it goes in turns."""
    outputs, inputs = weight.shape
    of_group, blocks = outputs // groups, next_power_of_2(cdiv(inputs, BLOCK))
    assert weight.is_contiguous() and x.is_contiguous()
    out = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype, device=x.device)
    if scale is not None and in_turns.takes(weight, groups, tune, turn):
        in_turns.product(x, weight, scale, groups, norm, alongside, turn, out, tune)
        return out
    assert turn is None, "see `turns`"
    # of one group, and of one scale
    most = max(1, tune.block_bytes // (blocks * BLOCK * weight.itemsize))
    rows = math.gcd(most, of_group) if groups > 1 else min(most, BLOCK)
    extra = (due or Due()).take(x)
    _one_row[(cdiv(outputs, rows) + extra.programs,)](
        x,
        weight,
        weight if scale is None else scale,
        weight if norm is None else norm.weight,
        out,
        0.0 if norm is None else norm.eps,
        extra.tensors,
        OUTPUTS=outputs,
        INPUTS=inputs,
        OF_GROUP=of_group,
        SCALES=0 if scale is None else scale.shape[1],
        BLOCK=BLOCK,
        ROWS=rows,
        BLOCKS=blocks,
        NORM=norm is not None,
        ALONGSIDE=alongside,
        GATES=extra.sizes,
        num_warps=tune.warps,
        **overlapped(x),
    )
    return out


def two_rows_reference(
    x: Tensor, weights: tuple[Tensor, Tensor], scales: tuple[Tensor | None, Tensor | None]
) -> list[Tensor]:
    """As `one_row_reference`, of two weights, each bfloat16 or float8_e4m3fn with its scale."""
    return [one_row_reference(x, *of) for of in zip(weights, scales, strict=True)]


def two_rows_triton(
    x, weights, scales, tune: tuning.OneRowTuning = tuning.ONE_ROW, due: Due | None = None
) -> list[Tensor]:
    """In one launch, so that both weights are read while x is waited for; ``due`` gates beside."""
    inputs = weights[0].shape[1]
    blocks = next_power_of_2(cdiv(inputs, BLOCK))
    assert all(weight.is_contiguous() for weight in weights) and x.is_contiguous()
    rows, outs, given = [], [], []
    for weight, scale in zip(weights, scales, strict=True):
        # what bfloat16 holds of x beside its weights takes as many registers
        held = tune.block_bytes // weight.itemsize
        rows.append(min(max(1, held // weight.itemsize // (blocks * BLOCK)), BLOCK))
        outs.append(torch.empty(*x.shape[:-1], len(weight), dtype=x.dtype, device=x.device))
        given += [weight, weight if scale is None else scale, outs[-1]]
    programs = [cdiv(len(weight), of) for weight, of in zip(weights, rows, strict=True)]
    extra = (due or Due()).take(x)
    _two_rows[(sum(programs) + extra.programs,)](
        x,
        *given,
        extra.tensors,
        FIRST=programs[0],
        OUTPUTS=len(weights[0]),
        SCALES=0 if scales[0] is None else scales[0].shape[1],
        ROWS=rows[0],
        SECOND_OUTPUTS=len(weights[1]),
        SECOND_SCALES=0 if scales[1] is None else scales[1].shape[1],
        SECOND_ROWS=rows[1],
        INPUTS=inputs,
        BLOCK=BLOCK,
        BLOCKS=blocks,
        GATES=extra.sizes,
        num_warps=tune.warps,
        **overlapped(x),
    )
    return outs


@triton.jit
def _one_row(
    x,
    weight,
    scale,
    norm,
    out,
    eps,
    gates,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    OF_GROUP: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    NORM: tl.constexpr,
    ALONGSIDE: tl.constexpr,
    GATES: tl.constexpr,
):
    """One program: `rows_of` of the n-th; before them one for GATES."""
    number = tl.program_id(0)
    if GATES is not None:
        number -= 1
    if number < 0:
        if GATES is not None:
            gates_beside(gates, GATES)
    else:
        rows_of(
            number,
            x,
            weight,
            scale,
            norm,
            out,
            eps,
            OUTPUTS,
            INPUTS,
            OF_GROUP,
            SCALES,
            BLOCK,
            ROWS,
            BLOCKS,
            NORM,
            ALONGSIDE,
        )


@triton.jit
def _two_rows(
    x,
    weight,
    scale,
    out,
    second_weight,
    second_scale,
    second_out,
    gates,
    FIRST: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SCALES: tl.constexpr,
    ROWS: tl.constexpr,
    SECOND_OUTPUTS: tl.constexpr,
    SECOND_SCALES: tl.constexpr,
    SECOND_ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    GATES: tl.constexpr,
):
    """FIRST programs of one weight, and those of the second; before them one for GATES."""
    number = tl.program_id(0)
    if GATES is not None:
        number -= 1
    if number < 0:
        if GATES is not None:
            gates_beside(gates, GATES)
    elif number < FIRST:
        rows_of(
            number,
            x,
            weight,
            scale,
            x,
            out,
            0.0,
            OUTPUTS,
            INPUTS,
            OUTPUTS,
            SCALES,
            BLOCK,
            ROWS,
            BLOCKS,
            NORM=False,
            ALONGSIDE=False,
        )
    else:
        rows_of(
            number - FIRST,
            x,
            second_weight,
            second_scale,
            x,
            second_out,
            0.0,
            SECOND_OUTPUTS,
            INPUTS,
            SECOND_OUTPUTS,
            SECOND_SCALES,
            BLOCK,
            SECOND_ROWS,
            BLOCKS,
            NORM=False,
            ALONGSIDE=False,
        )


@triton.jit
def rows_of(
    number,
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
    """The ``number``-th ROWS outputs, of one group, whose weights share scales, over all inputs, in
    BLOCKS of 128.

    ALONGSIDE the launch before it: that one began when x was there, so it is waited for only that
    none ends before it.
    """
    start = number * ROWS
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
        values = normalised(values, share, INPUTS, eps, x.dtype.element_ty)
    if SCALES:
        values *= level[:, None]
    sums = tl.sum(tl.sum(weights.to(tl.float32) * values[None, :, :], 2), 1)
    tl.store(out + output, sums.to(out.dtype.element_ty), mask=output < OUTPUTS)
    if ALONGSIDE:
        wait_for_previous()
