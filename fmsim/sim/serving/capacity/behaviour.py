"""What policies do where no trace was replayed: a few published or measured shares, as ledgers.

A plan without a scenario stands on these. They are of one model each; a trace of one's own says
more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fmsim.geometry import Geometry
from fmsim.replay.ledger import Ledger
from fmsim.replay.needs import spare_ahead

_PROMPT_TOKENS = 2**17
_CADENCE = 64
_STEPS = 3 * _CADENCE

# Misses of a step with the newest 2 x top-k entries on the GPU, as a share of top-k, V4-Flash's 21
# CSA layers: a comment on github.com/sgl-project/sglang issue 33271.
LRU_MISS_SHARE = 0.082
# LSA at a tenth of the entries, on nano's needles at 512,000 tokens (`fmsim run 500k -p
# lsa:budget=10%`; a test holds it to this): mass kept, and successive sets' Jaccard index.
LSA_MASS_KEPT = 0.72
LSA_OVERLAP = 0.47
LSA_SHARE = 0.10
LSA_LAYERS = 2  # whose keys its memory indexer scores


@dataclass(frozen=True)
class Behaviour:
    """A policy, and what it is taken to do."""

    policy: str
    exact: bool
    mass_kept: float
    source: str
    ledger: Callable[[Geometry], Ledger]


def _full(geometry: Geometry) -> Ledger:
    entries = geometry.csa_entries(_PROMPT_TOKENS)
    return _ledger(geometry, "full", {"budget": "all"}, entries + _STEPS, on_miss="fetch")


def _lru(geometry: Geometry) -> Ledger:
    # each selection that reads a layer's entries is taken to keep and to miss entries of its own
    topk = round(geometry.index_topk * geometry.selections_of_a_store)
    missed = np.full((_STEPS, 1), round(LRU_MISS_SHARE * topk), np.int32)
    return _ledger(
        geometry,
        "lru",
        {"budget": "2x topk"},
        2 * topk,
        on_miss="fetch",
        demand_loads=missed,
        miss_slots=topk,
        comes_back=True,
    )


def _lsa(geometry: Geometry) -> Ledger:
    entries = geometry.csa_entries(_PROMPT_TOKENS)
    slots = round(LSA_SHARE * entries)
    new = round(slots * (1 - LSA_OVERLAP) / (1 + LSA_OVERLAP))
    decisions = np.arange(_STEPS) % _CADENCE == 0
    recalled = np.where(decisions & (np.arange(_STEPS) > _CADENCE), new, 0)
    layers = min(LSA_LAYERS, geometry.n_csa)
    return _ledger(
        geometry,
        "lsa",
        {"budget": f"{LSA_SHARE:.0%}"},
        slots,
        on_miss="mask",
        cadence=_CADENCE,
        lookahead_loads=recalled[:, None].astype(np.int32),
        scored=np.where(decisions, layers * entries, 0),
        decides_ahead=True,
        ahead_slots=list(spare_ahead([slots])),
        comes_back=True,
        target_layers=list(range(layers)),
        all_keys=False,
    )


def _ledger(
    geometry: Geometry, policy: str, params: dict[str, str], slots: int, **changes: object
) -> Ledger:
    """One group of layers that all do the same."""
    entries = geometry.csa_entries(_PROMPT_TOKENS)
    none = np.zeros((_STEPS, 1), np.int32)
    fields = {
        "policy": policy,
        "params": params,
        "granularity": 1,
        "scope": "shared",
        "cadence": 1,
        "tau": _CADENCE,
        "n_steps": _STEPS,
        "n_layers": 1,
        "n_groups": 1,
        "n_slots": slots,
        "group_slots": [slots],
        "entry_tokens": geometry.csa_rate,
        "prompt_entries": entries,
        "topk": geometry.index_topk,
        "accessed": none + geometry.index_topk,
        "hit": none,
        "golden": none,
        "golden_hit": none,
        "mass_total": none.astype(np.float32),
        "mass_kept": none.astype(np.float32),
        "heaviest_lost": none.astype(np.float32),
        "resident": none + slots,
        "initial": np.full(1, slots, np.int32),
        "demand_loads": none,
        "lookahead_loads": none,
        "written": none,
        "evicted": none,
        "set_overlap": np.zeros(0, np.float32),
        "scored": np.zeros(_STEPS, np.int64),
    }
    # the fields stand above by name; a mapping of them has no types
    return Ledger(**(fields | changes))  # type: ignore[arg-type]


BEHAVIOURS = (
    Behaviour("full", True, 1.0, "everything stays on the GPU", _full),
    Behaviour(
        "lru 2x topk",
        True,
        1.0,
        f"misses {LRU_MISS_SHARE:.1%} of top-k, V4-Flash, sgl-project/sglang issue 33271",
        _lru,
    ),
    Behaviour(
        "lsa 10%",
        False,
        LSA_MASS_KEPT,
        "mass and turnover of nano's needles at 512,000 tokens, fmsim run scenarios/500k.yaml",
        _lsa,
    ),
)
