"""Independent work: on several cores, without copying what it reads, or on a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

from fmsim.errors import FmsimError

Item = TypeVar("Item")
Result = TypeVar("Result")

_work: Callable[[int], Any]  # set just before the processes part, so that they inherit it


def in_parallel(work: Callable[[int], Result], n: int) -> Iterator[Result]:
    """work(0), ..., work(n - 1), in order, each as soon as it and those before it are there.

    On Linux they run in forked processes, which share the parent's arrays; elsewhere, or on one
    core, one after another. An exception that `work` raises is raised here.
    """
    n_processes = min(n, cores())
    if n_processes < 2 or sys.platform != "linux":
        yield from map(work, range(n))
        return
    global _work
    _work = work
    with ProcessPoolExecutor(n_processes, multiprocessing.get_context("fork")) as pool:
        yield from pool.map(_inherited, range(n))


def as_they_end(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    jobs: int | None = None,
    start_method: str | None = None,
) -> Iterator[Result]:
    """work(item) of each, as each ends, in `jobs` processes (one a core by default), which end with
    this one even if it is killed.

    `start_method` is multiprocessing's; "spawn" for work on a GPU, whose driver does not outlive a
    fork.
    """
    context = multiprocessing.get_context(start_method)
    with ProcessPoolExecutor(
        jobs or cores(), context, initializer=_end_with_parent, initargs=(os.getpid(),)
    ) as pool:
        try:
            for future in as_completed([pool.submit(work, item) for item in items]):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def on_ray(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """The same on a Ray cluster: the one at RAY_ADDRESS, or this machine's own. fmsim and the files
    must be on every node.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise FmsimError(
            "--engine ray: ray is not installed; pip install 'fmsim[ray]', or leave --engine out"
        ) from None
    ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level="warning")
    try:
        task = ray.remote(work)
        waiting = [task.remote(item) for item in items]
        while waiting:
            [ended], waiting = ray.wait(waiting, num_returns=1)
            yield ray.get(ended)
    finally:
        ray.shutdown()


def _end_with_parent(parent: int) -> None:
    """A worker whose parent was killed would wait for work for ever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _inherited(index: int) -> Any:
    return _work(index)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
