"""The time of one decode step without stalls: measured module times, added up.

A model, not a measurement.

One step = for each layer: hyper-connections, attention module (CSA or HCA; a sliding layer is taken
as an HCA layer of an empty context), two all-reduces, router and routed experts (the shared expert
runs beside them); then the output head.

What grows with the context is measured for one request at a time. Further requests of a batch find
the GPU's launches and its idle processors paid for already, so each of their entries adds what a
calibration measured in a batch, or, where none did, its operations or its bytes at the device's
rates, whichever takes longer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fmsim.geometry import PRESETS, SLIDING, Geometry
from fmsim.geometry.memory_indexer import PUBLISHED_HEADS, PUBLISHED_WIDTH
from fmsim.hw.spec import Hardware, KernelTable

_FP8_SPEEDUP = 2.0  # of matrix products over bf16, on every device here

Counts = NDArray[np.int64] | NDArray[np.float64]  # of tokens, entries: whole, or means


@dataclass(frozen=True)
class StepCosts:
    """Times of one decode step on one GPU for a batch of requests, in seconds, one value a step."""

    csa_s: NDArray[np.float64]  # [T] one CSA layer's attention
    rest_s: NDArray[np.float64]  # [T] everything else of the step, all layers

    def total_s(self, n_csa: int) -> NDArray[np.float64]:
        return n_csa * self.csa_s + self.rest_s


def step_costs(
    hw: Hardware, geometry: Geometry, batch: int, tokens: Counts, scored_entries: Counts
) -> StepCosts:
    """`batch` equal requests.

    `tokens` [T]: context of each step; `scored_entries` [T]: entries that the lightning indexer
    scores in a CSA layer.
    """
    return mixed_step_costs(
        hw,
        geometry,
        batch,
        Spread(batch * tokens, tokens),
        Spread(batch * scored_entries, scored_entries),
    )


@dataclass(frozen=True)
class Spread:
    """A quantity over the requests of a batch: what all have together, and what the largest has.

    Arrays [T].
    """

    total: Counts
    largest: Counts


def mixed_step_costs(
    hw: Hardware, geometry: Geometry, batch: int, tokens: Spread, scored_entries: Spread
) -> StepCosts:
    """`batch` requests of any sizes, with their contexts and the entries that each scores in a CSA
    layer.
    """
    table, factor = _table(hw, geometry)
    csa_s = _by_batch(table.csa_batch_ms, batch) * factor / 1e3 + _scoring_s(
        hw, geometry, table, factor, scored_entries
    )
    hca_s = _by_batch(table.hca_batch_ms, batch) * factor / 1e3 + _hca_s(
        hw, geometry, table, factor, tokens
    )
    sliding_ms = _by_batch(table.hca_batch_ms, batch)
    n_sliding = geometry.layer_types.count(SLIDING)
    every_layer_ms = _by_batch(table.hyper_connections_batch_ms, batch) + _by_batch(
        table.moe_batch_ms, batch
    )
    every_layer_ms += _by_batch(table.router_batch_ms, batch) + 2 * _by_batch(
        table.all_reduce_batch_ms, batch
    )
    rest_ms = (
        n_sliding * sliding_ms
        + geometry.n_layers * every_layer_ms
        + _by_batch(table.head_batch_ms, batch)
    )
    return StepCosts(csa_s=csa_s, rest_s=geometry.n_hca * hca_s + rest_ms * factor / 1e3)


def _scoring_s(
    hw: Hardware, geometry: Geometry, table: KernelTable, factor: float, entries: Spread
) -> NDArray[np.float64]:
    """What the history adds to one CSA layer: index scores of all entries, and top-k, in which a
    request has one processor.
    """
    one_entry_s = _entry_s(
        table.csa_entry_ns,
        geometry.index_key_bytes / hw.hbm_bytes_per_s.value,
        geometry.index_n_heads
        * (2 * geometry.index_head_dim + 2)
        / (_FP8_SPEEDUP * hw.matmul_flops.value),
    )
    largest_tokens = entries.largest * geometry.csa_rate
    if hw.topk_context_ms:
        return _by_context(hw.topk_context_ms, largest_tokens) / 1e3 + entries.total * one_entry_s
    return (
        _grown(table.csa_context_ms, largest_tokens) * factor / 1e3
        + (entries.total - entries.largest) * one_entry_s
    )


def _hca_s(
    hw: Hardware, geometry: Geometry, table: KernelTable, factor: float, tokens: Spread
) -> NDArray[np.float64]:
    """What the history adds to one HCA layer.

    The attention kernel works on all query heads on every GPU, padded where it has few.
    """
    one_entry_s = _entry_s(
        table.hca_entry_ns,
        geometry.kv_entry_bytes / hw.hbm_bytes_per_s.value,
        4 * geometry.n_heads * geometry.head_dim / hw.matmul_flops.value,
    )
    others = (tokens.total - tokens.largest) / geometry.hca_rate
    return _grown(table.hca_context_ms, tokens.largest) * factor / 1e3 + others * one_entry_s


def _entry_s(measured_ns: float | None, bytes_s: float, operations_s: float) -> float:
    return max(bytes_s, operations_s) if measured_ns is None else measured_ns / 1e9


def memory_indexer_s(hw: Hardware, geometry: Geometry, scored: np.ndarray) -> NDArray[np.float64]:
    """Time to score `scored` entries (all its layers together): the larger of its operations and
    its reads of index keys.
    """
    flops = scored * PUBLISHED_HEADS * 2.0 * PUBLISHED_WIDTH
    seconds: NDArray[np.float64] = np.maximum(
        flops / hw.matmul_flops.value, scored * geometry.index_key_bytes / hw.hbm_bytes_per_s.value
    )
    return seconds


def _table(hw: Hardware, geometry: Geometry) -> tuple[KernelTable, float]:
    """The model's own table, or v4-flash's scaled up by the weights that a layer reads (never down:
    launches stay).
    """
    factor = hw.kernel_factor.value
    if geometry.name in hw.kernels:
        return hw.kernels[geometry.name], factor
    flash = PRESETS["v4-flash"]
    per_layer = geometry.active_parameters / geometry.n_layers
    return hw.kernels["v4-flash"], factor * max(
        1.0, per_layer / (flash.active_parameters / flash.n_layers)
    )


def _by_context(points: dict[int, float], tokens: Counts) -> NDArray[np.float64]:
    contexts = sorted(points)
    return np.interp(tokens, contexts, [points[context] for context in contexts])


def _grown(points: dict[int, float], tokens: Counts) -> NDArray[np.float64]:
    """How much more than at the smallest context measured."""
    return _by_context(points, tokens) - points[min(points)]


def _by_batch(points: dict[int, float], batch: int) -> float:
    """Between measured batches linear; beyond the last, its slope goes on."""
    batches = sorted(points)
    times = [points[size] for size in batches]
    if batch <= batches[-1]:
        return float(np.interp(batch, batches, times))
    slope = max(0.0, (times[-1] - times[-2]) / (batches[-1] - batches[-2]))
    return times[-1] + slope * (batch - batches[-1])
