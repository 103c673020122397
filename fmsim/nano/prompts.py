"""Questions put to a trained model: prompts with known answers, and streams of decode steps to
record.

Everything stands in held-out text and is about keys that training never used. Kinds follow RULER
(Hsieh et al. 2024) in spirit, with the wording the model was trained on; ``memory`` follows
LongMemEval (Wu et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fmsim.errors import FmsimError
from fmsim.exec.runs.stream import Stream, Turn, n_steps
from fmsim.nano import tokenizer as bpe
from fmsim.nano import wording as say
from fmsim.nano.lessons import Sessions, session_marks
from fmsim.nano.tokens import Corpus
from fmsim.nano.weaving import weave
from fmsim.nano.wording import Insert, Tokens, Wording

VALUE_DIGITS = 5
STREAM_FACTS = 32
MEMORY_FACTS = 24
TURN_TOKENS = (24, 48)  # of text a speaker says in a memory stream


@dataclass(frozen=True)
class EvaluationPrompt:
    """tokens: uint16 [length], up to where the answer starts; answer: the tokens to come;
    references: strings in it.
    """

    kind: str
    tokens: np.ndarray
    answer: Tokens
    references: list[str]


# what is told, the question, the tokens of each reference
Task = tuple[list[Insert], Insert, list[Tokens]]


def evaluation_prompt(
    kind: str,
    length_tokens: int,
    rng: np.random.Generator,
    corpus: Corpus,
    depth: float | None = None,
) -> EvaluationPrompt:
    """A prompt of exactly ``length_tokens`` whose question stands at its end.

    ``depth`` (0 = start of the text, 1 = its end; drawn if None) is where the asked fact or the
    quoted text stands; kinds that need several facts spread them and ignore it.
    """
    if kind not in TASKS:
        raise FmsimError(f"no task kind {kind!r}; there are {', '.join(TASKS)}")
    place = float(rng.random()) if depth is None else depth
    told, question, references = TASKS[kind](
        rng, say.wording(evaluation=True), length_tokens, place
    )
    woven = weave(
        rng, corpus, length_tokens + len(question.tokens) - question.answer[0], [*told, question]
    )
    if not woven.spans:
        raise FmsimError(
            f"the {length_tokens} tokens of text hold no quote that occurs once; take other text or"
            " another seed"
        )
    answer = woven.tokens[slice(*woven.spans[-1])].tolist()
    return EvaluationPrompt(
        kind, woven.tokens[:length_tokens], answer, _texts(references or [answer])
    )


def _single(rng: np.random.Generator, words: Wording, length: int, depth: float) -> Task:
    return _one_of(rng, words, depth, others=0)


def _multikey(rng: np.random.Generator, words: Wording, length: int, depth: float) -> Task:
    return _one_of(rng, words, depth, others=3)


def _multikey_dense(rng: np.random.Generator, words: Wording, length: int, depth: float) -> Task:
    return _one_of(rng, words, depth, others=max(1, length // 256 - 1))


def _one_of(rng: np.random.Generator, words: Wording, depth: float, others: int) -> Task:
    """One asked fact at ``depth`` among ``others`` anywhere."""
    keys = words.keys(rng, 1 + others)
    values = [words.value(rng, VALUE_DIGITS) for _ in range(1 + others)]
    places = [depth, *rng.random(others)]
    told = [say.fact(rng, place, key, value) for place, key, value in zip(places, keys, values)]
    return told, say.ask(1.0, keys[0], values[0]), [values[0]]


def _multivalue(rng: np.random.Generator, words: Wording, length: int, depth: float) -> Task:
    [key], values = words.keys(rng, 1), [words.value(rng, VALUE_DIGITS) for _ in range(4)]
    told = [
        say.fact(rng, place, key, value) for place, value in zip(np.sort(rng.random(4)), values)
    ]
    return told, say.ask_all(1.0, key, values), values


def _multiquery(rng: np.random.Generator, words: Wording, length: int, depth: float) -> Task:
    keys, values = words.keys(rng, 4), [words.value(rng, VALUE_DIGITS) for _ in range(4)]
    told = [
        say.fact(rng, place, key, value) for place, key, value in zip(rng.random(4), keys, values)
    ]
    return told, say.ask_each(1.0, keys, values), values


def _tracking(rng: np.random.Generator, words: Wording, length: int, depth: float) -> Task:
    names = words.some_names(rng, 5)
    value = words.value(rng, VALUE_DIGITS)
    places = np.sort(rng.random(5))
    told = [say.assign(places[0], names[0], value, None)]
    told += [
        say.assign(place, name, None, source)
        for place, name, source in zip(places[1:], names[1:], names)
    ]
    return told, say.ask_names(1.0, value, names), names


def _early_text(rng: np.random.Generator, words: Wording, length: int, depth: float) -> Task:
    return [], say.ask_text(1.0, 12, 12, quote_place=depth), []


def _memory(rng: np.random.Generator, words: Wording, length: int, depth: float) -> Task:
    """Six things told in sessions, one asked for."""
    things, values = words.some_nouns(rng, 6), [words.value(rng, VALUE_DIGITS) for _ in range(6)]
    told = [say.tell(*item) for item in zip([depth, *rng.random(5)], things, values)]
    return (
        session_marks(rng, length).inserts + told,
        say.recall(1.0, things[0], values[0]),
        [values[0]],
    )


TASKS: dict[str, Callable[[np.random.Generator, Wording, int, float], Task]] = {
    "single": _single,
    "multikey": _multikey,
    "multikey_dense": _multikey_dense,
    "multivalue": _multivalue,
    "multiquery": _multiquery,
    "tracking": _tracking,
    "early_text": _early_text,
    "memory": _memory,
}


def decode_stream(
    kind: str, prompt_tokens: int, rng: np.random.Generator, corpus: Corpus, steps: int = 512
) -> Stream:
    """A prompt of ``prompt_tokens`` and at least ``steps`` decode steps after it.

    "needles": many questions, one after another, about ``STREAM_FACTS`` facts; "continuation": the
    text goes on, all forced; "memory": dated sessions go on, and ask for what was told in all of
    them.
    """
    if kind not in STREAMS:
        raise FmsimError(f"no stream kind {kind!r}; there are {', '.join(STREAMS)}")
    return STREAMS[kind](prompt_tokens, rng, corpus, steps)


def question_stream(
    prompt_tokens: int, rng: np.random.Generator, corpus: Corpus, steps: int, facts: int = 4
) -> Stream:
    """A prompt that holds ``facts`` facts, and questions about one of them at a time: what nano
    answers well.
    """
    keys, values, told = _stream_facts(rng, facts)
    prompt = weave(rng, corpus, prompt_tokens, told).tokens
    return Stream("questions", prompt, _needle_turns(rng, keys, values, steps, joint_odds=0.0))


def _needles_stream(
    prompt_tokens: int, rng: np.random.Generator, corpus: Corpus, steps: int
) -> Stream:
    keys, values, facts = _stream_facts(rng)
    prompt = weave(rng, corpus, prompt_tokens, facts).tokens
    return Stream("needles", prompt, _needle_turns(rng, keys, values, steps))


def _stream_facts(
    rng: np.random.Generator, count: int = STREAM_FACTS
) -> tuple[list[Tokens], list[Tokens], list[Insert]]:
    words = say.wording(evaluation=True)
    keys, values = words.keys(rng, count), [words.value(rng, VALUE_DIGITS) for _ in range(count)]
    return (
        keys,
        values,
        [
            say.fact(rng, place, key, value)
            for place, key, value in zip(rng.random(len(keys)), keys, values)
        ],
    )


def _needle_turns(
    rng: np.random.Generator,
    keys: list[Tokens],
    values: list[Tokens],
    steps: int,
    joint_odds: float = 0.15,
) -> list[Turn]:
    """Questions about one key, or now and then about two or three, in rounds over all keys."""
    turns: list[Turn] = []
    after: Tokens = []
    while n_steps(turns) < steps:
        order = rng.permutation(len(keys))
        while len(order) and n_steps(turns) < steps:
            count = int(rng.integers(2, 4)) if rng.random() < joint_odds and len(order) >= 3 else 1
            chosen, order = order[:count], order[count:]
            asked, known = [keys[i] for i in chosen], [values[i] for i in chosen]
            question = (
                say.ask(1.0, asked[0], known[0]) if count == 1 else say.ask_each(1.0, asked, known)
            )
            turns.append(_turn(after, question, known))
            after = question.tokens[question.answer[1] :]
    return turns


def _continuation_stream(
    prompt_tokens: int, rng: np.random.Generator, corpus: Corpus, steps: int
) -> Stream:
    """The prompt ends within a document, in the middle of what a reader would go on reading."""
    sizes = np.diff(corpus.documents)
    long = np.flatnonzero(sizes >= min(4 * steps, sizes.max()))
    document = rng.choice(long, p=sizes[long] / sizes[long].sum())
    latest = max(1, sizes[document] - steps)
    place = int(corpus.documents[document]) + int(rng.integers(latest // 2, latest))
    text = corpus.tokens.take(np.arange(place - prompt_tokens + 1, place + steps), mode="wrap")
    prompt = np.concatenate([np.array([bpe.BOS_ID], np.uint16), text[: prompt_tokens - 1]])
    return Stream("continuation", prompt, [Turn(text[prompt_tokens - 1 :].tolist())])


def _memory_stream(
    prompt_tokens: int, rng: np.random.Generator, corpus: Corpus, steps: int
) -> Stream:
    things, values, sessions, told = _stream_memories(rng, prompt_tokens)
    prompt = weave(rng, corpus, prompt_tokens, sessions.inserts + told).tokens
    return Stream("memory", prompt, _memory_turns(rng, corpus, sessions, things, values, steps))


def _stream_memories(
    rng: np.random.Generator, prompt_tokens: int
) -> tuple[list[Tokens], list[Tokens], Sessions, list[Insert]]:
    """Twice ``MEMORY_FACTS`` things and their codes; the first half of them is told in the
    prompt.
    """
    words, sessions = say.wording(evaluation=True), session_marks(rng, prompt_tokens)
    things = words.some_nouns(rng, 2 * MEMORY_FACTS)
    values = [words.value(rng, VALUE_DIGITS) for _ in range(2 * MEMORY_FACTS)]
    return (
        things,
        values,
        sessions,
        [say.tell(*item) for item in zip(rng.random(MEMORY_FACTS), things, values)],
    )


def _memory_turns(
    rng, corpus: Corpus, sessions: Sessions, things: list[Tokens], values: list[Tokens], steps: int
) -> list[Turn]:
    """Each round: a new session, a user and an assistant turn of text, something new told (now and
    then), two questions.
    """
    known, turns = MEMORY_FACTS, []
    after: Tokens = []
    while n_steps(turns) < steps:
        after += _new_session(rng, corpus, sessions)
        if known < len(things) and rng.random() < 0.4:
            after += say.tell(1.0, things[known], values[known]).tokens
            known += 1
        for asked in rng.choice(known, 2, replace=False):
            question = say.recall(1.0, things[asked], values[asked])
            turns.append(_turn(after, question, [values[asked]]))
            after = question.tokens[question.answer[1] :]
    return turns


def streams_of_one_context(
    prompt_tokens: int, rng: np.random.Generator, corpus: Corpus, steps: int = 512
) -> list[Stream]:
    """The three kinds of stream after one and the same prompt, which is costly to read: dated
    sessions in which the user tells things, facts between them, and text that goes on where the
    prompt ends.
    """
    keys, key_values, facts = _stream_facts(rng)
    things, values, sessions, told = _stream_memories(rng, prompt_tokens)
    prompt = weave(rng, corpus, prompt_tokens, sessions.inserts + told + facts).tokens
    return [
        Stream("needles", prompt, _needle_turns(rng, keys, key_values, steps)),
        Stream("memory", prompt, _memory_turns(rng, corpus, sessions, things, values, steps)),
        Stream("continuation", prompt, [Turn(_text_after(prompt, corpus, steps))]),
    ]


def _text_after(prompt: np.ndarray, corpus: Corpus, count: int) -> Tokens:
    """The ``count`` tokens of the corpus that follow the longest end of the prompt which stands in
    it.
    """
    ends = np.flatnonzero(corpus.tokens == prompt[-1])
    for back in range(1, len(prompt)):
        longer = ends[corpus.tokens[ends - back] == prompt[-1 - back]]
        if not len(longer):
            break
        ends = longer
    return corpus.tokens.take(np.arange(ends[0] + 1, ends[0] + 1 + count), mode="wrap").tolist()


def _new_session(rng: np.random.Generator, corpus: Corpus, sessions: Sessions) -> Tokens:
    """The head of a session, and what user and assistant say in it."""
    counts = rng.integers(*TURN_TOKENS, size=2)
    start = rng.choice(corpus.breaks)
    text = corpus.tokens.take(np.arange(start, start + counts.sum()), mode="wrap").tolist()
    head = sessions.begin(rng, 1.0).tokens
    return [*head, *text[: counts[0]], *say.turn(1.0, "Assistant").tokens, *text[counts[0] :]]


STREAMS = {
    "needles": _needles_stream,
    "continuation": _continuation_stream,
    "memory": _memory_stream,
}


def _turn(before: Tokens, question: Insert, references: list[Tokens]) -> Turn:
    start, end = question.answer
    return Turn(
        [*before, *question.tokens[:start]],
        end - start,
        tuple(question.tokens[start:end]),
        tuple(_texts(references)),
    )


def _texts(items: list[Tokens]) -> list[str]:
    return [text.strip() for text in bpe.load().decode_batch(items, skip_special_tokens=False)]


def score(references: list[str], generated: Tokens) -> float:
    """RULER's measure: the share of references found in the generated text, whatever the case."""
    text = bpe.load().decode(list(generated), skip_special_tokens=False).lower()
    return sum(reference.lower() in text for reference in references) / len(references)
