"""RMSNorm with a weight, in one launch for few rows: the latent of the queries."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.lang import (
    after_previous,
    next_power_of_2,
    overlapped,
    runs_compiled,
    tl,
    triton,
)
from fmsim.exec.kernels.norms.rounded_rows import (
    Activations,
    Float8Rows,
    destination,
    round_rows_reference,
    store_rounded,
)
from fmsim.exec.kernels.weights import BLOCK


def rms_norm(x: Tensor, norm: nn.Module, rounded: bool = False) -> Activations:
    """``norm`` (`model.RMSNorm`) of x [..., width]; the same shape and type, ``rounded`` to float8
    beside that if so.
    """
    return (rms_norm_triton if runs_compiled(x) else rms_norm_reference)(x, norm, rounded)


def rms_norm_reference(x: Tensor, norm: nn.Module, rounded: bool = False) -> Activations:
    return round_rows_reference(norm(x)) if rounded else norm(x)


def rms_norm_triton(
    x: Tensor, norm: nn.Module, rounded: bool = False, tune=tuning.NORM_ROPE
) -> Activations:
    rows, width = x.flatten(0, -2), x.shape[-1]
    assert rows.stride(1) == 1, "a row's values lie side by side"
    out, made = torch.empty(x.shape, dtype=x.dtype, device=x.device), None
    if rounded:
        made = Float8Rows.empty(x.shape[:-1], width, x.dtype, x.device, out)
    _rms_norm[(len(rows),)](
        rows,
        norm.weight,
        out,
        *destination(made, out),
        rows.stride(0),
        norm.eps,
        WIDTH=width,
        WIDTH_PADDED=next_power_of_2(width),
        ROUNDED=rounded,
        BLOCK=BLOCK,
        num_warps=tune.warps,
        **overlapped(x),
    )
    return out if made is None else made


@triton.jit
def _rms_norm(
    x,
    weight,
    out,
    codes,
    scales,
    scale_stride,
    row_stride,
    eps,
    WIDTH: tl.constexpr,
    WIDTH_PADDED: tl.constexpr,
    ROUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one row."""
    row, channel = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH_PADDED)
    inside = channel < WIDTH
    scale = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    after_previous()
    value = tl.load(x + row * row_stride + channel, mask=inside, other=0.0).to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps) * scale
    value = value.to(out.dtype.element_ty)
    tl.store(out + row * WIDTH + channel, value, mask=inside)
    if ROUNDED:
        store_rounded(value.to(tl.float32), codes, scales, row, scale_stride, 0, WIDTH, BLOCK)
