"""What happened on a server: its requests, where the time went, and samples of what was in use."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from fmsim.sim.serving.batch import ServedRequest

SAMPLE = ("t_s", "running", "admitted", "waiting", "gpu_bytes", "host_bytes", "h2d_bytes", "tokens")


@dataclass
class Log:
    """Times in seconds, sums over the whole run."""

    requests: list[ServedRequest] = field(default_factory=list)
    tokens: int = 0  # made, by prefill or decode
    busy_s: float = 0.0  # some request decodes or is prefilled here; the four below are part of it
    stall_s: float = 0.0  # waiting for misses
    recall_wait_s: float = 0.0  # waiting for recalls that were late
    prefix_wait_s: float = 0.0  # waiting for prefixes that were on the host
    prefill_s: float = 0.0
    written_back_bytes: float = 0.0  # to the mirror; nothing waits for them
    waits_for: str | None = None  # what the queue's head cannot get now
    waited_s: defaultdict[str, float] = field(
        default_factory=lambda: defaultdict(float)
    )  # how long it was refused, by what
    samples: list[tuple[float, ...]] = field(default_factory=list)  # of SAMPLE, in time's order
    _now_s: float = 0.0

    def pass_to(self, now_s: float, busy: bool) -> None:
        """Book the time since the last call."""
        elapsed_s, self._now_s = now_s - self._now_s, now_s
        if busy:
            self.busy_s += elapsed_s
        if self.waits_for:
            self.waited_s[self.waits_for] += elapsed_s

    def mean_in_use(self, name: str) -> float:
        """Mean over time of a sampled quantity, which holds until the next sample."""
        table = np.array(self.samples)
        held_s = np.diff(table[:, 0])
        return (
            float(table[:-1, SAMPLE.index(name)] @ held_s / held_s.sum()) if held_s.sum() else 0.0
        )

    def most(self, name: str) -> float:
        return float(max(sample[SAMPLE.index(name)] for sample in self.samples))

    def tokens_by(self, now_s: float) -> float:
        """Tokens made by then."""
        table = np.array(self.samples)
        return float(np.interp(now_s, table[:, 0], table[:, SAMPLE.index("tokens")]))


def over_time(logs: list[Log], n_points: int) -> dict[str, list[float]]:
    """The samples of all servers on an even grid; bytes and tokens, which are sums, as rates since
    the point before.
    """
    tables = [np.array(log.samples) for log in logs]
    grid_s = np.linspace(0.0, max(table[-1, 0] for table in tables), n_points)
    columns: dict[str, list[float]] = {"t_s": grid_s.tolist()}
    for place, name in enumerate(SAMPLE[1:], 1):
        total = np.zeros(n_points)
        for table in tables:
            if name in ("h2d_bytes", "tokens"):
                sums = np.interp(grid_s, table[:, 0], table[:, place])
                total += np.diff(sums, prepend=sums[0]) / max(grid_s[1], 1e-12)
            else:
                latest = np.searchsorted(table[:, 0], grid_s, side="right") - 1
                total += table[np.maximum(latest, 0), place]
        rate = name in ("h2d_bytes", "tokens")
        columns[f"{name}_per_s" if rate else name] = total.tolist()
    return columns
