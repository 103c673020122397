"""The figures of one policy's serving run.

Every formula stands here; the names are the fields of the JSON report.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fmsim.sim.serving.admission import GPU, HOST, LINK
from fmsim.sim.serving.batch import ServedRequest
from fmsim.sim.serving.server import ServerRun
from fmsim.sim.serving.spec import Slo

POINTS_OVER_TIME = 120
COMPUTE = "compute"


def summary(run: ServerRun) -> dict[str, Any]:
    """Of a run that is over:

    - `requests`: arrived, finished, refused (they fit no memory even alone);
    - `held`: most requests that held memory at once; `held_mean`: mean over time;
    - `tokens_per_s`: tokens made while requests arrived, by that time; `prefill_tokens` aside, the
      first of each request is its prefill's;
    - `ttft_s`: arrival to first token; `tpot_s`: time between later tokens, mean of each request;
      percentiles over finished requests;
    - `goodput_per_s`: requests that kept the SLO, by the time in which requests arrived;
      `slo_share`: of those that arrived;
    - `stall_share`: time that running requests waited for misses or late recalls, of the time in
      which any ran;
    - `bound`, `waited_share`: what the queue's head waited for, and for what share of the whole
      time;
    - `in_use`: mean and peak share of each memory, mean share of the link to the GPU and of
      compute;
    - `over_time`: samples on an even grid.

    `bound` is what was waited for longest; where nobody waited it is what running requests waited
    for (PCIe) or did (compute).
    """
    log, memory = run.log, run.memory
    finished = [request for request in log.requests if request.finished_s is not None]
    total_s = log.samples[-1][0]
    window_s = min(run.source.window_s, total_s)
    stall_s = log.stall_s + log.recall_wait_s
    good = sum(_keeps(request, run.source.workload.slo) for request in finished)
    return {
        "requests": {
            "arrived": len(log.requests),
            "finished": len(finished),
            "refused": sum(bool(request.refused) for request in log.requests),
        },
        "held": int(log.most("admitted")),
        "held_mean": log.mean_in_use("admitted"),
        "tokens": log.tokens,
        "tokens_per_s": log.tokens_by(window_s) / window_s,
        "ttft_s": _percentiles([ttft_s(request) for request in finished]),
        "tpot_s": _percentiles(
            [tpot_s(request) for request in finished if request.output_tokens > 1]
        ),
        "goodput_per_s": good / window_s,
        "slo_share": good / len(log.requests),
        "stall_share": stall_s / log.busy_s if log.busy_s else 0.0,
        "bound": _bound(run, stall_s),
        "waited_share": {
            kind: waited_s / total_s for kind, waited_s in sorted(log.waited_s.items())
        },
        "in_use": {
            GPU: _share(run, "gpu_bytes", memory.hbm.capacity),
            HOST: _share(run, "host_bytes", memory.host.capacity),
            LINK: {
                "mean": memory.to_gpu.moved_bytes / (memory.to_gpu.bytes_per_s * total_s),
                "bytes_per_s": memory.to_gpu.bytes_per_s,
            },
            COMPUTE: {"mean": (log.busy_s - stall_s) / total_s},
        },
        "h2d_bytes": memory.to_gpu.moved_bytes,
        "d2h_bytes": log.written_back_bytes,
        "prefill_share": log.prefill_s / log.busy_s if log.busy_s else 0.0,
        "simulated_s": total_s,
        "over_time": log.over_time(POINTS_OVER_TIME),
    }


def ttft_s(request: ServedRequest) -> float:
    """Arrival to first token, of a request that has one."""
    assert request.first_token_s is not None
    return request.first_token_s - request.arrival_s


def tpot_s(request: ServedRequest) -> float:
    """Time between later tokens, of a finished request of more than one."""
    assert request.first_token_s is not None and request.finished_s is not None
    return (request.finished_s - request.first_token_s) / (request.output_tokens - 1)


def _keeps(request: ServedRequest, slo: Slo) -> bool:
    in_time = ttft_s(request) <= slo.ttft_s
    return in_time and (request.output_tokens == 1 or tpot_s(request) <= slo.tpot_s)


def _percentiles(seconds: list[float]) -> dict[str, float | None]:
    return {f"p{q}": float(np.percentile(seconds, q)) if seconds else None for q in (50, 95, 99)}


def _share(run: ServerRun, name: str, capacity: float) -> dict[str, float]:
    return {"mean": run.log.mean_in_use(name) / capacity, "peak": run.log.most(name) / capacity}


def _bound(run: ServerRun, stall_s: float) -> str:
    if run.log.waited_s:
        return max(run.log.waited_s, key=lambda kind: run.log.waited_s[kind])
    return LINK if stall_s > run.log.busy_s / 2 else COMPUTE
