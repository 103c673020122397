"""From values to pixels, and where an axis is marked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

DIGITS = (1, 2, 5)  # that marks begin with


@dataclass(frozen=True)
class ChartAxis:
    """What an axis shows. `low` and `high` are taken from the values where they are None."""

    title: str
    text: Callable[[float], str] = lambda value: f"{value:g}"
    log: bool = False
    low: float | None = None
    high: float | None = None
    at: Sequence[float] = ()  # marks, instead of round numbers


@dataclass(frozen=True)
class Scale:
    """An axis between two pixels."""

    axis: ChartAxis
    low: float
    high: float
    start: float  # pixel of `low`
    end: float

    def __call__(self, value: float) -> float:
        low, high, value = (self._linear(one) for one in (self.low, self.high, value))
        share = 0.5 if high == low else (value - low) / (high - low)
        return self.start + share * (self.end - self.start)

    def _linear(self, value: float) -> float:
        return math.log10(max(value, 1e-12)) if self.axis.log else value

    def marks(self, most: int) -> list[float]:
        """At most about so many, at round numbers."""
        if self.axis.at:
            found = [mark for mark in self.axis.at if self.low <= mark <= self.high]
            return found[:: math.ceil(len(found) / most)] if found else found
        return _log_marks(self.low, self.high, most) if self.axis.log else self._marks(most)

    def _marks(self, most: int) -> list[float]:
        span = self.high - self.low
        if span <= 0:
            return [self.low]
        raw = span / max(1, most)
        size = 10.0 ** math.floor(math.log10(raw))
        step = next(digit * size for digit in (*DIGITS, 10) if digit * size >= raw)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def _log_marks(low: float, high: float, most: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 1.5, 2, 3, 5, 7), DIGITS, (1, 3), (1,)):
        marks = [digit * 10.0**decade for decade in decades for digit in digits]
        found = [mark for mark in marks if low <= mark <= high]
        if len(found) <= most:
            return found if len(found) > 1 else [low, high]
    every = math.ceil(len(found) / most)
    return found[::every]


def scale(axis: ChartAxis, values: Sequence[float], start: float, end: float) -> Scale:
    """An axis for `values`, with a little room around those that set its ends."""
    known = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(known), max(known)
    if axis.log:
        low, high = max(low, 1e-9), max(high, 1e-9)
        room = max(1.08, (high / low) ** 0.06)
        low, high = low / room, high * room
    else:
        room = 0.05 * (high - low) or 0.5 * abs(high) or 0.5
        low, high = low - room, high + room
    low = low if axis.low is None else axis.low
    high = high if axis.high is None else axis.high
    return Scale(axis, low, max(high, low * (1 + 1e-9)), start, end)
