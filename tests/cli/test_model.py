"""`fmsim model`."""

import json

from typer.testing import CliRunner

from fmsim.cli.model import app

RUN = CliRunner()


def test_list_and_show():
    rows = json.loads(RUN.invoke(app, ["list", "--json"]).stdout)["models"]
    found = {row["name"]: row for row in rows}
    assert found["v3.2"]["bytes_per_token"] == 48_068
    assert "glm-5.2" in RUN.invoke(app, ["list"]).stdout
    shown = json.loads(RUN.invoke(app, ["show", "glm-5.2", "--json"]).stdout)
    assert sum(part["bytes_per_token"] for part in shown["parts"]) == 53_940
    assert [part["layers"] for part in shown["parts"]] == [21, 57]
    fits = {row["hardware"]: row for row in shown["fits"]}
    assert fits["h100"]["kv_pool_bytes"] == 0
    pool = fits["h200"]["kv_pool_bytes"]
    assert fits["h200"]["requests"]["131072"] == int(pool // (53_940 * 131_072))


def test_a_context_that_the_model_does_not_know_is_no_figure():
    shown = json.loads(RUN.invoke(app, ["show", "v3.2", "--json"]).stdout)
    assert shown["fits"][0]["requests"]["1048576"] is None
    assert "weights do not fit" in RUN.invoke(app, ["show", "v3.2"]).stdout
