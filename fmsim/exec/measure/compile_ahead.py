"""Compiles a calibration's kernels in several processes before anything is timed.

A kernel is compiled when it is first launched with arguments of its kind, which takes a second or
so: alone, that is most of a calibration. Compiled kernels lie in Triton's cache on disk, so what
one process compiled the next one finds.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers import DeepseekV4Config

from fmsim.exec.kernels.layout import Layout
from fmsim.exec.measure import engine_cases
from fmsim.exec.measure.jobs import Report
from fmsim.exec.measure.module_times import MODULES, AttentionTimer
from fmsim.exec.measure.sizes import Sizes
from fmsim.exec.model.kinds import CSA, HCA, SLIDING

MOST_PROCESSES = 12
WAIT_S = 100.0  # for all of them; what is not compiled by then is compiled while it is timed


class Launch(NamedTuple):
    """A module that is launched once, at some batches: a kind of attention, or a name of MODULES or
    of `engine_cases`.
    """

    what: str
    batches: tuple[int, ...]


def compile_ahead(
    config: DeepseekV4Config,
    layouts: tuple[Layout, Layout],
    device: str,
    sizes: Sizes,
    report: Report,
) -> None:
    """Launch every module once at every batch, in other processes on the same GPU.

    A process that fails is told of and does no harm: what it was to compile is compiled later.
    """
    launches = list(launches_of(sizes))
    n = max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) - 2, len(launches)))
    report(f"kernels are compiled in {n} processes")
    pool = multiprocessing.get_context("spawn").Pool(n)
    asked = [(config, layouts, device, sizes, launch) for launch in launches]
    try:
        for failed in pool.map_async(launched, asked, chunksize=1).get(WAIT_S):
            if failed:
                report(f"compiled later: {failed}")
    except multiprocessing.TimeoutError:
        report(f"{WAIT_S:.0f} s are over; the rest is compiled later")
    finally:
        pool.terminate()
        pool.join()


def launches_of(sizes: Sizes) -> Iterator[Launch]:
    """The longest first. Of experts one process holds a layer, which may be large."""
    yield Launch("moe", sizes.batches)
    for kind in (CSA, HCA, SLIDING):
        for part in _parts(sizes.batches, 5 if kind == CSA else 2):
            yield Launch(kind, part)
    for name in MODULES:
        if name != "moe":
            yield Launch(name, sizes.batches)
    for name in engine_cases.CASES:
        yield Launch(name, sizes.some_batches)


def _parts(batches: Sequence[int], count: int) -> Iterator[tuple[int, ...]]:
    for first in range(count):
        yield tuple(batches[first::count])


def launched(asked: tuple[DeepseekV4Config, tuple[Layout, Layout], str, Sizes, Launch]) -> str:
    """In a process of its own: a launch's work, once; -> what went wrong, or nothing."""
    config, layouts, device, sizes, launch = asked
    try:
        with torch.inference_mode():
            for work in _works(config, layouts, device, sizes, launch):
                work()
            if device == "cuda":
                torch.cuda.synchronize()
    except Exception as error:  # the calibration itself will say it, if it is one
        return f"{launch.what}: {type(error).__name__}: {error}"
    return ""


def _works(
    config: DeepseekV4Config,
    layouts: tuple[Layout, Layout],
    device: str,
    sizes: Sizes,
    launch: Launch,
) -> Iterator[Any]:
    if launch.what in MODULES:
        with torch.device(device):
            at = MODULES[launch.what](config)
        for batch in launch.batches:
            yield at(batch)
    elif launch.what in engine_cases.CASES:
        for batch in launch.batches:
            yield from engine_cases.CASES[launch.what](batch, layouts[0], device, sizes)
    else:
        timer = AttentionTimer(config, launch.what, layouts, device, lambda line: None)
        for batch in launch.batches:
            longer = sizes.contexts[1:] if batch == 1 else ()
            if batch in sizes.crowds and launch.what != SLIDING:
                longer = sizes.crowd_contexts
            for tokens in (sizes.contexts[0], *longer):
                yield timer.work(batch, tokens)
            if batch in sizes.paged_batches and launch.what == CSA:
                for _, work in engine_cases.in_pages(timer, batch, sizes):
                    yield work
                for count in sizes.residents:
                    for _, work in engine_cases.over_residents(timer, batch, count, sizes):
                        yield work
