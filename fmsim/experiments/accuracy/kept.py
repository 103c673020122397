"""How much of what the full cache answers a policy answers, and whether the attention mass that it
keeps foretells it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fmsim import bootstrap
from fmsim.experiments.accuracy.lines import Line

QUESTION = ("task", "tokens", "seed", "sample", "question")
CONTEXT = ("seed", "sample")


def answers_kept(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """A row a (length, policy): {"tokens", "policy", "kept", "kept_ci95", "contexts", "questions",
    "full_score", "score", "mass_kept", "gpu_bytes", "gpu_ratio", "max_requests"}.

    ``kept`` is the policy's score over the full cache's, both summed over families and contexts;
    within a family's context a question counts as much as another. Questions that the full cache
    was not asked are left out. Its 95% interval comes from a bootstrap over contexts, in which both
    sums are of the same contexts; see `intervals.interval`. None where the full cache answers
    nothing.
    """
    full = {
        tuple(line[key] for key in QUESTION): line["score"]
        for line in lines
        if line["policy"] == "full"
    }
    groups: dict[tuple[int, str], list[Line]] = {}
    for line in lines:
        if tuple(line[key] for key in QUESTION) in full:
            groups.setdefault((line["tokens"], line["policy"]), []).append(line)
    return [_row(tokens, policy, group, full) for (tokens, policy), group in groups.items()]


def _row(
    tokens: int, policy: str, lines: Sequence[Line], full: dict[tuple, float]
) -> dict[str, Any]:
    samples: dict[tuple, list[tuple[float, float]]] = {}
    for line in lines:
        of_full = full[tuple(line[key] for key in QUESTION)]
        sample = (*(line[key] for key in CONTEXT), line["task"])
        samples.setdefault(sample, []).append((line["score"], of_full))
    means = {sample: np.mean(scores, axis=0) for sample, scores in samples.items()}
    contexts = sorted({sample[:2] for sample in means})
    part, whole = (
        np.array(
            [sum(pair[at] for sample, pair in means.items() if sample[:2] == c) for c in contexts]
        )
        for at in (0, 1)
    )
    kept = bootstrap.ratio(part, whole)
    return {
        "tokens": tokens,
        "policy": policy,
        "kept": None if kept is None else kept.value,
        "kept_ci95": None if kept is None else _interval(kept, len(contexts)),
        "contexts": len(contexts),
        "questions": len(lines),
        "full_score": float(whole.sum() / len(means)),
        "score": float(part.sum() / len(means)),
        **{
            key: float(np.mean([line[key] for line in lines]))
            for key in ("mass_kept", "gpu_bytes", "gpu_ratio", "max_requests")
        },
    }


def _interval(kept: bootstrap.Estimate, contexts: int) -> dict[str, Any]:
    found = kept.plain(0.0)
    del found["blocks"]
    alike = found["half_width"] is not None and found["half_width"] < 1e-9
    if alike:
        found["half_width"] = bootstrap.otherwise(contexts)
        found["low"] = max(0.0, kept.value - found["half_width"])
        found["high"] = kept.value + found["half_width"]
    return found | {"n": contexts, "alike": alike}


def guide(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How well the mass kept foretells the answers kept, over the rows of `answers_kept` but the
    full cache's.

    -> {"all": ..., "by_length": {tokens: ...}}, each {"rank_correlation", "points"}: Spearman's,
    of (policy, length) points; None where fewer than three differ.
    """
    known = [row for row in rows if row["policy"] != "full" and row["kept"] is not None]
    lengths = sorted({row["tokens"] for row in known})
    return {
        "all": _correlation(known),
        "by_length": {
            str(tokens): _correlation([row for row in known if row["tokens"] == tokens])
            for tokens in lengths
        },
    }


def _correlation(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    mass, kept = (np.array([row[key] for row in rows]) for key in ("mass_kept", "kept"))
    found = None
    if len(rows) >= 3 and np.ptp(mass) > 0 and np.ptp(kept) > 0:
        found = float(np.corrcoef(_ranks(mass), _ranks(kept))[0, 1])
    return {"rank_correlation": found, "points": len(rows)}


def _ranks(values: np.ndarray) -> np.ndarray:
    """From 0; equal values share the mean of their ranks."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    ends = count.cumsum()
    return ((ends - count + ends - 1) / 2)[place]
