"""What it costs that layers share one resident set: mass kept by the number of layers that do.

A set that serves many layers is harder to choose than one that serves few, since each wants other
entries. A trace of few layers, spread over a model of many, hides that. So a policy is replayed on
parts of the trace's layers, with as many entries each time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fmsim import bootstrap
from fmsim.policies.base import Policy
from fmsim.replay.replayer import Replayer
from fmsim.sim.windows import window_sums
from fmsim.trace import Trace

MOST_SETS = 6  # of layers of one number; beyond that sets of neighbours


@dataclass(frozen=True)
class SharedMass:
    """Attention mass kept where `layers` layers share a set: the mean over `sets` choices of
    them.
    """

    layers: int
    sets: int
    mass: bootstrap.Estimate


def mass_by_sharing(
    trace: Trace,
    policy_of: Callable[[tuple[int, ...]], Policy],
    most_layers: int,
) -> list[SharedMass]:
    """Mass kept by the number of the trace's layers that share one set, 1 to `most_layers`.

    `policy_of(layers)` makes the policy for some of the trace's layers, from 0; its scope is
    "shared", and its budget in entries.
    """
    found = []
    for n in range(1, min(most_layers, trace.n_layers) + 1):
        kept, mass = [], []
        for layers in layer_sets(trace.n_layers, n):
            ledger = Replayer(trace, layers=layers).run(policy_of(layers))
            kept.append(window_sums(ledger, ledger.mass_kept, np.ones(n)))
            mass.append(window_sums(ledger, ledger.mass_total, np.ones(n)))
        estimate = bootstrap.ratio(np.sum(kept, axis=0), np.sum(mass, axis=0))
        if estimate is not None:
            found.append(SharedMass(n, len(kept), estimate))
    return found


def layer_sets(n_layers: int, n: int) -> list[tuple[int, ...]]:
    """Choices of `n` of the layers: all of them where they are few, else sets of neighbours,
    spread evenly.
    """
    every = list(itertools.combinations(range(n_layers), n))
    if len(every) <= MOST_SETS:
        return every
    starts = sorted({round(place) for place in np.linspace(0, n_layers - n, MOST_SETS)})
    return [tuple(range(start, start + n)) for start in starts]
