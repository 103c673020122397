"""Every command that prints a table fits it to 80, 100 and 120 columns, with real content."""

import csv
import io
import json

import pytest
import typer
from command import WIDTHS, fits, fmsim_here

from fmsim import cli
from fmsim.report.grid import View, show_parts
from fmsim.report.tables import indexer
from fmsim.scenario import shipped

TRACE = str(shipped.TRACES / "nano-32k-needles.safetensors")
COMMANDS = {
    "run": "run 32k -p full -p lsa -p h2o -q",
    "plan": "plan 32k --set budgets=[40%gpu] -p full -p lsa",
    "sweep": "sweep 32k -p lsa -g policies.lsa.cadence=32,64 --set budgets=[40%gpu] -q",
    "tune": "tune 32k -p lfu -n 3 -r budget=15%..30% --set budgets=[40%gpu] -q",
    "compare": "compare h2o lfu --scenario 32k -q",
    "scenario list": "scenario list",
    "model list": "model list",
    "model show": "model show minimax-m3",
    "policy list": "policy list",
    "policy show": "policy show lsa",
    "trace info": f"trace info {TRACE}",
    "trace stats": f"trace stats {TRACE} --steps 70",
    "hw list": "hw list",
}
ELSEWHERE = {  # those that need torch
    "exec": "tests/exec/runs/test_live.py",
    "eval": "tests/experiments/test_accuracy.py",
    "validate": "tests/report/test_grid.py",
    "indexer eval": "test_an_indexers_report_fits",
}
DRAWN_TOO = {  # whose tables are drawn at every width, and as JSON, elsewhere
    "run": "tests/report/test_grid.py",
    "plan": "tests/report/test_grid.py",
    "sweep": "tests/report/test_grid.py",
    "compare": "tests/experiments/test_compare.py",
}


def test_every_command_with_columns_is_walked():
    program = typer.main.get_command(cli.program(cli.EVERY))
    found = {name for name, command in commands(program) if has(command, "columns")}
    assert found == {*COMMANDS, *ELSEWHERE}


def test_a_command_with_columns_has_all_ways_to_print():
    for name, command in commands(typer.main.get_command(cli.program(cli.EVERY))):
        if has(command, "columns"):
            assert has(command, "wide") and has(command, "as_json"), name
            assert has(command, "as_csv"), name


def commands(command, name=""):
    for part, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, f"{name} {part}".strip())
    if not hasattr(command, "commands"):
        yield name, command


def has(command, option):
    return any(each.name == option for each in command.params)


@pytest.mark.parametrize("name", COMMANDS)
def test_no_row_is_wrapped_or_cut(name, monkeypatch, tmp_path):
    for width in WIDTHS[:1] if name in DRAWN_TOO else WIDTHS:
        view = lambda wide=False, columns=None, width=width: View(None if wide else width)
        monkeypatch.setattr(View, "of_terminal", view)
        done = fmsim_here(*COMMANDS[name].split(), folder=tmp_path)
        assert done.returncode == 0, done.stderr
        fits(done.stdout, width)


@pytest.mark.parametrize("name", COMMANDS)
def test_csv_is_rows_and_json_is_json(name, tmp_path):
    command = COMMANDS[name].split()
    rows = fmsim_here(*command, "--csv", folder=tmp_path)
    assert rows.returncode == 0, rows.stderr
    found = list(csv.DictReader(io.StringIO(rows.stdout)))
    assert found and len(found[0]) > 1 and None not in found[0]
    if name not in DRAWN_TOO or name == "compare":
        json.loads(fmsim_here(*command, "--json", folder=tmp_path).stdout)


@pytest.mark.parametrize("name", ["hw list", "trace stats", "policy list"])
def test_columns_by_name_and_a_wrong_one(name, tmp_path):
    command = COMMANDS[name].split()
    wrong = fmsim_here(*command, "--columns", "nothing", folder=tmp_path)
    assert wrong.returncode == 2 and "--columns: no column 'nothing'" in wrong.stderr
    assert "━" in wrong.stdout  # what was found is shown all the same
    assert len(wrong.stderr.splitlines()) == 1


@pytest.mark.parametrize("width", WIDTHS)
def test_an_indexers_report_fits(width, capsys):
    pytest.importorskip("torch")
    names = ["lsa (max)", "lsa (mean)", "native, held", "attention in the last window", "oracle"]
    shares = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5]
    found = {
        "kept_shares": shares,
        "queries": 14,
        "state_age": 1,
        "golden_recall": {name: [0.123 for _ in shares] for name in names},
        "mass_recall": {name: [None for _ in shares] for name in names},
        "half_width": {
            key: {name: [0.012 for _ in shares] for name in names}
            for key in ("golden_recall", "mass_recall")
        },
        "threshold": {
            "score": 0.5,
            "kept_share": 0.1,
            "golden_recall": 0.9,
            "mass_recall": 0.95,
        },
        "policies": {
            "nano-500k-needles.safetensors": [
                {
                    "budget": "12.5% gpu",
                    "policy": "lsa-history, prompt",
                    "entries": 12_345,
                    "mass_kept": 0.883,
                    "entry_recall": 0.912,
                    "ci95": {"mass_kept": {"half_width": 0.03}},
                    "versus_lsa": {"mass_kept": {"difference": 0.088, "half_width": 0.11}},
                    "first_window": {"mass_kept": 0.7},
                },
                {"budget": "12.5% gpu", "policy": "lru", "why": "keys", "least_bytes": 2**30},
            ]
        },
    }
    show_parts(indexer.parts(found), View(width))
    fits(capsys.readouterr().out, width)
    assert len(indexer.rows(found)) == 2 * len(names) * len(shares) + 2
