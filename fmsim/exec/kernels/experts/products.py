"""Rows of an expert's weights times some tokens, and where their scales lie: what a program of
`mixture` does.
"""

from __future__ import annotations

from fmsim.exec.kernels.lang import tl, triton


@triton.jit
def first_scales(scale, expert, row, OUT: tl.constexpr, DEPTH: tl.constexpr, SCALED: tl.constexpr):
    """Pointers to the first scale of each ``row`` of an expert's matrix [OUT, DEPTH], of those
    stacked at ``scale``.
    """
    columns: tl.constexpr = (DEPTH + SCALED - 1) // SCALED
    blocks: tl.constexpr = (OUT + SCALED - 1) // SCALED
    return scale + (expert * blocks + row // SCALED) * columns


@triton.jit
def products_of(
    weights,
    scales,
    activations,
    row_known,
    known,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Rows of weights times tokens, float32 [ROWS, TILE], by pointers to where each begins; where
    SCALED, each row's every so many values have a scale, and ``scales`` points to its first.

    A TILE of one is multiplied without matrix units.
    """
    lane = tl.arange(0, BLOCK_DEPTH)
    summed = tl.zeros([ROWS, BLOCK_DEPTH if TILE == 1 else TILE], tl.float32)
    for start in tl.range(0, DEPTH, BLOCK_DEPTH, num_stages=STAGES):
        place = start + lane
        weights_known, tokens_known = row_known[:, None], known[:, None]
        if DEPTH % BLOCK_DEPTH != 0:
            weights_known, tokens_known = (
                weights_known & (place < DEPTH)[None, :],
                tokens_known & (place < DEPTH)[None, :],
            )
        weight = tl.load(weights[:, None] + place[None, :], mask=weights_known, other=0.0)
        x = tl.load(activations[:, None] + place[None, :], mask=tokens_known, other=0.0)
        if SCALED and x.dtype == tl.bfloat16:
            x = x.to(tl.float16)
        if TILE == 1:
            product = weight.to(tl.float32) * x.to(tl.float32)
        else:
            if WIDEN and x.dtype == tl.bfloat16:  # Triton's interpreter multiplies no bfloat16
                x = x.to(tl.float32)
            product = tl.dot(weight.to(x.dtype), tl.trans(x), input_precision="ieee")
        if SCALED:
            product = (
                product * tl.load(scales + start // SCALED, mask=row_known, other=0.0)[:, None]
            )
        summed += product
    if TILE == 1:
        summed = tl.sum(summed, 1)[:, None]
    return summed
