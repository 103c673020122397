"""Index scores of one decode token against every entry: ``score(e) = scale_e sum_h w_h relu(q_h .
key_e)`` (eqs. 15-16).

The 132-byte keys are read once, page by page through a block table, so pages may lie anywhere and
be missing. Beside the scores it gives the maximum of every 32 of them, with which `top_k` leaves
out most of the scores (see there).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.lang import (
    after_previous,
    cdiv,
    let_next_begin,
    next_power_of_2,
    overlapped,
    runs_compiled,
    tl,
    triton,
    wait_for_previous,
)
from fmsim.exec.kernels.layout import (
    Layout,
    alignment,
    load_keys,
    product_operand,
    read_entries,
    slots_of,
    triton_kind,
)
from fmsim.indexer import scorer

GROUP = tuning.MAXIMA_ENTRIES


class Scores(NamedTuple):
    """``scores`` float32 [B, N]; -inf where an entry's page is missing, and untouched from a
    sequence's length on.

    ``maxima`` float32 [B, ceil(N / 32)]: of each 32 scores, those beyond the length left out.
    """

    scores: Tensor
    maxima: Tensor


def new_scores(batch: int, entries: int, device: torch.device | str) -> Scores:
    """Buffers for up to ``entries`` entries, filled with -inf.

    Kernels write a sequence's first ``lengths[b]`` only.
    """

    def filled(width: int) -> Tensor:
        return torch.full((batch, width), float("-inf"), device=device)

    return Scores(filled(entries), filled(cdiv(entries, GROUP)))


def index_weights(projected: Tensor, scale: float) -> Tensor:
    """``projected`` [B, 1, H] of a token's input, times ``scale`` -> float32 [B, 1, H].

    Alongside the launch before it in its stream, which must have begun when ``projected`` was
    there.
    """
    run = index_weights_triton if runs_compiled(projected) else index_weights_reference
    return run(projected, scale)


def index_weights_reference(projected, scale) -> Tensor:
    return projected.float() * scale


def index_weights_triton(projected, scale) -> Tensor:
    batch, _, heads = projected.shape
    assert projected.stride(2) == 1, "a token's heads lie side by side"
    out = torch.empty(batch, 1, heads, dtype=torch.float32, device=projected.device)
    _index_weights[(batch,)](
        projected,
        out,
        scale,
        projected.stride(0),
        HEADS=heads,
        HEADS_PADDED=next_power_of_2(heads),
        num_warps=1,
        **overlapped(projected),
    )
    return out


def index_scores(
    queries: Tensor,
    weights: Tensor,
    pool: Tensor,
    layout: Layout,
    table: Tensor,
    lengths: Tensor,
    out: Scores | None = None,
) -> Scores:
    """Score the first ``lengths[b]`` entries of each sequence.

    ``queries`` [B, H, D] rotated: bfloat16 or float8_e4m3fn (its scales folded into the weights)
    for ``layout`` KEY, the keys' type for a plain one; ``weights`` float32 [B, H], scale factors
    folded in; ``pool`` uint8 [pages, page bytes]; ``table`` int32 [B, max pages] the page in the
    pool of each page of a sequence, or -1; ``lengths`` int32 [B], on the device. ``out`` are
    buffers of `new_scores`, to write into.
    """
    run = index_scores_triton if runs_compiled(queries) else index_scores_reference
    return run(queries, weights, pool, layout, table, lengths, out)


def index_scores_reference(queries, weights, pool, layout, table, lengths, out=None) -> Scores:
    entries = table.shape[1] * layout.per_page(pool)
    out = out or new_scores(len(queries), entries, queries.device)
    for b, length in enumerate(lengths.tolist()):
        ids = torch.arange(length, device=queries.device)
        slots = slots_of(table[b : b + 1], ids[None], layout.per_page(pool))[0]
        scores = scorer.logits(
            queries[b].float(), weights[b].float(), read_entries(pool, layout, slots)
        )
        out.scores[b, :length] = scores.masked_fill(slots < 0, float("-inf"))
        padded = torch.nn.functional.pad(
            out.scores[b, :length], (0, -length % GROUP), value=float("-inf")
        )
        out.maxima[b, : cdiv(length, GROUP)] = padded.view(-1, GROUP).amax(1)
    return out


def index_scores_triton(
    queries,
    weights,
    pool,
    layout,
    table,
    lengths,
    out=None,
    tune: tuning.IndexScoresTuning | None = None,
) -> Scores:
    tune = tune or tuning.index_scores(len(queries), queries.dtype)
    out = out or new_scores(len(queries), table.shape[1] * layout.per_page(pool), queries.device)
    score_layers(queries[None], weights[None], (pool,), layout, (table,), lengths, out, "", tune)
    return out


def score_layers(
    queries: Tensor,
    weights: Tensor,
    pools: tuple[Tensor, ...],
    layout: Layout,
    tables: tuple[Tensor, ...],
    lengths: Tensor,
    out: Scores,
    combine: str,
    tune: tuning.IndexScoresTuning,
    joins: bool = False,
) -> None:
    """One launch over a few layers, ``queries`` [L, B, H, D], whose scores ``combine`` "max" or
    "sum" makes one; it ``joins`` them to what ``out`` holds.
    """
    layers, batch, heads, width = queries.shape
    per_page = layout.per_page(pools[0])
    alike = {(pool.stride(0), table.stride(0)) for pool, table in zip(pools, tables, strict=True)}
    assert len(alike) == 1, "all layers' pages and tables lie alike"
    # of one page, where pages are no smaller than a group
    block = math.gcd(tune.block_entries, per_page)
    in_page = block >= GROUP
    block = block if in_page else tune.block_entries
    blocks = cdiv(tables[0].shape[1] * per_page, block)
    splits = max(1, min(blocks, tune.programs // batch))
    run = max(1, min(tune.run_blocks, blocks // (splits * tune.fewest_runs)))
    _index_scores[(batch, splits)](
        queries,
        weights,
        pools,
        tables,
        lengths,
        out.scores,
        out.maxima,
        queries.stride(0),
        weights.stride(0),
        tables[0].stride(0),
        tables[0].shape[1] * per_page,
        out.scores.stride(0),
        out.maxima.stride(0),
        LAYERS=layers,
        HEADS=heads,
        HEADS_PADDED=max(16, next_power_of_2(heads)),
        WIDTH=width,
        KIND=triton_kind(layout),
        PER_PAGE=per_page,
        PAGE_BYTES=pools[0].stride(0),
        ALIGN=alignment(*pools),
        BLOCK=block,
        IN_PAGE=in_page,
        GROUP=GROUP,
        COMBINE=combine,
        JOINS=joins,
        STAGES=tune.stages,
        RUN=1 << (run.bit_length() - 1),
        num_warps=tune.warps,
        **overlapped(queries),
    )


@triton.jit
def _index_weights(projected, out, scale, stride, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr):
    """One program: one sequence's. It reads beside the launch before it and writes behind it: the
    memory that it writes may have been that one's, whose temporaries are freed by now.
    """
    let_next_begin()
    b, head = tl.program_id(0).to(tl.int64), tl.arange(0, HEADS_PADDED)
    value = tl.load(projected + b * stride + head, mask=head < HEADS, other=0.0)
    wait_for_previous()
    tl.store(out + b * HEADS + head, value.to(tl.float32) * scale, mask=head < HEADS)


@triton.jit
def _dealt(turn, split, step, RUN: tl.constexpr):
    """The block of the ``turn`` of a program, ``split`` of ``step``."""
    return turn // RUN * (RUN * step) + split * RUN + turn % RUN


@triton.jit
def _pages(
    table, block, n_entries, BLOCK: tl.constexpr, IN_PAGE: tl.constexpr, PER_PAGE: tl.constexpr
):
    """The page of a block IN_PAGE, or of each of its entries [BLOCK]; -1 beyond the table's
    ``n_entries``, and where there is none. It waits for no length.
    """
    entry = block * BLOCK
    if not IN_PAGE:
        entry = entry + tl.arange(0, BLOCK)
    return tl.load(table + entry // PER_PAGE, mask=entry < n_entries, other=-1)


@triton.jit
def _index_scores(
    queries,
    weights,
    pools,
    tables,
    lengths,
    scores,
    maxima,
    queries_stride,
    weights_stride,
    table_stride,
    n_entries,
    scores_stride,
    maxima_stride,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    KIND: tl.constexpr,
    PER_PAGE: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    IN_PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    COMBINE: tl.constexpr,
    JOINS: tl.constexpr,
    STAGES: tl.constexpr,
    RUN: tl.constexpr,
):
    """One program: some blocks of one sequence's entries, each in all layers. Runs of RUN blocks
    are dealt out in turn.

    What it needs before its first keys is asked for at once: pages' numbers, and the queries of all
    layers. Pages' numbers are read a block ahead, so that the keys' loads wait for no other load
    and STAGES - 1 blocks of them are on the way. A block that lies IN_PAGE has one number, which
    leaves little arithmetic; it is read whole, beyond the length too. Pages' numbers of a run lie
    in one line, which but the first of them finds near.
    """
    after_previous()
    b, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    step, length = tl.num_programs(1), tl.load(lengths + b)
    head, lane, row = tl.arange(0, HEADS_PADDED), tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    scores, maxima = scores + b * scores_stride, maxima + b * maxima_stride
    exists = head < HEADS
    # of each layer
    next_pages, codes, factors = (), (), ()
    for layer in tl.static_range(LAYERS):
        table = tables[layer] + b * table_stride
        next_pages += (_pages(table, split * RUN, n_entries, BLOCK, IN_PAGE, PER_PAGE),)
        places = queries + layer * queries_stride + b * HEADS * WIDTH
        places += head[None, :] * WIDTH + lane[:, None]
        if queries.dtype.element_ty == tl.float8e4nv:
            places = places.to(tl.pointer_type(tl.uint8))
        codes += (tl.load(places, mask=exists[None, :], other=0),)  # [WIDTH, HEADS_PADDED]
        places = weights + layer * weights_stride + b * HEADS
        factors += (tl.load(places + tl.minimum(head, HEADS - 1)),)
    # only now: shared memory takes a layer's behind a barrier, and a load after it would wait there
    asked, scales = (), ()
    for layer in tl.static_range(LAYERS):
        if queries.dtype.element_ty == tl.float8e4nv:  # they meet float8 keys as they are
            asked += (codes[layer].to(tl.float8e4nv, bitcast=True),)
        else:
            asked += (product_operand(codes[layer]),)
        scales += (tl.where(exists, factors[layer].to(tl.float32), 0.0),)
    blocks = tl.cdiv(length, BLOCK)
    runs = tl.cdiv(blocks, RUN)
    turns = tl.cdiv(runs - split, step) * RUN
    # the last run may be a part of one
    turns -= tl.where((runs - 1) % step == split, runs * RUN - blocks, 0)
    for turn in tl.range(0, turns, num_stages=STAGES):
        block = _dealt(turn, split, step, RUN)
        entry = block * BLOCK + row
        inside = entry < length
        pages, next_pages = next_pages, ()
        following = _dealt(turn + 1, split, step, RUN)
        at = scores + entry
        score = tl.full([BLOCK], 0.0 if COMBINE == "sum" else float("-inf"), tl.float32)
        if JOINS:
            score = tl.load(at, mask=inside, other=float("-inf"))
        for layer in tl.static_range(LAYERS):
            page, table = pages[layer], tables[layer] + b * table_stride
            next_pages += (_pages(table, following, n_entries, BLOCK, IN_PAGE, PER_PAGE),)
            present = page >= 0
            if not IN_PAGE:
                present &= inside
            start = pools[layer] + tl.maximum(page, 0).to(tl.int64) * PAGE_BYTES
            if IN_PAGE:
                number, valid = block * BLOCK % PER_PAGE + row, tl.full([BLOCK], 1, tl.int1)
            else:
                number, valid = entry % PER_PAGE, present
            keys, scale = load_keys(start, number, valid, KIND, WIDTH, PER_PAGE, ALIGN)
            # [BLOCK, HEADS_PADDED]
            products = tl.dot(keys.to(asked[layer].dtype), asked[layer], input_precision="ieee")
            more = tl.sum(tl.maximum(products, 0.0) * scales[layer][None, :], 1) * scale
            more = tl.where(present, more, float("-inf"))
            score = score + more if COMBINE == "sum" else tl.maximum(score, more)
        score = tl.where(inside, score, float("-inf"))
        tl.store(at, score, mask=inside)
        group = block * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
        highest = tl.max(tl.reshape(score, [BLOCK // GROUP, GROUP]), 1)
        tl.store(maxima + group, highest, mask=group * GROUP < length)
