"""A command that needs more than the base install says so in one line, before it does anything."""

import subprocess
import sys
from pathlib import Path

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
    monkeypatch.setitem(extras.MODULES, "model", ("json",))
    assert extras.require("model", "anything") is None
    monkeypatch.setitem(extras.MODULES, "model", ("json", "no_such_module"))
    with pytest.raises(FmsimError, match="anything needs no_such_module"):
        extras.require("model", "anything")


ROOT = Path(__file__).parents[2]
# What the base install lacks: packages of the extras, and what only they bring.
ABSENT = ("accelerate", "gguf", "optuna", "pandas", "plotly", "pyarrow", "ray", "tokenizers")
ABSENT += ("torch", "transformers", "triton")
BASE = [
    "run 32k -p full -p h2o -q",
    "run serve -p full --set workload.duration_s=5 -q",
    "plan 32k -p full",
    "compare recency h2o --scenario 32k",
    f"trace stats {ROOT}/traces/nano-32k-needles.safetensors --steps 70",
    "model show v3.2",
    "init mine.yaml",
    "doctor",
]
ALONE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
sys.modules |= dict.fromkeys({ABSENT!r})  # an import of None is a ModuleNotFoundError
import fmsim
from fmsim.cli import main
assert all(getattr(fmsim, name) for name in fmsim.__all__)
fmsim.check_policy(fmsim.build_policy("lru"))
for command in {BASE!r}:
    try:
        main(command.split())
    except SystemExit as end:
        assert not end.code, command
"""


def test_the_base_install_is_enough(tmp_path):
    """For the Python API and for commands of each kind, one after another in one process."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
