"""benchmarks/nano/examine.py: questions stand where their answers are looked for."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nano_training.tiny_nano import tiny_nano

from fmsim.exec.whole.forward import Found
from fmsim.nano.tokens import Corpus
from fmsim.nano.training.trainer import Workers

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "nano" / "examine.py"
VOCABULARY = 4096


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("examine", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def corpus():
    text = np.random.default_rng(0).integers(300, VOCABULARY, 20_000).astype(np.uint16)
    return Corpus(text, np.array([0, len(text)]), ["made up"])


@pytest.fixture
def model():
    made = tiny_nano(VOCABULARY)
    made.lm_head = torch.nn.Identity()
    return made


def foretells(monkeypatch, but=()):
    """A forward whose hidden states are the next token of all but some places."""

    def forward(model, tokens, positions, manner):
        following = tokens.roll(-1, 1).flatten()
        following[list(but)] = 0
        return Found(F.one_hot(following, VOCABULARY).float(), None, None)

    monkeypatch.setattr("fmsim.exec.whole.forward.train_forward", forward)


def test_an_answer_is_right_where_every_token_of_it_was_foretold(script, model, monkeypatch):
    one = script.sequence(np.arange(100), [("a", [7, 8], [1, 2]), ("b", [9], [3, 4, 5, 6])])
    two = script.sequence(np.arange(200), [("c", [7], [1])])
    assert len(one.tokens) == 128 and len(two.tokens) == 256
    assert one.answers == [("a", 102, 104), ("b", 105, 109)]
    foretells(monkeypatch, but=[105])  # the second token of b's answer, in the first row
    assert script.judged(model, [one, two], torch.device("cpu")) == [
        ("a", True, 1.0, True),
        ("b", False, 0.75, False),
        ("c", True, 1.0, True),
    ]


def asks_in_order(monkeypatch, model, wanted: list[list[int]], separator: list[int], end: int):
    """A forward that goes on with the first of ``wanted`` not said yet whose start was said."""

    def forward(model, tokens, positions, manner):
        out = tokens.roll(-1, 1)
        for row, given in enumerate(tokens.tolist()):
            start = given.index(7) + 1
            for place in range(start - 1, start + sum(map(len, wanted)) + 2 * len(wanted)):
                said, items = given[start : place + 1], list(wanted)
                while said:
                    begun = [item for item in items if said[: len(item)] == item]
                    if not begun or len(said) < len(begun[0]) + len(separator):
                        break
                    items.remove(begun[0])
                    said = said[len(begun[0]) + len(separator) :]
                goes = [item for item in items if item[: len(said)] == said and item != said]
                after = [*separator, 0] if len(items) > 1 else [end]
                out[row, place] = goes[0][len(said)] if goes else after[0]
        return Found(F.one_hot(out.flatten(), VOCABULARY).float(), None, None)

    monkeypatch.setattr("fmsim.exec.whole.forward.train_forward", forward)


@pytest.mark.parametrize("seed", range(6))
def test_things_in_the_models_own_order_are_right(script, model, monkeypatch, seed):
    rng = np.random.default_rng(seed)
    [separator] = script.say.piece(",")
    things = [[1011, 1012], [1011, 1013, 1014], [1015], [1016, 1017]]
    told = [things[i] for i in rng.permutation(4)]
    answer = told[0]
    for thing in told[1:]:
        answer = [*answer, separator, *thing]
    asked = script.sequence(np.arange(30, 90), [("vt", [7], [*answer, 9])])
    asks_in_order(monkeypatch, model, things, [separator], 9)
    [verdict] = script.judged(model, [asked], torch.device("cpu"))
    assert verdict.right and verdict.in_order == (told == things)
    asks_in_order(monkeypatch, model, [*things[:3], [1016, 1018]], [separator], 9)
    [verdict] = script.judged(model, [asked], torch.device("cpu"))
    assert not verdict.right and not verdict.in_order


def test_a_row_a_task_with_all_its_questions(script, model, corpus, monkeypatch):
    foretells(monkeypatch)
    plan = ["many:2048:1", "families:4096:2"]
    rows = list(script.examine(model, corpus, plan, 0, 600, Workers("cpu")))
    assert rows[0]["task"] == "many" and rows[0]["questions"] == 32
    assert {row["contexts"] for row in rows[1:]} == {2} and len(rows) > 5
    assert all(row["exact"] == 1.0 for row in rows)
