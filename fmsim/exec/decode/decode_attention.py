"""One layer's attention for one decode step, from kernels, over pages in any layout: the same
function as `model.Attention.decode`.

Static buffers and no host synchronisation, so a CUDA graph may hold a step. Batches of different
lengths decode side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fmsim.exec.decode.streams import SideStream, beside, wait_beside
from fmsim.exec.kernels.attention import flash_mla
from fmsim.exec.kernels.attention.rows import Rows, matrix_type
from fmsim.exec.kernels.attention.sparse_attention import Masses, sparse_attention
from fmsim.exec.kernels.lang import cdiv
from fmsim.exec.kernels.layout import Layout, write_entries
from fmsim.exec.kernels.norms.norm_rope import norm_rope
from fmsim.exec.kernels.norms.rms_norm import rms_norm
from fmsim.exec.kernels.norms.rounded_rows import Activations, Float8Rows, wide_rows
from fmsim.exec.kernels.pages.compress import Append, Pooling, append
from fmsim.exec.kernels.products.in_turns import HeadTurn
from fmsim.exec.kernels.selection.index_score import index_scores, index_weights, new_scores
from fmsim.exec.kernels.selection.top_k import top_k
from fmsim.exec.kv.home import PER_PAGE, Home
from fmsim.exec.model.attention import Attention
from fmsim.exec.model.cache import CompressorState, LayerCache
from fmsim.exec.model.compressor import Compressor
from fmsim.exec.model.kinds import CSA, HCA, SLIDING
from fmsim.exec.model.projections import Joined, takes_float8

Turn = tuple[Tensor, Tensor]  # cosine and sine of RoPE's angles, float32 [B, 1, pairs]


class Moment(NamedTuple):
    """What a step's positions mean to every layer of one kind: worked out once a step, by the first
    of them.

    ``positions`` int32 [B]; ``turn`` of RoPE there, and ``entry_turn`` at the first token of the
    entry that each is in; ``window_lengths`` and ``visible`` int32 [B], tokens in the window and
    entries closed; ``every`` int32 [B, K] the ids of the latter, then -1. None where the kind has
    no use for it.
    """

    positions: Tensor
    turn: Turn
    window_lengths: Tensor
    entry_turn: Turn | None = None
    visible: Tensor | None = None
    every: Tensor | None = None


def turn_at(positions: Tensor, inv_freq: Tensor) -> Turn:
    angles = positions[:, None, None].float() * inv_freq
    return angles.cos(), angles.sin()


class EntryPager(Protocol):
    """Where a CSA layer's entries and index keys lie, and which of them are attended to: what a
    policy decides.
    """

    wants_masses: bool
    loads: bool  # `bring` copies from the host in most steps: queries come beside that
    homes: Sequence[
        Home
    ]  # of entries: where they are attended to, then further copies that new ones are written to
    key_homes: Sequence[Home]

    def choose(self, queries: Tensor, weights: Tensor, visible: Tensor, top_k: int) -> None:
        """As `model.Pager.select`, but for what that brings and returns."""

    def bring(self) -> Tensor:
        """What was chosen is here for what comes after; its ids, as `model.Pager.select`."""

    def reports(
        self, q: Tensor, rows: Rows, masses: Masses | None, x: Tensor, attention: Attention
    ) -> None:
        """What came of it; masses where they are wanted."""


class AllEntries:
    """The `EntryPager` of a layer that keeps everything: the indexer's top-k of all entries."""

    wants_masses = loads = False

    def __init__(self, attention: Attention, batch: int, entries: int, latent: Layout, key: Layout):
        device = attention.kv_proj.weight.device
        self.homes, self.key_homes = (
            [Home.of_its_own(layout, batch, entries, device)] for layout in (latent, key)
        )
        self.key = key
        self.scores = new_scores(batch, self.key_homes[0].table.shape[1] * PER_PAGE, device)
        self.ids = self.masses = None  # of the last step

    def choose(self, queries: Tensor, weights: Tensor, visible: Tensor, top_k_: int) -> None:
        pool, table = self.key_homes[0]
        scores = index_scores(
            queries[:, 0], weights[:, 0].float(), pool, self.key, table, visible, self.scores
        )
        self.ids = top_k(scores.scores, visible, top_k_, scores.maxima)

    def bring(self) -> Tensor:
        return self.ids

    def reports(
        self, q: Tensor, rows: Rows, masses: Masses, x: Tensor, attention: Attention
    ) -> None:
        self.masses = masses


class _Appender:
    """One compressor of B sequences: the projections of its open windows, and where the entries go
    that they close.
    """

    def __init__(self, compressor: Compressor, layout: Layout, homes: Sequence[Home], batch: int):
        norm, series = compressor.kv_norm, 2 if compressor.overlapping else 1
        self.compressor, self.layout, self.homes = compressor, layout, homes
        self.pooling = Pooling(
            compressor.rate,
            series,
            compressor.position_bias.detach(),
            norm.weight.detach(),
            norm.eps,
        )
        self.ring = self.pooling.new_ring(batch, compressor.kv_proj.weight.dtype)

    def appends(self, kv: Tensor, gate: Tensor, now: Moment) -> list[Append]:
        """Of a token's projections [B, 1, series * width], one for each home."""
        return [
            Append(kv, gate, self.pooling, self.ring, now.entry_turn, pool, self.layout, table)
            for pool, table in self.homes
        ]

    def take(self, b: int, state: CompressorState) -> None:
        """Go on from the windows that a prefill left open, as sequence ``b``; its entries are not
        taken.
        """
        rate, width, span = self.pooling.rate, self.pooling.width, self.ring.kv.shape[1]
        if state.open_kv is not None:
            tokens = (
                state.closed * rate
                + torch.arange(state.open_kv.shape[1], device=self.ring.kv.device)
            ) % span
            self.ring.kv[b, tokens], self.ring.gate[b, tokens] = (
                state.open_kv[0],
                state.open_gate[0],
            )
        if state.prior_kv is not None:
            tokens = (
                (state.closed - 1) * rate + torch.arange(rate, device=self.ring.kv.device)
            ) % span
            self.ring.kv[b, tokens, :width] = state.prior_kv[0]
            gate = (
                state.prior_gate[0] - self.compressor.position_bias[:, :width]
            )  # the kernel adds it
            self.ring.gate[b, tokens, :width] = gate.to(self.ring.gate.dtype)


class DecodeAttention:
    """The weights of ``attention``, and what it keeps of B sequences of up to ``max_tokens``.

    ``latent`` and ``key``: layouts of entries and of index keys, e.g. LATENT and KEY. ``pager``
    says where a CSA layer's lie; everything is kept by default. ``first``: the model's first layer
    of this kind, where this is a later one; in each step that one is called before. What a step
    means to layers that it `leads`, the first of their kinds, is worked out behind this layer's
    attention, and beside what comes then.
    """

    def __init__(
        self,
        attention: Attention,
        batch: int,
        max_tokens: int,
        latent: Layout,
        key: Layout,
        pager: EntryPager | None = None,
        first: DecodeAttention | None = None,
    ):
        device, window = attention.kv_proj.weight.device, attention.window
        self.attention, self.latent, self.first = attention, latent, first or self
        self.leads: list[DecodeAttention] = []
        self.led = False
        self.window = latent.new_pool(batch, window, device)
        # A window is a ring: each sequence's one page of W tokens, whichever W tokens they are.
        page = torch.arange(batch, dtype=torch.int32, device=device)[:, None]
        self.window_table = page.expand(-1, cdiv(max_tokens, window)).contiguous()
        norm = attention.kv_norm
        self.as_it_is = Pooling(
            1,
            1,
            norm.weight.new_zeros(1, attention.size, dtype=torch.float32),
            norm.weight.detach(),
            norm.eps,
        )
        self.no_ring = self.as_it_is.new_ring(batch, torch.bfloat16)  # never read
        self.entries = self.keys = self.pager = self.hca = None
        of_input = [attention.q_a_proj, attention.kv_proj]
        if attention.kind != SLIDING:
            of_input += [attention.compressor.kv_proj, attention.compressor.gate_proj]
        if attention.kind == HCA:
            count = max_tokens // attention.compressor.rate
            self.hca = Home.of_its_own(latent, batch, count, device)
            self.entries = _Appender(attention.compressor, latent, [self.hca], batch)
            self.every_id = torch.arange(count, dtype=torch.int32, device=device)
        if attention.kind == CSA:
            self.pager = pager or AllEntries(
                attention, batch, max_tokens // attention.compressor.rate, latent, key
            )
            self.entries = _Appender(attention.compressor, latent, self.pager.homes, batch)
            indexer = attention.compressor.indexer
            self.keys = _Appender(indexer, key, self.pager.key_homes, batch)
            self.index_scale = (indexer.heads * indexer.width) ** -0.5
            of_input += [indexer.kv_proj, indexer.gate_proj, indexer.scorer.weights_proj]
            self.index_queries = Joined([indexer.q_b_proj])
        self.of_input, self.queries = Joined(of_input), Joined([attention.q_b_proj])
        self.query_type = self._query_type(batch)
        self.rounds_latent = takes_float8(batch, *attention.queries_of())
        self.rounds_out = takes_float8(batch, attention.o_a_proj, groups=attention.groups)

    def __call__(self, x: Activations, positions: Tensor) -> Tensor:
        """x [B, 1, D], the attention's input at ``positions`` int32 [B] -> output [B, 1, D]."""
        if self.led:
            wait_beside(positions.device, SideStream.APPEND)
        elif self.first is self:
            self.now = self.moment(positions)
        out = self.attend(x, self.first.now)
        if self.leads:
            with beside(positions.device, SideStream.APPEND):
                for other in self.leads:
                    other.now = other.moment(positions)
        return out

    def lead(self, others: Sequence[DecodeAttention]) -> None:
        """From now on this layer, a step's first, leads the first ``others`` of their kinds."""
        self.leads = list(others)
        for other in others:
            other.led = True

    @property
    def wants_masses(self) -> bool:
        return self.pager is not None and self.pager.wants_masses

    def _query_type(self, batch: int) -> torch.dtype:
        """What the kernel that will attend takes without converting."""
        pool, entries = self.window, 0
        if self.hca is not None:
            pool, entries = self.hca.pool, len(self.every_id)
        elif self.pager is not None:
            pool, entries = self.pager.homes[0].pool, self.attention.compressor.indexer.top_k
        count = self.latent.per_page(self.window) + entries
        served = flash_mla.serves(
            batch, self.attention.heads, self.latent, self.window, pool, count
        )
        return torch.bfloat16 if served and not self.wants_masses else matrix_type(self.latent)

    def moment(self, positions: Tensor) -> Moment:
        """Of ``positions`` int32 [B], for all layers of this kind."""
        attention = self.attention
        now = Moment(
            positions,
            turn_at(positions, attention.inv_freq),
            (positions + 1).clamp(max=attention.window),
        )
        if attention.kind == SLIDING:
            return now
        rate = attention.compressor.rate
        now = now._replace(
            entry_turn=turn_at(positions // rate * rate, attention.inv_freq),
            visible=(positions + 1) // rate,
        )
        return (
            now
            if attention.kind == CSA
            else now._replace(
                every=torch.where(self.every_id < now.visible[:, None], self.every_id, -1)
            )
        )

    def attend(self, x: Activations, now: Moment) -> Tensor:
        """x [B, 1, D], the attention's input -> output [B, 1, D]."""
        attention, turn = self.attention, tuple(part[:, 0] for part in now.turn)
        latent, kv, *compressed = self.of_input(x, due=attention.due)
        x, norm = wide_rows(x), attention.q_a_norm
        # one request's is over before its queries are
        within = len(x) == 1
        if not within:
            with beside(x.device, SideStream.APPEND):
                self._append(kv, compressed, now)
        if self.rounds_latent:
            latent, norm = rms_norm(latent, norm, rounded=True), None
        if attention.kind == CSA:
            # what is loaded from the host comes beside the queries; else its choice does
            loads = self.pager.loads
            if not loads:
                q = self._queries_beside(latent, norm, turn)
            indexer = attention.compressor.indexer
            of_index = HeadTurn(*turn, indexer.width)
            queries = self.index_queries.turned(latent, norm, of_index)
            weights = index_weights(compressed[-1], self.index_scale)
            if within:
                self._append(kv, compressed, now, alongside=True)
            else:
                wait_beside(x.device, SideStream.APPEND)
            self.pager.choose(queries[:, None], weights, now.visible, indexer.top_k)
            if loads:
                q = self._queries_beside(latent, norm, turn)
            ids = self.pager.bring()
            home = self.pager.homes[0]
            wait_beside(x.device, SideStream.QUERIES)
        else:
            [q] = self.queries(latent, norm)
            if within:
                self._append(kv, compressed, now, alongside=True)
            q = self._turned(q, turn)
            if not within:
                wait_beside(x.device, SideStream.APPEND)
        if attention.kind == HCA:
            ids, home = now.every, self.hca
        elif attention.kind == SLIDING:
            ids = now.positions.new_empty(len(now.positions), 0)
            home = Home(self.window, self.window_table)
        rows = Rows(self.latent, self.window, now.window_lengths, *home, ids)
        out, masses = sparse_attention(
            q,
            rows,
            attention.sinks,
            attention.scale,
            self.wants_masses,
            turn,
            x.dtype,
            self.rounds_out,
            known=within and attention.kind != CSA,
        )
        if self.pager is not None:
            self.pager.reports(q, rows, masses, x, attention)
        if isinstance(out, Float8Rows):
            out = out._replace(leading=x.shape[:2])
        else:
            out = out.flatten(1)[:, None]
        return attention.project_out(out)

    def _queries_beside(self, latent: Activations, norm: nn.Module | None, turn: Turn) -> Tensor:
        with beside(turn[0].device, SideStream.QUERIES):
            [q] = self.queries(latent, norm)
            return self._turned(q, turn)

    def _turned(self, q: Tensor, turn: Turn) -> Tensor:
        """A product's [B, 1, H * C], rotated, [B, H, C]."""
        attention = self.attention
        return norm_rope(
            q.view(-1, attention.heads, attention.size),
            turn,
            attention.eps,
            dtype=self.query_type,
        )

    def _append(
        self, kv: Tensor, compressed: Sequence[Tensor], now: Moment, alongside: bool = False
    ) -> None:
        """The token's own entry into the window, and what it closes: projections for entries, then
        in a CSA layer for index keys. ``alongside`` as in `append`.
        """
        window = (self.window, self.latent, self.window_table)
        appends = [Append(kv, kv, self.as_it_is, self.no_ring, now.turn, *window)]
        if self.entries is not None:
            appends += self.entries.appends(*compressed[:2], now)
        if self.keys is not None:
            appends += self.keys.appends(*compressed[2:4], now)
        append(appends, now.positions, alongside)

    def take(self, b: int, cache: LayerCache, tokens: int) -> None:
        """Go on from what a prefill of ``tokens`` tokens left, as sequence ``b``.

        A CSA layer's entries are its pager's to take.
        """
        known, width = cache.window.shape[1], self.attention.window
        places = torch.arange(tokens - known, tokens, device=self.window.device) % width
        write_entries(self.window, self.latent, b * width + places, cache.window[0])
        if self.hca is not None:
            numbers = torch.arange(cache.kv.closed, device=self.window.device)
            write_entries(
                self.hca.pool,
                self.latent,
                int(self.hca.table[b, 0]) * PER_PAGE + numbers,
                cache.kv.entries[0, : cache.kv.closed],
            )
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
        return [
            tensor
            for appender in (self.entries, self.keys)
            if appender is not None
            for tensor in appender.ring
        ]
