"""Curricula: which lengths, for how long, at what learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import accumulate

from fmsim.errors import FmsimError


@dataclass(frozen=True)
class Stage:
    """One length of a curriculum.

    seconds: counted from its third step on, since the first ones compile; batch_tokens: of one GPU
    and step; rates: the learning rates between which half a cosine falls; top_k: how many entries a
    CSA layer's query attends to and how often, 0 for all of them; calm and recompute: see
    `forward.Manner`; mixture: of `weaving.MIXTURES`; part: from where to where of the half cosine
    this stage goes, for a cosine over several stages.
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
    part: tuple[float, float] = (0.0, 1.0)

    def learning_rate(self, step: int, share: float) -> float:
        """After ``step`` steps, at ``share`` of the stage."""
        first, last = self.rates
        start, end = self.part
        turned = math.pi * (start + (end - start) * min(1.0, share))
        rate = last + (first - last) * 0.5 * (1 + math.cos(turned))
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
            calm=stage.calm, recompute=stage.recompute, warmup=stage.warmup, part=stage.part,
        )
        for number, stage in enumerate(stages)
    )  # fmt: skip


CURRICULA = {
    # The shipped one, in two calls of one machine: the first two stages, then the others.
    "nano2": tuple(
        Stage(
            length,
            seconds,
            max(65536, length),
            (1e-3, 1e-5),
            top_k,
            mixture="exam",
            calm=0.7,
            warmup=warmup,
            part=part,
        )
        for length, seconds, top_k, warmup, part in (
            (4096, 50, MIXED, 60, (0.0, 0.06)),
            (32768, 450, MIXED, 0, (0.06, 0.62)),
            (32768, 180, MIXED, 0, (0.62, 0.86)),
            (131072, 100, LAST, 0, (0.86, 1.0)),
        )
    ),
    # What "nano2" did not learn: names that stand before a value, values in whatever order. Two
    # calls of one machine: the first two stages, then the others.
    "chains": tuple(
        Stage(
            length,
            seconds,
            batch_tokens,
            (8e-4, 1e-5),
            top_k,
            mixture=mixture,
            calm=0.7,
            warmup=warmup,
            part=part,
        )
        for length, batch_tokens, seconds, top_k, mixture, warmup, part in (
            (512, 32768, 70, LAST, "hops", 60, (0.0, 0.15)),
            (4096, 65536, 50, MIXED, "chains", 0, (0.15, 0.4)),
            (32768, 65536, 95, MIXED, "finish", 0, (0.4, 0.87)),
            (131072, 131072, 25, LAST, "finish", 0, (0.87, 1.0)),
        )
    ),
}


def curriculum(name: str) -> tuple[Stage, ...]:
    """A curriculum by name; "tiny-NAME" is a small likeness of it, "brief-NAME" has the same
    lengths for two seconds each, which compile all kernels.
    """
    manner, dash, wanted = name.rpartition("-")
    if wanted not in CURRICULA or (dash and manner not in ("tiny", "brief")):
        raise FmsimError(f"no curriculum {name!r}; there are {', '.join(CURRICULA)}")
    stages = CURRICULA[wanted]
    if manner == "tiny":
        return tiny(stages)
    return tuple(replace(stage, seconds=2) for stage in stages) if manner else stages
