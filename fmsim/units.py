"""Amounts of memory as text, and back."""

from __future__ import annotations

import re

KIB = 2**10
MIB = 2**20
GIB = 2**30
TIB = 2**40
BYTE_UNITS = {
    "B": 1,
    "KIB": KIB,
    "MIB": MIB,
    "GIB": GIB,
    "TIB": TIB,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}


def gib(n_bytes: float, digits: int = 2) -> str:
    """``n_bytes`` as text, such as "1.50 GiB"."""
    return f"{n_bytes / GIB:.{digits}f} GiB"


def mib(n_bytes: float, digits: int = 2) -> str:
    """``n_bytes`` as text, such as "1.50 MiB"."""
    return f"{n_bytes / MIB:.{digits}f} MiB"


def bytes_of(text: str) -> int | None:
    """Bytes that a text such as "16GiB", "1.5 MB" or "4096" says; None where it says none."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or (match[2] or "B").upper() not in BYTE_UNITS:
        return None
    return int(float(match[1]) * BYTE_UNITS[(match[2] or "B").upper()])
