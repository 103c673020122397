"""Recording transformers' DSA models: rows are the indexer's own selection."""

import numpy as np
import pytest
import torch
from tiny_indexer import lookahead
from transformers import (
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
)

from fmsim.errors import FmsimError
from fmsim.indexer.scorer import LayerWeights, ScorerConfig, logits, queries
from fmsim.policies import registry
from fmsim.replay.replayer import replay
from fmsim.trace.importers.dsa import record_dsa, scorable
from tests.support import captures

STEPS = 12


def tiny(kind):
    torch.manual_seed(5)
    small = {key: value for key, value in captures.CONFIG.items() if key != "model_type"}
    small |= {"n_group": 1, "topk_group": 1, "num_hidden_layers": 5}
    if kind == "glm":
        config = GlmMoeDsaConfig(**small, index_topk_freq=2, index_skip_topk_offset=2)
        model = GlmMoeDsaForCausalLM(config)
    else:
        model = DeepseekV32ForCausalLM(DeepseekV32Config(**small))
    return model.eval()


class Scores:
    """Each indexer's scores by its definition, from what it is given while a decode runs: the sum
    over heads of weight x relu(q . k). Keys are kept here, apart from the model's cache. GLM
    rotates neighbours, V3.2 halves.
    """

    def __init__(self, model):
        self.neighbours = model.config.model_type == "glm_moe_dsa"
        self.keys, self.rows = {}, {}
        full = [one.self_attn for one in model.model.layers if one.self_attn.indexer is not None]
        for number, attention in enumerate(full):
            self.keys[number], self.rows[number] = [], []
            attention.indexer.register_forward_hook(self.hook(number))

    def rotated(self, x, cos, sin):
        rope = cos.shape[-1]
        cos, sin = cos[..., : rope // 2], sin[..., : rope // 2]
        first, second = x[..., : rope // 2], x[..., rope // 2 : rope]
        if self.neighbours:
            first, second = x[..., 0:rope:2], x[..., 1:rope:2]
        turned = [first * cos - second * sin, second * cos + first * sin, x[..., rope:]]
        return torch.cat(turned, -1)

    def hook(self, number):
        def keep(module, given, output):
            hidden, residual, (cos, sin) = given[0][0], given[1][0], given[2]
            query = module.wq_b(residual).unflatten(-1, (module.n_heads, module.head_dim))
            query = self.rotated(query, cos[0][:, None], sin[0][:, None])
            self.keys[number].append(self.rotated(module.k_norm(module.wk(hidden)), cos[0], sin[0]))
            dots = torch.einsum("hd,kd->hk", query[-1], torch.cat(self.keys[number])).relu()
            self.rows[number].append(module.weights_proj(hidden)[-1] @ dots)

        return keep


@pytest.mark.parametrize(("kind", "own"), [("v32", [0, 1, 2, 3, 4]), ("glm", [0, 1, 3])])
@pytest.mark.parametrize("prompt_tokens", [1, 3, 100])
def test_rows_are_the_models_own_selection(kind, own, prompt_tokens):
    model = tiny(kind)
    prompt = np.random.default_rng(prompt_tokens).integers(0, 256, prompt_tokens).tolist()
    scores = Scores(model)
    trace = record_dsa(model, prompt, STEPS, name="tiny", prompt_text="random")
    assert trace.header.geometry["csa_layers"] == own and trace.n_layers == len(own)
    for layer, rows in scores.rows.items():
        for step, row in enumerate(rows[-STEPS:]):
            position = prompt_tokens + step
            assert len(row) == position + 1
            ids = np.asarray(trace.entry_ids)[step, layer]
            ids = ids[ids >= 0]
            assert len(ids) == min(captures.TOPK, position + 1)
            left_out = np.delete(row.numpy(), ids)
            assert not len(left_out) or row[ids].min() >= left_out.max() - 1e-5
    np.testing.assert_allclose(np.asarray(trace.mass).sum(-1), 1, atol=1e-3)
    assert trace.header.layout.selections[-1] == len(own) - 1
    assert trace.header.layout.entry_bytes == 32 + 4 + 16


def test_the_decode_is_the_models_own():
    model = tiny("v32")
    trace = record_dsa(model, [1, 2, 3, 4], STEPS, name="tiny", prompt_text="numbers")
    out = model.generate(
        torch.tensor([[1, 2, 3, 4]]), max_new_tokens=STEPS, do_sample=False, eos_token_id=None
    )
    assert trace.token_ids.tolist() == out[0].tolist()


def test_prompt_masses_are_of_the_last_queries(monkeypatch):
    monkeypatch.setattr("fmsim.trace.importers.dsa.PROMPT_QUERIES", 70)
    trace = record_dsa(tiny("glm"), list(range(100)), 2, name="tiny", prompt_text="numbers")
    np.testing.assert_allclose(np.asarray(trace.prompt_mass).sum(-1), 70, rtol=2e-3)


def test_what_cannot_be_recorded_is_told():
    model = tiny("v32")
    with pytest.raises(FmsimError, match="4096 together"):
        record_dsa(model, [1] * 4096, 1, name="tiny", prompt_text="")
    model.config.model_type = "llama"
    with pytest.raises(FmsimError, match="llama"):
        record_dsa(model, [1], 1, name="tiny", prompt_text="")


@pytest.mark.parametrize("kind", ["v32", "glm"])
def test_the_models_own_indexer_scores_by_the_recorded_keys_and_states(kind):
    """The scorer, with the model's own weights in its order of dims, finds the model's scores at a
    window's start; so keys, states, positions and rotation fit each other.
    """
    model = tiny(kind)
    prompt = np.random.default_rng(1).integers(0, 256, 90).tolist()
    scores = Scores(model)
    trace = record_dsa(model, prompt, 70, name="tiny", prompt_text="random")
    assert trace.hidden.shape == (2, trace.n_layers, 64)
    config = ScorerConfig.from_geometry(trace.header.geometry)
    keys = trace.keys(trace.total_entries)
    attentions = [one.self_attn for one in model.model.layers if one.self_attn.indexer is not None]
    for window, position in enumerate((89, 89 + 64)):
        for layer, attention in enumerate(attentions):
            query = attention.indexer.wq_b.weight.unflatten(0, (4, 16)).detach().numpy()
            if kind == "glm":  # its weights have a pair side by side: as V3.2's, in halves
                query = query[:, [0, 2, 4, 6, 1, 3, 5, 7, *range(8, 16)]]
            ordered = np.stack([scorable(one.T, 8).T for one in query])
            weights = LayerWeights(
                wq_a=attention.q_a_proj.weight.detach().numpy(),
                q_norm=attention.q_a_layernorm.weight.detach().numpy(),
                wq_b=ordered.reshape(-1, query.shape[2]),
                weights_proj=attention.indexer.weights_proj.weight.detach().numpy(),
            )
            state = np.asarray(trace.hidden[window][layer], np.float32)
            found = logits(*queries(weights, config, state, position), keys[layer][: position + 1])
            first = len(scores.rows[layer]) - 71  # the row of the prompt's last token
            row = scores.rows[layer][first + 64 * window].numpy()
            expected = row / np.sqrt(4 * 16)
            assert len(row) == position + 1
            # keys are stored in float8
            np.testing.assert_allclose(found, expected, atol=0.06 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["v32", "glm"])
def test_lookahead_policies_run_on_a_recording(kind, tmp_path):
    prompt = np.random.default_rng(2).integers(0, 256, 300).tolist()
    trace = record_dsa(tiny(kind), prompt, 140, name="tiny", prompt_text="random")
    spec = lookahead(tmp_path, "200 entries", layers=(0, 2), hidden=64, cadence=64)
    ledger = replay(trace, registry.build(spec))
    assert ledger.n_layers == trace.n_layers and ledger.scored.sum() > 0
    assert (ledger.resident <= 200).all() and ledger.lookahead_loads.sum() > 0
