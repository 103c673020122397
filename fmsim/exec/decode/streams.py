"""Streams beside a step's own, so that what is appended and the queries run beside what comes then.

On a CPU everything happens at once, in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from functools import cache

import torch


class SideStream(Enum):
    """What runs beside a step's own stream, by its priority: the least goes first.

    What is appended is little and waited for soon. Queries fill the GPU, so all else goes first.
    """

    APPEND = -3
    QUERIES = 0


STEP_PRIORITY = -2  # of a step's own stream, where a CUDA graph holds it


@cache
def _side_stream(device: torch.device, side: SideStream) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=side.value)


@contextmanager
def beside(device: torch.device, side: SideStream) -> Iterator[None]:
    """On a GPU, what is launched within runs beside what comes after, until `wait_beside`."""
    if device.type != "cuda":
        yield
        return
    stream = _side_stream(device, side)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield


def wait_beside(device: torch.device, side: SideStream) -> None:
    """What comes after waits for what runs `beside`."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(_side_stream(device, side))
