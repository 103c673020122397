"""How a run's policies would do with other budgets and other page sizes, and how far each is from
its bound.

Needs the trace.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fmsim.errors import FmsimError
from fmsim.experiments.workers.parallel import in_parallel
from fmsim.experiments.workers.progress import Tally
from fmsim.policies import registry
from fmsim.replay.ledger import Ledger
from fmsim.replay.replayer import Replayer
from fmsim.replay.stack_distance import Course, distances, least_slots
from fmsim.sim.footprint import check_layer_map
from fmsim.trace import Trace

GRANULARITIES = (1, 4, 16, 64)
SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5)  # of the prompt's entries: budgets
# of a long prompt, whose replays take long; a run's own budgets are points too
LONG_ENTRIES = 20_000
FEW_SHARES = (0.02, 0.4)
FEW_GRANULARITIES = (1, 16)
LRU_POINTS = 120  # of the curve that one pass gives at every budget


@dataclass(frozen=True)
class _Replay:
    """One replay that the curves need: which curve, where on it, and a policy as `registry.build`
    takes it.
    """

    place: tuple[str, ...]
    x: float
    spec: dict[str, Any]


def compute(
    trace: Trace,
    ledgers: Mapping[str, Ledger],
    layer_map: Sequence[int],
    progress: Callable[[float, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Curves for the policies that `ledgers` (by label) came from, as plain JSON values.

    A policy that ran with several budgets has one curve, under its first label.

    - `misses`: share of selected entries not resident when their step began, over the budget in
      entries a layer: LRU at every budget, and belady, the bound of whatever loads on demand, at
      some; for each granularity;
    - `lost_mass`: share of the attention mass that a policy which masks its misses loses, over the
      budget;
    - `granularity`: the same two for each policy at its own budget, over the entries in a page;
    - `regret`: by trace layer, the run's misses (or lost mass) and its bound's at the same budget
      and granularity: belady's, or the oracle's with one decision a window.

    Layers weigh by the model layers that they drive. A point that cannot be (pinned pages exceed
    the budget) is left out.
    """
    replayer = Replayer(trace)
    if not trace.has_mass:  # what a policy that masks loses cannot be known
        ledgers = {label: one for label, one in ledgers.items() if not _is_lossy(one)}
    weights = np.bincount(
        check_layer_map(layer_map, trace.n_layers, len(layer_map)), minlength=trace.n_layers
    ).astype(float)
    long = replayer.prompt_entries > LONG_ENTRIES
    granularities = FEW_GRANULARITIES if long else GRANULARITIES
    shares = FEW_SHARES if long else SHARES
    first = _first_of_each(ledgers)
    wanted = [
        *_bound_replays(replayer, granularities, shares),
        *_budget_replays(replayer, ledgers, first, shares),
        *_granularity_replays(first, granularities),
        *_regret_replays(ledgers),
    ]
    for granularity, shared in {
        (replay.spec["granularity"], replay.spec.get("scope") == "shared") for replay in wanted
    }:
        replayer.paged(granularity, shared)  # once, before the processes part
    found: dict[tuple[str, ...], list[tuple[float, Ledger]]] = {}
    own = [
        (_key(_spec(each, each.budget_entries, each.granularity)), each)
        for each in ledgers.values()
    ]
    known: dict[str, Ledger | None] = dict(own)  # what ran already, or runs once for several
    todo = {_key(replay.spec): replay.spec for replay in wanted if _key(replay.spec) not in known}
    specs = list(todo.values())
    tally = Tally(["curves"] * len(specs), len(specs), lambda _, done, n: progress(done, n))
    progress(0, len(specs))
    replays = in_parallel(lambda i: _try(replayer, specs[i]), len(specs), told=tally)
    known |= dict(zip(todo, replays))
    for replay in wanted:
        ledger = known[_key(replay.spec)]
        if ledger is not None:
            found.setdefault(replay.place, []).append((replay.x, ledger))
    return {
        "trace_sha256": trace.header.content_sha256,
        "prompt_entries": replayer.prompt_entries,
        "topk": replayer.topk,
        "misses": {
            "lru": {
                str(granularity): _lru_curve(replayer, granularity, weights)
                for granularity in granularities
            },
            "belady": {
                str(g): _curve(found.get(("misses", str(g)), []), missed_share, weights)
                for g in granularities
            },
        },
        "lost_mass": {
            label: _curve(found.get(("lost_mass", label), []), lost_share, weights)
            for label in _lossy(first)
        },
        "granularity": {
            label: _curve(
                found.get(("granularity", label), []),
                lost_share if _is_lossy(ledger) else missed_share,
                weights,
            )
            for label, ledger in _tiered(first).items()
        },
        "regret": {
            label: _regret(ledgers[label], points[0][1])
            for (curve, label), points in found.items()
            if curve == "regret"
        },
    }


def missed_share(ledger: Ledger, weights: np.ndarray) -> float:
    """Selected entries not resident when their step began, of all selected; layers weighted."""
    return _share((ledger.accessed - ledger.hit), ledger.accessed, weights)


def lost_share(ledger: Ledger, weights: np.ndarray) -> float:
    """Attention mass on entries that were not attended to, of the mass on all selected; layers
    weighted.
    """
    return _share(np.maximum(ledger.mass_total - ledger.mass_kept, 0), ledger.mass_total, weights)


def _share(part: np.ndarray, whole: np.ndarray, weights: np.ndarray) -> float:
    total = float(whole.sum(axis=0, dtype=np.float64) @ weights)
    return float(part.sum(axis=0, dtype=np.float64) @ weights) / total if total else 0.0


def _try(replayer: Replayer, spec: dict[str, Any]) -> Ledger | None:
    try:
        return replayer.run(registry.build(spec))
    except FmsimError:
        return None


def _is_lossy(ledger: Ledger) -> bool:
    return ledger.on_miss != "fetch"


def _tiered(ledgers: Mapping[str, Ledger]) -> dict[str, Ledger]:
    """Those that keep less than everything."""
    return {label: ledger for label, ledger in ledgers.items() if ledger.policy != "full"}


def _lossy(ledgers: Mapping[str, Ledger]) -> dict[str, Ledger]:
    return {label: ledger for label, ledger in _tiered(ledgers).items() if _is_lossy(ledger)}


def _spec(ledger: Ledger, entries: int, granularity: int) -> dict[str, Any]:
    """The ledger's policy with another budget (in entries a layer) and granularity."""
    # kmax is a budget too
    own = {key: value for key, value in ledger.params.items() if key != "kmax"}
    return own | {
        "policy": ledger.policy,
        "budget": f"{entries} entries",
        "granularity": granularity,
    }


def _key(spec: dict[str, Any]) -> str:
    """One text for equal specs."""
    return json.dumps(spec, sort_keys=True, default=str)


def _first_of_each(ledgers: Mapping[str, Ledger]) -> dict[str, Ledger]:
    """Of those that differ in the budget alone the first."""
    found: dict[str, tuple[str, Ledger]] = {}
    for label, ledger in ledgers.items():
        found.setdefault(_key(_spec(ledger, 0, ledger.granularity)), (label, ledger))
    return dict(found.values())


def _bound_replays(
    replayer: Replayer, granularities: Sequence[int], shares: Sequence[float]
) -> list[_Replay]:
    replays = []
    for granularity in granularities:
        least = (
            least_slots(replayer.paged(granularity, False), _course(replayer, granularity))
            * granularity
        )
        budgets = sorted({least, *(round(share * replayer.prompt_entries) for share in shares)})
        for entries in [entries for entries in budgets if entries >= least]:
            spec = {"policy": "belady", "budget": f"{entries} entries", "granularity": granularity}
            replays.append(_Replay(("misses", str(granularity)), entries, spec))
    return replays


def _budget_replays(
    replayer: Replayer,
    ledgers: Mapping[str, Ledger],
    first: Mapping[str, Ledger],
    shares: Sequence[float],
) -> list[_Replay]:
    """At `shares` of the prompt, and at the budgets that the run had."""
    replays = []
    for label, ledger in _lossy(first).items():
        same = _key(_spec(ledger, 0, ledger.granularity))
        budgets = {max(1, round(share * replayer.prompt_entries)) for share in shares}
        budgets |= {
            other.budget_entries
            for other in ledgers.values()
            if _key(_spec(other, 0, other.granularity)) == same
        }
        replays += [
            _Replay(("lost_mass", label), entries, _spec(ledger, entries, ledger.granularity))
            for entries in sorted(budgets)
        ]
    return replays


def _granularity_replays(
    ledgers: Mapping[str, Ledger], granularities: Sequence[int]
) -> list[_Replay]:
    return [
        _Replay(
            ("granularity", label),
            granularity,
            _spec(ledger, ledger.budget_entries, granularity),
        )
        for label, ledger in _tiered(ledgers).items()
        for granularity in granularities
    ]


def _regret_replays(ledgers: Mapping[str, Ledger]) -> list[_Replay]:
    replays = []
    for label, ledger in _tiered(ledgers).items():
        spec = {
            "policy": "oracle" if _is_lossy(ledger) else "belady",
            "budget": f"{ledger.budget_entries} entries",
            "granularity": ledger.granularity,
            "scope": ledger.scope,
        }
        replays.append(
            _Replay(
                ("regret", label), 0, spec | ({"cadence": ledger.tau} if _is_lossy(ledger) else {})
            )
        )
    return replays


def _regret(ledger: Ledger, bound: Ledger) -> dict[str, Any]:
    kind, share = ("lost_mass", lost_share) if _is_lossy(ledger) else ("misses", missed_share)
    by_layer = lambda source: [share(source, one) for one in np.eye(source.n_layers)]
    return {
        "kind": kind,
        "bound_policy": bound.policy,
        "own": by_layer(ledger),
        "bound": by_layer(bound),
    }


def _curve(
    points: list[tuple[float, Ledger]],
    share: Callable[[Ledger, np.ndarray], float],
    weights: np.ndarray,
) -> dict[str, list[float]]:
    return {"x": [x for x, _ in points], "y": [share(ledger, weights) for _, ledger in points]}


def _course(replayer: Replayer, granularity: int) -> Course:
    return Course(granularity, replayer.prompt_entries, replayer.entries)


def _lru_curve(replayer: Replayer, granularity: int, weights: np.ndarray) -> dict[str, list[float]]:
    """Missed share at LRU_POINTS budgets, evenly spaced on a logarithmic axis, from one pass."""
    paged, course = replayer.paged(granularity, False), _course(replayer, granularity)
    found = distances(paged, course)
    counted = np.where(found >= 0, paged.count, 0) * weights[:, None]
    at = np.bincount(
        np.maximum(found, 0).ravel(), weights=counted.ravel(), minlength=paged.n_pages + 1
    )
    # [slots]: entries found at that position or deeper
    missed = at.sum() - np.concatenate(([0.0], np.cumsum(at)))
    least = least_slots(paged, course)
    if least > paged.n_pages:
        return {"x": [], "y": []}
    slots = np.unique(np.geomspace(least, paged.n_pages, LRU_POINTS).round().astype(int))
    return {"x": (slots * granularity).tolist(), "y": (missed[slots] / at.sum()).tolist()}
