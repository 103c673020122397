"""From lines to the table's cells: scores and costs, and how they differ from the full cache's on
the same samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fmsim.experiments.accuracy.lines import Line
from fmsim.experiments.accuracy.signals import signals

COSTS = ("kv_bytes", "kv_ratio", "golden_kept", "mass_kept", "h2d_bytes_per_step", "stall_ratio")
QUESTION = ("task", "tokens", "seed", "sample", "question")


def summary(lines: Sequence[Line]) -> dict[str, Any]:
    """-> {"cells": a (length, task, policy) each, "averages": a (length, policy) each over tasks,
    "overall": a policy each over all of them, "paired": ..., "signals": ...}; ready for JSON.

    ``score`` is a mean over samples, of one's questions their mean, in 0 to 1; samples of all
    seeds. ``versus_full`` is the mean difference to the full cache's on the same samples, and
    ``versus_full_se`` its standard error (null for one sample): a difference within twice that is
    not one.
    """
    cells = [
        _cell(*key, group) for key, group in _grouped(lines, ("tokens", "task", "policy")).items()
    ]
    averages = [
        {"tokens": tokens, "policy": policy, **_mean(group)}
        for (tokens, policy), group in _grouped(cells, ("tokens", "policy")).items()
    ]
    overall = [
        {"policy": policy, **_mean(group)}
        for (policy,), group in _grouped(averages, ("policy",)).items()
    ]
    full = {
        tuple(line[key] for key in QUESTION): line["score"]
        for line in lines
        if line["policy"] == "full"
    }
    pairs = _paired(lines, full)
    for cell in cells:
        found = [
            pair["difference"]
            for pair in pairs
            if all(pair[key] == cell[key] for key in ("tokens", "task", "policy"))
        ]
        cell |= _mean_and_error(found, "versus_full")
    return {
        "cells": cells,
        "averages": averages,
        "overall": overall,
        "paired": beside_full(pairs),
        "signals": signals(lines, full),
    }


def _grouped(rows: Sequence[Line], keys: tuple[str, ...]) -> dict[tuple, list[Line]]:
    groups: dict[tuple, list[Line]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def _cell(tokens: int, task: str, policy: str, lines: list[Line]) -> Line:
    samples = _grouped(lines, ("seed", "sample"))
    means = [np.mean([line["score"] for line in group]) for group in samples.values()]
    costs = {key: float(np.mean([line[key] for line in lines])) for key in COSTS}
    return {
        "tokens": tokens,
        "task": task,
        "policy": policy,
        "samples": len(samples),
        "score": float(np.mean(means)),
        **costs,
    }


def _mean(rows: list[Line]) -> Line:
    return {key: float(np.mean([row[key] for row in rows])) for key in ("score", *COSTS)}


# -------------------------------------------------------------- beside the full cache, pair by pair


def beside_full(pairs: Sequence[Line]) -> dict[str, Any]:
    """{policy: {"better", "worse", "same", "difference", "difference_se", "by_seed": {seed:
    difference}}}, for policies other than full.

    A sample of a task and length is better where its score is above the full cache's on the same
    context. A seed's difference is the mean over its tasks and lengths; ``difference`` the mean
    over seeds and ``difference_se`` its standard error, of the spread from seed to seed (null for
    one seed): a policy whose difference is within twice that is neither better nor worse than the
    full cache.
    """
    found = {}
    for (policy,), group in _grouped(pairs, ("policy",)).items():
        if policy == "full":
            continue
        differences = np.array([pair["difference"] for pair in group])
        by_seed = {
            seed: _over_cells(part) for (seed,), part in sorted(_grouped(group, ("seed",)).items())
        }
        found[policy] = {
            "better": int((differences > 0).sum()),
            "worse": int((differences < 0).sum()),
            "same": int((differences == 0).sum()),
            **_mean_and_error(list(by_seed.values()), "difference"),
            "by_seed": {str(seed): difference for seed, difference in by_seed.items()},
        }
    return found


def _paired(lines: Sequence[Line], full: dict[tuple, float]) -> list[Line]:
    """The difference of each sample that the full cache was asked too, of its questions the
    mean.
    """
    pairs = []
    keys = ("policy", "tokens", "task", "seed", "sample")
    for key, group in _grouped(lines, keys).items():
        known = [
            (line["score"], full.get(tuple(line[name] for name in QUESTION))) for line in group
        ]
        differences = [score - other for score, other in known if other is not None]
        if differences:
            pairs.append(dict(zip(keys, key)) | {"difference": float(np.mean(differences))})
    return pairs


def _over_cells(pairs: list[Line]) -> float:
    cells = _grouped(pairs, ("tokens", "task"))
    return float(
        np.mean([np.mean([pair["difference"] for pair in group]) for group in cells.values()])
    )


def _mean_and_error(differences: list[float], name: str) -> Line:
    """Null where there is none, and the error where there is one."""
    error = (
        float(np.std(differences, ddof=1) / len(differences) ** 0.5)
        if len(differences) > 1
        else None
    )
    return {name: float(np.mean(differences)) if differences else None, f"{name}_se": error}
