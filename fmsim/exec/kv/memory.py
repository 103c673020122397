"""What a cache takes of a GPU's memory and of the host's, checked before it is allocated."""

from __future__ import annotations

import torch

from fmsim.errors import FmsimError
from fmsim.units import gib


def check_memory(device: torch.device, device_bytes: int, host_bytes: int) -> None:
    """Raise FmsimError with the figure that is short, before anything is allocated."""
    if device.type == "cuda":
        free_bytes = torch.cuda.mem_get_info(device)[0]
        _check(
            "GPU memory for resident entries",
            device_bytes,
            free_bytes,
            "lower --context, --batch or the policy's budget",
        )
    else:
        host_bytes += device_bytes
    free_bytes = host_free_bytes()
    if free_bytes is not None:
        _check("host memory for the cache", host_bytes, free_bytes, "lower --context or --batch")


def _check(what: str, needed_bytes: int, free_bytes: int, fix: str) -> None:
    if needed_bytes > free_bytes:
        raise FmsimError(
            f"{what}: {gib(needed_bytes)} are needed,"
            f" {gib(needed_bytes - free_bytes)} more than the {gib(free_bytes)}"
            f" that are free; {fix}"
        )


def host_free_bytes() -> int | None:
    """Memory that can be had without swapping, as Linux tells; None elsewhere."""
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
