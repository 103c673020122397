"""`fmsim run` and `fmsim policy` as a user calls them."""

import json
import os
import subprocess
import sys

import pytest
from command import RUN_FIELDS, fmsim, fmsim_here
from made_trace import make_trace

from fmsim.geometry import PRESETS
from fmsim.replay.ledger import Ledger
from fmsim.trace import write

SCENARIO = """\
name: small
trace: small.safetensors
policies:
  - full
  - {policy: recency, budget: 10%}
  - {policy: random, budget: 10%}
  - lru
  - lfu
  - {policy: h2o, budget: 10%}
  - oracle
  - belady
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("scenario")
    write(path / "small.safetensors", make_trace())
    (path / "small.yaml").write_text(SCENARIO)
    return path


@pytest.fixture(scope="module")
def report(folder):
    done = fmsim("run", "small.yaml", "--json", "--out", "out", folder=folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_json_has_the_promised_fields(report):
    assert list(report) == ["scenario", "policies", "differences", "failed"]
    assert [row["policy"] for row in report["policies"]] == [
        "full",
        "recency",
        "random",
        "lru",
        "lfu",
        "h2o",
        "oracle",
        "belady",
    ]
    for row in report["policies"]:
        assert list(row) == RUN_FIELDS
        assert list(row["step_s"]) == ["p50", "p99"]


def test_figures_hang_together(report):
    rows = {row["policy"]: row for row in report["policies"]}
    details = report["scenario"]["details"]
    full = rows["full"]
    geometry = PRESETS["v4-flash"]
    assert (
        geometry.full_kv_bytes(4096) <= full["kv_hbm_bytes"] <= geometry.full_kv_bytes(4096 + 160)
    )
    assert (
        full["gpu_ratio"],
        full["kv_hbm_ratio"],
        full["entry_recall"],
        full["mass_kept"],
        full["h2d_bytes"],
        full["stall_ratio"],
    ) == (1, 1, 1, 1, 0, 0)
    for name in ("full", "lru", "lfu", "belady"):
        assert details[name]["exact"] and rows[name]["mass_kept"] == 1
    for name in ("recency", "random", "h2o"):
        assert (
            not details[name]["exact"]
            and rows[name]["mass_kept"] < 1
            and rows[name]["h2d_bytes"] == 0
        )
        assert rows[name]["kv_hbm_ratio"] == pytest.approx(0.1, abs=0.01)
        assert rows[name]["gpu_bytes"] == sum(details[name]["allocated"].values())
        assert rows[name]["gpu_ratio"] == rows[name]["gpu_bytes"] / full["gpu_bytes"] < 0.3
    assert (
        0 < rows["belady"]["h2d_bytes"] <= min(rows["lru"]["h2d_bytes"], rows["lfu"]["h2d_bytes"])
    )
    assert (
        rows["lru"]["stall_ratio"] > 0
        and rows["lru"]["decode_tokens_per_s"] < full["decode_tokens_per_s"]
    )
    assert rows["oracle"]["entry_recall"] > rows["random"]["entry_recall"]


def test_out_holds_ledgers_timelines_and_the_report(report, folder):
    written = json.loads((folder / "out/report.json").read_text())
    assert set(written.pop("files")) == {row["policy"] for row in report["policies"]}
    assert written == report
    ledger = Ledger.load(folder / "out/ledgers/lru.npz")
    timeline = json.loads((folder / "out/timelines/lru.json").read_text())
    assert ledger.policy == "lru" and len(timeline["end_s"]) == ledger.n_steps == 160
    row = next(row for row in report["policies"] if row["policy"] == "lru")
    assert 160 / timeline["end_s"][-1] == pytest.approx(row["decode_tokens_per_s"])
    assert sum(timeline["h2d_bytes"]) == row["h2d_bytes"]


def test_the_table_shows_every_policy_whole_even_in_a_narrow_pipe(folder):
    done = fmsim_here(
        "run",
        "small.yaml",
        "-p",
        "lru",
        "-p",
        "recency",
        "--set",
        "hardware=h200",
        "--svg",
        "table.svg",
        folder=folder,
    )
    assert done.returncode == 0, done.stderr
    assert "H200" in done.stdout and "…" not in done.stdout
    assert "exact" in next(line for line in done.stdout.splitlines() if "lru" in line)
    assert "lossy" in next(line for line in done.stdout.splitlines() if "recency" in line)
    assert "each trace layer drives 7" in done.stdout and "simulated" in done.stdout
    assert "3 of 4 questions answered" in done.stdout
    assert (folder / "table.svg").read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["small.yml"], "small.yml: no such scenario file; did you mean small.yaml?"),
        (["small.yaml", "--policy", "lruu"], "no policy named 'lruu'; did you mean 'lru'?"),
        (
            ["small.yaml", "--set", "hardware=h10"],
            "--set hardware=h10: hardware: no hardware preset 'h10'; did you mean 'h100'?",
        ),
        (["small.yaml", "--set", "model=v4-flsh"], "did you mean 'v4-flash'?"),
        (
            ["small.yaml", "--set", "policies.lru.budgt=1"],
            "--set policies.lru.budgt=1: policies.3.budgt: policy lru: no parameter 'budgt'",
        ),
        (["small.yaml", "--set", "layer_map=[0, 1]"], "layer_map: give 21 numbers"),
        (["small.yaml", "--set", "trace=none.safetensors"], "none.safetensors: "),
        (["small.yaml", "--out", "small.yaml/x"], "--out small.yaml/x: cannot be written"),
        (["small.yaml", "--set", "trace=none", "--columns", "kin"], "did you mean 'kind'?"),
        (["small.yaml", "--nonsense"], "No such option"),
    ],
)
def test_a_users_mistake_is_told_without_a_traceback(folder, arguments, says):
    done = fmsim_here("run", *arguments, folder=folder)
    assert done.returncode == 2
    assert says in done.stderr and "Traceback" not in done.stderr
    if not arguments[-1].startswith("--"):
        assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_a_file_that_cannot_be_written_costs_no_table(folder):
    arguments = ("small.yaml", "-p", "full", "--svg", "small.yaml/x")
    done = fmsim_here("run", *arguments, folder=folder)
    assert done.returncode == 2 and "--svg small.yaml/x: cannot be written" in done.stderr
    assert "full" in done.stdout


def test_a_column_that_only_other_runs_have_costs_no_table(folder):
    for more in ((), ("--markdown",)):
        arguments = ("small.yaml", "-p", "full", "--columns", "hit", *more)
        done = fmsim_here("run", *arguments, folder=folder)
        assert done.returncode == 2 and "--columns: no column 'hit'" in done.stderr
        assert "mass" in done.stdout


def test_a_model_may_be_a_config_file(folder):
    config = {
        "model_type": "deepseek_v4",
        "num_hidden_layers": 8,
        "hidden_size": 384,
        "compress_ratios": [0, 0, 4, 128, 4, 128, 4, 128],
        "num_attention_heads": 6,
        "head_dim": 64,
        "qk_rope_head_dim": 16,
        "sliding_window": 128,
        "index_topk": 16,
        "index_n_heads": 4,
        "index_head_dim": 32,
        "q_lora_rank": 192,
        "o_lora_rank": 160,
        "o_groups": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 160,
        "vocab_size": 4096,
    }
    (folder / "nano").mkdir()
    (folder / "nano/config.json").write_text(json.dumps(config))
    done = fmsim_here(
        "run", "small.yaml", "-p", "full", "--set", "model=nano", "--json", folder=folder
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["scenario"]["model"] == {
        "name": "nano",
        "csa_layers": 3,
        "layers": 8,
    }
    (folder / "nano/config.json").write_text("{}")
    done = fmsim_here("run", "small.yaml", "--set", "model=nano", folder=folder)
    assert done.returncode == 2 and "not a usable model" in done.stderr


def test_policies_are_listed_and_shown():
    listed = fmsim_here("policy", "list")
    assert listed.returncode == 0
    for name in ("full", "recency", "random", "lru", "lfu", "h2o", "lsa", "oracle", "belady"):
        assert name in listed.stdout
    shown = fmsim_here("policy", "show", "lsa")
    assert (
        "predicted_future" in shown.stdout
        and "threshold" in shown.stdout
        and "2606.09079" in shown.stdout
    )


def test_nothing_loads_torch_and_help_nothing_heavy(folder):
    probe = "import sys; from fmsim.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    probe += "print([name for name in {} if name in sys.modules])"
    for heavy, arguments in (
        (("torch", "transformers"), ["run", str(folder / "small.yaml"), "-p", "lru", "--json"]),
        (("torch", "transformers", "numpy", "simpy", "pydantic", "yaml"), ["--help"]),
    ):
        done = subprocess.run(
            [sys.executable, "-c", probe.format(heavy), *arguments], capture_output=True, text=True
        )
        assert done.stdout.splitlines()[-1] == "[]"
    assert "fmsim 0." in fmsim("--version").stdout


@pytest.mark.parametrize(
    ("override", "says"),
    [("model=v4-pro", "v4-pro does not fit H100"), ("batch=100000", "GiB more than")],
)
def test_where_nothing_fits_that_is_said_with_exit_code_1(folder, override, says):
    done = fmsim_here("run", "small.yaml", "--set", override, folder=folder)
    assert done.returncode == 1 and says in done.stderr and not done.stdout
    assert "Traceback" not in done.stderr


AT_BUDGETS = """
name: equal bytes
trace: small.safetensors
budgets: [25% gpu, 60% gpu]
policies: [full, recency, lru, oracle]
"""


def test_policies_at_equal_bytes_and_who_cannot_be_there(folder):
    """At 4,096 + 160 tokens the full cache takes 43 x 128 x 584 of windows, 20 x 33 x 584 of HCA
    entries, 21 x 1,064 x 716 of CSA entries and keys: 19,598,080 B. Beside the fixed 3,599,776 a
    quarter holds 1,299,744 / (21 x 716) = 86 pages with their keys; all keys alone would take
    2,949,408.
    """
    (folder / "equal.yaml").write_text(AT_BUDGETS)
    done = fmsim_here("run", "equal.yaml", "--json", folder=folder)
    assert (done.returncode, done.stderr) == (0, "")  # every policy has a row
    report = json.loads(done.stdout)
    about, rows = report["scenario"], {row["policy"]: row for row in report["policies"]}
    windows, hca = 43 * 128 * 584, 20 * 33 * 584
    full = windows + hca + 21 * 1064 * 716
    assert about["full_gpu_bytes"] == rows["full"]["gpu_bytes"] == full
    assert about["budgets"] == {"25% gpu": full // 4, "60% gpu": int(0.6 * full)}
    assert list(rows) == [
        "full",
        "recency 25% gpu",
        "oracle 25% gpu",
        "recency 60% gpu",
        "lru 60% gpu",
        "oracle 60% gpu",
    ]
    left = full // 4 - windows - hca
    parts = about["details"]["recency 25% gpu"]["allocated"]
    assert parts["slots"] == left // (21 * 716) * 21 * 716 and parts["index_keys"] == 0
    left = int(0.6 * full) - windows - hca - 21 * 1064 * 132
    parts = about["details"]["lru 60% gpu"]["allocated"]
    assert parts["spare"] == 21 * 16 * 584 and parts["index_keys"] == 21 * 1064 * 132
    assert parts["slots"] == (left // (21 * 584) - 16) * 21 * 584
    [failed] = report["failed"]
    assert failed["policy"] == "lru 25% gpu" and "leaves no room" in failed["error"]
    assert failed["least_gpu_bytes"] == windows + hca + 21 * (1064 * 132 + 17 * 584) > full // 4
    alone = fmsim_here(
        "run", "equal.yaml", "-p", "lru", "-p", "recency", "--set", "budgets=[25% gpu]",
        folder=folder,
    )  # fmt: skip
    assert alone.returncode == 1 and "recency" in alone.stdout
    assert "fmsim: policy lru: budget 25% gpu is 4.673 MiB" in alone.stderr
    compared = {(row["policy"], row["other"]) for row in report["differences"]}
    assert ("recency 25% gpu", "oracle 25% gpu") in compared
    assert ("recency 25% gpu", "recency 60% gpu") not in compared
    # as many requests as fit take what a batch of so many takes
    lru = rows["lru 60% gpu"]
    again = fmsim_here(
        "run", "equal.yaml", "-p", "lru", "--json",
        *("--set", "budgets=[60% gpu]", "--set", f"batch={lru['max_requests']}"), folder=folder,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    [row] = json.loads(again.stdout)["policies"]
    assert row["policy"] == "lru"
    for name in ("decode_tokens_per_s", "stall_ratio", "h2d_bytes"):
        assert lru["at_max_requests"][name] == row[name]
    over = fmsim_here(
        "run", "equal.yaml", "-p", "lru", "--set", "budgets=[60% gpu]",
        "--set", f"batch={lru['max_requests'] + 1}", folder=folder,
    )  # fmt: skip
    assert over.returncode == 1 and "of GPU memory" in over.stderr


@pytest.mark.parametrize("command", ["plan", "sweep", "serve"])
def test_budgets_on_the_gpu_go_wherever_a_budget_goes(folder, command):
    """At a budget that all index keys exceed, the policy that needs them has a row that says so,
    and the other comes out.
    """
    (folder / "equal.yaml").write_text(AT_BUDGETS)
    workload = (
        "workload={kind: closed_loop, requests: 2, prompt_tokens: 4096, output_tokens: 64,"
        " duration_s: 1}"
    )
    options = ["-p", "recency", "-p", "lru", "--set", "budgets=[25% gpu]"]
    given = {
        "plan": ["plan", "equal.yaml", *options],
        "sweep": ["sweep", "equal.yaml", *options, "--grid", "batch=1,2"],
        "serve": ["run", "equal.yaml", *options, "--set", workload],
    }[command]
    done = fmsim_here(*given, "--json", folder=folder)
    found = json.loads(done.stdout)
    if command == "sweep":
        assert [row["policy"] for row in found] == ["recency", "recency", "lru", "lru"]
        assert ["error" in row for row in found] == [False, False, True, True]
        return
    assert done.returncode == 1
    rows = found["policies"]
    assert [row["policy"] for row in rows] == ["recency"]
    assert found["failed"][0]["policy"] == "lru"
    full = 43 * 128 * 584 + 20 * 33 * 584 + 21 * 1064 * 716
    if command == "serve":
        assert rows[0]["memory"]["request_bytes"]["gpu"] <= full // 4


def test_matrix_products_take_one_thread_in_each_policys_process(folder):
    """numpy reads the variable when it is loaded, so it must not be loaded before."""
    code = (
        "import os, sys\n"
        "import fmsim.cli.plan, fmsim.cli.report, fmsim.cli.run, fmsim.cli.sweep\n"
        "assert 'numpy' not in sys.modules\n"
        "from fmsim.cli.options import one_thread_a_process\n"
        "one_thread_a_process()\n"
        "print(os.environ['OPENBLAS_NUM_THREADS'])"
    )
    for given, expected in ((None, "1"), ("3", "3")):
        environment = {key: os.environ[key] for key in os.environ if "OPENBLAS" not in key}
        environment |= {} if given is None else {"OPENBLAS_NUM_THREADS": given}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert (done.stdout.strip(), done.stderr) == (expected, "")
