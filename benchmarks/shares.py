"""What a server keeps by length of the context: shares of the full cache's bytes that are chosen on
one seed, and judged on the others.

The paper (arXiv 2606.09079) keeps 13.5% of the cache on average, and less than 10% at 500K. So a
policy may have another budget at each length, as long as their mean is at most `MEAN`, and that of
the longest at most `LONGEST`. Of the budgets that were asked, those are chosen that lose the least
on the first seed. What they lose on all other seeds is the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from fmsim.experiments.accuracy.intervals import interval
from fmsim.experiments.accuracy.kept import QUESTION
from fmsim.policies import registry

MEAN, LONGEST = 0.135, 0.10  # of the full cache's bytes
SHORTEST = 32_768  # at 8,192 tokens windows and HCA entries alone take 11%
ABOVE = 1e-3  # "10% gpu" may take 10.003%: pages are whole
CHOSEN = ("lsa", "foresight")

Line = Mapping[str, Any]
Sample = dict[str, Any]


def chosen(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """A row a policy of `CHOSEN`: {"policy", "budgets" by length, "share", "share_at_longest",
    "seed" it was chosen on, "chosen": its mean difference there, "judged": {"difference", "ci95",
    "seeds", "contexts"} on the others, None where they were not asked at each of the lengths,
    "by_length": the same for each, "chosen_by_length": on the first seed}. Differences are to the
    full cache's score of the same questions; every length counts as much as another. A policy that
    the first seed did not ask at every length is left out.
    """
    samples = _differences(lines)
    lengths = {sample["tokens"] for sample in samples}
    seeds = sorted({sample["seed"] for sample in samples})
    if len(seeds) < 2:
        return []
    found = []
    for policy in CHOSEN:
        own = [sample for sample in samples if sample["policy"] == policy]
        budgets = _least_loss([sample for sample in own if sample["seed"] == seeds[0]])
        if budgets is None or set(budgets) != lengths:
            continue
        kept = [sample for sample in own if sample["budget"] == budgets.get(sample["tokens"])]
        first = [sample for sample in kept if sample["seed"] == seeds[0]]
        others = [sample for sample in kept if sample["seed"] != seeds[0]]
        # a length that no other seed was asked at
        apart = set(budgets) - {sample["tokens"] for sample in others}
        shares = {tokens: _share(kept, tokens) for tokens in budgets}
        found.append(
            {
                "policy": policy,
                "budgets": {str(tokens): budget for tokens, budget in budgets.items()},
                "share": float(np.mean(list(shares.values()))),
                "share_at_longest": shares[max(shares)],
                "seed": seeds[0],
                "chosen": _judged(first)["difference"],
                "chosen_by_length": {
                    str(tokens): _judged([one for one in first if one["tokens"] == tokens])
                    for tokens in budgets
                },
                "judged": None if apart else _judged(others),
                "by_length": {
                    str(tokens): _judged([one for one in others if one["tokens"] == tokens])
                    for tokens in budgets
                    if tokens not in apart
                },
            }
        )
    return found


def _differences(lines: Sequence[Line]) -> list[Sample]:
    """A sample a (policy, budget, context, family): the mean difference of its questions."""
    full = {
        tuple(line[key] for key in QUESTION): line["score"]
        for line in lines
        if line["policy"] == "full"
    }
    groups: dict[tuple[Any, ...], list[Line]] = {}
    for line in lines:
        name, params = registry.split(line["policy"])
        budget = str(params.pop("budget", ""))
        if name not in CHOSEN or params or "refused" in line or line["tokens"] < SHORTEST:
            continue
        if tuple(line[key] for key in QUESTION) in full:
            key = (name, budget, *(line[key] for key in ("tokens", "seed", "sample", "task")))
            groups.setdefault(key, []).append(line)
    names = ("policy", "budget", "tokens", "seed", "sample", "task")
    return [
        dict(zip(names, key, strict=True))
        | {
            "difference": float(
                np.mean([one["score"] - full[tuple(one[k] for k in QUESTION)] for one in group])
            ),
            "share": float(np.mean([one["gpu_ratio"] for one in group])),
        }
        for key, group in groups.items()
    ]


def _least_loss(samples: Sequence[Sample]) -> dict[int, str] | None:
    """A budget by length: the least loss within the bytes; among equals the fewest bytes."""
    lengths = sorted({sample["tokens"] for sample in samples})
    if not lengths:
        return None
    options: list[list[tuple[str, float, float]]] = []
    for tokens in lengths:
        of_length = [sample for sample in samples if sample["tokens"] == tokens]
        budgets = dict.fromkeys(sample["budget"] for sample in of_length)
        options.append(
            [
                (budget, _share(part, tokens), _mean(part))
                for budget in budgets
                if (part := [one for one in of_length if one["budget"] == budget])
            ]
        )
    fitting = [
        choice
        for choice in product(*options)
        if np.mean([share for _, share, _ in choice]) <= MEAN + ABOVE
        and choice[-1][1] <= LONGEST + ABOVE
    ]
    if not fitting:
        return None

    def rank(choice: Sequence[tuple[str, float, float]]) -> tuple[float, float]:
        loss = sum(difference for _, _, difference in choice)
        return (-round(loss, 9), sum(share for _, share, _ in choice))

    best = min(fitting, key=rank)
    return {tokens: budget for tokens, (budget, _, _) in zip(lengths, best, strict=True)}


def _share(samples: Sequence[Sample], tokens: int) -> float:
    """Of the full cache's bytes, what the policy took."""
    return float(np.mean([one["share"] for one in samples if one["tokens"] == tokens]))


def _mean(samples: Sequence[Sample]) -> float:
    """Over families, each the mean of its contexts."""
    by_task: dict[str, list[float]] = {}
    for sample in samples:
        by_task.setdefault(sample["task"], []).append(sample["difference"])
    return float(np.mean([np.mean(values) for values in by_task.values()]))


def _judged(samples: Sequence[Sample]) -> dict[str, Any]:
    lengths = sorted({sample["tokens"] for sample in samples})
    of_length = {n: [one for one in samples if one["tokens"] == n] for n in lengths}
    weights = {
        (n, task): 1 / len(tasks)
        for n, part in of_length.items()
        if (tasks := {one["task"] for one in part})
        for task in tasks
    }
    return {
        "difference": float(np.mean([_mean(part) for part in of_length.values()])),
        "ci95": interval(samples, "difference", -1.0, 1.0, weights),
        "seeds": sorted({one["seed"] for one in samples}),
        "contexts": len({(one["tokens"], one["seed"], one["sample"]) for one in samples}),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A row a policy: the budget at each length, its difference to the full cache in points on the
    seed that chose, and on the others.
    """
    if not rows:
        return "Not measured yet."
    lengths = sorted({int(tokens) for row in rows for tokens in row["budgets"]})
    heads = [f"{tokens:,} tokens" for tokens in lengths]
    lines = [
        f"| policy | {' | '.join(heads)} | bytes, mean | difference to full, mean |",
        "|---" * (len(lengths) + 3) + "|",
    ]
    for row in rows:
        cells = [
            f"{row['budgets'][str(n)].removesuffix(' gpu')}:"
            f" {100 * row['chosen_by_length'][str(n)]['difference']:+.1f};"
            f" {_points(row['by_length'].get(str(n)))}"
            for n in lengths
        ]
        cells += [f"{row['share']:.1%}", f"{100 * row['chosen']:+.1f}; {_points(row['judged'])}"]
        lines.append(f"| `{row['policy']}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _points(judged: Mapping[str, Any] | None) -> str:
    if judged is None:
        return "not judged"
    ci = judged["ci95"]
    if ci["half_width"] is None or ci["alike"]:
        return f"{100 * judged['difference']:+.1f}"
    low, high = (100 * (judged["difference"] + sign * ci["half_width"]) for sign in (-1, 1))
    return f"{100 * judged['difference']:+.1f} ({low:+.1f} to {high:+.1f})"
