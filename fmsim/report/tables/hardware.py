"""What is said of a server above every table."""

from __future__ import annotations

from typing import Any

from fmsim.units import GIB


def hardware_line(hardware: dict[str, Any]) -> str:
    """Its GPU, how the model lies on it, and what is left for KV; a pool that nobody measured is
    called a guess.
    """
    placed = hardware["deployment"]
    title = placed if isinstance(placed, str) else placed["title"]
    weights = hardware["weight_bytes_per_gpu"] / GIB
    pool = hardware["kv_pool"]
    left = "no room for KV"
    if pool is not None:
        guess = " (a guess)" if pool["guess"] else ""
        left = f"{pool['bytes_per_gpu'] / GIB:.1f} GiB for KV{guess}"
    line = f"{hardware['title']}, {title}; on each GPU {weights:.1f} GiB of weights, {left}"
    if "kv_parts" in hardware:
        line += f"; KV heads on {hardware['kv_parts']} GPUs, bytes are of one"
    scaled = hardware.get("kernels_stand_in")
    return line if scaled is None else f"{line}; {scaled}"
