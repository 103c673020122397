"""What a layer does token by token, as a few kernels with gradients; elsewhere than on a GPU, as
plain torch.

Every function here has the same values either way, to within rounding; a test holds one to the
other. Shapes: T tokens, R residual streams, D hidden size, N any width. Matrix products are
torch's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmsim.exec.kernels.experts.mixture import clamped_swiglu
from fmsim.exec.kernels.lang import cdiv, next_power_of_2
from fmsim.exec.model.norm_rope import rms_normalise
from fmsim.exec.whole import device
from fmsim.exec.whole.kernels import pointwise

STREAM_ROWS, STREAM_COLUMNS = 16, 128
NORM_VALUES = 2048  # of a program at a time
NORM_PROGRAMS = 1056  # of a backward pass: eight on each of 132 multiprocessors
SWIGLU_ROWS = 8


def mixes(streams: Tensor, fn: Tensor, eps: float) -> Tensor:
    """RMS-normalised streams [T, R, D] times ``fn`` [M, R * D]: float32 [T, M]. The norm follows
    the product.
    """
    products, square = _Mixes.apply(streams.contiguous(), fn)
    return products.float() * torch.rsqrt(square + eps)[:, None]


class _Mixes(torch.autograd.Function):
    """-> products [T, M] in the streams' type, and the mean square of each token's streams, float32
    [T].
    """

    @staticmethod
    def forward(ctx, streams, fn):
        flat, low = streams.flatten(1), fn.to(streams.dtype)
        ctx.save_for_backward(streams, low)
        norm = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float32)
        return flat @ low.T, norm.square() / flat.shape[1]

    @staticmethod
    def backward(ctx, grad, grad_square):
        streams, fn = ctx.saved_tensors
        flat = streams.flatten(1)
        along = (2 / flat.shape[1] * grad_square).to(flat.dtype)
        onto = torch.addcmul(grad @ fn, along[:, None], flat)
        return onto.view_as(streams), (grad.T @ flat).float()


def read(streams: Tensor, weights: Tensor) -> Tensor:
    """A block's input [T, D]: the streams [T, R, D], each times its weight, float32 [T, R]."""
    if not device.runs_kernels(streams):
        return (weights[..., None] * streams).sum(1).to(streams.dtype)
    return _Read.apply(streams.contiguous(), weights.contiguous())


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx, streams, weights):
        ctx.save_for_backward(streams, weights)
        tokens, count, size = streams.shape
        x = streams.new_empty(tokens, size)
        pointwise.read_forward[(cdiv(tokens, STREAM_ROWS),)](
            streams, weights, x, tokens, R=count, D=size, ROWS=STREAM_ROWS, COLUMNS=STREAM_COLUMNS
        )
        return x

    @staticmethod
    def backward(ctx, grad):
        streams, weights = ctx.saved_tensors
        tokens, count, size = streams.shape
        onto, of_weights = torch.empty_like(streams), torch.empty_like(weights)
        pointwise.read_backward[(cdiv(tokens, STREAM_ROWS),)](
            streams, weights, grad.contiguous(), onto, of_weights, tokens, R=count, D=size,
            ROWS=STREAM_ROWS, COLUMNS=STREAM_COLUMNS,
        )  # fmt: skip
        return onto, of_weights


def leave(streams: Tensor, out: Tensor, write: Tensor, mix: Tensor) -> Tensor:
    """Streams mixed (``mix`` float32 [T, R, R], from j to k) and a block's output [T, D] written
    into them.
    """
    if not device.runs_kernels(streams):
        mixed = (mix[..., None] * streams[:, :, None]).sum(1)
        return (mixed + write[..., None] * out[:, None]).to(streams.dtype)
    return _Leave.apply(*(part.contiguous() for part in (streams, out, write, mix)))


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, streams, out, write, mix):
        ctx.save_for_backward(streams, out, write, mix)
        tokens, count, size = streams.shape
        left = torch.empty_like(streams)
        pointwise.leave_forward[(cdiv(tokens, STREAM_ROWS),)](
            streams, out, write, mix, left, tokens, R=count, D=size, ROWS=STREAM_ROWS,
            COLUMNS=STREAM_COLUMNS,
        )  # fmt: skip
        return left

    @staticmethod
    def backward(ctx, grad):
        saved = ctx.saved_tensors
        tokens, count, size = saved[0].shape
        grads = [torch.empty_like(part) for part in saved]
        pointwise.leave_backward[(cdiv(tokens, STREAM_ROWS),)](
            *saved, grad.contiguous(), *grads, tokens, R=count, D=size, ROWS=STREAM_ROWS,
            COLUMNS=STREAM_COLUMNS,
        )  # fmt: skip
        return tuple(grads)


def norm_rotate(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    turns: tuple[Tensor, Tensor] | None = None,
    back: bool = False,
) -> Tensor:
    """RMS norm over the last dim of x [T, N] or [T, H, N] (unless ``eps`` is None), then RoPE
    (unless ``turns`` is None).

    ``turns`` are cosines and sines, float32 [T, pairs]; the trailing pairs are turned, ``back`` the
    other way.
    """
    if device.runs_kernels(x):
        cos, sin = turns or (None, None)
        return _NormRotate.apply(x.contiguous(), weight, cos, sin, eps, back)
    if eps is not None:
        value = rms_normalise(x.float(), eps)
        x = (value if weight is None else value * weight).to(x.dtype)
    if turns is None:
        return x
    cos, sin = (part if x.dim() == 2 else part[:, None] for part in turns)
    dims, sin = 2 * cos.shape[-1], -sin if back else sin
    even, odd = x[..., -dims::2].float(), x[..., 1 - dims :: 2].float()
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((x[..., :-dims], turned.to(x.dtype)), dim=-1)


class _NormRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, cos, sin, eps, back):
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.eps, ctx.turn = eps, -1.0 if back else 1.0
        sizes, y = _norm_sizes(x, weight, cos, eps), torch.empty_like(x)
        rows = x.numel() // x.shape[-1]
        pointwise.norm_rotate_forward[(cdiv(rows, sizes["ROWS"]),)](
            x, *(x if part is None else part for part in (weight, cos, sin)), y, rows, eps or 0.0,
            ctx.turn, **sizes,
        )  # fmt: skip
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, cos, sin = ctx.saved_tensors
        sizes, onto = _norm_sizes(x, weight, cos, ctx.eps), torch.empty_like(x)
        rows = x.numel() // x.shape[-1]
        blocks = cdiv(rows, sizes["ROWS"])
        turns = cdiv(blocks, NORM_PROGRAMS)
        programs = cdiv(blocks, turns)
        of_weight = torch.empty(programs, x.shape[-1], dtype=torch.float32, device=x.device)
        pointwise.norm_rotate_backward[(programs,)](
            x, *(x if part is None else part for part in (weight, cos, sin)), grad.contiguous(),
            onto, of_weight, rows, ctx.eps or 0.0, ctx.turn, turns, **sizes,
        )  # fmt: skip
        return onto, None if weight is None else of_weight.sum(0), None, None, None, None


def _norm_sizes(x: Tensor, weight: Tensor | None, cos: Tensor | None, eps: float | None) -> dict:
    width = x.shape[-1]
    padded = next_power_of_2(width)
    return {
        "HEADS": x.shape[1] if x.dim() == 3 else 1, "N": width, "N_PADDED": padded,
        "PAIRS": 0 if cos is None else cos.shape[1], "NORM": eps is not None,
        "WEIGHTED": weight is not None, "ROWS": max(1, NORM_VALUES // padded),
    }  # fmt: skip


def gated(gate_up: Tensor, share: Tensor, limit: float) -> Tensor:
    """Each expert's inner values times its share: gate_up [T, X, 2 * N], share float32 [T, X] ->
    [T, X, N].
    """
    if not device.runs_kernels(gate_up):
        gate, up = gate_up.chunk(2, -1)
        return clamped_swiglu(gate, up, limit) * share[..., None].to(gate_up.dtype)
    return _Gated.apply(gate_up.contiguous(), share.contiguous(), limit)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, share, limit):
        ctx.save_for_backward(gate_up, share)
        ctx.limit = limit
        (tokens, experts, double), sizes = gate_up.shape, _gate_sizes(gate_up)
        inner = gate_up.new_empty(tokens, experts, double // 2)
        pointwise.swiglu_forward[(cdiv(tokens, SWIGLU_ROWS), experts)](
            gate_up, share, inner, tokens, limit, **sizes
        )
        return inner

    @staticmethod
    def backward(ctx, grad):
        gate_up, share = ctx.saved_tensors
        onto, of_share = torch.empty_like(gate_up), torch.empty_like(share)
        tokens, experts, _ = gate_up.shape
        pointwise.swiglu_backward[(cdiv(tokens, SWIGLU_ROWS), experts)](
            gate_up, share, grad.contiguous(), onto, of_share, tokens, ctx.limit,
            **_gate_sizes(gate_up),
        )  # fmt: skip
        return onto, of_share, None


def _gate_sizes(gate_up: Tensor) -> dict:
    width = gate_up.shape[2] // 2
    return {
        "EXPERTS": gate_up.shape[1], "WIDTH": width, "PADDED": next_power_of_2(width),
        "ROWS": SWIGLU_ROWS,
    }  # fmt: skip
