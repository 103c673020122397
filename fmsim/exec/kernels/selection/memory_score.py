"""The memory indexer's logits of every entry: `index_scores` over several layers, joined (arXiv
2606.09079, section 3).

With float8 queries a launch scores a few layers: a program holds the queries of all, and reads an
entry's keys of all. With wider ones each layer is a launch, which joins its scores to those before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.lang import runs_compiled
from fmsim.exec.kernels.layout import Layout
from fmsim.exec.kernels.selection.index_score import (
    Scores,
    index_scores_reference,
    new_scores,
    score_layers,
)
from fmsim.indexer import scorer

FLOAT8_AT_ONCE = 3  # layers of a launch, as the published indexer has; wider queries fit for one


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
    layers = len(pools)
    out = out or new_scores(
        queries.shape[1], tables[0].shape[1] * layout.per_page(pools[0]), queries.device
    )
    if how == "mean":
        weights = weights / layers
    float8 = queries.dtype == torch.float8_e4m3fn
    tune = tune or (tuning.FLOAT8_MEMORY_SCORES if float8 else tuning.MEMORY_SCORES)
    at_once = FLOAT8_AT_ONCE if float8 else 1
    for first in range(0, layers, at_once):
        some = slice(first, first + at_once)
        score_layers(
            queries[some],
            weights[some],
            tuple(pools[some]),
            layout,
            tuple(tables[some]),
            lengths,
            out,
            "max" if how == "max" else "sum",
            tune,
            joins=first > 0,
        )
    return out
