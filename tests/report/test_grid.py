"""Tables fit: every row is one line, whole, at 80, 100 and 120 columns."""

import fcntl
import json
import os
import pty
import random
import re
import struct
import sys
import termios

import pytest
from command import fmsim_here

from fmsim.errors import FmsimError
from fmsim.report.grid import ALL, Field, Grid, View, show_parts, width_of
from fmsim.report.tables import decode, plan, serving, sweep, validation, verdict
from fmsim.scenario import shipped

WIDTHS = (80, 100, 120)
TRACE = shipped.TRACES / "nano-32k-needles.safetensors"  # read sooner than its own
COMMANDS = {
    "run": (
        *("run", "500k", "-p", "full", "-p", "lru held sees all", "-p", "lsa", "-p", "lru"),
        *("--set", f"trace={TRACE}", "--set", "budgets=[12.5% gpu, 50% gpu]"),
    ),
    "plan": (
        "plan",
        "32k",
        "--set",
        "budgets=[40% gpu]",
        "-p",
        "full",
        "-p",
        "lsa",
        "-p",
        "lru",
        "-p",
        "h2o",
        "-p",
        "lfu",
    ),
    "plan of several": ("plan", "--context", "512K", "--hardware", "h100,rtx-pro-6000"),
    "serving": ("run", "serve", "--set", "workload.duration_s=8"),
    "sweep": ("sweep", "32k", "-p", "lsa", "-p", "lru", "-g", "policies.lsa.budget=5%,10%"),
    "validate": ("validate", "32k", "-p", "lru", "-p", "lsa", "--whole-steps"),
}


def shown(name, report, view):
    if name == "run":
        decode.show(report, view)
    elif name == "serving":
        serving.show(report, view)
    elif name == "sweep":
        show_parts(sweep.parts(report, "rows in sweep.jsonl"), view)
    elif name == "validate":
        show_parts(validation.parts(report), view)
    else:
        plan.show(report, view)


def validated():
    """A report of `fmsim validate --whole-steps`, with figures as wide as they come."""
    row = {
        "policy": "lsa-fallback",
        "identical": True,
        "first_difference": None,
        "differing_fields": [],
        "replay_pages": 1_234_567,
        "engine_pages": 1_234_567,
        "replay_bytes": 12345 * 2**20,
        "engine_bytes": 12345 * 2**20,
        "predicted_gpu_bytes": 12345 * 2**20,
        "allocator_gpu_bytes": 12345 * 2**20,
        "memory_error": -0.00123,
        "memory_holds": True,
        "spare_bytes": 123 * 2**20,
        "simulated_step_p50_s": 0.01234,
        "measured_step_p50_s": 0.01234,
        "step_error": -0.0123,
        "batch": 128,
        "context_tokens": 512_000,
        "simulated_tokens_per_s": 1234.5,
        "measured_tokens_per_s": 1234.5,
    }
    about = {
        "name": "one-gpu-500k",
        "trace": "/a/long/path/of/a/checkout/traces/nano-500k-needles.safetensors",
        "steps": 520,
        "model": "v4-flash",
        "csa_layers": 21,
        "device": "cuda",
        "whole_steps": True,
        "notes": ["measured on this machine's GPU; simulated for the scenario's hardware"],
    }
    return {"scenario": about, "policies": [row, row | {"policy": "full"}]}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")
    found = {"validate": validated()}
    for name, command in COMMANDS.items():
        if name != "validate":
            done = fmsim_here(*command, "--json", folder=folder)
            assert done.returncode == 0, done.stderr
            found[name] = json.loads(done.stdout)
    return found


def tables(text):
    """Of each table its lines."""
    return re.findall(r"^┏.*?^└[^\n]*$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", COMMANDS)
def test_no_row_wraps_or_is_cut(name, width, reports, capsys):
    shown(name, reports[name], ALL)
    whole = tables(capsys.readouterr().out)
    shown(name, reports[name], View(width))
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    found = tables(text)
    assert found
    every = {line.split("│")[1].strip() for table in whole for line in rows(table)}
    for table in found:
        lines = table.splitlines()
        assert len({len(line) for line in lines}) == 1
        # each row begins with what it is of, as in the whole table
        assert {line.split("│")[1].strip() for line in rows(table)} <= every
    assert len(rows(whole[0])) == len(rows(found[0]))


def rows(table):
    return [line for line in table.splitlines() if line.startswith("│")]


@pytest.mark.parametrize("name", COMMANDS)
def test_more_room_shows_more_and_enough_shows_all(name, reports, capsys):
    counts = []
    for view in [*(View(width) for width in (80, 120, 160)), View(1000), ALL]:
        shown(name, reports[name], view)
        counts.append(tables(capsys.readouterr().out)[0].splitlines()[0].count("┳"))
    assert counts == sorted(counts) and counts[0] < counts[-1] == counts[-2]


def test_what_matters_most_stays(reports, capsys):
    decode.show(reports["run"], View(80))
    text = capsys.readouterr().out
    head = " ".join(tables(text)[0].splitlines()[1:3])
    assert not [
        word for word in ("policy", "kind", "kept", "requests", "on GPU") if word not in head
    ], head
    told = " ".join(text.split())
    assert re.search(r"no room for .*golden-kept.*: --wide, --columns A,B", told)


def test_on_random_tables_what_fits_is_shown_by_rank():
    source = random.Random(3)
    for _ in range(60):
        fields = [Field(f"f{n}" * source.randint(1, 5), source.randint(1, 9)) for n in range(8)]
        grid = Grid([Field("name", 0, "left"), *fields])
        for _ in range(3):
            grid.add(*("x" * source.randint(1, 12) for _ in range(9)))
        width = source.randint(30, 120)
        places = grid._places(View(width))
        assert width_of(grid.table(View(width))) <= width
        for absent in set(range(9)) - set(places):
            rank = grid.fields[absent].rank
            before = [one for one in places if grid.fields[one].rank < rank]
            same = [one for one in places if grid.fields[one].rank == rank]
            assert width_of(grid._table(sorted({*before, *same, absent}))) > width


def test_columns_by_name_and_a_wrong_one(reports, capsys):
    decode.show(reports["run"], View(80, ("mass-kept", "per-step")))
    text = capsys.readouterr().out
    assert tables(text)[0].splitlines()[0].count("┳") == 2  # the policy, and both
    notes = " ".join(text.rpartition("┘")[2].split())
    assert not [word for word in ("golden kept: ", "±: ") if word not in notes]
    assert not [word for word in ("on GPU: ", "bound by: ", "stall: ") if word in notes]
    with pytest.raises(FmsimError, match="no column 'mass-kep'; did you mean 'mass-kept'"):
        decode.show(reports["run"], View(80, ("mass-kep",)))


def test_markdown_has_the_same_cells(reports):
    lines = decode.markdown(reports["run"]).splitlines()
    assert len({line.count(" | ") for line in lines}) == 1
    assert lines[0].startswith("| policy | kind | on GPU GiB | of full |")
    [full] = [line for line in lines if line.startswith("| full ")]
    assert "| exact | 0.121 | 100.0% |" in full


def test_a_pipe_gets_every_column_whatever_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert View.of_terminal() == ALL


def test_in_a_terminal_of_80_columns_and_wide():
    narrow = in_terminal(80, "run", "32k", "-p", "full", "-p", "lsa")
    assert max(map(len, narrow.splitlines())) <= 80 and "no room for" in narrow
    told = " ".join(narrow.split())
    assert re.search(r"lsa 40% gpu: [\d.]+ x the requests of full in the same memory; loses", told)
    wide = in_terminal(80, "run", "32k", "-p", "full", "--wide")
    assert "no room for" not in wide


def in_terminal(columns, *arguments):
    """What a command prints into a terminal so wide."""
    pid, master = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        os.environ.pop("COLUMNS", None)
        os.environ["TERM"] = "xterm"
        code = "from fmsim.cli import main; main()"
        os.execv(sys.executable, [sys.executable, "-c", code, *arguments, "-q"])
    text = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        text += part
    os.close(master)
    _, status = os.waitpid(pid, 0)
    assert status == 0, text.decode()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.decode()).replace("\r\n", "\n")


def row(label, requests, mass, half_width=None, stall=0.0):
    interval = {} if half_width is None else {"mass_kept": {"half_width": half_width}}
    return {
        "policy": label,
        "max_requests": requests,
        "mass_kept": mass,
        "ci95": interval,
        "stall_ratio": stall,
    }


@pytest.mark.parametrize(
    "one, exact, says",
    [
        (row("lsa", 97, 0.88, 0.02), False, "lsa: 12 x the requests of full in the same memory; loses 12% ± 2 of the mass."),  # noqa: E501
        (row("lru", 45, 1.0, None, 0.034), True, "lru: 5.6 x the requests of full in the same memory; loses nothing; waits for the host 3.4% of the time."),  # noqa: E501
        (row("lru held", 8, None), False, "lru held: 1 x the requests of full in the same memory; what it loses is not known of this trace."),  # noqa: E501
    ],
)  # fmt: skip
def test_a_verdict_is_one_sentence(one, exact, says):
    assert verdict.sentence(one, row("full", 8, 1.0), exact) == says
