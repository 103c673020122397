"""A CSA layer that loads what it misses from the host, and makes its queries meanwhile: the layer's
own time and the link's are not added up, but overlap.

The rows of all requests of a trace-driven engine are the same. Then a part of them comes from the
GPU's L2, where requests do not read them at one moment (benchmarks/results/misses-h200.json).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from fmsim.exec.decode.decode_attention import AllEntries
from fmsim.exec.kernels.layout import Layout
from fmsim.exec.kv.tiered import RequestSize, TieredCache
from fmsim.exec.measure.jobs import Report
from fmsim.exec.measure.kernel_cases import TOP_K
from fmsim.exec.measure.module_times import AttentionTimer
from fmsim.exec.measure.sizes import Sizes
from fmsim.exec.measure.timing import median_s

RUNS = 12  # each of up to 15 ms
Work = Callable[[], object]


class _Fetching(AllEntries):
    """Does a ``load`` behind its choice, and attends to entries of its own."""

    loads = True

    def __init__(self, load: Work, *given: Any) -> None:
        super().__init__(*given)
        self.load = load

    def bring(self) -> torch.Tensor:
        self.load()
        return super().bring()


def fetching_ms(
    timer: AttentionTimer, layout: Layout, device: str, sizes: Sizes, report: Report
) -> dict[str, dict[int, dict[int, dict[int, float]]]]:
    """By entries a page, batch and pages loaded, what a CSA layer takes more that loads its misses
    beside its queries than one that has none: pages of each request's "own", and "common" to all.
    """
    found: dict[str, dict[int, dict[int, dict[int, float]]]] = {"own": {}, "common": {}}
    tokens = sizes.contexts[0]
    for batch in sizes.fetching_batches:
        plain_s = median_s(timer.work(batch, tokens), device, RUNS)
        for entries, counts in sizes.fetched.items():
            for kind, by_entries in found.items():
                column = by_entries.setdefault(entries, {}).setdefault(batch, {})
                if batch == 1 and kind == "common":
                    column |= found["own"][entries][1]
                    continue
                loads = fetches(batch, entries, kind == "common", layout, device, sizes)
                for count, load in zip(counts, loads, strict=True):
                    work = timer.work(batch, tokens, pager=partial(_Fetching, load))
                    column[count] = 1e3 * (median_s(work, device, RUNS) - plain_s)
                told = ", ".join(f"{count}: {ms:.4f} ms" for count, ms in column.items())
                report(f"fetching {kind} pages of {entries}, batch {batch}, of each {told}")
    return found


def fetches(
    batch: int, entries: int, common: bool, layout: Layout, device: str, sizes: Sizes
) -> Iterator[Work]:
    """Of each number in `Sizes.fetched`, pages of one text or of each request's own."""
    n_pages = sizes.fetched_entries // entries
    places = min(TOP_K, n_pages)
    size = RequestSize(n_pages, (1,), places, (0,))
    cache = TieredCache(layout, 1, entries, [size] * batch, device, one_text=common)
    blocks = torch.full((batch, n_pages + 1), -1, dtype=torch.int32, device=device)
    pages = torch.randperm(n_pages, device=device)[:places].sort().values
    for count in sizes.fetched[entries]:
        fetched = torch.zeros(places, dtype=torch.bool, device=device)
        fetched[torch.linspace(0, places - 1, count, device=device).long()] = True
        of_each = (part.expand(batch, -1) for part in (pages, fetched))
        yield partial(cache.stage, 0, *of_each, blocks)
