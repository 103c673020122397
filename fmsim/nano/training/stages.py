"""Curricula: which lengths, for how long, at what learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

from fmsim.errors import FmsimError


@dataclass(frozen=True)
class Stage:
    """One length of a curriculum.

    seconds: counted from its third step on, since the first ones compile; batch_tokens: of one GPU
    and step; rates: the learning rate at its start and its end; top_k: how many entries a CSA
    layer's query attends to and how often, 0 for all of them; calm and recompute: see
    `forward.Manner`; mixture: of `weaving.MIXTURES`.
    """

    length: int
    seconds: float
    batch_tokens: int
    rates: tuple[float, float]
    top_k: tuple[tuple[int, float], ...]
    mixture: str = "lessons"
    calm: float = 0.5
    recompute: bool = False
    warmup: int = 0

    def learning_rate(self, step: int, share: float) -> float:
        """After ``step`` steps, at ``share`` of the stage: half a cosine from one rate to the
        other.
        """
        first, last = self.rates
        rate = last + (first - last) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
        return rate * min(1.0, (step + 1) / max(1, self.warmup))

    def draw_top_k(self, number: float) -> int | None:
        """Of a number drawn evenly from [0, 1): how many entries this step's queries attend to."""
        counts, odds = zip(*self.top_k, strict=True)
        below = sum(number >= limit for limit in accumulate(odds[:-1]))
        return counts[below] or None


MIXED = ((512, 0.5), (256, 0.25), (128, 0.25))
LAST = ((512, 1.0),)
FEW_TOKENS = 2048


def tiny(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """The same stages for a test on a CPU: short, few tokens, two seconds each."""
    return tuple(
        Stage(
            length=min(stage.length, 1024 * 2 ** min(number, 1)), seconds=2,
            batch_tokens=FEW_TOKENS,
            rates=stage.rates, top_k=((128, 0.5), (0, 0.5)), mixture=stage.mixture,
            calm=stage.calm, recompute=stage.recompute, warmup=stage.warmup,
        )
        for number, stage in enumerate(stages)
    )  # fmt: skip


CURRICULA = {
    # What the first nano grew into, made whole again and taken to 128K.
    "grown": (
        Stage(4096, 130, 65536, (1.2e-3, 1e-3), MIXED, warmup=60),
        Stage(32768, 270, 65536, (1e-3, 1.5e-4), MIXED),
        Stage(131072, 50, 131072, (1.5e-4, 1e-5), LAST),
    ),
    # What a minute of two GPUs is good for, the first nano grown.
    "minute": (Stage(32768, 60, 32768, (8e-4, 1e-5), LAST, warmup=40),),
    # For a model that went through the first, a fresh optimiser and more time at long lengths.
    "longer": (
        Stage(32768, 400, 65536, (8e-4, 1.5e-4), MIXED, warmup=60),
        Stage(131072, 100, 131072, (1.5e-4, 1e-5), LAST),
    ),
}


def curriculum(name: str) -> tuple[Stage, ...]:
    """A curriculum by name; "tiny-NAME" is a small likeness of it."""
    wanted = name.removeprefix("tiny-")
    if wanted not in CURRICULA:
        raise FmsimError(f"no curriculum {name!r}; there are {', '.join(CURRICULA)}")
    return CURRICULA[wanted] if wanted == name else tiny(CURRICULA[wanted])
