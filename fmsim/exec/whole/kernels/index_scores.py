"""The lightning indexer's scores, forward and backward: every head, every query, tile by tile."""

from __future__ import annotations

from fmsim.exec.kernels.lang import tl, triton


@triton.jit
def scores_forward(
    queries, weights, keys, visible, scores, tokens, entries, wide,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: index scores of COLUMNS of ``wide`` entries for ROWS queries; 0 where none is
    visible.
    """
    b, token = tl.program_id(2).to(tl.int64), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column, channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, WIDTH)
    known, inside = token < tokens, column < wide
    at = b * tokens + token
    end = tl.load(visible + at, mask=known, other=0)
    summed = tl.zeros([ROWS, COLUMNS], tl.float32)
    if tl.program_id(1) * COLUMNS < tl.max(end, 0):
        key = tl.load(
            keys + (b * entries + column[:, None]) * WIDTH + channel,
            mask=(column < entries)[:, None], other=0.0,
        )  # fmt: skip
        for head in range(HEADS):
            row = at * HEADS + head
            query = tl.load(
                queries + row[:, None] * WIDTH + channel, mask=known[:, None], other=0.0
            )
            weight = tl.load(weights + row, mask=known, other=0.0).to(tl.float32)
            product = tl.dot(query, tl.trans(key), input_precision="ieee")
            summed += weight[:, None] * tl.maximum(product, 0.0)
    summed = tl.where(column[None, :] < end[:, None], summed, 0.0)
    place = scores + at[:, None] * wide + column
    tl.store(place, summed, mask=known[:, None] & inside[None, :])


@triton.jit
def scores_backward(
    queries, weights, keys, visible, grad_scores, grad_queries, grad_weights, grad_keys,
    tokens, entries,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: one head of ROWS queries; adds to ``grad_keys`` (float32). Hidden scores have no
    gradient.
    """
    b, token = tl.program_id(2).to(tl.int64), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head, channel = tl.program_id(1), tl.arange(0, WIDTH)
    known = token < tokens
    at = b * tokens + token
    row = at * HEADS + head
    end = tl.load(visible + at, mask=known, other=0)
    query = tl.load(queries + row[:, None] * WIDTH + channel, mask=known[:, None], other=0.0)
    weight = tl.load(weights + row, mask=known, other=0.0).to(tl.float32)
    summed, onto_weight = tl.zeros([ROWS, WIDTH], tl.float32), tl.zeros([ROWS], tl.float32)
    for first in range(0, tl.max(end, 0), COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = column < entries
        place = (b * entries + column[:, None]) * WIDTH + channel
        key = tl.load(keys + place, mask=inside[:, None], other=0.0)
        seen = (column[None, :] < end[:, None]) & known[:, None]
        grad = tl.load(grad_scores + at[:, None] * entries + column, mask=seen, other=0.0)
        product = tl.dot(query, tl.trans(key), input_precision="ieee")
        onto_weight += tl.sum(grad * tl.maximum(product, 0.0), 1)
        change = tl.where(product > 0, grad * weight[:, None], 0.0).to(key.dtype)
        summed += tl.dot(change, key, input_precision="ieee")
        onto = tl.dot(tl.trans(change), query, input_precision="ieee")
        tl.atomic_add(grad_keys + place, onto, mask=inside[:, None], sem="relaxed")
    tl.store(grad_queries + row[:, None] * WIDTH + channel, summed, mask=known[:, None])
    tl.store(grad_weights + row, onto_weight, mask=known)
