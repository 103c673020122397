"""What a run's windows tell: which steps are the steady state, and how sure its figures are.

The resident set is chosen once a window, so windows are the blocks of the bootstrap
(`fmsim.bootstrap`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from fmsim import bootstrap
from fmsim.replay.ledger import Ledger

FIRST_STEADY_WINDOW = 2  # windows 0 and 1 share one state, so nothing is recalled between them


def steady_steps(n_steps: int, tau: int) -> slice:
    """The steps of the steady state: whole windows of `tau` steps from the third on; all steps
    where there is no third whole one.
    """
    first = FIRST_STEADY_WINDOW * tau
    last = n_steps // tau * tau
    return slice(first, last) if last > first else slice(0, n_steps)


def n_windows(n_steps: int, tau: int) -> int:
    """Windows that are blocks of the bootstrap: a last one of less than half its steps goes with
    the one before.
    """
    return max(1, int(n_steps / tau + 0.5))


def steady_overlap(ledger: Ledger) -> np.ndarray:
    """`Ledger.set_overlap` from the third window's start on; all of it where there is no third."""
    steady = ledger.set_overlap[FIRST_STEADY_WINDOW - 1 :]
    return steady if len(steady) else ledger.set_overlap


def layer_weights(ledger: Ledger, layer_map: Sequence[int]) -> np.ndarray:
    """How many of the model's layers each layer of the trace drives; 0 of one that was not
    measured.
    """
    weights = np.bincount(layer_map, minlength=ledger.n_layers)
    weights[ledger.unmeasured] = 0
    return weights


def golden_shares(ledger: Ledger) -> tuple[np.ndarray, np.ndarray]:
    """(share of its golden entries that a step found resident, whether it had any), [T, L] each."""
    had = (ledger.golden > 0).astype(np.float64)
    return ledger.golden_hit / np.maximum(ledger.golden, 1), had


def shares(ledger: Ledger) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A row's figures that are sums over steps and layers: name -> (part, whole), [T, L] each.

    Those of attention mass are absent where the trace has none.
    """
    found = {"hit_rate": (ledger.hit, ledger.accessed)}
    if ledger.masses:
        found["entry_recall"] = (ledger.golden_hit, ledger.golden)
        found["entry_recall_per_step"] = golden_shares(ledger)
        found["mass_kept"] = (ledger.mass_kept, ledger.mass_total)
    return found


def window_sums(ledger: Ledger, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sums of [T, L] values over each window's steps, layers weighted: float64 [windows]."""
    by_step = values.astype(np.float64) @ weights
    starts = ledger.tau * np.arange(n_windows(ledger.n_steps, ledger.tau))
    return np.add.reduceat(by_step, starts)


def intervals(ledger: Ledger, layer_map: Sequence[int]) -> dict[str, dict[str, Any]]:
    """A row's `ci95`: the figures that are estimates, each with its 95% interval."""
    weights = layer_weights(ledger, layer_map)
    found: dict[str, bootstrap.Estimate | None] = {}
    if weights.any():
        for name, (part, whole) in shares(ledger).items():
            found[name] = bootstrap.ratio(
                window_sums(ledger, part, weights), window_sums(ledger, whole, weights)
            )
        missed = window_sums(ledger, ledger.accessed - ledger.hit, weights)
        steps = window_sums(ledger, np.ones_like(ledger.accessed), weights) / weights.sum()
        found["misses"] = _times(bootstrap.ratio(missed, steps), ledger.n_steps)
    found["set_overlap"] = bootstrap.mean(steady_overlap(ledger))
    return {
        name: each.plain(least=0.0, most=None if name == "misses" else 1.0)
        for name, each in found.items()
        if each is not None
    }


def _times(found: bootstrap.Estimate | None, factor: int) -> bootstrap.Estimate | None:
    if found is None or found.half_width is None:
        return found
    return bootstrap.Estimate(found.value * factor, found.half_width * factor, found.blocks)


def differences(ledgers: dict[str, Ledger], layer_map: Sequence[int]) -> list[dict[str, Any]]:
    """How figures of a trace's policies differ, pair by pair: on the same windows in each draw.

    -> {"figure", "policy", "other", "difference", and its interval} of every pair of labels.
    """
    rows = []
    for name in ("mass_kept", "entry_recall", "hit_rate"):
        drawn: dict[str, tuple[float, np.ndarray, int]] = {}
        for label, ledger in ledgers.items():
            known = _drawn(ledger, name, layer_map)
            if known is not None:
                drawn[label] = known
        for label, other in itertools.combinations(drawn, 2):
            (value, draws, windows), (rival, rival_draws, _) = drawn[label], drawn[other]
            found = bootstrap.estimate(value - rival, draws - rival_draws, (windows,))
            row = {"figure": name, "policy": label, "other": other, "difference": found.value}
            rows.append(row | found.plain(least=-1.0, most=1.0))
    return rows


def _drawn(
    ledger: Ledger, name: str, layer_map: Sequence[int]
) -> tuple[float, np.ndarray, int] | None:
    """(a figure, what it is in each draw, windows); None where it is not known."""
    weights, pair = layer_weights(ledger, layer_map), shares(ledger).get(name)
    if pair is None or not weights.any():
        return None
    part, whole = (window_sums(ledger, values, weights) for values in pair)
    if not whole.sum():
        return None
    draws = bootstrap.ratio_draws(part, whole, (len(part),))
    return float(part.sum() / whole.sum()), draws, len(part)
