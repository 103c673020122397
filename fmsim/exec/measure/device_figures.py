"""A device's own figures: memory, link, launches, gathers, and kernels by shape."""

from __future__ import annotations

import os
import time
from functools import partial
from typing import Any

import torch

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.layout import LATENT
from fmsim.exec.kernels.pages.gather import copy_rows
from fmsim.exec.kv.mirror import HostMirror
from fmsim.exec.measure import kernel_cases as cases
from fmsim.exec.measure.jobs import Report
from fmsim.exec.measure.sizes import Sizes
from fmsim.exec.measure.timing import median_s


def host_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def memory_bytes(device: str) -> tuple[int, int]:
    """Of the device: in all, and what is in use before anything is allocated (context,
    libraries).
    """
    if device != "cuda":
        return host_bytes(), 2**20
    # loads the matrix library and its workspace
    torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total, total - free


def rates(device: str, sizes: Sizes, report: Report) -> dict[str, float]:
    """Of the memory, the link and matrix products, and what launches take."""
    source = torch.randint(0, 256, (sizes.copy_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = median_s(lambda: target.copy_(source), device)
    host = torch.randint(
        0, 256, (sizes.link_bytes,), dtype=torch.uint8, pin_memory=device == "cuda"
    )
    link_s = median_s(
        lambda: target[: sizes.link_bytes].copy_(host, non_blocking=True), device, graph=False
    )
    a, b = (
        torch.randn(sizes.matmul, sizes.matmul, device=device).to(torch.bfloat16) for _ in range(2)
    )
    matmul_s = median_s(lambda: a @ b, device)
    figures = {
        "copy_bytes_per_s": 2 * sizes.copy_bytes / copy_s,
        "link_bytes_per_s": sizes.link_bytes / link_s,
        "matmul_flops": 2 * sizes.matmul**3 / matmul_s,
    } | _launches(device)
    for name, value in figures.items():
        report(f"{name} {value:.4g}")
    return figures


def _launches(device: str, count: int = 200) -> dict[str, float]:
    """Seconds of one launch of a kernel that does nearly nothing: within a graph, and by the
    host.
    """
    x = torch.zeros(1, device=device)

    def many() -> None:
        for _ in range(count):
            x.add_(1)

    in_graph_s = median_s(many, device, cold=False) / count
    many()
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    many()  # returns when the last one is launched, not when it is done
    return {"graph_launch_s": in_graph_s, "host_launch_s": (time.perf_counter() - start) / count}


def gathers(row_bytes: int, device: str, sizes: Sizes, report: Report) -> dict[int, float]:
    """Bytes/s of a gather from one mirror, by rows."""
    counts = sizes.gathers[row_bytes]
    rows = max(*counts, sizes.host_bytes // row_bytes)
    found = {}
    with HostMirror(1, rows, row_bytes, device) as mirror:
        for count in counts:
            case = cases.recall(row_bytes, count, device, mirror=mirror)
            found[count] = case.n_bytes / median_s(case.run, device)
            report(
                f"gather of {count:,} rows of {row_bytes:,} bytes: {found[count] / 1e9:.1f} GB/s"
            )
    return found


def beside(device: str, sizes: Sizes, report: Report) -> float:
    """Bytes/s of a gather on the few programs that a recall takes beside a decode."""
    row_bytes, count = LATENT.entry_bytes, sizes.beside_rows
    with HostMirror(1, max(count, sizes.host_bytes // row_bytes), row_bytes, device) as mirror:
        case = cases.recall(row_bytes, count, device, tune=tuning.GATHER_BESIDE, mirror=mirror)
        rate = case.n_bytes / median_s(case.run, device)
    report(f"gather beside a decode: {rate / 1e9:.1f} GB/s")
    return rate


def within(device: str, sizes: Sizes, report: Report) -> dict[int, float]:
    """Bytes/s of rows in random order that are copied to others of the same memory, by bytes of a
    row.
    """
    found = {}
    for row_bytes in sizes.recalled_rows:
        count = sizes.within_bytes // row_bytes
        pool = torch.zeros(1, 2 * count, row_bytes, dtype=torch.uint8, device=device)
        pages, slots = (torch.randperm(count, device=device)[None] for _ in range(2))
        counts = torch.tensor([count], dtype=torch.int32, device=device)
        copy = partial(copy_rows, pool, pool, pages, count + slots, counts, tuning.COPY_WITHIN)
        found[row_bytes] = count * row_bytes / median_s(copy, device, runs=12)
        report(f"rows of {row_bytes:,} bytes within the GPU: {found[row_bytes] / 1e9:.0f} GB/s")
    return found


def kernels(device: str, sizes: Sizes, report: Report) -> list[dict[str, Any]]:
    """Every kernel over the KV cache at every (batch, entries), in `Timing`'s fields."""
    builders = (cases.index_scoring, cases.selection, cases.attention, cases.memory_scoring)
    found = []
    for batch, entries in sizes.kernel_shapes:
        for build in builders:
            case = build(batch, entries, device)
            seconds = median_s(case.run, device)
            report(
                f"{case.kernel}, {case.shape}: {seconds * 1e6:.1f} us,"
                f" {case.n_bytes / seconds / 1e9:.0f} GB/s"
            )
            found.append(
                {
                    "kernel": case.kernel,
                    "shape": case.shape,
                    "n_bytes": case.n_bytes,
                    "seconds": seconds,
                }
            )
    return found
