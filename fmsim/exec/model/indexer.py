"""The lightning indexer of CSA layers: which entries a token attends to, and what it learns from.

Shapes: B sequences, S tokens of a call, H attention heads, E closed entries, K selected ones, W
window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV4Config

from fmsim.exec.kernels.norms.rounded_rows import Activations
from fmsim.exec.model.compressor import Compressor
from fmsim.exec.model.kinds import CSA, MASKED
from fmsim.exec.model.norm_rope import rotate
from fmsim.exec.model.projections import linear

QUERY_BLOCK, KEY_BLOCK = 64, 1000  # of index scores on a CPU: 1 MiB at four heads


class Scorer(nn.Module):
    def __init__(self, config: DeepseekV4Config):
        super().__init__()
        self.weights_proj = linear(config.hidden_size, config.index_n_heads)


class Indexer(Compressor):
    """Lightning indexer (eqs. 13-17): its own small entries, scored by ``sum_h w_h relu(q_h .
    k)``.
    """

    def __init__(self, config: DeepseekV4Config):
        super().__init__(config, CSA, config.index_head_dim, overlapping=True)
        self.heads, self.top_k = config.index_n_heads, config.index_topk
        self.q_b_proj = linear(config.q_lora_rank, self.heads * self.width)
        self.scorer = Scorer(config)

    def queries(self, x: Tensor, q_latent: Activations, angles: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated queries [B, S, heads, width] and head weights [B, S, heads], both scale factors
        folded in.
        """
        queries = self.q_b_proj(q_latent).unflatten(-1, (self.heads, self.width))
        weights = self.scorer.weights_proj(x) * (self.heads * self.width) ** -0.5
        return rotate(queries, angles[:, :, None]), weights


def index_scores(queries: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """[B, S, heads, width] x [B, S, heads] x [B, E, width] -> [B, S, E]; head by head, to hold one
    score matrix.
    """
    keys = keys.transpose(1, 2)
    scores = weights[:, :, 0, None] * F.relu(queries[:, :, 0] @ keys)
    for head in range(1, queries.shape[2]):
        scores = scores + weights[:, :, head, None] * F.relu(queries[:, :, head] @ keys)
    return scores


def index_scores_blocked(queries: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """``index_scores`` for long histories on a CPU: in blocks that stay in its caches, four times
    as fast.
    """
    batch, tokens, heads, _width = queries.shape
    scores = queries.new_empty(batch, tokens, keys.shape[1])
    for b in range(batch):
        for rows in torch.arange(tokens).split(QUERY_BLOCK):
            query, weight = queries[b, rows].flatten(0, 1), weights[b, rows, :, None]
            for start in range(0, keys.shape[1], KEY_BLOCK):
                part = (query @ keys[b, start : start + KEY_BLOCK].T).unflatten(0, (-1, heads))
                torch.sum(
                    part.relu_().mul_(weight),
                    1,
                    out=scores[b, rows[0] : rows[-1] + 1, start : start + KEY_BLOCK],
                )
    return scores


def top_entries(scores: Tensor, top_k: int) -> Tensor:
    """The best entries of each row, ascending; of equal scores the lowest ids, as the kernels take
    them. -1 stands at the end where fewer than ``top_k`` are not MASKED. [B, S, E] -> int64 [B, S,
    K].
    """
    count = min(top_k, scores.shape[-1])
    if count == 0:
        return torch.zeros(*scores.shape[:-1], 0, dtype=torch.int64, device=scores.device)
    least = scores.topk(count, sorted=False).values.amin(-1, keepdim=True)
    above, equal = scores > least, scores == least
    missing = count - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1) <= missing))
    ids = chosen.nonzero()[:, -1].unflatten(0, (*scores.shape[:-1], count))
    return ids.masked_fill(scores.gather(-1, ids) < MASKED / 2, -1)


def indexer_kl(scores: Tensor, logits: Tensor, window: Tensor, sinks: Tensor) -> Tensor:
    """KL(attention over entries, summed over heads || softmax of index scores), a mean over
    queries.

    A query counts by the attention that it spends on entries at all: one that looks at its window
    only has nothing to teach. scores [B, S, E], logits [B, S, H, E], window [B, S, H, W], sinks
    [H].
    """
    with torch.no_grad():
        total = torch.logaddexp(window.logsumexp(-1), sinks.float().expand(window.shape[:-1]))
        total = torch.logaddexp(total, logits.logsumexp(-1))
        target = (logits - total[..., None]).exp().mean(2)
        mass = target.sum(-1)
        target = target / mass.clamp(min=1e-9)[..., None]
    divergence = torch.special.xlogy(target, target).sum(-1) - (
        target * scores.log_softmax(-1)
    ).sum(-1)
    return (divergence * mass).sum() / mass.sum().clamp(min=1e-9)
