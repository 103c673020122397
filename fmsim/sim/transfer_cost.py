"""How long a gather of rows from host memory takes on an idle link: a fixed cost, then a rate that
depends on the rows.
"""

from __future__ import annotations

import bisect
import math

import numpy as np
from numpy.typing import NDArray

from fmsim.hw.spec import Gather, Link

NVME_READ_BYTES = 4096  # the least that a drive reads
# Of one read of a TLC drive: 70 to 100 us by data-centre drives' datasheets. Reads of one layer's
# misses are under way together.
NVME_LATENCY_S = 90e-6


def nvme_read_bytes(row_bytes: float) -> float:
    """What a drive reads for a row at a random place: whole units."""
    return math.ceil(row_bytes / NVME_READ_BYTES) * NVME_READ_BYTES


class GatherCurve:
    """Measured rates, interpolated.

    For one row size the measured points give time against bytes, taken as piecewise linear: the
    first segment, drawn back to zero bytes, gives the fixed cost of a gather, so a handful of rows
    costs that and little more. Between row sizes both are interpolated over the logarithm of the
    size; outside the measured sizes the nearest one holds.
    """

    def __init__(self, link: Link) -> None:
        gathers = sorted(link.gathers, key=lambda gather: gather.row_bytes)
        self._bytes_per_s = link.bandwidth_bytes_per_s.value
        self._log_rows = [math.log(gather.row_bytes) for gather in gathers]
        self._curves = [_time_curve(gather, link) for gather in gathers]
        self._points: dict[float, tuple[list[float], ...]] = {}
        self._of_rows: dict[float, tuple[np.ndarray, np.ndarray]] = {}

    def fixed_s(self, row_bytes: float) -> float:
        """Time before the first byte: launch, and the latency of host memory."""
        return float(self._curve(row_bytes)[1][0])

    def seconds(self, row_bytes: float, n_bytes: np.ndarray | float) -> np.ndarray:
        """Time of gathers of `n_bytes` each in rows of `row_bytes`; 0 where there is nothing to
        move, and never faster than the link.
        """
        n_bytes = np.asarray(n_bytes, dtype=np.float64)
        gathered = _extended(n_bytes, *self._curve(row_bytes))
        gathered = np.maximum(gathered, n_bytes / self._bytes_per_s)
        return np.where(n_bytes > 0, gathered, 0.0)

    def one_s(self, row_bytes: float, n_bytes: float) -> float:
        """`seconds` of one gather, without an array."""
        if n_bytes <= 0:
            return 0.0
        if row_bytes not in self._points:
            self._points[row_bytes] = tuple(part.tolist() for part in self._curve(row_bytes))
        at, seconds = self._points[row_bytes]
        high = min(max(bisect.bisect_right(at, n_bytes), 1), len(at) - 1)
        slope = (seconds[high] - seconds[high - 1]) / (at[high] - at[high - 1])
        gathered = seconds[high - 1] + slope * (n_bytes - at[high - 1])
        return max(gathered, n_bytes / self._bytes_per_s)

    def _curve(self, row_bytes: float) -> tuple[np.ndarray, np.ndarray]:
        """(bytes, seconds) for one row size: the two nearest measured curves, at all their points,
        weighted.
        """
        if row_bytes not in self._of_rows:
            position = np.interp(math.log(row_bytes), self._log_rows, range(len(self._curves)))
            low = max(0, min(int(position), len(self._curves) - 2))
            share = float(position) - low
            near = self._curves[low : low + 2]
            weights = (1 - share, share)[: len(near)]
            at = np.unique(np.concatenate([points for points, _ in near]))
            at = np.append(at, 2 * at[-1])  # so that the last segments go on, both of them
            seconds = sum(weight * _extended(at, *curve) for weight, curve in zip(weights, near))
            self._of_rows[row_bytes] = at, np.asarray(seconds)
        return self._of_rows[row_bytes]


def _time_curve(gather: Gather, link: Link) -> tuple[np.ndarray, np.ndarray]:
    """(bytes, seconds) of the measured points, led by (0, fixed cost); what lies above the fixed
    cost is divided by the link's speedup.

    No point took less than the fixed cost and its bytes at the rate of the link that was measured,
    which a first segment that falls, within the measurement's noise, would say.
    """
    rows = np.array(sorted(gather.bytes_per_s))
    n_bytes = rows * float(gather.row_bytes)
    seconds = n_bytes / np.array([gather.bytes_per_s[row] for row in rows])
    slope = (seconds[1] - seconds[0]) / (n_bytes[1] - n_bytes[0])
    measured_bytes_per_s = link.bandwidth_bytes_per_s.value / link.gather_speedup
    beside_s = (seconds - n_bytes / measured_bytes_per_s).min()
    fixed_s = max(0.0, min(seconds[0] - slope * n_bytes[0], beside_s))
    moving_s = (seconds - fixed_s) / link.gather_speedup
    return np.append(0.0, n_bytes), np.append(fixed_s, fixed_s + moving_s)


def _extended(x: np.ndarray, xs: np.ndarray, ys: np.ndarray) -> NDArray[np.float64]:
    """Piecewise linear through the points, the last segment going on."""
    beyond = np.maximum(x - xs[-1], 0.0) * (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])
    seconds: NDArray[np.float64] = np.interp(x, xs, ys) + beyond
    return seconds
