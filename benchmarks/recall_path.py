"""How fast a host gathers pages for a recall the way the released FlashMemory engine does it,
without a GPU.

    python benchmarks/recall_path.py [--out benchmarks/results/recall_path.json]

That engine (github.com/libertywing/FlashMemory-Deepseek-V4, swap_engine_p.py) indexes each layer's
mirror by (page, entry) for 576-byte rows and for 8-byte scales, stacks the 21 layers, and sends the
stack from pageable memory, which the driver copies once more through a pinned buffer. The same
three passes over the bytes are timed here with torch on one thread, in CPU seconds, so that other
work on the machine counts little. The last pass is a plain copy; the transfer behind it (55 GB/s)
runs beside it and is left out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from pathlib import Path

import torch

LAYERS, PAGE_ENTRIES, ROW_BYTES, SCALE_BYTES, PAGE_BYTES = 21, 64, 576, 8, 37_440
MIRROR_PAGES, RECALLED_PAGES = (
    512,
    64,
)  # of one request's layer: a mirror far larger than the last-level cache; a third of KMAX 192


def recall(
    mirrors: list[torch.Tensor], pages: torch.Tensor, entries: torch.Tensor, staging: torch.Tensor
) -> int:
    """One recall; returns its bytes."""
    rows = [
        mirror.as_strided((MIRROR_PAGES, PAGE_ENTRIES, ROW_BYTES), (PAGE_BYTES, ROW_BYTES, 1))[
            pages, entries
        ]
        for mirror in mirrors
    ]
    start = PAGE_ENTRIES * ROW_BYTES
    scales = [
        mirror.as_strided(
            (MIRROR_PAGES, PAGE_ENTRIES, SCALE_BYTES), (PAGE_BYTES, SCALE_BYTES, 1), start
        )[pages, entries]
        for mirror in mirrors
    ]
    moved = 0
    for stack in (torch.stack(rows), torch.stack(scales)):
        staging[: stack.numel()].copy_(stack.view(-1))
        moved += stack.numel()
    return moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "recall_path.json"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    mirrors = [
        torch.randint(0, 255, (MIRROR_PAGES * PAGE_BYTES,), dtype=torch.uint8)
        for _ in range(LAYERS)
    ]
    staging = torch.zeros(LAYERS * RECALLED_PAGES * PAGE_ENTRIES * ROW_BYTES, dtype=torch.uint8)
    rates = []
    for _ in range(given.repeats):
        chosen = torch.randperm(MIRROR_PAGES)[:RECALLED_PAGES]
        pages, entries = (
            chosen.repeat_interleave(PAGE_ENTRIES),
            torch.arange(PAGE_ENTRIES).repeat(RECALLED_PAGES),
        )
        start_s = time.process_time()
        moved = recall(mirrors, pages, entries, staging)
        rates.append(moved / (time.process_time() - start_s))
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "",
    )
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": f"{cpu or platform.machine()}, one thread, torch {torch.__version__}",
        "command": "python benchmarks/recall_path.py",
        "recall_bytes": moved,
        "bytes_per_cpu_s": [round(rate) for rate in rates],
        "median_bytes_per_cpu_s": round(sorted(rates)[len(rates) // 2]),
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{result['median_bytes_per_cpu_s'] / 1e9:.2f} GB/s (median of {given.repeats};"
        f" {min(rates) / 1e9:.2f} to {max(rates) / 1e9:.2f}); written to {given.out}"
    )


if __name__ == "__main__":
    main()
