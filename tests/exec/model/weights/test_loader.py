"""Quantised directories: what is loaded is what the scales and codes say, worked out here element
by element.
"""

import json

import pytest

torch = pytest.importorskip("torch", reason="the loader needs fmsim[model]")
transformers = pytest.importorskip("transformers", reason="the loader needs fmsim[model]")
from kernel_pools import relative_error
from safetensors.torch import load_file, save_file
from tiny_model import CSA, HCA, SLIDING, oracle

from fmsim.errors import FmsimError
from fmsim.exec.kernels.weights import quantise
from fmsim.exec.model.weights.loader import dequantise, load_model

FOUR_BIT = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def test_float8_blocks_by_hand():
    codes = torch.tensor([[1.0, -2.0, 3.0], [4.0, 5.0, -6.0]]).to(torch.float8_e4m3fn)
    scales = torch.tensor([[2.0, 0.5]])
    assert dequantise(codes, scales, (2, 2), "w").tolist() == [[2.0, -4.0, 1.5], [8.0, 10.0, -3.0]]


def test_four_bit_pairs_by_hand():
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 0], codes[0, 16] = 0x2F, 0x71  # -6 then 1; in the second block 0.5 then 6
    scales = torch.tensor([[128, 126]], dtype=torch.uint8)  # 2 and a half
    row = dequantise(codes.view(torch.int8), scales, (128, 128), "w")[0]
    assert row[:3].tolist() == [-12.0, 2.0, 0.0] and row[32:35].tolist() == [0.25, 3.0, 0.0]


def quantised(directory, official: bool):
    """A saved tiny model with float8 projections and 4-bit experts in two shards; returns the
    weights it should load as.
    """
    reference = oracle(layer_types=[SLIDING, CSA, HCA])
    reference.save_pretrained(directory)
    stored, shards, expected = load_file(directory / "model.safetensors"), ({}, {}), {}
    for number, (name, tensor) in enumerate(stored.items()):
        shard = shards[number % 2]
        if ".experts." in name:
            codes = torch.randint(
                0, 16, tensor.shape, generator=torch.Generator().manual_seed(number)
            )
            exponents = torch.randint(
                120, 130, (tensor.shape[0], -(-tensor.shape[1] // 32)), dtype=torch.uint8
            )
            values = torch.tensor(FOUR_BIT + [-v for v in FOUR_BIT])[codes]
            expected[name] = (
                values
                * torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)[:, : tensor.shape[1]]
            )
            shard[name] = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8).view(torch.int8)
            shards[1 - number % 2][name.removesuffix("weight") + "scale"] = exponents.view(
                torch.float8_e8m0fnu
            )
        elif name.endswith(("wkv.weight", "wo_b.weight")) and ".attn." in name:
            scale = torch.rand(-(-tensor.shape[0] // 16), -(-tensor.shape[1] // 16)) + 0.5
            wide = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)[
                : tensor.shape[0], : tensor.shape[1]
            ]
            shard[name] = (tensor / wide).to(torch.float8_e4m3fn)
            expected[name] = shard[name].float() * wide
            shards[1 - number % 2][
                name.removesuffix("weight") + "scale" if official else name + "_scale_inv"
            ] = scale
        else:
            shard[name] = expected[name] = tensor
    (directory / "model.safetensors").unlink()
    for number, shard in enumerate(shards):
        save_file(shard, directory / f"part-{number}.safetensors")
    weight_map = {
        name: f"part-{number}.safetensors" for number, shard in enumerate(shards) for name in shard
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (directory / "config.json").write_text(json.dumps(config))
    return expected


@pytest.mark.parametrize("official", [False, True])
def test_a_quantised_directory_loads_as_its_widened_twin(tmp_path, official):
    expected = quantised(tmp_path / "small", official)
    widened = tmp_path / "wide"
    widened.mkdir()
    config = json.loads((tmp_path / "small/config.json").read_text())
    config.pop("quantization_config")
    (widened / "config.json").write_text(json.dumps(config))
    save_file(
        {name: tensor.contiguous() for name, tensor in expected.items()},
        widened / "model.safetensors",
    )
    small, wide = load_model(tmp_path / "small").state_dict(), load_model(widened).state_dict()
    assert any(
        "float8" in str(t.dtype) for t in load_file(tmp_path / "small/part-0.safetensors").values()
    )
    for name, tensor in wide.items():
        assert torch.equal(small[name], tensor), name


RELEASED = (
    "attn.wq_a.weight",
    "attn.wq_b.weight",
    "attn.wkv.weight",
    "attn.wo_a.weight",
    "attn.wo_b.weight",
    "indexer.wq_b.weight",
)


def released(directory, experts_width: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A saved tiny model with the release's float8 weights and scales, its experts float8 too;
    returns those by name.
    """
    oracle(
        layer_types=[SLIDING, CSA, HCA], moe_intermediate_size=experts_width, n_routed_experts=12
    ).save_pretrained(directory)
    stored = load_file(directory / "model.safetensors")
    float8 = {
        name: quantise(tensor)
        for name, tensor in stored.items()
        if name.endswith(RELEASED) or "experts." in name
    }
    for name, (codes, scale) in float8.items():
        stored |= {name: codes, name.removesuffix("weight") + "scale": scale}
    save_file(stored, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}
    }
    (directory / "config.json").write_text(json.dumps(config))
    return float8


@torch.inference_mode()
def test_in_bfloat16_the_releases_float8_stays(tmp_path):
    float8 = released(tmp_path, 128)
    assert len(float8) == 3 * (5 + 3 * 12 + 3) + 1
    model = load_model(tmp_path, dtype=torch.bfloat16)
    state, attention, experts = model.state_dict(), "layers.1.self_attn", "layers.1.mlp.experts"
    for name, held in (
        ("wq_a", "q_a_proj"),
        ("wkv", "kv_proj"),
        ("wo_a", "o_a_proj"),
        ("indexer.wq_b", "compressor.indexer.q_b_proj"),
    ):
        codes, scale = float8[f"model.layers.1.attn.{name}.weight"]
        assert torch.equal(
            state[f"model.{attention}.{held}.weight"].view(torch.uint8), codes.view(torch.uint8)
        )
        assert torch.equal(state[f"model.{attention}.{held}.scale"], scale)
    for number in (0, 11):
        gate, up, down = (
            float8[f"model.layers.1.ffn.experts.{number}.w{part}.weight"] for part in "132"
        )
        for place in (0, 1):
            stacked = torch.cat((gate[place], up[place]))
            for held, stored in (("gate_up", stacked), ("down", down[place])):
                assert torch.equal(
                    state[f"model.{experts}.{held}_{('proj', 'scale')[place]}"][number].float(),
                    stored.float(),
                )
    assert (
        state["model.layers.1.self_attn.compressor.kv_proj.weight"].dtype
        == state["lm_head.weight"].dtype
        == torch.bfloat16
    )
    assert (
        sum(tensor.dtype == torch.float8_e4m3fn for tensor in state.values()) == 3 * (5 + 3 + 2) + 1
    )
    tokens = torch.randint(0, 64, (1, 20))
    assert (
        relative_error(model(tokens)[0], load_model(tmp_path)(tokens)[0]) < 0.05
    )  # choices that are close may fall otherwise
    assert not any(
        "float8" in str(tensor.dtype) for tensor in load_model(tmp_path).state_dict().values()
    )


@torch.inference_mode()
def test_float8_is_widened_where_one_asks(tmp_path):
    """A model that reads a prompt at once: the float32 model's weights, rounded to bfloat16."""
    released(tmp_path, 128)
    wide = load_model(tmp_path, dtype=torch.bfloat16, widen=True).state_dict()
    exact = load_model(tmp_path).state_dict()
    assert wide.keys() == exact.keys()
    for name, tensor in wide.items():
        assert tensor.dtype != torch.float8_e4m3fn, name
        assert torch.equal(tensor, exact[name].to(tensor.dtype)), name
    assert wide["model.layers.1.self_attn.q_a_proj.weight"].dtype == torch.bfloat16


def test_what_has_other_blocks_is_widened_in_bfloat16_too(tmp_path):
    """Scales for 16 x 16; and experts whose gate ends within a block, so that the scales of gate
    and up do not stack.
    """
    quantised(tmp_path / "small", official=True)
    assert not any(
        "float8" in str(tensor.dtype)
        for tensor in load_model(tmp_path / "small", dtype=torch.bfloat16).state_dict().values()
    )
    released(tmp_path / "narrow", 16)
    state = load_model(tmp_path / "narrow", dtype=torch.bfloat16).state_dict()
    assert {
        name.split(".mlp.")[1]
        for name, tensor in state.items()
        if ".mlp." in name and "float8" in str(tensor.dtype)
    } == {f"shared_experts.{part}_proj.weight" for part in ("gate", "up", "down")}


def test_float8_of_a_wrong_shape_is_named(tmp_path):
    released(tmp_path, 128)
    stored, name = load_file(tmp_path / "model.safetensors"), "model.layers.1.attn.wkv.weight"
    save_file(
        stored | {name.replace("weight", "scale"): torch.ones(2, 1)}, tmp_path / "model.safetensors"
    )
    with pytest.raises(
        FmsimError, match=rf"{name}: its scales are \[2, 1\], blocks of 128 x 128 need \[1, 1\]"
    ):
        load_model(tmp_path, dtype=torch.bfloat16)
    save_file(stored | {name: stored[name][:8].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(FmsimError, match=rf"{name} is \[8, 32\], config.json asks for \[16, 32\]"):
        load_model(tmp_path, dtype=torch.bfloat16)


def test_what_cannot_be_loaded_is_named(tmp_path):
    quantised(tmp_path, official=True)
    shard = load_file(tmp_path / "part-0.safetensors")
    lost = next(name for name in shard if name.endswith(".scale") and ".experts." in name)
    shard.pop(lost)
    save_file(shard, tmp_path / "part-0.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    places.pop(lost)
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(FmsimError, match="has no scales beside it.*scale"):
        load_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "gptq"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FmsimError, match="config.json: quantization_config: quant_method 'gptq'"):
        load_model(tmp_path)


def test_in_bfloat16_everything_has_the_type_that_transformers_gives_it(tmp_path):
    oracle(layer_types=[SLIDING, CSA, HCA]).save_pretrained(tmp_path)
    expected = transformers.DeepseekV4ForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16
    ).state_dict()
    model = load_model(tmp_path, dtype=torch.bfloat16)
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == {
        name: tensor.dtype for name, tensor in expected.items()
    }
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert model.model.layers[1].self_attn.inv_freq.dtype == torch.float32
    assert model(torch.randint(0, 64, (1, 20)))[0].isfinite().all()


def remade(directory, changed, dropped=()):
    """Tensors of the saved model in ``directory`` changed, others left out; one file."""
    path = directory / "model.safetensors"
    stored = load_file(path)
    kept = {name: tensor for name, tensor in stored.items() if name not in dropped}
    save_file({**kept, **changed}, path)
    return stored


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e4m3fn])
def test_every_float8_with_scales_is_what_they_say(dtype, tmp_path):
    oracle(layer_types=[SLIDING, CSA]).save_pretrained(tmp_path)
    name = "model.layers.0.attn.wkv.weight"
    weight = load_file(tmp_path / "model.safetensors")[name]
    scale = torch.tensor([[0.25]])
    codes = (weight / scale).to(dtype)
    remade(tmp_path, {name: codes, name.replace("weight", "scale"): scale})
    loaded = load_model(tmp_path).state_dict()["model.layers.0.self_attn.kv_proj.weight"]
    assert torch.equal(loaded, codes.float() * 0.25)
    remade(tmp_path, {}, [name.replace("weight", "scale")])
    with pytest.raises(FmsimError, match="has no scales beside it"):
        load_model(tmp_path)


def test_scales_beside_floats_and_unknown_types_are_refused(tmp_path):
    oracle(layer_types=[SLIDING, CSA]).save_pretrained(tmp_path)
    name = "model.layers.0.attn.wkv.weight"
    scale = name.replace("weight", "scale")
    stored = remade(tmp_path, {scale: torch.ones(1, 1)})
    with pytest.raises(FmsimError, match=f"{name} is float32 with scales beside it"):
        load_model(tmp_path)
    remade(tmp_path, {name: stored[name].to(torch.int16)}, [scale])
    with pytest.raises(FmsimError, match=f"{name} is int16"):
        load_model(tmp_path)


def test_the_index_says_which_copy_of_a_tensor_counts(tmp_path):
    reference = oracle(layer_types=[SLIDING, CSA])
    reference.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    name = "model.layers.0.attn.wkv.weight"
    first = {key: tensor for key, tensor in stored.items() if key != name}
    save_file({**first, name: torch.zeros_like(stored[name])}, tmp_path / "a.safetensors")
    save_file({name: stored[name]}, tmp_path / "b.safetensors")
    places = dict.fromkeys(first, "a.safetensors") | {name: "b.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    ids = torch.randint(0, 64, (1, 30))
    with torch.no_grad():
        torch.testing.assert_close(
            load_model(tmp_path)(ids)[0], reference(ids).logits, atol=1e-4, rtol=0
        )


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {"a": "../b.safetensors"}}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
    ],
)
def test_a_broken_or_foreign_index_is_told(text, tmp_path):
    oracle(layer_types=[SLIDING, CSA]).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(FmsimError, match=r"index\.json: (is no index|not valid JSON)"):
        load_model(tmp_path)


def test_an_index_that_names_what_is_not_there(tmp_path):
    oracle(layer_types=[SLIDING, CSA]).save_pretrained(tmp_path)
    places = dict.fromkeys(load_file(tmp_path / "model.safetensors"), "model.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places | {"extra": "model.safetensors"}}))
    with pytest.raises(FmsimError, match="holds extra, which it does not"):
        load_model(tmp_path)
    index.write_text(json.dumps({"weight_map": places | {"extra": "gone.safetensors"}}))
    with pytest.raises(FmsimError, match=r"gone\.safetensors: no such file"):
        load_model(tmp_path)


@torch.no_grad()
def test_tied_embeddings_fused_experts_and_extra_layers(tmp_path):
    reference = oracle(layer_types=[SLIDING, CSA], tie_word_embeddings=True)
    reference.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    state = reference.state_dict()
    fused = {name: state[name].clone() for name in state if name.endswith("experts.down_proj")}
    assert len(fused) == 2
    single = [name for name in stored if ".experts." in name and name.endswith("w2.weight")]
    extra = {"mtp.0.norm.weight": torch.ones(3), "model.layers.2.attn.wkv.weight": torch.ones(3, 3)}
    remade(tmp_path, fused | extra, [*single, "head.weight", "lm_head.weight"])
    ids = torch.randint(0, 64, (1, 30))
    torch.testing.assert_close(
        load_model(tmp_path)(ids)[0], reference(ids).logits, atol=1e-4, rtol=0
    )
