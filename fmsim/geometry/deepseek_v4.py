"""The DeepSeek-V4 family: compressed sparse (CSA), heavily compressed (HCA) and sliding layers.

Sources: the models' published `config.json` (deepseek-ai/DeepSeek-V4-Flash and -Pro), the cache
layout of the deployed engine (584-byte entries, 132-byte index keys), and FlashMemory, arXiv
2606.09079, for the footprints to reproduce.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fmsim.geometry.base import Geometry
from fmsim.geometry.layers import LayerSpec

MODEL_TYPE = "deepseek_v4"
FAMILY = "DeepSeek-V4"
SLIDING = "sliding_attention"
CSA = "compressed_sparse_attention"
HCA = "heavily_compressed_attention"

_TYPE_OF_RATIO = {0: SLIDING, 4: CSA, 128: HCA}
_SCALE_BLOCK = 64  # fp8 values that share a scale byte; scale bytes are padded to a multiple of 8
_EXPERT_BYTES = 17 / 32  # 4-bit values with a scale byte per 32, as both models are published


@dataclass(frozen=True)
class DeepseekV4Geometry(Geometry):
    """The shape of one DeepSeek-V4 model.

    Sizes are in elements, rates in tokens an entry; byte sizes are properties.
    """

    name: str
    layer_types: tuple[str, ...]
    hidden_size: int
    n_heads: int
    head_dim: int
    rope_dim: int
    window_tokens: int
    csa_rate: int
    hca_rate: int
    index_topk: int
    index_n_heads: int
    index_head_dim: int
    q_lora_rank: int
    o_lora_rank: int
    o_groups: int
    n_experts: int
    n_active_experts: int
    n_shared_experts: int
    expert_width: int
    vocabulary: int
    float8_weights: bool = False  # of projections and experts, as published; else bfloat16
    max_positions: int | None = None
    family = FAMILY
    dense_mlps = 0
    table_bytes = 0.0

    @property
    def weight_type(self) -> str:
        """Of projections and experts; the rest is bfloat16, some of it float32."""
        return "float8" if self.float8_weights else "bfloat16"

    @cached_property
    def layers(self) -> tuple[LayerSpec, ...]:
        window = {"window_tokens": self.window_tokens, "window_bytes": self.kv_entry_bytes}
        of_type = {
            SLIDING: LayerSpec(kind="window", **window),
            CSA: LayerSpec(
                kind="sparse",
                entry_tokens=self.csa_rate,
                entry_bytes=self.kv_entry_bytes,
                key_bytes=self.index_key_bytes,
                topk=self.index_topk,
                **window,
            ),
            HCA: LayerSpec(
                kind="dense",
                entry_tokens=self.hca_rate,
                entry_bytes=self.kv_entry_bytes,
                **window,
            ),
        }
        return tuple(of_type[kind] for kind in self.layer_types)

    @property
    def kv_entry_bytes(self) -> int:
        """One cached latent: fp8 values, bf16 rotated values, and the scales. 584 for V4: 448 + 64
        * 2 + 8.
        """
        fp8_values = self.head_dim - self.rope_dim
        scale_bytes = 8 * math.ceil(fp8_values / _SCALE_BLOCK / 8)
        return fp8_values + 2 * self.rope_dim + scale_bytes

    @property
    def index_key_bytes(self) -> int:
        """One index key: fp8 values and one float32 scale. 132 for V4."""
        return self.index_head_dim + 4

    @property
    def expert_parameters(self) -> int:
        """Parameters of the routed experts."""
        return self.n_layers * self.n_experts * self._one_expert

    @property
    def shared_parameters(self) -> int:
        """Everything that every token uses: attention, shared experts, routers, embedding and
        output head.
        """
        query = (
            self.hidden_size * self.q_lora_rank + self.q_lora_rank * self.n_heads * self.head_dim
        )
        output = (
            self.n_heads * self.head_dim * self.o_lora_rank
            + self.o_groups * self.o_lora_rank * self.hidden_size
        )
        attention = query + self.hidden_size * self.head_dim + output
        experts = self.n_shared_experts * self._one_expert + self.hidden_size * self.n_experts
        compressor = (
            4 * self.hidden_size * self.head_dim * self.n_csa
            + 2 * self.hidden_size * self.head_dim * self.n_hca
        )
        indexer = (
            self.n_csa
            * self.index_n_heads
            * (self.q_lora_rank * self.index_head_dim + self.hidden_size)
        )
        indexer += self.n_csa * 4 * self.hidden_size * self.index_head_dim
        return (
            self.n_layers * (attention + experts)
            + compressor
            + indexer
            + 2 * self.vocabulary * self.hidden_size
        )

    @property
    def active_parameters(self) -> int:
        """Parameters that one token uses (the embedding counted whole, as model cards do)."""
        return self.shared_parameters + self.n_layers * self.n_active_experts * self._one_expert

    @property
    def _one_expert(self) -> int:
        return 3 * self.hidden_size * self.expert_width

    def weight_bytes(self, n_gpus: int) -> float:
        """As both models are published: 4-bit experts, one byte for every other parameter."""
        return (self.expert_parameters * _EXPERT_BYTES + self.shared_parameters) / n_gpus


def from_config(config: Mapping[str, Any], name: str = "") -> DeepseekV4Geometry:
    """The geometry of a Hugging Face DeepSeek-V4 `config.json`, in transformers' spelling or the
    published one.

    Raises ValueError when it is not a DeepSeek-V4 config, or lacks what the arithmetic needs.
    """
    if config.get("model_type") != "deepseek_v4":
        raise ValueError(f"model_type is {config.get('model_type')!r}, expected 'deepseek_v4'")
    n_layers = _need(config, "num_hidden_layers")
    rates = config.get("compress_rates") or {CSA: 4, HCA: 128}
    rope_dim = config.get("qk_rope_head_dim") or round(
        config.get("partial_rotary_factor", 0.125) * _need(config, "head_dim")
    )
    return DeepseekV4Geometry(
        name=name or str(config.get("_name_or_path") or "custom"),
        layer_types=_layer_types(config, n_layers),
        hidden_size=_need(config, "hidden_size"),
        n_heads=_need(config, "num_attention_heads"),
        head_dim=_need(config, "head_dim"),
        rope_dim=rope_dim,
        window_tokens=_need(config, "sliding_window"),
        csa_rate=rates[CSA],
        hca_rate=rates[HCA],
        index_topk=_need(config, "index_topk"),
        index_n_heads=_need(config, "index_n_heads"),
        index_head_dim=_need(config, "index_head_dim"),
        q_lora_rank=_need(config, "q_lora_rank"),
        o_lora_rank=_need(config, "o_lora_rank"),
        o_groups=_need(config, "o_groups"),
        n_experts=_need(config, "n_routed_experts"),
        n_active_experts=_need(config, "num_experts_per_tok"),
        n_shared_experts=config.get("n_shared_experts", 1),
        expert_width=_need(config, "moe_intermediate_size"),
        vocabulary=_need(config, "vocab_size"),
        float8_weights=(config.get("quantization_config") or {}).get("quant_method") == "fp8",
        max_positions=config.get("max_position_embeddings"),
    )


def _need(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int):
        raise ValueError(f"'{key}' is missing or no whole number")
    return value


def _layer_types(config: Mapping[str, Any], n_layers: int) -> tuple[str, ...]:
    """From `layer_types`, or from the published `compress_ratios` (which may go on with
    multi-token-prediction layers).
    """
    types = config.get("layer_types")
    if types is None:
        ratios = config.get("compress_ratios") or []
        unknown = set(ratios) - set(_TYPE_OF_RATIO)
        if unknown:
            raise ValueError(f"'compress_ratios' has {sorted(unknown)}; known are 0, 4 and 128")
        types = [_TYPE_OF_RATIO[ratio] for ratio in ratios[:n_layers]]
    if len(types) != n_layers or not set(types) <= {SLIDING, CSA, HCA}:
        raise ValueError(
            f"'layer_types' or 'compress_ratios' must name {n_layers} layers of {SLIDING}, {CSA} or"
            f" {HCA}"
        )
    if CSA not in types:
        raise ValueError("there is no CSA layer, so nothing to page")
    return tuple(types)
