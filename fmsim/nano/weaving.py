"""Training sequences: real text with facts woven in, and questions about them far later.

Everything is drawn from one numpy ``Generator``, so a seed gives the same sequence anywhere. The
dense recipe (a fact every 256 tokens, a question every 128) makes a small model find out about
looking back; the others look like evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fmsim.errors import FmsimError
from fmsim.nano import tokenizer as bpe
from fmsim.nano import wording as say
from fmsim.nano.tokens import Corpus
from fmsim.nano.wording import Insert, Tokens, Wording

SHORTEST_TOKENS = 512
# positions jump only between whole blocks, so no compressed entry straddles a jump
BLOCK_TOKENS = 128
TURN_TOKENS = 120  # of a memory session, on average
TURNS_A_SESSION = 8
# of a tracking sequence's chains: how many variables, and how often; the exam has five
CHAIN, CHAIN_ODDS = (2, 3, 4, 5, 6), (0.1, 0.15, 0.2, 0.4, 0.15)
SNAP_ODDS = 0.8  # of inserts standing after a sentence or line rather than anywhere


@dataclass(frozen=True)
class Mixture:
    """How often each kind of sequence comes, and how positions skip.

    kinds: weights of ``INSERTS``' kinds; skip_odds: of a sequence's positions having jumps;
    max_position: none is as large.
    """

    kinds: dict[str, float]
    skip_odds: float = 0.0
    max_position: int = 786_432


ALL_KINDS = {"dense": 0.35, "sparse": 0.2, "mixed": 0.3, "memory": 0.1, "text": 0.05}
LESSONS = {
    "dense": 0.24, "sparse": 0.22, "mixed": 0.34, "memory": 0.1, "update": 0.08, "text": 0.02,
}  # fmt: skip
EXAM = {
    "dense": 0.14, "sparse": 0.18, "mixed": 0.22, "memory": 0.1, "update": 0.1, "tracking": 0.1,
    "together": 0.14, "text": 0.02,
}  # fmt: skip
MIXTURES = {
    "dense": Mixture({"dense": 1.0}),
    "all": Mixture(ALL_KINDS),
    "lessons": Mixture(LESSONS, skip_odds=0.5, max_position=1_040_000),
    "exam": Mixture(EXAM, skip_odds=0.5, max_position=1_040_000),
}


@dataclass(frozen=True)
class Sample:
    """tokens: uint16 [S]; answer: bool [S], tokens that answer a question; positions: int32 [S];
    kind of the sequence.
    """

    tokens: np.ndarray
    answer: np.ndarray
    positions: np.ndarray
    kind: str


@dataclass
class WovenText:
    """tokens: uint16 [S]; spans: for each insert with an answer, in order, the (from, to) of the
    answer in tokens.
    """

    tokens: np.ndarray
    spans: list[tuple[int, int]] = field(default_factory=list)


def pack_sequence(
    rng: np.random.Generator,
    length: int,
    corpus: Corpus,
    density: float = 1.0,
    mixture: Mixture | str = "all",
) -> Sample:
    """One training sequence of ``length`` tokens; ``density`` scales the number of facts and
    questions.
    """
    mixture = find_mixture(mixture)
    kinds = list(mixture.kinds)
    odds = np.array([mixture.kinds[kind] for kind in kinds])
    kind = kinds[rng.choice(len(kinds), p=odds / odds.sum())]
    inserts = INSERTS[kind](rng, say.wording(evaluation=False), length, density)
    woven = weave(rng, corpus, length, inserts)
    answer = np.zeros(length, bool)
    for start, end in woven.spans:
        answer[start:end] = True
    skips = rng.random() < mixture.skip_odds
    positions = (
        skipping_positions(rng, length, mixture.max_position)
        if skips
        else np.arange(length, dtype=np.int32)
    )
    return Sample(woven.tokens, answer, positions, kind)


def find_mixture(mixture: Mixture | str) -> Mixture:
    """A mixture by name, or itself."""
    if isinstance(mixture, Mixture):
        return mixture
    if mixture not in MIXTURES:
        raise FmsimError(f"no task mixture {mixture!r}; there are {', '.join(MIXTURES)}")
    return MIXTURES[mixture]


def dense_inserts(
    rng: np.random.Generator, words: Wording, length: int, density: float
) -> list[Insert]:
    """length / 256 facts and length / 128 questions, each about a fact drawn evenly from those
    before it.
    """
    count = max(2, round(density * length / 256))
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
    most = max(2, round(density * length / 256)) if rng.random() < 0.5 else 8
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
    names = iter(words.some_names(rng, min(len(words.names), 6 * count)))
    at_end = rng.random() < 0.6
    inserts = []
    for _ in range(count):
        chain = [name for name, _ in zip(names, range(rng.choice(CHAIN, p=CHAIN_ODDS)))]
        if not chain:
            break
        width = 0.95 * (np.exp(rng.uniform(np.log(0.02), 0)) if rng.random() < 0.5 else 1.0)
        places = (0.95 - width) * rng.random() + width * np.sort(rng.random(len(chain)))
        inserts += chain_of(rng, words, chain, places, at_end)
    return inserts


def together_inserts(
    rng: np.random.Generator, words: Wording, length: int, density: float
) -> list[Insert]:
    """Everything in one context of dated sessions, few or many of each kind, most of it asked for
    near the end.
    """
    most = np.log(1 + max(2.0, density * length / 2048))
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
    "together": together_inserts,
    "text": text_inserts,
}


def several_values(rng, words: Wording, keys, at_end: bool) -> list[Insert]:
    """Two to four values of one key at different places; the question wants all."""
    key, values = next(keys), [words.value(rng) for _ in range(rng.integers(2, 5))]
    places = np.sort(rng.random(len(values))) * 0.95
    facts = [say.fact(rng, place, key, value) for place, value in zip(places, values)]
    return [*facts, say.ask_all(_later(rng, places[-1], at_end), key, values)]


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
    return chain_of(rng, words, chain, np.sort(rng.random(len(chain))) * 0.95, at_end)


def chain_of(
    rng: np.random.Generator, words: Wording, chain: list[Tokens], places: np.ndarray, at_end: bool
) -> list[Insert]:
    """Variables set at ``places``, the first to a value, each other to the one before it; and the
    question.
    """
    value = words.value(rng)
    sets = [say.assign(places[0], chain[0], value, None)]
    sets += [
        say.assign(place, name, None, source)
        for place, name, source in zip(places[1:], chain[1:], chain)
    ]
    return [*sets, say.ask_names(_later(rng, places[-1], at_end), value, chain)]


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


def weave(
    rng: np.random.Generator, corpus: Corpus, length: int, inserts: list[Insert]
) -> WovenText:
    """Exactly ``length`` tokens: ``<|bos|>``, then a stretch of the corpus with the inserts between
    its tokens.
    """
    room = length - 1 - sum(len(item.tokens) for item in inserts)
    if length < SHORTEST_TOKENS or room < length // 16:
        raise FmsimError(
            f"{length} tokens are too few for {len(inserts)} facts and questions; give more tokens"
            " or a lower density"
        )
    inserts = sorted(inserts, key=lambda item: item.place)
    text, start = corpus.text(rng, room)
    places = np.minimum((np.array([item.place for item in inserts]) * room).astype(np.int64), room)
    if rng.random() < SNAP_ODDS and len(places):
        places = _snapped(corpus, places, start, room)
    woven, done, out = WovenText(np.empty(length, np.uint16)), 0, 1
    woven.tokens[0] = bpe.BOS_ID
    for item, place in zip(inserts, places):
        woven.tokens[out : out + place - done] = text[done:place]
        out, done = out + place - done, place
        tokens = _with_quote(rng, item, text, places, place) if item.quote_tokens else item.tokens
        if tokens is not None:
            woven.tokens[out : out + len(tokens)] = tokens
            if item.answer[1]:
                woven.spans.append((out + item.answer[0], out + item.answer[1]))
            out += len(tokens)
    if out + room - done < length:  # a quote found no place: more text instead
        text = corpus.tokens.take(np.arange(start, start + length), mode="wrap")
    woven.tokens[out:] = text[done : done + length - out]
    return woven


def _snapped(corpus: Corpus, places: np.ndarray, start: int, room: int) -> np.ndarray:
    """Places moved on to the next end of a sentence or line, where there is one within the text;
    order is kept.
    """
    after = np.searchsorted(corpus.breaks, places + start)
    ends = corpus.breaks[np.minimum(after, len(corpus.breaks) - 1)] - start
    return np.where((ends >= places) & (ends <= room) & (places < room), ends, places)


def _with_quote(
    rng: np.random.Generator, item: Insert, text: np.ndarray, places: np.ndarray, place: int
) -> list[int] | None:
    """The insert's tokens with a quote of unbroken, once-said text from before ``place``; None if
    there is none.
    """
    given, total = item.quote_tokens, item.quote_tokens + item.answer[1] - item.answer[0]
    for _ in range(8):
        start = int(
            max(1, place - total - BLOCK_TOKENS)
            * (rng.random() if item.quote_place is None else item.quote_place)
        )
        quoted = text[start : start + total]
        cut = np.searchsorted(places, start, side="right") != np.searchsorted(
            places, start + total, side="left"
        )
        if start + total > place or cut or (quoted == bpe.EOS_ID).any():
            continue
        if len(_finds(text[:place], quoted[:given])) == 1:
            return item.tokens[: len(item.tokens) - total] + quoted.tolist()
    return None


def _finds(text: np.ndarray, part: np.ndarray) -> np.ndarray:
    """All places of ``part`` in ``text``."""
    found = np.flatnonzero(text[: len(text) - len(part) + 1] == part[0])
    for number in range(1, len(part)):
        found = found[text[found + number] == part[number]]
    return found


def skipping_positions(rng: np.random.Generator, length: int, max_position: int) -> np.ndarray:
    """int32 [length], rising by one but for one to eight jumps between blocks, by multiples of a
    block.

    Positional skip-wise training (PoSE, Zhu et al. 2023): short sequences teach the model far
    positions.
    """
    blocks, spare = -(-length // BLOCK_TOKENS), (max_position - length) // BLOCK_TOKENS
    count = min(int(rng.integers(1, 9)), blocks - 1)
    if count < 1 or spare < 1:
        return np.arange(length, dtype=np.int32)
    total = int(spare * rng.random())
    sizes = np.floor(rng.dirichlet(np.ones(count + 1))[:count] * total).astype(np.int64)
    jumps = np.zeros(blocks, np.int64)
    jumps[rng.choice(np.arange(1, blocks), count, replace=False)] = sizes
    shift = np.repeat(np.cumsum(jumps) * BLOCK_TOKENS, BLOCK_TOKENS)[:length]
    return (np.arange(length) + shift).astype(np.int32)
