"""How well what is known while an answer is decoded foretells that it is lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fmsim.experiments.accuracy.lines import Line

SIGNALS = {
    "selected entries not resident": lambda line: 1 - line["selected_resident"],
    "heaviest entry lost": lambda line: line["heaviest_lost"],
    "selected mass lost": lambda line: 1 - line["mass_kept"],
    "selected mass lost in the worst step": lambda line: 1 - line["least_mass_kept"],
    "indexer unsure": lambda line: -line["confidence"],
}


def signals(lines: Sequence[Line], full: dict[tuple, float]) -> dict[str, Any]:
    """What foretells a lost answer, for policies that lose some and keep some.

    {policy: {"lost", "kept", "auc": {signal: ...}}}: of answers that the full cache gives, how many
    the policy loses and keeps, and the chance that the signal was larger for a lost one (0.5: it
    tells nothing). "selected entries not resident": the share of what the native indexer selected,
    by count; "heaviest entry lost": the largest share of its step's mass in a layer that one entry
    had which was not attended to, which `on_miss: fallback` goes by; "selected mass lost": the
    share of the attention mass on it that was not attended to, over the answer, and in its worst
    step; "indexer unsure": how low the memory indexer's highest logit was at its last decision.
    """
    found = {}
    for policy in dict.fromkeys(line["policy"] for line in lines):
        known = [line for line in lines if line["policy"] == policy and _right(line, full)]
        lost = np.array([line["score"] < _right(line, full) for line in known], dtype=bool)
        if lost.any() and not lost.all():
            there = [
                name
                for name in SIGNALS
                if "unsure" not in name or known[0]["confidence"] is not None
            ]
            auc = {
                name: _auc(np.array([SIGNALS[name](line) for line in known]), lost)
                for name in there
            }
            found[policy] = {"lost": int(lost.sum()), "kept": int((~lost).sum()), "auc": auc}
    return found


def _auc(signal: np.ndarray, lost: np.ndarray) -> float:
    gap = signal[lost][:, None] - signal[~lost][None]
    return float((gap > 0).mean() + 0.5 * (gap == 0).mean())


def _right(line: Line, full: dict[tuple, float]) -> float:
    return full.get(
        (line["task"], line["tokens"], line["seed"], line["sample"], line["question"]), 0.0
    )
