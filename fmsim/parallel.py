"""Independent work on several cores, without copying what it reads."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")

_work: Callable[[int], Any]  # set just before the processes part, so that they inherit it


def in_parallel(work: Callable[[int], Result], n: int) -> Iterator[Result]:
    """work(0), ..., work(n - 1), in order, each as soon as it and those before it are there.

    On Linux they run in forked processes, which share the parent's arrays; elsewhere, or on one core, one after another.
    An exception that `work` raises is raised here.
    """
    n_processes = min(n, _cores())
    if n_processes < 2 or sys.platform != "linux":
        yield from map(work, range(n))
        return
    global _work
    _work = work
    with ProcessPoolExecutor(n_processes, multiprocessing.get_context("fork")) as pool:
        yield from pool.map(_inherited, range(n))


def _inherited(index: int) -> Any:
    return _work(index)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
