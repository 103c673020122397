"""`fmsim plan` without a scenario, for models of other families."""

import json

import pytest
import typer
from typer.testing import CliRunner

from fmsim.cli.plan import plan
from fmsim.errors import FmsimError

APP = typer.Typer()
APP.command()(plan)


@pytest.mark.parametrize("model", ["glm-5.2", "v3.2", "v4-flash"])
def test_a_plan_needs_no_scenario(model):
    given = ["--model", model, "--hardware", "h200", "--context", "128K", "--json"]
    run = CliRunner().invoke(APP, given)
    assert run.exit_code == 0, run.exception
    plans = json.loads(run.stdout)["plans"]
    assert {row["policy"] for row in plans} >= {"full"}
    assert all(row["requests"] > 0 for row in plans)


def test_a_context_beyond_the_positions():
    given = ["--model", "v3.2", "--hardware", "h200", "--context", "256K", "--json"]
    run = CliRunner().invoke(APP, given)
    assert isinstance(run.exception, FmsimError) and "positions" in str(run.exception)
    assert CliRunner().invoke(APP, [*given, "--beyond-positions"]).exit_code == 0
