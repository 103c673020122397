"""Where tables go."""

from rich.console import Console


def wide_console(columns: int) -> Console:
    """Standard output, taken to be at least `columns` wide: figures are never cut, and a narrow
    terminal wraps lines.
    """
    console = Console(highlight=False)
    return Console(width=max(columns, console.width), highlight=False)
