"""How sure a figure is that comes from few windows, contexts or traces: a block bootstrap.

The steps of one window share a resident set, and the questions about one context share a text. They
are no independent samples, but windows and contexts nearly are. So whole blocks are drawn with
replacement, the figure is worked out anew from each draw, and its spread over the draws is the
standard error. Blocks of one stratum are alike; each stratum is drawn for itself.

There are few blocks: eight windows in 512 steps. Two corrections are for that, and a test counts
how often an interval holds the truth. From n blocks of a stratum n - 1 are drawn, so that the
spread of a mean is unbiased (Rao and Wu, Resampling Inference With Complex Survey Data, JASA 83,
1988). And the 95% interval is Student's with the blocks' degrees of freedom, not the normal one.

Draws depend on the numbers of blocks alone. So the same input gives the same bytes, and figures of
two policies on the same blocks come from the same draws: their difference is a paired one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np

LEVEL = 0.95
N_DRAWS = 2000  # the standard error's own error is 1.6%
SEED = 20260609

# Student's t: the quantile at 0.975 for 1, 2, ... degrees of freedom.
T_QUANTILES = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
)


@dataclass(frozen=True)
class Estimate:
    """A figure and half of its 95% interval's width, from `blocks` blocks.

    `half_width` is None where the blocks are too few to tell: one in every stratum.
    """

    value: float
    half_width: float | None
    blocks: int

    def plain(self, least: float | None = None, most: float | None = None) -> dict[str, Any]:
        """For JSON: half the width, and the interval's ends within what the figure can be."""
        if self.half_width is None:
            return {"half_width": None, "low": None, "high": None, "blocks": self.blocks}
        low, high = self.value - self.half_width, self.value + self.half_width
        return {
            "half_width": self.half_width,
            "low": low if least is None else max(low, least),
            "high": high if most is None else min(high, most),
            "blocks": self.blocks,
        }


@lru_cache(maxsize=64)
def block_weights(strata: tuple[int, ...]) -> np.ndarray:
    """How much each block counts in each draw: float64 [N_DRAWS, blocks], of mean 1.

    `strata` are numbers of blocks, whose columns stand one after another. A stratum of one block
    cannot be drawn from, and counts 1 always.
    """
    parts = []
    for place, n in enumerate(strata):
        if n < 2:
            parts.append(np.ones((N_DRAWS, n)))
            continue
        random = np.random.default_rng((SEED, place, n))
        drawn = random.multinomial(n - 1, np.full(n, 1 / n), size=N_DRAWS)
        parts.append(drawn * (n / (n - 1)))
    weights = np.concatenate(parts, axis=1) if parts else np.zeros((N_DRAWS, 0))
    weights.flags.writeable = False
    return weights


def ratio_draws(part: np.ndarray, whole: np.ndarray, strata: tuple[int, ...]) -> np.ndarray:
    """Sum of `part` over that of `whole`, both [blocks] or [blocks, cells], in each draw.

    -> float64 [N_DRAWS] or [N_DRAWS, cells]; NaN where a draw has nothing in `whole`.
    """
    weights = block_weights(strata)
    above, below = weights @ part, weights @ whole
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below != 0)


def ratio(
    part: np.ndarray, whole: np.ndarray, strata: tuple[int, ...] | None = None
) -> Estimate | None:
    """Sum of `part` [blocks] over that of `whole`, such as mass kept over mass; one stratum unless
    given.

    None where there is nothing in `whole`.
    """
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    if not whole.sum():
        return None
    strata = strata or (len(part),)
    return estimate(float(part.sum() / whole.sum()), ratio_draws(part, whole, strata), strata)


def otherwise(blocks: int) -> float:
    """The share of blocks that could be otherwise, where `blocks` came out alike: the p whose (1 -
    p) to the power `blocks` is 0.025.
    """
    return 1 - ((1 - LEVEL) / 2) ** (1 / blocks)


def mean(values: Sequence[float] | np.ndarray) -> Estimate | None:
    """Mean of one value a block; None where there is none."""
    return ratio(np.asarray(values, dtype=np.float64), np.ones(len(values)))


def estimate(value: float, draws: np.ndarray, strata: tuple[int, ...]) -> Estimate:
    """A figure from its value and from what it is in each draw of `block_weights(strata)`."""
    freedom = sum(n - 1 for n in strata)
    if freedom < 1:
        return Estimate(value, None, sum(strata))
    half_width = t_quantile(freedom) * float(np.nanstd(draws))
    return Estimate(value, half_width, sum(strata))


def t_quantile(freedom: int) -> float:
    """Student's t: where 2.5% lie above it.

    Beyond 20 degrees of freedom by the Cornish-Fisher expansion, off by less than 1e-4 (Abramowitz
    and Stegun, 26.7.5).
    """
    if freedom <= len(T_QUANTILES):
        return T_QUANTILES[freedom - 1]
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2
