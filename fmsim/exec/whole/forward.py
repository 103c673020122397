"""DeepSeek-V4 forward with gradients, for sequences of any length: what one step of training
computes.

The plain reference is `fmsim.exec.model.deepseek_v4.DeepseekV4.train_forward`; a test compares
values and gradients. What works token by token sees all tokens of a batch as one row of T; only
attention and the indexer's loss see sequences. It takes no compiler: torch's took 100 s of a GPU
before the first step. Shapes: B sequences of S tokens, T = B * S, R residual streams, D hidden
size, H heads, C head size, E entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fmsim.exec.model.compressor import Compressor
from fmsim.exec.model.deepseek_v4 import DeepseekV4, Layer
from fmsim.exec.model.experts import MoE
from fmsim.exec.model.hyper_connection import HyperConnection
from fmsim.exec.model.kinds import CSA, MASKED, SLIDING
from fmsim.exec.model.norm_rope import RMSNorm
from fmsim.exec.model.projections import grouped
from fmsim.exec.whole import attention, fused, index_scores
from fmsim.exec.whole.sinkhorn import sinkhorn

WATCHED_BLOCK = 64  # queries in a row whose attention the indexer learns from
WATCHED_LOGITS = 2**24  # of one layer's loss: that many pairs of query and entry


@dataclass(frozen=True)
class Manner:
    """How a step is computed.

    top_k: entries that a CSA layer's query attends to, None for all; calm: the share of the
    indexer's target that is the mean over a block of queries rather than the query's own; watched:
    int64 [B, Q], the queries that the indexer learns from, whole blocks of WATCHED_BLOCK, None for
    all; recompute: make each layer's activations anew in the backward pass; index_loss: whether to
    compute it; entered: is told of every layer's number and what it attends with.
    """

    top_k: int | None = None
    calm: float = 0.0
    watched: Tensor | None = None
    recompute: bool = False
    index_loss: bool = True
    entered: Callable[[int, Entered], None] | None = None


class Found(NamedTuple):
    """hidden [T, D]; index_loss: sum over CSA layers; loads: each layer's share of routed slots,
    float32 [L, experts].
    """

    hidden: Tensor
    index_loss: Tensor
    loads: Tensor


@dataclass
class Places:
    """Where tokens stand: made once a step, used by every layer."""

    batch: int
    length: int
    turns: dict[
        str, tuple[Tensor, Tensor]
    ]  # by the kind of RoPE, cosines and sines, float32 [T, pairs]
    first: dict[int, Tensor]  # by rate, bool [T / rate]: entries that begin a sequence
    visible: dict[int, Tensor]  # by rate, int32 [B, S]: entries closed by then
    kept: dict[int, Tensor] = field(default_factory=dict)  # by layer, what it selected

    @classmethod
    def of(cls, model: DeepseekV4, positions: Tensor) -> Places:
        """Of positions int64 [B, S]. Raises ValueError where S is no multiple of every rate."""
        (batch, length), device = positions.shape, positions.device
        rates = sorted(set(model.config.compress_rates.values()))
        if any(length % rate for rate in rates):
            raise ValueError(f"{length} tokens are no multiple of the rates {rates}")
        turns = {}
        for layer in model.model.layers:
            if layer.self_attn.rope_kind not in turns:
                angles = positions.reshape(-1, 1).float() * layer.self_attn.inv_freq
                turns[layer.self_attn.rope_kind] = angles.cos(), angles.sin()
        order = torch.arange(length, device=device, dtype=torch.int32).expand(batch, length)
        first = {rate: order.reshape(-1)[::rate] == 0 for rate in rates}
        visible = {rate: ((order + 1) // rate).contiguous() for rate in rates}
        return cls(batch, length, turns, first, visible)


def train_forward(
    model: DeepseekV4,
    tokens: Tensor,
    positions: Tensor,
    manner: Manner,
    places: Places | None = None,
) -> Found:
    """tokens and positions int64 [B, S]; rows of the batch are sequences that begin at their first
    token.

    ``places`` of these positions, given, tells afterwards what each layer selected.
    """
    places, flat = places or Places.of(model, positions), tokens.flatten()
    streams = F.embedding(flat, model.model.embed_tokens.weight)
    if torch.is_autocast_enabled(tokens.device.type):
        streams = streams.to(torch.get_autocast_dtype(tokens.device.type))
    streams = streams[:, None].expand(-1, model.config.hc_mult, -1).contiguous()
    losses, loads = [], []
    for number, layer in enumerate(model.model.layers):
        inputs = layer, number, streams, flat, places, manner
        if manner.recompute and torch.is_grad_enabled():
            streams, loss, load = checkpoint(_layer, *inputs, use_reentrant=False)
        else:
            streams, loss, load = _layer(*inputs)
        loads.append(load)
        if loss is not None:
            losses.append(loss)
    hidden = read_out(model, streams)
    index_loss = torch.stack(losses).sum() if losses else hidden.new_zeros(())
    return Found(hidden, index_loss, torch.stack(loads))


def _layer(layer, number, streams, tokens, places: Places, manner: Manner):
    """-> streams [T, R, D], a CSA layer's indexer loss, and the experts' load."""
    own, turns = layer.self_attn, places.turns[layer.self_attn.rope_kind]
    rate = None if own.kind == SLIDING else own.compressor.rate
    entered = enter_attention(layer, streams, turns, places.first.get(rate))
    if manner.entered is not None:
        manner.entered(number, entered)
    q, kv, entries, *index = (
        None if part is None else part.view(places.batch, -1, *part.shape[1:])
        for part in (entered.q, entered.kv, entered.entries, *entered.index)
    )
    visible, ids = places.visible.get(rate), None
    if own.kind == CSA and manner.top_k is not None and entries.shape[1] > manner.top_k:
        if number not in places.kept:  # made anew in the backward pass, it must be the same
            places.kept[number] = index_scores.select(*index, visible, manner.top_k)
        ids = places.kept[number]
    out, near = attention.attend(q, kv, own.window, own.sinks, entries, visible, ids)
    loss = None
    if own.kind == CSA and manner.index_loss:
        loss = indexer_loss(
            index, q.detach(), entries.detach(), visible, near, manner.watched, manner.calm
        )
    out, write, mix = out.flatten(0, 1), entered.write, entered.mix
    streams, load = leave_attention(layer, streams, out, write, mix, turns, tokens)
    return streams, loss, load


# ----------------------------------------------------------------------------------- token by token

Turns = tuple[Tensor, Tensor]  # cosines and sines, float32 [T, pairs]


class Entered(NamedTuple):
    """A layer's attention, ready to attend: its input x [T, D], q [T, H, C], kv [T, C], entries [E,
    C], the indexer's parts.
    """

    x: Tensor
    q: Tensor
    kv: Tensor
    entries: Tensor | None
    index: tuple[Tensor | None, Tensor | None, Tensor | None]  # queries, weights, keys
    write: Tensor
    mix: Tensor


def enter_attention(layer: Layer, streams: Tensor, turns: Turns, first: Tensor | None) -> Entered:
    """Read the streams, normalise, project, compress."""
    own = layer.self_attn
    x, write, mix = enter(layer.attn_hc, streams)
    x = _normed(layer.input_layernorm, x)
    q_latent = _normed(own.q_a_norm, own.q_a_proj(x))
    q = own.q_b_proj(q_latent).unflatten(-1, (own.heads, own.size))
    q, kv = fused.norm_rotate(q, None, own.eps, turns), _normed(own.kv_norm, own.kv_proj(x), turns)
    if own.kind == SLIDING:
        return Entered(x, q, kv, None, (None, None, None), write, mix)
    entries = compress(own.compressor, x, turns, first)
    if own.kind != CSA:
        return Entered(x, q, kv, entries, (None, None, None), write, mix)
    indexer, x, q_latent = own.compressor.indexer, x.detach(), q_latent.detach()
    keys = compress(indexer, x, turns, first)
    queries = indexer.q_b_proj(q_latent).unflatten(-1, (indexer.heads, indexer.width))
    weights = indexer.scorer.weights_proj(x) * (indexer.heads * indexer.width) ** -0.5
    queries = fused.norm_rotate(queries, None, None, turns)
    return Entered(x, q, kv, entries, (queries, weights, keys), write, mix)


def _normed(norm: RMSNorm, x: Tensor, turns: Turns | None = None) -> Tensor:
    return fused.norm_rotate(x, norm.weight, norm.eps, turns)


def compress(compressor: Compressor, x: Tensor, turns: Turns, first: Tensor) -> Tensor:
    """Entries [T / rate, width] of x [T, D]; one that begins a sequence (``first``) has no window
    before it.
    """
    rate, width = compressor.rate, compressor.width
    kv = compressor.kv_proj(x).unflatten(0, (-1, rate))
    gate = compressor.gate_proj(x).unflatten(0, (-1, rate)) + compressor.position_bias
    if compressor.overlapping:
        begins = first[:, None, None]
        before_kv, before_gate = (
            F.pad(part[:-1, :, :width], (0, 0, 0, 0, 1, 0)) for part in (kv, gate)
        )
        before_gate = before_gate.masked_fill(begins, MASKED)
        kv = torch.cat((before_kv.masked_fill(begins, 0.0), kv[..., width:]), 1)
        gate = torch.cat((before_gate, gate[..., width:]), 1)
    entries = (kv * gate.softmax(1, dtype=torch.float32).to(kv.dtype)).sum(1).to(kv.dtype)
    return _normed(compressor.kv_norm, entries, tuple(part[::rate].contiguous() for part in turns))


def leave_attention(
    layer: Layer, streams: Tensor, out: Tensor, write: Tensor, mix: Tensor, turns: Turns, tokens
) -> tuple[Tensor, Tensor]:
    """Project the attention's output, write it, then the experts; -> streams, and the experts'
    load.
    """
    own = layer.self_attn
    out = fused.norm_rotate(out, None, None, turns, back=True).flatten(1)
    out = own.o_b_proj(grouped(out, own.o_a_proj, own.groups))
    streams = fused.leave(streams, out, write, mix)
    x, write, mix = enter(layer.ffn_hc, streams)
    out, load = experts(layer.mlp, _normed(layer.post_attention_layernorm, x), tokens)
    return fused.leave(streams, out, write, mix), load


def experts(mlp: MoE, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Every expert on every token x [T, D], by its share, and the shared one, which is one more; ->
    output, load.
    """
    routed, shared, count = mlp.experts, mlp.shared_experts, len(mlp.gate.weight)
    chosen, weights = mlp.gate.choose(F.linear(x, mlp.gate.weight), tokens)
    load = F.one_hot(chosen, count).float().mean((0, 1))
    share = weights.new_zeros(len(x), count).scatter_add(1, chosen, weights)
    share = F.pad(share, (0, 1), value=1.0)
    rows = (*routed.gate_up_proj, shared.gate_proj.weight, shared.up_proj.weight)
    gate_up = F.linear(x, torch.cat(rows)).unflatten(-1, (count + 1, -1))
    inner = fused.gated(gate_up, share, routed.limit).flatten(1)
    return F.linear(inner, torch.cat((*routed.down_proj, shared.down_proj.weight), 1)), load


def enter(connection: HyperConnection, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`HyperConnection.enter` of [T, R, D]: block input [T, D], write weights [T, R], mixing [T, R,
    R].
    """
    count = connection.streams
    mixes = fused.mixes(streams, connection.fn, connection.norm_eps)
    read, write, mix = mixes.split([count, count, count * count], -1)
    bases = connection.base.split([count, count, count * count])
    read = torch.sigmoid(read * connection.scale[0] + bases[0]) + connection.eps
    write = 2 * torch.sigmoid(write * connection.scale[1] + bases[1])
    mix = (mix * connection.scale[2] + bases[2]).unflatten(-1, (count, count))
    mix = sinkhorn(mix.softmax(-1) + connection.eps, connection.iterations, connection.eps)
    return fused.read(streams, read), write, mix


def read_out(model: DeepseekV4, streams: Tensor) -> Tensor:
    """The final hidden states [T, D]."""
    head = model.model.hc_head
    mixes = fused.mixes(streams, head.hc_fn, head.norm_eps)
    weights = torch.sigmoid(mixes * head.hc_scale + head.hc_base) + head.eps
    return _normed(model.model.norm, fused.read(streams, weights))


# ------------------------------------------------------------------------------- the indexer's loss


def indexer_loss(index, q, entries, visible, near, watched: Tensor | None, calm: float) -> Tensor:
    """KL(attention over all visible entries, a mean over heads || softmax of index scores), over
    ``watched`` queries.

    A query counts by the attention that it spends on entries at all. With ``calm`` a query's target
    is part its own attention and part that of its block, as far as it may see: what one token in a
    sentence looks at is near to what the next one will, and an indexer that knows so selects more
    steadily.
    """
    queries, weights, keys = index
    if watched is not None:
        q, near, visible, queries, weights = (
            _rows(part, watched) for part in (q, near, visible, queries, weights)
        )
    seen = torch.arange(entries.shape[1], device=q.device) < visible[..., None]
    scores = index_scores.index_scores(queries, weights, keys, visible)
    with torch.no_grad():
        target = attention.attention_over_entries(q, entries, visible, near)
        mass = target.sum(-1)
        if calm:
            shared = target.unflatten(1, (-1, WATCHED_BLOCK)).mean(2, keepdim=True)
            shared = shared.expand(-1, -1, WATCHED_BLOCK, -1).flatten(1, 2) * seen
            target = (1 - calm) * target + calm * shared
        target = target / target.sum(-1, keepdim=True).clamp(min=1e-9)
        entropy = torch.special.xlogy(target, target).sum(-1)
    log_shares = scores.masked_fill(~seen, MASKED).log_softmax(-1)
    divergence = entropy - (target * log_shares).sum(-1)
    return (divergence * mass).sum() / mass.sum().clamp(min=1e-9)


def _rows(part: Tensor, watched: Tensor) -> Tensor:
    """part [B, S, ...] at ``watched`` [B, Q] -> [B, Q, ...]."""
    starts = torch.arange(len(part), device=part.device)[:, None] * part.shape[1]
    chosen = part.flatten(0, 1).index_select(0, (watched + starts).flatten())
    return chosen.view(*watched.shape, *part.shape[2:])


def watch(answers: Tensor, entries: int, generator: torch.Generator | None = None) -> Tensor | None:
    """Queries whose attention the indexer learns from: int64 [B, Q], None for all of them.

    ``answers`` [B, S] is above 0 where an answer is predicted. Blocks are drawn at random, those
    that hold such a query before the others half of the time: looking back is what they are for.
    """
    batch, tokens = answers.shape
    blocks = tokens // WATCHED_BLOCK
    count = max(1, WATCHED_LOGITS // (entries * batch * WATCHED_BLOCK))
    if count >= blocks:
        return None
    device = answers.device
    holds = answers.view(batch, blocks, WATCHED_BLOCK).amax(-1) > 0
    drawn = torch.rand(batch, blocks, device=device, generator=generator)
    chosen = (drawn + 0.5 * holds).topk(count, dim=1).indices.sort(1).values
    return (chosen[..., None] * WATCHED_BLOCK + torch.arange(WATCHED_BLOCK, device=device)).flatten(
        1
    )
