"""What stands below a run's table about its estimates."""

import pytest

from fmsim.report.console import estimate_text
from fmsim.report.tables import estimates, sweep


def report(steps=520, steady=(128, 512), layer_map=(0,) * 7 + (1,) * 7 + (2,) * 7):
    details = {
        "full": {"exact": True, "mass_by_layer": [1.0, 1.0, 1.0]},
        "a": {"exact": False, "mass_by_layer": [0.5, 0.6, 0.7]},
        "b": {"exact": False, "mass_by_layer": [0.7, 0.8, 0.6]},
        "bound": {"exact": False, "mass_by_layer": [0.9, 0.9, 0.9]},
    }
    masses = {"full": 1.0, "a": 0.6, "b": 0.7, "bound": 0.9}
    return {
        "scenario": {
            "trace": {
                "steps": steps,
                "windows": 8,
                "window_steps": 64,
                "steady_steps": list(steady),
                "csa_layers": 3,
            },
            "layer_map": list(layer_map),
            "budgets": {},
            "runs": {
                label: {"evidence": "future" if label == "bound" else "position", "budget": "10%"}
                for label in details
            },
            "details": details,
        },
        "policies": [{"policy": label, "mass_kept": mass} for label, mass in masses.items()],
        "differences": [
            {
                "figure": "mass_kept",
                "policy": "a",
                "other": "b",
                "difference": -0.1,
                "half_width": 0.034,
            }
        ],
    }


def test_what_was_left_out_is_said():
    text = " ".join(estimates.notes(report()))
    assert "There are 8, of 64 steps" in text
    assert "steps 128 to 511; left out are windows 0 and 1" in text
    assert "and the 8 steps after the last whole window" in text
    short = " ".join(estimates.notes(report(steps=100, steady=(0, 100))))
    assert "steps 0 to 99; no step is left out" in short


def test_the_best_lossy_policy_has_its_paired_margin_bounds_aside():
    [line] = [line for line in estimates.notes(report()) if line.startswith("most mass kept")]
    assert "b, 10.0 ±3.4 points more than a (paired" in line


def test_at_several_budgets_each_has_its_own_margin():
    made = report()
    about = made["scenario"]
    about["budgets"] = {"10% gpu": 100, "20% gpu": 200}
    for label, budget in (("a", "10% gpu"), ("b", "10% gpu"), ("bound", "20% gpu")):
        about["runs"][label]["budget"] = budget
    lines = [line for line in estimates.notes(made) if line.startswith("most mass kept")]
    assert lines == [
        "most mass kept by a lossy policy at 10% gpu: b, 10.0 ±3.4 points more than a (paired: the"
        " same windows of both)."
    ]


def test_the_layer_map_stands_in_the_foot_where_layers_drive_several():
    lines = estimates.notes(report())
    [line] = [line for line in lines if line.startswith("layer map")]
    assert "3 layers of the trace drive 21" in line and "serves 3 different ones" in line
    [line] = [line for line in lines if line.startswith("mass kept if one layer")]
    assert line.endswith("(0, 1, 2): bound 90 / 90 / 90%; b 70 / 80 / 60%; a 50 / 60 / 70%.")
    assert not [line for line in estimates.notes(report(layer_map=(0, 1, 2))) if "layer" in line]


@pytest.mark.parametrize(
    ("value", "half_width", "text"),
    [
        (0.795, 0.114, "79.5% ±11.4"),
        (0.795, 0.021, "79.5% ±2.1 "),
        (1.0, 0.0, "100.0%      "),
        (0.5, None, "50.0%      "),
        (None, None, "-"),
    ],
)
def test_margins_line_up(value, half_width, text):
    assert estimate_text(value, half_width) == text


def test_a_sweeps_row_tells_its_margins_too():
    row = {"mass_kept": 0.795, "ci95_mass_kept_half_width": 0.0212}
    text, _ = sweep.FIGURES["mass\nkept"]
    assert text(row) == "79.5% ±2.1 "
    text, _ = sweep.SERVING_FIGURES["mass\nkept"]
    assert text({"mass_kept": 0.795}).strip() == "79.5%"


def test_of_many_policies_those_that_keep_most_are_told_layer_by_layer():
    made = report()
    for number in range(10):
        made["scenario"]["details"][f"poor {number}"] = {
            "exact": False,
            "mass_by_layer": [0.1, 0.1, 0.1],
        }
    [line] = [line for line in estimates.notes(made) if line.startswith("mass kept if one layer")]
    assert "b 70 / 80 / 60%" in line and line.count("poor") == 3
