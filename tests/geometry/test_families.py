"""Every family's bytes a token against the published layouts, and models described by a user."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmsim.errors import FmsimError
from fmsim.geometry import PRESETS, LayerSpec, from_config, geometry_named
from fmsim.geometry.named import deepseek_v4_named

GIB = 2**30
K = 1024

# Bytes that a token adds, and GiB of one request at 128K, 512K and 1M tokens: fp8 rows and index
# keys of each engine's layout, summed by hand over the published layers.
FIGURES = {
    "v3.2": (61 * (656 + 132), 5.87, 23.5, 46.9),
    "glm-5": (78 * (656 + 132), 7.5, 30.0, 60.0),
    "glm-5.1": (78 * (656 + 132), 7.5, 30.0, 60.0),
    "glm-5.2": (78 * 656 + 21 * 132, 6.58, 26.3, 52.7),
    "glm-5.3": (78 * 656 + 21 * 132, 6.58, 26.3, 52.7),
    "v4-flash": (3850.25, 0.47, 1.88, 3.76),
    "v4-pro": (5511.4375, 0.67, 2.69, 5.38),
    "v4.1-flash": (890, 0.11, 0.43, 0.87),
    "v4.1-flash-hopper": (1630, 0.20, 0.80, 1.59),
    "minimax-m3": (60 * 2048 + 57 * 256, 16.8, 67.1, 134.2),
}


def test_every_preset_has_its_figures_here():
    assert set(FIGURES) == set(PRESETS)


@pytest.mark.parametrize("name", FIGURES)
def test_bytes_of_a_token_and_of_a_request(name):
    geometry = PRESETS[name]
    per_token, *gib = FIGURES[name]
    assert geometry.bytes_per_token() == per_token
    for tokens, expected in zip((128 * K, 512 * K, K * K), gib, strict=True):
        found = geometry.full_kv_bytes(tokens) / GIB
        assert found == pytest.approx(expected, abs=0.006 if expected < 10 else 0.06)


@pytest.mark.parametrize(
    ("name", "total_b", "active_b"),
    [("v3.2", 671.9, 37.5), ("glm-5", 743.9, 40.8), ("glm-5.1", 743.9, 40.8)],
)
def test_parameters_match_the_model_cards(name, total_b, active_b):
    """Cards count what a token uses without the embedding table."""
    geometry = PRESETS[name]
    assert geometry.parameters / 1e9 == pytest.approx(total_b, abs=0.1)
    assert geometry.active_parameters / 1e9 == pytest.approx(active_b, rel=0.03)
    assert geometry.expert_parameters + geometry.shared_parameters == geometry.parameters


def test_glm_5_2_selects_in_21_layers_and_the_others_follow():
    geometry = PRESETS["glm-5.2"]
    own = [n for n, layer in enumerate(geometry.layers) if layer.shares is None]
    assert own == [0, 1, 2, *range(6, 75, 4)] and len(own) == 21
    assert geometry.n_keyed == 21 and geometry.n_csa == 78
    groups = geometry.selection_map()
    assert groups[:8] == (0, 1, 2, 2, 2, 2, 3, 3) and max(groups) == 20


def test_v4_1_makes_kv_in_four_layers_and_selects_in_eight():
    layers = PRESETS["v4.1-flash"].layers
    assert [n for n, layer in enumerate(layers) if layer.entry_bytes] == [2, 8, 14, 20]
    own = [n for n, one in enumerate(layers) if one.kind == "sparse" and one.shares is None]
    assert own == [2, 8, 14, 20, 24, 28, 32, 36]
    geometry = PRESETS["v4.1-flash"]
    with pytest.raises(FmsimError, match="entries of 1 and 2 tokens"):
        geometry.check_replayable()
    # three stores of a token pair and one of single tokens, read by 3 + 5 selections
    assert geometry.csa_entries(1001) == (3 * 500 + 1001) // 4
    assert geometry.n_selecting == 38 and geometry.selections_of_a_store == 2
    assert geometry.csa_rate == 1.6
    experts = 40 * 384 * 3 * 5120 * 2304
    assert geometry.expert_parameters == experts < geometry.parameters


def test_grouped_query_kv_is_split_over_gpus_and_a_latent_is_not():
    m3 = PRESETS["minimax-m3"]
    for gpus, parts in ((1, 1), (2, 2), (4, 4), (8, 4)):
        held = m3.on_gpu(gpus)
        # index keys are one head's, so every GPU holds them all
        assert held.bytes_per_token() == 60 * 2048 / parts + 57 * 256
        assert held.n_heads == 64 / parts and held.name == m3.name
    assert PRESETS["v3.2"].on_gpu(8) is PRESETS["v3.2"]
    assert PRESETS["v4-flash"].on_gpu(8) is PRESETS["v4-flash"]


@given(tokens=st.integers(0, 2_000_000), name=st.sampled_from(["v3.2", "glm-5.2", "minimax-m3"]))
def test_everything_resident_is_the_full_cache(tokens, name):
    geometry = PRESETS[name]
    on_gpu = geometry.full_gpu_bytes(tokens)
    assert on_gpu == geometry.full_kv_bytes(tokens) + geometry.window_bytes


def test_rows_in_bfloat16_are_those_of_the_hisparse_paper(tmp_path):
    """GLM-5.1 with bf16 rows: 13.09 GB at 128K there (arXiv numbers in decimal GB)."""
    (tmp_path / "glm.yaml").write_text(
        """
hidden_size: 6144
n_heads: 64
head_dim: 544
parameters: 743900000000
layers:
- {repeat: 78, kind: sparse, entry_tokens: 1, entry_bytes: 1152, key_bytes: 132, topk: 2048}
"""
    )
    geometry = geometry_named(str(tmp_path / "glm.yaml"))
    assert geometry.full_kv_bytes(128 * K) / 1e9 == pytest.approx(13.09, rel=0.005)
    assert geometry.name == "glm"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "other"}, "layers.0.kind"),
        ({"entry_tokens": 0}, "entry_tokens"),
        ({"topk": 0}, "topk"),
        ({"kv_of": 0}, "entry_bytes, or kv_of"),
        ({"shares": 3}, "not an earlier layer"),
        ({"repeat": 0}, "repeat is 0"),
        ({"size": 1}, "layers.0.size"),
    ],
)
def test_a_wrong_description_is_refused_by_name(change, says, tmp_path):
    layer = {"kind": "sparse", "entry_tokens": 1, "entry_bytes": 8, "key_bytes": 2, "topk": 4}
    described = {"hidden_size": 8, "n_heads": 1, "head_dim": 8, "parameters": 100}
    path = tmp_path / "m.yaml"
    path.write_text(json.dumps(described | {"layers": [layer]}))
    assert geometry_named(str(path)).bytes_per_token() == 10
    path.write_text(json.dumps(described | {"layers": [layer | change]}))
    with pytest.raises(FmsimError, match=says):
        geometry_named(str(path))


def test_a_published_config_is_read(tmp_path):
    preset = Path("fmsim/geometry/presets/glm-5.2.json")
    config = json.loads(preset.read_text())["config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert geometry_named(str(tmp_path)).layers == PRESETS["glm-5.2"].layers
    types = ["full"] * 3 + ["shared"] * 75
    assert from_config(config | {"indexer_types": types}).n_keyed == 3
    for change, says in [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"index_topk": None}, "index_topk"),
        ({"indexer_types": ["shared"] * 78}, "full first"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
    ]:
        with pytest.raises(ValueError, match=says):
            from_config(config | change)


def test_the_gpu_backend_says_what_it_decodes():
    assert deepseek_v4_named("v4-pro").n_csa == 30
    with pytest.raises(FmsimError, match=r"v3.2 is a DSA model, and the GPU backend"):
        deepseek_v4_named("v3.2")


def test_a_context_beyond_the_positions_is_refused():
    PRESETS["v3.2"].check_context(163_840, "trace")
    with pytest.raises(FmsimError, match="163,841 tokens.*--beyond-positions"):
        PRESETS["v3.2"].check_context(163_841, "trace")


def test_layers_share_with_earlier_ones_only():
    window = LayerSpec(kind="window", window_tokens=4, window_bytes=2)
    assert window.bytes_per_token() == 0 and not window.pages


V41_CONFIG = {
    "model_type": "deepseek_v41",
    "text_config": {
        "num_hidden_layers": 40,
        "hidden_size": 5120,
        "num_attention_heads": 64,
        "head_dim": 512,
        "q_lora_rank": 1280,
        "o_lora_rank": 1024,
        "o_groups": 8,
        "compress_ratios": [0, 0, *[2] * 18, *[1] * 20],
        "kv_source_layer_ids": [2, 8, 14, 20],
        "index_source_layer_ids": [2, 8, 14, 20, 24, 28, 32, 36],
        "index_topk": 512,
        "index_n_heads": 32,
        "index_head_dim": 128,
        "sliding_window": 128,
        "n_routed_experts": 384,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 2304,
        "engram_num_embeddings": [766_000_000, 766_000_000],
        "engram_head_dim": 128,
        "vocab_size": 129_280,
        "max_position_embeddings": 1_048_576,
    },
}


def test_a_config_of_v4_1_is_the_preset(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(V41_CONFIG))
    geometry, preset = geometry_named(str(tmp_path)), PRESETS["v4.1-flash"]
    assert geometry.layers == preset.layers and geometry.bytes_per_token() == 890
    assert geometry.expert_parameters == preset.expert_parameters
    assert geometry.parameters == pytest.approx(preset.parameters, rel=0.01)
    assert geometry.active_parameters == pytest.approx(preset.active_parameters, rel=0.15)
    assert geometry.table_bytes == pytest.approx(preset.table_bytes, rel=0.01)
    wrong = V41_CONFIG["text_config"] | {"index_source_layer_ids": [2, 8]}
    (tmp_path / "config.json").write_text(json.dumps(V41_CONFIG | {"text_config": wrong}))
    with pytest.raises(FmsimError, match="kv_source_layer_ids"):
        geometry_named(str(tmp_path))
