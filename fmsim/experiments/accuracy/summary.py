"""From lines to the table's cells: scores and costs, and how they differ from the full cache's on
the same samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fmsim.experiments.accuracy.intervals import interval
from fmsim.experiments.accuracy.kept import QUESTION, answers_kept, guide
from fmsim.experiments.accuracy.lines import Line
from fmsim.experiments.accuracy.signals import signals

COSTS = (
    "gpu_bytes",
    "gpu_ratio",
    "max_requests",
    "kv_bytes",
    "kv_ratio",
    "golden_kept",
    "mass_kept",
    "h2d_bytes_per_step",
    "stall_ratio",
)


def summary(every: Sequence[Line]) -> dict[str, Any]:
    """-> {"cells": a (length, task, policy) each, "averages": a (length, policy) each over tasks,
    "overall": a policy each over all of them, "paired": ..., "signals": ..., "answers_kept": see
    `kept`, "mass_as_guide": see `kept.guide`, "refused": {"tokens", "policy", "why"} each}; ready
    for JSON.

    ``score`` is a mean over samples, of one's questions their mean, in 0 to 1; samples of all
    seeds. ``versus_full`` is the mean difference to the full cache's on the same samples. Their
    95% intervals, ``score_ci95`` and ``versus_full_ci95``, are clustered by context: see
    `intervals.interval`. A difference whose interval holds 0 is none.
    """
    lines = [line for line in every if "refused" not in line]
    refused = {
        (line["tokens"], line["policy"]): line["refused"] for line in every if "refused" in line
    }
    full = {
        tuple(line[key] for key in QUESTION): line["score"]
        for line in lines
        if line["policy"] == "full"
    }
    kept = answers_kept(lines)
    samples = _samples(lines)
    pairs = _paired(lines, full)
    pairs_of = _grouped(pairs, ("tokens", "task", "policy"))
    samples_of = _grouped(samples, ("tokens", "task", "policy"))
    cells = [
        _cell(*key, group, samples_of[key], pairs_of.get(key, []))
        for key, group in _grouped(lines, ("tokens", "task", "policy")).items()
    ]
    averages = [
        {"tokens": tokens, "policy": policy, **_mean(group)}
        for (tokens, policy), group in _grouped(cells, ("tokens", "policy")).items()
    ]
    overall = [
        {"policy": policy, **_mean(group)}
        for (policy,), group in _grouped(averages, ("policy",)).items()
    ]
    by_length = _grouped(samples, ("tokens", "policy"))
    for row in averages:
        row["score_ci95"] = interval(by_length[row["tokens"], row["policy"]], "score", 0.0, 1.0)
    by_policy = _grouped(samples, ("policy",))
    for row in overall:
        group = by_policy[(row["policy"],)]
        row["score_ci95"] = interval(group, "score", 0.0, 1.0, _length_by_length(group))
    return {
        "cells": cells,
        "averages": averages,
        "overall": overall,
        "paired": beside_full(pairs),
        "signals": signals(lines, full),
        "answers_kept": kept,
        "mass_as_guide": guide(kept),
        "refused": [
            {"tokens": tokens, "policy": policy, "why": why}
            for (tokens, policy), why in refused.items()
        ],
    }


def _length_by_length(samples: Sequence[Line]) -> dict[tuple[int, str], float]:
    """Weights of cells (tokens, task) such that every length counts as much as another."""
    tasks = {
        tokens: {sample["task"] for sample in group}
        for (tokens,), group in _grouped(samples, ("tokens",)).items()
    }
    return {
        (tokens, task): 1 / len(of_length)
        for tokens, of_length in tasks.items()
        for task in of_length
    }


def _grouped(rows: Sequence[Line], keys: tuple[str, ...]) -> dict[tuple, list[Line]]:
    groups: dict[tuple, list[Line]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def _cell(
    tokens: int,
    task: str,
    policy: str,
    lines: list[Line],
    samples: list[Line],
    pairs: list[Line],
) -> Line:
    costs = {key: float(np.mean([line[key] for line in lines])) for key in COSTS}
    return {
        "tokens": tokens,
        "task": task,
        "policy": policy,
        "samples": len(samples),
        "score": float(np.mean([sample["score"] for sample in samples])),
        "score_ci95": interval(samples, "score", 0.0, 1.0),
        **costs,
        "versus_full": float(np.mean([pair["difference"] for pair in pairs])) if pairs else None,
        "versus_full_ci95": interval(pairs, "difference", -1.0, 1.0) if pairs else None,
    }


def _samples(lines: Sequence[Line]) -> list[Line]:
    """A policy's score in each family and context: of its questions the mean."""
    keys = ("policy", "tokens", "task", "seed", "sample")
    return [
        dict(zip(keys, key)) | {"score": float(np.mean([line["score"] for line in group]))}
        for key, group in _grouped(lines, keys).items()
    ]


def _mean(rows: list[Line]) -> Line:
    return {key: float(np.mean([row[key] for row in rows])) for key in ("score", *COSTS)}


# -------------------------------------------------------------- beside the full cache, pair by pair


def beside_full(pairs: Sequence[Line]) -> dict[str, Any]:
    """{policy: {"better", "worse", "same", "difference", "difference_ci95", "by_seed": {seed:
    difference}}}, for policies other than full.

    A sample of a task and length is better where its score is above the full cache's on the same
    context. ``difference`` is the mean over tasks and lengths, of all seeds' samples, and its
    interval clustered by context: where it holds 0, the policy is neither better nor worse than the
    full cache.
    """
    found = {}
    for (policy,), group in _grouped(pairs, ("policy",)).items():
        if policy == "full":
            continue
        differences = np.array([pair["difference"] for pair in group])
        by_seed = _grouped(group, ("seed",))
        found[policy] = {
            "better": int((differences > 0).sum()),
            "worse": int((differences < 0).sum()),
            "same": int((differences == 0).sum()),
            "difference": _over_cells(group),
            "difference_ci95": interval(group, "difference", -1.0, 1.0),
            "by_seed": {str(seed): _over_cells(part) for (seed,), part in sorted(by_seed.items())},
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
