"""Progress on standard error; shows nothing where that is no terminal."""

from __future__ import annotations

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


@contextmanager
def token_bar(total: int) -> Iterator[Callable[[int], None]]:
    """A bar while tokens are read and decoded; gives ``advance(tokens)``."""
    with bar("reading and decoding", total) as show:
        yield lambda tokens: show(advance=tokens)


def track(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """``items``, with a bar; ``total`` where they have no length."""
    # only items with a length come without a total
    with bar(what, len(items) if total is None else total) as show:  # type: ignore[arg-type]
        for item in items:
            yield item
            show(advance=1)
