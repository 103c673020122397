"""Progress on standard error: bars on a terminal; elsewhere, of what takes long, a line now and
then.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


@contextmanager
def bar(
    what: str, total: int | None = None, completed: int = 0, quiet: bool = False
) -> Iterator[Callable[..., None]]:
    """Show a bar while the block runs.

    Gives a function that takes what rich's `Progress.update` takes: ``completed``, ``advance``,
    ``total``, ``description``. ``total`` is None until it is known. ``quiet`` shows nothing.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    hidden = quiet or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task(what, total=total, completed=completed)
        yield lambda **changes: progress.update(task, **changes)


LINE_EVERY_S = 5.0  # of progress that goes into a pipe or a file


@contextmanager
def token_bar(total: int) -> Iterator[Callable[[int], None]]:
    """A bar while tokens are read and decoded, or lines where no terminal is; gives
    ``advance(tokens)``.
    """
    if sys.stderr.isatty():
        with bar("reading and decoding", total) as show:
            yield lambda tokens: show(advance=tokens)
    else:
        yield TokenLines(total).advance


class TokenLines:
    """Says every few seconds how many of ``total`` tokens are done."""

    def __init__(self, total: int, every_s: float = LINE_EVERY_S):
        self.total = total
        self.every_s = every_s
        self.done = 0
        self.start_s = time.monotonic()
        self.told_s = self.start_s

    def advance(self, tokens: int) -> None:
        self.done += tokens
        now_s = time.monotonic()
        if now_s - self.told_s < self.every_s:
            return
        self.told_s = now_s
        print(
            f"read and decoded {self.done:,} of {self.total:,} tokens in"
            f" {now_s - self.start_s:.0f} s",
            file=sys.stderr,
            flush=True,
        )


def track(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """``items``, with a bar; ``total`` where they have no length."""
    # only items with a length come without a total
    with bar(what, len(items) if total is None else total) as show:  # type: ignore[arg-type]
        for item in items:
            yield item
            show(advance=1)
