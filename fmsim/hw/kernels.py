"""The time of one decode step without stalls: measured module times, added up. A model, not a measurement.

One step = for each layer: hyper-connections, attention module (CSA or HCA; a sliding layer is taken as an HCA layer of an empty
context), two all-reduces, router and routed experts (the shared expert runs beside them); then the output head.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fmsim.geometry import PRESETS, SLIDING, Geometry
from fmsim.hw.spec import Hardware, KernelTable

_INDEXER_HEADS, _INDEXER_WIDTH = 128, 128  # of the memory indexer's scorer (arXiv 2606.09079)


@dataclass(frozen=True)
class StepCosts:
    """Times of one decode step on one GPU for a batch of equal requests, in seconds, one value a step."""

    csa_s: np.ndarray  # [T] one CSA layer's attention
    rest_s: np.ndarray  # [T] everything else of the step, all layers

    def total_s(self, n_csa: int) -> np.ndarray:
        return n_csa * self.csa_s + self.rest_s


def step_costs(hw: Hardware, geometry: Geometry, batch: int, tokens: np.ndarray, scored_entries: np.ndarray) -> StepCosts:
    """`tokens` [T]: context of each step; `scored_entries` [T]: entries that the lightning indexer scores in a CSA layer."""
    table, factor = _table(hw, geometry)
    scored_tokens = scored_entries * geometry.csa_rate
    csa_ms = _attention_ms(table.csa_context_ms, table.csa_batch_ms, table.csa_request_ms_per_mtoken, batch, scored_tokens)
    hca_ms = _attention_ms(table.hca_context_ms, table.hca_batch_ms, table.hca_request_ms_per_mtoken, batch, tokens)
    sliding_ms = _by_batch(table.hca_batch_ms, batch)
    n_sliding = geometry.layer_types.count(SLIDING)
    every_layer_ms = _by_batch(table.hyper_connections_batch_ms, batch) + _by_batch(table.moe_batch_ms, batch)
    every_layer_ms += _by_batch(table.router_batch_ms, batch) + 2 * _by_batch(table.all_reduce_batch_ms, batch)
    rest_ms = geometry.n_hca * hca_ms + n_sliding * sliding_ms + geometry.n_layers * every_layer_ms
    rest_ms = rest_ms + _by_batch(table.head_batch_ms, batch)
    return StepCosts(csa_s=csa_ms * factor / 1e3, rest_s=rest_ms * factor / 1e3)


def memory_indexer_s(hw: Hardware, geometry: Geometry, scored: np.ndarray) -> np.ndarray:
    """Time to score `scored` entries (all its layers together): the larger of its operations and its reads of index keys."""
    flops = scored * _INDEXER_HEADS * 2.0 * _INDEXER_WIDTH
    return np.maximum(flops / hw.matmul_flops.value, scored * geometry.index_key_bytes / hw.hbm_bytes_per_s.value)


def _table(hw: Hardware, geometry: Geometry) -> tuple[KernelTable, float]:
    """The model's own table, or v4-flash's scaled up by the weights that a layer reads (never down: launches stay)."""
    factor = hw.kernel_factor.value
    if geometry.name in hw.kernels:
        return hw.kernels[geometry.name], factor
    flash = PRESETS["v4-flash"]
    per_layer = geometry.active_parameters / geometry.n_layers
    return hw.kernels["v4-flash"], factor * max(1.0, per_layer / (flash.active_parameters / flash.n_layers))


def _attention_ms(
    by_context: dict[int, float], by_batch: dict[int, float], ms_per_mtoken: float, batch: int, tokens: np.ndarray
) -> np.ndarray:
    """Batch 1 by context, plus what the batch adds at a short context, plus each further request's share by context."""
    contexts = sorted(by_context)
    alone = np.interp(tokens, contexts, [by_context[context] for context in contexts])
    return alone + _by_batch(by_batch, batch) - by_batch[1] + (batch - 1) * ms_per_mtoken * tokens / 1e6


def _by_batch(points: dict[int, float], batch: int) -> float:
    """Between measured batches linear; beyond the last, its slope goes on."""
    batches = sorted(points)
    times = [points[size] for size in batches]
    if batch <= batches[-1]:
        return float(np.interp(batch, batches, times))
    slope = max(0.0, (times[-1] - times[-2]) / (batches[-1] - batches[-2]))
    return times[-1] + slope * (batch - batches[-1])
