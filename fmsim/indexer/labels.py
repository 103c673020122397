"""What the memory indexer should have kept: golden entries, from the attention mass that a trace
records.

Golden entries of a decode step in one CSA layer are the head of its list sorted by mass, up to a
cumulated share (0.6) of the compressed mass, at least one; the step's are those chosen by at least
m layers; a query's positives are the union over the next ``horizon`` steps (arXiv 2606.09079,
section 3.2). Unlike the paper's, the labels are causal: entries that had not closed at the query do
not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class LabelRule:
    """``head_share`` of a step's compressed mass that golden entries carry, ``min_layers`` (m) that
    must choose an entry, ``horizon_steps`` that a query must serve (the trace's tau, if None).

    ``state_age``: windows between a query's state and the window that it must serve. 0 is the
    paper's training: the state right before the window. 1 is how a server uses it that recalls
    during a window what the next one needs: the state is stale by one window.
    """

    head_share: float = 0.6
    min_layers: int = 1
    horizon_steps: int | None = None
    state_age: int = 0


class Labels(NamedTuple):
    """Of one query over the E entries visible to it: ``golden`` bool [E] the positives, ``mass``
    float32 [E] the attention mass on each over the horizon, summed over steps and layers.
    """

    golden: np.ndarray
    mass: np.ndarray


def golden_mask(mass: np.ndarray, head_share: float) -> np.ndarray:
    """Which selected entries are golden: mass [..., K] -> bool [..., K]; equal masses go by
    position in the list.

    The entry that carries the cumulated mass to ``head_share`` belongs to the head; a list without
    mass has none.
    """
    mass = np.asarray(mass, dtype=np.float32)
    descending = -np.sort(-mass, axis=-1)
    before = np.cumsum(descending, axis=-1) - descending
    head = (before < head_share * mass.sum(axis=-1, keepdims=True)) & (descending > 0)
    size = np.maximum(head.sum(axis=-1, keepdims=True), 1)
    least = np.take_along_axis(descending, size - 1, axis=-1)
    equal = mass == least
    spare = size - (mass > least).sum(axis=-1, keepdims=True)
    return ((mass > least) | (equal & (np.cumsum(equal, axis=-1) <= spare))) & (mass > 0)


def labels(entry_ids: np.ndarray, mass: np.ndarray, entries: int, rule: LabelRule) -> Labels:
    """Labels of a query that sees ``entries`` entries, from the steps that follow it.

    ``entry_ids`` int [n, L, K] (negative = padding) and ``mass`` [n, L, K] are those of the next n
    steps.
    """
    ids = np.asarray(entry_ids).astype(np.int64)
    mass = np.where(ids >= 0, np.asarray(mass, dtype=np.float32), 0.0)
    seen = (ids >= 0) & (ids < entries)
    golden = golden_mask(mass, rule.head_share) & seen
    step = np.arange(len(ids))[:, None, None]
    chosen, layers = np.unique((step * entries + ids)[golden], return_counts=True)
    positives = np.zeros(entries, dtype=bool)
    positives[chosen[layers >= rule.min_layers] % max(entries, 1)] = True
    return Labels(
        positives, np.bincount(ids[seen], weights=mass[seen], minlength=entries).astype(np.float32)
    )


def voted_labels(
    entry_ids: np.ndarray, share: np.ndarray, entries: int, rule: LabelRule, voters: int
) -> Labels:
    """Labels of a query from golden entries that were found already: ids int [n, K] (negative =
    padding) and the share [n, K] of ``voters`` layers that chose each.

    ``Labels.mass`` is the shares' sum.
    """
    ids = np.asarray(entry_ids).astype(np.int64)
    seen = (ids >= 0) & (ids < entries)
    votes = np.rint(np.asarray(share, dtype=np.float32) * voters)
    positives = np.zeros(entries, dtype=bool)
    positives[ids[seen & (votes >= rule.min_layers)]] = True
    return Labels(
        positives,
        np.bincount(ids[seen], weights=np.asarray(share)[seen], minlength=entries).astype(
            np.float32
        ),
    )


def step_votes(
    entry_ids: np.ndarray, mass: np.ndarray, rule: LabelRule
) -> tuple[np.ndarray, np.ndarray]:
    """One decode step's golden entries, ids int32 [n] ascending, and how many layers chose each:
    from ids and mass [L, K].
    """
    ids = np.asarray(entry_ids)
    golden = golden_mask(np.where(ids >= 0, mass, 0.0), rule.head_share) & (ids >= 0)
    found, layers = np.unique(ids[golden], return_counts=True)
    chosen = layers >= rule.min_layers
    return found[chosen].astype(np.int32), layers[chosen].astype(np.int32)
