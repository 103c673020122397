"""`fmsim.exec.model.hyper_connection.sinkhorn` with a gradient that keeps no step of it.

On a GPU one kernel each way holds a matrix in registers; elsewhere plain torch does the same.
Shapes: T tokens, R residual streams.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmsim.exec.kernels.lang import cdiv
from fmsim.exec.model import hyper_connection
from fmsim.exec.whole import device
from fmsim.exec.whole.kernels import sinkhorn as kernels

SINKHORN_ROWS = 64


def sinkhorn(mix: Tensor, iterations: int, eps: float) -> Tensor:
    """Positive float32 matrices [T, R, R] made doubly stochastic."""
    return _Sinkhorn.apply(mix.contiguous(), iterations, eps)


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mix, iterations, eps):
        ctx.save_for_backward(mix)
        ctx.steps, ctx.eps = 2 * iterations - 1, eps
        if not device.runs_kernels(mix):
            return hyper_connection.sinkhorn(mix, iterations, eps)
        out = torch.empty_like(mix)
        kernels.sinkhorn_forward[(cdiv(len(mix), SINKHORN_ROWS),)](
            mix, out, len(mix), ctx.steps, eps, R=mix.shape[1], ROWS=SINKHORN_ROWS, num_warps=2
        )
        return out

    @staticmethod
    def backward(ctx, grad):
        [mix] = ctx.saved_tensors
        grad = grad.contiguous()
        if not device.runs_kernels(mix):
            return _plain_gradient(mix, grad, ctx.steps, ctx.eps), None, None
        onto = torch.empty_like(mix)
        kernels.sinkhorn_backward[(cdiv(len(mix), SINKHORN_ROWS),)](
            mix, grad, onto, len(mix), ctx.steps, ctx.eps, R=mix.shape[1], ROWS=SINKHORN_ROWS,
            num_warps=2,
        )  # fmt: skip
        return onto, None, None


def _plain_gradient(mix: Tensor, grad: Tensor, steps: int, eps: float) -> Tensor:
    """The gradient of the input, back through divisions by sums of columns and rows in turn."""
    states = [mix]
    for step in range(steps):
        states.append(states[-1] / (states[-1].sum(1 + step % 2, keepdim=True) + eps))
    for step in reversed(range(steps)):
        along = (grad * states[step + 1]).sum(1 + step % 2, keepdim=True)
        grad = (grad - along) / (states[step].sum(1 + step % 2, keepdim=True) + eps)
    return grad
