"""What a replayed request occupies in the simulated model: a ledger's slots, in the geometry's
bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fmsim.errors import FmsimError
from fmsim.geometry import Geometry
from fmsim.replay.ledger import Ledger


def spread(trace_layers: int, model_layers: int) -> tuple[int, ...]:
    """The default layer map: the model's CSA layer j behaves like the trace's layer j *
    trace_layers // model_layers.
    """
    return tuple(j * trace_layers // model_layers for j in range(model_layers))


@dataclass(frozen=True)
class Footprint:
    """Per decode step [T], of one request. Pairs are (CSA layer of the model, entry)."""

    tokens: np.ndarray  # int64: context, this step's token included
    full_bytes: np.ndarray  # logical, the whole cache
    logical_bytes: (
        np.ndarray
    )  # logical, times the kept share of the CSA entries: the paper's accounting
    gpu_bytes: np.ndarray  # on the GPU under tiering
    host_bytes: int  # the mirror at the end; 0 when nothing ever comes back from the host
    scored_entries: np.ndarray  # entries that a CSA layer's lightning indexer scores
    keys_tiered: bool  # index keys leave the GPU with their entries
    layer_map: tuple[int, ...]  # model CSA layer -> trace layer
    groups: np.ndarray  # [n_csa] column of the ledger's [T, G] arrays that holds each model layer


def footprint(
    ledger: Ledger, geometry: Geometry, layer_map: Sequence[int] | None = None
) -> Footprint:
    """Bytes of `ledger`'s request in a model of `geometry`.

    Index keys: a policy that fetches what was selected needs the selection over all entries, so all
    keys stay on the GPU. With on_miss "mask" a layer scores what is resident, and keys move with
    their entries, but for the layers whose keys a memory indexer scores (arXiv 2606.09079). Raises
    FmsimError for a layer map that does not fit.
    """
    layer_map = check_layer_map(layer_map, ledger.n_layers, geometry.n_csa)
    groups = (
        np.array(layer_map) if ledger.n_groups > 1 else np.zeros(geometry.n_csa, dtype=np.int64)
    )
    tokens = (
        ledger.prompt_entries * geometry.csa_rate + 1 + np.arange(ledger.n_steps, dtype=np.int64)
    )
    entries = tokens // geometry.csa_rate
    resident = np.minimum(
        ledger.resident.astype(np.int64) * ledger.granularity, entries[:, None]
    )  # the last page may be partly filled
    resident_pairs = resident[:, groups].sum(axis=1)
    full_bytes = np.array([geometry.full_kv_bytes(int(n)) for n in tokens])
    keys_tiered = ledger.on_miss == "mask" and bool((resident < entries[:, None]).any())
    keyed_pairs = entries * geometry.n_csa
    if keys_tiered:
        target_layers = min(geometry.n_csa, indexer_layers(ledger))
        keyed_pairs = (
            entries * target_layers
            + resident_pairs * (geometry.n_csa - target_layers) // geometry.n_csa
        )
    gpu_bytes = [
        geometry.gpu_kv_bytes(*map(int, step)) for step in zip(tokens, resident_pairs, keyed_pairs)
    ]
    comes_back = bool(ledger.demand_loads.any() or ledger.lookahead_loads.any())
    return Footprint(
        tokens=tokens,
        full_bytes=full_bytes,
        logical_bytes=full_bytes * (resident_pairs / (entries * geometry.n_csa)),
        gpu_bytes=np.array(gpu_bytes),
        host_bytes=geometry.host_kv_bytes(int(tokens[-1])) if comes_back else 0,
        scored_entries=resident_pairs // geometry.n_csa if keys_tiered else entries,
        keys_tiered=keys_tiered,
        layer_map=layer_map,
        groups=groups,
    )


def check_layer_map(
    layer_map: Sequence[int] | None, trace_layers: int, model_layers: int
) -> tuple[int, ...]:
    """`layer_map`, or the default; raises FmsimError when it does not name a trace layer for each
    CSA layer of the model.
    """
    if layer_map is None:
        return spread(trace_layers, model_layers)
    if len(layer_map) != model_layers or not set(layer_map) <= set(range(trace_layers)):
        raise FmsimError(
            f"layer_map: give {model_layers} numbers, one for each CSA layer of the model, each a"
            f" CSA layer of the trace (0 to {trace_layers - 1}); it has {len(layer_map)}:"
            f" {list(layer_map)}"
        )
    return tuple(layer_map)


def indexer_layers(ledger: Ledger) -> int:
    """Layers whose index keys a memory indexer scored, from the entries it scored at the first
    decision that it made.
    """
    decisions = np.flatnonzero(ledger.scored)
    if not len(decisions):
        return 0
    # A stale state sees fewer entries than the step has, by less than one window; so round up.
    return int(-(-ledger.scored[decisions[0]] // max(1, ledger.prompt_entries + decisions[0])))
