"""How far a command is: what its callers may show while it runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from fmsim.experiments.workers.parallel import tell

log = logging.getLogger("fmsim")

# (what is being worked on, how many are done, of how many); half a policy counts as 0.5
Progress = Callable[[str, float, int], None]


def silent(label: str, done: float, total: int) -> None:
    """Shows nothing."""


class Tally:
    """How far several pieces of work are together, which are done side by side.

    Called with the number of one and its share that is done, as `parallel.in_parallel` calls it.
    `labels` may still grow while the work goes on.
    """

    def __init__(self, labels: Sequence[str], total: int, progress: Progress) -> None:
        self.labels = labels
        self.total = total
        self.progress = progress
        self.shares: dict[int, float] = {}
        self.start_s = time.monotonic()

    def __call__(self, index: int, share: float) -> None:
        self.shares[index] = share
        done = sum(self.shares.values())
        self.progress(self.labels[index], done, self.total)
        if share == 1.0:
            spent_s = time.monotonic() - self.start_s
            ended = sum(one == 1.0 for one in self.shares.values())
            label = self.labels[index]
            log.info("%s ended after %.2f s; %d of %d", label, spent_s, ended, self.total)


class StepsTold:
    """Tells which share of a piece of work is done, where `n_steps` take it from `start` to `end`
    of it.
    """

    def __init__(self, n_steps: int, start: float = 0.0, end: float = 1.0) -> None:
        self.n_steps = n_steps
        self.start = start
        self.end = end
        self.done = 0

    def advance(self, steps: int = 1) -> None:
        """So many further steps are done."""
        self.done += steps
        part = min(1.0, self.done / max(1, self.n_steps))
        tell(self.start + (self.end - self.start) * part)

    def watch(self, manager: Any) -> None:
        """One further step is done: a watcher of `Replayer.run`."""
        self.advance()
