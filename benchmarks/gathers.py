"""How fast a GPU gathers rows from pinned host memory, by row size and count: a link's table.

    python benchmarks/gathers.py [--l2] [--out benchmarks/results/gathers-CARD.json]

The rows are those that a decode moves: an entry of 584 bytes, one with its index key (716), four
entries (2,336), and a page of 64 (37,376). A step's misses are some hundred rows, so the counts
begin at 32. Rows lie in random order, or ascending as a residency asks for them.

With --l2 it times instead what may slow 19 MB of rows down: how far apart they lie, how many
programs read them, and how much of the L2 holds bytes that were written and not yet written back.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.pages.gather import copy_rows
from fmsim.exec.kv.mirror import HostMirror
from fmsim.exec.measure.timing import median_s
from fmsim.files import write_text

ROW_BYTES = (584, 716, 2_336, 37_376)
COUNTS = (32, 64, 128, 256, 512, 1_024, 4_096, 32_768, 131_072)
HOST_BYTES = 2**31  # far more than any cache between
MOST_BYTES = 2**28  # of one gather
WRITTEN_MIB = (0, 8, 16, 32, 64, 256)  # before a gather; an L2 has some 50 or 60
SPREADS = tuple(2**n for n in (26, 28, 30, 31))  # bytes of host memory that the rows lie in


def gather_rates(row_bytes: int, counts: tuple[int, ...]) -> list[dict[str, Any]]:
    """A row a count and order: median seconds of a gather and its rate."""
    device = torch.device("cuda")
    mirror = HostMirror(1, HOST_BYTES // row_bytes, row_bytes, device)
    host_rows = mirror.pages.shape[1]
    rows = []
    for count in counts:
        if count * row_bytes > MOST_BYTES:
            continue
        target = torch.empty(1, count, row_bytes, dtype=torch.uint8, device=device)
        slots = torch.randperm(count, device=device)[None]
        counted = torch.tensor([count], dtype=torch.int32, device=device)
        pages = torch.randint(0, host_rows, (1, count), device=device)
        for order, asked in (("random", pages), ("ascending", pages.sort(1).values)):

            def run(asked: torch.Tensor = asked) -> None:
                copy_rows(mirror.pages, target, asked, slots, counted)

            seconds = median_s(run, device, runs=50)
            rate = count * row_bytes / seconds
            rows.append(
                {
                    "row_bytes": row_bytes,
                    "rows": count,
                    "order": order,
                    "us": round(seconds * 1e6, 2),
                    "bytes_per_s": round(rate),
                }
            )
    return rows


def seconds_after_writing(run: Callable[[], None], n_bytes: int, runs: int = 9) -> float:
    """Median of ``run`` after 256 MiB were read into the L2, and then ``n_bytes`` written."""
    memory = torch.zeros(2**26, device="cuda")
    marks = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        memory.sum()
        memory[: n_bytes // 4].fill_(1.0)
        start.record()
        run()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in marks) / 1e3


def l2_rates(row_bytes: int, count: int) -> list[dict[str, Any]]:
    """A row an order, spread or written MiB, and number of programs."""
    device, rows = torch.device("cuda"), []
    mirror = HostMirror(1, HOST_BYTES // row_bytes, row_bytes, device)
    target = torch.empty(1, count, row_bytes, dtype=torch.uint8, device=device)
    slots = torch.randperm(count, device=device)[None]
    counted = torch.tensor([count], dtype=torch.int32, device=device)
    for spread in SPREADS:
        pages = torch.randperm(spread // row_bytes, device=device)[None, :count]
        for order, asked in (("random", pages), ("ascending", pages.sort(1).values)):
            for programs in (32, 132):
                tune = tuning.GATHER._replace(programs=programs)

                def run(asked: torch.Tensor = asked, tune: tuning.GatherTuning = tune) -> None:
                    copy_rows(mirror.pages, target, asked, slots, counted, tune)

                about = {"row_bytes": row_bytes, "order": order, "programs": programs}
                seconds = median_s(run, device, runs=9)
                rows.append(about | {"spread_bytes": spread, "us": round(seconds * 1e6, 1)})
                for mib in WRITTEN_MIB if spread == SPREADS[-1] else ():
                    seconds = seconds_after_writing(run, mib * 2**20)
                    rows.append(about | {"written_mib": mib, "us": round(seconds * 1e6, 1)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--l2", action="store_true", help="what slows rows down, instead")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gathers.py: needs a CUDA device")
    torch.manual_seed(0)
    if args.l2:
        found = [row for size in (584, 2_336) for row in l2_rates(size, 19_136_512 // size)]
    else:
        found = [row for row_bytes in ROW_BYTES for row in gather_rates(row_bytes, COUNTS)]
    for row in found:
        print(*row.values())
    card = torch.cuda.get_device_name()
    out = args.out
    if out is None:
        name = f"gathers-{'l2-' if args.l2 else ''}{card.lower().replace(' ', '-')}.json"
        out = Path(__file__).parent / "results" / name
    about = {
        "device": card,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/gathers.py" + (" --l2" if args.l2 else ""),
        "method": "median of 50 CUDA graph replays, L2 cold",
    }
    write_text(out, json.dumps({"about": about, "gathers": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
