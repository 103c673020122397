"""The dense recorder: a transformers model's own attention, pooled over entries, against a plain
reference.
"""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from fmsim import trace as traces
from fmsim.errors import FmsimError
from fmsim.trace.importers import dense

PROMPT, STEPS, TOPK = 1100, 70, 8  # a prompt longer than the 1,024 queries that prompt_mass sums


def tiny_llama(**changes):
    shape = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.5,
    }
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**(shape | changes))
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def recorded():
    tokens = np.random.default_rng(0).integers(0, 50, PROMPT + STEPS).tolist()
    model = tiny_llama()
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        found = model(torch.tensor([tokens]), output_attentions=True)
    attention = [layer[0].mean(0).numpy() for layer in found.attentions]  # [S, S] a layer
    trace = dense.record_dense(
        model, tokens, STEPS, name="tiny", prompt_text="drawn tokens", topk=TOPK
    )
    return tokens, attention, found.logits[0], trace


def pooled(row: np.ndarray, position: int) -> tuple[dict[int, float], float]:
    """Entry masses and window mass of one query's attention, token by token."""
    masses, window = {}, 0.0
    for token in range(position + 1):
        if token > position - dense.WINDOW_TOKENS:
            window += row[token]
        else:
            masses[token // 4] = masses.get(token // 4, 0.0) + row[token]
    return masses, window


def test_pooling_by_hand():
    """Two heads, one query at position 9, a window of 3 tokens: 0 to 6 are older; tokens 8 and 9
    close no entry.
    """
    first = [0.10, 0.00, 0.10, 0.20, 0.05, 0.05, 0.10, 0.10, 0.10, 0.20]
    second = [0.30, 0.10, 0.00, 0.00, 0.15, 0.05, 0.00, 0.20, 0.20, 0.00]
    mass, window = dense.pool(torch.tensor([[first], [second]]), 9, window=3)
    assert mass.tolist() == [
        pytest.approx([0.40, 0.20])
    ]  # entry 1 is divided by the window's edge: token 7 is in the window
    assert window.tolist() == pytest.approx([0.40])


def test_rows_are_the_heaviest_entries_of_the_models_own_attention(recorded):
    _, attention, _, trace = recorded
    for layer in range(2):
        for step in range(STEPS):
            masses, window = pooled(attention[layer][PROMPT + step], PROMPT + step)
            heaviest = sorted(sorted(masses, key=masses.get)[-TOPK:])
            assert trace.entry_ids[step, layer].tolist() == heaviest
            assert trace.mass[step, layer] == pytest.approx(
                [masses[entry] for entry in heaviest], rel=1e-4, abs=1e-7
            )
            assert trace.window_mass[step, layer] == pytest.approx(window, rel=1e-4)
    assert not trace.sink_mass.any()


def test_prompt_mass_sums_the_last_queries(recorded):
    _, attention, _, trace = recorded
    assert trace.header.prompt_mass_queries == 1024
    wanted = np.zeros(trace.total_entries)
    for position in range(PROMPT - 1024, PROMPT):
        for entry, mass in pooled(attention[1][position], position)[0].items():
            wanted[entry] += mass
    assert trace.prompt_mass[1] == pytest.approx(wanted, rel=1e-3, abs=1e-5)


def test_the_header_says_what_it_is_and_how_well_the_model_read(recorded, tmp_path):
    tokens, _, logits, trace = recorded
    before = logits[PROMPT - 1 : -1]
    loss = torch.nn.functional.cross_entropy(before, torch.tensor(tokens[PROMPT:]))
    assert trace.header.source == "dense_pooled"
    assert trace.header.quality["nll_per_token"] == pytest.approx(float(loss), abs=2e-3)
    assert trace.forced.all() and trace.token_ids.tolist() == tokens
    assert trace.hidden is None and trace.index_keys is None
    traces.write(tmp_path / "dense.safetensors", trace)
    assert traces.read(tmp_path / "dense.safetensors", check=True).topk == TOPK


def test_a_short_context_pads_its_rows():
    trace = dense.record_dense(tiny_llama(), [1] * 150, 10, name="tiny", prompt_text="", topk=TOPK)
    outside = (140 - 128) // 4 + 1  # position 140 has 13 tokens before its window: entries 0 to 3
    assert (trace.entry_ids[0] >= 0).sum(-1).tolist() == [outside] * 2
    assert (trace.entry_ids[0, :, outside:] == -1).all()


def test_what_cannot_be_recorded_is_told(tmp_path):
    with pytest.raises(FmsimError, match="at most"):
        dense.record_dense(
            tiny_llama(max_position_embeddings=64), [1] * 80, 10, name="tiny", prompt_text=""
        )
    with pytest.raises(FmsimError, match="--steps"):
        dense.record_dense(tiny_llama(), [1] * 10, 10, name="tiny", prompt_text="")
    with pytest.raises(FmsimError, match="no such model"):
        dense.load_dense(tmp_path / "absent.gguf")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FmsimError, match=str(tmp_path)):
        dense.load_dense(tmp_path)
    window = transformers.MistralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=8,
    )
    with pytest.raises(FmsimError, match="sliding_window"):
        dense.record_dense(
            transformers.MistralForCausalLM(window), [1] * 30, 10, name="tiny", prompt_text=""
        )


def test_recording_from_the_command_line(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from typer.testing import CliRunner

    from fmsim.cli.trace import app

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "model")
    tiny_llama().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("a b b a " * 100)
    out = tmp_path / "out.safetensors"
    made = [
        "record",
        "--dense",
        tmp_path / "model",
        "--prompt-file",
        tmp_path / "text.txt",
        "--context",
        200,
        "--steps",
        20,
        "--out",
        out,
    ]
    done = CliRunner().invoke(app, [str(word) for word in made], catch_exceptions=False)
    assert done.exit_code == 0
    trace = traces.read(out, check=True)
    assert (trace.n_steps, trace.header.prompt_tokens, len(trace.header.model.sha256)) == (
        20,
        200,
        64,
    )
    told = CliRunner().invoke(app, ["info", str(out), "--check", "--json"], catch_exceptions=False)
    assert json.loads(told.stdout)["header"]["source"] == "dense_pooled"
