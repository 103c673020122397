"""A calibration's work, part by part: what it will take, and what a run that was killed left."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmsim.files import write_text
from fmsim.files.inputs import MOST_BYTES_OF_RESULTS, read_json

Report = Callable[[str], object]


@dataclass(frozen=True)
class Job:
    """A part of the work. `run` gives its figures, as JSON has them; `seconds` is what it took on
    an H200, kernels' compilation included.
    """

    name: str
    seconds: float
    run: Callable[[], Any]


def run_jobs(
    jobs: Sequence[Job], about: dict[str, Any], part: Path | None, report: Report
) -> dict[str, Any]:
    """The figures of all `jobs`, by name.

    Each is written into `part` as soon as it is there. Those that an earlier run of the same
    device, sizes and engine (`about`) left in it are taken from there. The file stays: who has all
    that it needs deletes it.
    """
    about = json.loads(json.dumps(about))
    found = _left(part, about)
    left = [job for job in jobs if job.name not in found]
    if found:
        report(f"{len(found)} of {len(jobs)} parts are in {part}")
    left_s = sum(job.seconds for job in left)
    report(f"takes about {left_s:.0f} s on an H200, in {len(left)} parts")
    start_s = time.perf_counter()
    for number, job in enumerate(left, 1):
        report(f"[{number}/{len(left)}] {job.name}, about {left_s:.0f} s to go")
        found[job.name] = json.loads(json.dumps(job.run()))
        left_s -= job.seconds
        if part is not None:
            write_text(part, json.dumps({"about": about, "figures": found}) + "\n")
        report(f"{time.perf_counter() - start_s:.1f} s gone")
    return found


def _left(part: Path | None, about: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run left; nothing where it was of something else, or is damaged."""
    if part is None or not part.exists():
        return {}
    left = read_json(part, MOST_BYTES_OF_RESULTS)
    if not isinstance(left, dict) or left.get("about") != about:
        return {}
    return dict(left["figures"])


def numbered(column: dict[str, Any]) -> dict[int, Any]:
    """A column of figures by number, whose keys JSON has made text."""
    return {int(key): value for key, value in column.items()}
