"""The figures of one policy's serving run.

Every formula stands here; the names are the fields of the JSON report.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np

from fmsim.hw.memory import MemorySystem
from fmsim.sim.serving.admission import GPU, HOST, LINK, NVME
from fmsim.sim.serving.batch import ServedRequest
from fmsim.sim.serving.log import Log, keeps, over_time, tpot_s, ttft_s
from fmsim.sim.serving.prefix import TIERS
from fmsim.sim.serving.server import ServerRun

POINTS_OVER_TIME = 120
COMPUTE = "compute"


def summary(*runs: ServerRun) -> dict[str, Any]:
    """Of runs that are over, one a server, taken together:

    - `requests`: arrived, finished, refused (they fit no memory even alone);
    - `served_s`: from the first arrival to the last request's end;
    - `held`: most requests that held memory at once; `held_mean`: mean over time;
    - `tokens_per_s`: tokens made, by `served_s`, the first of each request included, which its
      prefill makes;
    - `arriving_tokens_per_s`: tokens made while requests arrived, by that time: a closed loop's
      steady rate, without the last answers' tail;
    - `ttft_s`: arrival to first token; `tpot_s`: time between later tokens, mean of each request;
      percentiles over finished requests;
    - `goodput_per_s`: requests that kept the SLO, by `served_s`; `slo_share`: of those that
      arrived;
    - `stall_share`: time that running requests waited for misses or late recalls, of the time in
      which any ran;
    - `bound`, `waited_share`: what the queue's head waited for, and for what share of the whole
      time;
    - `in_use`: mean and peak share of each memory, mean share of the link to the GPU and of
      compute;
    - `h2d_bytes`: from host to GPU, on one GPU of each rank;
    - `tokens_per_step`: mean tokens a step makes of each request;
    - `miss_rate`: entries fetched of those selected, in all layers that select;
    - `prefix`: share of prompt tokens that were reused, whole blocks found by tier, in tokens, and
      seconds that steps waited for them;
    - `prefill_lower_bound`: prefill was not timed on this GPU, so `ttft_s` is a lower bound;
    - `over_time`: samples on an even grid.

    `bound` is what was waited for longest; where nobody waited it is what running requests waited
    for (PCIe) or did (compute), and where none ran, what most were refused for.
    """
    logs = [run.log for run in runs]
    ranks = [rank for run in runs for rank in run.ranks]
    requests = [request for log in logs for request in log.requests]
    finished = [request for request in requests if request.finished_s is not None]
    total_s = max(log.samples[-1][0] for log in logs)
    served_s = _served_s(finished) or total_s
    source = runs[0].source
    window_s = min(source.window_s, total_s)
    busy_s = sum(log.busy_s for log in logs)
    stall_s = sum(log.stalled_s for log in logs)
    waited: defaultdict[str, float] = defaultdict(float)
    for log in logs:
        for kind, waited_s in log.waited_s.items():
            waited[kind] += waited_s
    good = sum(keeps(request, source.workload.slo) for request in finished)
    tokens = round(sum(log.tokens for log in logs))
    moved = sum(rank.to_gpu.moved_bytes for rank in ranks)
    link_bytes_per_s = sum(rank.to_gpu.bytes_per_s for rank in ranks)
    return {
        "requests": {
            "arrived": len(requests),
            "finished": len(finished),
            "refused": sum(bool(request.refused) for request in requests),
        },
        "served_s": served_s,
        "held": int(sum(log.most("admitted") for log in logs)),
        "held_mean": sum(log.mean_in_use("admitted") for log in logs),
        "tokens": tokens,
        "tokens_per_s": tokens / served_s if served_s else 0.0,
        "arriving_tokens_per_s": (
            sum(log.tokens_by(window_s) for log in logs) / window_s if window_s else 0.0
        ),
        "ttft_s": _percentiles([ttft_s(request) for request in finished]),
        "tpot_s": _percentiles([tpot_s(request) for request in finished]),
        "goodput_per_s": good / served_s if served_s else 0.0,
        "slo_share": good / len(requests),
        "stall_share": stall_s / busy_s if busy_s else 0.0,
        "bound": _bound(waited, busy_s, stall_s, requests),
        "waited_share": {
            kind: _by(waited_s, total_s * len(runs)) for kind, waited_s in sorted(waited.items())
        },
        "in_use": {
            GPU: _share(logs, "gpu_bytes", sum(rank.hbm.capacity for rank in ranks)),
            HOST: _share(logs, "host_bytes", sum(rank.host.capacity for rank in ranks)),
            **_nvme_use(logs, ranks),
            LINK: {
                "mean": moved / (link_bytes_per_s * total_s) if total_s else 0.0,
                "bytes_per_s": link_bytes_per_s,
            },
            COMPUTE: {"mean": (busy_s - stall_s) / total_s / len(runs) if total_s else 0.0},
        },
        "h2d_bytes": moved,
        "d2h_bytes": sum(log.written_back_bytes for log in logs),
        "prefill_share": sum(log.prefill_s for log in logs) / busy_s if busy_s else 0.0,
        "tokens_per_step": runs[0].demand.tokens_per_step,
        "miss_rate": _by(
            sum(log.missed_entries for log in logs), sum(log.selected_entries for log in logs)
        ),
        "prefix": _prefix(logs, requests),
        "prefill_lower_bound": runs[0].prefill.lower_bound,
        "simulated_s": total_s,
        "over_time": over_time(logs, POINTS_OVER_TIME),
    }


def _prefix(logs: list[Log], requests: list[ServedRequest]) -> dict[str, Any] | None:
    """None where no prefix could be reused."""
    size = logs[0].block_tokens
    if not size:
        return None
    prompts = sum(request.prompt_tokens for request in requests if request.admitted_s is not None)
    return {
        "reused_share": _by(sum(request.reused_tokens for request in requests), prompts),
        "hit_tokens": {
            tier: size * sum(len(getattr(request.found, tier.lower())) for request in requests)
            for tier in TIERS
        },
        "wait_s": sum(log.prefix_wait_s for log in logs),
    }


def _nvme_use(logs: list[Log], ranks: list[MemorySystem]) -> dict[str, dict[str, float]]:
    """Nothing where the server has none."""
    capacity = sum(rank.nvme.capacity for rank in ranks if rank.nvme is not None)
    if not capacity:
        return {}
    read_bytes = sum(rank.from_nvme.moved_bytes for rank in ranks)
    return {NVME: _share(logs, "nvme_bytes", capacity) | {"read_bytes": read_bytes}}


def _by(amount: float, seconds: float) -> float:
    """A rate or a share; 0 where no time passed, as when every request was refused."""
    return amount / seconds if seconds else 0.0


def _served_s(finished: list[ServedRequest]) -> float:
    """From the first arrival to the last end."""
    if not finished:
        return 0.0
    first_s = min(request.arrival_s for request in finished)
    return max(request.finished_s or 0.0 for request in finished) - first_s


def _percentiles(seconds: list[float | None]) -> dict[str, float | None]:
    """The mean, and percentiles by linear interpolation between order statistics: the value at
    rank q/100 x (n - 1) of the n sorted ones, the first being 0 (numpy's default).
    """
    known = [value for value in seconds if value is not None]
    found: dict[str, float | None] = {
        f"p{q}": float(np.percentile(known, q)) if known else None for q in (50, 95, 99)
    }
    return {"mean": float(np.mean(known)) if known else None} | found


def _share(logs: list[Log], name: str, capacity: float) -> dict[str, float]:
    return {
        "mean": sum(log.mean_in_use(name) for log in logs) / capacity,
        "peak": sum(log.most(name) for log in logs) / capacity,
    }


def _bound(
    waited: dict[str, float], busy_s: float, stall_s: float, requests: list[ServedRequest]
) -> str:
    if waited:
        return max(waited, key=lambda kind: waited[kind])
    refused = Counter(request.refused for request in requests if request.refused)
    if refused and not busy_s:
        return refused.most_common(1)[0][0]
    return LINK if stall_s > busy_s / 2 else COMPUTE
