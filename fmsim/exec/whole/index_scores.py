"""The lightning indexer's scores with gradients, and what they select, in blocks of queries.

On a GPU by kernels, elsewhere by plain torch. Shapes: B sequences, S queries, E entries, K chosen
entries of a query, N and W heads and width of the indexer. ``visible`` int32 [B, S] says how many
entries a query may see.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmsim.exec.kernels.lang import cdiv
from fmsim.exec.kernels.selection.top_k import top_k
from fmsim.exec.whole import device
from fmsim.exec.whole.kernels import index_scores as kernels

SCORE_ROWS, SCORE_COLUMNS = 64, 128
SCORES_AT_ONCE = 2**28  # of a selection: 1 GiB of float32
ROUND = 1024  # tokens of its blocks and entries of their scores: Triton compiles for few alignments


def index_scores(queries: Tensor, weights: Tensor, keys: Tensor, visible: Tensor) -> Tensor:
    """``sum_n w_n relu(q_n . k)`` with gradients: float32 [B, S, E], 0 where nothing is visible.

    queries [B, S, N, W], weights [B, S, N], keys [B, E, W], visible int32 [B, S].
    """
    with device.exactly(queries):
        return _Scores.apply(queries, weights, keys, visible)


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries, weights, keys, visible):
        parts = queries.contiguous(), weights.contiguous(), keys.contiguous(), visible.contiguous()
        ctx.save_for_backward(*parts)
        return _scores(*parts, keys.shape[1])

    @staticmethod
    def backward(ctx, grad):
        with device.exactly(grad):
            return _score_grads(*ctx.saved_tensors, grad.contiguous())


def _score_grads(queries, weights, keys, visible, grad):
    """Gradients of `_Scores`' inputs."""
    batch, tokens, heads, width = queries.shape
    entries = keys.shape[1]
    if not device.runs_kernels(queries):
        grad = grad.masked_fill(~_seen(visible, entries), 0.0)
        product = torch.einsum("bsnw,bew->bsne", queries.float(), keys.float())
        onto_weights = torch.einsum("bse,bsne->bsn", grad, product.clamp(min=0))
        change = grad[:, :, None] * weights.float()[..., None] * (product > 0)
        onto_queries = torch.einsum("bsne,bew->bsnw", change, keys.float())
        onto_keys = torch.einsum("bsne,bsnw->bew", change, queries.float())
    else:
        onto_queries = torch.empty_like(queries, dtype=torch.float32)
        onto_weights = torch.empty_like(weights, dtype=torch.float32)
        onto_keys = torch.zeros_like(keys, dtype=torch.float32)
        kernels.scores_backward[(cdiv(tokens, SCORE_ROWS), heads, batch)](
            queries, weights, keys, visible, grad, onto_queries, onto_weights, onto_keys,
            tokens, entries, HEADS=heads, WIDTH=width, ROWS=SCORE_ROWS, COLUMNS=SCORE_COLUMNS,
            num_warps=4,
        )  # fmt: skip
    return (
        onto_queries.to(queries.dtype), onto_weights.to(weights.dtype),
        onto_keys.to(keys.dtype), None,
    )  # fmt: skip


def _scores(queries, weights, keys, visible, wide: int) -> Tensor:
    """Scores of the first ``wide`` entries, some of which may not exist."""
    batch, tokens, heads, width = queries.shape
    if not device.runs_kernels(queries):
        keys = torch.nn.functional.pad(keys[:, :wide], (0, 0, 0, max(0, wide - keys.shape[1])))
        product = torch.einsum("bsnw,bew->bsne", queries.float(), keys.float())
        scores = torch.einsum("bsn,bsne->bse", weights.float(), product.clamp(min=0))
        return scores.masked_fill(~_seen(visible, wide), 0.0)
    scores = queries.new_empty(batch, tokens, wide, dtype=torch.float32)
    grid = cdiv(tokens, SCORE_ROWS), cdiv(wide, SCORE_COLUMNS), batch
    kernels.scores_forward[grid](
        queries, weights, keys, visible, scores, tokens, keys.shape[1], wide, HEADS=heads,
        WIDTH=width, ROWS=SCORE_ROWS, COLUMNS=SCORE_COLUMNS, num_warps=4,
    )  # fmt: skip
    return scores


def _seen(visible: Tensor, entries: int) -> Tensor:
    return torch.arange(entries, device=visible.device) < visible[..., None]


@torch.no_grad()
def select(queries: Tensor, weights: Tensor, keys: Tensor, visible: Tensor, count: int) -> Tensor:
    """The ``count`` entries of highest index score of each query: int32 [B, S, K], ascending, -1 at
    the end.

    ``visible`` must not fall from one query to the next: blocks of queries read only what their
    last one sees.
    """
    batch, tokens = queries.shape[:2]
    queries, weights, keys = queries.contiguous(), weights.contiguous(), keys.contiguous()
    ids = torch.empty(batch, tokens, count, dtype=torch.int32, device=queries.device)
    block = max(1, SCORES_AT_ONCE // (batch * keys.shape[1] * ROUND)) * ROUND
    for start in range(0, tokens, block):
        part = slice(start, min(tokens, start + block))
        wide = cdiv(cdiv(part.stop * keys.shape[1], tokens), ROUND) * ROUND
        seen = visible[:, part].contiguous()
        own = queries[:, part].contiguous(), weights[:, part].contiguous()
        with device.exactly(queries):
            scores = _scores(*own, keys, seen, wide)
        ids[:, part] = top_k(scores.flatten(0, 1), seen.flatten(), count).view(batch, -1, count)
    return ids
