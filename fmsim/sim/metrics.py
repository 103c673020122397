"""The figures of one policy's run.

Every formula stands here; the names are the fields of the JSON report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from fmsim.geometry import Geometry
from fmsim.replay.ledger import Ledger
from fmsim.sim.footprint import Footprint, footprint
from fmsim.sim.timeline import Timeline
from fmsim.sim.windows import (
    golden_shares,
    intervals,
    layer_weights,
    steady_overlap,
    steady_steps,
)

if TYPE_CHECKING:
    from fmsim.hw.spec import Hardware


def row(
    ledger: Ledger,
    timeline: Timeline,
    geometry: Geometry,
    hw: Hardware,
    layer_map: tuple[int, ...] | None = None,
) -> dict[str, Any]:
    """One policy's row:

    - `gpu_bytes`: all that an engine allocates on the GPU for one request: slots, spare pages,
      index keys, dense entries, windows (`details` has the parts);
    - `gpu_ratio`: that over what the full cache takes;
    - `kv_hbm_bytes`: the paper's accounting, for comparison with its tables: mean over steps of the
      full cache's logical bytes times the kept share of CSA entries, of one request;
    - `kv_hbm_ratio`: that mean over the full cache's;
    - `entry_recall`: golden entries resident when their step began, of all golden entries;
    - `entry_recall_per_step`: the same of each step and layer alone, then the mean: a step of few
      golden entries counts as one of many;
    - `mass_kept`: attention mass on selected entries that were attended to, of the mass on all
      selected entries;
    - `set_overlap`: mean Jaccard index of resident sets at successive windows' starts, in the
      steady state; null with fewer than two windows;
    - `decode_tokens_per_s`: batch x steps / time from the first step's start to the last one's end;
    - `step_s`: median and 99th percentile of a step's time, waiting included;
    - `h2d_bytes`: bytes from host to GPU during the decode, of the whole batch;
    - `h2d_bytes_per_step`: the same a step, in the steady state;
    - `stall_ratio`: share of the time spent waiting for misses or for a late recall, in the steady
      state;
    - `max_requests`: requests of this size that one server holds (`fmsim.sim.serving.capacity`);
    - `hit_rate`: selected entries resident when their step began, of all selected entries;
    - `misses`: the others, over all steps and CSA layers of the model, of one request;
    - `ci95`: of each figure that is an estimate half of its 95% interval's width, the interval's
      ends, and the windows that it comes from (`fmsim.bootstrap`).

    The steady state are the whole windows from the third on (`fmsim.sim.windows`): the first two
    share one state, so nothing is recalled between them.

    Sums over layers weigh each trace layer by the model layers that it drives.
    """
    place = footprint(ledger, geometry, layer_map)
    full_bytes = geometry.full_gpu_bytes(int(place.tokens[-1]))
    return {
        "policy": ledger.policy,
        "gpu_bytes": place.allocated.total,
        "gpu_ratio": place.allocated.total / full_bytes,
        "kv_hbm_bytes": round(float(place.logical_bytes.mean())),
        "kv_hbm_ratio": float(place.logical_bytes.mean() / place.full_bytes.mean()),
        **kept(ledger, place.layer_map),
        **timed(timeline, steady_steps(ledger.n_steps, ledger.tau)),
        "max_requests": capacity(place, geometry, hw)[0],
        **hits(ledger, place.layer_map),
        "ci95": intervals(ledger, place.layer_map),
    }


def kept(ledger: Ledger, layer_map: Sequence[int]) -> dict[str, float | None]:
    """A row's `entry_recall`, `entry_recall_per_step`, `mass_kept` and `set_overlap`; all but the
    last over the layers that were measured, and None where none was, or where the trace has no
    masses.
    """
    weights = layer_weights(ledger, layer_map)
    known = ledger.masses and bool(weights.any())
    overlap = steady_overlap(ledger)
    return {
        "entry_recall": (_ratio(ledger.golden_hit, ledger.golden, weights) if known else None),
        "entry_recall_per_step": _ratio(*golden_shares(ledger), weights) if known else None,
        "mass_kept": (_ratio(ledger.mass_kept, ledger.mass_total, weights) if known else None),
        "set_overlap": float(overlap.mean()) if len(overlap) else None,
    }


def hits(ledger: Ledger, layer_map: Sequence[int]) -> dict[str, Any]:
    """A row's `hit_rate` and `misses`, over the layers that were measured; None where none was."""
    weights = layer_weights(ledger, layer_map)
    missed = (ledger.accessed - ledger.hit).sum(axis=0, dtype=np.int64)
    return {
        "hit_rate": _ratio(ledger.hit, ledger.accessed, weights) if weights.any() else None,
        "misses": int(missed @ weights) if weights.any() else None,
    }


def mass_by_layer(ledger: Ledger) -> list[float | None]:
    """Attention mass kept in each layer of the trace; None where it is not known."""
    if not ledger.masses:
        return [None] * ledger.n_layers
    return [
        None if layer in ledger.unmeasured else _ratio(ledger.mass_kept, ledger.mass_total, alone)
        for layer, alone in enumerate(np.eye(ledger.n_layers))
    ]


def timed(timeline: Timeline, steady: slice | None = None) -> dict[str, Any]:
    """A row's `decode_tokens_per_s`, `step_s`, `h2d_bytes`, `h2d_bytes_per_step` and `stall_ratio`,
    which is None where stalls within a step are not known.

    The last two are over the `steady` steps, all of them unless given: an engine's timeline begins
    after its warm-up.
    """
    steady = steady or slice(0, len(timeline.step_s))
    steady_s = float(timeline.end_s[steady][-1] - timeline.start_s[steady][0])
    step_s = timeline.step_s
    total_s = float(timeline.end_s[-1] - timeline.start_s[0])
    return {
        "decode_tokens_per_s": timeline.batch * len(step_s) / total_s,
        "step_s": {
            "p50": float(np.percentile(step_s, 50)),
            "p99": float(np.percentile(step_s, 99)),
        },
        "h2d_bytes": round(float(timeline.h2d_bytes.sum())),
        "h2d_bytes_per_step": float(timeline.h2d_bytes[steady].mean()),
        "stall_ratio": (
            None
            if np.isnan(timeline.stall_s).any()
            else float((timeline.stall_s + timeline.recall_wait_s)[steady].sum()) / steady_s
        ),
    }


def exact(ledger: Ledger) -> bool | None:
    """Everything that was selected was attended to; None where that holds in the layers that were
    measured, and others were not.
    """
    if ledger.masses:
        lossless = bool(np.all(ledger.mass_kept >= ledger.mass_total * (1 - 1e-6)))
    else:
        lossless = ledger.on_miss == "fetch" or bool(np.all(ledger.hit == ledger.accessed))
    return None if lossless and ledger.unmeasured else lossless


def details(
    ledger: Ledger, geometry: Geometry, hw: Hardware, layer_map: tuple[int, ...] | None = None
) -> dict[str, Any]:
    """What the row leaves out: is it exact, what lies where, and which memory bounds the number of
    requests.
    """
    place = footprint(ledger, geometry, layer_map)
    return {
        "exact": exact(ledger),
        "mass_by_layer": mass_by_layer(ledger),
        "params": ledger.params,
        "allocated": asdict(place.allocated),
        "host_kv_bytes": place.host_bytes,
        "max_requests_bound": capacity(place, geometry, hw)[1],
    }


def capacity(place: Footprint, geometry: Geometry, hw: Hardware) -> tuple[int, str]:
    """(requests, which memory binds): how often what a request is allocated goes into each rank's
    KV pool, and its mirror into the rank's part of host memory, on one server.
    """
    placed = hw.placed
    fits = {"GPU memory": int(hw.kv_pool_bytes(geometry) * placed.cp // place.allocated.total)}
    if place.host_bytes:
        fits["host memory"] = int(hw.host_bytes_per_gpu * placed.cp // place.host_bytes)
    bound = min(fits, key=lambda kind: fits[kind])
    return placed.dp * fits[bound], bound


def _ratio(part: np.ndarray, whole: np.ndarray, layer_weights: np.ndarray) -> float:
    """Sum of [T, L] `part` over that of `whole`, layers weighted; 1 where there was nothing to
    lose.
    """
    total = float(whole.sum(axis=0, dtype=np.float64) @ layer_weights)
    return float(part.sum(axis=0, dtype=np.float64) @ layer_weights) / total if total else 1.0
