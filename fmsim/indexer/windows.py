"""A trace as the memory indexer sees it: one query a window, the keys it scores, and what it should
have kept.

A query stands right before its window, or one window earlier or more (`LabelRule.state_age`).
Entries that closed since then are neither scored nor wanted: a policy keeps them anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fmsim.errors import FmsimError
from fmsim.indexer.labels import LabelRule, labels, voted_labels
from fmsim.trace.format import Trace


class Windows(NamedTuple):
    """The queries of one trace, W of them, a window each.

    ``positions`` int64 [W] of the query tokens, ``entries`` int64 [W] visible to each, ``hidden``
    float32 [W, L, H], ``keys`` float32 [L, E, D] with E the most entries that a query sees,
    ``golden`` bool [W, E] and ``mass`` float32 [W, E] (False and 0 beyond a query's entries).
    ``csa_numbers``: which of the model's CSA layers the L are, from 0; the first L if empty.
    ``state_age``: the query of window w is at the last token before window w - state_age, of the
    first windows before window 0.
    """

    name: str
    positions: np.ndarray
    entries: np.ndarray
    hidden: np.ndarray
    keys: np.ndarray
    golden: np.ndarray
    mass: np.ndarray
    csa_numbers: tuple[int, ...] = ()
    state_age: int = 0

    def of_layers(self, numbers: Sequence[int]) -> Windows:
        """The states and keys of some CSA layers alone, by number; labels stay. FmsimError where
        one has none.
        """
        absent = sorted(set(numbers) - set(self.layers))
        if absent:
            raise FmsimError(
                f"{self.name}: has states and keys of CSA layers {self.layers}, not of {absent}"
            )
        rows = [self.layers.index(number) for number in numbers]
        return self._replace(
            hidden=self.hidden[:, rows], keys=self.keys[rows], csa_numbers=tuple(numbers)
        )

    @property
    def layers(self) -> list[int]:
        """The CSA layers' numbers, in the order of the L axis."""
        return list(self.csa_numbers or range(self.hidden.shape[1]))


def check_scorable(trace: Trace, name: str) -> None:
    """Raise FmsimError for a trace without the hidden states and index keys that an indexer
    reads.
    """
    for what in ("hidden", "index_keys"):
        if getattr(trace, what) is None:
            raise FmsimError(
                f"{name}: this {trace.header.source} trace holds no {what}, which the memory"
                " indexer needs; use one that `fmsim trace record` wrote of a DeepSeek-V4 or DSA"
                " model"
            )


def read_windows(trace: Trace, name: str, rule: LabelRule) -> Windows:
    """Queries, keys and labels of ``trace``; ``name`` stands in messages.

    Decode steps are read a window at a time.

    A trace that holds labels (`Trace.holds_labels`) has only the rule's ``min_layers`` and
    ``horizon_steps`` applied to them.
    """
    check_scorable(trace, name)
    tau = trace.header.tau
    states = np.maximum(np.arange(trace.n_windows) - rule.state_age, 0)
    positions = trace.header.prompt_tokens + tau * states - 1
    entries = (positions + 1) // trace.header.entry_tokens
    most = int(entries[-1])
    golden = np.zeros((trace.n_windows, most), dtype=bool)
    mass = np.zeros((trace.n_windows, most), dtype=np.float32)
    horizon = rule.horizon_steps or tau
    for window, visible in enumerate(entries):
        ahead = slice(window * tau, window * tau + horizon)
        rows = trace.entry_ids[ahead], trace.mass[ahead]
        if trace.holds_labels:
            found = voted_labels(
                rows[0][:, 0],
                rows[1][:, 0],
                int(visible),
                rule,
                trace.header.geometry["label_layers"],
            )
        else:
            found = labels(*rows, int(visible), rule)
        golden[window, :visible], mass[window, :visible] = found
    return Windows(
        name,
        positions,
        entries,
        np.asarray(trace.hidden[:])[states][:, trace.keyed],
        trace.keys(most),
        golden,
        mass,
        tuple(trace.csa_numbers[layer] for layer in trace.keyed),
        rule.state_age,
    )
