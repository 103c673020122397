"""`native` against what nano's own indexer selected in a shipped trace."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fmsim.errors import FmsimError
from fmsim.indexer import native
from fmsim.policies.native import Native
from fmsim.replay.replayer import Replayer
from fmsim.testing import check_policy
from fmsim.trace import read

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trace():
    return read(ROOT / "traces" / "nano-32k-needles.safetensors")


def test_its_scores_select_what_the_model_selected(trace):
    """The state before window w is that of step 64 w - 1, whose selection the trace holds. Its keys
    are those of the model in 8 bits, so a layer whose scores lie close selects some others.
    """
    policy = Native(budget="30%", stale=False)
    Replayer(trace, max_steps=200).source(policy)
    alike = []
    for window in (1, 2, 3):
        best = np.argsort(policy.score(64 * window), axis=1)[:, -trace.topk :]
        for layer in range(trace.n_layers):
            selected = set(np.asarray(trace.entry_ids[64 * window - 1, layer]).tolist())
            alike.append(len(selected & set(best[layer].tolist())) / trace.topk)
    assert min(alike) > 0.9 and np.mean(alike) > 0.95


def test_conformance(tmp_path):
    """With a model of random weights whose widths are those of the kit's trace."""
    rng, width = np.random.default_rng(0), 8
    shapes = {"wq_a": (6, width), "q_norm": (6,), "wq_b": (16, 6), "weights_proj": (2, width)}
    tensors = {
        f"model.layers.{layer}.{names[1]}": rng.standard_normal(shapes[part]).astype(np.float32)
        for layer in (1, 2)
        for part, names in native.NATIVE.items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    config = {
        "layer_types": ["sliding_attention"] + 2 * ["compressed_sparse_attention"],
        "rope_parameters": {"compress": {"rope_type": "default", "rope_theta": 1e4}},
        "qk_rope_head_dim": 4,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_policy(Native(checkpoint=tmp_path))
    for said, norm_eps in (({}, 1e-6), ({"rms_norm_eps": 1e-5}, 1e-5)):
        (tmp_path / "config.json").write_text(json.dumps(config | said))
        assert native.of_model(tmp_path).config.norm_eps == norm_eps


def test_it_keeps_every_layers_keys_and_fills_its_budget(trace):
    ledger = Replayer(trace, max_steps=70).run(Native(budget="10%"))
    assert ledger.all_keys and ledger.n_groups == trace.n_layers == 6
    assert (ledger.resident == ledger.n_slots).all()
    picky = Replayer(trace, max_steps=2).run(Native(budget="10%", threshold=0.99))
    assert (picky.resident == picky.n_slots).all()  # a threshold is the memory indexer's alone


def test_blocks_share_a_scale_of_128_rows_and_columns_where_the_config_is_silent(tmp_path):
    """A matrix of ones that ends two rows and four columns into its second blocks."""
    torch = pytest.importorskip("torch", reason="numpy has no float8")
    from safetensors.torch import save_file as save

    shapes = {"wq_a": (130, 132), "q_norm": (130,), "wq_b": (8, 130), "weights_proj": (2, 132)}
    tensors = {
        f"model.layers.0.{names[1]}": torch.ones(shapes[part])
        for part, names in native.NATIVE.items()
    }
    name = f"model.layers.0.{native.NATIVE['wq_a'][1]}"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    save(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = {
        "layer_types": ["compressed_sparse_attention"],
        "rope_parameters": {"compress": {"rope_type": "default", "rope_theta": 1e4}},
        "qk_rope_head_dim": 4,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = native.of_model(tmp_path).layers[0].wq_a
    assert found.shape == (130, 132)
    assert found[127:129, 127:129].tolist() == [[1, 2], [3, 4]] and found[129, 131] == 4
    config["layer_types"] = ["sliding_attention"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FmsimError, match="the model has no CSA layers"):
        native.of_model(tmp_path)


def test_another_folder_is_one_clear_error(tmp_path):
    with pytest.raises(FmsimError, match="not a DeepSeek-V4 model's folder"):
        native.of_model(tmp_path)


@pytest.mark.parametrize("narrow", [False, True])
def test_sharded_and_float8_weights_are_those_of_the_model(tmp_path, monkeypatch, narrow):
    pytest.importorskip("torch", reason="the model needs fmsim[model]")
    from nano_training.tiny_nano import tiny_nano

    from fmsim.exec.model.weights.loader import load_model
    from fmsim.exec.runs.native import native_indexer
    from fmsim.nano.training import export

    monkeypatch.setattr(export, "MOST_BYTES", 30_000)
    monkeypatch.setattr(export, "FLOAT8_BLOCK", 8)
    export.export(tiny_nano(), tmp_path, float8=narrow)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    expected, found = native_indexer(load_model(tmp_path), "tiny"), native.of_model(tmp_path)
    assert found.config.rope_dims == expected.config.rope_dims and len(found.layers) == 2
    for number, layer in expected.layers.items():
        for ours, theirs in zip(found.layers[number], layer, strict=True):
            assert np.allclose(ours, theirs, atol=1e-6)
