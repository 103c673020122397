"""One layer's attention for one decode step, from kernels, over pages in any layout: the same function as `model.Attention.decode`.

Static buffers and no host synchronisation, so a CUDA graph may hold a step. Batches of different lengths decode side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fmsim.exec.kernels.compress import Pooling, compress_and_append
from fmsim.exec.kernels.index_score import index_scores, new_scores
from fmsim.exec.kernels.lang import cdiv
from fmsim.exec.kernels.layout import Layout, write_entries
from fmsim.exec.kernels.sparse_attention import Masses, Rows, sparse_attention
from fmsim.exec.kernels.top_k import top_k
from fmsim.exec.model import CSA, HCA, SLIDING, Attention, Compressor, CompressorState, LayerCache, rms_normalise, rotate

PER_PAGE = 64


class Home(NamedTuple):
    """Where entries lie: ``pool`` uint8 [pages, page bytes], and ``table`` int32 [B, pages of a sequence], -1 = nowhere."""

    pool: Tensor
    table: Tensor

    @classmethod
    def of_its_own(cls, layout: Layout, batch: int, entries: int, device: torch.device) -> Home:
        """Room for ``entries`` entries of each sequence."""
        pages = cdiv(max(entries, 1), PER_PAGE)
        table = torch.arange(batch * pages, dtype=torch.int32, device=device).view(batch, pages)
        return cls(layout.new_pool(batch * pages, PER_PAGE, device), table)


class EntryPager(Protocol):
    """Where a CSA layer's entries and index keys lie, and which of them are attended to: what a policy decides."""

    wants_masses: bool
    homes: Sequence[Home]  # of entries: where they are attended to, then further copies that new ones are written to
    key_homes: Sequence[Home]

    def select(self, queries: Tensor, weights: Tensor, visible: Tensor, top_k: int) -> Tensor:
        """As `model.Pager.select`."""

    def reports(self, q: Tensor, rows: Rows, masses: Masses | None, x: Tensor, attention: Attention) -> None:
        """What came of it; masses where they are wanted."""


class AllEntries:
    """The `EntryPager` of a layer that keeps everything: the indexer's top-k of all entries."""

    wants_masses = False

    def __init__(self, attention: Attention, batch: int, entries: int, latent: Layout, key: Layout):
        device = attention.kv_proj.weight.device
        self.homes, self.key_homes = ([Home.of_its_own(layout, batch, entries, device)] for layout in (latent, key))
        self.key, self.scores = key, new_scores(batch, self.key_homes[0].table.shape[1] * PER_PAGE, device)
        self.ids = self.masses = None  # of the last step

    def select(self, queries: Tensor, weights: Tensor, visible: Tensor, top_k_: int) -> Tensor:
        pool, table = self.key_homes[0]
        scores = index_scores(queries[:, 0], weights[:, 0].float(), pool, self.key, table, visible, self.scores)
        self.ids = top_k(scores.scores, visible, top_k_, scores.maxima)
        return self.ids

    def reports(self, q: Tensor, rows: Rows, masses: Masses, x: Tensor, attention: Attention) -> None:
        self.masses = masses


class _Appender:
    """One compressor of B sequences: the projections of its open windows, and where the entries go that they close."""

    def __init__(self, compressor: Compressor, layout: Layout, homes: Sequence[Home], batch: int, dtype: torch.dtype):
        norm, series = compressor.kv_norm, 2 if compressor.overlapping else 1
        self.compressor, self.layout, self.homes = compressor, layout, homes
        self.pooling = Pooling(compressor.rate, series, compressor.position_bias.detach(), norm.weight.detach(), norm.eps)
        self.ring = self.pooling.new_ring(batch, dtype)

    def append(self, x: Tensor, positions: Tensor, inv_freq: Tensor) -> None:
        angles = (positions // self.pooling.rate * self.pooling.rate)[:, None, None].float() * inv_freq
        kv, gate, turn = self.compressor.kv_proj(x), self.compressor.gate_proj(x), (angles.cos(), angles.sin())
        for pool, table in self.homes:
            compress_and_append(kv, gate, positions, self.pooling, self.ring, turn, pool, self.layout, table)

    def take(self, b: int, state: CompressorState) -> None:
        """Go on from the windows that a prefill left open, as sequence ``b``; its entries are not taken."""
        rate, width, span = self.pooling.rate, self.pooling.width, self.ring.kv.shape[1]
        if state.open_kv is not None:
            tokens = (state.closed * rate + torch.arange(state.open_kv.shape[1], device=self.ring.kv.device)) % span
            self.ring.kv[b, tokens], self.ring.gate[b, tokens] = state.open_kv[0], state.open_gate[0]
        if state.prior_kv is not None:
            tokens = ((state.closed - 1) * rate + torch.arange(rate, device=self.ring.kv.device)) % span
            self.ring.kv[b, tokens, :width] = state.prior_kv[0]
            self.ring.gate[b, tokens, :width] = state.prior_gate[0] - self.compressor.position_bias[:, :width]  # the kernel adds it


class DecodeAttention:
    """The weights of ``attention``, and what it keeps of B sequences of up to ``max_tokens``.

    ``latent`` and ``key``: layouts of entries and of index keys, e.g. LATENT and KEY. ``pager`` says where a CSA layer's lie; everything is
    kept by default.
    """

    def __init__(self, attention: Attention, batch: int, max_tokens: int, latent: Layout, key: Layout, pager: EntryPager | None = None):
        weight, window = attention.kv_proj.weight, attention.window
        self.attention, self.latent = attention, latent
        self.window = latent.new_pool(batch, window, weight.device)
        # A window is a ring: each sequence's one page of W tokens, whichever W tokens they are.
        page = torch.arange(batch, dtype=torch.int32, device=weight.device)[:, None]
        self.window_table = page.expand(-1, cdiv(max_tokens, window)).contiguous()
        norm = attention.kv_norm
        self.as_it_is = Pooling(1, 1, weight.new_zeros(1, attention.size, dtype=torch.float32), norm.weight.detach(), norm.eps)
        self.no_ring = self.as_it_is.new_ring(batch, weight.dtype)
        self.entries = self.keys = self.pager = self.hca = None
        if attention.kind == HCA:
            count = max_tokens // attention.compressor.rate
            self.hca = Home.of_its_own(latent, batch, count, weight.device)
            self.entries = _Appender(attention.compressor, latent, [self.hca], batch, weight.dtype)
            self.every_id = torch.arange(count, dtype=torch.int32, device=weight.device)
        if attention.kind == CSA:
            self.pager = pager or AllEntries(attention, batch, max_tokens // attention.compressor.rate, latent, key)
            self.entries = _Appender(attention.compressor, latent, self.pager.homes, batch, weight.dtype)
            self.keys = _Appender(attention.compressor.indexer, key, self.pager.key_homes, batch, weight.dtype)

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [B, 1, D], the attention's input at ``positions`` int32 [B] -> output [B, 1, D]."""
        attention = self.attention
        angles = positions[:, None, None].float() * attention.inv_freq
        latent = attention.q_a_norm(attention.q_a_proj(x))
        q = rms_normalise(attention.q_b_proj(latent).unflatten(-1, (attention.heads, attention.size)), attention.eps)
        q = rotate(q, angles[:, :, None])[:, 0]
        kv = attention.kv_proj(x)
        turn = angles.cos(), angles.sin()
        compress_and_append(kv, kv, positions, self.as_it_is, self.no_ring, turn, self.window, self.latent, self.window_table)
        ids, home = self._select(x, latent, positions, angles)
        rows = Rows(self.latent, self.window, (positions + 1).clamp(max=attention.window), *home, ids)
        out, masses = sparse_attention(q, rows, attention.sinks, attention.scale, self.pager is not None and self.pager.wants_masses)
        if self.pager is not None:
            self.pager.reports(q, rows, masses, x, attention)
        return attention._output(out[:, None], angles)

    def _select(self, x: Tensor, latent: Tensor, positions: Tensor, angles: Tensor) -> tuple[Tensor, Home]:
        """Append what the token closes, then name the entries to attend to: none, all, or the pager's."""
        attention = self.attention
        if attention.kind == SLIDING:
            return positions.new_empty(len(x), 0), Home(self.window, self.window_table)
        self.entries.append(x, positions, attention.inv_freq)
        visible = (positions + 1) // attention.compressor.rate
        if attention.kind == HCA:
            return torch.where(self.every_id < visible[:, None], self.every_id, -1), self.hca
        self.keys.append(x, positions, attention.inv_freq)
        indexer = attention.compressor.indexer
        queries, weights = indexer.queries(x, latent, angles)
        return self.pager.select(queries, weights, visible, indexer.top_k), self.pager.homes[0]

    def take(self, b: int, cache: LayerCache, tokens: int) -> None:
        """Go on from what a prefill of ``tokens`` tokens left, as sequence ``b``. A CSA layer's entries are its pager's to take."""
        known, width = cache.window.shape[1], self.attention.window
        places = torch.arange(tokens - known, tokens, device=self.window.device) % width
        write_entries(self.window, self.latent, b * width + places, cache.window[0])
        if self.hca is not None:
            numbers = torch.arange(cache.kv.closed, device=self.window.device)
            write_entries(self.hca.pool, self.latent, int(self.hca.table[b, 0]) * PER_PAGE + numbers, cache.kv.entries[0, : cache.kv.closed])
        for appender, state in ((self.entries, cache.kv), (self.keys, cache.index)):
            if appender is not None:
                appender.take(b, state)

    @property
    def cache_bytes(self) -> int:
        """What its window and its HCA entries take."""
        return self.window.nbytes + (0 if self.hca is None else self.hca.pool.nbytes)

    @property
    def open_windows(self) -> list[Tensor]:
        """Projections of tokens that have not closed an entry yet."""
        return [tensor for appender in (self.entries, self.keys) if appender is not None for tensor in appender.ring]
