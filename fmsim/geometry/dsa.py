"""The DeepSeek sparse attention (DSA) family: DeepSeek-V3.2 and GLM-5 to GLM-5.3.

Every layer keeps one latent a token for all heads, and an indexer selects tokens. In GLM-5.2 and
5.3 only some layers run the indexer; the others use the last one's selection.

Sources: the models' published `config.json`; the cache rows of the deployed engines (FlashMLA's
fp8 row: 512 fp8 values, four float32 scales, 64 rotated bf16 values; index key: 128 fp8 values and
a float32 scale).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fmsim.geometry.described import Described, from_description
from fmsim.geometry.fields import need, weight_bytes_of

MODEL_TYPES = ("deepseek_v32", "glm_moe_dsa")
SCALE_BLOCK = 128  # fp8 values that share one float32 scale


def from_config(config: Mapping[str, Any], name: str = "") -> Described:
    """The geometry of a DSA `config.json`; ValueError names what is missing or not known."""
    n_layers = need(config, "num_hidden_layers")
    index_width = need(config, "index_head_dim")
    latent = need(config, "kv_lora_rank")
    rope = need(config, "qk_rope_head_dim")
    row = {
        "kind": "sparse",
        "entry_tokens": 1,
        "entry_bytes": latent + 4 * -(-latent // SCALE_BLOCK) + 2 * rope,
        "topk": need(config, "index_topk"),
    }
    layers, source = [], 0
    for number, runs in enumerate(runs_an_indexer(config, n_layers)):
        if runs:
            source = number
            layers.append(row | {"key_bytes": index_width + 4})
        else:
            layers.append(row | {"shares": source})
    experts, shared, active = parameters(config, [layer.get("shares") is None for layer in layers])
    return from_description(
        {
            "family": "DSA",
            "layers": layers,
            "hidden_size": need(config, "hidden_size"),
            "n_heads": need(config, "num_attention_heads"),
            "head_dim": (latent + rope + latent) // 2,  # keys carry the rotated part, values not
            "index_n_heads": need(config, "index_n_heads"),
            "index_head_dim": index_width,
            "dense_mlps": min(need(config, "first_k_dense_replace"), n_layers),
            "vocabulary": need(config, "vocab_size"),
            "parameters": experts + shared,
            "expert_parameters": experts,
            "parameters_of_a_token": active,
            "weights_total_bytes": weight_bytes_of(config, experts + shared),
            "max_positions": config.get("max_position_embeddings"),
        },
        name,
    )


def runs_an_indexer(config: Mapping[str, Any], n_layers: int) -> list[bool]:
    """For each layer, whether it selects by itself: `indexer_types`, `index_topk_pattern`, or every
    `index_topk_freq`-th layer after `index_skip_topk_offset`.
    """
    types = config.get("indexer_types") or config.get("index_topk_pattern")
    if types is None:
        every = max(config.get("index_topk_freq") or 1, 1)
        offset = config.get("index_skip_topk_offset", 2)
        return [max(number - offset + 1, 0) % every == 0 for number in range(n_layers)]
    words = {"full": True, "F": True, "shared": False, "S": False}
    if len(types) < n_layers or not set(types) <= set(words) or not words[types[0]]:
        raise ValueError(
            f"'indexer_types' must say full or shared for each of {n_layers} layers, full first"
        )
    return [words[kind] for kind in types[:n_layers]]


def parameters(config: Mapping[str, Any], indexing: list[bool]) -> tuple[int, int, int]:
    """(routed experts, everything else, what one token uses), the head and embedding counted."""
    hidden, heads = need(config, "hidden_size"), need(config, "num_attention_heads")
    q_rank, latent = need(config, "q_lora_rank"), need(config, "kv_lora_rank")
    rope, nope = need(config, "qk_rope_head_dim"), need(config, "qk_nope_head_dim")
    value = need(config, "v_head_dim")
    attention = hidden * q_rank + q_rank * heads * (nope + rope) + hidden * (latent + rope)
    attention += latent * heads * (nope + value) + heads * value * hidden
    index_width, index_heads = need(config, "index_head_dim"), need(config, "index_n_heads")
    indexer = q_rank * index_heads * index_width + hidden * (index_width + index_heads)
    n_dense = min(need(config, "first_k_dense_replace"), len(indexing))
    n_sparse = len(indexing) - n_dense
    one_expert = 3 * hidden * need(config, "moe_intermediate_size")
    n_experts = need(config, "n_routed_experts")
    shared = len(indexing) * attention + sum(indexing) * indexer
    shared += n_dense * 3 * hidden * need(config, "intermediate_size")
    shared += n_sparse * (config.get("n_shared_experts", 1) * one_expert + hidden * n_experts)
    shared += 2 * need(config, "vocab_size") * hidden
    active = shared + n_sparse * need(config, "num_experts_per_tok") * one_expert
    return n_sparse * n_experts * one_expert, shared, active
