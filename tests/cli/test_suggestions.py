"""A wrong name is answered by the near one, and the option that gave it is blamed."""

import json

import pytest
import typer
from command import fmsim_here

from fmsim import cli
from fmsim.policies import registry


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("run 32k -p LRU", "no policy named 'LRU'; did you mean 'lru'?"),
        ("policy show lsaa", "no policy named 'lsaa'; did you mean 'lsa'?"),
        (
            "run 32k --set policies.lsa.budgett=5%",
            "--set policies.lsa.budgett=5%: policies.5.budgett: policy lsa: no parameter 'budgett';"
            " did you mean 'budget'?",
        ),
        (
            "run 32k --set policies.lru.policy=lruu",
            "--set policies.lru.policy=lruu: policies.7.policy: no policy named 'lruu'",
        ),
        (
            "run 32k --set policies.lsaa.budget=5%",
            "the scenario has no policy 'lsaa'; did you mean 'lsa'?",
        ),
        (
            "run 32k --set workload.kind=poison",
            "--set workload.kind=poison: workload.kind: did you mean 'poisson'?",
        ),
        ("run 32k --set hardware=a100", "no hardware preset 'a100'"),
        ("run 32k --set hardware=a100", "For another GPU `fmsim hw calibrate"),
        (
            "run 32k --set trace=nano-33k-needles",
            "--set trace=nano-33k-needles: trace: nano-33k-needles is not there; did you mean"
            " nano-32k-needles, which fmsim carries?",
        ),
        ("run 32k -p lru:budgett=3%", "--policy lru:budgett=3%: policy lru: no parameter"),
    ],
)
def test_wrong_names(arguments, says):
    done = fmsim_here(*arguments.split())
    assert done.returncode == 2
    assert says in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["", "run", "policy", "hw list"])
def test_h_is_help(command):
    done = fmsim_here(*command.split(), "-h")
    assert done.returncode == 0 and "Usage: fmsim" in done.stdout


def test_completion_can_be_installed():
    assert "--install-completion" in fmsim_here("--help").stdout


@pytest.mark.parametrize("thing", ["policy", "hw", "model", "scenario"])
def test_every_list_has_json(thing):
    [rows] = json.loads(fmsim_here(thing, "list", "--json").stdout).values()
    table = fmsim_here(thing, "list").stdout
    assert rows and all(row["name"] in table for row in rows)


def test_a_policys_parameters_as_json():
    found = json.loads(fmsim_here("policy", "show", "lsa", "--json").stdout)
    assert found == json.loads(json.dumps(registry.info("lsa")))


# Short names, and what each command calls a thing.
NAMES = {
    "context": {"--context", "-c"},
    "policy": {"--policy", "-p"},
    "override": {"--set", "-s"},
    "quiet": {"--quiet", "-q"},
    "as_json": {"--json"},
    "as_csv": {"--csv"},
    "jobs": {"--jobs", "-j"},
}


def test_one_thing_has_the_same_names_on_every_command():
    for name, command in commands(typer.main.get_command(cli.program(cli.EVERY))):
        for option in command.params:
            if option.name in NAMES and option.param_type_name == "option":
                assert set(option.opts) >= NAMES[option.name], (name, option.opts)


def commands(command, name=""):
    for part, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, f"{name} {part}".strip())
    if not hasattr(command, "commands"):
        yield name, command


def test_the_list_of_all_commands_says_of_each_what_it_is_for():
    listed = fmsim_here("--help").stdout
    for name in cli.EVERY:
        [line] = [line for line in listed.splitlines() if line.startswith(f"  {name} ")]
        assert len(line) <= 80 and line.endswith(".") and not line.endswith("...")
    assert "did you mean 'run'" in fmsim_here("runn").stderr.lower()
