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
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


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
    for name, traces in _traces(result).items():
        best = {
            budget: max(
                value
                for label in traces[0]
                if label not in BOUNDS and (value := _kept(traces, label, budget, kind)) is not None
            )
            for budget in LADDER_BUDGETS
        }
        rows = [
            [
                label,
                *(_cell(traces, label, budget, kind, best[budget]) for budget in LADDER_BUDGETS),
            ]
            for label in traces[0]
        ]
        parts += [
            f"{name}, mean of {len(traces)} traces:",
            "",
            _table(["mass kept", *LADDER_BUDGETS], rows),
            "",
        ]
    return "\n".join(parts).strip()


def short(result: Mapping[str, Any]) -> str:
    """The far mass at two budgets, the witness beside nano."""
    columns = [
        (f"{name}, {budget}", traces, budget)
        for budget in ("5%", "10% gpu")
        for name, traces in _traces(result).items()
    ]
    found = _traces(result)
    labels = dict.fromkeys(label for name in reversed(found) for label in found[name][0])
    rows = [
        [label, *(_cell(traces, label, budget, "far") for _, traces, budget in columns)]
        for label in labels
    ]
    return _table(["far mass kept", *(name for name, _, _ in columns)], rows)


def _traces(result: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Ladders of traces: the witness' by length, and nano's."""
    lengths = result["lengths"].items()
    ladders = {f"witness, {name}": length["ladder"] for name, length in lengths}
    ladders["nano"] = result["nano"]["ladder"]
    return {name: list(ladder["by_trace"].values()) for name, ladder in ladders.items()}


def _cell(
    traces: Sequence[Any], label: str, budget: str, kind: str, best: float | None = None
) -> str:
    value = _kept(traces, label, budget, kind)
    shown = "-" if value is None else f"{value:.3f}"
    return f"**{shown}**" if value is not None and value == best and label not in BOUNDS else shown


def _kept(traces: Sequence[Any], label: str, budget: str, kind: str) -> float | None:
    """Mean over the traces; None where the policy cannot be on one of them."""
    found = [trace.get(label, {}).get(budget, "absent") for trace in traces]
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
    ("docs/explanation/lsa.md", "witness"): short,
}
