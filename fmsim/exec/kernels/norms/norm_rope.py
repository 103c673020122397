"""RMS normalisation of each head and RoPE on its trailing channels, in one launch: queries, index
queries, and the attention's output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.lang import (
    after_previous,
    cdiv,
    next_power_of_2,
    overlapped,
    runs_compiled,
    tl,
    triton,
)
from fmsim.exec.kernels.layout import triton_type
from fmsim.exec.kernels.norms.rounded_rows import (
    Activations,
    Float8Rows,
    destination,
    round_rows_reference,
    round_rows_triton,
    store_rounded,
)
from fmsim.exec.kernels.weights import BLOCK

Turn = tuple[Tensor, Tensor]  # cosine and sine of RoPE's angles, float32 [N, pairs]


def norm_rope(
    x: Tensor,
    rotation: Turn,
    eps: float | None = None,
    inverse: bool = False,
    dtype: torch.dtype | None = None,
    rounded: bool = False,
) -> Activations:
    """Rows of heads, x [N, H, C] -> the same shape, and type where no ``dtype`` is given: each head
    normalised, without a weight, where ``eps`` is given, then turned. ``rounded``: as rows [N, H *
    C] of float8 alone.

    ``rotation``: cosine and sine, float32 [N, pairs], of the angles of the last ``2 * pairs``
    channels, interleaved; they are turned back where ``inverse``. C is a power of two. A step's
    layers share their angles, so torch makes them once and exactly: a position of a million needs a
    range reduction that a fast sine has not.
    """
    run = norm_rope_triton if runs_compiled(x) else norm_rope_reference
    return run(x, rotation, eps, inverse, dtype, rounded)


def norm_rope_reference(
    x, rotation, eps=None, inverse=False, dtype=None, rounded=False
) -> Activations:
    value, (cos, sin) = x.float(), (part.float()[:, None] for part in rotation)
    if eps is not None:
        value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    if inverse:
        sin = -sin
    still = x.shape[2] - 2 * cos.shape[2]
    even, odd = value[..., still::2], value[..., still + 1 :: 2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
    out = torch.cat((value[..., :still], turned), -1).to(dtype or x.dtype)
    return round_rows_reference(out.flatten(1)) if rounded else out


def norm_rope_triton(
    x, rotation, eps=None, inverse=False, dtype=None, rounded=False, tune=tuning.NORM_ROPE
) -> Activations:
    (rows, heads, width), dtype = x.shape, dtype or x.dtype
    assert x.stride(2) == 1 and x.stride(1) == width, "a row's heads lie side by side"
    cos, sin = (part.contiguous() for part in rotation)
    block = min(next_power_of_2(heads), max(1, tune.block_values // width))
    if rounded and block < heads and block * width % BLOCK:  # a program has part of what is scaled
        return round_rows_triton(norm_rope_triton(x, rotation, eps, inverse, dtype).flatten(1))
    made, out = None, x
    if rounded:
        made = Float8Rows.empty((rows,), heads * width, dtype, x.device)
    else:
        out = torch.empty(rows, heads, width, dtype=dtype, device=x.device)
    _norm_rope[(rows, cdiv(heads, block))](
        x,
        cos,
        sin,
        out,
        *destination(made, out),
        x.stride(0),
        0.0 if eps is None else eps,
        HEADS=heads,
        WIDTH=width,
        PAIRS=cos.shape[1],
        NORMALISE=eps is not None,
        INVERSE=inverse,
        BLOCK=block,
        TYPE=triton_type(dtype),
        ROUNDED=rounded,
        SCALED=BLOCK,
        num_warps=tune.warps,
        **overlapped(x),
    )
    return out if made is None else made


@triton.jit
def _norm_rope(
    x,
    cos,
    sin,
    out,
    codes,
    scales,
    scale_stride,
    row_stride,
    eps,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    NORMALISE: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
    TYPE: tl.constexpr,
    ROUNDED: tl.constexpr,
    SCALED: tl.constexpr,
):
    """One program: a block of one row's heads."""
    after_previous()
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    places, exists = head[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], (head < HEADS)[:, None]
    value = tl.load(x + row * row_stride + places, mask=exists, other=0.0).to(tl.float32)
    if NORMALISE:
        value = value * tl.rsqrt(tl.sum(value * value, 1) / WIDTH + eps)[:, None]
    pair = tl.arange(0, WIDTH // 2) - (WIDTH // 2 - PAIRS)
    c = tl.load(cos + row * PAIRS + pair, mask=pair >= 0, other=1.0)[None, :]
    s = tl.load(sin + row * PAIRS + pair, mask=pair >= 0, other=0.0)[None, :]
    if INVERSE:
        s = -s
    even, odd = tl.split(tl.reshape(value, [BLOCK, WIDTH // 2, 2]))
    value = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), [BLOCK, WIDTH]).to(TYPE)
    if ROUNDED:
        run, first = tl.reshape(value, [BLOCK * WIDTH]), tl.program_id(1) * (BLOCK * WIDTH)
        store_rounded(
            run.to(tl.float32), codes, scales, row, scale_stride, first, HEADS * WIDTH, SCALED
        )
    else:
        tl.store(out + row * HEADS * WIDTH + places, value, mask=exists)
