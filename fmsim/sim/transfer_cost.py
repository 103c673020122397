"""How long a gather of rows from host memory takes on an idle link: a fixed cost, then a rate that
depends on the rows.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fmsim.hw.spec import Gather, Link


class GatherCurve:
    """Measured rates, interpolated.

    For one row size the measured points give time against bytes, taken as piecewise linear: the
    first segment, drawn back to zero bytes, gives the fixed cost of a gather, so a handful of rows
    costs that and little more. Between row sizes both are interpolated over the logarithm of the
    size; outside the measured sizes the nearest one holds.
    """

    def __init__(self, link: Link) -> None:
        gathers = sorted(link.gathers, key=lambda gather: gather.row_bytes)
        self._log_rows = [math.log(gather.row_bytes) for gather in gathers]
        self._curves = [_time_curve(gather, link.gather_speedup) for gather in gathers]

    def fixed_s(self, row_bytes: float) -> float:
        """Time before the first byte: launch, and the latency of host memory."""
        low, high, share = self._place(row_bytes)
        return self._fixed(low) * (1 - share) + self._fixed(high) * share

    def seconds(self, row_bytes: float, n_bytes: np.ndarray | float) -> NDArray[np.float64]:
        """Time of gathers of `n_bytes` each in rows of `row_bytes`; 0 where there is nothing to
        move.
        """
        n_bytes = np.asarray(n_bytes, dtype=np.float64)
        low, high, share = self._place(row_bytes)
        below = _extended(n_bytes, *self._curves[low])
        above = _extended(n_bytes, *self._curves[high])
        return np.where(n_bytes > 0, below * (1 - share) + above * share, 0.0)

    def _place(self, row_bytes: float) -> tuple[int, int, float]:
        """The curves of the row sizes measured below and above, and the second one's share."""
        position = float(np.interp(math.log(row_bytes), self._log_rows, range(len(self._log_rows))))
        low = min(int(position), len(self._curves) - 2)
        return low, low + 1, position - low

    def _fixed(self, curve: int) -> float:
        _, seconds = self._curves[curve]
        return float(seconds[0])


def _time_curve(gather: Gather, speedup: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(bytes, seconds) of the measured points, led by (0, fixed cost); what lies above the fixed
    cost is divided by `speedup`.
    """
    rows = np.array(sorted(gather.bytes_per_s))
    n_bytes = rows * float(gather.row_bytes)
    seconds = n_bytes / np.array([gather.bytes_per_s[row] for row in rows])
    slope = (seconds[1] - seconds[0]) / (n_bytes[1] - n_bytes[0])
    fixed_s = seconds[0] - slope * n_bytes[0]
    return np.append(0.0, n_bytes), np.append(fixed_s, fixed_s + (seconds - fixed_s) / speedup)


def _extended(
    x: NDArray[np.float64], xs: NDArray[np.float64], ys: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Piecewise linear through the points, the last segment going on."""
    beyond: NDArray[np.float64] = (
        np.maximum(x - xs[-1], 0.0) * (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])
    )
    return np.interp(x, xs, ys) + beyond
