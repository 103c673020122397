"""Progress on standard error: a bar on a terminal; elsewhere a plain line every few seconds."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
# what is being done, how much of it is, and of how much: None where that is not known yet
Show = Callable[[str, float, int | None], None]

LINE_EVERY_S = 5.0


@contextmanager
def bar(what: str, total: int | None = None, unit: str = "", quiet: bool = False) -> Iterator[Show]:
    """Show what is being done while the block runs, how far it is, and how long it may still take.

    Gives a function to be called with (label, done, total). ``unit`` is what is counted. ``quiet``
    shows nothing; under --verbose there are lines, so that they and the log stand in one order.
    """
    if quiet:
        yield lambda label, done, total: None
    elif sys.stderr.isatty() and not logging.getLogger("fmsim").isEnabledFor(logging.INFO):
        with _drawn(what, total, unit) as show:
            yield show
    else:
        lines = PlainLines(what, total, unit)
        with _ticking(lines.tick):
            yield lines.show


@contextmanager
def token_bar(total: int, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """The same while tokens are read and decoded; gives ``advance(tokens)``."""
    what, done = "reading and decoding", 0
    with bar(what, total, " tokens", quiet) as show:

        def advance(tokens: int) -> None:
            nonlocal done
            done += tokens
            show(what, done, total)

        yield advance


def track(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """``items``, with a bar; ``total`` where they have no length."""
    # only items with a length come without a total
    n = len(items) if total is None else total  # type: ignore[arg-type]
    with bar(what, n) as show:
        for done, item in enumerate(items, 1):
            yield item
            show(what, done, n)


@contextmanager
def _drawn(what: str, total: int | None, unit: str) -> Iterator[Show]:
    """A bar of rich's."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total, count=_count(0, total, unit))
        yield lambda label, done, n: progress.update(
            task, description=label, completed=done, total=n, count=_count(done, n, unit)
        )


def _count(done: float, total: int | None, unit: str) -> str:
    return "" if total is None else f"{int(done):,} of {total:,}{unit}"


class PlainLines:
    """Says how far something is, in one line every few seconds."""

    def __init__(
        self, what: str, total: int | None, unit: str = "", every_s: float = LINE_EVERY_S
    ) -> None:
        self.state = (what, 0.0, total)
        self.unit = unit
        self.every_s = every_s
        self.start_s = time.monotonic()
        self.told_s, self.told_done = self.start_s, 0.0  # at the last line

    def show(self, label: str, done: float, total: int | None) -> None:
        self.state = (label, done, total)

    def tick(self) -> None:
        """Say it, if it is time to."""
        now_s = time.monotonic()
        if now_s - self.told_s >= self.every_s:
            # no lock is held that a process forked now would inherit
            os.write(2, f"{self.line(now_s)}\n".encode())
            self.told_s, self.told_done = now_s, self.state[1]

    def line(self, now_s: float) -> str:
        """Such as "lru: 3 of 20 (17%) in 12 s, about 58 s left", at the rate since the last line:
        a prompt is read faster than tokens are decoded.
        """
        label, done, total = self.state
        spent_s = now_s - self.start_s
        if not total:
            return f"{label}: {spent_s:.0f} s"
        told = f"{label}: {_count(done, total, self.unit)} ({done / total:.0%}) in {spent_s:.0f} s"
        done_since, spent_since_s = done - self.told_done, now_s - self.told_s
        if done_since <= 0:
            done_since, spent_since_s = done, spent_s
        left_s = spent_since_s * (total - done) / done_since if done else 0.0
        return f"{told}, about {left_s:.0f} s left" if left_s else told


@contextmanager
def _ticking(tick: Callable[[], None], every_s: float = 0.5) -> Iterator[None]:
    """Call ``tick`` now and then while the block runs, however long a step of it takes."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(every_s):
            tick()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
