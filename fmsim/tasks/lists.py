"""Families whose whole context is a list: RULER's common and frequent words. nano was not trained
on their wording.
"""

from __future__ import annotations

import numpy as np

from fmsim.nano import tokenizer as bpe
from fmsim.nano import wording as say
from fmsim.nano.wording import Tokens
from fmsim.tasks.questions import Question, TaskContext, texts
from fmsim.tasks.woven import Draw

COMMON_WORDS, COMMON_TIMES = (
    10,
    10,
)  # ten words, each ten times as often as the others (RULER: 30 and 3 times)
FREQUENT_WORDS = 3
ZETA = 2.0  # frequencies fall with the square of the rank; the first rank is noise


def cwe(draw: Draw) -> TaskContext:
    """Common words: a numbered list in which ten words come ten times as often as all others."""
    words = [draw.words.nouns[i] for i in draw.rng.permutation(len(draw.words.nouns))]
    room = draw.length - 1
    # of an item with its number
    mean = np.mean([len(word) for word in words]) + 2 + np.log10(max(room, 10))
    items = int(room / mean)
    rare = words[COMMON_WORDS : COMMON_WORDS + max(1, items // 4)]  # at least a few times each
    times = items / (COMMON_WORDS * COMMON_TIMES + len(rare))
    drawn = [*range(COMMON_WORDS)] * max(2, round(times * COMMON_TIMES))
    drawn += [COMMON_WORDS + i % len(rare) for i in range(max(0, items - len(drawn)))]
    listed = [
        [*_number(n), *words[which]] for n, which in enumerate(draw.rng.permutation(drawn), start=1)
    ]
    return _list_context(
        "cwe",
        draw,
        listed,
        "What are the most common words in the list?",
        words[:COMMON_WORDS],
        ",",
    )


def fwe(draw: Draw) -> TaskContext:
    """Frequent words: coded words, their counts a zeta distribution; the three that follow the
    noise are asked for.
    """
    names, noise = draw.names(max(8, min(draw.length // 50, 1000))), list(say.piece(" ..."))
    weights = np.arange(1, len(names) + 2) ** -ZETA
    mean = weights @ [len(noise), *map(len, names)] / weights.sum()
    counts = np.maximum(1, np.rint(weights / weights.sum() * (draw.length - 1) / mean)).astype(int)
    drawn = np.repeat(np.arange(len(counts)), counts)
    listed = [noise if which == 0 else names[which - 1] for which in draw.rng.permutation(drawn)]
    asked = "What are the three most frequent coded words?"
    return _list_context("fwe", draw, listed, asked, names[:FREQUENT_WORDS], ",")


def _list_context(
    task: str, draw: Draw, listed: list[Tokens], question: str, wanted: list[Tokens], between: str
) -> TaskContext:
    """The list cut, or begun again, at exactly the context's length."""
    tokens = np.array([token for item in listed for token in item], np.uint16)
    filled = np.concatenate([np.array([bpe.BOS_ID], np.uint16), np.resize(tokens, draw.length - 1)])
    answer = list(wanted[0])
    for word in wanted[1:]:
        answer += [*say.piece(between), *word]
    lead = [*say.piece(f"\nQuestion: {question} Answer: They are")]
    return TaskContext(
        filled, (Question(task, tuple(lead), (*answer, *say.piece(".")), texts(wanted)),)
    )


def _number(number: int) -> Tokens:
    return [*(say.piece(digit)[0] for digit in str(number)), *say.piece(".")]


LISTS = {"cwe": cwe, "fwe": fwe}
