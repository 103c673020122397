"""When the steps of a decode ran, without making one wait for another: device events on a GPU, the
host's clock on a CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


class StepClock:
    """Of each step: how long it took, how long of that recalls and misses, and the bytes moved by
    its end.

    On a GPU a step is what its `stream` does, the current one unless it is set. What is recalled is
    on the current one.
    """

    def __init__(self, device: torch.device):
        self.device, self.on_gpu = device, device.type == "cuda"
        self.stream: torch.cuda.Stream | None = None
        self._steps: list[tuple] = []  # marks of start, recalled, end
        self._moved: list[Tensor] = []
        self._stalls_s: list[float] = []

    @contextmanager
    def step(self, moved: Callable[[], Tensor]) -> Iterator[None]:
        """A step runs; ``moved`` tells the bytes moved so far."""
        self._stalls_s.append(float("nan") if self.on_gpu else 0.0)
        self._marks = [self._mark(self.stream)]
        yield
        self._steps.append((*self._marks, self._mark(self.stream)))
        self._moved.append(moved())

    @contextmanager
    def recall(self) -> Iterator[None]:
        """Within a step: what its decision recalls."""
        yield
        self._marks.append(self._mark())

    @contextmanager
    def stall(self) -> Iterator[None]:
        """Within a step: misses are loaded.

        On a GPU that is part of a graph, which tells no parts of its time.
        """
        start_s = time.perf_counter()
        yield
        self._stalls_s[-1] += time.perf_counter() - start_s

    def figures(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of each step so far: seconds, of which in misses (nan where not known) and in recalls;
        bytes moved by its end.
        """
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        spans = [
            (self._between(start, end), self._between(start, recalled))
            for start, recalled, end in self._steps
        ]
        step_s, recall_s = np.array(spans, dtype=np.float64).reshape(-1, 2).T
        return (
            step_s,
            np.array(self._stalls_s),
            recall_s,
            np.array([int(count) for count in self._moved], dtype=np.float64),
        )

    def _mark(self, stream=None):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream or torch.cuda.current_stream(self.device))
        return event

    def _between(self, start, end) -> float:
        return start.elapsed_time(end) / 1e3 if self.on_gpu else end - start
