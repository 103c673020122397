"""Random weights at a preset's shape: as many experts as fit, everything finite, the same every
time.

A tiny geometry stands for the preset.
"""

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="the model needs fmsim[model]")
pytest.importorskip("transformers", reason="the model needs fmsim[model]")

from fmsim.errors import FmsimError
from fmsim.exec.decode.engine import Batch
from fmsim.exec.decode.prompt import Prompt
from fmsim.exec.model.weights.synthetic import (
    experts_that_fit,
    model_bytes,
    synthetic_config,
    synthetic_model,
)
from fmsim.geometry import CSA, HCA, PRESETS, SLIDING
from fmsim.policies import registry

FLASH = PRESETS["v4-flash"]
TINY = replace(
    FLASH,
    name="tiny",
    layer_types=(SLIDING, SLIDING, CSA, HCA, CSA, HCA, CSA),
    hidden_size=64,
    n_heads=4,
    head_dim=32,
    rope_dim=8,
    index_topk=16,
    index_n_heads=4,
    index_head_dim=16,
    q_lora_rank=32,
    o_lora_rank=16,
    o_groups=2,
    n_experts=32,
    expert_width=16,
    vocabulary=256,
)
WIDE = replace(FLASH, float8_weights=False)


def held_bytes(model) -> int:
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def test_the_configuration_is_the_presets():
    config = synthetic_config(FLASH, 16)
    assert (config.num_hidden_layers, config.n_routed_experts, config.num_experts_per_tok) == (
        43,
        16,
        6,
    )
    assert config.mlp_layer_types == ["hash_moe"] * 3 + ["moe"] * 40
    assert config.layer_types.count(CSA) == 21 and config.layer_types.count(HCA) == 20
    assert config.rope_parameters["main"]["partial_rotary_factor"] * config.head_dim == 64


def test_bytes_are_the_parameters_of_the_model_card():
    """Two bytes a parameter in bfloat16; the geometry's count leaves out norms, biases,
    hyper-connections and id tables.
    """
    expert_bytes = model_bytes(WIDE, 7) - model_bytes(WIDE, 6)
    assert expert_bytes == pytest.approx(2 * FLASH.expert_parameters / FLASH.n_experts, rel=1e-3)
    assert model_bytes(WIDE, 256) == pytest.approx(
        2 * (FLASH.expert_parameters + FLASH.shared_parameters), rel=1e-3
    )


def test_published_weights_take_a_byte_where_they_are_float8():
    """Projections of the attention, the indexer's queries and all experts: counted here from the
    model card's widths.

    A scale is 4 bytes for 128 x 128.
    """
    attention = 4096 * (1024 + 512) + 1024 * 64 * 512 + 8192 * 4096 + 4096 * 8192
    float8 = 43 * (attention + (1 + 16) * 3 * 4096 * 2048) + 21 * 1024 * 64 * 128
    assert model_bytes(WIDE, 16) - model_bytes(FLASH, 16) == float8 - float8 * 4 // 128**2
    assert experts_that_fit(FLASH, 68 * 2**30) == 56 and experts_that_fit(WIDE, 68 * 2**30) == 24


def test_as_many_experts_as_fit():
    assert experts_that_fit(TINY, model_bytes(TINY, 16)) == 16
    assert experts_that_fit(TINY, model_bytes(TINY, 16) - 1) == 8
    assert (
        experts_that_fit(TINY, model_bytes(TINY, 8) - 1) == 7
    )  # no room for eight: as many as there are
    assert experts_that_fit(TINY, model_bytes(TINY, 6)) == 6
    assert experts_that_fit(TINY, 2**40) == 32
    with pytest.raises(FmsimError, match=r"with 6 experts a layer.* more than the 0\.00 GiB"):
        experts_that_fit(TINY, model_bytes(TINY, 6) - 1)
    shared_gib = model_bytes(FLASH, 6) / 2**30
    with pytest.raises(FmsimError, match=f"{shared_gib - 10:.2f} GiB more than the 10.00 GiB"):
        synthetic_model(FLASH, "cpu", 10 * 2**30)  # nothing was allocated


@pytest.mark.parametrize("float8", [True, False])
def test_a_decode_stays_finite_through_all_layers(float8):
    tiny = replace(TINY, float8_weights=float8)
    model, n_experts = synthetic_model(tiny, "cpu", model_bytes(tiny, 16))
    assert n_experts == 16 == len(model.model.layers[0].mlp.experts.down_proj) and held_bytes(
        model
    ) == model_bytes(tiny, 16)
    kinds = {
        name: tensor.dtype for name, tensor in model.state_dict().items() if "layers.2." in name
    }
    matrix = torch.float8_e4m3fn if float8 else torch.bfloat16
    for name in ("q_a_proj", "o_a_proj", "compressor.indexer.q_b_proj"):
        assert kinds[f"model.layers.2.self_attn.{name}.weight"] == matrix
    assert (
        kinds["model.layers.2.mlp.experts.gate_up_proj"]
        == kinds["model.layers.2.mlp.shared_experts.up_proj.weight"]
        == matrix
    )
    for name in ("kv_proj", "indexer.gate_proj", "indexer.scorer.weights_proj"):
        assert kinds[f"model.layers.2.self_attn.compressor.{name}.weight"] == torch.bfloat16
    assert (
        model.lm_head.weight.dtype == torch.bfloat16
        and model.model.layers[0].self_attn.sinks.dtype == torch.float32
    )
    hashed = [layer.mlp.gate.tid2eid for layer in model.model.layers if layer.mlp.gate.hashed]
    assert len(hashed) == 3 and not torch.equal(hashed[0], hashed[1])
    assert all(len(row.unique()) == 6 for row in hashed[0]) and hashed[0].max() == 15
    prompts = [
        Prompt(model, torch.randint(0, 256, (length,)).tolist(), 12) for length in (250, 121)
    ]
    batch = Batch(
        prompts, registry.build({"policy": "lru", "budget": "40 entries", "granularity": 4})
    )
    for _ in range(12):  # across the ends of CSA and HCA entries
        batch.generate(1)
        assert batch.logits.isfinite().all() and 0.1 < batch.logits.float().std() < 10


def test_the_same_seed_gives_the_same_weights():
    one, other, third = (
        synthetic_model(TINY, "cpu", model_bytes(TINY, 8), seed)[0].state_dict()
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert not torch.equal(one["lm_head.weight"], third["lm_head.weight"])
