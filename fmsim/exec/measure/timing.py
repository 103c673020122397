"""How long work takes on a device: the median of many runs, with cold caches on a GPU."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from fmsim.exec.decode.streams import STEP_PRIORITY

FLUSH_BYTES = 256 * 2**20  # more than any GPU's L2
# of work before what is timed, since a GPU that waited for a compiler may have lowered its clocks
WARM_S = 0.02


def median_s(
    work: Callable[[], object],
    device: torch.device | str,
    runs: int = 30,
    graph: bool = True,
    cold: bool = True,
) -> float:
    """Seconds of one call of ``work``.

    On a GPU by device events, as the replay of a CUDA graph where ``graph`` (so without the host's
    launches) and with other bytes read into the L2 before each run where ``cold``, as the weights
    of other layers would be in a decode. (Bytes written there would have to be written back while
    ``work`` reads, at its cost.) On a CPU by its clock.
    """
    if torch.device(device).type != "cuda":
        work()
        return statistics.median(_cpu_s(work) for _ in range(min(runs, 3)))
    run = captured(work) if graph else work
    start_s = time.perf_counter()
    while time.perf_counter() - start_s < WARM_S:
        run()
        torch.cuda.synchronize()
    flush = torch.zeros(FLUSH_BYTES // 4 if cold else 1, device=device)
    total = torch.zeros((), device=device)
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for start, end in marks:
        torch.sum(
            flush,
            0,
            out=total,
            # it also keeps the GPU busy while the host gets ahead, so that no launch is waited for
            # between the marks
        )
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in marks) / 1e3


def overhead_s(device: torch.device | str, count: int = 64) -> float:
    """Seconds of a timed CUDA graph that are no work: what one small kernel takes more alone than
    among others. 0 on a CPU.
    """
    if torch.device(device).type != "cuda":
        return 0.0
    x = torch.zeros(1, device=device)

    def many() -> None:
        for _ in range(count):
            x.add_(1)

    return max(0.0, median_s(lambda: x.add_(1), device) - median_s(many, device) / count)


def captured(work: Callable[[], object]) -> Callable[[], None]:
    """``work`` as a CUDA graph, with a decode step's priority; call what is returned to replay
    it.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles kernels and creates handles, which a capture must not
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream(priority=STEP_PRIORITY)
    with no_collection(), torch.cuda.graph(graph, stream=stream):
        work()
    return graph.replay


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage is collected meanwhile, but before: to free a graph or a pinned mirror of earlier
    work would spoil a capture.
    """
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _cpu_s(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
