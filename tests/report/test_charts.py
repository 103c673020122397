"""Charts: scales, names that never overlap, and SVG that any reader takes."""

import itertools
import math
import random
import re
from xml.etree import ElementTree

import pytest

from fmsim.report.charts.chart import Bars, Chart, Heat, Part, Series
from fmsim.report.charts.draw import NARROW, WIDE, svg
from fmsim.report.charts.labels import Box, Point, _box, placed, spread
from fmsim.report.charts.look import DARK, LIGHT
from fmsim.report.charts.scale import ChartAxis, scale

SVG = "{http://www.w3.org/2000/svg}"


def test_a_scale_by_hand():
    linear = scale(ChartAxis("x", low=0, high=10), [3.0], 100, 200)
    assert [linear(value) for value in (0, 5, 10)] == [100, 150, 200]
    assert linear.marks(5) == [0, 2, 4, 6, 8, 10]
    log = scale(ChartAxis("x", log=True, low=0.1, high=10), [1.0], 0, 100)
    assert [log(value) for value in (0.1, 1, 10)] == pytest.approx([0, 50, 100])
    assert log.marks(7) == pytest.approx([0.1, 0.2, 0.5, 1, 2, 5, 10])
    assert scale(ChartAxis("x", low=0, high=1, at=(0.1, 0.5, 2)), [1.0], 0, 1).marks(9) == [
        0.1,
        0.5,
    ]


@pytest.mark.parametrize("log", [False, True])
def test_every_scale_has_marks_within_it_and_not_too_many(log):
    source = random.Random(7)
    for _ in range(300):
        values = [10 ** source.uniform(-6, 9) for _ in range(source.randint(1, 9))]
        found = scale(ChartAxis("x", log=log), values, 0, 1000)
        marks = found.marks(8)
        assert 1 <= len(marks) <= 12 and marks == sorted(marks)
        assert all(found.low * (1 - 1e-9) <= mark <= found.high * (1 + 1e-9) for mark in marks)
        assert all(-1e-6 <= found(value) <= 1000 + 1e-6 for value in values)


def test_names_overlap_neither_each_other_nor_a_point():
    source = random.Random(5)
    inside = Box(0, 0, 800, 400)
    named = 0
    for _ in range(150):
        points = [
            Point(
                source.choice([120, 300, source.uniform(20, 600)]),
                source.choice([60, source.uniform(20, 380)]),
                source.uniform(3, 10),
                "x" * source.randint(2, 20),
            )
            for _ in range(source.randint(1, 14))
        ]
        taken = [Box(640, 10, 790, 60)]
        labels = placed(points, 12, inside, taken)
        boxes = [_box(label, one.text, 12) for label, one in zip(labels, points) if label]
        named += len(boxes)
        assert all(box.within(inside) for box in boxes)
        for number, box in enumerate(boxes):
            others = [*boxes[:number], *boxes[number + 1 :], *taken, *(one.box for one in points)]
            assert not any(box.meets(other) for other in others)
    assert named > 1000  # nearly all


def test_names_at_the_ends_of_curves_keep_apart():
    source = random.Random(9)
    for _ in range(300):
        wanted = [source.uniform(-20, 420) for _ in range(source.randint(1, 20))]
        found = spread(wanted, 14, 0, 400)
        assert all(-1e-6 <= at <= 400 + 1e-6 for at in found)
        by_height = sorted(found)
        assert all(b - a >= 14 - 1e-6 for a, b in itertools.pairwise(by_height))
        assert sorted(range(len(wanted)), key=lambda n: (wanted[n], found[n])) == sorted(
            range(len(found)), key=lambda n: found[n]
        )
    assert spread([100, 200], 14, 0, 400) == [100, 200]
    assert spread([100.0, 100.0], 10, 0, 400) == [95.0, 105.0]


CHARTS = [
    Chart(
        "a",
        "Kept <of all> & more",
        "two curves",
        ChartAxis("GiB", log=True),
        ChartAxis("share"),
        [
            Series("lru & co", [0.1, 1.0], [0.2, 0.9], 0, points=True, names=["", "lru"]),
            Series("lsa", [0.1, 0.5, 1.0], [0.2, 0.4, 0.8], 1, "diamond", "dash"),
            Series("none", [], [], 2),
        ],
    ),
    Bars(
        "b",
        "Bars",
        "one",
        ChartAxis("ms"),
        ["a", "b"],
        [[Part(1, 0, "a: 1")], [Part(2, 1, "b: 2")]],
    ),
    Heat("c", "Heat", "four", ["a", "b"], ["0", "1"], "layer", [[0.0, 1.0], [2.0, 3.0]]),
]


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.id)
def test_a_chart_is_whole_svg_that_tells_what_it_shows(chart, width):
    root = ElementTree.fromstring(svg(chart, width, alone=True))
    _, _, wide, high = map(float, root.get("viewBox").split())
    assert wide == width and root.get("aria-label").startswith(chart.title)
    assert root.find(f"{SVG}style").text
    items = [one for one in root.iter(f"{SVG}g") if one.get("class", "").startswith("item")]
    assert items and all(one.get("tabindex") == "0" and one.get("aria-label") for one in items)
    for text in root.iter(f"{SVG}text"):
        assert 0 <= float(text.get("x")) <= wide and 0 <= float(text.get("y")) <= high


def test_a_long_curve_is_thinned_and_keeps_its_mean():
    values = [math.sin(step / 40) for step in range(10_000)]
    drawn = svg(
        Chart("l", "L", "", ChartAxis("x"), ChartAxis("y"), [Series("s", range(10_000), values, 0)])
    )
    [points] = re.findall(r'<polyline class="curve" points="([^"]+)"', drawn)
    assert 200 < len(points.split()) <= 320


def test_colours_stay_apart_for_the_colour_blind():
    """By Machado's matrices for deuteranopia and protanopia at full strength."""
    matrices = {
        "deuteranopia": ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
        "protanopia": ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
    }
    for colors in (LIGHT, DARK):
        for matrix in matrices.values():
            seen = [
                lab([sum(m * c for m, c in zip(row, linear(one))) for row in matrix])
                for one in colors
            ]
            apart = [math.dist(a, b) for n, a in enumerate(seen) for b in seen[n + 1 :]]
            assert min(apart) > 8, (colors, min(apart))


def linear(color):
    shares = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    return [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in shares]


def lab(rgb):
    r, g, b = (min(1.0, max(0.0, one)) for one in rgb)
    xyz = (
        (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505,
        0.2126 * r + 0.7152 * g + 0.0722 * b,
        (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089,
    )
    f = [one ** (1 / 3) if one > 0.008856 else 7.787 * one + 16 / 116 for one in xyz]
    return 116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])
