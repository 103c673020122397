"""The shipped nano: what transformers makes of its directory is what fmsim makes of it, and it
answers.
"""

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the model needs fmsim[model]")
pytest.importorskip("transformers", reason="the oracle is transformers' DeepseekV4ForCausalLM")

from nano_oracle import nano_oracle

from fmsim.exec.decode.session import Session
from fmsim.exec.model.kinds import CSA, HCA, SLIDING
from fmsim.exec.model.weights.loader import load_model
from fmsim.exec.runs.stream import exact
from fmsim.nano import tokens as corpora
from fmsim.nano.prompts import evaluation_prompt
from fmsim.nano.tokenizer import MODEL_FOLDER
from fmsim.trace import read

TRACES = Path(__file__).parents[2] / "traces"


@pytest.fixture(scope="module")
def nano():
    return load_model(MODEL_FOLDER)


@pytest.fixture(scope="module")
def text() -> np.ndarray:
    """Real text in nano's tokens: the start of a shipped trace's prompt."""
    return np.asarray(read(TRACES / "nano-32k-needles.safetensors").token_ids[1:20_000])


@torch.no_grad()
def test_transformers_loads_it_and_gives_the_same_logits(text, tmp_path):
    """With a top-k of 64, so that selection leaves some of 160 entries out."""
    for path in MODEL_FOLDER.iterdir():
        (tmp_path / path.name).symlink_to(path)
    fields = json.loads((tmp_path / "config.json").read_text()) | {"index_topk": 64}
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ids = torch.tensor(text[None, :640].astype(np.int64))
    expected, found = nano_oracle(tmp_path)(ids).logits, load_model(tmp_path)(ids)[0]
    assert (found - expected).abs().max() < 1e-3


def test_it_is_a_deepseek_v4_in_everything_and_small():
    config = json.loads((MODEL_FOLDER / "config.json").read_text())
    kinds = config["layer_types"]
    assert kinds[0] == kinds[1] == SLIDING and kinds.count(CSA) >= 6 and HCA in kinds
    assert (
        config["hc_mult"] > 1
        and "hash_moe" in config["mlp_layer_types"]
        and "moe" in config["mlp_layer_types"]
    )
    weights = [path.stat().st_size for path in MODEL_FOLDER.glob("model-*.safetensors")]
    assert 0 < max(weights) <= 14e6 and sum(weights) <= 27e6


def test_it_finds_a_needle(nano, text):
    corpus = corpora.Corpus(text.astype(np.uint16), np.array([0, len(text)]), ["a trace's prompt"])
    prompt = evaluation_prompt("single", 1500, np.random.default_rng(0), corpus)
    session = Session(nano, 1600)
    session.read(prompt.tokens.astype(np.int64))
    assert exact(prompt.answer, session.generate(len(prompt.answer)))
