"""Inputs that once hung, crashed, or gave an answer to a question that nobody had asked."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from command import fmsim_here
from made_trace import make_trace

from fmsim.trace import write

HEAD = "name: case\ntrace: small.safetensors\npolicies: [full, {policy: lru, budget: 2x topk}]\n"
POISSON = "kind: poisson, rate_per_s: 1, prompt_tokens: 2000, output_tokens: 8, duration_s: 5"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad-input")
    write(folder / "small.safetensors", make_trace(prompt_tokens=256, n_steps=8, n_layers=1))
    (folder / "small.yaml").write_text(HEAD)
    return folder


def refused(done, says):
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert says in done.stderr and done.stderr.startswith("fmsim: ") and not done.stdout
    assert len(done.stderr.splitlines()) == 1
    return True


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("batch: yes", "line 4: batch: Input should be a valid integer, not 'yes'"),
        ("batch: true", "line 4: batch: Input should be a valid integer, not True"),
        ("batch: 1.9", "line 4: batch: Input should be a valid integer"),
        ("batch: 2\nbatch: 4", "line 5: the key 'batch' stands there twice, first in line 4"),
        ("description: " + "[" * 10_000, "line 4: is nested deeper than 50 levels"),
        ("hardware_figures: {link_bytes_per_s: 1.0e-300}", "must be between 1e-06 and 1e+21"),
        ("workload: {" + POISSON.replace("2000", "12:30:45") + "}", "give a number of tokens"),
        (
            "workload: {" + POISSON + ", slo: {ttft_s: .inf, tpot_s: 0.05}}",
            "line 4: .inf is not a finite number",
        ),
        (
            "workload: {" + POISSON.replace("rate_per_s: 1,", "rate_per_s: 1.0e+9,") + "}",
            "about 5,000,000,000 requests; a run takes at most 200,000",
        ),
        (
            "workload: {kind: closed_loop, requests: 4, prompt_tokens: 2000, output_tokens: 8,"
            " duration_s: 1.0e+9}",
            "raise the bound with --set workload.max_requests=N",
        ),
    ],
)
def test_a_scenario_that_cannot_be_meant_is_refused(folder, more, says):
    (folder / "case.yaml").write_text(HEAD + more + "\n")
    assert refused(fmsim_here("run", "case.yaml", folder=folder), says)


def test_a_deployment_s_fault_is_told_by_its_option(folder):
    model = ("plan", "--model", "v4-flash")
    assert refused(fmsim_here(*model, "--mem-fraction", "0"), "--mem-fraction 0.0: ")
    assert refused(fmsim_here(*model, "--serving-engine", "tgi"), "--serving-engine tgi: ")


@pytest.mark.parametrize(
    ("command", "option", "values"),
    [
        (("eval", "--text", "t.txt"), "--seconds", ("nan", "inf", "-1")),
        (("eval", "--text", "t.txt"), "--samples", ("0", "1000000000")),
        (("plan",), "--usd-per-gpu-hour", ("nan", "inf", "-1", "1e300")),
        (("exec",), "--seed", ("-1", str(2**32))),
        (("indexer", "train", "t", "--out", "o"), "--heads", ("0", str(2**70))),
        (("indexer", "train", "t", "--out", "o"), "--learning-rate", ("nan", "inf", "-1")),
        (("trace", "export", "t", "--out", "o"), "--head-share", ("nan", "1.5")),
        (("trace", "import", "t", "--out", "o"), "--prompt-tokens", ("0", str(2**70))),
    ],
)
def test_a_number_that_cannot_be_meant_is_refused_by_its_option(command, option, values):
    for value in values:
        done = fmsim_here(*command, option, value)
        assert done.returncode == 2 and f"Invalid value for '{option}'" in done.stderr


def test_what_would_move_a_wall_is_told_of_the_fastest_link_too(folder):
    link = "hardware_figures.link_bytes_per_s="
    options = ("small.yaml", "-p", "full", "--json", "--set")
    done = fmsim_here("plan", *options, f"{link}1e21", folder=folder)
    assert done.returncode == 0, done.stderr
    [row] = json.loads(done.stdout)["policies"]
    moved = {move["change"]: move["max_requests"] for move in row["moves"]}
    assert moved["twice the link to the host"] == row["max_requests"]
    done = fmsim_here("plan", *options, f"{link}2e21", folder=folder)
    assert refused(done, "link_bytes_per_s: must be between 1e-06 and 1e+21, not 2e+21")


def test_texts_and_devices_of_eval(folder, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (folder / "empty.txt").write_text("\n")
    (folder / "short.txt").write_text("no sentence ends here")
    for text, device, says in (
        ("none.txt", "cpu", "--text none.txt: no such file"),
        ("empty.txt", "cpu", "--text empty.txt: holds no text"),
        ("short.txt", "tpu", "--device tpu: write cpu or cuda"),
        ("short.txt", "cuda", "--device cuda: torch finds no CUDA device here; use --device cpu"),
    ):
        done = fmsim_here("eval", "--text", text, "--device", device, "-q", folder=folder)
        assert refused(done, says)


def test_a_closed_standard_output_hinders_no_worker(folder):
    told = subprocess.run(
        [sys.executable, "-c", "from fmsim.cli import main; main()", "run", "small.yaml"],
        preexec_fn=lambda: os.close(1),
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )
    assert told.returncode == 0, told.stderr


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        (
            "nan.jsonl",
            '{"timestamp": 0, "input_length": 5, "output_length": 5}\n'
            '{"timestamp": NaN, "input_length": 5, "output_length": 5}\n',
            "nan.jsonl, line 2: not valid JSON: NaN is no JSON number",
        ),
        (
            "large.jsonl",
            '{"timestamp": 0, "input_length": 2e999, "output_length": 5}\n',
            "large.jsonl, line 1",
        ),
        (
            "types.jsonl",
            '{"timestamp": 0, "input_length": 7.5, "output_length": true}\n',
            "types.jsonl, line 1: not a request ('input_length' is 7.5, no whole number)",
        ),
        (
            "twice.csv",
            "TIMESTAMP,ContextTokens,GeneratedTokens,TIMESTAMP\n2023-11-16 18:00:00,4,6,7\n",
            "line 1: the column 'TIMESTAMP' stands there twice",
        ),
        (
            "short.csv",
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:00,4\n",
            "line 2: not a request (it has more or fewer values than the 3 columns",
        ),
    ],
)
def test_a_request_file_is_refused_by_its_line(folder, name, text, says):
    (folder / name).write_text(text)
    workload = f"workload={{kind: file, file: {folder / name}}}"
    assert refused(fmsim_here("run", "small.yaml", "--set", workload, folder=folder), says)


def test_requests_that_fit_no_memory_are_refused_by_the_server_and_the_run_is_done(folder):
    workload = (
        "workload={kind: closed_loop, requests: 2, prompt_tokens: 200000000, output_tokens: 8,"
        " duration_s: 2}"
    )
    done = fmsim_here("run", "small.yaml", "-p", "lru", "--set", workload, "--json", folder=folder)
    assert done.returncode == 0, done.stderr
    [row] = json.loads(done.stdout)["policies"]
    assert row["requests"] == {"arrived": 2, "finished": 0, "refused": 2}
    assert row["tokens_per_s"] == row["goodput_per_s"] == row["slo_share"] == 0
    assert row["bound"] == "the model's positions"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b'{"theirs": 7}', 1),
        (b'{"theirs": 7}\n', 1),
        (b'{"schema_version": 2, "key": [1]}\n', 1),
        (b'{"schema_version": 2, "key": "a"}\n[1]\n', 2),
    ],
)
def test_a_foreign_file_as_a_sweeps_out_is_left_as_it_was(folder, content, line):
    path = folder / "foreign.json"
    path.write_bytes(content)
    done = fmsim_here("sweep", "small.yaml", "-g", "batch=1", "--out", path, folder=folder)
    assert refused(done, f"foreign.json, line {line}: not a row of results")
    assert path.read_bytes() == content


def test_a_sweep_of_too_many_runs_is_refused_with_its_count(folder):
    thousand = ",".join(map(str, range(1, 1001)))
    grid = ["-g", f"batch={thousand}", "-g", f"policies.lru.budget={thousand.replace(',', '%,')}%"]
    done = fmsim_here("sweep", "small.yaml", *grid, "--out", "rows.jsonl", folder=folder)
    assert refused(done, "1,000,000 combinations are 1,001,000 runs, more than the 10,000")
    assert not (folder / "rows.jsonl").exists()


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_what_is_no_file_is_refused_before_it_is_opened(folder, kind):
    path = folder / f"a-{kind}.yaml"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    says = "is a folder" if kind == "folder" else "is a FIFO, a device or a socket"
    assert refused(fmsim_here("run", path, folder=folder), says)
    assert refused(
        fmsim_here("run", "small.yaml", "--set", f"trace={path}", folder=folder),
        "is a directory" if kind == "folder" else says,
    )


def test_no_command_replaces_what_it_reads(folder):
    path, copied = folder / "own.safetensors", folder / "other"
    before = (folder / "small.safetensors").read_bytes()
    path.write_bytes(before)
    copied.mkdir()
    (copied / path.name).symlink_to(path)
    for command in (
        ("cut", path.name, "--out", path),
        ("cut", path, "--out", copied / path.name),
        ("pack", path.name, "--out", "."),
        ("pack", "small.safetensors", path, "--out", copied),
    ):
        done = fmsim_here("trace", *command, folder=folder)
        assert refused(done, "own.safetensors, which is read; name another")
    assert path.read_bytes() == before
    np.save(folder / "rows.npy", np.zeros((1, 1, 1), np.int32))
    options = ("--format", "npy", "--topk", 1, "--layers", 1, "--prompt-tokens", 9)
    done = fmsim_here("trace", "import", "rows.npy", "--out", "rows.npy", *options, folder=folder)
    assert refused(done, "would replace rows.npy, which is read")
    done = fmsim_here("trace", "import", path.name, "--out", path.name, folder=folder)
    assert refused(done, "own.safetensors, which is read; name another")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("run", "small.yaml", "--out", ""), "--out: is empty; name a file or folder"),
        (("sweep", "small.yaml", "-g", "batch=1", "--out="), "--out: is empty"),
        (("sweep", "small.yaml", "-g", "batch=1", "--out", "."), ".: is a folder, not a file"),
        (("trace", "cut", "small.safetensors", "--out", "."), "Is a directory; give another --out"),
        (("run", "small.yaml", "--out", "small.yaml"), "--out small.yaml: is a file; name a fold"),
    ],
)
def test_a_place_that_cannot_be_written_is_told_before_the_work(folder, command, says, monkeypatch):
    monkeypatch.setattr("fmsim.run_scenario", None)
    assert refused(fmsim_here(*command, folder=folder), says)


def test_a_run_writes_into_the_current_folder(folder):
    here = folder / "here"
    here.mkdir()
    done = fmsim_here("run", "../small.yaml", "-p", "full", "--out", ".", folder=here)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(here)) == ["ledgers", "report.json", "timelines"]


def test_escape_sequences_are_shown_escaped(folder):
    done = fmsim_here("run", "\x1b[31mred\udcff.yaml", folder=folder)
    assert refused(done, r"\x1b[31mred\udcff.yaml: no such scenario file")


def test_labels_that_would_share_a_file_are_kept_apart(folder):
    (folder / "labels.yaml").write_text(
        "name: case\ntrace: small.safetensors\npolicies:\n"
        "  - {policy: lru, budget: 20%, label: lru a}\n"
        "  - {policy: lru, budget: 80%, label: lru_a}\n"
    )
    done = fmsim_here("run", "labels.yaml", "--out", "kept", folder=folder)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (folder / "kept/ledgers").iterdir()}
    assert len(names) == 2 and "lru_a.npz" in names
    [other] = names - {"lru_a.npz"}
    (folder / "kept/ledgers/lru_a.npz").write_bytes((folder / "kept/ledgers" / other).read_bytes())
    done = fmsim_here("report", "kept", "--out", "page.html", folder=folder)
    assert refused(done, "its ledgers or timelines are another run's")
