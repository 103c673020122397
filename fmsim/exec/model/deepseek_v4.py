"""The network: layers, backbone and head of DeepSeek-V4, for training, chunked prefill and decode.

Structure and parameter names are those of transformers' ``DeepseekV4ForCausalLM``, which is the
oracle of the tests. The parts lie in files of their own beside this one. On a GPU a decode step's
hyper-connections and experts are kernels.

Shapes: B sequences, S tokens of this call, D hidden size, R residual streams (``hc_mult``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config

from fmsim.exec.kernels.products import one_row
from fmsim.exec.kernels.products.hyper_connection import Pending, enter, read_out
from fmsim.exec.model.attention import Attention
from fmsim.exec.model.cache import Access, Attend, Cache, LayerCache
from fmsim.exec.model.experts import MoE
from fmsim.exec.model.hyper_connection import HyperConnection, HyperHead
from fmsim.exec.model.norm_rope import RMSNorm
from fmsim.exec.model.projections import linear, normed


class Aux(NamedTuple):
    """What training needs of one layer: the indexer's KL loss (CSA layers) and the experts' load
    (MoE layers).
    """

    index_loss: Tensor | None
    expert_load: Tensor | None  # float32 [experts], the share of routed slots


class Layer(nn.Module):
    def __init__(self, config: DeepseekV4Config, number: int):
        super().__init__()
        self.self_attn = Attention(config, config.layer_types[number])
        self.mlp = MoE(config, hashed=config.mlp_layer_types[number] == "hash_moe")
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn_hc = HyperConnection(config)
        self.ffn_hc = HyperConnection(config)
        # a connection's gates are worked out by the first product of what it enters
        self.self_attn.due, self.mlp.gate.due = self.attn_hc.due, self.ffn_hc.due

    def forward(
        self, streams, tokens, positions, cache: LayerCache | None
    ) -> tuple[Tensor, Access | None]:
        x, write, mix = self.attn_hc.enter(streams)
        attention = self.self_attn
        x = normed(x, self.input_layernorm, attention.q_a_proj, attention.kv_proj)
        out, access = attention(x, positions, cache)
        return self._feed_forward(streams, out, write, mix, tokens)[0], access

    def decode(
        self, streams, pending: Pending | None, tokens, positions, attend: Attend
    ) -> tuple[Tensor, Pending]:
        """``streams`` without the last block's output, which is ``pending``, in and out: one launch
        writes it and reads for the next block.
        """
        streams, x, write, mix = enter(
            streams,
            pending,
            self.attn_hc,
            self.input_layernorm,
            self.self_attn.takes_float8(len(streams)),
            then=self.self_attn.q_a_proj.weight,
        )
        pending = Pending(self.attn_hc, attend(x, positions), write, mix)
        # experts that are split get all ranks' tokens first
        then = self.mlp.gate.weight if isinstance(self.mlp, MoE) else None
        streams, x, write, mix = enter(
            streams, pending, self.ffn_hc, self.post_attention_layernorm, then=then
        )
        return streams, Pending(self.ffn_hc, self.mlp.decode(x, tokens), write, mix)

    def train_forward(self, streams, tokens, positions, sparse: bool) -> tuple[Tensor, Aux]:
        """``streams`` [1, B * S, R, D], tokens and positions [B, S]."""
        x, write, mix = self.attn_hc.enter(streams)
        of_attention = self.input_layernorm(x).view(*tokens.shape, -1)
        out, index_loss = self.self_attn.train_forward(of_attention, positions, sparse)
        streams, load = self._feed_forward(streams, out.view_as(x), write, mix, tokens.view(1, -1))
        return streams, Aux(index_loss, load)

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
        # as empty as the other weights: to draw it on no device loads torch's compiler
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
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
        last = read_out(streams, pending, self.model.hc_head, self.model.norm)
        if one_row.takes(last, self.lm_head.weight):  # it reads weights before `last` is there
            return one_row.one_row_triton(last, self.lm_head.weight)[:, 0]
        return self.lm_head(last)[:, 0]

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
