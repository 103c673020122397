"""What is woven into a training sequence: facts and the questions about them, by kind of sequence.

The dense recipes (a fact every 256 tokens, a question every 128) make a small model find out about
looking back; the others look like evaluation. Places go from 0, the start of the text, to 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fmsim.nano import wording as say
from fmsim.nano.wording import Insert, Tokens, Wording

TURN_TOKENS = 120  # of a memory session, on average
TURNS_A_SESSION = 8
DENSE_TOKENS = 256  # to each fact of a dense recipe
# how many variables a chain has, and how often; the exam's have five
CHAIN, CHAIN_ODDS = (1, 2, 3, 4, 5, 6), (0.1, 0.1, 0.15, 0.2, 0.35, 0.1)
HOPS, HOP_ODDS = (1, 2), (0.5, 0.5)  # the same of the first lesson
HOP_TOKENS = 96  # to each of its chains


def dense_inserts(
    rng: np.random.Generator, words: Wording, length: int, density: float
) -> list[Insert]:
    """length / 256 facts and length / 128 questions, each about a fact drawn evenly from those
    before it.
    """
    count = max(2, round(density * length / DENSE_TOKENS))
    keys = words.keys(rng, count)
    values = [words.value(rng) for _ in keys]
    places = np.sort(rng.random(count))
    places[0] *= 0.05
    inserts = [say.fact(rng, place, key, value) for place, key, value in zip(places, keys, values)]
    for place in rng.uniform(places[0], 1.0, 2 * count):
        asked = rng.integers(np.searchsorted(places, place, side="right"))
        inserts.append(say.ask(place, keys[asked], values[asked]))
    return inserts


def sparse_inserts(
    rng: np.random.Generator, words: Wording, length: int, density: float
) -> list[Insert]:
    """One to length / 512 (at least eight) facts, rather few than many; most questions near the
    end.
    """
    count = int(np.exp(rng.uniform(0, np.log(max(9, length // 512)))))
    keys = words.keys(rng, count)
    values = [words.value(rng) for _ in keys]
    places = rng.random(count) * 0.95
    inserts = [say.fact(rng, place, key, value) for place, key, value in zip(places, keys, values)]
    most = 2 * min(count, 1 + length // 512, 12)
    for asked in rng.integers(count, size=max(1, round(density * rng.integers(1, most + 1)))):
        inserts.append(
            say.ask(
                _later(rng, places[asked], at_end=rng.random() < 0.7), keys[asked], values[asked]
            )
        )
    return inserts


def mixed_inserts(
    rng: np.random.Generator, words: Wording, length: int, density: float
) -> list[Insert]:
    """An episode of another kind every 640 tokens: several values, several keys, chains of
    variables, early text.
    """
    episodes = (several_values, several_keys, tracking, early_text)
    at_end = rng.random() < 0.4
    inserts = []
    keys = iter(words.keys(rng, 6 * (1 + round(density * length / 640))))
    names = iter(
        words.some_names(rng, min(len(words.names), 6 * (1 + round(density * length / 640))))
    )
    for _ in range(max(1, round(density * length / 640))):
        episode = episodes[rng.choice(len(episodes), p=(0.3, 0.25, 0.25, 0.2))]
        inserts += episode(rng, words, names if episode is tracking else keys, at_end)
    return inserts


def memory_inserts(
    rng: np.random.Generator, words: Wording, length: int, density: float
) -> list[Insert]:
    """Sessions of user and assistant with things told and asked for; facts are sparse or, half the
    time, dense.
    """
    most = max(2, round(density * length / DENSE_TOKENS)) if rng.random() < 0.5 else 8
    things = words.some_nouns(
        rng, int(rng.integers(1, min(most, length // 256, len(words.nouns)) + 1))
    )
    values = [words.value(rng) for _ in things]
    places = rng.random(len(things)) * 0.9
    inserts = session_marks(rng, length).inserts + [
        say.tell(*fact) for fact in zip(places, things, values)
    ]
    at_end = rng.random() < 0.4
    for asked in rng.integers(len(things), size=2 * len(things)):
        inserts.append(say.recall(_later(rng, places[asked], at_end), things[asked], values[asked]))
    return inserts


def update_inserts(
    rng: np.random.Generator, words: Wording, length: int, density: float
) -> list[Insert]:
    """Things told one to three times, in dated sessions; each question wants what was told last
    before it.
    """
    count = max(1, min(round(density * length / 1024), len(words.nouns) // 2, 64))
    inserts = session_marks(rng, length).inserts
    for thing in words.some_nouns(rng, count):
        told = np.sort(rng.random(rng.integers(1, 4))) * 0.9
        values = [words.value(rng) for _ in told]
        inserts += [say.tell(place, thing, value) for place, value in zip(told, values)]
        for place in rng.uniform(told[0], 1.0, 2) ** (1 / (1 + (rng.random(2) < 0.5))):
            latest = max(0, int(np.searchsorted(told, place)) - 1)
            inserts.append(say.recall(float(max(place, told[0])), thing, values[latest]))
    return inserts


def tracking_inserts(
    rng: np.random.Generator, words: Wording, length: int, density: float
) -> list[Insert]:
    """One chain of variables to one every 1,536 tokens, rather few than many; half of them near
    together.
    """
    most = max(2.0, density * length / 1536)
    count = int(np.exp(rng.uniform(0, np.log(most + 1))))
    return _chains(rng, words, count, at_end=rng.random() < 0.6)


def chained_inserts(
    rng: np.random.Generator, words: Wording, length: int, density: float
) -> list[Insert]:
    """Dense chains of variables, asked for at any place: what makes a model find out about looking
    back to what stands before.
    """
    return _chains(rng, words, max(1, round(density * length / DENSE_TOKENS)), at_end=False)


def hop_inserts(
    rng: np.random.Generator, words: Wording, length: int, density: float
) -> list[Insert]:
    """Chains of one or two variables, one every ``HOP_TOKENS``, most of them near together and
    asked for soon: the first lesson of looking for what stands before a value or a name.
    """
    count = max(1, round(density * length / HOP_TOKENS))
    names = iter(words.some_names(rng, min(len(words.names), max(HOPS) * count)))
    inserts = []
    for _ in range(count):
        chain = [name for name, _ in zip(names, range(rng.choice(HOPS, p=HOP_ODDS)))]
        if chain:
            places = _near(rng, len(chain))
            asked = places[-1] + (1 - places[-1]) * rng.random() ** 3
            inserts += chain_of(rng, words, chain, places, asked)
    return inserts


def _chains(rng: np.random.Generator, words: Wording, count: int, at_end: bool) -> list[Insert]:
    names = iter(words.some_names(rng, min(len(words.names), max(CHAIN) * count)))
    inserts = []
    for _ in range(count):
        chain = [name for name, _ in zip(names, range(rng.choice(CHAIN, p=CHAIN_ODDS)))]
        if chain:
            places = _near(rng, len(chain))
            inserts += chain_of(rng, words, chain, places, _later(rng, places[-1], at_end))
    return inserts


def valued_inserts(
    rng: np.random.Generator, words: Wording, length: int, density: float
) -> list[Insert]:
    """Keys of two to four values each, few or as dense as facts of the dense recipe."""
    most = np.log(1 + density * length / DENSE_TOKENS)
    at_end, inserts = rng.random() < 0.4, []
    for key in words.keys(rng, max(1, int(np.exp(rng.uniform(0.3, 1.0) * most)))):
        values = [words.value(rng) for _ in range(rng.integers(2, 5))]
        places = _near(rng, len(values))
        inserts += [say.fact(rng, place, key, value) for place, value in zip(places, values)]
        inserts.append(say.ask_all(_later(rng, places[-1], at_end), key, _listed(rng, values)))
    return inserts


def _near(rng: np.random.Generator, count: int) -> np.ndarray:
    """Ascending places, half of the time anywhere, else within a stretch that may be short."""
    width = 0.95 * (np.exp(rng.uniform(np.log(0.02), 0)) if rng.random() < 0.5 else 1.0)
    return (0.95 - width) * rng.random() + width * np.sort(rng.random(count))


def together_inserts(
    rng: np.random.Generator, words: Wording, length: int, density: float
) -> list[Insert]:
    """Everything in one context of dated sessions, few or many of each kind, most of it asked for
    near the end.
    """
    most = np.log(1 + max(1.0, density * length / 2048))
    things, facts, *episodes = (int(np.exp(rng.uniform(0, most))) for _ in range(5))
    at_end = rng.random() < 0.7
    inserts = session_marks(rng, length).inserts
    for thing in words.some_nouns(rng, min(2 * things, len(words.nouns))):
        told = np.sort(rng.random(1 + (rng.random() < 0.4))) * 0.95
        values = [words.value(rng) for _ in told]
        inserts += [say.tell(place, thing, value) for place, value in zip(told, values)]
        inserts.append(say.recall(_later(rng, told[-1], at_end), thing, values[-1]))
    keys = iter(words.keys(rng, 2 * facts + 5 * sum(episodes)))
    for key, place in zip(keys, rng.random(2 * facts) * 0.95):
        value = words.value(rng)
        inserts.append(say.fact(rng, place, key, value))
        inserts.append(say.ask(_later(rng, place, at_end), key, value))
    names = iter(words.some_names(rng, min(len(words.names), 5 * episodes[0])))
    for episode, count in zip((tracking, several_values, several_keys), episodes):
        for _ in range(count):
            inserts += episode(rng, words, names if episode is tracking else keys, at_end)
    return inserts


def text_inserts(
    rng: np.random.Generator, words: Wording, length: int, density: float
) -> list[Insert]:
    """None: the text alone."""
    return []


INSERTS = {
    "dense": dense_inserts,
    "sparse": sparse_inserts,
    "mixed": mixed_inserts,
    "memory": memory_inserts,
    "update": update_inserts,
    "tracking": tracking_inserts,
    "hops": hop_inserts,
    "chained": chained_inserts,
    "valued": valued_inserts,
    "together": together_inserts,
    "text": text_inserts,
}


def several_values(rng, words: Wording, keys, at_end: bool) -> list[Insert]:
    """Two to four values of one key at different places; the question wants all."""
    key, values = next(keys), [words.value(rng) for _ in range(rng.integers(2, 5))]
    places = np.sort(rng.random(len(values))) * 0.95
    facts = [say.fact(rng, place, key, value) for place, value in zip(places, values)]
    return [*facts, say.ask_all(_later(rng, places[-1], at_end), key, _listed(rng, values))]


def _listed(rng: np.random.Generator, values: list[Tokens]) -> list[Tokens]:
    """Values in an answer's order: half of the time as they appeared, else in any. So a model that
    begins with another goes on with those not said yet, and ends after the last.
    """
    return [values[i] for i in rng.permutation(len(values))] if rng.random() < 0.5 else values


def several_keys(rng, words: Wording, keys, at_end: bool) -> list[Insert]:
    """Two to four keys told at different places and asked in one question, in any order."""
    asked = [next(keys) for _ in range(rng.integers(2, 5))]
    values = [words.value(rng) for _ in asked]
    places = rng.random(len(asked)) * 0.95
    facts = [say.fact(rng, place, key, value) for place, key, value in zip(places, asked, values)]
    return [*facts, say.ask_each(_later(rng, places.max(), at_end), asked, values)]


def tracking(rng, words: Wording, names, at_end: bool) -> list[Insert]:
    """A chain of two to five variables, each set to the one before; the question wants all that
    hold the value.
    """
    chain = [name for name, _ in zip(names, range(rng.integers(2, 6)))]
    if not chain:
        return []
    places = np.sort(rng.random(len(chain))) * 0.95
    return chain_of(rng, words, chain, places, _later(rng, places[-1], at_end))


def chain_of(
    rng: np.random.Generator, words: Wording, chain: list[Tokens], places: np.ndarray, asked: float
) -> list[Insert]:
    """Variables set at ``places``, the first to a value, each other to the one before it; and the
    question at ``asked``.
    """
    value = words.value(rng)
    sets = [say.assign(places[0], chain[0], value, None)]
    sets += [
        say.assign(place, name, None, source)
        for place, name, source in zip(places[1:], chain[1:], chain)
    ]
    return [*sets, say.ask_names(asked, value, chain)]


def early_text(rng, words: Wording, keys, at_end: bool) -> list[Insert]:
    """A quote of 8 to 16 tokens of earlier text, to be continued for 12."""
    return [say.ask_text(_later(rng, 0.2, at_end), int(rng.integers(8, 17)), 12)]


def _later(rng: np.random.Generator, place: float, at_end: bool) -> float:
    """A place after ``place``: at or near the end, or anywhere."""
    return (
        max(place, 1.0 - rng.choice((0.0, 0.01, 0.05)) * rng.random())
        if at_end
        else rng.uniform(place, 1.0)
    )


@dataclass
class Sessions:
    """Marks of sessions and speakers, and the number and day of the last session."""

    inserts: list[Insert]
    number: int
    day: int

    def begin(self, rng: np.random.Generator, place: float) -> Insert:
        """The head of one more session, one to nine days later."""
        self.number, self.day = self.number + 1, self.day + int(rng.integers(1, 10))
        return say.session(place, self.number, self.day)


def session_marks(rng: np.random.Generator, length: int) -> Sessions:
    """Heads of sessions and changes of speaker, every ``TURN_TOKENS`` on average, evenly shaken."""
    count = max(2, length // (TURN_TOKENS + 8))
    places = (np.arange(count) + rng.random(count)) / count
    places[0] = 0.0
    sessions = Sessions([], 0, int(rng.integers(300)))
    for turn, place in enumerate(places):
        new = turn == 0 or rng.random() < 1 / TURNS_A_SESSION
        sessions.inserts.append(
            sessions.begin(rng, place)
            if new
            else say.turn(place, "User" if turn % 2 == 0 else "Assistant")
        )
    return sessions
