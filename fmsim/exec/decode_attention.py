"""One layer's attention for one decode step, from kernels, over pages in the deployed layouts: the same function as `model.Attention`.

Static buffers and no host synchronisation, so a CUDA graph may hold a step. Batches of different lengths decode side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmsim.exec.kernels.compress import Pooling, compress_and_append
from fmsim.exec.kernels.index_score import index_scores, new_scores
from fmsim.exec.kernels.lang import cdiv
from fmsim.exec.kernels.layout import Layout
from fmsim.exec.kernels.sparse_attention import Masses, Rows, sparse_attention
from fmsim.exec.kernels.top_k import top_k
from fmsim.exec.model import CSA, HCA, SLIDING, Attention, Compressor, rms_normalise, rotate

PER_PAGE = 64


class _Store:
    """Pages of one compressor's entries, for B sequences of up to ``entries``, each with pages of its own."""

    def __init__(self, compressor: Compressor, layout: Layout, batch: int, entries: int, dtype: torch.dtype):
        device = compressor.kv_norm.weight.device
        pages = cdiv(max(entries, 1), PER_PAGE)
        self.compressor, self.layout = compressor, layout
        self.pool = layout.new_pool(batch * pages, PER_PAGE, device)
        self.table = torch.arange(batch * pages, dtype=torch.int32, device=device).view(batch, pages)
        norm, series = compressor.kv_norm, 2 if compressor.overlapping else 1
        self.pooling = Pooling(compressor.rate, series, compressor.position_bias.detach(), norm.weight.detach(), norm.eps)
        self.ring = self.pooling.new_ring(batch, dtype)

    def append(self, x: Tensor, positions: Tensor, inv_freq: Tensor) -> None:
        angles = (positions // self.pooling.rate * self.pooling.rate)[:, None, None].float() * inv_freq
        kv, gate = self.compressor.kv_proj(x), self.compressor.gate_proj(x)
        compress_and_append(kv, gate, positions, self.pooling, self.ring, (angles.cos(), angles.sin()), self.pool, self.layout, self.table)


class DecodeAttention:
    """The weights of ``attention``, and what it keeps of B sequences of up to ``max_tokens``.

    ``latent`` and ``key``: layouts of entries and of index keys, e.g. LATENT and KEY.
    """

    def __init__(self, attention: Attention, batch: int, max_tokens: int, latent: Layout, key: Layout):
        weight, window = attention.kv_proj.weight, attention.window
        self.attention, self.latent = attention, latent
        self.window = latent.new_pool(batch, window, weight.device)
        # A window is a ring: each sequence's one page of W tokens, whichever W tokens they are.
        page = torch.arange(batch, dtype=torch.int32, device=weight.device)[:, None]
        self.window_table = page.expand(-1, cdiv(max_tokens, window)).contiguous()
        norm = attention.kv_norm
        self.as_it_is = Pooling(1, 1, weight.new_zeros(1, attention.size, dtype=torch.float32), norm.weight.detach(), norm.eps)
        self.no_ring = self.as_it_is.new_ring(batch, weight.dtype)
        self.entries = self.keys = None
        if attention.kind != SLIDING:
            count = max_tokens // attention.compressor.rate
            self.entries = _Store(attention.compressor, latent, batch, count, weight.dtype)
            self.every_id = torch.arange(count, dtype=torch.int32, device=weight.device)
        if attention.kind == CSA:
            self.keys = _Store(attention.compressor.indexer, key, batch, count, weight.dtype)
            self.scores = new_scores(batch, self.keys.table.shape[1] * PER_PAGE, weight.device)

    def step(self, x: Tensor, positions: Tensor, want_masses: bool = False) -> tuple[Tensor, Tensor, Masses | None]:
        """x [B, 1, D], the attention's input at ``positions`` int32 [B] -> output [B, 1, D], the ids of the entries attended
        to, int32 [B, K], and their masses where wanted."""
        attention = self.attention
        angles = positions[:, None, None].float() * attention.inv_freq
        latent = attention.q_a_norm(attention.q_a_proj(x))
        q = rms_normalise(attention.q_b_proj(latent).unflatten(-1, (attention.heads, attention.size)), attention.eps)
        q = rotate(q, angles[:, :, None])
        kv = attention.kv_proj(x)
        turn = angles.cos(), angles.sin()
        compress_and_append(kv, kv, positions, self.as_it_is, self.no_ring, turn, self.window, self.latent, self.window_table)
        ids = self._select(x, latent, positions, angles)
        pool, table = (self.window, self.window_table) if self.entries is None else (self.entries.pool, self.entries.table)
        rows = Rows(self.latent, self.window, (positions + 1).clamp(max=attention.window), pool, table, ids)
        out, masses = sparse_attention(q[:, 0], rows, attention.sinks, attention.scale, want_masses)
        return attention._output(out[:, None], angles), ids, masses

    def _select(self, x: Tensor, latent: Tensor, positions: Tensor, angles: Tensor) -> Tensor:
        """Append what the token closes, then name the entries to attend to: none, all, or the indexer's top-k."""
        attention = self.attention
        if attention.kind == SLIDING:
            return positions.new_empty(len(x), 0)
        self.entries.append(x, positions, attention.inv_freq)
        visible = (positions + 1) // attention.compressor.rate
        if attention.kind == HCA:
            return torch.where(self.every_id < visible[:, None], self.every_id, -1)
        self.keys.append(x, positions, attention.inv_freq)
        indexer = attention.compressor.indexer
        queries, weights = indexer.queries(x, latent, angles)
        scores = index_scores(queries[:, 0], weights[:, 0].float(), self.keys.pool, self.keys.layout, self.keys.table, visible, self.scores)
        return top_k(scores.scores, visible, indexer.top_k, scores.maxima)
