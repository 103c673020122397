"""What a request takes in the simulated model: a policy's slots, in the geometry's bytes.

`Allocation` leads everywhere: what an engine allocates on the GPU for a request and its whole life.
`Footprint.logical_bytes` is the accounting of FlashMemory (arXiv 2606.09079), for comparison with
its tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fmsim.errors import FmsimError
from fmsim.geometry import Geometry
from fmsim.replay.ledger import Ledger
from fmsim.replay.needs import Declared, Lifetime
from fmsim.units import sized


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
    allocated: Allocation  # on the GPU, for the whole run
    host_bytes: int  # the mirror at the end; 0 where nothing can come back from the host
    scored_entries: np.ndarray  # entries that a CSA layer's lightning indexer scores
    keys_tiered: bool  # index keys leave the GPU with their entries
    layer_map: tuple[int, ...]  # model CSA layer -> trace layer
    groups: np.ndarray  # [n_csa] column of the ledger's [T, G] arrays that holds each model layer


def footprint(
    ledger: Ledger, geometry: Geometry, layer_map: Sequence[int] | None = None
) -> Footprint:
    """Bytes of `ledger`'s request in a model of `geometry`.

    Which index keys stay is what the ledger declares. Raises FmsimError for a layer map that does
    not fit.
    """
    layer_map = check_layer_map(layer_map, ledger.n_layers, geometry.n_csa)
    groups = _groups(ledger, layer_map)
    tokens = _tokens(ledger, geometry)
    entries = geometry.csa_entries(tokens)
    resident = np.minimum(
        ledger.resident.astype(np.int64) * ledger.granularity, entries[:, None]
    )  # the last page may be partly filled
    resident_pairs = resident[:, groups].sum(axis=1)
    full_bytes = np.array([geometry.full_kv_bytes(int(n)) for n in tokens])
    keyed = keyed_layers(ledger, geometry)
    moving = geometry.n_keyed - keyed  # layers whose keys come and go with their entries
    keys_tiered = moving > 0
    return Footprint(
        tokens=tokens,
        full_bytes=full_bytes,
        logical_bytes=full_bytes * (resident_pairs / np.maximum(1, entries * geometry.n_csa)),
        allocated=allocation(ledger, geometry, layer_map),
        host_bytes=geometry.host_kv_bytes(int(tokens[-1])) if ledger.comes_back else 0,
        scored_entries=resident_pairs // geometry.n_csa if keys_tiered else entries,
        keys_tiered=keys_tiered,
        layer_map=layer_map,
        groups=groups,
    )


def _groups(declared: Declared, layer_map: Sequence[int]) -> np.ndarray:
    """int64 [n_csa]: the group that each layer of the model follows."""
    return np.array(layer_map if declared.n_groups > 1 else [0] * len(layer_map), dtype=np.int64)


def _tokens(request: Lifetime, geometry: Geometry) -> np.ndarray:
    """int64 [T]: context of each step. Entries of another length stand for the model's own, so the
    context grows as they close.
    """
    rate = geometry.csa_rate
    decoded = np.arange(1.0, 1 + request.n_steps)
    if request.entry_tokens != rate:
        decoded = decoded // request.entry_tokens * rate
    return (request.prompt_entries * rate + decoded).astype(np.int64)


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


def keyed_layers(declared: Declared, geometry: Geometry) -> int:
    """CSA layers of the model that keep all their index keys on the GPU."""
    if declared.all_keys:
        return geometry.n_keyed
    return min(geometry.n_keyed, len(declared.target_layers))


@dataclass(frozen=True)
class Allocation:
    """What an engine allocates on the GPU for one request and its whole life, in bytes."""

    slots: int  # the budget's: CSA entries, and beside them the keys that come and go with them
    spare: int  # pages for misses, and for what is recalled ahead of its decision
    index_keys: int  # of the layers that keep all
    hca: int
    windows: int

    @property
    def kv_bytes(self) -> int:
        """All but the spare pages."""
        return self.slots + self.index_keys + self.hca + self.windows

    @property
    def total(self) -> int:
        return self.kv_bytes + self.spare


def allocation(
    ledger: Ledger, geometry: Geometry, layer_map: Sequence[int] | None = None
) -> Allocation:
    """The allocation for `ledger`'s request in a model of `geometry`.

    Raises FmsimError for a layer map that does not fit.
    """
    return allocated(ledger, geometry, layer_map, int(_tokens(ledger, geometry)[-1]))


def allocated(
    declared: Declared, geometry: Geometry, layer_map: Sequence[int] | None, tokens: int
) -> Allocation:
    """The allocation for a request of `tokens` in all; the layers that keep all their index keys
    are the model's first ones.

    Raises FmsimError for a layer map that does not fit.
    """
    layer_map = check_layer_map(layer_map, declared.n_layers, geometry.n_csa)
    groups = _groups(declared, layer_map)
    keyed = keyed_layers(declared, geometry)
    entry_bytes = np.full(geometry.n_csa, geometry.kv_entry_bytes)  # of a layer, in a slot
    has_key = np.array([layer.key_bytes > 0 for layer in geometry.layers if layer.pages])
    entry_bytes[has_key & (has_key.cumsum() > keyed)] += geometry.index_key_bytes
    slots = np.array(declared.group_slots)[groups]
    ahead = np.array(declared.ahead_slots or [0] * declared.n_groups)[groups]
    miss_bytes = geometry.n_csa * declared.miss_slots * geometry.kv_entry_bytes
    return Allocation(
        slots=declared.granularity * int(slots @ entry_bytes),
        spare=declared.granularity * (miss_bytes + int(ahead @ entry_bytes)),
        index_keys=keyed * geometry.csa_entries(tokens) * geometry.index_key_bytes,
        hca=geometry.dense_bytes(tokens),
        windows=geometry.window_bytes,
    )


@dataclass(frozen=True)
class ModelMemory:
    """`fmsim.replay.needs.GpuMemory` of a model of `geometry`, whose CSA layers the trace's drive
    as `layer_map` says.
    """

    geometry: Geometry
    layer_map: tuple[int, ...] | None = None

    @property
    def entry_bytes(self) -> float:
        return self.geometry.kv_entry_bytes

    @property
    def model_layers(self) -> int:
        return self.geometry.n_csa

    def full_bytes(self, request: Lifetime) -> int:
        return self.geometry.full_gpu_bytes(self._tokens(request))

    def taken_bytes(self, needs: Declared, request: Lifetime) -> int:
        return self._allocated(needs, request).total

    def shortage(self, needs: Declared, request: Lifetime, limit_bytes: int) -> str:
        """Such as "index keys alone take 0.325 GiB"."""
        taken = self._allocated(needs, request)
        parts = {
            "index keys": taken.index_keys,
            "spare pages": taken.spare,
            "HCA entries and windows": taken.hca + taken.windows,
        }
        largest = max(parts, key=lambda name: parts[name])
        if parts[largest] > limit_bytes:
            return f"{largest} alone take {sized(parts[largest])}"
        shown = ", ".join(f"{name} {sized(size)}" for name, size in parts.items() if size)
        return f"leaves no room for a page: {shown}"

    def _allocated(self, needs: Declared, request: Lifetime) -> Allocation:
        return allocated(needs, self.geometry, self.layer_map, self._tokens(request))

    def _tokens(self, request: Lifetime) -> int:
        return int(_tokens(request, self.geometry)[-1])
