"""DeepSeek-V4 in one file of plain torch: training, chunked prefill and decode.

On a GPU a decode step's hyper-connections and experts are kernels.

Structure and parameter names are those of transformers' ``DeepseekV4ForCausalLM``, which is the
oracle of the tests; equation numbers are those of the DeepSeek-V4 paper. Two things differ from the
oracle, and only in how they compute: the window is attended in blocks of its own length, and a CSA
layer gathers its top-k entries, so that memory grows with the length of a chunk times the history,
never with the square of the length.

Shapes: B sequences, S tokens of this call, D hidden size, R residual streams (``hc_mult``), H
heads, C head size, E closed entries of a compressed layer, K selected entries, W window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from transformers import DeepseekV4Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fmsim.exec.kernels.experts import clamped_swiglu, mixture_of_experts
from fmsim.exec.kernels.hyper_connection import Pending, enter, read_out
from fmsim.exec.kernels.router import route
from fmsim.exec.kernels.weights import dequantise
from fmsim.exec.model.projections import grouped

CSA, HCA, SLIDING = (
    "compressed_sparse_attention",
    "heavily_compressed_attention",
    "sliding_attention",
)
MASKED = -1e30  # finite, so that a row with nothing visible has a gradient of 0 and not of nan
QUERY_BLOCK, KEY_BLOCK = 64, 1000  # of index scores on a CPU: 1 MiB at four heads
FEW_EXPERTS = 8  # up to here, running every expert on every token beats sorting tokens by expert
GROUPED_MULTIPLE = 8  # bfloat16 rows of a grouped matrix product begin at multiples of 16 bytes


class Access(NamedTuple):
    """What one CSA layer attended to: the raw material of a trace.

    ``ids`` int64 [B, S, K] selected entries, ascending, -1 where fewer were visible; ``mass``
    float32 [B, S, K], ``window_mass`` and ``sink_mass`` float32 [B, S] are softmax probabilities,
    mean over heads, so the three sum to 1. ``hidden`` [B, S, D] is the layer's attention input.
    """

    ids: Tensor
    mass: Tensor
    window_mass: Tensor
    sink_mass: Tensor
    hidden: Tensor


class Aux(NamedTuple):
    """What training needs of one layer: the indexer's KL loss (CSA layers) and the experts' load
    (MoE layers).
    """

    index_loss: Tensor | None
    expert_load: Tensor | None  # float32 [experts], the share of routed slots


# ---------------------------------------------------------------------------------------- the cache


@dataclass
class CompressorState:
    """Closed entries of one compressor, and the projections of the tokens that have not closed one
    yet.
    """

    entries: Tensor  # [B, capacity, C], the first `closed` of which are valid
    closed: int = 0
    open_kv: Tensor | None = None  # [B, n < rate, width]
    open_gate: Tensor | None = None
    prior_kv: Tensor | None = (
        None  # the last closed window's Ca series, [B, rate, C] (overlapping series only)
    )
    prior_gate: Tensor | None = None


@dataclass
class LayerCache:
    window: Tensor | None = None  # rotated KV of the last W tokens, [B, W, C]
    kv: CompressorState | None = None
    index: CompressorState | None = None


@dataclass
class Cache:
    """State of B sequences of one common length, for up to ``max_tokens`` tokens."""

    layers: list[LayerCache]
    max_tokens: int
    length: int = 0

    @classmethod
    def allocate(
        cls, config: DeepseekV4Config, batch: int, max_tokens: int, device, dtype
    ) -> Cache:
        def state(kind: str, width: int) -> CompressorState:
            capacity = max_tokens // config.compress_rates[kind]
            return CompressorState(torch.zeros(batch, capacity, width, device=device, dtype=dtype))

        layers = []
        for kind in config.layer_types:
            layer = LayerCache()
            if kind != SLIDING:
                layer.kv = state(kind, config.head_dim)
            if kind == CSA:
                layer.index = state(kind, config.index_head_dim)
            layers.append(layer)
        return cls(layers, max_tokens)


@dataclass
class StepCompressor:
    """One compressor's open window as a decode step needs it: static, each of B sequences at a
    position of its own.
    """

    kv: Tensor  # [B, rate, width]: token p's projection at p % rate
    gate: Tensor  # the same, position bias added
    prior: (
        tuple[Tensor, Tensor] | None
    )  # kv and gate of the last closed window's Ca series, [B, rate, C]


class Pager(Protocol):
    """Where a CSA layer's entries and index keys lie during decode, and which of them are attended
    to.
    """

    def append(self, entry: Tensor, key: Tensor, index: Tensor) -> None:
        """Keep what just closed: entry [B, C], key [B, index width], index int [B] its number, -1
        where none closed.
        """

    def select(self, queries: Tensor, weights: Tensor, visible: Tensor, top_k: int) -> Tensor:
        """From the indexer's queries [B, 1, heads, width] and weights [B, 1, heads]: ids int32 [B,
        K] of the entries to attend to, -1 for none, out of the first ``visible`` [B].
        """

    def read(self, ids: Tensor) -> Tensor:
        """Entries [B, K, C]; whatever for an id of -1."""

    def attended(
        self, access: Access, masses_of: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    ) -> None:
        """What came of it.

        ``masses_of`` tells what other ids [B, K], with their entries [B, K, C], would have had.
        """


Attend = Callable[
    [Tensor, Tensor], Tensor
]  # a layer's attention over what it keeps: x [B, 1, D] at positions [B] -> output [B, 1, D]


@dataclass
class StepLayer:
    """What a layer keeps of B sequences of different lengths, for `Attention.decode`.

    Shapes never change.
    """

    window: Tensor  # rotated KV, [B, W, C]: token p at p % W
    kv: StepCompressor | None = None
    index: StepCompressor | None = None
    entries: Tensor | None = (
        None  # of an HCA layer, [B, capacity + 1, C]; the last is written where nothing closes
    )
    pager: Pager | None = None  # of a CSA layer


# -------------------------------------------------------------------------------------- small parts


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * rms_normalise(x.float(), self.eps)).to(x.dtype)


def rms_normalise(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps).to(x.dtype)


def inverse_frequencies(config: DeepseekV4Config, kind: str) -> Tensor:
    """Angles per position of each rotated pair, float32 [rope_dims / 2]; ``kind`` is "main" or
    "compress".
    """
    parameters = config.rope_parameters[kind]
    if parameters["rope_type"] != "default":
        return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", layer_type=kind)[0]
    dims = int(config.head_dim * parameters["partial_rotary_factor"])
    return parameters["rope_theta"] ** -(torch.arange(0, dims, 2, dtype=torch.float) / dims)


def rotate(x: Tensor, angles: Tensor, inverse: bool = False) -> Tensor:
    """RoPE on the trailing dims of x [..., C], pairs interleaved; ``angles`` float32 [...,
    rope_dims / 2].
    """
    dims = 2 * angles.shape[-1]
    cos, sin = angles.cos(), angles.sin()
    if inverse:
        sin = -sin
    even, odd = x[..., -dims::2].float(), x[..., 1 - dims :: 2].float()
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((x[..., :-dims], turned.to(x.dtype)), dim=-1)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


# -------------------------------------------------------------------------------------- compression


class Compressor(nn.Module):
    """Pools every ``rate`` tokens into one entry, softmax-gated per channel (eqs. 9-12 for CSA,
    20-23 for HCA).

    With ``overlapping`` series an entry pools its own window's Cb and the previous window's Ca: 2 x
    rate tokens.
    """

    def __init__(self, config: DeepseekV4Config, kind: str, width: int, overlapping: bool):
        super().__init__()
        series = 2 if overlapping else 1
        self.rate, self.width, self.overlapping = config.compress_rates[kind], width, overlapping
        self.kv_proj = linear(config.hidden_size, series * width)
        self.gate_proj = linear(config.hidden_size, series * width)
        self.position_bias = nn.Parameter(torch.zeros(self.rate, series * width))
        self.kv_norm = RMSNorm(width, config.rms_norm_eps)

    def compress(
        self, x: Tensor, positions: Tensor, inv_freq: Tensor, state: CompressorState | None
    ) -> Tensor:
        """Entries that x [B, S, D] closes, rotated at their first token: all of them [B, E, C]
        (with ``state``, those of earlier calls too).

        ``positions`` int64 [B, S] serves the call without state; with one, positions are contiguous
        from the start.
        """
        kv, gate = self.kv_proj(x), self.gate_proj(x)
        if state is not None and state.open_kv is not None:
            kv, gate = torch.cat((state.open_kv, kv), 1), torch.cat((state.open_gate, gate), 1)
        windows = kv.shape[1] // self.rate
        usable = windows * self.rate
        if state is not None:
            state.open_kv, state.open_gate = kv[:, usable:], gate[:, usable:]
        if windows == 0:
            return (
                kv.new_zeros(kv.shape[0], 0, self.width)
                if state is None
                else state.entries[:, : state.closed]
            )
        shape = (kv.shape[0], windows, self.rate, -1)
        kv, gate = (
            kv[:, :usable].reshape(shape),
            gate[:, :usable].reshape(shape) + self.position_bias,
        )
        entries = self._pool(
            kv,
            gate,
            None if state is None or state.prior_kv is None else (state.prior_kv, state.prior_gate),
        )
        if state is not None and self.overlapping:
            state.prior_kv, state.prior_gate = (part[:, -1, :, : self.width] for part in (kv, gate))
        if state is None:
            first = positions[:, : usable : self.rate]
        else:
            first = (state.closed + torch.arange(windows, device=x.device))[None] * self.rate
        entries = rotate(self.kv_norm(entries), first[..., None].float() * inv_freq)
        if state is None:
            return entries
        state.entries[:, state.closed : state.closed + windows] = entries
        state.closed += windows
        return state.entries[:, : state.closed]

    def close(
        self, x: Tensor, positions: Tensor, inv_freq: Tensor, state: StepCompressor
    ) -> Tensor:
        """Take in one token of each sequence, x [B, 1, D] at ``positions`` [B]; -> the entry that
        it closes, [B, C].

        Where the position is not the last of a window the entry is meaningless, and the caller
        drops it.
        """
        rows, place = torch.arange(len(x), device=x.device), positions % self.rate
        state.kv[rows, place] = self.kv_proj(x)[:, 0]
        state.gate[rows, place] = (self.gate_proj(x)[:, 0] + self.position_bias[place]).to(
            state.gate.dtype
        )
        entry = self._pool(state.kv[:, None], state.gate[:, None], state.prior)[:, 0]
        if self.overlapping:
            closes = (place == self.rate - 1)[:, None, None]
            for prior, part in zip(state.prior, (state.kv, state.gate)):
                prior.copy_(torch.where(closes, part[..., : self.width], prior))
        return rotate(self.kv_norm(entry), (positions - place)[:, None].float() * inv_freq)

    def _pool(self, kv: Tensor, gate: Tensor, prior: tuple[Tensor, Tensor] | None) -> Tensor:
        """Weighted mean over a window, kv and gate [B, N, rate, width or 2 x width] -> [B, N,
        width].

        ``prior`` is the Ca series of the window before the first, kv and gate [B, rate, width], if
        there was one.
        """
        if self.overlapping:
            kv_a, kv_b = kv.split(self.width, -1)
            gate_a, gate_b = gate.split(self.width, -1)
            before_kv, before_gate = prior or (
                torch.zeros_like(kv_a[:, 0]),
                torch.full_like(gate_a[:, 0], MASKED),
            )
            kv = torch.cat((torch.cat((before_kv[:, None], kv_a[:, :-1]), 1), kv_b), 2)
            gate = torch.cat((torch.cat((before_gate[:, None], gate_a[:, :-1]), 1), gate_b), 2)
        return (kv * gate.softmax(2, dtype=torch.float32).to(kv.dtype)).sum(2)


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

    def queries(self, x: Tensor, q_latent: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
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
    """The best entries of each row, ascending; -1 where fewer than ``top_k`` are not MASKED. [B, S,
    E] -> int64 [B, S, K].
    """
    best = scores.topk(min(top_k, scores.shape[-1]), sorted=False)
    beyond = torch.iinfo(torch.int64).max
    ids = best.indices.masked_fill(best.values < MASKED / 2, beyond).sort(-1).values
    return ids.masked_fill(ids == beyond, -1)


# ---------------------------------------------------------------------------------------- attention


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
        self, x: Tensor, positions: Tensor, cache: LayerCache | None
    ) -> tuple[Tensor, Access | None]:
        """Inference: x [B, S, D] at contiguous ``positions`` [B, S] -> output [B, S, D], and a CSA
        layer's accesses.
        """
        angles = positions[..., None].float() * self.inv_freq
        q, q_latent, kv = self._project(x, angles)
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
        chosen = torch.stack(
            [F.embedding(rows, table) for rows, table in zip(ids.clamp(min=0), entries)]
        )  # [B, S, K, C]
        out, masses = self._attend(q, window, local, self._chosen_logits(q, chosen, ids), chosen)
        return self._output(out, angles), Access(ids, *masses, hidden=x)

    def decode(self, x: Tensor, positions: Tensor, state: StepLayer) -> Tensor:
        """One token of each sequence: x [B, 1, D] at ``positions`` int [B], each its own -> output
        [B, 1, D].
        """
        angles = positions[:, None, None].float() * self.inv_freq
        q, q_latent, kv = self._project(x, angles)
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

    def _project(self, x: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_latent = self.q_a_norm(self.q_a_proj(x))
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
        logits = logits.masked_fill(
            ~(seen & (first | exists))[:, :, None], MASKED
        )  # mask [N, block, 1, W + block]
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
        return self.project_out(rotate(out, angles[:, :, None], inverse=True))

    def project_out(self, out: Tensor) -> Tensor:
        """The grouped low-rank projection, [B, S, H, C] -> [B, S, D]."""
        return self.o_b_proj(grouped(out.flatten(2), self.o_a_proj, self.groups))


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


# ------------------------------------------------------------------------------------------ experts


class SwiGLU(nn.Module):
    def __init__(self, config: DeepseekV4Config):
        super().__init__()
        self.limit = config.swiglu_limit
        self.gate_proj = linear(config.hidden_size, config.moe_intermediate_size)
        self.up_proj = linear(config.hidden_size, config.moe_intermediate_size)
        self.down_proj = linear(config.moe_intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(clamped_swiglu(self.gate_proj(x), self.up_proj(x), self.limit))


class Experts(nn.Module):
    """The routed ones.

    Of float8 weights [experts, out, in] ``gate_up_scale`` and ``down_scale`` are float32 [experts,
    ceil(out / 128), ceil(in / 128)].
    """

    def __init__(self, config: DeepseekV4Config):
        super().__init__()
        count, width = config.n_routed_experts, config.moe_intermediate_size
        self.limit = config.swiglu_limit
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * width, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(count, config.hidden_size, width))
        self.register_buffer("gate_up_scale", None)
        self.register_buffer("down_scale", None)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [N, D], chosen int64 and weights float32 [N, top_k] -> [N, D].

        For any N, with gradients: a decode step on a GPU takes `mixture_of_experts`.
        """
        if self.down_scale is None and len(self.gate_up_proj) <= FEW_EXPERTS:
            return self._every_expert(x, chosen, weights)
        if x.dtype == self.down_proj.dtype == torch.bfloat16 and not any(
            size % GROUPED_MULTIPLE for size in self.down_proj.shape[1:]
        ):
            return self._grouped(x, chosen, weights)
        return self._one_by_one(x, chosen, weights)

    def _one_by_one(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The reference: a loop over the experts that were chosen at all."""
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            token, slot = torch.where(chosen == expert)
            gate_up, down = self._widened(expert, x.dtype)
            gate, up = F.linear(x[token], gate_up).chunk(2, -1)
            result = F.linear(clamped_swiglu(gate, up, self.limit), down)
            out.index_add_(0, token, (result * weights[token, slot, None]).to(out.dtype))
        return out

    def _widened(self, expert: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """An expert's two matrices as they are, or of float8 ones as ``dtype``."""
        if self.down_scale is None:
            return self.gate_up_proj[expert], self.down_proj[expert]
        gate_up, down = (
            (self.gate_up_proj[expert], self.gate_up_scale[expert]),
            (self.down_proj[expert], self.down_scale[expert]),
        )
        return dequantise(*gate_up, dtype=dtype), dequantise(*down, dtype=dtype)

    def _grouped(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """One matrix product over all experts, of (token, slot) pairs sorted by expert; shapes
        depend on N alone.
        """
        experts, order = chosen.flatten().sort(stable=True)
        ends = torch.searchsorted(
            experts,
            torch.arange(len(self.gate_up_proj), device=x.device),
            right=True,
            out_int32=True,
        )
        gate, up = F.grouped_mm(
            x[order // chosen.shape[1]], self.gate_up_proj.transpose(1, 2), offs=ends
        ).chunk(2, -1)
        result = F.grouped_mm(
            clamped_swiglu(gate, up, self.limit), self.down_proj.transpose(1, 2), offs=ends
        )
        shares = (
            result * weights.flatten()[order, None]
        )  # float32, sorted by expert; back to the order of tokens
        return (
            torch.empty_like(shares)
            .index_copy(0, order, shares)
            .unflatten(0, chosen.shape)
            .sum(1)
            .to(x.dtype)
        )

    def _every_expert(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        count = len(self.gate_up_proj)
        share = torch.zeros(len(x), count, device=x.device, dtype=weights.dtype).scatter_add(
            1, chosen, weights
        )
        gate, up = (
            F.linear(x, self.gate_up_proj.flatten(0, 1)).unflatten(-1, (count, -1)).chunk(2, -1)
        )
        inner = clamped_swiglu(gate, up, self.limit) * share[..., None].to(
            x.dtype
        )  # [N, experts, width]
        return inner.flatten(1) @ self.down_proj.transpose(1, 2).flatten(0, 1).to(x.dtype)


class Router(nn.Module):
    """Scores by sqrt(softplus); picks by score and balance bias, or, in the first layers, by the
    token's hash.
    """

    def __init__(self, config: DeepseekV4Config, hashed: bool):
        super().__init__()
        count, self.top_k, self.scaling = (
            config.n_routed_experts,
            config.num_experts_per_tok,
            config.routed_scaling_factor,
        )
        self.hashed = hashed
        self.weight = nn.Parameter(torch.empty(count, config.hidden_size))
        if hashed:
            self.register_buffer(
                "tid2eid", torch.zeros(config.vocab_size, self.top_k, dtype=torch.long)
            )
        else:
            self.register_buffer("e_score_correction_bias", torch.zeros(count))

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, D], tokens [N] -> chosen int64 and weights float32 [N, top_k]."""
        return route(F.linear(x, self.weight), tokens, self)

    def choose(self, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.softplus(logits.float()).sqrt()
        if self.hashed:
            chosen = self.tid2eid[tokens]
        else:
            chosen = (
                (scores + self.e_score_correction_bias).topk(self.top_k, -1, sorted=False).indices
            )
        weights = scores.gather(1, chosen)
        return chosen, weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.scaling


class MoE(nn.Module):
    def __init__(self, config: DeepseekV4Config, hashed: bool):
        super().__init__()
        self.gate = Router(config, hashed)
        self.experts = Experts(config)
        self.shared_experts = SwiGLU(config)

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [B, S, D], tokens [B, S] -> output, and, where gradients are, each expert's share of
        the routed slots.
        """
        flat = x.flatten(0, 1)
        chosen, weights = self.gate(flat, tokens.flatten())
        load = (
            F.one_hot(chosen, len(self.gate.weight)).float().mean((0, 1))
            if torch.is_grad_enabled()
            else None
        )
        return (
            mixture_of_experts(flat, chosen, weights, self.experts, self.shared_experts).view_as(x),
            load,
        )


# ------------------------------------------------------------------------ hyper-connections, layers


@torch.compiler.disable  # the compiler unrolls the loop into one expression, which takes it minutes
def sinkhorn(mix: Tensor, iterations: int, eps: float) -> Tensor:
    """Positive matrices [..., R, R] made doubly stochastic: columns, then rows, in turn."""
    mix = mix / (mix.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        mix = mix / (mix.sum(-1, keepdim=True) + eps)
        mix = mix / (mix.sum(-2, keepdim=True) + eps)
    return mix


class HyperConnection(nn.Module):
    """Manifold-constrained hyper-connection (section 2.2): R residual streams into a block and
    back.
    """

    def __init__(self, config: DeepseekV4Config):
        super().__init__()
        streams = config.hc_mult
        self.streams, self.iterations = streams, config.hc_sinkhorn_iters
        self.eps, self.norm_eps = config.hc_eps, config.rms_norm_eps
        self.fn = nn.Parameter(torch.empty((2 + streams) * streams, streams * config.hidden_size))
        self.base = nn.Parameter(torch.zeros((2 + streams) * streams))
        self.scale = nn.Parameter(torch.ones(3))

    def enter(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S, R, D] -> block input [B, S, D], write weights [B, S, R], mixing [B, S, R, R]."""
        count = self.streams
        mixes = F.linear(rms_normalise(streams.flatten(2).float(), self.norm_eps), self.fn.float())
        read, write, mix = mixes.split([count, count, count * count], -1)
        read_base, write_base, mix_base = self.base.split([count, count, count * count])
        read = torch.sigmoid(read * self.scale[0] + read_base) + self.eps
        write = 2 * torch.sigmoid(write * self.scale[1] + write_base)
        mix = (mix * self.scale[2] + mix_base).unflatten(-1, (count, count)).softmax(-1) + self.eps
        mix = sinkhorn(mix, self.iterations, self.eps)
        return (read[..., None] * streams).sum(2).to(streams.dtype), write, mix

    @staticmethod
    def leave(streams: Tensor, out: Tensor, write: Tensor, mix: Tensor) -> Tensor:
        mixed = (mix.to(streams.dtype)[..., None] * streams[:, :, :, None]).sum(
            2
        )  # out stream k = sum_j mix[j, k] x_j
        return mixed + write.to(streams.dtype)[..., None] * out[:, :, None]


class HyperHead(nn.Module):
    def __init__(self, config: DeepseekV4Config):
        super().__init__()
        self.eps, self.norm_eps = config.hc_eps, config.rms_norm_eps
        self.hc_fn = nn.Parameter(torch.empty(config.hc_mult, config.hc_mult * config.hidden_size))
        self.hc_base = nn.Parameter(torch.zeros(config.hc_mult))
        self.hc_scale = nn.Parameter(torch.ones(1))

    def forward(self, streams: Tensor) -> Tensor:
        mixes = F.linear(
            rms_normalise(streams.flatten(2).float(), self.norm_eps), self.hc_fn.float()
        )
        read = torch.sigmoid(mixes * self.hc_scale.float() + self.hc_base.float()) + self.eps
        return (read[..., None] * streams).sum(2).to(streams.dtype)


class Layer(nn.Module):
    def __init__(self, config: DeepseekV4Config, number: int):
        super().__init__()
        self.self_attn = Attention(config, config.layer_types[number])
        self.mlp = MoE(config, hashed=config.mlp_layer_types[number] == "hash_moe")
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn_hc = HyperConnection(config)
        self.ffn_hc = HyperConnection(config)
        self.recompute_attention = (
            False  # in the backward pass of training, where its activations would not fit
        )

    def forward(
        self, streams, tokens, positions, cache: LayerCache | None
    ) -> tuple[Tensor, Access | None]:
        x, write, mix = self._enter_attention(streams)
        out, access = self.self_attn(x, positions, cache)
        return self._feed_forward(streams, out, write, mix, tokens)[0], access

    def decode(
        self, streams, pending: Pending | None, tokens, positions, attend: Attend
    ) -> tuple[Tensor, Pending]:
        """``streams`` without the last block's output, which is ``pending``, in and out: one launch
        writes it and reads for the next block.
        """
        streams, x, write, mix = enter(streams, pending, self.attn_hc, self.input_layernorm)
        pending = Pending(self.attn_hc, attend(x, positions), write, mix)
        streams, x, write, mix = enter(streams, pending, self.ffn_hc, self.post_attention_layernorm)
        return streams, Pending(self.ffn_hc, self.mlp(x, tokens)[0], write, mix)

    def train_forward(self, streams, tokens, positions, sparse: bool) -> tuple[Tensor, Aux]:
        """``streams`` [1, B * S, R, D]: what works token by token then has one shape at every
        length of a curriculum, and is compiled once.
        """
        x, write, mix = self._enter_attention(streams)
        attention, inputs = (
            self.self_attn.train_forward,
            (x.view(*tokens.shape, -1), positions, sparse),
        )
        if self.recompute_attention:
            out, index_loss = torch.utils.checkpoint.checkpoint(
                attention, *inputs, use_reentrant=False
            )
        else:
            out, index_loss = attention(*inputs)
        streams, load = self._feed_forward(streams, out.view_as(x), write, mix, tokens.view(1, -1))
        return streams, Aux(index_loss, load)

    def _enter_attention(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, write, mix = self.attn_hc.enter(streams)
        return self.input_layernorm(x), write, mix

    def _feed_forward(self, streams, out, write, mix, tokens) -> tuple[Tensor, Tensor]:
        """Write the attention's output back, then the experts; -> streams, and the experts'
        load.
        """
        streams = self.attn_hc.leave(streams, out, write, mix)
        x, write, mix = self.ffn_hc.enter(streams)
        out, load = self.mlp(self.post_attention_layernorm(x), tokens)
        return self.ffn_hc.leave(streams, out, write, mix), load


class Backbone(nn.Module):
    def __init__(self, config: DeepseekV4Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Layer(config, number) for number in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hc_head = HyperHead(config)


class DeepseekV4(nn.Module):
    """The language model; ``state_dict`` keys are transformers' own."""

    def __init__(self, config: DeepseekV4Config):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = linear(config.hidden_size, config.vocab_size)

    def new_cache(self, batch: int, max_tokens: int) -> Cache:
        weight = self.lm_head.weight
        return Cache.allocate(self.config, batch, max_tokens, weight.device, weight.dtype)

    def forward(
        self, tokens: Tensor, cache: Cache | None = None, last_only: bool = False
    ) -> tuple[Tensor, list[Access]]:
        """tokens int64 [B, S], continuing ``cache`` -> logits [B, S or 1, vocabulary] and each CSA
        layer's accesses.
        """
        start = cache.length if cache is not None else 0
        positions = (start + torch.arange(tokens.shape[1], device=tokens.device)).expand_as(tokens)
        streams = self._embed(tokens)
        accesses = []
        for number, layer in enumerate(self.model.layers):
            streams, access = layer(
                streams, tokens, positions, cache.layers[number] if cache is not None else None
            )
            if access is not None:
                accesses.append(access)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.lm_head(self._final(streams[:, -1:] if last_only else streams)), accesses

    def decode(self, tokens: Tensor, positions: Tensor, attends: Sequence[Attend]) -> Tensor:
        """One token of each sequence: tokens int64 and ``positions`` int32 [B], each its own; each
        layer's attention -> logits [B, vocabulary].
        """
        streams, pending = self._embed(tokens[:, None]), None
        for layer, attend in zip(self.model.layers, attends, strict=True):
            streams, pending = layer.decode(streams, pending, tokens[:, None], positions, attend)
        return self.lm_head(read_out(streams, pending, self.model.hc_head, self.model.norm))[:, 0]

    def train_forward(
        self, tokens: Tensor, positions: Tensor, sparse: bool
    ) -> tuple[Tensor, list[Aux]]:
        """Whole sequences [B, S] -> final hidden states [B, S, D] (``lm_head`` gives the logits)
        and the losses' parts.
        """
        streams, aux = self._embed(tokens).reshape(1, tokens.numel(), self.config.hc_mult, -1), []
        if torch.is_autocast_enabled(tokens.device.type):
            streams = streams.to(torch.get_autocast_dtype(tokens.device.type))
        for layer in self.model.layers:
            streams, parts = layer.train_forward(streams, tokens, positions, sparse)
            aux.append(parts)
        return self._final(streams).view(*tokens.shape, -1), aux

    def _embed(self, tokens: Tensor) -> Tensor:
        return self.model.embed_tokens(tokens)[:, :, None].expand(-1, -1, self.config.hc_mult, -1)

    def _final(self, streams: Tensor) -> Tensor:
        return self.model.norm(self.model.hc_head(streams))
