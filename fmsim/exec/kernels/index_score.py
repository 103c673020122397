"""Index scores of one decode token against every entry: ``score(e) = scale_e sum_h w_h relu(q_h . key_e)`` (eqs. 15-16).

The 132-byte keys are read once, page by page through a block table, so pages may lie anywhere and be missing. Beside the scores
it gives the maximum of every 32 of them, with which `top_k` leaves out most of the scores (see there).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.lang import cdiv, next_power_of_2, runs_compiled, tl, triton
from fmsim.exec.kernels.layout import Layout, load_keys, product_operand, read_entries, slots_of, triton_kind
from fmsim.indexer import scorer

GROUP = tuning.MAXIMA_ENTRIES


class Scores(NamedTuple):
    """``scores`` float32 [B, N]; -inf where an entry's page is missing, and untouched from a sequence's length on.
    ``maxima`` float32 [B, ceil(N / 32)]: of each 32 scores, those beyond the length left out."""

    scores: Tensor
    maxima: Tensor


def new_scores(batch: int, entries: int, device: torch.device | str) -> Scores:
    """Buffers for up to ``entries`` entries, filled with -inf. Kernels write a sequence's first ``lengths[b]`` only."""

    def filled(width: int) -> Tensor:
        return torch.full((batch, width), float("-inf"), device=device)

    return Scores(filled(entries), filled(cdiv(entries, GROUP)))


def index_scores(
    queries: Tensor, weights: Tensor, pool: Tensor, layout: Layout, table: Tensor, lengths: Tensor, out: Scores | None = None
) -> Scores:
    """Score the first ``lengths[b]`` entries of each sequence.

    ``queries`` [B, H, D] rotated: bfloat16 or float8_e4m3fn (its scales folded into the weights) for ``layout`` KEY, the
    keys' type for a plain one; ``weights`` float32 [B, H], scale factors folded in; ``pool`` uint8 [pages, page bytes];
    ``table`` int32 [B, max pages] the page in the pool of each page of a sequence, or -1; ``lengths`` int32 [B], on the
    device. ``out`` are buffers of `new_scores`, to write into.
    """
    run = index_scores_triton if runs_compiled(queries) else index_scores_reference
    return run(queries, weights, pool, layout, table, lengths, out)


def index_scores_reference(queries, weights, pool, layout, table, lengths, out=None) -> Scores:
    entries = table.shape[1] * layout.per_page(pool)
    out = out or new_scores(len(queries), entries, queries.device)
    for b, length in enumerate(lengths.tolist()):
        ids = torch.arange(length, device=queries.device)
        slots = slots_of(table[b : b + 1], ids[None], layout.per_page(pool))[0]
        scores = scorer.logits(queries[b].float(), weights[b].float(), read_entries(pool, layout, slots))
        out.scores[b, :length] = scores.masked_fill(slots < 0, float("-inf"))
        padded = torch.nn.functional.pad(out.scores[b, :length], (0, -length % GROUP), value=float("-inf"))
        out.maxima[b, : cdiv(length, GROUP)] = padded.view(-1, GROUP).amax(1)
    return out


def index_scores_triton(queries, weights, pool, layout, table, lengths, out=None, combine: str = "", tune=tuning.INDEX_SCORES) -> Scores:
    """``combine`` "max" or "sum" joins what ``out`` holds with the new scores: how several layers' scores become one."""
    batch, heads, width = queries.shape
    per_page = layout.per_page(pool)
    entries = table.shape[1] * per_page
    out = out or new_scores(batch, entries, queries.device)
    splits = max(1, min(cdiv(entries, tune.block_entries), tune.programs // batch))
    _index_scores[(batch, splits)](
        queries, weights, pool, table, lengths, out.scores, out.maxima,
        table.stride(0), out.scores.stride(0), out.maxima.stride(0),
        HEADS=heads, HEADS_PADDED=max(16, next_power_of_2(heads)), WIDTH=width,
        KIND=triton_kind(layout), PER_PAGE=per_page, PAGE_BYTES=pool.stride(0),
        BLOCK=tune.block_entries, GROUP=GROUP, SPLITS=splits, COMBINE=combine, STAGES=tune.stages, num_warps=tune.warps,
    )  # fmt: skip
    return out


@triton.jit
def _index_scores(
    queries, weights, pool, table, lengths, scores, maxima, table_stride, scores_stride, maxima_stride,
    HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, WIDTH: tl.constexpr,
    KIND: tl.constexpr, PER_PAGE: tl.constexpr, PAGE_BYTES: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr, COMBINE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: a run of blocks of one sequence's entries."""
    b, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lengths + b)
    blocks = tl.cdiv(length, BLOCK)
    share = tl.cdiv(blocks, SPLITS)
    head, lane = tl.arange(0, HEADS_PADDED), tl.arange(0, WIDTH)
    exists = head < HEADS
    places = queries + b * HEADS * WIDTH + head[None, :] * WIDTH + lane[:, None]
    query = tl.load(places, mask=exists[None, :], other=0.0)  # [WIDTH, HEADS_PADDED]
    if query.dtype != tl.float8e4nv:  # float8 queries meet float8 keys as they are
        query = product_operand(query)
    weight = tl.load(weights + b * HEADS + head, mask=exists, other=0.0).to(tl.float32)
    for block in tl.range(split * share, tl.minimum((split + 1) * share, blocks), num_stages=STAGES):
        entry = block * BLOCK + tl.arange(0, BLOCK)
        inside = entry < length
        page = tl.load(table + b * table_stride + entry // PER_PAGE, mask=inside, other=-1)
        present = page >= 0
        keys, scale = load_keys(pool, tl.where(present, page, 0), entry % PER_PAGE, present, KIND, WIDTH, PER_PAGE, PAGE_BYTES)
        products = tl.dot(keys.to(query.dtype), query, input_precision="ieee")  # [BLOCK, HEADS_PADDED]
        score = tl.sum(tl.maximum(products, 0.0) * weight[None, :], 1) * scale
        score = tl.where(present, score, float("-inf"))
        at = scores + b * scores_stride + entry
        if COMBINE == "max":
            score = tl.maximum(score, tl.load(at, mask=inside, other=float("-inf")))
        if COMBINE == "sum":
            score = tl.where(inside, score + tl.load(at, mask=inside, other=0.0), float("-inf"))
        tl.store(at, score, mask=inside)
        group = block * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
        highest = tl.max(tl.reshape(score, [BLOCK // GROUP, GROUP]), 1)
        tl.store(maxima + b * maxima_stride + group, highest, mask=group * GROUP < length)
