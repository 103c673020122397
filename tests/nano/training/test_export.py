"""Exported weights: read by fmsim and by transformers alike."""

import pytest
import torch
from nano_training.tiny_nano import tiny_nano
from transformers import DeepseekV4ForCausalLM

from fmsim.exec.model.weights.loader import load_model
from fmsim.nano.training.export import export


def test_an_exported_model_is_the_same_to_us_and_to_transformers(tmp_path, monkeypatch):
    model = tiny_nano()
    monkeypatch.setattr("fmsim.nano.training.export.MOST_BYTES", 60_000)
    export(model, tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 80_000 for file in files)
    oracle = DeepseekV4ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    again, given = load_model(tmp_path), torch.randint(64, (1, 200))
    with torch.no_grad():
        found = again(given)[0]
        assert (oracle(given).logits - found).abs().max() < 1e-4
    kept = model.model.layers[1].attn_hc.fn
    assert torch.equal(again.model.layers[1].attn_hc.fn, kept)


def test_float8_weights_are_the_same_to_us_and_to_transformers(tmp_path, monkeypatch):
    pytest.importorskip("accelerate", reason="transformers wants it for float8")
    model = tiny_nano()
    monkeypatch.setattr("fmsim.nano.training.export.FLOAT8_BLOCK", 8)
    export(model, tmp_path, float8=True)
    oracle = DeepseekV4ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).float().eval()
    again, given = load_model(tmp_path), torch.randint(64, (1, 200))
    with torch.no_grad():
        found = again(given)[0]
        assert (oracle(given).logits - found).abs().max() < 1e-4
    kept, held = (m.model.layers[1].self_attn.q_b_proj.weight for m in (model, again))
    off = (kept - held).abs() / kept.abs().clamp(min=0.02 * kept.abs().max())
    assert 0 < off.max() < 0.07  # three bits of mantissa
    narrow = load_model(tmp_path, dtype=torch.bfloat16).model.layers[1].self_attn.q_b_proj.weight
    assert torch.equal(narrow.float(), held)  # scales are powers of two
