"""`fmsim run` with a workload, and `fmsim plan`, as a user calls them."""

import json

import pytest
from command import fmsim, fmsim_here
from made_trace import make_trace

from fmsim.trace import write

SCENARIO = """\
name: served
trace: small.safetensors
hardware: h20
policies: [full, {policy: lru, budget: 2x topk}, {policy: oracle, budget: 10%}]
workload:
  kind: file
  file: requests.jsonl
  lengths: 10
  slo: {ttft_s: 5, tpot_s: 0.05}
server:
  prefill: chunked
"""
REQUESTS = "".join(
    json.dumps(
        {
            "timestamp": 700 * i,
            "input_length": 3000 + 100 * i,
            "output_length": 20 + i,
            "hash_ids": [0, i],
        }
    )
    + "\n"
    for i in range(8)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("serve")
    write(path / "small.safetensors", make_trace())
    (path / "served.yaml").write_text(SCENARIO)
    (path / "requests.jsonl").write_text(REQUESTS)
    return path


def test_a_workload_is_served_and_the_same_again(folder):
    first = fmsim("run", "served.yaml", "--json", "--out", "out", folder=folder)
    assert first.returncode == 0, first.stderr
    report = json.loads(first.stdout)
    assert json.loads((folder / "out/report.json").read_text()) == report
    assert sorted(path.name for path in (folder / "out/ledgers").iterdir()) == [
        "full.npz",
        "lru.npz",
        "oracle.npz",
    ]
    assert [row["policy"] for row in report["policies"]] == ["full", "lru", "oracle"]
    for row in report["policies"]:
        assert row["requests"] == {"arrived": 8, "finished": 8, "refused": 0}
        assert row["tokens"] == sum(20 + i for i in range(8))
        assert row["ttft_s"]["p50"] <= row["ttft_s"]["p95"] <= row["ttft_s"]["p99"]
        assert len(row["over_time"]["t_s"]) == len(row["over_time"]["running"]) == 120
    full, lru = report["policies"][:2]
    assert full["exact"] and lru["exact"] and full["stall_share"] == 0 < lru["stall_share"]
    assert report["scenario"]["workload"]["repeated_prompt_share"] == 7 / 16  # block 0, seven times
    assert fmsim_here("run", "served.yaml", "--json", folder=folder).stdout == first.stdout


def test_the_table_shows_memory_policies_and_use_whole(folder):
    done = fmsim_here("run", "served.yaml", "-p", "lru", "--svg", "served.svg", folder=folder)
    assert done.returncode == 0, done.stderr
    for text in (
        "host mirror",
        "others allow",
        "TTFT",
        "TPOT",
        "goodput",
        "in use over time",
        "simulated",
    ):
        assert text in done.stdout
    assert "…" not in done.stdout and (folder / "served.svg").read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("workload.file=none.jsonl", "none.jsonl: no such request file"),
        (
            "workload.kind=poison",
            "workload.kind: did you mean 'poisson'? there are closed_loop, poisson, bursts,",
        ),
        ("workload.sped=2", "workload.sped: unknown key; did you mean 'speed'?"),
        ("workload.slo.tpot=1", "workload.slo.tpot: unknown key; did you mean 'tpot_s'?"),
        ("server.prefil=done", "server.prefil: unknown key; did you mean 'prefill'?"),
        ("server.prefill=never", "server.prefill: Input should be 'done', 'chunked' or 'separate'"),
        ("workload={kind: poisson, rate_per_s: 1}", "the key 'prompt_tokens' is missing"),
        (
            (
                "workload={kind: bursts, burst: 1, every_s: 9, prompt_tokens: [9, 1],"
                " output_tokens: 5, duration_s: 1}"
            ),
            "workload.prompt_tokens: give a number",
        ),
    ],
)
def test_a_mistake_in_the_workload_is_told_in_one_line(folder, override, says):
    done = fmsim_here("run", "served.yaml", "--set", override, folder=folder)
    assert done.returncode == 2 and says in done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stdout == ""


def test_plan_prints_walls_and_json(folder):
    done = fmsim_here(
        "plan",
        "served.yaml",
        "-c",
        "256K",
        "-p",
        "lru",
        "--hardware",
        "h200",
        "--json",
        folder=folder,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    found = report["policies"][0]
    assert report["scenario"]["hardware"]["name"] == "h200" and found["context_tokens"] == 262_144
    assert (
        found["max_requests"]
        == min(found["walls"].values())
        == found["walls"][found["max_requests_bound"]]
    )
    assert {"GPU memory", "host memory", "PCIe", "compute"} <= set(found["walls"])
    shown = fmsim_here(
        "plan", "served.yaml", "-c", "100000", "-p", "full", "-p", "lru", folder=folder
    )
    assert shown.returncode == 0, shown.stderr
    for text in (
        "what would move it",
        "does KV on the host pay",
        "twice the GPU memory",
        "from batch",
    ):
        assert text in shown.stdout


def test_plan_refuses_what_is_no_number_of_tokens(folder):
    done = fmsim_here("plan", "served.yaml", "-c", "many", folder=folder)
    assert done.returncode == 2 and "--context many: give a number of tokens" in done.stderr
