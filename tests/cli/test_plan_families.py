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
    plans = json.loads(run.stdout)["policies"]
    assert {row["policy"] for row in plans} >= {"full"}
    assert all(row["max_requests"] > 0 for row in plans)


def test_a_context_beyond_the_positions():
    given = ["--model", "v3.2", "--hardware", "h200", "--context", "256K", "--json"]
    run = CliRunner().invoke(APP, given)
    assert isinstance(run.exception, FmsimError) and "positions" in str(run.exception)
    assert CliRunner().invoke(APP, [*given, "--beyond-positions"]).exit_code == 0


def planned(model, *more):
    given = ["--model", model, "--hardware", "h200", "--context", "128K", "--json", *more]
    run = CliRunner().invoke(APP, given)
    assert run.exit_code == 0, run.exception
    return {row["policy"]: row for row in json.loads(run.stdout)["policies"]}


def test_kv_that_layers_share_is_kept_once_and_read_by_each_selection():
    plans = planned("v4.1-flash", "--tp", "8")
    tokens = plans["full"]["context_tokens"] + plans["full"]["output_tokens"]
    windows = 40 * 128 * 528
    assert plans["full"]["gpu_bytes"] == 890 * tokens + windows
    lru = plans["lru 2x topk"]  # four layers have KV; eight selections keep 2 x 512 entries each
    keys = 68 * (3 * tokens // 2 + tokens)
    slots = 8 * 2 * 512 * 288
    assert 0 <= lru["gpu_bytes"] - slots - keys - windows <= slots  # room for misses
    assert "each selection" in lru["source"] and "each selection" not in plans["full"]["source"]
    assert "v4.1-flash's kernels were not timed" in plans["full"]["kernels_stand_in"]


def test_kv_heads_are_shared_out_and_index_keys_are_not():
    whole, split = planned("minimax-m3", "--dp", "8"), planned("minimax-m3", "--tp", "8")
    tokens = whole["full"]["context_tokens"] + whole["full"]["output_tokens"]
    kv, keys = 60 * 2048 * tokens, 57 * 256 * tokens
    assert whole["full"]["gpu_bytes"] == kv + keys
    assert split["full"]["gpu_bytes"] == kv / 4 + keys
    assert split["lru 2x topk"]["host_kv_bytes"] == 57 * tokens * (2048 / 4 + 256)
