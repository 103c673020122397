"""The pages of a sweep, a search, `fmsim eval` and a trace, as a user makes them."""

import json
import re
from html import unescape

import pytest
from browser import check, measured, needs_browser
from command import fmsim_here
from made_trace import make_trace

from fmsim.report.pages import accuracy, recall
from fmsim.report.pages.layout import figures, render
from fmsim.trace import write

SCENARIO = "name: small\ntrace: small.safetensors\npolicies: [full, lru, {policy: h2o}, oracle]\n"
SERVED = """\
name: talks
trace: small.safetensors
policies: [full, {policy: lru, budget: 2x topk}]
workload: {kind: poisson, rate_per_s: 2, prompt_tokens: 1000, output_tokens: 20, duration_s: 4}
"""


def answered():
    """A report of `fmsim eval`, as it stands in report.json."""
    interval = {"low": 0.4, "high": 0.6, "half_width": 0.1, "n": 4, "alike": False}
    cells, averages, overall = [], [], []
    for place, policy in enumerate(("full", "lsa:threshold=0.5", "lru", "oracle")):
        row = {
            "policy": policy,
            "score": 0.9 - 0.1 * place,
            "score_ci95": interval,
            "gpu_bytes": 2e9 / (1 + place),
            "gpu_ratio": 1 / (1 + place),
            "kv_ratio": 0.2,
            "golden_kept": 0.9,
            "mass_kept": 1.0 if policy in ("full", "lru") else 0.8,
            "h2d_bytes_per_step": 2e6,
            "stall_ratio": 0.1,
        }
        overall.append(row)
        for tokens in (8192, 32768):
            averages.append(row | {"tokens": tokens})
            for task in ("niah_single", "vt"):
                cells.append(row | {"tokens": tokens, "task": task, "samples": 4})
    plan = {"model": "v4-flash", "hardware": "h100", "budget": "10%", "seeds": [42]}
    about = {"model": "nano", "plan": plan}
    return {
        "about": about,
        "cells": cells,
        "averages": averages,
        "overall": overall,
        "paired": {},
        "signals": {},
    }


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """By name the page that each command wrote."""
    folder = tmp_path_factory.mktemp("pages")
    write(folder / "small.safetensors", make_trace())
    (folder / "small.yaml").write_text(SCENARIO)
    (folder / "talks.yaml").write_text(SERVED)
    grids = ("-g", "policies.*.budget=10%,20%", "-g", "batch=1,4")
    commands = (
        ("sweep", "small.yaml", "-p", "lru", "-p", "h2o", *grids, "-q"),
        ("sweep", "talks.yaml", "-g", "workload.rate_per_s=1,2", "--out", "served.jsonl", "-q"),
        ("tune", "small.yaml", "-p", "h2o", "-n", "6", "--floor", "0.5", "-q"),
        ("report", "sweep.jsonl", "-q", "--figures", "charts"),
        ("report", "served.jsonl", "-q"),
        ("report", "tune.jsonl", "-q"),
        ("report", "small.safetensors", "--out", "trace.html", "-q"),
    )
    for command in commands:
        done = fmsim_here(*command, folder=folder)
        assert done.returncode == 0, (command, done.stderr)
    (folder / "answers").mkdir()
    (folder / "answers/report.json").write_text(json.dumps(answered()))
    assert fmsim_here("report", "answers", "-q", folder=folder).returncode == 0
    found = {name: folder / f"{name}.html" for name in ("sweep", "served", "tune", "trace")}
    return found | {"eval": folder / "answers/report.html"}


@pytest.mark.parametrize(
    "name, question, answer",
    [
        ("sweep", "What do policies.*.budget, batch change, over", r"Fastest is \w+.*tokens/s\*"),
        ("served", "What do workload.rate_per_s change", r"Fastest is .*good requests/s\*"),
        ("tune", "Which setting of h2o is fastest", r"(Of the \d+ that keep|None of the settings)"),
        ("trace", "How often does", r"\d+% of a step's entries were selected by the step before"),
        ("eval", "What does nano still answer", r"lsa:threshold=0.5 answers best with less: 80.0"),
    ],
)
def test_each_begins_with_its_question_and_answer(pages, name, question, answer):
    text = pages[name].read_text()
    assert question in text
    [told] = re.findall(r'<p class="answer">(.*?)</p>', text, flags=re.DOTALL)
    assert re.match(answer, unescape(told)), told
    assert re.search(r'<div class="lead"><figure', text) and text.count("<table>") == 1
    assert not re.search(r"(src|href)=[\"'](?!#|data:)", text)


@needs_browser
@pytest.mark.parametrize("name", ["sweep", "served", "tune", "trace", "eval"])
def test_a_browser_draws_each_on_a_light_screen_and_a_dark_phone(pages, tmp_path, name):
    for width, dark in ((1400, False), (420, True)):
        check(measured(pages[name], tmp_path, width, dark), width, dark)


def test_a_sweeps_charts_are_files(pages):
    names = {path.stem for path in (pages["sweep"].parent / "charts").iterdir()}
    assert {"quality", "speed-batch", "kept-policies-all-budget"} <= names


def test_a_lossy_and_an_exact_setting_are_marked_apart(pages):
    rows = [json.loads(line) for line in (pages["tune"].parent / "tune.jsonl").open()]
    assert all(row["values"] for row in rows)
    kinds = {row.get("exact") for row in rows if "figures" in row}
    text = pages["tune"].read_text()
    assert ("h2o, lossy" in text) == (kinds == {True, False})


def test_the_page_of_answers_has_a_chart_a_task():
    page = accuracy.page(answered(), "answers")
    assert {"quality", "task-niah-single-8192", "task-vt-32768"} <= set(figures(page))


def test_the_page_of_an_indexers_recall():
    shares, names = [0.05, 0.1, 0.2], ("lsa (max)", "oracle")
    found = {
        "kept_shares": shares,
        "queries": 14,
        "state_age": 1,
        "golden_recall": {name: [0.5, 0.7, 0.9] for name in names},
        "mass_recall": {name: [0.6, 0.8, None] for name in names},
        "half_width": {
            key: {name: [0.01, None, 0.01] for name in names}
            for key in ("golden_recall", "mass_recall")
        },
        "threshold": None,
    }
    text = render(recall.page(found, "held"))
    assert "With 10% of the entries kept, lsa (max) recalls 70.0% of the golden ones" in text


def test_what_is_none_of_these_is_refused(pages, tmp_path):
    (tmp_path / "x.txt").write_text("x")
    (tmp_path / "x.jsonl").write_text("{}\n")
    for name, says in (
        ("x.txt", "give a folder of `fmsim run --out`"),
        ("x.jsonl", "line 1: not a row of results"),
        ("no.jsonl", "no.jsonl: no such file"),
    ):
        done = fmsim_here("report", name, folder=tmp_path)
        assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1
    sweep = str(pages["sweep"].parent / "sweep.jsonl")
    done = fmsim_here("report", sweep, "--perfetto", "x.json", folder=tmp_path)
    assert done.returncode == 2 and "--perfetto" in done.stderr
