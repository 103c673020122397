"""What facts and questions look like, in tokens.

Each line is an ``Insert``: it goes between two tokens of real text.

The wording is fixed on purpose: a small model must learn the finding, not the language. Values are
runs of single-digit tokens; the answer of a question starts at the first of them and ends with the
full stop.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

from fmsim.nano import tokenizer as bpe
from fmsim.nano import words

FACT_STYLES = (
    (" The", "."),
    ("\nThe", ".\n"),
    (" Note that the", "."),
    (" Remember that the", "."),
)
FACT_STYLE_ODDS = (0.5, 0.3, 0.1, 0.1)
PAIR_ODDS = 0.3  # of a key being adjective-noun
NAMES, NAME_LETTERS = 8000, 5
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]

Tokens = list[int]


@dataclass
class Insert:
    """``tokens`` to stand at ``place`` (0 = start of the text, 1 = its end); ``answer`` is the span
    [from, to) of them.

    ``quote_tokens`` > 0: the last tokens are still open, to be copied from earlier text: that many
    that are given, then the answer. The quote is from ``quote_place`` (0 = start, 1 = just before
    the question), or from anywhere.
    """

    place: float
    tokens: Tokens
    answer: tuple[int, int] = (0, 0)
    quote_tokens: int = 0
    quote_place: float | None = None


@lru_cache(4096)
def piece(text: str) -> tuple[int, ...]:
    """The tokens of a fixed phrase.

    Phrases end where the tokenizer starts a new piece anyway, so they may be joined.
    """
    return tuple(bpe.load().encode(text).ids)


class Wording:
    """Keys, names and values, of training or of evaluation: the two share no word and no name."""

    def __init__(self, evaluation: bool):
        listed = words.load(evaluation)
        self.nouns = _encoded(" " + word for word in listed["nouns"])
        self.adjectives = _encoded(" " + word for word in listed["adjectives"])
        self.heads = _encoded(f"-{word}" for word in listed["nouns"])
        names = sorted(
            {
                _name(letters)
                for letters in np.random.default_rng(0).integers(26, size=(NAMES, NAME_LETTERS))
            }
        )
        self.names = _encoded(
            " " + name for name in names if words.is_for_evaluation(name) == evaluation
        )
        self.digits = [piece(str(digit))[0] for digit in range(10)]

    def keys(self, rng: np.random.Generator, count: int) -> list[Tokens]:
        """``count`` different keys."""
        found: dict[tuple[int, ...], None] = {}
        while len(found) < count:
            noun = int(rng.integers(len(self.nouns)))
            if rng.random() < PAIR_ODDS:
                key = self.adjectives[rng.integers(len(self.adjectives))] + self.heads[noun]
            else:
                key = self.nouns[noun]
            found[tuple(key)] = None
        return [list(key) for key in found]

    def some_nouns(self, rng: np.random.Generator, count: int) -> list[Tokens]:
        """``count`` different nouns."""
        return [self.nouns[i] for i in rng.choice(len(self.nouns), count, replace=False)]

    def some_names(self, rng: np.random.Generator, count: int) -> list[Tokens]:
        """``count`` different names of variables."""
        return [self.names[i] for i in rng.choice(len(self.names), count, replace=False)]

    def value(self, rng: np.random.Generator, digits: int | None = None) -> Tokens:
        """A number of 4 to 7 digits, or of ``digits``, not starting with 0."""
        count = digits or int(rng.integers(4, 8))
        drawn = rng.integers(10, size=count)
        drawn[0] = max(1, drawn[0])
        return [self.digits[digit] for digit in drawn]


@cache
def wording(evaluation: bool) -> Wording:
    """The two wordings, each encoded once a process."""
    return Wording(evaluation)


def _encoded(texts) -> list[Tokens]:
    return [item.ids for item in bpe.load().encode_batch(list(texts))]


def _name(letters: np.ndarray) -> str:
    return "".join(chr(ord("A") + letter) for letter in letters)


def _line(place: float, question: Tokens, answer: Tokens, after: str) -> Insert:
    """A question, its answer, and what closes it; ``answer`` includes the full stop."""
    return Insert(
        place, [*question, *answer, *piece(after)], (len(question), len(question) + len(answer))
    )


def _joined(items: list[Tokens], between: str) -> Tokens:
    joined = list(items[0])
    for item in items[1:]:
        joined += [*piece(between), *item]
    return joined


def fact(rng: np.random.Generator, place: float, key: Tokens, value: Tokens) -> Insert:
    """``The magic number for amber is 12345.`` in one of ``FACT_STYLES``."""
    before, after = FACT_STYLES[rng.choice(len(FACT_STYLES), p=FACT_STYLE_ODDS)]
    return Insert(
        place, [*piece(before + " magic number for"), *key, *piece(" is "), *value, *piece(after)]
    )


def ask(place: float, key: Tokens, value: Tokens) -> Insert:
    """One key, one value."""
    question = [
        *piece("\nQuestion: What is the magic number for"),
        *key,
        *piece("? Answer: The magic number for"),
        *key,
        *piece(" is "),
    ]
    return _line(place, question, [*value, *piece(".")], "\n")


def ask_all(place: float, key: Tokens, values: list[Tokens]) -> Insert:
    """Multi-value: every value of one key, in the order given."""
    question = [
        *piece("\nQuestion: What are all the magic numbers for"),
        *key,
        *piece("? Answer: The magic numbers for"),
        *key,
        *piece(" are "),
    ]
    return _line(place, question, [*_joined(values, ", "), *piece(".")], "\n")


def ask_each(place: float, keys: list[Tokens], values: list[Tokens]) -> Insert:
    """Multi-query: several keys, answered one sentence each, in the order asked."""
    asked = [*_joined(keys[:-1], ","), *piece(" and"), *keys[-1]]
    sentence = [*piece(" The magic number for")]
    question = [
        *piece("\nQuestion: What are the magic numbers for"),
        *asked,
        *piece("? Answer:"),
        *sentence,
        *keys[0],
        *piece(" is "),
    ]
    answer = [*values[0], *piece(".")]
    for key, value in zip(keys[1:], values[1:]):
        answer += [*sentence, *key, *piece(" is "), *value, *piece(".")]
    return _line(place, question, answer, "\n")


def assign(place: float, name: Tokens, value: Tokens | None, source: Tokens | None) -> Insert:
    """Tracking: ``VAR ABCDE = 12345.`` or ``VAR FGHIJ = VAR ABCDE.``"""
    right = [*piece(" = "), *value] if value else [*piece(" = VAR"), *source]
    return Insert(place, [*piece(" VAR"), *name, *right, *piece(".")])


def ask_names(place: float, value: Tokens, names: list[Tokens]) -> Insert:
    """Tracking: all variables that hold a value, along the chain. As in RULER the answer begins by
    saying the value again.
    """
    question = [
        *piece("\nQuestion: Which variables have the value "),
        *value,
        *piece("? Answer: The variables with the value "),
        *value,
        *piece(" are"),
    ]
    return _line(place, question, [*_joined(names, ","), *piece(".")], "\n")


def ask_text(
    place: float, quote_tokens: int, answer_tokens: int, quote_place: float | None = None
) -> Insert:
    """Early text: a quote of it, to be continued.

    What is quoted is known once the text is (`fmsim.nano.weaving.weave`).
    """
    question = [*piece("\nQuestion: How does the earlier text go on? Answer:")]
    start = len(question) + quote_tokens
    return Insert(
        place,
        question + [0] * (quote_tokens + answer_tokens),
        (start, start + answer_tokens),
        quote_tokens,
        quote_place,
    )


def tell(place: float, thing: Tokens, value: Tokens) -> Insert:
    """Memory: the user says something about himself in a session."""
    return Insert(
        place,
        [
            *piece("\nUser: My"),
            *thing,
            *piece(" code is "),
            *value,
            *piece(".\nAssistant: I will remember that.\nUser:"),
        ],
    )


def recall(place: float, thing: Tokens, value: Tokens) -> Insert:
    """Memory: the user asks for it later."""
    question = [
        *piece("\nUser: What is my"),
        *thing,
        *piece(" code?\nAssistant: Your"),
        *thing,
        *piece(" code is "),
    ]
    return _line(place, question, [*value, *piece(".")], "\nUser:")


def session(place: float, number: int, day: int) -> Insert:
    """Memory: the head of a dated session; ``day`` counts from the first of January 2023, months of
    28 days.
    """
    month, year = MONTHS[day // 28 % 12], 2023 + day // 336
    return Insert(
        place,
        [
            *piece("\n\nSession "),
            *_number(number),
            *piece(" on "),
            *_number(day % 28 + 1),
            *piece(f" {month} "),
            *_number(year),
            *piece(".\nUser:"),
        ],
    )


def turn(place: float, speaker: str) -> Insert:
    """Memory: the other one speaks."""
    return Insert(place, [*piece(f"\n{speaker}:")])


def _number(number: int) -> Tokens:
    return [piece(digit)[0] for digit in str(number)]
