"""Triton kernels of what works token by token: hyper-connections, norms with rotation, gated
experts.

Each reads its inputs once or from a near cache and writes its outputs once. Sums are float32,
whatever the tensors are. The functions that call them, with their gradients, are in
`fmsim.exec.whole.fused`.
"""

from __future__ import annotations

from fmsim.exec.kernels.lang import tl, triton


@triton.jit
def read_forward(
    streams, read, x, tokens, R: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS tokens; x = sum over streams of read * stream."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    known = token < tokens
    for first in range(0, D, COLUMNS):
        channel = first + tl.arange(0, COLUMNS)
        inside = known[:, None] & (channel < D)[None, :]
        summed = tl.zeros([ROWS, COLUMNS], tl.float32)
        for r in tl.static_range(R):
            part = tl.load(streams + (token[:, None] * R + r) * D + channel, mask=inside, other=0.0)
            weight = tl.load(read + token * R + r, mask=known, other=0.0)
            summed += part.to(tl.float32) * weight[:, None]
        tl.store(x + token[:, None] * D + channel, summed, mask=inside)


@triton.jit
def read_backward(
    streams, read, grad_x, grad_streams, grad_read, tokens, R: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS tokens."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    known = token < tokens
    for r in tl.static_range(R):
        weight = tl.load(read + token * R + r, mask=known, other=0.0)
        onto = tl.zeros([ROWS], tl.float32)
        for first in range(0, D, COLUMNS):
            channel = first + tl.arange(0, COLUMNS)
            inside = known[:, None] & (channel < D)[None, :]
            place = (token[:, None] * R + r) * D + channel
            grad = tl.load(grad_x + token[:, None] * D + channel, mask=inside, other=0.0)
            part = tl.load(streams + place, mask=inside, other=0.0)
            grad = grad.to(tl.float32)
            onto += tl.sum(grad * part.to(tl.float32), 1)
            tl.store(grad_streams + place, grad * weight[:, None], mask=inside)
        tl.store(grad_read + token * R + r, onto, mask=known)


@triton.jit
def leave_forward(
    streams, out, write, mix, left, tokens, R: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS tokens; stream k = write_k * out + sum over j of mix_jk * stream j."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    known = token < tokens
    for first in range(0, D, COLUMNS):
        channel = first + tl.arange(0, COLUMNS)
        inside = known[:, None] & (channel < D)[None, :]
        block = tl.load(out + token[:, None] * D + channel, mask=inside, other=0.0).to(tl.float32)
        for k in tl.static_range(R):
            weight = tl.load(write + token * R + k, mask=known, other=0.0)
            summed = block * weight[:, None]
            for j in tl.static_range(R):
                place = (token[:, None] * R + j) * D + channel
                part = tl.load(streams + place, mask=inside, other=0.0).to(tl.float32)
                weight = tl.load(mix + (token * R + j) * R + k, mask=known, other=0.0)
                summed += part * weight[:, None]
            tl.store(left + (token[:, None] * R + k) * D + channel, summed, mask=inside)


@triton.jit
def leave_backward(
    streams, out, write, mix, grad, grad_streams, grad_out, grad_write, grad_mix, tokens,
    R: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS tokens."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    known = token < tokens
    for first in range(0, D, COLUMNS):
        channel = first + tl.arange(0, COLUMNS)
        inside = known[:, None] & (channel < D)[None, :]
        onto = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in tl.static_range(R):
            place = (token[:, None] * R + k) * D + channel
            weight = tl.load(write + token * R + k, mask=known, other=0.0)
            onto += tl.load(grad + place, mask=inside, other=0.0).to(tl.float32) * weight[:, None]
        tl.store(grad_out + token[:, None] * D + channel, onto, mask=inside)
        for j in tl.static_range(R):
            onto = tl.zeros([ROWS, COLUMNS], tl.float32)
            for k in tl.static_range(R):
                place = (token[:, None] * R + k) * D + channel
                weight = tl.load(mix + (token * R + j) * R + k, mask=known, other=0.0)
                change = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
                onto += change * weight[:, None]
            tl.store(grad_streams + (token[:, None] * R + j) * D + channel, onto, mask=inside)
    for k in range(R):
        of_write = tl.zeros([ROWS], tl.float32)
        for first in range(0, D, COLUMNS):
            channel = first + tl.arange(0, COLUMNS)
            inside = known[:, None] & (channel < D)[None, :]
            place = (token[:, None] * R + k) * D + channel
            change = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
            block = tl.load(out + token[:, None] * D + channel, mask=inside, other=0.0)
            of_write += tl.sum(change * block.to(tl.float32), 1)
        tl.store(grad_write + token * R + k, of_write, mask=known)
        for j in range(R):
            of_mix = tl.zeros([ROWS], tl.float32)
            for first in range(0, D, COLUMNS):
                channel = first + tl.arange(0, COLUMNS)
                inside = known[:, None] & (channel < D)[None, :]
                place = (token[:, None] * R + k) * D + channel
                change = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
                place = (token[:, None] * R + j) * D + channel
                part = tl.load(streams + place, mask=inside, other=0.0)
                of_mix += tl.sum(change * part.to(tl.float32), 1)
            tl.store(grad_mix + (token * R + j) * R + k, of_mix, mask=known)


@triton.jit
def _turns(cos, sin, token, channel, inside, N: tl.constexpr, PAIRS: tl.constexpr):
    """Cosine and sine for each channel, with the sign that its half of a pair takes; 1 and 0 before
    the rotated ones.
    """
    start = N - 2 * PAIRS
    pair = tl.maximum(channel - start, 0) // 2
    turned = inside & (channel >= start)[None, :]
    place = token[:, None] * PAIRS + pair[None, :]
    along = tl.load(cos + place, mask=turned, other=1.0)
    across = tl.load(sin + place, mask=turned, other=0.0)
    return along, across * tl.where(channel % 2 == 0, -1.0, 1.0)[None, :]


@triton.jit
def norm_rotate_forward(
    x, weight, cos, sin, y, rows, eps, turn,
    HEADS: tl.constexpr, N: tl.constexpr, N_PADDED: tl.constexpr, PAIRS: tl.constexpr,
    NORM: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of N; RMS norm, then the trailing pairs turned (back, where ``turn``
    is -1).
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, N_PADDED)
    inside = (row < rows)[:, None] & (channel < N)[None, :]
    value = tl.load(x + row[:, None] * N + channel, mask=inside, other=0.0).to(tl.float32)
    scale = tl.full([ROWS], 1.0, tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(value * value, 1) / N + eps)
    value = value * scale[:, None]
    if WEIGHTED:
        value = value * tl.load(weight + channel, mask=channel < N, other=0.0)[None, :]
    if PAIRS > 0:
        other = channel ^ 1
        partner = tl.load(x + row[:, None] * N + other, mask=inside, other=0.0).to(tl.float32)
        partner = partner * scale[:, None]
        if WEIGHTED:
            partner = partner * tl.load(weight + other, mask=other < N, other=0.0)[None, :]
        along, across = _turns(cos, sin, row // HEADS, channel, inside, N, PAIRS)
        value = value * along + partner * across * turn
    tl.store(y + row[:, None] * N + channel, value, mask=inside)


@triton.jit
def norm_rotate_backward(
    x, weight, cos, sin, grad_y, grad_x, grad_weight, rows, eps, turn, turns,
    HEADS: tl.constexpr, N: tl.constexpr, N_PADDED: tl.constexpr, PAIRS: tl.constexpr,
    NORM: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ``turns`` blocks of ROWS rows, and its share of the weight's gradient."""
    channel = tl.arange(0, N_PADDED)
    of_weight = tl.zeros([N_PADDED], tl.float32)
    for number in range(turns):
        row = (tl.program_id(0).to(tl.int64) * turns + number) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (channel < N)[None, :]
        grad = tl.load(grad_y + row[:, None] * N + channel, mask=inside, other=0.0).to(tl.float32)
        if PAIRS > 0:
            partner = tl.load(grad_y + row[:, None] * N + (channel ^ 1), mask=inside, other=0.0)
            along, across = _turns(cos, sin, row // HEADS, channel, inside, N, PAIRS)
            grad = grad * along - partner.to(tl.float32) * across * turn
        if NORM:
            value = tl.load(x + row[:, None] * N + channel, mask=inside, other=0.0).to(tl.float32)
            scale = tl.rsqrt(tl.sum(value * value, 1) / N + eps)
            value = value * scale[:, None]
            if WEIGHTED:
                of_weight += tl.sum(grad * value, 0)
                grad = grad * tl.load(weight + channel, mask=channel < N, other=0.0)[None, :]
            along_value = tl.sum(grad * value, 1) / N
            grad = scale[:, None] * (grad - value * along_value[:, None])
        tl.store(grad_x + row[:, None] * N + channel, grad, mask=inside)
    if WEIGHTED:
        tl.store(grad_weight + tl.program_id(0) * N + channel, of_weight, mask=channel < N)


@triton.jit
def swiglu_forward(
    gate_up, share, inner, tokens, limit,
    EXPERTS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS tokens of one expert: silu(gate) * up * share, both clamped."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert, channel = tl.program_id(1), tl.arange(0, PADDED)
    inside = (token < tokens)[:, None] & (channel < WIDTH)[None, :]
    place = gate_up + (token[:, None] * EXPERTS + expert) * 2 * WIDTH + channel
    gate = tl.minimum(tl.load(place, mask=inside, other=0.0).to(tl.float32), limit)
    up = tl.load(place + WIDTH, mask=inside, other=0.0).to(tl.float32)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    weight = tl.load(share + token * EXPERTS + expert, mask=token < tokens, other=0.0)
    value = gate * tl.sigmoid(gate) * up * weight[:, None]
    tl.store(inner + (token[:, None] * EXPERTS + expert) * WIDTH + channel, value, mask=inside)


@triton.jit
def swiglu_backward(
    gate_up, share, grad_inner, grad_gate_up, grad_share, tokens, limit,
    EXPERTS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS tokens of one expert."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert, channel = tl.program_id(1), tl.arange(0, PADDED)
    inside = (token < tokens)[:, None] & (channel < WIDTH)[None, :]
    at = (token[:, None] * EXPERTS + expert) * 2 * WIDTH + channel
    gate = tl.load(gate_up + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + WIDTH, mask=inside, other=0.0).to(tl.float32)
    place = (token[:, None] * EXPERTS + expert) * WIDTH + channel
    grad = tl.load(grad_inner + place, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(share + token * EXPERTS + expert, mask=token < tokens, other=0.0)
    low, near = tl.minimum(gate, limit), tl.minimum(tl.maximum(up, -limit), limit)
    open_ = tl.sigmoid(low)
    onto = tl.sum(grad * low * open_ * near, 1)
    tl.store(grad_share + token * EXPERTS + expert, onto, mask=token < tokens)
    grad = grad * weight[:, None]
    of_gate = tl.where(gate <= limit, grad * near * open_ * (1 + low * (1 - open_)), 0.0)
    of_up = tl.where(tl.abs(up) <= limit, grad * low * open_, 0.0)
    tl.store(grad_gate_up + at, of_gate, mask=inside)
    tl.store(grad_gate_up + at + WIDTH, of_up, mask=inside)
