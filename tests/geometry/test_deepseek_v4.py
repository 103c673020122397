"""The byte arithmetic against published figures and the published totals of parameters."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmsim.geometry import CSA, HCA, PRESETS, from_config

GIB = 2**30
FLASH = PRESETS["v4-flash"]

# FlashMemory (arXiv 2606.09079): mean context in K tokens (K = 1024), full-cache footprint per
# request in GiB
PUBLISHED = [
    ("LongBench-v2 S", 46, 0.17),
    ("LongBench-v2 M", 179, 0.65),
    ("LongBench-v2 L", 493, 1.80),
    ("LongMemEval S", 125, 0.46),
    ("LongMemEval M", 500, 1.82),
    ("RULER 64K", 64, 0.23),
    ("RULER 128K", 128, 0.47),
    ("RULER 256K", 256, 0.94),
    ("RULER 512K", 512, 1.87),
]


@pytest.mark.parametrize(("suite", "k_tokens", "gib"), PUBLISHED)
def test_full_footprint_is_the_published_one(suite, k_tokens, gib):
    tolerance = 0.025 if k_tokens == 64 else 0.015
    assert FLASH.full_kv_bytes(k_tokens * 1024) / GIB == pytest.approx(gib, rel=tolerance), suite


def test_cache_sizes_are_those_of_the_deployed_engine():
    assert (FLASH.kv_entry_bytes, FLASH.index_key_bytes) == (584, 132)
    assert FLASH.slot_bytes(64) == 37_376
    assert (FLASH.n_csa, FLASH.n_hca, FLASH.n_layers) == (21, 20, 43)
    assert [i for i, kind in enumerate(FLASH.layer_types) if kind == CSA] == list(range(2, 43, 2))


def test_layers_of_v4_pro():
    pro = PRESETS["v4-pro"]
    assert (pro.n_csa, pro.n_hca, pro.n_layers) == (30, 31, 61)
    assert pro.layer_types[:4] == (HCA, HCA, CSA, HCA)


@pytest.mark.parametrize(
    ("name", "total_b", "active_b"), [("v4-flash", 284, 13), ("v4-pro", 1600, 49)]
)
def test_parameters_match_the_model_cards(name, total_b, active_b):
    geometry = PRESETS[name]
    total = geometry.expert_parameters + geometry.shared_parameters
    assert total / 1e9 == pytest.approx(total_b, rel=0.02)
    assert geometry.active_parameters / 1e9 == pytest.approx(active_b, rel=0.06)


def test_flops_at_512k_follow_the_published_formula():
    tokens = 512 * 1024
    scoring = 131_072 * 21 * 64 * (2 * 128 + 2)
    hca = 20 * (tokens // 128) * 64 * 512 * 4
    assert FLASH.flops_per_token(tokens, tokens // 4) == pytest.approx(
        26.5e9 + 1.41e9 + scoring + hca, rel=0.03
    )


def test_a_transformers_config_gives_the_same_geometry():
    config = {
        "model_type": "deepseek_v4",
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", CSA, HCA],
        "hidden_size": 384,
        "compress_rates": {CSA: 4, HCA: 128},
        "num_attention_heads": 6,
        "head_dim": 64,
        "partial_rotary_factor": 0.25,
        "sliding_window": 128,
        "index_topk": 64,
        "index_n_heads": 4,
        "index_head_dim": 32,
        "q_lora_rank": 192,
        "o_lora_rank": 160,
        "o_groups": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 160,
        "vocab_size": 4096,
    }
    nano = from_config(config)
    assert (nano.kv_entry_bytes, nano.index_key_bytes) == (48 + 2 * 16 + 8, 36)
    assert nano.full_kv_bytes(1024) == 256 * (88 + 36) + 8 * 88


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"head_dim": None}, "head_dim"),
        ({"compress_ratios": [0, 4]}, "3 layers"),
        ({"compress_ratios": [0, 128, 128]}, "no CSA layer"),
        ({"compress_ratios": [0, 4, 64]}, "64"),
    ],
)
def test_a_wrong_config_is_refused_by_name(change, says):
    config = {
        "model_type": "deepseek_v4",
        "num_hidden_layers": 3,
        "compress_ratios": [0, 4, 128],
        "hidden_size": 64,
        "head_dim": 64,
        "num_attention_heads": 2,
        "sliding_window": 128,
        "index_topk": 64,
        "index_n_heads": 4,
        "index_head_dim": 32,
        "q_lora_rank": 32,
        "o_lora_rank": 32,
        "o_groups": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "vocab_size": 256,
    }
    from_config(config)
    with pytest.raises(ValueError, match=says):
        from_config(config | change)


@given(tokens=st.integers(0, 2_000_000), more=st.integers(0, 10_000))
def test_everything_resident_is_the_full_cache_and_its_windows(tokens, more):
    on_gpu = FLASH.full_gpu_bytes(tokens)
    assert on_gpu == FLASH.full_kv_bytes(tokens) + FLASH.window_bytes
    assert FLASH.full_kv_bytes(tokens + more) >= FLASH.full_kv_bytes(tokens)
    assert FLASH.host_kv_bytes(tokens) <= FLASH.full_kv_bytes(tokens)
