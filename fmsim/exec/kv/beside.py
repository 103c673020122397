"""Copies from the host beside a decode: what a decision will recall, and what it recalls late.

On a CPU everything happens at once, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Beside:
    """Two streams of a GPU beside the decode's: one for what is recalled ahead, which has a window
    of time, and one for what a decision recalls late.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._on_gpu = device.type == "cuda"
        self._streams = [torch.cuda.Stream(device) for _ in range(2)] if self._on_gpu else []
        # by the first of the requests: when their pages are here
        self._ahead: dict[int, torch.cuda.Event] = {}

    def event(self) -> torch.cuda.Event | None:
        """To be recorded outside of CUDA graphs, and waited for in them too."""
        if not self._on_gpu:
            return None
        event = torch.cuda.Event(external=True)
        # torch leaves a wait out of a graph, for an event that was not recorded by then
        self.record(event)
        return event

    def wait(self, event: torch.cuda.Event | None) -> None:
        """What comes after waits for its last record."""
        if event is not None:
            event.wait(torch.cuda.current_stream(self.device))

    def record(self, event: torch.cuda.Event | None) -> None:
        """What was launched so far is what is waited for."""
        if event is not None:
            event.record(torch.cuda.current_stream(self.device))

    def over(self, event: torch.cuda.Event | None) -> bool:
        """What was recorded last is done already, as far as the host knows; asks nobody to wait."""
        return event is not None and event.query()

    @contextmanager
    def ahead(self, part: slice, *used: Tensor) -> Iterator[None]:
        """What is launched within, for the requests ``part``, runs beside what comes after until
        `wait_for_ahead`; ``used`` tensors are kept as long.
        """
        with self._beside(0, used):
            yield
            if self._on_gpu:
                event = self._ahead.setdefault(part.start or 0, torch.cuda.Event())
                event.record(torch.cuda.current_stream(self.device))

    def wait_for_ahead(self, part: slice) -> None:
        """What was launched `ahead` for these requests is done before what comes after."""
        for first, event in self._ahead.items():
            if first >= (part.start or 0) and (part.stop is None or first < part.stop):
                event.wait(torch.cuda.current_stream(self.device))

    def late(self, work: Callable[[], None], *used: Tensor) -> None:
        """What ``work`` launches runs beside what comes after."""
        with self._beside(1, used):
            work()

    @contextmanager
    def _beside(self, number: int, used: tuple[Tensor, ...]) -> Iterator[None]:
        if not self._on_gpu:
            yield
            return
        stream = self._streams[number]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            yield
        for tensor in used:
            tensor.record_stream(stream)
