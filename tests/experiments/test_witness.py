"""Lightning indexers beside a frozen dense model: scores, divergence, what is recorded."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from fmsim import trace
from fmsim.experiments.witness.frozen import FrozenModel, before, dense, sparse
from fmsim.experiments.witness.indexer import (
    IndexerShape,
    LightningIndexers,
    best,
    divergence,
    plain_divergence,
)
from fmsim.experiments.witness.measure import positions, sparse_perplexities
from fmsim.experiments.witness.record import header_of, record
from fmsim.experiments.witness.train import IndexerTraining, Lessons, train
from fmsim.indexer import scorer
from fmsim.indexer.labels import LabelRule
from fmsim.indexer.windows import read_windows
from fmsim.policies import registry
from fmsim.replay.replayer import Replayer

SHAPE = IndexerShape(heads=3, width=8, rope_dims=4, rank=6)
LAYERS, HIDDEN = 2, 16
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,  # so that attention is no mean
    )
    return FrozenModel(transformers.LlamaForCausalLM(config).eval())


@pytest.fixture(scope="module")
def indexers():
    torch.manual_seed(1)
    return LightningIndexers(LAYERS, HIDDEN, SHAPE, ROPE)


def text_of(tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50, tokens)


def attentions(model, tokens):
    found = []
    model.read(tokens, lambda attention: (found.append(attention), dense(attention))[1])
    return found


def test_dense_reading_is_the_models_own(model):
    tokens = text_of(40)
    whole = [attention.probabilities(torch.arange(40)) for attention in attentions(model, tokens)]
    ours = model.losses(tokens)
    eager = transformers.LlamaForCausalLM(copy.deepcopy(model.config)).eval()
    eager.load_state_dict(model.model.state_dict())
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        found = eager(torch.tensor(tokens)[None], output_attentions=True)
    wanted = torch.nn.functional.cross_entropy(
        found.logits[0, :-1], torch.tensor(tokens[1:]), reduction="none"
    )
    torch.testing.assert_close(ours, wanted)
    for mine, theirs in zip(whole, found.attentions, strict=True):
        torch.testing.assert_close(mine, theirs[0])


@pytest.mark.parametrize("seed", range(3))
def test_scores_and_divergence_are_the_plain_ones(model, indexers, seed):
    random = np.random.default_rng(seed)
    attention = attentions(model, text_of(30, seed))[seed % LAYERS]
    rows = torch.from_numpy(np.sort(random.choice(30, 5, replace=False)))
    keys = indexers.keys(attention).detach()
    found = indexers.scores(attention, rows, keys).detach()
    weights = indexers.checkpoint().layers[attention.layer]
    for place, row in enumerate(rows):
        parts = scorer.queries(weights, indexers.config, attention.states[row].numpy(), int(row))
        plain = scorer.logits(*parts, keys[: found.shape[1]].numpy())
        np.testing.assert_allclose(found[place], plain, rtol=1e-4, atol=1e-5)
    probs = attention.probabilities(rows)
    loss = divergence(found, probs.mean(0), before(rows))
    plain = plain_divergence(found.numpy(), probs.numpy(), rows.numpy())
    assert float(loss) == pytest.approx(plain, rel=1e-4)
    chosen = best(found, rows, 4)
    for place, row in enumerate(rows):
        visible = found[place][: row + 1].numpy()  # equal scores, as of no head, go either way
        assert sorted(visible[chosen[place][: row + 1]]) == sorted(visible)[-4:]
        assert not chosen[place][row + 1 :].any()


def test_attention_to_all_that_is_seen_is_the_dense_one(model, indexers):
    tokens = text_of(40)
    every = sparse(indexers.selector(40))
    torch.testing.assert_close(model.losses(tokens, every), model.losses(tokens))
    assert not torch.allclose(
        model.losses(tokens, sparse(indexers.selector(3))), model.losses(tokens)
    )
    late = sparse(indexers.selector(3), 20)
    torch.testing.assert_close(model.losses(tokens, late)[:20], model.losses(tokens)[:20])


def test_training_lowers_the_divergence_and_leaves_the_model_alone(model, tmp_path):
    before_it = {name: value.clone() for name, value in model.model.state_dict().items()}
    lessons = Lessons(context=32, queries=16, steps=30, learning_rate=1e-2)
    tokens = text_of(400)
    torch.manual_seed(0)
    fresh = LightningIndexers(LAYERS, HIDDEN, SHAPE, ROPE)
    first = IndexerTraining(model, fresh, lessons).advance(tokens)
    log = tmp_path / "log.jsonl"
    trained, about = train(model, tokens, SHAPE, lessons, log)
    assert about["steps"] == 30 and about["last_loss"] < 0.8 * float(first.mean())
    for name, value in model.model.state_dict().items():
        assert torch.equal(value, before_it[name])
    trained.save(tmp_path / "i.safetensors", about)
    again = LightningIndexers.load(tmp_path / "i.safetensors", "cpu")
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, trained.state_dict()[name], rtol=1e-3, atol=1e-3)


def test_positions_are_stretched_and_put_back(model, indexers):
    tokens = text_of(129)
    plain = model.losses(tokens)
    found = positions(model, [tokens], 64)
    assert set(found) == {"own", "ntk:2", "yarn:2"}
    assert all(set(row) == {"64", "128"} for row in found.values())
    assert len({row["128"] for row in found.values()}) == 3
    torch.testing.assert_close(model.losses(tokens), plain)
    ways = sparse_perplexities(model, indexers, [tokens], 8, 64)
    assert ways["dense"] == found["own"]["128"] != ways["indexers"]


def test_a_recorded_trace_has_the_selections_and_can_be_scored(model, indexers, tmp_path):
    tokens, steps, topk, layers = text_of(230), 130, 8, [1]
    header = header_of(
        model, indexers, layers, prompt_tokens=100, topk=topk, name="tiny", sha256="0" * 64,
        prompt_text="random", seed=0,
    )  # fmt: skip
    found = record(model, indexers, tokens, steps, layers, topk, header)
    trace.write(tmp_path / "t.safetensors", found)
    found = trace.read(tmp_path / "t.safetensors", check=True)
    ids, mass = np.asarray(found.entry_ids), np.asarray(found.mass)
    np.testing.assert_allclose(mass.sum(-1), 1, atol=2e-3)

    seen = {}
    model.read(
        tokens,
        sparse(indexers.selector(topk), 0, lambda *given: seen.update({given[0]: given[2:]})),
    )
    chosen, masses = seen[1]  # of one chunk
    for step in range(steps):
        assert list(ids[step, 0]) == list(np.flatnonzero(chosen[100 + step]))
        np.testing.assert_allclose(
            mass[step, 0], masses[100 + step][ids[step, 0].astype(int)], atol=1e-3
        )
    windows = read_windows(found, "t", LabelRule())
    assert windows.keys.shape == (1, 100 + 64 * 2, 8) and windows.golden.any(1).all()
    ledger = Replayer(found).run(registry.build({"policy": "lru", "budget": "20 entries"}))
    assert 0 < ledger.mass_kept.sum() <= ledger.mass_total.sum()
