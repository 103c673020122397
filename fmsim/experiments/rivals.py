"""The memory indexer beside its rivals at equal bytes on the GPU, each as the policy that it is.

A ranking cut at a share of the entries says nothing of what else a policy needs there: all index
keys, say, to see what the native indexer selects. Here each policy is replayed with the slots that
its budget leaves it. A policy that recalls ahead goes by a state that is stale by one window, as it
would on a server.

Window 0 stands apart: nothing was decoded before it, so that a policy that goes by use knows the
attention of the prompt's last queries alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmsim import bootstrap
from fmsim.errors import BudgetTooSmall, FmsimError
from fmsim.experiments.workers.parallel import in_parallel
from fmsim.geometry import Geometry
from fmsim.policies import registry
from fmsim.policies.budget import Budget
from fmsim.replay.ledger import Ledger
from fmsim.replay.replayer import Replayer
from fmsim.sim.footprint import ModelMemory, allocation, spread
from fmsim.sim.windows import shares, window_sums
from fmsim.trace import Trace

Row = dict[str, Any]
FIGURES = ("mass_kept", "entry_recall")
FIRST = "lsa, filled"  # the others stand beside it
HELD = {"cadence": 64, "on_miss": "mask"}
ALL = {"sees": "all"}
BOUNDS = ("oracle", "oracle, one set")  # they read the trace's future


def specs(checkpoint: Path | None, trace: Trace, native: bool) -> dict[str, dict[str, Any]]:
    """The policies by label.

    What goes by use begins with the attention of the prompt's last queries, where the trace has it.
    `native` says that the trace is of the shipped nano, whose lightning indexer is read.
    """
    scored = {"checkpoint": checkpoint}
    prompt = {"prompt_history": True} if trace.prompt_mass is not None else {}
    found = {
        "oracle": {"policy": "oracle"},
        "oracle, one set": {"policy": "oracle", "scope": "shared"},
        "lsa": {"policy": "lsa", "fill": False} | scored,
        "lsa, filled": {"policy": "lsa"} | scored,
        "lsa-history": {"policy": "lsa-history"} | scored | prompt,
        "lsa-history, sees all": {"policy": "lsa-history"} | scored | prompt | ALL,
        "foresight": {"policy": "foresight"} | scored,
        "lru, held": {"policy": "lru"} | HELD | prompt,
        "lru, held, sees all": {"policy": "lru"} | HELD | prompt | ALL,
        "lfu, held": {"policy": "lfu"} | HELD | prompt,
        "lfu, held, sees all": {"policy": "lfu"} | HELD | prompt | ALL,
        "native": {"policy": "native"},
        "h2o": {"policy": "h2o"},
        "recency": {"policy": "recency"},
    }
    if not native:
        del found["native"]
    return found


def compare(
    trace: Trace,
    budgets: Sequence[str],
    geometry: Geometry,
    checkpoint: Path | None = None,
    native: bool = False,
) -> list[Row]:
    """A row a budget and policy; budgets as a scenario spells them, such as "12.5% gpu".

    -> {"budget", "policy"} and either "why" it cannot be, with "least_bytes" where its index keys
    and the like alone take more; or "entries" a layer, "gpu_bytes", and of windows from the second
    on "mass_kept" and "entry_recall", each with its "ci95" and with "versus_lsa", the difference to
    `FIRST` at the same budget, on the same windows; "first_window" has window 0's.
    """
    for budget in budgets:
        try:
            Budget.parse(budget)
        except ValueError as error:
            raise FmsimError(f"--budget: {error}") from None
    replayer = Replayer(trace, memory=ModelMemory(geometry, spread(trace.n_layers, geometry.n_csa)))
    named = specs(checkpoint, trace, native)
    work = [(budget, label) for budget in budgets for label in named]

    def row(index: int) -> Row:
        budget, label = work[index]
        head = {"budget": budget, "policy": label}
        try:
            ledger = replayer.run(registry.build(named[label] | {"budget": budget}))
        except BudgetTooSmall as error:
            return head | {"why": str(error), "least_bytes": error.least_bytes}
        except FmsimError as error:
            return head | {"why": str(error)}
        return head | {
            "entries": ledger.budget_entries,
            "gpu_bytes": allocation(ledger, geometry).total,
            "windows": _windows(ledger),
        }

    rows = list(in_parallel(row, len(work)))
    firsts = {each["budget"]: each.get("windows") for each in rows if each["policy"] == FIRST}
    return [_with_figures(each, firsts[each["budget"]]) for each in rows]


def _windows(ledger: Ledger) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By figure its (part, whole), summed over each window's steps and over layers."""
    alike = np.ones(ledger.n_layers)
    known = shares(ledger)
    return {
        name: (
            window_sums(ledger, known[name][0], alike),
            window_sums(ledger, known[name][1], alike),
        )
        for name in FIGURES
        if name in known
    }


def _with_figures(row: Row, first: Mapping[str, tuple[np.ndarray, np.ndarray]] | None) -> Row:
    """A row with figures in the place of its sums by window."""
    if "windows" not in row:
        return row
    windows = row.pop("windows")
    row |= {"first_window": {}, "ci95": {}, "versus_lsa": {}}
    for name, (part, whole) in windows.items():
        row["first_window"][name] = float(part[0] / whole[0]) if whole[0] else None
        later = bootstrap.ratio(part[1:], whole[1:])
        row[name] = None if later is None else later.value
        if later is None:
            continue
        row["ci95"][name] = later.plain(0.0, 1.0)
        if first is None or row["policy"] == FIRST:
            continue
        strata = (len(part) - 1,)
        draws = bootstrap.ratio_draws(part[1:], whole[1:], strata)
        other, all_of_it = (each[1:] for each in first[name])
        difference = later.value - float(other.sum() / all_of_it.sum())
        found = bootstrap.estimate(
            difference, draws - bootstrap.ratio_draws(other, all_of_it, strata), strata
        )
        row["versus_lsa"][name] = {"difference": difference} | found.plain(-1.0, 1.0)
    return row
