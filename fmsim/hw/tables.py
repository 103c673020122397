"""Kernel times by GPU and engine, from `tables/*.json`, which benchmarks/hw_tables made.

All times in milliseconds. Sizes are tokens: of a decode step (requests) or of a prefill's chunk.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """Measured times by size: linear between sizes, the last slope going on beyond them."""

    at: np.ndarray  # [n] ascending
    ms: np.ndarray  # [n]

    @classmethod
    def of(cls, points: Mapping[Any, Any]) -> Curve:
        """From {size: ms}, or from a file's {"at": sizes, "ms": times}."""
        if "at" in points:
            return cls(np.array(points["at"], dtype=float), np.array(points["ms"], dtype=float))
        sizes: list[float] = sorted(points)
        times = [points[size] for size in sizes]
        return cls(np.array(sizes, dtype=float), np.array(times, dtype=float))

    def __call__(self, size: np.ndarray | float) -> Floats:
        beyond = np.maximum(np.asarray(size) - self.at[-1], 0.0)
        ms: Floats = np.interp(size, self.at, self.ms) + beyond * self._slope
        return ms

    @cached_property
    def _slope(self) -> float:
        if len(self.at) < 2:
            return 0.0
        return max(0.0, float((self.ms[-1] - self.ms[-2]) / (self.at[-1] - self.at[-2])))

    def one(self, size: float) -> float:
        """At one size, without arrays."""
        at, ms = self._lists
        high = bisect.bisect_right(at, size)
        if high == 0:
            return ms[0]
        if high == len(at):
            return ms[-1] + (size - at[-1]) * self._slope
        share = (size - at[high - 1]) / (at[high] - at[high - 1])
        return ms[high - 1] + share * (ms[high] - ms[high - 1])

    @cached_property
    def _lists(self) -> tuple[list[float], list[float]]:
        return self.at.tolist(), self.ms.tolist()

    def scaled(self, factor: float) -> Curve:
        return Curve(self.at, self.ms * factor)


NOTHING = Curve(np.array([1.0]), np.array([0.0]))


@dataclass(frozen=True)
class CrowdTimes:
    """What longer contexts add to a batch, where that was measured: linear between batches and
    between contexts, and the last slopes go on.
    """

    batches: np.ndarray  # [b] ascending
    contexts: np.ndarray  # [c] ascending; nothing is added at the first
    grown_ms: np.ndarray  # [b, c]

    def __call__(self, batch: int, context: np.ndarray) -> Floats:
        """[T], of `batch` requests of `context` tokens [T]."""
        last = self.batches[-1]
        low, share = _between(np.array([min(batch, last)]), self.batches)
        line = self.grown_ms[low[0]] * (1 - share[0]) + self.grown_ms[low[0] + 1] * share[0]
        if batch > last:
            slope = (self.grown_ms[-1] - self.grown_ms[-2]) / (last - self.batches[-2])
            line = line + np.maximum(slope, 0.0) * (batch - last)
        return Curve(self.contexts, line)(context)


@dataclass(frozen=True)
class AttentionTimes:
    """One layer's decode module.

    Short contexts stand in a grid with every batch. A longer context adds what it added at batch 1
    (`grown`), and each token of the other requests beyond the grid adds `token_ns`; or, where
    crowds of longer contexts were measured, what these add. A context of up to `padded_tokens`
    takes what the next power of two takes, at which such contexts should be measured.
    """

    contexts: np.ndarray  # [c] tokens
    batches: np.ndarray  # [b] requests
    short_ms: np.ndarray  # [c, b]
    grown: Curve  # by tokens of the longest context; 0 at the grid's last one
    token_ns: float
    crowd: CrowdTimes | None = None
    padded_tokens: float = 0.0

    @classmethod
    def of(cls, table: Mapping[str, Any], token_ns: float) -> AttentionTimes:
        return cls(
            contexts=np.array(table["context"], dtype=float),
            batches=np.array(table["batch"], dtype=float),
            short_ms=np.array(table["short_ms"]),
            grown=Curve(np.array(table["grown_at"], dtype=float), np.array(table["grown_ms"])),
            token_ns=token_ns,
        )

    def mean(self, other: AttentionTimes, share: float) -> AttentionTimes:
        """``share`` of layers like this and the rest like ``other``, on this one's grid."""
        rest = 1 - share
        at = np.union1d(self.grown.at, other.grown.at)
        lines = np.array([other.of_batch(int(batch)) for batch in self.batches]).T  # [c', b]
        on_grid = np.array([np.interp(self.contexts, other.contexts, line) for line in lines.T]).T
        return AttentionTimes(
            contexts=self.contexts,
            batches=self.batches,
            short_ms=share * self.short_ms + rest * on_grid,
            grown=Curve(at, share * self.grown(at) + rest * other.grown(at)),
            token_ns=share * self.token_ns + rest * other.token_ns,
        )

    def of_batch(self, batch: int) -> np.ndarray:
        """[c] ms at each short context; beyond the largest batch the last slope goes on."""
        return np.array([float(Curve(self.batches, line)(batch)) for line in self.short_ms])

    def ms(
        self, of_batch: np.ndarray, batch: int, total: np.ndarray, largest: np.ndarray
    ) -> Floats:
        """[T], of `batch` requests with `total` tokens [T], the longest with `largest` [T].

        `of_batch`: what `of_batch(batch)` gave, which a caller keeps.
        """
        short = np.interp(total / batch, self.contexts, of_batch) + self._padding_ms(largest)
        if self.crowd is not None and batch > 1:
            added = np.maximum(self.grown(largest), self.crowd(batch, total / batch))
            crowded: Floats = short + added
            return crowded
        others = np.maximum(total - largest - (batch - 1) * self.contexts[-1], 0.0)
        ms: Floats = short + self.grown(largest) + others * self.token_ns / 1e6
        return ms

    def _padding_ms(self, context: np.ndarray) -> Floats:
        """[T]: what a context of so many tokens [T] takes more than the line between those that
        were measured.
        """
        if not self.padded_tokens:
            return np.zeros(np.shape(context))
        padded = np.exp2(np.ceil(np.log2(np.maximum(context, 1.0))))
        more = self.grown(padded) - self.grown(context)
        ms: Floats = np.where(padded <= self.padded_tokens, more, 0.0)
        return ms


@dataclass(frozen=True)
class PrefillTimes:
    """One layer's prefill module: ms by the chunk's tokens and those before it."""

    chunks: np.ndarray  # [c]
    starts: np.ndarray  # [s]
    grid_ms: np.ndarray  # [c, s]

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> PrefillTimes:
        return cls(
            np.array(table["chunk"], dtype=float),
            np.array(table["start"], dtype=float),
            np.array(table["ms"]),
        )

    def ms(self, chunk: np.ndarray, start: np.ndarray) -> Floats:
        """[n]: linear between measured chunks and starts. A chunk beyond the largest counts as
        several of those, one after another; one below the smallest takes as long as that one.
        """
        start = start + np.maximum(chunk - self.chunks[-1], 0.0) / 2
        low_c, share_c = _between(np.clip(chunk, self.chunks[0], self.chunks[-1]), self.chunks)
        low_s, share_s = _between(start, self.starts)  # beyond the last, its slope goes on
        lower = self._at(low_c, low_s) * (1 - share_s) + self._at(low_c, low_s + 1) * share_s
        upper = self._at(low_c + 1, low_s) * (1 - share_s)
        upper = upper + self._at(low_c + 1, low_s + 1) * share_s
        between = lower * (1 - share_c) + upper * share_c
        ms: Floats = between * np.maximum(1.0, chunk / self.chunks[-1])
        return ms

    def one_ms(self, chunk: float, start: float) -> float:
        """`ms` of one chunk, without arrays."""
        chunks, starts, grid = self._lists
        over = max(chunk - chunks[-1], 0.0)
        low_c, share_c = _one_between(min(max(chunk, chunks[0]), chunks[-1]), chunks)
        low_s, share_s = _one_between(start + over / 2, starts)
        lower, upper = grid[low_c], grid[low_c + 1]
        ms = (lower[low_s] * (1 - share_s) + lower[low_s + 1] * share_s) * (1 - share_c)
        ms += (upper[low_s] * (1 - share_s) + upper[low_s + 1] * share_s) * share_c
        return ms * max(1.0, chunk / chunks[-1])

    @cached_property
    def _lists(self) -> tuple[list[float], list[float], list[list[float]]]:
        return self.chunks.tolist(), self.starts.tolist(), self.grid_ms.tolist()

    def _at(self, chunk: np.ndarray, start: np.ndarray) -> Floats:
        ms: Floats = self.grid_ms[chunk, start]
        return ms


def _between(x: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The point below each x and the share of the way to the next one."""
    low = np.clip(np.searchsorted(points, x, side="right") - 1, 0, len(points) - 2)
    return low, (x - points[low]) / (points[low + 1] - points[low])


def _one_between(x: float, points: list[float]) -> tuple[int, float]:
    """`_between` of one x."""
    low = min(max(bisect.bisect_right(points, x) - 1, 0), len(points) - 2)
    return low, (x - points[low]) / (points[low + 1] - points[low])


@lru_cache(maxsize=32)
def load_table(gpu: str, engine: str) -> Mapping[str, Any] | None:
    """A table file's content; None where that engine was not timed on that GPU."""
    path = files("fmsim.hw") / "tables" / f"{gpu}-{engine}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def timed_engines(gpu: str) -> list[str]:
    """Engines whose kernels were timed on a GPU."""
    return [engine for engine in ("sglang", "vllm") if load_table(gpu, engine)]
