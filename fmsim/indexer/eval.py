"""How much of what the next window needs does a ranking keep?

The memory indexer against simple rankings and the oracle.

Every ranking orders the entries visible at the query of a window, from what a policy knows when it
decides (the oracle alone knows the window), and is cut at a share of them. Recall is of the
window's golden entries and of the attention mass that its steps put on those entries; both are
means over windows. The indexer goes by the query's state, which is stale by one window where
`Windows.state_age` says so; what was used is known up to the window's start, but for "lsa +
history", whose uses are as old as its state.

Window 0 stands apart: nothing was decoded before it, so that what ranks by use knows the prompt's
attention alone. A last window of less than half its steps is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fmsim import bootstrap
from fmsim.indexer import scorer
from fmsim.indexer.checkpoint import Checkpoint
from fmsim.indexer.windows import Windows
from fmsim.trace.format import Trace

KEPT_SHARES = (0.01, 0.02, 0.05, 0.10, 0.20, 0.40)
FADE = 0.5  # of "lsa + history", as the policy lsa-history's default
KEYS = ("golden_recall", "mass_recall")


class History:
    """What was selected so far, by entry; it begins with the attention of the prompt's last
    queries, where the trace has it.
    """

    def __init__(self, trace: Trace, entries: int) -> None:
        self.mass = np.zeros(entries, dtype=np.float64)
        if trace.prompt_mass is not None:
            prompt = np.asarray(trace.prompt_mass, dtype=np.float64).sum(0)[:entries]
            self.mass[: len(prompt)] = prompt
        # ranks what was never used yet, below all that was
        self.prior = self.mass / (self.mass.max(initial=0.0) + 1.0)
        self.last_use = np.zeros(entries, dtype=np.int64)  # a step from 1
        self.count = np.zeros(entries, dtype=np.int64)  # steps that selected it
        self.faded = [
            self.mass.copy()
        ]  # by window: uses at its start, fading from window to window

    def add(self, ids: np.ndarray, mass: np.ndarray, first_step: int) -> None:
        """A window's steps have passed: ids and mass [n, L, K] each."""
        used = (ids >= 0) & (ids < len(self.mass))
        self.mass += np.bincount(ids[used], weights=mass[used], minlength=len(self.mass))
        within = np.zeros(len(self.mass), dtype=np.int64)
        for step, (row, known) in enumerate(zip(ids, used), start=1 + first_step):
            selected = np.unique(row[known])
            within[selected] += 1
            self.last_use[selected] = step
        self.count += within
        self.faded.append(self.faded[-1] * FADE + within)

    def by_last_use(self) -> np.ndarray:
        return np.where(self.last_use > 0, self.last_use, self.prior)

    def by_count(self) -> np.ndarray:
        """The most used first; of those used alike, the last."""
        order = self.count + self.last_use / (self.last_use.max(initial=0) + 1.0)
        return np.where(self.count > 0, order, self.prior)


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
    """Every window's rankings by name, each [entries visible to its query]; windows in order.

    "native, held" is the model's lightning indexer (``native``) at the query: an entry's worth is
    its best place in any layer's list, so that a cut is the union of the layers' top-k. "lsa +
    history" adds log2(1 + uses) to the indexer's logit, as the policy `lsa-history` does. "h2o" is
    the mass accumulated so far, "lru" the step of last use, "lfu" the number of steps; all three
    see all that was selected, and begin with the prompt's last queries.
    """
    history = History(trace, windows.golden.shape[1])
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
        combined = scorer.combine(logits, "max")
        uses = history.faded[max(query - windows.state_age, 0)][:seen]
        yield (
            query,
            {
                "lsa (max)": combined,
                "lsa (mean)": scorer.combine(logits, "mean"),
                **{
                    f"lsa (l{layer})": logits[place]
                    for place, layer in enumerate(checkpoint.layers)
                },
                "lsa + history": combined + np.log2(1 + uses),
                **held,
                "oracle": np.where(golden, mass + mass.sum() + 1.0, mass),
                "h2o": history.mass[:seen].copy(),
                "lru": history.by_last_use()[:seen],
                "lfu": history.by_count()[:seen],
                "recency": np.arange(seen),
                "random": random.random(seen),
            },
        )
        past = slice(query * tau, (query + 1) * tau)
        history.add(np.asarray(trace.entry_ids[past]), np.asarray(trace.mass[past]), query * tau)


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


def evaluate(
    checkpoint: Checkpoint,
    traces: Sequence[tuple[Trace, Windows]],
    shares: Sequence[float] = KEPT_SHARES,
    native: Checkpoint | None = None,
) -> dict[str, Any]:
    """Recall of every ranking over the windows of ``traces`` but their first ones, and what the
    recommended threshold keeps.

    -> {"queries", "state_age", "kept_shares", "golden_recall": {ranking: [a share]}, "mass_recall":
    {...}, "half_width": {"golden_recall": ..., "mass_recall": ...}, "first_window": {...},
    "threshold": {"score", "kept_share", "golden_recall", "mass_recall"} or None}, ready for JSON.
    ``half_width`` is half of a 95% interval's width, from a bootstrap over windows, or over traces
    where there are several; None where there is one. A recall is None where no window has one.
    """
    later: dict[str, list[tuple[int, np.ndarray]]] = {}  # by ranking: (trace, curve) of a window
    first: dict[str, list[np.ndarray]] = {}
    at_threshold = []
    for number, (trace, windows) in enumerate(traces):
        for scoring in filter(None, (checkpoint, native)):
            scoring.check_fits(
                windows.layers, windows.hidden.shape[2], windows.keys.shape[2], windows.name
            )
        for query, ranked in rankings(checkpoint, trace, windows, native):
            if len(trace.entry_ids) - query * trace.header.tau < trace.header.tau / 2:
                continue
            for name, rank in ranked.items():
                curve = recall_curve(rank, windows, query, shares)
                if query:
                    later.setdefault(name, []).append((number, curve))
                else:
                    first.setdefault(name, []).append(curve)
            if query and checkpoint.threshold is not None:
                share = float((ranked["lsa (max)"] >= scorer.logit(checkpoint.threshold)).mean())
                at_threshold.append(
                    (share, *recall_curve(ranked["lsa (max)"], windows, query, [share])[:, 0])
                )
    nothing = np.full((2, len(shares)), np.nan)
    means = {name: _mean_and_spread(later.get(name, []), nothing) for name in first}
    apart = {name: _mean_and_spread(list(enumerate(part)), nothing) for name, part in first.items()}
    return {
        "queries": len(next(iter(later.values()), [])),
        "state_age": traces[0][1].state_age if traces else 0,
        "kept_shares": list(shares),
        **{key: _plain(means, 0, place) for place, key in enumerate(KEYS)},
        "half_width": {key: _plain(means, 1, place) for place, key in enumerate(KEYS)},
        "first_window": {key: _plain(apart, 0, place) for place, key in enumerate(KEYS)},
        "threshold": _threshold_row(checkpoint.threshold, at_threshold),
    }


def _mean_and_spread(
    curves: Sequence[tuple[int, np.ndarray]], nothing: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean of (trace, [2, shares]) over windows, and half the width of its 95% interval; NaN where
    nothing is known.
    """
    if not curves:
        return nothing, nothing
    numbers = [number for number, _ in curves]
    found = np.array([curve for _, curve in curves])
    part, whole = np.nan_to_num(found), np.isfinite(found).astype(np.float64)
    if len(set(numbers)) > 1:  # windows of one trace are more alike than those of others
        starts = np.flatnonzero(np.diff(numbers, prepend=-1))
        part, whole = (np.add.reduceat(each, starts, axis=0) for each in (part, whole))
    blocks = len(part)
    mean = np.divide(part.sum(0), whole.sum(0), out=nothing.copy(), where=whole.sum(0) > 0)
    if blocks < 2:
        return mean, nothing
    flat = (each.reshape(blocks, -1) for each in (part, whole))
    draws = bootstrap.ratio_draws(*flat, (blocks,)).reshape(-1, *nothing.shape)
    known = np.isfinite(draws).any(axis=0)
    spread = np.nanstd(np.where(known, draws, 0.0), axis=0)
    return mean, np.where(known, bootstrap.t_quantile(blocks - 1) * spread, np.nan)


def _plain(
    found: dict[str, tuple[np.ndarray, np.ndarray]], part: int, place: int
) -> dict[str, list[float | None]]:
    """By ranking one row of means (part 0) or of half widths (1); None for NaN."""
    return {
        name: [None if np.isnan(value) else float(value) for value in pair[part][place]]
        for name, pair in found.items()
    }


def _threshold_row(
    threshold: float | None, rows: list[tuple[float, ...]]
) -> dict[str, float] | None:
    if threshold is None or not rows:
        return None
    kept, golden, mass = np.nanmean(rows, axis=0).tolist()
    return {"score": threshold, "kept_share": kept, "golden_recall": golden, "mass_recall": mass}
