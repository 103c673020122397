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


def rms_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """``norm`` (`model.RMSNorm`) of x [..., width]; the same shape and type."""
    return rms_norm_triton(x, norm) if runs_compiled(x) else rms_norm_reference(x, norm)


def rms_norm_reference(x: Tensor, norm: nn.Module) -> Tensor:
    return norm(x)


def rms_norm_triton(x: Tensor, norm: nn.Module, tune=tuning.NORM_ROPE) -> Tensor:
    rows, width = x.flatten(0, -2), x.shape[-1]
    assert rows.stride(1) == 1, "a row's values lie side by side"
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _rms_norm[(len(rows),)](
        rows,
        norm.weight,
        out,
        rows.stride(0),
        norm.eps,
        WIDTH=width,
        WIDTH_PADDED=next_power_of_2(width),
        num_warps=tune.warps,
        **overlapped(x),
    )
    return out


@triton.jit
def _rms_norm(x, weight, out, row_stride, eps, WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr):
    """One program: one row."""
    row, channel = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH_PADDED)
    inside = channel < WIDTH
    scale = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    after_previous()
    value = tl.load(x + row * row_stride + channel, mask=inside, other=0.0).to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps) * scale
    tl.store(out + row * WIDTH + channel, value.to(out.dtype.element_ty), mask=inside)
