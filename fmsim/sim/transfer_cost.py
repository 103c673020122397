"""How long a gather of rows from host memory takes on an idle link: a fixed cost, then a rate that
depends on the rows.
"""

from __future__ import annotations

import math

import numpy as np

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
        return self._between_rows(row_bytes, [seconds[0] for _, seconds in self._curves])

    def seconds(self, row_bytes: float, n_bytes: np.ndarray | float) -> np.ndarray:
        """Time of gathers of `n_bytes` each in rows of `row_bytes`; 0 where there is nothing to
        move.
        """
        n_bytes = np.asarray(n_bytes, dtype=np.float64)
        alone = [_extended(n_bytes, *curve) for curve in self._curves]
        return np.where(n_bytes > 0, self._between_rows(row_bytes, alone), 0.0)

    def _between_rows(self, row_bytes: float, values: list) -> np.ndarray | float:
        position = np.interp(math.log(row_bytes), self._log_rows, range(len(values)))
        low = min(int(position), len(values) - 2)
        share = position - low
        return values[low] * (1 - share) + values[low + 1] * share


def _time_curve(gather: Gather, speedup: float) -> tuple[np.ndarray, np.ndarray]:
    """(bytes, seconds) of the measured points, led by (0, fixed cost); what lies above the fixed
    cost is divided by `speedup`.
    """
    rows = np.array(sorted(gather.bytes_per_s))
    n_bytes = rows * float(gather.row_bytes)
    seconds = n_bytes / np.array([gather.bytes_per_s[row] for row in rows])
    slope = (seconds[1] - seconds[0]) / (n_bytes[1] - n_bytes[0])
    fixed_s = seconds[0] - slope * n_bytes[0]
    return np.append(0.0, n_bytes), np.append(fixed_s, fixed_s + (seconds - fixed_s) / speedup)


def _extended(x: np.ndarray, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Piecewise linear through the points, the last segment going on."""
    beyond = np.maximum(x - xs[-1], 0.0) * (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])
    return np.interp(x, xs, ys) + beyond
