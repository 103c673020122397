"""What a DeepSeek-V4 model keeps for a context, in bytes, and what it computes, in operations.

All byte arithmetic is here.

Sources: the models' published `config.json` (deepseek-ai/DeepSeek-V4-Flash and -Pro), the cache
layout of the deployed engine (584-byte entries, 132-byte index keys), and FlashMemory, arXiv
2606.09079, for the footprints to reproduce.

Two accountings of a request's KV cache are used, and always named:

- *logical*: compressed entries and index keys only, a policy's share of them taken from the full
  cache. It is the paper's accounting, and the one that its footprint column follows.
- *on the GPU*: what a tiered engine really holds there: the resident entries, every HCA entry, the
  sliding windows, and the index keys that still have to be scored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

SLIDING = "sliding_attention"
CSA = "compressed_sparse_attention"
HCA = "heavily_compressed_attention"

_TYPE_OF_RATIO = {0: SLIDING, 4: CSA, 128: HCA}
_SCALE_BLOCK = (
    64  # fp8 values that share one scale byte; an entry's scale bytes are padded to a multiple of 8
)


@dataclass(frozen=True)
class Geometry:
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
    max_positions: int = 2**20  # the longest context, in tokens
    float8_weights: bool = (
        False  # of projections and experts, as both models are published; else bfloat16
    )

    @property
    def weight_type(self) -> str:
        """Of projections and experts; the rest is bfloat16, some of it float32."""
        return "float8" if self.float8_weights else "bfloat16"

    @property
    def n_layers(self) -> int:
        return len(self.layer_types)

    @property
    def n_csa(self) -> int:
        return self.layer_types.count(CSA)

    @property
    def n_hca(self) -> int:
        return self.layer_types.count(HCA)

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

    def csa_entries(self, tokens: int) -> int:
        """Entries that one CSA layer has closed after `tokens` tokens."""
        return tokens // self.csa_rate

    def hca_entries(self, tokens: int) -> int:
        return tokens // self.hca_rate

    def full_kv_bytes(self, tokens: int) -> int:
        """Logical bytes of the whole cache of one request: CSA entries with their index keys, and
        HCA entries.

        The sliding windows are left out, as in the paper: they do not grow with the context (3.1
        MiB for V4-Flash).
        """
        csa_bytes = (
            self.n_csa * self.csa_entries(tokens) * (self.kv_entry_bytes + self.index_key_bytes)
        )
        return csa_bytes + self.n_hca * self.hca_entries(tokens) * self.kv_entry_bytes

    @property
    def window_bytes(self) -> int:
        """The sliding windows of all layers, full."""
        return self.n_layers * self.window_tokens * self.kv_entry_bytes

    def gpu_kv_bytes(self, tokens: int, resident_entries: int, keyed_entries: int) -> int:
        """Bytes on the GPU of one request under tiering.

        `resident_entries` and `keyed_entries` count (layer, entry) pairs over all CSA layers whose
        KV, and whose index key, lie on the GPU.
        """
        fixed = self.window_bytes + self.n_hca * self.hca_entries(tokens) * self.kv_entry_bytes
        return fixed + resident_entries * self.kv_entry_bytes + keyed_entries * self.index_key_bytes

    def host_kv_bytes(self, tokens: int) -> int:
        """Bytes of the host's mirror of one request: every CSA entry with its index key."""
        return self.n_csa * self.csa_entries(tokens) * (self.kv_entry_bytes + self.index_key_bytes)

    def slot_bytes(self, granularity: int, with_keys: bool = False) -> int:
        """Bytes that one layer's slot of `granularity` entries moves over the link; `with_keys`
        where index keys are tiered.
        """
        return granularity * (self.kv_entry_bytes + (self.index_key_bytes if with_keys else 0))

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

    @property
    def split_flops_per_token(self) -> float:
        """Operations of projections and experts on one token: 2 a parameter that multiplies it,
        which the embedding's do not.
        """
        return 2.0 * (self.active_parameters - self.vocabulary * self.hidden_size)

    def attention_flops_per_token(
        self, tokens: np.ndarray | float, scored_entries: np.ndarray | float, speedup: float = 1.0
    ) -> np.ndarray | float:
        """Operations of one token's attention at a context of `tokens`: over top-k, window and HCA
        entries, and the lightning indexer over `scored_entries` entries a CSA layer, whose products
        count 1 / `speedup`.
        """
        per_entry = 4 * self.n_heads * self.head_dim  # q.k and p.v
        attended = self.n_csa * np.minimum(self.index_topk, tokens / self.csa_rate)
        attended = attended + self.n_layers * self.window_tokens
        attended = attended + self.n_hca * (tokens / self.hca_rate)
        per_score = self.index_n_heads * (2 * self.index_head_dim + 2) / speedup
        return attended * per_entry + self.n_csa * scored_entries * per_score

    def flops_per_token(self, tokens: int, scored_entries: int) -> float:
        """Operations of one decode step of one request at a context of `tokens`."""
        return float(
            self.split_flops_per_token + self.attention_flops_per_token(tokens, scored_entries)
        )


def from_config(config: Mapping[str, Any], name: str = "") -> Geometry:
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
    return Geometry(
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
        max_positions=config.get("max_position_embeddings") or 2**20,
        float8_weights=(config.get("quantization_config") or {}).get("quant_method") == "fp8",
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


# What the two published config.json files (deepseek-ai/DeepSeek-V4-Flash,
# deepseek-ai/DeepSeek-V4-Pro) have in common.
_PUBLISHED = {
    "model_type": "deepseek_v4",
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "sliding_window": 128,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "o_lora_rank": 1024,
    "num_experts_per_tok": 6,
    "n_shared_experts": 1,
    "vocab_size": 129280,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}

_FLASH = _PUBLISHED | {
    "num_hidden_layers": 43,
    "compress_ratios": [0, 0] + [4, 128] * 20 + [4, 0],
    "hidden_size": 4096,
    "num_attention_heads": 64,
    "index_topk": 512,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "n_routed_experts": 256,
    "moe_intermediate_size": 2048,
}

_PRO = _PUBLISHED | {
    "num_hidden_layers": 61,
    "compress_ratios": [128, 128] + [4, 128] * 29 + [4, 0],
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "index_topk": 1024,
    "q_lora_rank": 1536,
    "o_groups": 16,
    "n_routed_experts": 384,
    "moe_intermediate_size": 3072,
}

PRESETS: dict[str, Geometry] = {
    "v4-flash": from_config(_FLASH, "v4-flash"),
    "v4-pro": from_config(_PRO, "v4-pro"),
}
