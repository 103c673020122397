"""The byte arithmetic of the tiny model."""

from fmsim.geometry import DeepseekV4Geometry


def plain_geometry(config) -> DeepseekV4Geometry:
    """The tiny model, with its unscaled float32 entries and keys."""

    class Plain(DeepseekV4Geometry):
        kv_entry_bytes, index_key_bytes = config.head_dim * 4, config.index_head_dim * 4

    zeros = dict.fromkeys(
        (
            "hidden_size",
            "n_heads",
            "rope_dim",
            "index_n_heads",
            "q_lora_rank",
            "o_lora_rank",
            "o_groups",
            "n_experts",
            "n_active_experts",
            "n_shared_experts",
            "expert_width",
            "vocabulary",
        ),
        0,
    )
    return Plain(
        name="tiny",
        layer_types=tuple(config.layer_types),
        head_dim=config.head_dim,
        window_tokens=config.sliding_window,
        csa_rate=4,
        hca_rate=8,
        index_topk=config.index_topk,
        index_head_dim=config.index_head_dim,
        **zeros,
    )
