"""The plain torch model against transformers' DeepSeek-V4, which is the oracle."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the model needs fmsim[model]")
safetensors_torch = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip(
    "transformers", reason="the oracle is transformers' DeepseekV4ForCausalLM"
)

from tiny_model import CSA, HCA, SLIDING, kinds, oracle, ours

from fmsim.errors import FmsimError
from fmsim.exec.model.indexer import index_scores
from fmsim.exec.model.weights.loader import load_model


@settings(max_examples=8, deadline=None)
@given(
    layers=st.lists(kinds, min_size=1, max_size=4),
    tokens=st.integers(1, 90),
    cuts=st.lists(st.integers(1, 40), max_size=8),
    experts=st.sampled_from([4, 12]),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_logits_equal_the_oracle_however_the_prompt_is_cut(layers, tokens, cuts, experts, seed):
    reference = oracle(seed, layer_types=layers, n_routed_experts=experts)
    model = ours(reference)
    ids = torch.randint(0, 64, (2, tokens))
    expected = reference(ids).logits
    torch.testing.assert_close(model(ids)[0], expected, atol=1e-4, rtol=0)
    cache, parts, start = model.new_cache(2, tokens), [], 0
    while start < tokens:
        size = cuts.pop() if cuts else 1
        logits, accesses = model(ids[:, start : start + size], cache)
        parts.append(logits)
        start += size
        for access in accesses:
            share = access.mass.sum(-1) + access.window_mass + access.sink_mass
            torch.testing.assert_close(share, torch.ones_like(share))
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_native_indexer_as_a_checkpoint_selects_what_the_model_selects():
    from fmsim.exec.runs.native import native_indexer
    from fmsim.indexer.scorer import layer_logits

    model = ours(oracle(3, layer_types=[SLIDING, CSA, HCA, CSA]))
    native = native_indexer(model, "tiny")
    cache = model.new_cache(1, 80)
    _, accesses = model(torch.randint(0, 64, (1, 80)), cache)
    keys = [layer.index.entries[0].numpy() for layer in cache.layers if layer.index is not None]
    for position in (19, 42, 79):
        hidden = [access.hidden[0, position].numpy() for access in accesses]
        visible = (position + 1) // 4
        logits = layer_logits(
            list(native.layers.values()),
            native.config,
            hidden,
            position,
            [part[:visible] for part in keys],
        )
        for layer, access in enumerate(accesses):
            assert (
                sorted((-logits[layer]).argsort()[:4].tolist()) == access.ids[0, position].tolist()
            )


@torch.no_grad()
def test_the_training_pass_is_the_same_function():
    reference = oracle(layer_types=[SLIDING, CSA, HCA, CSA])
    ids = torch.randint(0, 64, (2, 75))
    model = ours(reference)
    hidden, _ = model.train_forward(ids, torch.arange(75).expand(2, -1), sparse=True)
    torch.testing.assert_close(model.lm_head(hidden), reference(ids).logits, atol=1e-4, rtol=0)


def test_the_indexer_learns_from_its_own_loss_alone():
    model = ours(oracle(layer_types=[SLIDING, CSA]))
    hidden, aux = model.train_forward(
        torch.randint(0, 64, (1, 40)), torch.arange(40)[None], sparse=False
    )
    aux[1].index_loss.backward(retain_graph=True)
    touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched and all("indexer" in name for name in touched)
    model.zero_grad(set_to_none=True)
    model.lm_head(hidden).logsumexp(-1).sum().backward()
    assert not any("indexer" in n for n, p in model.named_parameters() if p.grad is not None)


@torch.no_grad()
def test_selected_entries_are_the_best_of_those_visible():
    model = ours(oracle(layer_types=[SLIDING, CSA]))
    ids = torch.randint(0, 64, (1, 61))
    _, [access] = model(ids)
    attention = model.model.layers[1].self_attn
    indexer, positions = attention.compressor.indexer, torch.arange(61)[None]
    angles = positions[..., None].float() * attention.inv_freq
    latent = attention.q_a_norm(attention.q_a_proj(access.hidden))
    keys = indexer.compress(access.hidden, positions, attention.inv_freq, None)
    scores = index_scores(*indexer.queries(access.hidden, latent, angles), keys)[0]
    for position in range(61):
        visible = (position + 1) // 4
        best = scores[position, :visible].topk(min(4, visible)).indices.sort().values
        chosen = access.ids[0, position]
        assert chosen[chosen >= 0].tolist() == best.tolist()


@torch.no_grad()
def test_a_saved_directory_loads_again(tmp_path):
    reference = oracle(layer_types=[SLIDING, CSA, HCA])
    reference.save_pretrained(tmp_path)
    ids = torch.randint(0, 64, (1, 30))
    torch.testing.assert_close(
        load_model(tmp_path)(ids)[0], reference(ids).logits, atol=1e-4, rtol=0
    )


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(FmsimError, match="config.json"):
        load_model(tmp_path)
    oracle(layer_types=[SLIDING, CSA]).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(FmsimError, match="model.safetensors"):
        load_model(tmp_path)
    tensors = safetensors_torch.load(whole)
    tensors.pop("model.layers.1.ffn.experts.2.w1.weight")
    safetensors_torch.save_file(tensors, weights)
    with pytest.raises(FmsimError, match=r"experts"):
        load_model(tmp_path)
