"""Which rows `benchmarks/blind.py` measures and predicts: those that stand, and others drawn by a
seed.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

from headline import HELD

STEPS = 44
DECIDED_STEPS = 136  # so that a decision comes after the warm-up, which ends with the first


class Ask(NamedTuple):
    """A row: the policy's parameters by label, at a context and a batch."""

    context: str
    label: str
    batch: int
    params: dict[str, Any]

    @property
    def name(self) -> str:
        words = f"{self.context} {self.label} {self.batch}"
        return words.replace(",", "").replace(" ", "-")

    @property
    def steps(self) -> int:
        return DECIDED_STEPS if self.params.get("cadence", 1) > 1 else STEPS

    @property
    def entry(self) -> dict[str, Any]:
        return {"label": self.label} | self.params


FULL = {"policy": "full"}
RECENCY = {"policy": "recency", "budget": "12.5% gpu"}
H2O = {"policy": "h2o", "budget": "12.5% gpu"}
LRU = {"policy": "lru", "budget": "2x topk"}
FALLBACK = LRU | {"on_miss": "fallback"}
LRU_HELD = {"policy": "lru", "budget": "12.5% gpu"} | HELD
LFU_ALL = {"policy": "lfu", "budget": "10%", "sees": "all"} | HELD
LSA = {"policy": "lsa", "budget": "12.5% gpu", "cadence": 64}
LSA_FALLBACK = {"policy": "lsa", "budget": "4%", "on_miss": "fallback", "cadence": 64}


def _pages(params: dict[str, Any], entries: int) -> dict[str, Any]:
    """In pages of so many entries, and with a fifth of the prompt's: large pages need more."""
    larger = {"budget": "20%"} if params["policy"] == "lru" else {}
    return params | {"granularity": entries} | larger


# Batches and contexts that `Sizes` has no attention of. The first half stands for the whole, should
# time run out.
ROWS = tuple(
    Ask(context, label, batch, params)
    for context, label, batch, params in (
        ("32K", "full", 6, FULL),
        ("512K", "lru", 20, LRU),
        ("128K", "lsa fallback", 50, LSA_FALLBACK),
        ("32K", "h2o", 150, H2O),
        ("512K", "full", 10, FULL),
        ("128K", "lru", 40, LRU),
        ("512K", "lsa", 72, LSA),
        ("32K", "lru", 100, LRU),
        ("128K", "recency", 80, RECENCY),
        ("512K", "lru held", 40, LRU_HELD),
        ("32K", "lsa", 112, LSA),
        ("128K", "full", 20, FULL),
        ("512K", "lru fallback", 20, FALLBACK),
        ("128K", "lru, pages of 16", 1, _pages(LRU, 16)),
        ("32K", "lsa fallback", 50, LSA_FALLBACK),
        ("512K", "h2o", 1, H2O),
        ("32K", "full", 1, FULL),
        ("32K", "recency", 20, RECENCY),
        ("32K", "lru held", 144, LRU_HELD),
        ("32K", "lfu sees all", 72, LFU_ALL),
        ("32K", "lru", 1, LRU),
        ("32K", "lru, pages of 64", 6, _pages(LRU, 64)),
        ("128K", "lru", 6, LRU),
        ("128K", "lsa", 1, LSA),
        ("128K", "lsa, pages of 16", 40, _pages(LSA, 16)),
        ("128K", "h2o", 112, H2O),
        ("128K", "lru held", 6, LRU_HELD),
        ("128K", "lru fallback", 1, FALLBACK),
        ("128K", "full", 40, FULL),
        ("512K", "recency", 40, RECENCY),
        ("512K", "lsa", 1, LSA),
        ("512K", "lru", 1, LRU),
        ("512K", "lru, pages of 4", 6, _pages(LRU, 4)),
        ("512K", "lfu sees all", 10, LFU_ALL),
        ("512K", "lsa fallback", 1, LSA_FALLBACK),
        ("32K", "lru fallback", 150, FALLBACK),
    )
)


LEAST = 2  # requests of a row that is drawn: headline.py has those of one
MOST = {"32K": 160, "128K": 112, "512K": 72}


def drawn(count: int, seed: int) -> tuple[Ask, ...]:
    """Rows at random, none of `ROWS`: a policy of those, a context, and a batch whose logarithm is
    uniform. What takes much of a GPU for each request has a quarter of the most.
    """
    draw = random.Random(seed)
    policies = list({ask.label: ask.params for ask in ROWS}.items())
    found: dict[str, Ask] = {}
    while len(found) < count:
        label, params = draw.choice(policies)
        context = draw.choice(list(MOST))
        large = label == "full" or label.startswith("lru, pages")
        most = MOST[context] // 4 if large else MOST[context]
        batch = round(LEAST * (most / LEAST) ** draw.random())
        ask = Ask(context, label, batch, params)
        if ask not in ROWS:
            found.setdefault(ask.name, ask)
    return tuple(found.values())
