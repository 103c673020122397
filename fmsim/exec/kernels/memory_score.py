"""The memory indexer's logits of every entry: `index_scores` over several layers, joined (arXiv
2606.09079, section 3).

One launch scores layer after layer: a program keeps its entries, and joins each layer's scores to
those that it wrote before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.index_score import (
    Scores,
    blocks_of,
    index_scores_reference,
    new_scores,
    score_run,
)
from fmsim.exec.kernels.lang import cdiv, next_power_of_2, runs_compiled, tl, triton
from fmsim.exec.kernels.layout import Layout, triton_kind
from fmsim.indexer import scorer


def memory_scores(
    queries: Tensor,
    weights: Tensor,
    pools: list[Tensor],
    layout: Layout,
    tables: list[Tensor],
    lengths: Tensor,
    how: str = "max",
    out: Scores | None = None,
) -> Scores:
    """``queries`` [L, B, H, D] and ``weights`` float32 [L, B, H], as `scorer.queries` makes them, a
    layer each; ``pools`` and ``tables``, L of each, and ``lengths`` as in `index_scores`.

    ``how``: an entry's logit is the layers' "max" or "mean".

    A key that is missing counts as -inf: in the maximum the other layers decide, in the mean it is
    missing.
    """
    run = memory_scores_triton if runs_compiled(queries) else memory_scores_reference
    return run(queries, weights, pools, layout, tables, lengths, how, out)


def memory_scores_reference(
    queries, weights, pools, layout, tables, lengths, how="max", out=None
) -> Scores:
    out = out or new_scores(
        queries.shape[1], tables[0].shape[1] * layout.per_page(pools[0]), queries.device
    )
    each = [
        index_scores_reference(*parts[:3], layout, parts[3], lengths)
        for parts in zip(queries, weights, pools, tables, strict=True)
    ]
    joined = scorer.combine(torch.stack([found.scores for found in each]), how)
    for b, length in enumerate(lengths.tolist()):
        out.scores[b, :length] = joined[b, :length]
        padded = torch.nn.functional.pad(
            joined[b, :length], (0, -length % tuning.MAXIMA_ENTRIES), value=float("-inf")
        )
        groups = padded.view(-1, tuning.MAXIMA_ENTRIES)
        out.maxima[b, : len(groups)] = groups.amax(1)
    return out


def memory_scores_triton(
    queries,
    weights,
    pools,
    layout,
    tables,
    lengths,
    how="max",
    out=None,
    tune: tuning.IndexScoresTuning | None = None,
) -> Scores:
    tune = tune or tuning.MEMORY_SCORES
    layers, batch, heads, width = queries.shape
    per_page = layout.per_page(pools[0])
    entries = tables[0].shape[1] * per_page
    out = out or new_scores(batch, entries, queries.device)
    block, in_page = blocks_of(per_page, tune)
    splits = max(1, min(cdiv(entries, block), tune.programs // batch))
    strides = {pool.stride(0) for pool in pools}, {table.stride(0) for table in tables}
    assert [len(found) for found in strides] == [1, 1], "layers' pages and tables lie alike"
    _memory_scores[(batch, splits)](
        queries,
        weights if how == "max" else weights / layers,
        tuple(pools),
        tuple(tables),
        lengths,
        out.scores,
        out.maxima,
        tables[0].stride(0),
        out.scores.stride(0),
        out.maxima.stride(0),
        LAYERS=layers,
        BATCH=batch,
        HEADS=heads,
        HEADS_PADDED=max(16, next_power_of_2(heads)),
        WIDTH=width,
        KIND=triton_kind(layout),
        PER_PAGE=per_page,
        PAGE_BYTES=pools[0].stride(0),
        BLOCK=block,
        IN_PAGE=in_page,
        GROUP=tuning.MAXIMA_ENTRIES,
        COMBINE="max" if how == "max" else "sum",
        STAGES=tune.stages,
        num_warps=tune.warps,
    )
    return out


@triton.jit
def _memory_scores(
    queries,
    weights,
    pools,
    tables,
    lengths,
    scores,
    maxima,
    table_stride,
    scores_stride,
    maxima_stride,
    LAYERS: tl.constexpr,
    BATCH: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    KIND: tl.constexpr,
    PER_PAGE: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
    IN_PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    COMBINE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: a run of blocks of one sequence's entries, layer after layer. Its own scores of
    the layers before it finds in the cache.
    """
    b = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + b)
    for layer in tl.static_range(LAYERS):
        score_run(
            queries + (layer * BATCH + b) * HEADS * WIDTH,
            weights + (layer * BATCH + b) * HEADS,
            pools[layer],
            tables[layer] + b * table_stride,
            length,
            scores + b * scores_stride,
            maxima + b * maxima_stride,
            HEADS,
            HEADS_PADDED,
            WIDTH,
            KIND,
            PER_PAGE,
            PAGE_BYTES,
            BLOCK,
            IN_PAGE,
            GROUP,
            COMBINE if layer > 0 else "",
            layer == LAYERS - 1,
            STAGES,
        )
        tl.debug_barrier()  # a thread may read what another wrote
