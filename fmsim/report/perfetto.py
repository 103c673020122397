"""Simulated decodes as a timeline for Perfetto (ui.perfetto.dev): a process a policy, a track a
resource.

Written in the Chrome JSON trace event format ("Trace Event Format", Chromium project), which
Perfetto reads. Times are simulated.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from fmsim.replay.ledger import Ledger
from fmsim.sim.timeline import SimulatedTimeline, Transfer
from fmsim.units import MIB

TRACKS = {  # key -> name, in the order in which they are shown
    "decode": "decode steps",
    "compute": "GPU compute",
    "stall": "stalls",
    "recall": "link to GPU: recall",
    "misses": "link to GPU: misses",
    "write_back": "link to host: write-back",
}
PLACE = {track: place for place, track in enumerate(TRACKS)}
Event = dict[str, Any]


def trace_json(
    labels: Mapping[str, str],
    ledgers: Mapping[str, Ledger],
    timelines: Mapping[str, SimulatedTimeline],
) -> str:
    """The file's text.

    `labels` are policies and the names that their processes are shown under; all mappings are by
    policy label.
    """
    events = [
        event
        for process, (label, shown) in enumerate(labels.items(), 1)
        for event in (
            *_names(process, shown),
            *_slices(process, timelines[label]),
            *_counters(process, ledgers[label], timelines[label]),
        )
    ]
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, separators=(",", ":"))


def _tid(process: int, track: str) -> int:
    """Thread ids are global to Perfetto."""
    return 100 * process + PLACE[track]


def _names(process: int, shown: str) -> Iterator[Event]:
    yield {"ph": "M", "pid": process, "name": "process_name", "args": {"name": shown}}
    yield {"ph": "M", "pid": process, "name": "process_sort_index", "args": {"sort_index": process}}
    for track, name in TRACKS.items():
        about = {"ph": "M", "pid": process, "tid": _tid(process, track)}
        yield about | {"name": "thread_name", "args": {"name": name}}
        yield about | {"name": "thread_sort_index", "args": {"sort_index": PLACE[track]}}


def _slices(process: int, timeline: SimulatedTimeline) -> Iterator[Event]:
    missing: dict[int, list[Transfer]] = {}
    for transfer in timeline.transfers:
        yield _slice(
            process,
            transfer.kind,
            transfer.kind.replace("_", "-"),
            transfer.start_s,
            transfer.end_s,
            _moved(transfer),
        )
        if transfer.kind == "misses":
            missing.setdefault(transfer.step, []).append(transfer)
    for step, (start_s, end_s) in enumerate(
        zip(timeline.start_s.tolist(), timeline.end_s.tolist())
    ):
        yield _slice(process, "decode", "step", start_s, end_s, {"step": step})
        waits = [(start_s, start_s + float(timeline.recall_wait_s[step]), "waits for recall")]
        waits += [(move.start_s, move.end_s, "waits for misses") for move in missing.get(step, [])]
        for from_s, to_s, name in waits:
            if to_s > from_s:
                yield _slice(process, "stall", name, from_s, to_s, {"step": step})
        for (_, from_s, _), (to_s, _, _) in pairwise([*waits, (end_s, end_s, "")]):
            if to_s > from_s:
                yield _slice(process, "compute", "compute", from_s, to_s, {"step": step})


def _moved(transfer: Transfer) -> dict[str, Any]:
    return {"step": transfer.step, "MiB": round(transfer.n_bytes / MIB, 3)}


def _slice(
    process: int, track: str, name: str, start_s: float, end_s: float, args: dict[str, Any]
) -> Event:
    """Whole nanoseconds, so that neighbours meet and never overlap."""
    start_ns, end_ns = round(start_s * 1e9), round(end_s * 1e9)
    times = {"ts": start_ns / 1000, "dur": (end_ns - start_ns) / 1000}
    return (
        {"ph": "X", "pid": process, "tid": _tid(process, track), "cat": track, "name": name}
        | times
        | {"args": args}
    )


def _counters(process: int, ledger: Ledger, timeline: SimulatedTimeline) -> Iterator[Event]:
    accessed = np.maximum(ledger.accessed.sum(axis=1), 1)
    values = {
        "KV kept, one request, the paper's accounting (MiB)": timeline.kv_bytes / MIB,
        "resident when needed (%)": 100 * ledger.hit.sum(axis=1) / accessed,
    }
    for name, series in values.items():
        for start_s, value in zip(timeline.start_s.tolist(), series.tolist()):
            yield {
                "ph": "C",
                "pid": process,
                "name": name,
                "ts": round(start_s * 1e9) / 1000,
                "args": {"value": round(value, 3)},
            }
