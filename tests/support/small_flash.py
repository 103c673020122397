"""V4-Flash with few layers, experts and heads, for random weights on a CPU."""

from dataclasses import replace

from fmsim.geometry import PRESETS, DeepseekV4Geometry


def small_flash(layer_types: tuple[str, ...], vocabulary: int) -> DeepseekV4Geometry:
    """The published entries of 584 and keys of 132 bytes need heads of 512 and keys of 128; the
    rest is small.
    """
    return replace(
        PRESETS["v4-flash"],
        name="small",
        layer_types=layer_types,
        hidden_size=64,
        n_heads=2,
        index_n_heads=2,
        q_lora_rank=16,
        o_lora_rank=16,
        o_groups=2,
        n_experts=8,
        expert_width=16,
        vocabulary=vocabulary,
        index_topk=16,
    )
