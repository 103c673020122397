"""A command that needs more than the base install says so in one line, before it does anything."""

import sys

import pytest

from fmsim import cli
from fmsim.cli import extras
from fmsim.errors import FmsimError

COMMANDS = {
    "eval --corpus tokens": "eval needs torch: pip install 'fmsim[model]'",
    "exec": "exec needs torch: pip install 'fmsim[model]'",
    "validate scenarios/32k.yaml": "validate needs torch: pip install 'fmsim[model]'",
    "hw calibrate --out x.yaml": "hw calibrate needs torch: pip install 'fmsim[model]'",
    "indexer native --out x.safetensors": "indexer native needs torch: pip install 'fmsim[model]'",
    "indexer train x.safetensors --out y.safetensors": (
        "indexer train needs torch: pip install 'fmsim[model]'"
    ),
    "indexer eval x.safetensors y.safetensors --plot z.html": (
        "--plot needs plotly: pip install 'fmsim[report]'"
    ),
    "trace record --prompt-file x.txt --out y.safetensors": (
        "trace record needs torch: pip install 'fmsim[model]'"
    ),
    "trace export x.safetensors --out y": "trace export needs torch: pip install 'fmsim[model]'",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_missing_is_told(command, monkeypatch, capsys):
    monkeypatch.setattr(extras, "find_spec", lambda module: None)
    monkeypatch.setattr(sys, "argv", ["fmsim", *command.split()])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert capsys.readouterr().err == f"fmsim: {COMMANDS[command]}\n"


def test_a_module_that_is_there_is_enough_and_one_that_is_not_is_named(monkeypatch):
    monkeypatch.setitem(extras.MODULES, "report", ("json",))
    assert extras.require("report", "anything") is None
    monkeypatch.setitem(extras.MODULES, "report", ("json", "no_such_module"))
    with pytest.raises(FmsimError, match="anything needs no_such_module"):
        extras.require("report", "anything")
