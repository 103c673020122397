"""Tables that fit their terminal: what matters least is left out first, and nothing is cut."""

from __future__ import annotations

import difflib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from fmsim.errors import FmsimError, shown

Cell = str | Text


class UnknownColumn(FmsimError):
    """--columns names what no table has."""


BOUNDLESS = 10_000  # columns
HEIGHT = 100  # rich goes by a dumb terminal's own 80 columns unless both are given


@dataclass(frozen=True)
class Field:
    """A column. Those of rank 0 always stand; of the others the highest go first."""

    heading: str  # a line break in it makes it narrower
    rank: int = 0
    justify: Literal["left", "right"] = "right"
    wraps: int = 0  # a text that may take several lines, each at least so wide; 0: one line
    names_row: bool = False  # it stays whatever --columns asks for, as the first field does

    @property
    def key(self) -> str:
        """Its name for --columns: "on GPU\\nGiB" is on-gpu-gib, "stall*" is stall."""
        return re.sub(r"[^a-z0-9]+", "-", self.heading.lower().replace("'", "")).strip("-")


@dataclass(frozen=True)
class View:
    """How much of a table is shown, and where."""

    width: int | None = None  # columns there are; None: as many as it takes
    columns: tuple[str, ...] = ()  # keys of fields, instead of those that fit

    @classmethod
    def of_terminal(cls, wide: bool = False, columns: str | None = None) -> View:
        """What a terminal has room for. A pipe or a file always gets all, so that what reads it
        does not depend on a window.
        """
        named = tuple(part.strip() for part in (columns or "").split(",") if part.strip())
        console = Console()
        return cls(console.width if console.is_terminal and not wide else None, named)


ALL = View()


@dataclass
class Grid:
    """Rows of cells, a field each."""

    fields: Sequence[Field]
    rows: list[tuple[Cell, ...] | None] = field(default_factory=list)  # None: a line between

    def add(self, *cells: Cell) -> None:
        self.rows.append(cells)

    def part(self) -> None:
        """A line, then what follows."""
        self.rows.append(None)

    def table(self, view: View) -> Table:
        """The fields that fit, or that were asked for."""
        return self._table(self._places(view))

    def markdown(self, view: View) -> str:
        """The same for a page in Markdown; a row with a label alone is a heading within it."""
        check_columns(view, [self])
        places = self._places(view)
        fields = [self.fields[place] for place in places]
        lines = [
            [one.heading.replace("\n", " ") for one in fields],
            ["---:" if one.justify == "right" else "---" for one in fields],
        ]
        for row in filter(None, self.rows):
            cells = [str(row[place]).strip() if place < len(row) else "" for place in places]
            lines.append([cell.replace("|", "\\|") for cell in cells])
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def left_out(self, view: View) -> list[str]:
        """Keys of the fields that `table` has no room for."""
        places = self._places(view)
        return [one.key for place, one in enumerate(self.fields) if place not in places]

    def _places(self, view: View) -> list[int]:
        every = range(len(self.fields))
        if view.columns:
            return [place for place in every if self._asked(place, view.columns)]
        if view.width is None:
            return list(every)
        kept = [place for place in every if self.fields[place].rank == 0]
        for place in sorted(every, key=lambda place: self.fields[place].rank):
            wider = sorted({*kept, place})
            if width_of(self._table(wider, narrow=True)) <= view.width:
                kept = wider
        return kept

    def _asked(self, place: int, keys: Sequence[str]) -> bool:
        one = self.fields[place]
        return one.key in keys or place == 0 or one.names_row

    def _table(self, places: Sequence[int], narrow: bool = False) -> Table:
        """With `narrow`, texts that may wrap are as narrow as they may be."""
        table = Table(header_style="bold", pad_edge=False)
        for place in places:
            one = self.fields[place]
            table.add_column(
                one.heading,
                justify=one.justify,
                width=one.wraps if narrow and one.wraps else None,
                # of the others only a label wider than the terminal by itself is ever folded
                no_wrap=place != 0 and not one.wraps,
                overflow="fold",
            )
        for row in self.rows:
            if row is None:
                table.add_section()
            else:
                table.add_row(*(row[place] if place < len(row) else "" for place in places))
        return table


def width_of(shown: RenderableType) -> int:
    """Columns that it takes."""
    return Console(width=BOUNDLESS, height=HEIGHT).measure(shown).maximum


def check_columns(view: View, grids: Sequence[Grid]) -> None:
    """Refuse --columns that no table has."""
    known = list(dict.fromkeys(one.key for grid in grids for one in grid.fields))
    for name in view.columns:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            fix = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}"
            raise UnknownColumn(f"--columns: no column '{shown(name)}'; {fix}")


def picture(parts: Sequence[RenderableType | Grid], title: str) -> str:
    """All of it as an SVG."""
    shown = laid_out(parts, ALL)
    console = Console(
        record=True,
        width=max(width_of(part) for part in shown if isinstance(part, Table)),
        height=HEIGHT,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
        no_color=False,  # whatever the terminal at hand is asked for
    )
    for part in shown:
        console.print(part)
    return console.export_svg(title=title)


def show_parts(parts: Sequence[RenderableType | Grid], view: View) -> None:
    """Print texts and grids to standard output, and say what there was no room for."""
    # in a pipe no text is wrapped
    console = Console(highlight=False, width=view.width or BOUNDLESS, height=HEIGHT)
    for part in laid_out(parts, view):
        console.print(part)


def laid_out(parts: Sequence[RenderableType | Grid], view: View) -> list[RenderableType]:
    """The parts as rich prints them."""
    grids = [part for part in parts if isinstance(part, Grid)]
    check_columns(view, grids)
    found: list[RenderableType] = []
    for part in parts:
        if isinstance(part, Grid):
            if view.columns and not any(one.key in view.columns for one in part.fields):
                continue
            found.append(part.table(view))
            absent = [] if view.columns else part.left_out(view)
            if absent:
                told = f"no room for {', '.join(absent)}: --wide, --columns A,B"
                found.append(Text(told, style="dim"))
        else:
            found.append(part)
    return found
