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
from fmsim.nano.lessons import INSERTS
from fmsim.nano.tokens import Corpus
from fmsim.nano.wording import Insert

SHORTEST_TOKENS = 512
# positions jump only between whole blocks, so no compressed entry straddles a jump
BLOCK_TOKENS = 128
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
HOPS = {"hops": 0.6, "chained": 0.12, "valued": 0.1, "dense": 0.18}
CHAINS = {
    "hops": 0.2, "chained": 0.3, "valued": 0.18, "dense": 0.12, "sparse": 0.05, "tracking": 0.1,
    "update": 0.05,
}  # fmt: skip
FINISH = {
    "dense": 0.08, "sparse": 0.1, "mixed": 0.12, "memory": 0.08, "update": 0.1, "tracking": 0.14,
    "chained": 0.12, "valued": 0.12, "together": 0.12, "text": 0.02,
}  # fmt: skip
MIXTURES = {
    "dense": Mixture({"dense": 1.0}),
    "all": Mixture(ALL_KINDS),
    "lessons": Mixture(LESSONS, skip_odds=0.5, max_position=1_040_000),
    "exam": Mixture(EXAM, skip_odds=0.5, max_position=1_040_000),
    "hops": Mixture(HOPS, skip_odds=0.3, max_position=1_040_000),
    "chains": Mixture(CHAINS, skip_odds=0.3, max_position=1_040_000),
    "finish": Mixture(FINISH, skip_odds=0.5, max_position=1_040_000),
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
    if not len(corpus.breaks):
        return places
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
