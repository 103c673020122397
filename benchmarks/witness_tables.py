"""The tables of benchmarks/results/witness.md, of witness.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

WAYS = {"own": "as it is", "ntk": "NTK-aware base", "yarn": "YaRN"}
LADDER_BUDGETS = ("2%", "3%", "5%", "10%", "5% gpu", "10% gpu", "12.5% gpu")
TRAITS = {
    "heaviest_eighth": "mass on the heaviest eighth of the top-k",
    "near": "mass on the first 4 and the newest 128 tokens",
    "selected_before": "entries that the step before selected too",
    "union_of_window": "entries that a window of 64 steps selects, of all",
}
BOUNDS = ("oracle", "oracle, one set")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def positions(result: Mapping[str, Any]) -> str:
    """Perplexity by how positions are stretched and by tokens read."""
    by_way = result["positions"]["positions"]
    ends = list(next(iter(by_way.values())))
    rows = []
    for way, row in by_way.items():
        kind, _, factor = way.partition(":")
        name = WAYS[kind] + (f", x{factor}" if factor else "")
        rows.append([name, *(f"{row[end]:,.1f}" for end in ends)])
    return _table(["perplexity until", *(f"{round(int(end) / 1024)}K" for end in ends)], rows)


def indexers(result: Mapping[str, Any]) -> str:
    """What the lightning indexers find, a row a length."""
    rows = []
    for name, length in result["lengths"].items():
        found, layers = length["found"], length["found"]["found"]
        mean = lambda key: float(np.mean([layer[key] for layer in layers]))
        worst = min(layer["mass"] / layer["most"] for layer in layers)
        sparse = found["sparse"]
        rows.append(
            [
                name,
                f"{found['topk']:,} of {found['context']:,}",
                f"{length['losses'][-1]['loss']:.3f}",
                f"{mean('recall'):.2f}",
                f"{mean('mass'):.3f} of {mean('most'):.3f}",
                f"{worst:.2f}",
                *(f"{sparse[way]:.2f}" for way in ("dense", "indexers", "recency")),
            ]
        )
    head = ["length", "selected", "loss", "recall", "mass", "worst layer"]
    return _table([*head, "perplexity: dense", "indexers", "recency"], rows)


def traits(result: Mapping[str, Any]) -> str:
    """How attention lies: the witness' traces, a mean a length, beside nano's."""
    columns = {
        f"witness, {name}": _mean(list(length["traits"].values()))
        for name, length in result["lengths"].items()
    } | result["nano"]["traits"]
    rows = [
        [label, *(f"{column[key]:.2f}" for column in columns.values())]
        for key, label in TRAITS.items()
    ]
    return _table(["", *columns], rows)


def ladders(result: Mapping[str, Any], kind: str = "far") -> str:
    """A table a length of the witness, and one of nano's traces: the mean mass kept of ``kind``."""
    parts = []
    named = {f"witness, {name}": length["ladder"] for name, length in result["lengths"].items()} | {
        "nano": result["nano"]["ladder"]
    }
    for name, ladder in named.items():
        traces = list(ladder["by_trace"].values())
        rows = []
        best = {
            budget: max(
                (
                    value
                    for label in traces[0]
                    if label not in BOUNDS
                    and (value := _kept(traces, label, budget, kind)) is not None
                ),
                default=None,
            )
            for budget in LADDER_BUDGETS
        }
        for label in traces[0]:
            cells = []
            for budget in LADDER_BUDGETS:
                value = _kept(traces, label, budget, kind)
                cell = "-" if value is None else f"{value:.3f}"
                if label not in BOUNDS and value is not None and value == best[budget]:
                    cell = f"**{cell}**"
                cells.append(cell)
            rows.append([label, *cells])
        count = f"{len(traces)} traces" if len(traces) > 1 else "1 trace"
        parts += [f"{name}, mean of {count}:", "", _table(["mass kept", *LADDER_BUDGETS], rows), ""]
    return "\n".join(parts).strip()


def _kept(traces: Sequence[Any], label: str, budget: str, kind: str) -> float | None:
    """Mean over the traces; None where the policy cannot be on one of them."""
    found = [trace[label][budget] for trace in traces]
    if any(isinstance(one, str) for one in found):
        return None
    return float(np.mean([one[kind] for one in found]))


def _mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


PAGE = "benchmarks/results/witness.md"
PARTS = {
    (PAGE, "positions"): positions,
    (PAGE, "indexers"): indexers,
    (PAGE, "traits"): traits,
    (PAGE, "far mass"): ladders,
    (PAGE, "all mass"): lambda result: ladders(result, "all"),
}
