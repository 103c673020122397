"""What a decode will take is told before a model is loaded."""

import json

import pytest

torch = pytest.importorskip("torch", reason="the model needs fmsim[model]")
pytest.importorskip("transformers", reason="the model needs fmsim[model]")
from safetensors.torch import load_file, save_file
from tiny_model import CSA, HCA, SLIDING, oracle

from fmsim.errors import FmsimError
from fmsim.exec.model.weights.loader import load_model
from fmsim.exec.model.weights.needs import needs


def test_bytes_are_those_of_the_loaded_model_and_its_cache(tmp_path):
    oracle(layer_types=[SLIDING, CSA, HCA]).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"mtp.0.norm.weight": torch.ones(3)}, path)
    found = needs(tmp_path, "cpu", [100, 60])
    model = load_model(tmp_path)
    assert found.weight_bytes == sum(tensor.nbytes for tensor in model.state_dict().values())
    # CSA: an entry of 16 and a key of 16 floats every 4 tokens; HCA: an entry every 8
    assert found.prompt_bytes == 4 * (16 + 16) * (25 + 15) + 4 * 16 * (12 + 7)
    assert found.skipped == 1 and found.host_free_bytes > 0
    lines = found.lines()
    assert "weights" in lines[0] and "multi-token prediction" in lines[-1]


def test_a_context_beyond_the_positions_is_refused(tmp_path):
    oracle(layer_types=[SLIDING, CSA]).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"max_position_embeddings": 50}))
    with pytest.raises(FmsimError, match="51 tokens.*max_position_embeddings 50"):
        needs(tmp_path, "cpu", [51])
    assert needs(tmp_path, "cpu", [51], beyond_positions=True).weight_bytes
