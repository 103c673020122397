"""`fmsim exec` as a user calls it, and the report it is made from."""

import json

import pytest

torch = pytest.importorskip("torch", reason="exec needs fmsim[model]")
pytest.importorskip("transformers", reason="exec needs fmsim[model]")

import numpy as np
from command import FIELDS, WIDTHS, fits, fmsim_here
from tiny_model import CSA, HCA, SLIDING, oracle, ours

from fmsim import trace
from fmsim.errors import FmsimError
from fmsim.exec.kv import memory
from fmsim.exec.runs import live as run
from fmsim.exec.runs.stream import Stream, Turn
from fmsim.policies import registry
from fmsim.report.grid import View, show_parts
from fmsim.report.tables import measured


def tiny(count=2):
    """A model and what it is asked."""
    model = ours(oracle(layer_types=[SLIDING, CSA, HCA, CSA], index_topk=8))
    rng = np.random.default_rng(0)
    turns = [Turn([1, 2, 3], 2, (5, 6)), Turn([4], 9)]
    return model, [Stream("text", rng.integers(0, 64, 120 - 7 * n), turns) for n in range(count)]


def decoded(spec, count=2):
    model, streams = tiny(count)
    return run.decode(run.read(model, streams), streams, registry.build(spec))


def test_the_report_has_the_fields_of_a_run_and_they_hang_together():
    reports = {}
    for spec in ("full", "lru", {"policy": "recency", "budget": "30%"}):
        batch, results = decoded(spec)
        report = run.report(batch, results, "it", "tiny", "text")
        [row] = report["policies"]
        assert list(row) == FIELDS and list(row["step_s"]) == ["p50", "p99"]
        assert row["max_requests"] is None and report["scenario"]["steps"] == 15
        assert report["scenario"]["quality"]["asked"] == 2
        reports[batch.policy.name] = row
    assert reports["full"]["gpu_ratio"] == pytest.approx(1) and reports["full"]["h2d_bytes"] == 0
    assert (
        reports["lru"]["mass_kept"] == 1
        and reports["lru"]["h2d_bytes"] > 0
        and reports["lru"]["stall_ratio"] > 0
    )
    assert (
        reports["recency"]["mass_kept"] < 1
        and reports["recency"]["gpu_bytes"] < reports["full"]["gpu_bytes"]
    )


def test_what_was_forced_and_answered_is_told_apart(tmp_path):
    batch, results = decoded("full", 1)
    tokens = batch.requests[0].tokens
    assert results[0].forced == [True] * 3 + [False] * 2 + [True] + [False] * 9
    assert [answer for _, answer, _ in results[0].answers] == [tokens[3:5], tokens[6:]]
    assert [right for *_, right in results[0].answers] == [tokens[3:5] == [5, 6], None]
    trace.write(
        tmp_path / "it.safetensors",
        run.recorded(batch, results, name="tiny", sha256="", seed=0, prompt_text="", kind="text"),
    )
    assert trace.read(tmp_path / "it.safetensors", check=True).n_steps == 15


def test_memory_that_is_short_is_told_with_the_figure(monkeypatch):
    monkeypatch.setattr(memory, "host_free_bytes", lambda: 1000)
    with pytest.raises(
        FmsimError,
        match=(
            r"host memory for the cache: .* GiB are needed, .* GiB more than the .* that are free"
        ),
    ):
        decoded("lru")


def test_nano_answers_from_the_command_line_both_policies_of_one_reading(monkeypatch, capsys):
    read = []
    whole = run.Prompt
    monkeypatch.setattr(run, "Prompt", lambda *given: read.append(1) or whole(*given))
    done = fmsim_here(
        *("exec", "-p", "lru", "-p", "recency", "-s", "budget=30%"),
        *("--context", "1024", "--steps", "2", "--device", "cpu", "--json"),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert len(read) == 1
    assert [row["policy"] for row in report["policies"]] == ["lru", "recency"]
    assert all(list(row) == FIELDS for row in report["policies"])
    assert report["scenario"]["quality"]["asked"] >= 1
    assert list(report["scenario"]["details"]) == ["lru", "recency"]
    asked = ("What is the access code of the vault?", "4711", True)
    for width in WIDTHS:
        show_parts(measured.parts(report, [[asked], [asked]]), View(width))
        fits(capsys.readouterr().out, width)


def test_a_prompt_that_was_read_serves_the_next_policy():
    """Its row, its details and its answers are as alone."""
    model, streams = tiny()
    prompts = run.read(model, streams)
    lru, recency = "lru", {"policy": "recency", "budget": "30%"}
    run.decode(prompts, streams, registry.build(lru))
    found = [run.decode(prompts, streams, registry.build(recency)), decoded(recency)]
    assert [one.tokens for one in found[0][0].requests] == [
        one.tokens for one in found[1][0].requests
    ]
    after, alone = (run.report(*each, "it", "tiny", "text") for each in found)
    timed = dict.fromkeys(("decode_tokens_per_s", "step_s", "stall_ratio"))
    assert after["policies"][0] | timed == alone["policies"][0] | timed
    for part in ("details", "quality"):
        assert after["scenario"][part] == alone["scenario"][part]


def test_why_more_than_all_pages_is_allocated_is_said(capsys):
    for budget, more in (("95%", True), ("20%", False)):
        batch, results = decoded({"policy": "lru", "budget": budget}, 1)
        show_parts(
            measured.parts(run.report(batch, results, "lru", "tiny", "text"), [[]]), View(1000)
        )
        told = " ".join(capsys.readouterr().out.split())
        assert "spare pages for misses and recalls" in told
        assert ("all that one step selects may miss" in told) == more


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--policy", "lruu"], "no policy named 'lruu'; did you mean 'lru'?"),
        (["--policy", "lru", "--set", "budget"], "--set budget: write key=value"),
        (
            ["--policy", "lru", "--context", "600"],
            "--context 600: the built-in questions need 1,024 tokens or more",
        ),
        (["-p", "lru", "-p", "lru"], "--policy lru: it is there twice; give it once"),
        (
            ["-p", "lru", "-p", "lsa", "--record", "x.safetensors"],
            "--record: writes what one policy's decode selected; give one --policy",
        ),
        (
            ["-p", "lru", "-p", "lsa", "--weights", "synthetic"],
            "--weights synthetic: decodes under one policy; give one --policy",
        ),
        (["--policy", "lru", "--model", "."], "give a --prompt-file"),
    ],
)
def test_a_users_mistake_is_one_line(arguments, says):
    done = fmsim_here("exec", *arguments)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1
