"""The memory indexer's two renderings, against the formula written out entry by entry in
float64.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmsim.errors import FmsimError
from fmsim.indexer import checkpoint, scorer
from fmsim.indexer.network import MemoryIndexer, ServedIndexer
from fmsim.indexer.scorer import PUBLISHED, LayerWeights, ScorerConfig, Yarn
from fmsim.trace import float8


def formula(weights: LayerWeights, config: ScorerConfig, hidden, position: int, keys) -> np.ndarray:
    """FACTS: logit = sum_h w_h relu(q_h . k), float64, one number at a time."""
    wq_a, q_norm, wq_b, weights_proj = (np.asarray(part, dtype=np.float64) for part in weights)
    hidden, keys = hidden.astype(np.float64), keys.astype(np.float64)
    latent = wq_a @ hidden
    latent = q_norm * latent / math.sqrt(sum(latent**2) / len(latent) + config.norm_eps)
    heads, size = len(weights_proj), len(wq_b) // len(weights_proj)
    logits = np.zeros(len(keys))
    for head in range(heads):
        query = wq_b[head * size : (head + 1) * size] @ latent
        for pair in range(config.rope_dims // 2):
            at = size - config.rope_dims + 2 * pair
            angle = position * frequency(config, pair)
            even, odd = query[at], query[at + 1]
            query[at] = even * math.cos(angle) - odd * math.sin(angle)
            query[at + 1] = even * math.sin(angle) + odd * math.cos(angle)
        if (
            config.hadamard
        ):  # Sylvester order: entry (i, j) is -1 to the number of ones shared by i and j
            signs = [[(-1) ** bin(i & j).count("1") for j in range(size)] for i in range(size)]
            query = np.array(signs) @ query / math.sqrt(size)
        weight = weights_proj[head] @ hidden / math.sqrt(heads * size)
        logits += [weight * max(query @ key, 0.0) for key in keys]
    return logits


def frequency(config: ScorerConfig, pair: int) -> float:
    plain = config.rope_theta ** (-2 * pair / config.rope_dims)
    if config.yarn is None:
        return plain
    bounds = [
        config.rope_dims
        * math.log(config.yarn.original_tokens / (turns * 2 * math.pi))
        / (2 * math.log(config.rope_theta))
        for turns in (config.yarn.beta_fast, config.yarn.beta_slow)
    ]
    low, high = max(math.floor(bounds[0]), 0), min(math.ceil(bounds[1]), config.rope_dims - 1)
    ramp = min(max((pair - low) / (high - low), 0.0), 1.0)
    return plain * (1 - ramp) + plain / config.yarn.factor * ramp


@settings(max_examples=25, deadline=None)
@given(
    heads=st.integers(1, 5),
    head_dim=st.sampled_from([4, 8, 16]),
    rope_dims=st.sampled_from([0, 2, 4]),
    hadamard=st.booleans(),
    yarn=st.sampled_from([None, Yarn(16.0, 65_536), Yarn(4.0, 256)]),
    position=st.integers(0, 1_000_000),
    norm_eps=st.sampled_from([1e-6, 0.5]),
    seed=st.integers(0, 99),
)
def test_both_renderings_equal_the_formula(
    heads, head_dim, rope_dims, hadamard, yarn, position, norm_eps, seed
):
    config = ScorerConfig(rope_dims, 160_000.0, yarn, hadamard, norm_eps)
    torch.manual_seed(seed)
    model = MemoryIndexer(
        [0, 2], hidden_size=12, heads=heads, head_dim=head_dim, rank=6, config=config
    )
    torch.nn.init.normal_(model.retrievers["l2"].q_norm_weight)
    random = np.random.default_rng(seed)
    hidden = random.standard_normal((3, 12)).astype(np.float32)
    keys = random.standard_normal((3, 20, head_dim)).astype(np.float32)
    weights = model.weights()
    expected = np.stack(
        [formula(weights[layer], config, hidden[layer], position, keys[layer]) for layer in (0, 2)]
    )
    tolerance = 1e-5 * max(1.0, float(np.abs(expected).max()))
    plain = scorer.layer_logits(
        [weights[0], weights[2]], config, hidden[[0, 2]], position, keys[[0, 2]]
    )
    assert plain.dtype == np.float32
    np.testing.assert_allclose(plain, expected, atol=tolerance)
    with torch.no_grad():
        rotation = tuple(map(torch.from_numpy, scorer.rotation(config, np.array([position]))))
        trained = model(
            torch.from_numpy(hidden[[0, 2]])[None], rotation, torch.from_numpy(keys[[0, 2]])
        )
    np.testing.assert_allclose(trained[:, 0], expected, atol=tolerance)


@settings(max_examples=10, deadline=None)
@given(heads=st.integers(1, 4), hadamard=st.booleans(), seed=st.integers(0, 99))
def test_served_layers_weigh_the_heads_of_two_anew(heads, hadamard, seed):
    """Each by the formula, with its own head weights; of two scored layers the higher logit, for
    two queries at once.
    """
    config, random = ScorerConfig(4, 160_000.0, hadamard=hadamard), np.random.default_rng(seed)
    torch.manual_seed(seed)
    model = ServedIndexer([1, 4], 3, 12, heads, 8, 6, config)
    layers, served = model.weights()
    hidden = random.standard_normal((2, 2, 12)).astype(np.float32)
    keys = random.standard_normal((2, 20, 8)).astype(np.float32)
    positions = (500, 700)
    by_layer = []
    for n, layer in enumerate((1, 4)):
        np.testing.assert_allclose(layers[layer].weights_proj, served[layer].mean(0), rtol=1e-5)
        own = [layers[layer]._replace(weights_proj=weights) for weights in served[layer]]
        expected = [
            [formula(weights, config, states[n], position, keys[n]) for weights in own]
            for states, position in zip(hidden, positions)
        ]
        tolerance = 1e-5 * max(1.0, float(np.abs(expected).max()))
        found = scorer.served_logits(
            layers[layer], config, served[layer], hidden[1, n], 700, keys[n]
        )
        np.testing.assert_allclose(found, expected[1], atol=tolerance)
        by_layer.append(expected)
    with torch.no_grad():
        rotation = tuple(map(torch.from_numpy, scorer.rotation(config, np.array(positions))))
        trained = model(torch.from_numpy(hidden), rotation, torch.from_numpy(keys))
    np.testing.assert_allclose(trained, np.max(by_layer, axis=0), atol=2 * tolerance)


def test_weights_begin_so_that_a_sum_is_as_large_as_what_it_is_of():
    """Of n numbers: their deviation is 1 / sqrt(n), of 64 hidden ones and of 16 latent ones."""
    torch.manual_seed(0)
    config = ScorerConfig(4, 160_000.0)
    served = ServedIndexer([1], 6, 64, 8, 32, 16, config)
    retriever = MemoryIndexer([1], 64, 8, 32, 16, config).retrievers["l1"]
    assert torch.equal(retriever.q_norm_weight, torch.ones(16))
    for weights, n in (
        (served.served, 64),
        (retriever.wq_a.weight, 64),
        (retriever.weights_proj.weight, 64),
        (retriever.wq_b.weight, 16),
    ):
        assert weights.std().item() == pytest.approx(n**-0.5, rel=0.1)


@pytest.mark.parametrize("position", [0, 3, 65_536, 1_000_003])
def test_a_published_scorer_on_float8_keys_equals_the_formula(tmp_path, position):
    """DeepSeek-V4's rotation (YaRN), Hadamard and 132-byte keys, weights through a checkpoint file,
    entries through float8.
    """
    random = np.random.default_rng(position)
    shapes = ((32, 64), (32,), (6 * 128, 32), (6, 64))
    weights = {
        layer: LayerWeights(*(random.standard_normal(shape).astype(np.float32) for shape in shapes))
        for layer in (10, 20)
    }
    checkpoint.save(checkpoint.Checkpoint(weights, PUBLISHED), tmp_path / "published.safetensors")
    loaded = checkpoint.load(tmp_path / "published.safetensors")
    codes = float8.encode(random.standard_normal((2, 30, 128)) * 100)
    scales = random.uniform(1e-3, 2e-2, (2, 30)).astype(np.float32)
    exact = torch.from_numpy(codes).view(torch.float8_e4m3fn).double().numpy() * scales[
        ..., None
    ].astype(np.float64)
    hidden = torch.from_numpy(random.standard_normal((2, 64))).bfloat16().float().numpy()
    expected = np.stack(
        [
            formula(weights[layer], PUBLISHED, hidden[n], position, exact[n])
            for n, layer in enumerate((10, 20))
        ]
    )
    keys = float8.decode(codes) * scales[..., None]
    found = scorer.layer_logits(list(loaded.layers.values()), loaded.config, hidden, position, keys)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    np.testing.assert_allclose(scorer.sigmoid(found), 1 / (1 + np.exp(-expected)), atol=1e-4)


def test_torch_arrays_and_many_blocks_give_the_same(monkeypatch):
    random = np.random.default_rng(3)
    shapes = ((6, 12), (6,), (24, 6), (3, 12))
    weights = LayerWeights(*(random.standard_normal(shape).astype(np.float32) for shape in shapes))
    config = ScorerConfig(4, 160_000.0, hadamard=True)
    hidden, keys = (
        random.standard_normal((1, 12)).astype(np.float32),
        random.standard_normal((1, 37, 8)).astype(np.float32),
    )
    whole = scorer.layer_logits([weights], config, hidden, 77, keys)
    monkeypatch.setattr(scorer, "ENTRIES_PER_BLOCK", 10)
    np.testing.assert_allclose(
        scorer.layer_logits([weights], config, hidden, 77, keys), whole, rtol=1e-5, atol=1e-6
    )
    as_torch = LayerWeights(*(torch.from_numpy(part) for part in weights))
    scored = scorer.layer_logits(
        [as_torch], config, torch.from_numpy(hidden), 77, torch.from_numpy(keys)
    )
    np.testing.assert_allclose(scored.numpy(), whole, rtol=1e-5, atol=1e-6)
    assert scorer.layer_logits([weights], config, hidden, 77, keys[:, :0]).shape == (1, 0)


def test_the_published_ramp_runs_from_pair_15_to_25():
    stretch = scorer.inverse_frequencies(PUBLISHED) * 160_000.0 ** (2 * np.arange(32) / 64)
    np.testing.assert_allclose(stretch[:16], 1.0)
    np.testing.assert_allclose(stretch[25:], 1 / 16)
    assert (np.diff(stretch[15:26]) < 0).all()


def test_combinations():
    scored = np.array([[1.0, -2.0], [3.0, 0.0]], dtype=np.float32)
    assert scorer.combine(scored, "max").tolist() == [3.0, 0.0]
    assert scorer.combine(scored, "mean").tolist() == [2.0, -1.0]
    assert scorer.sigmoid(np.zeros(1)).tolist() == [0.5]


def test_config_from_a_trace_header():
    plain = {"rope_dims": 16, "compress_rope": {"rope_type": "default", "rope_theta": 160_000.0}}
    assert ScorerConfig.from_geometry(plain) == ScorerConfig(16, 160_000.0)
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 160_000.0,
        "factor": 16,
        "original_max_position_embeddings": 65_536,
    }
    assert (
        ScorerConfig.from_geometry({"rope_dims": 64, "compress_rope": yarn, "index_hadamard": True})
        == PUBLISHED
    )
    given = {"rope_dims": 64, "compress_rope": yarn | {"beta_fast": 16, "beta_slow": 2}}
    stretch = Yarn(16.0, 65_536, beta_fast=16.0, beta_slow=2.0)
    assert ScorerConfig.from_geometry(given) == ScorerConfig(64, 160_000.0, stretch)
    unknown = plain | {"compress_rope": {"rope_type": "x", "rope_theta": 1}}
    for broken, message in (({"rope_dims": 16}, "compress_rope"), (unknown, "'x'")):
        with pytest.raises(FmsimError, match=message):
            ScorerConfig.from_geometry(broken)


def test_a_hadamard_transform_needs_a_power_of_two():
    with pytest.raises(FmsimError, match="power of two"):
        scorer.hadamard_matrix(24)


@pytest.mark.parametrize(
    ("original_tokens", "expected"),
    [
        # a pair turns 32 times at 0.70 of a pair, once at 2.20: from pair 0 to pair 3
        (1000, [1, 0.1 * (2 / 3 + 1 / 12), 0.01 * (1 / 3 + 1 / 6), 0.00025]),
        # at -0.30 and 1.20: from pair 0 to pair 2
        (100, [1, 0.1 * (1 / 2 + 1 / 8), 0.0025, 0.00025]),
        # at 9.7, which is past the last one
        (10**12, [1, 0.1, 0.01, 0.001]),
    ],
)
def test_a_stretch_of_four_pairs_by_hand(original_tokens, expected):
    config = ScorerConfig(rope_dims=8, rope_theta=1e4, yarn=Yarn(4.0, original_tokens))
    assert scorer.inverse_frequencies(config) == pytest.approx(expected)


def test_a_stretch_is_whole_at_the_last_rotated_dimension():
    """A pair turns 32 times at 2.50 of a pair, once at 8.52: from pair 2 to 7, not to 9."""
    config = ScorerConfig(rope_dims=8, rope_theta=10.0, yarn=Yarn(4.0, 848))
    found = scorer.inverse_frequencies(config) * 10 ** (np.arange(4) / 4)
    assert found == pytest.approx([1, 1, 1, 4 / 5 + 1 / 5 / 4])


def test_what_is_not_said():
    assert Yarn(4.0, 10) == Yarn(4.0, 10, beta_fast=32.0, beta_slow=1.0)
    plain = ScorerConfig(rope_dims=8, rope_theta=1e4)
    assert (plain.yarn, plain.hadamard, plain.norm_eps) == (None, False, 1e-6)
    assert scorer.inverse_frequencies(plain) == pytest.approx([1, 0.1, 0.01, 0.001])
    assert ScorerConfig(64, 160_000.0, Yarn(16.0, 65_536, 32.0, 1.0), True, 1e-6) == PUBLISHED


def test_scores_and_logits_are_each_others_inverse():
    assert scorer.logit(0.75) == pytest.approx(np.log(3)) and scorer.logit(0.5) == 0
    values = np.array([-2000.0, 0.0, np.log(3), 2000.0])
    assert scorer.sigmoid(values) == pytest.approx([0.0, 0.5, 0.75, 1.0])
