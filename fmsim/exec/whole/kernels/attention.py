"""Attention over ranges of keys and over chosen ones, forward and backward.

The kernels see *rows*: row r of a sequence is head ``r % HEADS`` of query ``r // HEADS``. What a
query may see is the range of keys ``[visible - reach, visible)``, or all before ``visible`` where
``reach`` is 0. Keys are values too, as in DeepSeek-V4. No kernel holds more than a tile of logits.

A softmax over several sets of keys is made in turn: the first call begins with each head's sink,
and every later one goes on from the ``lse`` and ``out`` that the one before left. The backward
kernels need the final ``lse`` alone, and ``delta`` = sum(out * out's gradient) of each row.
"""

from __future__ import annotations

from fmsim.exec.kernels.lang import tl, triton


@triton.jit
def _gone_on(logit, key, top, total, summed):
    """A running softmax with a tile of keys more: the highest logit, the sum of exponentials beside
    it, and what they weigh, each of a row.
    """
    higher = tl.maximum(top, tl.max(logit, 1))
    weight, fade = tl.exp(logit - higher[:, None]), tl.exp(top - higher)
    summed = summed * fade[:, None]
    summed += tl.dot(weight.to(key.dtype), key, input_precision="ieee")
    return higher, total * fade + tl.sum(weight, 1), summed


@triton.jit
def _gradients(query, key, logit, seen, total, shared, grad, scale):
    """What a tile adds to its rows' gradient, and its keys' gradient; they are values too."""
    weight = tl.where(seen, tl.exp(logit - total[:, None]), 0.0)
    change = tl.dot(grad, tl.trans(key), input_precision="ieee")
    change = (weight * (change - shared[:, None]) * scale).to(key.dtype)
    onto = tl.dot(tl.trans(change), query, input_precision="ieee")
    onto += tl.dot(tl.trans(weight.to(key.dtype)), grad, input_precision="ieee")
    return tl.dot(change, key, input_precision="ieee"), onto


@triton.jit
def range_forward(
    q, keys, visible, sinks, out, lse, scale, tokens, entries,
    HEADS: tl.constexpr, SIZE: tl.constexpr, REACH: tl.constexpr, FIRST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of one sequence, over all keys that any of them sees."""
    b, row = tl.program_id(1).to(tl.int64), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    known, channel = row < tokens * HEADS, tl.arange(0, SIZE)
    at = b * tokens * HEADS + row
    query = tl.load(q + at[:, None] * SIZE + channel, mask=known[:, None], other=0.0)
    end = tl.load(visible + b * tokens + row // HEADS, mask=known, other=0)
    if FIRST:
        top = tl.load(sinks + row % HEADS).to(tl.float32)
        total = tl.full([ROWS], 1.0, tl.float32)
        summed = tl.zeros([ROWS, SIZE], tl.float32)
    else:
        top = tl.load(lse + at, mask=known, other=0.0)
        total = tl.full([ROWS], 1.0, tl.float32)
        summed = tl.load(out + at[:, None] * SIZE + channel, mask=known[:, None], other=0.0)
    begin = 0
    if REACH > 0:
        begin = tl.maximum(tl.min(tl.where(known, end, 1 << 30), 0) - REACH, 0)
    for first in range(begin, tl.max(end, 0), COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = column < entries
        key = tl.load(
            keys + (b * entries + column[:, None]) * SIZE + channel, mask=inside[:, None], other=0.0
        )
        logit = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        seen = column[None, :] < end[:, None]
        if REACH > 0:
            seen = seen & (column[None, :] >= end[:, None] - REACH)
        logit = tl.where(seen, logit, -1e30)
        top, total, summed = _gone_on(logit, key, top, total, summed)
    tl.store(out + at[:, None] * SIZE + channel, summed / total[:, None], mask=known[:, None])
    tl.store(lse + at, top + tl.log(total), mask=known)


@triton.jit
def range_backward(
    q, keys, visible, lse, delta, grad_out, grad_q, grad_keys, scale, tokens, entries,
    HEADS: tl.constexpr, SIZE: tl.constexpr, REACH: tl.constexpr, FIRST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows; ``grad_q`` is written or added to, ``grad_keys`` added to."""
    b, row = tl.program_id(1).to(tl.int64), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    known, channel = row < tokens * HEADS, tl.arange(0, SIZE)
    at = b * tokens * HEADS + row
    query = tl.load(q + at[:, None] * SIZE + channel, mask=known[:, None], other=0.0)
    grad = tl.load(grad_out + at[:, None] * SIZE + channel, mask=known[:, None], other=0.0)
    end = tl.load(visible + b * tokens + row // HEADS, mask=known, other=0)
    total = tl.load(lse + at, mask=known, other=0.0)
    shared = tl.load(delta + at, mask=known, other=0.0)
    if FIRST:
        summed = tl.zeros([ROWS, SIZE], tl.float32)
    else:
        summed = tl.load(grad_q + at[:, None] * SIZE + channel, mask=known[:, None], other=0.0)
    begin = 0
    if REACH > 0:
        begin = tl.maximum(tl.min(tl.where(known, end, 1 << 30), 0) - REACH, 0)
    for first in range(begin, tl.max(end, 0), COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = column < entries
        place = (b * entries + column[:, None]) * SIZE + channel
        key = tl.load(keys + place, mask=inside[:, None], other=0.0)
        logit = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        seen = (column[None, :] < end[:, None]) & known[:, None]
        if REACH > 0:
            seen = seen & (column[None, :] >= end[:, None] - REACH)
        of_query, onto = _gradients(query, key, logit, seen, total, shared, grad, scale)
        summed += of_query
        tl.atomic_add(grad_keys + place, onto, mask=inside[:, None], sem="relaxed")
    tl.store(grad_q + at[:, None] * SIZE + channel, summed, mask=known[:, None])


@triton.jit
def chosen_forward(
    q, keys, ids, out, lse, scale, tokens, entries,
    HEADS: tl.constexpr, SIZE: tl.constexpr, TOP_K: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: one query, over the entries ``ids`` [tokens, TOP_K] that are its own, -1 for
    none.
    """
    b, token = tl.program_id(1).to(tl.int64), tl.program_id(0)
    head, channel = tl.arange(0, ROWS), tl.arange(0, SIZE)
    known = head < HEADS
    at = (b * tokens + token) * HEADS + head
    query = tl.load(q + at[:, None] * SIZE + channel, mask=known[:, None], other=0.0)
    top = tl.load(lse + at, mask=known, other=0.0)
    total = tl.full([ROWS], 1.0, tl.float32)
    summed = tl.load(out + at[:, None] * SIZE + channel, mask=known[:, None], other=0.0)
    for first in range(0, TOP_K, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        entry = tl.load(ids + (b * tokens + token) * TOP_K + column, mask=column < TOP_K, other=-1)
        exists = entry >= 0
        key = tl.load(
            keys + (b * entries + entry[:, None]) * SIZE + channel, mask=exists[:, None], other=0.0
        )
        logit = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        logit = tl.where(exists[None, :], logit, -1e30)
        top, total, summed = _gone_on(logit, key, top, total, summed)
    tl.store(out + at[:, None] * SIZE + channel, summed / total[:, None], mask=known[:, None])
    tl.store(lse + at, top + tl.log(total), mask=known)


@triton.jit
def chosen_backward(
    q, keys, ids, lse, delta, grad_out, grad_q, grad_keys, scale, tokens, entries,
    HEADS: tl.constexpr, SIZE: tl.constexpr, TOP_K: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: one query; adds to ``grad_q`` and to ``grad_keys`` (both float32)."""
    b, token = tl.program_id(1).to(tl.int64), tl.program_id(0)
    head, channel = tl.arange(0, ROWS), tl.arange(0, SIZE)
    known = head < HEADS
    at = (b * tokens + token) * HEADS + head
    query = tl.load(q + at[:, None] * SIZE + channel, mask=known[:, None], other=0.0)
    grad = tl.load(grad_out + at[:, None] * SIZE + channel, mask=known[:, None], other=0.0)
    total = tl.load(lse + at, mask=known, other=0.0)
    shared = tl.load(delta + at, mask=known, other=0.0)
    summed = tl.load(grad_q + at[:, None] * SIZE + channel, mask=known[:, None], other=0.0)
    for first in range(0, TOP_K, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        entry = tl.load(ids + (b * tokens + token) * TOP_K + column, mask=column < TOP_K, other=-1)
        exists = entry >= 0
        place = (b * entries + entry[:, None]) * SIZE + channel
        key = tl.load(keys + place, mask=exists[:, None], other=0.0)
        logit = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        seen = exists[None, :] & known[:, None]
        of_query, onto = _gradients(query, key, logit, seen, total, shared, grad, scale)
        summed += of_query
        tl.atomic_add(grad_keys + place, onto, mask=exists[:, None], sem="relaxed")
    tl.store(grad_q + at[:, None] * SIZE + channel, summed, mask=known[:, None])


@triton.jit
def mean_weights(
    q, keys, visible, lse, out, scale, tokens, entries,
    HEADS: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: the softmax weights of COLUMNS entries for ROWS queries, a mean over heads."""
    b, token = tl.program_id(2).to(tl.int64), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column, channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, SIZE)
    known, inside = token < tokens, column < entries
    at = b * tokens + token
    end = tl.load(visible + at, mask=known, other=0)
    summed = tl.zeros([ROWS, COLUMNS], tl.float32)
    if tl.program_id(1) * COLUMNS < tl.max(end, 0):
        key = tl.load(
            keys + (b * entries + column[:, None]) * SIZE + channel, mask=inside[:, None], other=0.0
        )
        seen = column[None, :] < end[:, None]
        for head in range(HEADS):
            row = at * HEADS + head
            query = tl.load(q + row[:, None] * SIZE + channel, mask=known[:, None], other=0.0)
            logit = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
            total = tl.load(lse + row, mask=known, other=0.0)
            summed += tl.where(seen, tl.exp(logit - total[:, None]), 0.0)
    tl.store(
        out + at[:, None] * entries + column, summed / HEADS, mask=known[:, None] & inside[None, :]
    )
