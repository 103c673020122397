"""A model with every kind of layer, in sizes that an interpreter bears, and sequences for it."""

import torch
from transformers import DeepseekV4Config

from fmsim.exec.model.deepseek_v4 import DeepseekV4
from fmsim.exec.model.kinds import CSA, HCA, SLIDING
from fmsim.nano.config import initialise, nano_config

BATCH, LENGTH, TOP_K = 2, 128, 12


def tiny_nano(
    vocabulary: int = 64, kinds: tuple[str, ...] = (SLIDING, CSA, HCA, CSA)
) -> DeepseekV4:
    """Weights from a seed. Index heads are many enough that no two scores are alike."""
    fields = nano_config().to_dict() | {
        "vocab_size": vocabulary, "hidden_size": 32, "q_lora_rank": 16, "o_lora_rank": 8,
        "o_groups": 1, "moe_intermediate_size": 16, "head_dim": 16, "qk_rope_head_dim": 4,
        "num_attention_heads": 3, "index_head_dim": 16, "index_n_heads": 16,
        "index_topk": TOP_K, "sliding_window": 16, "hc_sinkhorn_iters": 3,
        "num_hidden_layers": len(kinds),
        "layer_types": list(kinds), "mlp_layer_types": ["hash_moe"] + ["moe"] * (len(kinds) - 1),
        "compress_rates": {CSA: 4, HCA: 32},
    }  # fmt: skip
    model = DeepseekV4(DeepseekV4Config.from_dict(fields))
    initialise(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def sequences(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and positions [BATCH, LENGTH]; positions jump in the middle."""
    generator = torch.Generator().manual_seed(seed)
    given = torch.randint(64, (BATCH, LENGTH), generator=generator)
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
    return given, positions + 1024 * (positions >= LENGTH // 2)
