"""Attention of all three kinds of layer: window, CSA and HCA.

Equation numbers are those of the DeepSeek-V4 paper. Two things differ from transformers, and only
in how they compute: the window is attended in blocks of its own length, and a CSA layer gathers its
top-k entries. So memory grows with the length of a chunk times the history, never with the square
of the length.

Shapes: B sequences, S tokens of a call, D hidden size, H heads, C head size, E closed entries of a
compressed layer, K selected entries, W window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV4Config

from fmsim.exec.kernels.norms.norm_rope import norm_rope
from fmsim.exec.kernels.norms.rounded_rows import Activations, wide_rows
from fmsim.exec.kernels.products.mixing import Due
from fmsim.exec.model.cache import Access, LayerCache, StepLayer
from fmsim.exec.model.compressor import Compressor
from fmsim.exec.model.indexer import (
    Indexer,
    index_scores,
    index_scores_blocked,
    indexer_kl,
    top_entries,
)
from fmsim.exec.model.kinds import CSA, HCA, MASKED, SLIDING
from fmsim.exec.model.norm_rope import RMSNorm, inverse_frequencies, rms_normalise, rotate
from fmsim.exec.model.projections import Projection, grouped, linear, normed, takes_float8


class Attention(nn.Module):
    """Shared K=V attention over the window, the compressed entries and a sink per head; RoPE undone
    on the output.
    """

    def __init__(self, config: DeepseekV4Config, kind: str):
        super().__init__()
        heads, size, groups = config.num_attention_heads, config.head_dim, config.o_groups
        self.kind, self.heads, self.size, self.groups = kind, heads, size, groups
        self.window, self.eps, self.scale = config.sliding_window, config.rms_norm_eps, size**-0.5
        self.q_a_proj = linear(config.hidden_size, config.q_lora_rank)
        self.q_a_norm = RMSNorm(config.q_lora_rank, self.eps)
        self.q_b_proj = linear(config.q_lora_rank, heads * size)
        self.kv_proj = linear(config.hidden_size, size)
        self.kv_norm = RMSNorm(size, self.eps)
        self.o_a_proj = linear(heads * size // groups, groups * config.o_lora_rank)
        self.o_b_proj = linear(groups * config.o_lora_rank, config.hidden_size)
        self.due = Due()
        self.sinks = nn.Parameter(torch.zeros(heads))
        if kind != SLIDING:
            self.compressor = Compressor(config, kind, size, overlapping=kind == CSA)
        if kind == CSA:
            self.compressor.indexer = Indexer(config)
        self.rope_kind = "main" if kind == SLIDING else "compress"
        self.register_buffer(
            "inv_freq", inverse_frequencies(config, self.rope_kind), persistent=False
        )

    def forward(
        self, x: Activations, positions: Tensor, cache: LayerCache | None
    ) -> tuple[Tensor, Access | None]:
        """Inference: x [B, S, D] at contiguous ``positions`` [B, S] -> output [B, S, D], and a CSA
        layer's accesses.
        """
        angles = positions[..., None].float() * self.inv_freq
        q, q_latent, kv = self._project(x, angles)
        x = wide_rows(x)
        local, prefix = self._local_keys(kv, cache)
        window = self._window_logits(q, local, prefix)
        if self.kind == SLIDING:
            out, _ = self._attend(q, window, local, None, None)
            return self._output(out, angles), None
        state = cache.kv if cache is not None else None
        entries = self.compressor.compress(x, positions, self.inv_freq, state)
        visible = (positions + 1) // self.compressor.rate
        if self.kind == HCA:
            logits = self._entry_logits(q, entries, visible)
            out, _ = self._attend(q, window, local, logits, entries)
            return self._output(out, angles), None
        ids = top_entries(
            self._scores(x, q_latent, positions, angles, visible, cache),
            self.compressor.indexer.top_k,
        )
        # [B, S, K, C]
        chosen = torch.stack(
            [F.embedding(rows, table) for rows, table in zip(ids.clamp(min=0), entries)]
        )
        out, masses = self._attend(q, window, local, self._chosen_logits(q, chosen, ids), chosen)
        return self._output(out, angles), Access(ids, *masses, hidden=x)

    def decode(self, x: Activations, positions: Tensor, state: StepLayer) -> Tensor:
        """One token of each sequence: x [B, 1, D] at ``positions`` int [B], each its own -> output
        [B, 1, D].
        """
        angles = positions[:, None, None].float() * self.inv_freq
        q, q_latent, kv = self._project(x, angles)
        x = wide_rows(x)
        rows, local = torch.arange(len(x), device=x.device), state.window[:, None]
        state.window[rows, positions % self.window] = kv[:, 0]
        unseen = torch.arange(self.window, device=x.device) > positions[:, None]  # [B, W]
        window = torch.einsum("bshc,bwc->bshw", q, state.window).float() * self.scale
        window = window.masked_fill(unseen[:, None, None], MASKED)
        if self.kind == SLIDING:
            return self._output(self._attend(q, window, local, None, None)[0], angles)
        rate, visible = self.compressor.rate, (positions + 1) // self.compressor.rate
        closed = torch.where((positions + 1) % rate == 0, positions // rate, -1)
        entry = self.compressor.close(x, positions, self.inv_freq, state.kv)
        if self.kind == HCA:
            state.entries[rows, closed] = entry
            logits = self._entry_logits(q, state.entries, visible[:, None])
            return self._output(self._attend(q, window, local, logits, state.entries)[0], angles)
        indexer, pager = self.compressor.indexer, state.pager
        pager.append(entry, indexer.close(x, positions, self.inv_freq, state.index), closed)
        ids = pager.select(*indexer.queries(x, q_latent, angles), visible, indexer.top_k)
        chosen = pager.read(ids)[:, None]
        out, masses = self._attend(
            q, window, local, self._chosen_logits(q, chosen, ids[:, None]), chosen
        )
        masses_of = lambda other, entries: self._masses(
            window, self._chosen_logits(q, entries[:, None], other[:, None])
        )
        pager.attended(Access(ids[:, None], *masses, hidden=x), masses_of)
        return self._output(out, angles)

    def train_forward(
        self, x: Tensor, positions: Tensor, sparse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The same function over whole sequences, differentiable; -> output, and a CSA layer's
        indexer loss.

        All entries are scored densely; with ``sparse`` those outside the indexer's top-k are
        masked, which is what inference does by gathering. The loss is the KL of the indexer's
        softmax to the attention over *all* visible entries summed over heads, so the indexer also
        learns of entries it missed.
        """
        angles = positions[..., None].float() * self.inv_freq
        q, q_latent, kv = self._project(x, angles)
        local, prefix = self._local_keys(kv, None)
        window = self._window_logits(q, local, prefix)
        if self.kind == SLIDING:
            return self._output(self._attend(q, window, local, None, None)[0], angles), None
        entries = self.compressor.compress(x, positions, self.inv_freq, None)
        order = torch.arange(x.shape[1], device=x.device)[None]
        visible = (order + 1) // self.compressor.rate
        logits = self._entry_logits(q, entries, visible)
        index_loss = None
        if self.kind == CSA:
            scores = self._train_scores(x, q_latent, positions, angles, visible)
            index_loss = indexer_kl(scores, logits.detach(), window.detach(), self.sinks.detach())
            if sparse and entries.shape[1] > self.compressor.indexer.top_k:
                kth = (
                    scores.detach()
                    .topk(self.compressor.indexer.top_k, sorted=True)
                    .values[..., -1:]
                )
                logits = logits.masked_fill((scores.detach() < kth)[:, :, None], MASKED)
        out, _ = self._attend(q, window, local, logits, entries)
        return self._output(out, angles), index_loss

    def takes_float8(self, rows: int) -> bool:
        """Whether its input may come rounded, so many rows of it."""
        return takes_float8(rows, self.q_a_proj, self.kv_proj)

    def queries_of(self) -> list[Projection]:
        """The projections of the queries' latent."""
        indexers = [self.compressor.indexer.q_b_proj] if self.kind == CSA else []
        return [self.q_b_proj, *indexers]

    def _project(self, x: Activations, angles: Tensor) -> tuple[Tensor, Activations, Tensor]:
        q_latent = normed(self.q_a_proj(x), self.q_a_norm, *self.queries_of())
        q = rms_normalise(self.q_b_proj(q_latent).unflatten(-1, (self.heads, self.size)), self.eps)
        kv = self.kv_norm(self.kv_proj(x))
        return rotate(q, angles[:, :, None]), q_latent, rotate(kv, angles)

    def _local_keys(self, kv: Tensor, cache: LayerCache | None) -> tuple[Tensor, int]:
        """Keys of each block of queries: [B, N, W + block, C], and how many of the first W
        exist.
        """
        batch, tokens, size = kv.shape
        before = kv.new_zeros(batch, self.window, size)
        known = 0
        if cache is not None and cache.window is not None:
            known = cache.window.shape[1]
            before = torch.cat((before[:, known:], cache.window), 1)
        extended = torch.cat((before, kv), 1)
        if cache is not None:
            cache.window = extended[:, -min(self.window, known + tokens) :]
        if tokens <= self.window:
            return extended[:, None], known
        extended = F.pad(extended, (0, 0, 0, -tokens % self.window)).unflatten(1, (-1, self.window))
        return torch.cat((extended[:, :-1], extended[:, 1:]), 2), known

    def _blocks(self, q: Tensor) -> Tensor:
        """[B, S, H, ...] -> [B, N, block * H, ...], padded with zeros to whole blocks."""
        tokens = q.shape[1]
        block = min(tokens, self.window)
        q = F.pad(q, (0, 0, 0, 0, 0, -tokens % block))
        return q.reshape(q.shape[0], -1, block * self.heads, q.shape[-1])

    def _window_logits(self, q: Tensor, local: Tensor, known: int) -> Tensor:
        """float32 [B, S, H, W + block], masked to the last W tokens including the query's own."""
        tokens = q.shape[1]
        block = local.shape[2] - self.window
        logits = (self._blocks(q) @ local.transpose(-1, -2)).unflatten(
            2, (block, self.heads)
        ).float() * self.scale
        device = q.device
        distance = (
            self.window
            + torch.arange(block, device=device)[:, None]
            - torch.arange(local.shape[2], device=device)
        )
        seen = (distance >= 0) & (distance < self.window)
        first = torch.arange(local.shape[1], device=device)[:, None, None] > 0
        exists = torch.arange(local.shape[2], device=device) >= self.window - known
        # mask [N, block, 1, W + block]
        logits = logits.masked_fill(~(seen & (first | exists))[:, :, None], MASKED)
        return logits.flatten(1, 2)[:, :tokens]

    def _entry_logits(self, q: Tensor, entries: Tensor, visible: Tensor) -> Tensor:
        """float32 [B, S, H, E] against all entries, masked to the first ``visible`` [B, S] of
        them.
        """
        logits = (q.flatten(1, 2) @ entries.transpose(1, 2)).unflatten(
            1, (-1, self.heads)
        ).float() * self.scale
        hidden = torch.arange(entries.shape[1], device=q.device) >= visible[..., None]
        return logits.masked_fill(hidden[:, :, None], MASKED)

    def _scores(self, x, q_latent, positions, angles, visible, cache: LayerCache | None) -> Tensor:
        """The indexer's scores of all entries [B, S, E], MASKED where they are not visible."""
        indexer = self.compressor.indexer
        keys = indexer.compress(
            x, positions, self.inv_freq, cache.index if cache is not None else None
        )
        scoring = index_scores if x.is_cuda else index_scores_blocked
        scores = scoring(*indexer.queries(x, q_latent, angles), keys)
        return scores.masked_fill_(
            torch.arange(keys.shape[1], device=x.device) >= visible[..., None], MASKED
        )

    def _chosen_logits(self, q: Tensor, chosen: Tensor, ids: Tensor) -> Tensor:
        """float32 [B, S, H, K] against each query's own entries [B, S, K, C]; masked where their id
        is -1.
        """
        logits = torch.einsum("bshc,bskc->bshk", q, chosen).float() * self.scale
        return logits.masked_fill(ids[:, :, None] < 0, MASKED)

    def _train_scores(self, x, q_latent, positions, angles, visible) -> Tensor:
        """The indexer's scores of all entries; it learns from its own loss alone, so its inputs are
        cut off.
        """
        indexer, x, q_latent = self.compressor.indexer, x.detach(), q_latent.detach()
        keys = indexer.compress(x, positions, self.inv_freq, None)
        scores = index_scores(*indexer.queries(x, q_latent, angles), keys).float()
        return scores.masked_fill(
            torch.arange(keys.shape[1], device=x.device) >= visible[..., None], MASKED
        )

    def _attend(self, q, window, local, logits, entries):
        """One softmax over window, entries and sink; -> [B, S, H, C] and (mass, window mass, sink
        mass).

        ``entries`` is [B, E, C], one set for all queries, or [B, S, K, C], each query's own.
        """
        tokens = q.shape[1]
        total = self._total(window, logits)
        near = (window - total[..., None]).exp()
        block = min(tokens, self.window)
        out = (
            (self._blocks(near.to(q.dtype)) @ local)
            .unflatten(2, (block, self.heads))
            .flatten(1, 2)[:, :tokens]
        )
        if logits is None:
            return out, None
        far = (logits - total[..., None]).exp()
        if entries.dim() == 4:
            out = out + torch.einsum("bshk,bskc->bshc", far.to(q.dtype), entries)
        else:
            out = out + (far.to(q.dtype).flatten(1, 2) @ entries).unflatten(1, (-1, self.heads))
        return out, self._shares(far, near, total)

    def _total(self, window: Tensor, logits: Tensor | None) -> Tensor:
        """The softmax's denominator as a logarithm, [B, S, H]."""
        total = torch.logaddexp(window.logsumexp(-1), self.sinks.float().expand(window.shape[:-1]))
        if logits is not None and logits.shape[-1]:
            total = torch.logaddexp(total, logits.logsumexp(-1))
        return total

    def _masses(self, window: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Softmax probabilities, mean over heads: of entries [B, S, K], the window [B, S] and the
        sink [B, S].
        """
        total = self._total(window, logits)
        return self._shares(
            (logits - total[..., None]).exp(), (window - total[..., None]).exp(), total
        )

    def _shares(self, far: Tensor, near: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return far.mean(2), near.sum(-1).mean(-1), (self.sinks.float() - total).exp().mean(-1)

    def _output(self, out: Tensor, angles: Tensor) -> Tensor:
        """Undo the values' RoPE at the query's position, then project."""
        leading = out.shape[:2]
        if takes_float8(leading.numel(), self.o_a_proj, groups=self.groups):
            turn = angles.cos().flatten(0, 1), angles.sin().flatten(0, 1)
            rows = norm_rope(out.flatten(0, 1), turn, inverse=True, rounded=True)
            return self.project_out(rows._replace(leading=leading))
        return self.project_out(rotate(out, angles[:, :, None], inverse=True).flatten(2))

    def project_out(self, out: Activations) -> Tensor:
        """The grouped low-rank projection, [B, S, H * C] -> [B, S, D]."""
        return self.o_b_proj(grouped(out, self.o_a_proj, self.groups))
