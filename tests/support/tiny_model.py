"""A tiny DeepSeek-V4 with random weights: transformers' own, which is the oracle, and fmsim's with
the same weights.
"""

import torch
import transformers
from hypothesis import strategies as st

from fmsim.exec.model.deepseek_v4 import DeepseekV4
from fmsim.exec.model.kinds import CSA, HCA, SLIDING

# Many indexer heads: with few, relu gives exact zeros, and then ties decide which entries are
# selected.
TINY = dict(
    vocab_size=64,
    hidden_size=32,
    moe_intermediate_size=16,
    num_attention_heads=4,
    head_dim=16,
    q_lora_rank=16,
    num_experts_per_tok=2,
    n_routed_experts=4,
    o_groups=2,
    o_lora_rank=8,
    index_n_heads=24,
    index_head_dim=16,
    index_topk=4,
    hc_mult=2,
    sliding_window=8,
    hc_sinkhorn_iters=3,
    num_hash_layers=1,
    partial_rotary_factor=0.5,
    compress_rates={CSA: 4, HCA: 8},
    max_position_embeddings=4096,
)


def oracle(seed: int = 0, **changes):
    fields = {**TINY, **changes}
    fields["num_hidden_layers"] = len(fields["layer_types"])
    torch.manual_seed(seed)
    model = transformers.DeepseekV4ForCausalLM(transformers.DeepseekV4Config(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):
                first = torch.randint(0, fields["n_routed_experts"], buffer.shape[:1])
                buffer.copy_(
                    (first[:, None] + torch.arange(buffer.shape[1])) % fields["n_routed_experts"]
                )
            if name.endswith("e_score_correction_bias"):
                buffer.normal_()
    return model


def ours(reference) -> DeepseekV4:
    model = DeepseekV4(reference.config).eval()
    model.load_state_dict(reference.state_dict())
    return model


kinds = st.sampled_from([SLIDING, CSA, HCA])
