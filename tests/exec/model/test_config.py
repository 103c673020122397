"""Any configuration is computed as transformers computes it, or refused by the name of a field."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the model needs fmsim[model]")
transformers = pytest.importorskip("transformers", reason="transformers is the oracle")

from tiny_indexer import lookahead
from tiny_model import CSA, HCA, SLIDING, kinds, oracle

from fmsim.errors import FmsimError
from fmsim.exec.decode.engine import Batch, Engine
from fmsim.exec.decode.prompt import Prompt
from fmsim.exec.model.config import read_config
from fmsim.exec.model.weights.loader import load_model
from fmsim.policies import registry

YARN = {
    "type": "yarn",
    "factor": 16,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
}
LAYERS = [SLIDING, CSA, HCA, CSA]


def saved(folder: Path, seed: int = 0, **changes):
    """A directory as `save_pretrained` writes it, and the fields of its config.json."""
    reference = oracle(seed, layer_types=LAYERS, hc_mult=2, **changes)
    reference.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def published(fields: dict) -> dict:
    """The same configuration as DeepSeek spells it, with YaRN."""
    ratios = {SLIDING: 0, CSA: 4, HCA: 128}
    kept = {key: value for key, value in fields.items() if not key.startswith("rope_")}
    for key in ("layer_types", "mlp_layer_types", "partial_rotary_factor"):
        kept.pop(key, None)
    return kept | {
        "compress_ratios": [*(ratios[kind] for kind in fields["layer_types"]), 0],
        "num_hash_layers": fields["mlp_layer_types"].count("hash_moe"),
        "qk_rope_head_dim": round(fields["head_dim"] * fields["partial_rotary_factor"]),
        "rope_theta": 10000,
        "compress_rope_theta": 160000,
        "rope_scaling": YARN,
        "num_nextn_predict_layers": 1,
    }


def write(folder: Path, fields: dict) -> None:
    (folder / "config.json").write_text(json.dumps(fields))


@torch.no_grad()
def test_yarn_in_both_spellings_after_160_greedy_tokens(tmp_path):
    """Beyond YaRN's 64 positions, across the ends of two HCA entries of 128 tokens."""
    fields = saved(tmp_path)
    write(tmp_path, published(fields))
    reference = transformers.DeepseekV4ForCausalLM.from_pretrained(tmp_path).eval()
    assert reference.config.rope_parameters["compress"]["factor"] == 16
    plain = oracle(layer_types=LAYERS, hc_mult=2)
    model = load_model(tmp_path)
    texts = torch.randint(0, 64, (2, 100), generator=torch.Generator().manual_seed(1)).tolist()
    # one token at a time, as the engine decodes
    batch = Batch([Prompt(model, text, 160) for text in texts], registry.build("full"), tau=64)
    batch.generate(160)
    ids = torch.tensor([text + one.tokens for text, one in zip(texts, batch.requests)])
    # transformers without its cache: with one, it decodes otherwise than it reads
    logits = reference(ids).logits
    assert (plain(ids).logits - logits).abs().max() > 1e-2, "YaRN must matter here"
    torch.testing.assert_close(batch.logits, logits[:, -1], atol=1e-4, rtol=0)
    assert torch.equal(logits[:, 99:-1].argmax(-1), ids[:, 100:])
    found = model(ids)[0]
    torch.testing.assert_close(found, logits, atol=1e-4, rtol=0)
    transformers.DeepseekV4Config.from_pretrained(tmp_path).save_pretrained(tmp_path)
    nested = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    assert nested["compress"]["rope_type"] == "yarn"
    assert torch.equal(load_model(tmp_path)(ids)[0], found)


def nested(**compress):
    main = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    yarn = {"factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 160000.0}
    return {"main": main, "compress": {"partial_rotary_factor": 0.5} | yarn | compress}


REFUSED = [
    ({"scoring_func": "sigmoid"}, "scoring_func"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"num_key_value_heads": 2}, "num_key_value_heads"),
    ({"n_shared_experts": 2}, "n_shared_experts"),
    ({"norm_topk_prob": False}, "norm_topk_prob"),
    ({"rope_parameters": nested(rope_type="yarn")}, "compress.attention_factor"),
    ({"rope_parameters": nested(rope_type="yarn", attention_factor=0.5)}, "attention_factor"),
    ({"rope_parameters": nested(rope_type="dynamic")}, "rope_type"),
    ({"rope_parameters": nested(rope_type="linear")}, "rope_type"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, "rope_type"),
    ({"compress_rates": {CSA: 0, HCA: 8}}, "compress_rates"),
    ({"compress_rates": {CSA: 4}}, "compress_rates"),
    ({"layer_types": [CSA]}, "layer_types"),
    ({"quantization_config": {"quant_method": "awq"}}, "quant_method"),
    ({"model_type": "deepseek_v3"}, "model_type"),
]


@pytest.fixture(scope="module")
def loadable(tmp_path_factory):
    """A model's directory, and the fields of its config.json."""
    folder = tmp_path_factory.mktemp("model")
    return folder, saved(folder)


@pytest.mark.parametrize(("change", "name"), REFUSED)
def test_what_is_not_computed_is_refused_by_name(change, name, loadable):
    folder, fields = loadable
    write(folder, fields | change)
    with pytest.raises(FmsimError, match=name):
        load_model(folder)


@pytest.mark.parametrize("text", ["", "[1]", "{", "\x00"])
def test_what_is_no_configuration_is_told(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(FmsimError, match=r"config\.json"):
        read_config(tmp_path)


@st.composite
def configurations(draw):
    """Fields of a random config.json, of those that transformers knows."""
    layers = draw(st.lists(kinds, min_size=1, max_size=3))
    rope = draw(
        st.sampled_from(
            [
                None,
                nested(rope_type="default"),
                nested(rope_type="yarn", attention_factor=1.0, beta_fast=16.0),
                nested(rope_type="yarn"),
                nested(rope_type="yarn", attention_factor=0.7),
                nested(rope_type="linear"),
                nested(rope_type="dynamic"),
            ]
        )
    )
    if rope is not None and draw(st.booleans()):
        sliding = {"rope_type": "yarn", "attention_factor": 1.0, "rope_theta": 10000.0}
        sliding |= {"factor": 2.0, "original_max_position_embeddings": 64}
        rope["main"] = sliding | {"partial_rotary_factor": 0.5}
    changed = {
        "layer_types": layers,
        "compress_rates": {
            CSA: draw(st.sampled_from([1, 2, 3, 4, 8])),
            HCA: draw(st.sampled_from([2, 8, 16])),
        },
        "index_topk": draw(st.integers(1, 6)),
        "sliding_window": draw(st.sampled_from([1, 4, 8])),
        "num_hash_layers": draw(st.integers(0, 2)),
        "num_experts_per_tok": draw(st.integers(1, 3)),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 1.5])),
        "swiglu_limit": draw(st.sampled_from([0.5, 10.0])),
        "hc_mult": draw(st.sampled_from([1, 2, 4])),
        "tie_word_embeddings": draw(st.booleans()),
        "scoring_func": draw(st.sampled_from(["sqrtsoftplus", "sqrtsoftplus", "sigmoid"])),
        "hidden_act": draw(st.sampled_from(["silu", "silu", "gelu"])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-3])),
    }
    return changed | ({} if rope is None else {"rope_parameters": rope})


@settings(max_examples=40, deadline=None)
@given(changed=configurations(), tokens=st.integers(1, 70), seed=st.integers(0, 9))
@torch.no_grad()
def test_a_random_configuration_is_equal_or_refused(changed, tokens, seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    reference = oracle(seed, **changed)
    reference.save_pretrained(folder)
    try:
        model = load_model(folder)
    except FmsimError as error:
        text = str(error)
        fields = ("scoring_func", "hidden_act", "attention_factor", "rope_type")
        assert any(name in text for name in fields), text
        return
    ids = torch.randint(0, 64, (2, tokens), generator=torch.Generator().manual_seed(seed))
    logits, expected = model(ids)[0], reference(ids).logits
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(logits, expected, atol=1e-4 * scale, rtol=0)


@pytest.mark.parametrize("rate", [1, 3, 8])  # 4 is every other decode's
def test_any_rate_decodes_and_records(rate, tmp_path):
    from fmsim.exec.runs.record import trace_header, trace_of

    steps = 27
    fields = {"layer_types": [SLIDING, CSA, HCA, CSA], "compress_rates": {CSA: rate, HCA: 8}}
    oracle(2, index_topk=6, **fields).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    tokens = torch.randint(0, 64, (101,), generator=torch.Generator().manual_seed(rate)).tolist()
    prompt = Prompt(model, tokens, steps)
    plain = prompt.session()
    plain.read([5])
    generated = plain.generate(steps - 1)
    for spec in ("full", {"policy": "lru", "budget": "9 entries"}):
        engine = Engine(prompt, registry.build(spec), tau=8)
        engine.read([5])
        engine.generate(steps - 1)
        assert engine.tokens[1:] == generated
    header = trace_header(model, len(tokens), name="tiny", seed=0, sha256=None, tau=8)
    trace = trace_of(engine.request, header, [True] + [False] * (steps - 1))
    assert trace.total_entries == (101 + steps) // rate and trace.header.entry_tokens == rate
    assert trace.prompt_entries == math.floor(101 / rate)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Prompts of one, two and three tokens, and the 20 tokens after each where all is kept."""
    folder = tmp_path_factory.mktemp("model")
    oracle(1, layer_types=LAYERS).save_pretrained(folder)
    model = load_model(folder)
    prompts = [Prompt(model, list(range(1, 1 + length)), 20) for length in (1, 2, 3)]
    return prompts, [prompt.session().generate(20) for prompt in prompts]


@pytest.mark.parametrize("name", ["full", "lru", "lfu", "h2o", "recency", "random", "lsa"])
def test_prompts_of_one_to_three_tokens(short, name, tmp_path):
    prompts, plain = short
    spec = {"policy": name} | ({} if name == "full" else {"budget": "6 entries"})
    if name == "lsa":
        spec = lookahead(tmp_path, "6 entries")
    batch = Batch(prompts, registry.build(spec), tau=8)
    batch.generate(20)
    for request, tokens in zip(batch.requests, plain, strict=True):
        assert len(request.tokens) == 20
        if name in ("full", "lru", "lfu"):
            assert request.tokens == tokens
        ledger = request.ledger()
        assert ledger.prompt_entries == 0 and ledger.n_steps == 20
