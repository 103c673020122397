"""Task families: exact lengths, answers that the context holds, fixed seeds, RULER's scoring."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmsim.errors import FmsimError
from fmsim.nano import tokenizer as bpe
from fmsim.nano import tokens as corpora
from fmsim.nano import wording as say
from fmsim.tasks import FAMILIES, Question, build, in_contexts
from fmsim.tasks.contexts import SHARING

rng = np.random.default_rng(0)
WORDS = [
    "the",
    "river",
    "ran",
    "past",
    "an",
    "old",
    "mill",
    "and",
    "nobody",
    "knew",
    "who",
    "had",
    "built",
    "it",
    "there",
    "before",
    "stones",
]
CORPUS = corpora.from_texts(
    {f"text {n}": " ".join(rng.choice(WORDS, 4000)) + "." for n in range(6)}
)


def text_of(tokens):
    return bpe.load().decode(list(map(int, tokens)), skip_special_tokens=False)


@settings(max_examples=20, deadline=None)
@given(
    tasks=st.lists(st.sampled_from(FAMILIES), min_size=1, max_size=5, unique=True),
    length=st.integers(2048, 6000),
    sample=st.integers(0, 3),
)
def test_contexts_have_their_length_and_a_seed_decides_them(tasks, length, sample):
    contexts = build(tasks, length, sample, CORPUS)
    assert all(
        len(context.tokens) == length and context.tokens[0] == bpe.BOS_ID for context in contexts
    )
    assert {question.task for context in contexts for question in context.questions} == set(tasks)
    assert len(contexts) == len(set(tasks) - set(SHARING)) + bool(set(tasks) & set(SHARING))
    again = [
        context for part in in_contexts(tasks) for context in build(part, length, sample, CORPUS)
    ]  # one at a time
    other = build(tasks, length, sample, CORPUS, seed=43)
    for context, same, unlike in zip(contexts, again, other, strict=True):
        assert np.array_equal(context.tokens, same.tokens) and context.questions == same.questions
        assert not np.array_equal(context.tokens, unlike.tokens)


@pytest.mark.parametrize("task", FAMILIES)
def test_the_context_holds_what_is_asked_and_the_answer_scores_full(task):
    for sample in range(3):
        [context] = build([task], 4096, sample, CORPUS)
        text = text_of(context.tokens)
        for question in context.questions:
            assert question.score(question.answer) == 1.0
            assert question.score([]) == 0.0
            if task != "text_recall":
                assert all(reference in text for reference in question.references)


def questions(task, length=4096, sample=0):
    [context] = build([task], length, sample, CORPUS)
    return text_of(context.tokens), context.questions


def test_multikey_dense_and_qa_fill_the_context_with_distractors():
    text, [question] = questions("niah_multikey_dense")
    assert text.count("magic number for") == 4096 // 256
    text, [question] = questions("qa")
    assert text.count("Document ") == text.count("magic number for") == 4096 // 160
    asked = text_of(question.tokens).split("magic number for ")[1].split("?")[0]
    assert text.count(f"magic number for {asked} is") == 1
    adjective, noun = asked.split("-")
    assert text.count(f"for {adjective}-") > 5 and text.count(f"-{noun} is") > 5


def test_needles_of_one_context_are_about_different_keys():
    [context] = build(list(SHARING), 8192, 1, CORPUS)
    text = text_of(context.tokens)
    keys = [part.split(" is ")[0] for part in text.split("magic number for ")[1:]]
    assert (
        len(keys) == 1 + 4 + 4 + 4 and len(set(keys)) == 1 + 4 + 1 + 4
    )  # the key of several values comes four times


def test_an_updated_memory_is_the_one_told_last():
    text, [question] = questions("memory_update")
    told = [part.split(".")[0] for part in text.split(" code is ")[1:]]
    assert len(told) == 2 and question.references == (told[1],)


def test_variables_form_a_chain():
    text, [question] = questions("vt")
    names = question.references
    assert all(f"VAR {name} = VAR {source}." in text for source, name in itertools.pairwise(names))


def test_rounds_stand_after_the_rounds_before_rightly_answered():
    [context] = build(["multi_round"], 4096, 0, CORPUS)
    text, asked = text_of(context.tokens), context.questions
    assert len(asked) == 4 and text.count(" code is ") == 8
    for before, question in itertools.pairwise(asked):
        assert (
            question.tokens[: len(before.tokens) + len(before.answer)]
            == before.tokens + before.answer
        )
    for question in asked:
        thing = text_of(question.tokens).rsplit("What is my ", 1)[1].split(" code")[0]
        assert f"My {thing} code is {question.references[0]}." in text


def test_recalled_text_goes_on_from_a_quote_that_occurs_once():
    [context] = build(["text_recall"], 4096, 0, CORPUS)
    tokens, [question] = context.tokens.tolist(), context.questions
    quote = list(question.tokens[-12:] + question.answer)
    assert sum(tokens[i : i + 12] == quote[:12] for i in range(len(tokens))) == 1
    assert any(tokens[i : i + 24] == quote for i in range(len(tokens)))


@pytest.mark.parametrize("length", [2048, 20_000])
def test_common_and_frequent_words_are_just_that(length):
    text, [question] = questions("cwe", length)
    listed = [
        item.split()[-1] if item.split() else "" for item in text.replace("<|bos|>", "").split(".")
    ]
    counts = {
        word: sum(word == "".join(c for c in item if not c.isdigit()) for item in listed)
        for word in question.references
    }
    others = {}
    for item in listed:
        word = "".join(c for c in item if not c.isdigit())
        others[word] = others.get(word, 0) + 1
    rare = [count for word, count in others.items() if word not in counts and word]
    assert len(counts) == 10 and min(counts.values()) > 2 * max(rare)
    text, [question] = questions("fwe", length)
    words, counts = np.unique(text.replace("<|bos|>", "").split(), return_counts=True)
    top = words[np.argsort(-counts)][:4].tolist()
    assert top[0] == "..." and top[1:] == list(question.references)


def test_scoring_is_rulers():
    tokens = lambda text: tuple(bpe.load().encode(text).ids)
    question = Question("t", (), tokens("12, 34."), ("12", "34"), "all")
    assert [question.score(tokens(text)) for text in ("I say 34 and 12", "only 12", "none")] == [
        1.0,
        0.5,
        0.0,
    ]
    assert Question("t", (), (), ("Amber", "Mill"), "any").score(tokens(" the AMBER light")) == 1.0
    exact = Question("t", (), tokens(" a b"), ("a b",), "exact")
    assert exact.score(tokens(" a b") + tokens(" c")) == 1.0 and exact.score(tokens(" A b")) == 0.0


def test_unknown_families_and_short_contexts_are_errors():
    with pytest.raises(FmsimError, match="niah_single"):
        build(["needle"], 4096, 0, CORPUS)
    with pytest.raises(FmsimError, match="too few"):
        build(list(SHARING), 600, 0, CORPUS)
    assert say.wording(evaluation=True).nouns
