"""Names beside what they name, without overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LINE = 1.25  # height of a line of text, of its font size
WIDTH = 0.58  # of a character, of its font size: of most fonts a little more than the mean


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )

    def within(self, other: Box) -> bool:
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.top >= other.top
            and self.bottom <= other.bottom
        )


@dataclass(frozen=True)
class Point:
    """What is named: a disc."""

    x: float
    y: float
    radius: float
    text: str

    @property
    def box(self) -> Box:
        return Box(
            self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius
        )


@dataclass(frozen=True)
class Label:
    """Where a name stands: its left or right end (`anchor`) and the middle of its height."""

    x: float
    y: float
    anchor: str
    leads: bool  # so far from its point that a line leads to it


def text_width(text: str, font: float) -> float:
    return len(text) * WIDTH * font


def placed(
    points: Sequence[Point], font: float, inside: Box, obstacles: Sequence[Box] = ()
) -> list[Label | None]:
    """A label for each point, where no label meets another, a point, one of the `obstacles`, or
    the edge of `inside`.

    None where there is no such place: its point is then told by its shape and the table alone.
    Those high up come first, and each takes the free place nearest to its point.
    """
    taken = [*(point.box for point in points), *obstacles]
    found: dict[int, Label] = {}
    for number in sorted(range(len(points)), key=lambda number: points[number].y):
        for label in _candidates(points[number], font):
            box = _box(label, points[number].text, font)
            if box.within(inside) and not any(box.meets(one) for one in taken):
                found[number] = label
                taken.append(box)
                break
    return [found.get(number) for number in range(len(points))]


def _candidates(point: Point, font: float) -> list[Label]:
    """Right of it, with a line to it where it must be higher or lower; then left, above, below."""
    near = point.radius + 4
    height = LINE * font
    half = text_width(point.text, font) / 2
    offsets = [sign * step * height / 2 for step in range(1, 16) for sign in (-1, 1)]
    return [
        Label(point.x + near, point.y, "start", False),
        *(Label(point.x + near + 10, point.y + offset, "start", True) for offset in offsets[:14]),
        Label(point.x - near, point.y, "end", False),
        Label(point.x - half, point.y - point.radius - 0.7 * height, "start", False),
        Label(point.x - half, point.y + point.radius + 0.7 * height, "start", False),
        *(Label(point.x - near - 10, point.y + offset, "end", True) for offset in offsets),
        *(Label(point.x + near + 10, point.y + offset, "start", True) for offset in offsets[14:]),
    ]


def _box(label: Label, text: str, font: float) -> Box:
    width = text_width(text, font)
    left = label.x if label.anchor == "start" else label.x - width
    half = LINE * font / 2
    return Box(left, label.y - half, left + width, label.y + half)


def spread(wanted: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """Heights as near to `wanted` as may be, at least `apart`, between `low` and `high`; closer
    together where there is no room for all.
    """
    if len(wanted) > 1:
        apart = min(apart, (high - low) / (len(wanted) - 1))
    order = sorted(range(len(wanted)), key=lambda number: wanted[number])
    groups: list[tuple[list[int], float]] = []  # numbers that stand together, and their first's y
    for number in order:
        members, top = [number], min(max(wanted[number], low), high)
        while groups and groups[-1][1] + apart * len(groups[-1][0]) > top:
            before, _ = groups.pop()
            members = [*before, *members]
            middle = sum(wanted[one] - apart * n for n, one in enumerate(members)) / len(members)
            top = min(max(middle, low), high - apart * (len(members) - 1))
        groups.append((members, min(top, high - apart * (len(members) - 1))))
    found = [0.0] * len(wanted)
    for members, top in groups:
        for n, number in enumerate(members):
            found[number] = top + apart * n
    return found
