"""How figures are written in tables."""

from collections.abc import Mapping
from typing import Any

from rich.text import Text

NO_MASS = (
    "-: the trace has no attention masses (engines capture what was selected, not how much), so"
    " this cannot be known."
)


def kind_text(exact: bool | None, bound: bool) -> Text:
    """Whether a policy loses anything on this trace; a bound knows the future, and cannot be
    deployed whether or not it does.
    """
    if bound:
        return Text("bound", "dim")
    return Text("exact", "green") if exact else Text("lossy", "yellow")


def share_text(value: float | None) -> str:
    """A share as a percentage; a dash where it is not known."""
    return "-" if value is None else f"{value:.1%}"


def margin_text(half_width: float | None, digits: int = 1) -> str:
    """Half of a 95% interval's width as it stands behind its figure; blank, and as wide, where it
    is nothing or not known.
    """
    shown = "" if half_width is None else f"{half_width:.{digits}f}"
    return " " * 6 if not shown.strip("0.") else f" ±{shown:<4}"


def spread_text(interval: Mapping[str, Any] | None) -> str:
    """What stands behind a figure over contexts: half of its 95% interval's width in points; or how
    many came out alike, where all did, since equals have no spread.
    """
    if interval is None or interval["half_width"] is None:
        return ""
    if interval["alike"]:
        return f" ({interval['n']} alike)"
    return f" ±{100 * interval['half_width']:.1f}"


def estimate_text(value: float | None, half_width: float | None) -> str:
    """A share as a percentage, and in points how far it may be off."""
    points = None if half_width is None else 100 * half_width
    return "-" if value is None else share_text(value) + margin_text(points)
