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


def sized(n_bytes: float) -> str:
    """``n_bytes`` as text in the unit that suits them, to three digits or more: "0.325 GiB",
    "21.2 MiB", "512 B".
    """
    if n_bytes >= GIB / 10:
        return gib(n_bytes, 3)
    if n_bytes >= MIB / 10:
        return mib(n_bytes, 1 if n_bytes >= 10 * MIB else 3)
    return f"{n_bytes / KIB:.2f} KiB" if n_bytes >= KIB else f"{n_bytes:.0f} B"


def bytes_of(text: str) -> int | None:
    """Bytes that a text such as "16GiB", "1.5 MB" or "4096" says; None where it says none."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or (match[2] or "B").upper() not in BYTE_UNITS:
        return None
    return int(float(match[1]) * BYTE_UNITS[(match[2] or "B").upper()])
