"""Sinkhorn's normalisation of hyper-connections' mixing matrices, forward and backward."""

from __future__ import annotations

from fmsim.exec.kernels.lang import tl, triton


@triton.jit
def sinkhorn_forward(mix, out, count, steps, eps, R: tl.constexpr, ROWS: tl.constexpr):
    """One program: ROWS matrices [R, R], their columns and rows made to sum to one in turn."""
    place, known = _matrices(count, R, ROWS)
    x = tl.load(mix + place, mask=known, other=1.0)
    for step in range(steps):
        x = x / _sums(x, step, eps)
    tl.store(out + place, x, mask=known)


@triton.jit
def sinkhorn_backward(
    mix, grad_out, grad_mix, count, steps, eps, R: tl.constexpr, ROWS: tl.constexpr
):
    """One program: ROWS matrices. Each step back makes its input anew from the start: registers, no
    memory.
    """
    place, known = _matrices(count, R, ROWS)
    start = tl.load(mix + place, mask=known, other=1.0)
    grad = tl.load(grad_out + place, mask=known, other=0.0)
    for back in range(steps):
        last = steps - 1 - back
        x = start
        for step in range(last):
            x = x / _sums(x, step, eps)
        sums = _sums(x, last, eps)
        along = _sums(grad * (x / sums), last, 0.0)
        grad = (grad - along) / sums
    tl.store(grad_mix + place, grad, mask=known)


@triton.jit
def _matrices(count, R: tl.constexpr, ROWS: tl.constexpr):
    """Places [ROWS, R, R] of the program's matrices, and which of them exist."""
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    line = tl.arange(0, R)
    place = number[:, None, None] * (R * R) + line[None, :, None] * R + line[None, None, :]
    return place, (number < count)[:, None, None] & (line >= 0)[None, :, None]


@triton.jit
def _sums(x, step, eps):
    """Of columns in even steps, of rows in odd ones; broadcast to the shape of x."""
    columns, rows = tl.sum(x, 1)[:, None, :], tl.sum(x, 2)[:, :, None]
    return tl.where(step % 2 == 0, columns + tl.zeros_like(x), rows + tl.zeros_like(x)) + eps
