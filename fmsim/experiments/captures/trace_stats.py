"""What a trace's selections alone tell: how they repeat from step to step and layer to layer, and
what a cache of a few top-k would miss.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fmsim.errors import FmsimError
from fmsim.policies import registry
from fmsim.replay.replayer import Replayer
from fmsim.trace import Trace

WINDOWS = (4, 16, 64)  # steps
BUDGETS = (1, 2, 4)  # multiples of top-k
POLICIES = ("lru", "belady")


def stats(trace: Trace, max_steps: int | None = None) -> dict[str, Any]:
    """`layers`: a row a layer of the trace; `all`: their means.

    - `union`: distinct entries of a window of 4, 16 and 64 steps, over top-k; mean over windows;
    - `step_overlap`: share of a step's entries that the step before selected too;
    - `layer_overlap`: share that the layer before selected at the same step;
    - `reuse_steps`: median and 90th percentile of the steps since an entry's last selection;
    - `first_uses`: share of selections of an entry that no step before selected;
    - `misses`: share of selections that a cache of 1, 2 and 4 top-k misses, under lru and belady.

    Raises FmsimError for a trace of labels, which hold no selection.
    """
    if trace.holds_labels:
        raise FmsimError(
            f"{trace.path or 'trace'}: holds golden labels, not what layers selected; record a"
            " trace, or import a capture"
        )
    replayer = Replayer(trace, max_steps=max_steps)
    misses = _misses(replayer)
    rows = []
    before = None
    for layer in range(replayer.n_layers):
        ids = replayer.ids[:, layer]
        row = {"layer": trace.header.geometry["csa_layers"][layer]}
        row |= _repeats(ids, replayer.topk, int(trace.total_entries))
        row["layer_overlap"] = None if before is None else _overlap(ids, before)
        row["misses"] = {
            name: {str(n): misses[name, n][layer] for n in BUDGETS} for name in POLICIES
        }
        rows.append(row)
        before = ids
    return {
        "trace": str(trace.path or ""),
        "model": trace.header.model.name,
        "source": trace.header.source,
        "steps": replayer.n_steps,
        "prompt_tokens": trace.header.prompt_tokens,
        "entry_tokens": trace.header.entry_tokens,
        "topk": replayer.topk,
        "masses": trace.has_mass,
        "layers": rows,
        "all": _mean(rows),
    }


def _misses(replayer: Replayer) -> dict[tuple[str, int], list[float]]:
    """Missed selections over all, by (policy, multiple of top-k), a value a layer."""
    found = {}
    for name in POLICIES:
        for multiple in BUDGETS:
            policy = registry.build({"policy": name, "budget": f"{multiple}x topk"})
            ledger = replayer.run(policy)
            accessed = np.maximum(1, ledger.accessed.sum(0))
            missed = ledger.accessed.sum(0) - ledger.hit.sum(0)
            found[name, multiple] = (missed / accessed).tolist()
    return found


def _repeats(ids: np.ndarray, topk: int, entries: int) -> dict[str, Any]:
    """Of one layer's rows [T, K]: unions, overlap and reuse."""
    union = {}
    for width in WINDOWS:
        starts = range(0, len(ids) - width + 1, width)
        sizes = [np.unique(part[part >= 0]).size for part in (ids[s : s + width] for s in starts)]
        union[str(width)] = float(np.mean(sizes)) / topk if sizes else None
    last = np.full(entries, -1, np.int64)
    gaps: list[np.ndarray] = []
    first_uses = accesses = 0
    for step, row in enumerate(ids):
        used = row[row >= 0]
        seen = last[used]
        gaps.append(step - seen[seen >= 0])
        first_uses += int((seen < 0).sum())
        accesses += len(used)
        last[used] = step
    steps = np.concatenate(gaps) if gaps else np.zeros(0)
    return {
        "union": union,
        "step_overlap": _overlap(ids[1:], ids[:-1]) if len(ids) > 1 else None,
        "reuse_steps": {
            "p50": float(np.percentile(steps, 50)) if len(steps) else None,
            "p90": float(np.percentile(steps, 90)) if len(steps) else None,
        },
        "first_uses": first_uses / max(1, accesses),
    }


def _overlap(ids: np.ndarray, others: np.ndarray) -> float | None:
    """Share of the entries of each row of ``ids`` [n, K] that stand in the same row of ``others``,
    over all rows.
    """
    common = total = 0
    for row, other in zip(ids, others, strict=True):
        mine = row[row >= 0]
        common += int(np.isin(mine, other[other >= 0], assume_unique=True).sum())
        total += len(mine)
    return common / total if total else None


def _mean(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean of every figure over layers; None where no layer has it."""
    found: dict[str, Any] = {}
    for key, value in rows[-1].items():
        if key == "layer":
            continue
        if isinstance(value, dict):
            found[key] = _mean([row[key] for row in rows])
            continue
        known = [row[key] for row in rows if row[key] is not None]
        found[key] = float(np.mean(known)) if known else None
    return found
