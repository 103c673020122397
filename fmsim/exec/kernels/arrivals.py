"""How the last program of several finds out that it is the last: each adds one to a number that is
zero before a launch and after it.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 4096  # numbers of one launch
STREAMS = 256  # of a device, that have numbers of their own: torch has 32 of each priority

_numbers: dict[torch.device, Tensor] = {}
_places: dict[tuple[torch.device, int], int] = {}


def arrivals(device: torch.device) -> Tensor:
    """int32 [MOST], zero, as a launch leaves them. Launches of one stream share them, for they
    follow one another, be they captured in a CUDA graph or not.
    """
    numbers, stream = _numbers.get(device), 0
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device).cuda_stream
        if numbers is None and torch.cuda.is_current_stream_capturing():
            # set to zero at each replay, since a graph's memory may be another's before
            return torch.zeros(MOST, dtype=torch.int32, device=device)
    if numbers is None:
        numbers = torch.zeros(STREAMS, MOST, dtype=torch.int32, device=device)
        _numbers[device] = numbers
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # other streams may use it at once
    if (device, stream) not in _places:
        _places[device, stream] = sum(other == device for other, _ in _places)
    place = _places[device, stream]
    assert place < STREAMS, "two streams would share their numbers, and wait for each other's"
    return numbers[place]
