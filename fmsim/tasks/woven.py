"""Families whose facts are woven into real text: needles, variable tracking, questions over
distractors, memory, multi-round recall.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from fmsim.errors import FmsimError
from fmsim.nano import tokenizer as bpe
from fmsim.nano import wording as say
from fmsim.nano.lessons import session_marks
from fmsim.nano.wording import Insert, Tokens, Wording
from fmsim.tasks.questions import Question, Scoring, texts

VALUE_DIGITS = 5
DEPTHS = 40  # RULER's: as many even steps from the first token to the last
LATEST = 0.97  # a fact at the very end would lie in the sliding window
DENSE_TOKENS = 256  # a needle to each, where the haystack is made of needles
DOCUMENT_TOKENS = 160
# distracting documents that share the asked key's noun, and as many that share its adjective
ALIKE = 12
MEMORIES = 6
TOLD, ROUNDS = 8, 4
QUOTED, CONTINUED = 12, 12


class Draw:
    """Words and places for one context: no key, noun or name is given out twice, so that families
    can share it.
    """

    def __init__(self, rng: np.random.Generator, length: int):
        self.rng, self.length, self.words = rng, length, say.wording(evaluation=True)
        self._keys = _unlike(self.words, rng)
        self._names = iter(rng.permutation(len(self.words.names)))
        self._nouns = iter(rng.permutation(len(self.words.nouns)))

    def keys(self, count: int) -> list[Tokens]:
        return list(islice(self._keys, count))

    def things(self, count: int) -> list[Tokens]:
        return [self.words.nouns[i] for i in islice(self._nouns, count)]

    def names(self, count: int) -> list[Tokens]:
        return [self.words.names[i] for i in islice(self._names, count)]

    def values(self, count: int) -> list[Tokens]:
        return [self.words.value(self.rng, VALUE_DIGITS) for _ in range(count)]

    def depths(self, count: int) -> np.ndarray:
        """float64 [count], each one of RULER's 40."""
        return LATEST * self.rng.integers(DEPTHS, size=count) / (DEPTHS - 1)


def _unlike(words: Wording, rng: np.random.Generator) -> Iterator[Tokens]:
    """Keys without end, none twice: single nouns as long as there are any, adjective-noun pairs
    among them and after them.
    """
    nouns, told = iter(rng.permutation(len(words.nouns))), set()
    while True:
        number = next(nouns, None) if rng.random() >= say.PAIR_ODDS else None
        if number is not None:
            yield words.nouns[number]
            continue
        pair = int(rng.integers(len(words.adjectives))), int(rng.integers(len(words.heads)))
        if pair not in told:
            told.add(pair)
            yield words.adjectives[pair[0]] + words.heads[pair[1]]


@dataclass(frozen=True)
class WovenTask:
    """What a family tells, and what it asks once the text is there: ``ask`` is given the context's
    tokens.
    """

    told: list[Insert]
    ask: Callable[[np.ndarray], list[Question]]


def _asked(
    task: str, told: list[Insert], line: Insert, references: list[Tokens], scoring: Scoring = "all"
) -> WovenTask:
    """One question, known before the text."""
    start, end = line.answer
    question = Question(
        task, tuple(line.tokens[:start]), tuple(line.tokens[start:end]), texts(references), scoring
    )
    return WovenTask(told, lambda text: [question])


def _facts(
    draw: Draw, places: np.ndarray, keys: list[Tokens], values: list[Tokens]
) -> list[Insert]:
    return [
        say.fact(draw.rng, float(place), key, value)
        for place, key, value in zip(places, keys, values, strict=True)
    ]


def niah_single(draw: Draw) -> WovenTask:
    """One key, one value."""
    return _needle("niah_single", draw, others=0)


def niah_multikey(draw: Draw) -> WovenTask:
    """One key asked among four."""
    return _needle("niah_multikey", draw, others=3)


def niah_multikey_dense(draw: Draw) -> WovenTask:
    """One key asked where the haystack is made of needles."""
    return _needle("niah_multikey_dense", draw, others=max(1, draw.length // DENSE_TOKENS - 1))


def _needle(task: str, draw: Draw, others: int) -> WovenTask:
    keys, values = draw.keys(1 + others), draw.values(1 + others)
    places = np.concatenate([draw.depths(1), LATEST * draw.rng.random(others)])
    return _asked(
        task, _facts(draw, places, keys, values), say.ask(1.0, keys[0], values[0]), values[:1]
    )


def niah_multivalue(draw: Draw) -> WovenTask:
    """Four values of one key."""
    [key], values = draw.keys(1), draw.values(4)
    told = _facts(draw, np.sort(draw.depths(4)), [key] * 4, values)
    return _asked("niah_multivalue", told, say.ask_all(1.0, key, values), values)


def niah_multiquery(draw: Draw) -> WovenTask:
    """Four keys in one question."""
    keys, values = draw.keys(4), draw.values(4)
    return _asked(
        "niah_multiquery",
        _facts(draw, draw.depths(4), keys, values),
        say.ask_each(1.0, keys, values),
        values,
    )


def vt(draw: Draw) -> WovenTask:
    """A chain of five variables, each set to the one before; all that hold a value are asked
    for.
    """
    names, [value], places = draw.names(5), draw.values(1), np.sort(draw.depths(5))
    told = [say.assign(float(places[0]), names[0], value, None)]
    told += [
        say.assign(float(place), name, None, source)
        for place, name, source in zip(places[1:], names[1:], names)
    ]
    return _asked("vt", told, say.ask_names(1.0, value, names), names)


def qa(draw: Draw) -> WovenTask:
    """A paragraph holds the answer; every other holds a fact too, some about a key of the same noun
    or adjective.
    """
    count = max(4, draw.length // DOCUMENT_TOKENS)
    keys, values = _alike_keys(draw, count), draw.values(count)
    # the asked one is the first of `keys`, its document is anywhere
    order = draw.rng.permutation(count)
    told = []
    for number, which in enumerate(order):
        start = LATEST * number / count
        within = LATEST * (number + 0.2 + 0.6 * draw.rng.random()) / count
        told += [
            Insert(start, _heading(number + 1)),
            say.fact(draw.rng, within, keys[which], values[which]),
        ]
    return _asked("qa", told, say.ask(1.0, keys[0], values[0]), values[:1], "any")


def _heading(number: int) -> Tokens:
    return [
        *say.piece("\n\nDocument "),
        *(say.piece(digit)[0] for digit in str(number)),
        *say.piece(":\n"),
    ]


def _alike_keys(draw: Draw, count: int) -> list[Tokens]:
    """``count`` pairs of adjective and noun, the first alike to up to 2 x ALIKE of the others."""
    adjectives, heads = (
        draw.rng.permutation(len(part)) for part in (draw.words.adjectives, draw.words.heads)
    )
    alike = min(ALIKE, (count - 1) // 2)
    pairs = {(adjectives[0], heads[0]): None}
    pairs |= dict.fromkeys((adjectives[0], head) for head in heads[1 : alike + 1])
    pairs |= dict.fromkeys((adjective, heads[0]) for adjective in adjectives[1 : alike + 1])
    while len(pairs) < count:
        pairs[draw.rng.choice(adjectives[1:]), draw.rng.choice(heads[1:])] = None
    return [draw.words.adjectives[adjective] + draw.words.heads[head] for adjective, head in pairs]


def memory(draw: Draw) -> WovenTask:
    """Things told in dated sessions of a user and an assistant, one asked for."""
    things, values = draw.things(MEMORIES), draw.values(MEMORIES)
    told = [
        say.tell(float(place), thing, value)
        for place, thing, value in zip(draw.depths(MEMORIES), things, values, strict=True)
    ]
    return _asked("memory", told, say.recall(1.0, things[0], values[0]), values[:1])


def memory_update(draw: Draw) -> WovenTask:
    """A thing told twice, in different sessions: what was told last counts."""
    [thing], values = draw.things(1), draw.values(2)
    first, last = np.sort(draw.rng.choice(DEPTHS, 2, replace=False)) * LATEST / (DEPTHS - 1)
    told = [say.tell(float(first), thing, values[0]), say.tell(float(last), thing, values[1])]
    return _asked("memory_update", told, say.recall(1.0, thing, values[1]), values[1:])


def multi_round(draw: Draw) -> WovenTask:
    """Exact recall in rounds: what was told in sessions is asked for, one thing a round, each after
    the rounds before, rightly answered.
    """
    things, values = draw.things(TOLD), draw.values(TOLD)
    told = [
        say.tell(float(place), thing, value)
        for place, thing, value in zip(draw.depths(TOLD), things, values, strict=True)
    ]
    asked, before = [], []
    for thing, value in zip(things[:ROUNDS], values[:ROUNDS], strict=True):
        line = say.recall(1.0, thing, value)
        start, end = line.answer
        answer = tuple(line.tokens[start:end])
        asked.append(
            Question(
                "multi_round", (*before, *line.tokens[:start]), answer, texts([value]), "exact"
            )
        )
        before += line.tokens
    return WovenTask(told, lambda text: asked)


def text_recall(draw: Draw) -> WovenTask:
    """A stretch of the text is quoted, and what followed it is asked for, word for word."""

    def ask(text: np.ndarray) -> list[Question]:
        quote = unique_stretch(draw.rng, text, float(draw.depths(1)[0]), QUOTED, QUOTED + CONTINUED)
        lead = say.ask_text(1.0, QUOTED, CONTINUED).tokens[: -QUOTED - CONTINUED]
        return [
            Question(
                "text_recall",
                (*lead, *quote[:QUOTED]),
                tuple(quote[QUOTED:]),
                texts([quote[QUOTED:]]),
                "exact",
            )
        ]

    return WovenTask([], ask)


def unique_stretch(
    rng: np.random.Generator, text: np.ndarray, depth: float, given: int, total: int
) -> list[int]:
    """``total`` tokens of ``text`` near ``depth`` whose first ``given`` stand nowhere else in it;
    FmsimError where no try finds any.
    """
    last = len(text) - total
    for _ in range(64):
        start = min(last, max(1, int(depth * last + rng.integers(-256, 257))))
        stretch = text[start : start + total]
        windows = np.flatnonzero(text[: len(text) - given] == stretch[0])
        for number in range(1, given):
            windows = windows[text[windows + number] == stretch[number]]
        if len(windows) == 1 and not (stretch == bpe.EOS_ID).any():
            return stretch.tolist()
    raise FmsimError(
        f"text_recall: {len(text)} tokens of text hold no stretch near {depth:.0%} that occurs"
        " once; give other text or another seed"
    )


def sessions(draw: Draw) -> list[Insert]:
    """Heads of dated sessions and changes of speaker, for the families that speak of them."""
    return session_marks(draw.rng, draw.length).inserts


IN_SESSIONS = ("memory", "memory_update", "multi_round")
# may stand in one context
SHARING = {
    family.__name__: family
    for family in (
        niah_single,
        niah_multikey,
        niah_multivalue,
        niah_multiquery,
        vt,
        memory,
        memory_update,
        multi_round,
        text_recall,
    )
}
ALONE = {family.__name__: family for family in (niah_multikey_dense, qa)}
