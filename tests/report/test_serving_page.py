"""The page of a workload, as a user makes it."""

import json

import pytest
from command import fmsim_here
from made_trace import make_trace

from fmsim.trace import write

SCENARIO = """\
name: talks <of some>
trace: small.safetensors
hardware: h100
policies: [full, {policy: lru, budget: 2x topk}]
workload:
  kind: sessions
  rate_per_s: 1
  turns: [2, 3]
  think_s: 2
  shared_tokens: 1024
  prompt_tokens: [1000, 3000]
  turn_tokens: 200
  output_tokens: [5, 50]
  duration_s: 8
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("served")
    write(path / "small.safetensors", make_trace())
    (path / "talks.yaml").write_text(SCENARIO)
    done = fmsim_here("run", "talks.yaml", "-q", "--out", "out", folder=path)
    assert done.returncode == 0, done.stderr
    return path


def test_the_page_shows_every_policy_and_every_requests_life(folder):
    done = fmsim_here("report", "out", folder=folder)
    assert done.returncode == 0, done.stderr
    page = (folder / "out/report.html").read_text()
    report = json.loads((folder / "out/report.json").read_text())
    for row in report["policies"]:
        assert row["prefix"]["reused_share"] > 0.2
        assert f"Requests of {row['policy']}" in page
    assert "talks &lt;of some&gt;" in page and "talks <of some>" not in page
    for text in (
        "chart-lives-0",
        "chart-lives-1",
        "chart-time-running",
        "is prefilled",
        "prompt\nreused",
    ):
        assert text in page
    last = report["policies"][0]["requests"]["arrived"] - 1
    assert f"request {last}" in page


def test_a_run_without_its_requests_says_so(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/report.json").write_text((folder / "out/report.json").read_text())
    done = fmsim_here("report", "out", folder=tmp_path)
    assert done.returncode == 2 and "run the scenario again" in done.stderr
    done = fmsim_here("report", "out", "--perfetto", "x.json", folder=folder)
    assert done.returncode == 2 and "--perfetto" in done.stderr
