"""How much of what the next window needs does a ranking keep?

The memory indexer against simple rankings and the oracle.

Every ranking orders the entries visible at a window's start, from what is known there (the oracle
alone knows the window), and is cut at a share of them. Recall is of the window's golden entries and
of the attention mass that its steps put on entries visible at its start; both are means over
windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fmsim.indexer import scorer
from fmsim.indexer.checkpoint import Checkpoint
from fmsim.indexer.windows import Windows
from fmsim.trace.format import Trace

KEPT_SHARES = (0.01, 0.02, 0.05, 0.10, 0.20, 0.40)


def recall_curve(
    rank: np.ndarray, windows: Windows, query: int, shares: Sequence[float]
) -> np.ndarray:
    """float64 [2, shares]: golden and mass recall of one query by ``rank`` [entries], the highest
    kept first.

    NaN where the query has no golden entries, or its window no mass, to recall.
    """
    seen = int(windows.entries[query])
    order = np.argsort(-rank, kind="stable")
    # a share that is a count stays that count
    kept = np.ceil(np.asarray(shares) * seen - 1e-6).astype(np.int64)
    found = np.full((2, len(shares)), np.nan)
    for row, wanted in enumerate((windows.golden[query, :seen], windows.mass[query, :seen])):
        gained = np.concatenate(([0.0], np.cumsum(wanted[order], dtype=np.float64)))
        if gained[-1] > 0:
            found[row] = gained[kept] / gained[-1]
    return found


def rankings(
    checkpoint: Checkpoint, trace: Trace, windows: Windows, native: Checkpoint | None = None
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Every window's rankings by name, each [entries visible at its start]; windows in order.

    "native, held" is the model's lightning indexer (``native``) at the token before the window: an
    entry's worth is its best place in any layer's list, so that a cut is the union of the layers'
    top-k. "h2o" is the mass accumulated so far, the prompt's included where the trace has it; "lru"
    the step of last use.
    """
    most = windows.golden.shape[1]
    mass_so_far = np.zeros(most, dtype=np.float64)
    if trace.prompt_mass is not None:
        prompt = np.asarray(trace.prompt_mass, dtype=np.float64).sum(0)[:most]
        mass_so_far[: len(prompt)] = prompt
    last_use = np.zeros(most, dtype=np.int64)
    random = np.random.default_rng(0)
    tau = trace.header.tau
    for query, seen in enumerate(windows.entries.tolist()):
        logits = _logits(checkpoint, windows, query)
        held = (
            {"native, held": -_places(_logits(native, windows, query)).min(axis=0)}
            if native
            else {}
        )
        golden, mass = windows.golden[query, :seen], windows.mass[query, :seen]
        yield (
            query,
            {
                "lsa (max)": scorer.combine(logits, "max"),
                "lsa (mean)": scorer.combine(logits, "mean"),
                **{
                    f"lsa (l{layer})": logits[place]
                    for place, layer in enumerate(checkpoint.layers)
                },
                **held,
                "oracle": np.where(golden, mass + mass.sum() + 1.0, mass),
                "h2o": mass_so_far[:seen].copy(),
                "lru": last_use[:seen].copy(),
                "recency": np.arange(seen),
                "random": random.random(seen),
            },
        )
        past = slice(query * tau, (query + 1) * tau)
        _account(trace.entry_ids[past], trace.mass[past], query * tau, mass_so_far, last_use)


def _logits(checkpoint: Checkpoint, windows: Windows, query: int) -> np.ndarray:
    """float32 [layers of the checkpoint, entries visible to the query]."""
    layers = [windows.layers.index(layer) for layer in checkpoint.layers]
    seen = int(windows.entries[query])
    keys, position = windows.keys[layers, :seen], int(windows.positions[query])
    return scorer.layer_logits(
        list(checkpoint.layers.values()),
        checkpoint.config,
        windows.hidden[query, layers],
        position,
        keys,
    )


def _places(logits: np.ndarray) -> np.ndarray:
    """Each entry's place in its layer's list sorted by logit, 0 the highest: int [layers,
    entries].
    """
    return np.argsort(np.argsort(-logits, axis=1, kind="stable"), axis=1, kind="stable")


def _account(
    ids: np.ndarray,
    mass: np.ndarray,
    first_step: int,
    mass_so_far: np.ndarray,
    last_use: np.ndarray,
) -> None:
    """Add steps that have passed, [n, L, K] each, to what the rankings by past use know."""
    used = (ids >= 0) & (ids < len(last_use))
    mass_so_far += np.bincount(ids[used], weights=mass[used], minlength=len(mass_so_far))
    steps = np.broadcast_to(1 + first_step + np.arange(len(ids))[:, None, None], ids.shape)
    np.maximum.at(last_use, ids[used], steps[used])


def evaluate(
    checkpoint: Checkpoint,
    traces: Sequence[tuple[Trace, Windows]],
    shares: Sequence[float] = KEPT_SHARES,
    native: Checkpoint | None = None,
) -> dict[str, Any]:
    """Recall of every ranking over all windows of ``traces``, and what the recommended threshold
    keeps.

    -> {"queries", "kept_shares", "golden_recall": {ranking: [a share]}, "mass_recall": {...},
    "threshold": {"score", "kept_share", "golden_recall", "mass_recall"} or None}, ready for JSON.
    """
    curves: dict[str, list[np.ndarray]] = {}
    at_threshold = []
    for trace, windows in traces:
        for scoring in filter(None, (checkpoint, native)):
            scoring.check_fits(
                windows.layers, windows.hidden.shape[2], windows.keys.shape[2], windows.name
            )
        for query, ranked in rankings(checkpoint, trace, windows, native):
            for name, rank in ranked.items():
                curves.setdefault(name, []).append(recall_curve(rank, windows, query, shares))
            if checkpoint.threshold is not None:
                share = float((ranked["lsa (max)"] >= scorer.logit(checkpoint.threshold)).mean())
                at_threshold.append(
                    (share, *recall_curve(ranked["lsa (max)"], windows, query, [share])[:, 0])
                )
    means = {name: np.nanmean(curve, axis=0) for name, curve in curves.items()}
    return {
        "queries": len(next(iter(curves.values()), [])),
        "kept_shares": list(shares),
        "golden_recall": {name: mean[0].tolist() for name, mean in means.items()},
        "mass_recall": {name: mean[1].tolist() for name, mean in means.items()},
        "threshold": _threshold_row(checkpoint.threshold, at_threshold),
    }


def _threshold_row(
    threshold: float | None, rows: list[tuple[float, ...]]
) -> dict[str, float] | None:
    if threshold is None:
        return None
    kept, golden, mass = np.nanmean(rows, axis=0).tolist()
    return {"score": threshold, "kept_share": kept, "golden_recall": golden, "mass_recall": mass}
