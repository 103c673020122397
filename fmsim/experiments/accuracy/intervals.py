"""How sure a score is: a bootstrap clustered by context.

Questions about one context share its text and what the policy kept of it, and so do the families
that are asked about in it. So contexts are drawn, whole. Contexts of one length, family and kind
are drawn among each other. `n` is how many contexts there are, of all seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fmsim import bootstrap
from fmsim.experiments.accuracy.lines import Line
from fmsim.tasks import context_number

Context = tuple[int, int, int, int]  # tokens, seed, sample, number of the kind


def context_of(line: Line) -> Context:
    """The text that a line's question was about."""
    return line["tokens"], line["seed"], line["sample"], context_number(line["task"])


def interval(
    samples: Sequence[Line],
    value: str,
    least: float,
    most: float,
    weights: Mapping[tuple[int, str], float] | None = None,
) -> dict[str, Any]:
    """The 95% interval of the mean of `value` over cells, a cell's being that over its samples.

    A sample is one context's in one family: {"tokens", "task", "seed", "sample", `value`}.
    `weights` are those of the cells (tokens, task); all alike unless given. -> {"half_width",
    "low", "high", "n", "alike"}; null where one context cannot tell. A context that is alone of its
    length and families cannot be drawn, and counts as it is.

    Where all contexts came out `alike`, draws of them say nothing, and the interval is what n equal
    outcomes allow: a share p of contexts could be otherwise, with 1 - p to the power n = 0.025.
    """
    by_context: dict[Context, dict[tuple[int, str], float]] = {}
    for sample in samples:
        cell = (sample["tokens"], sample["task"])
        by_context.setdefault(context_of(sample), {})[cell] = sample[value]
    by_stratum: dict[tuple[Any, ...], list[dict[tuple[int, str], float]]] = {}
    for (tokens, _, _, number), asked in by_context.items():
        by_stratum.setdefault((tokens, number, tuple(sorted(asked))), []).append(asked)
    strata = tuple(map(len, by_stratum.values()))
    contexts = [asked for group in by_stratum.values() for asked in group]
    cells = list(dict.fromkeys(cell for asked in contexts for cell in asked))
    part = np.array([[asked.get(cell, 0.0) for cell in cells] for asked in contexts])
    whole = np.array([[float(cell in asked) for cell in cells] for asked in contexts])
    share = np.array([1.0 if weights is None else weights[cell] for cell in cells])
    share /= share.sum()
    mean = float((part.sum(axis=0) / whole.sum(axis=0)) @ share)
    draws = bootstrap.ratio_draws(part, whole, strata) @ share
    found = bootstrap.estimate(mean, draws, strata).plain(least, most)
    n = found.pop("blocks")
    alike = found["half_width"] is not None and found["half_width"] < 1e-9
    if alike:
        other = bootstrap.otherwise(n)
        found["low"], found["high"] = mean - other * (mean - least), mean + other * (most - mean)
        found["half_width"] = max(mean - found["low"], found["high"] - mean)
    return found | {"n": n, "alike": alike}
