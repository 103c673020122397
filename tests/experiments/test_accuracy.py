"""Answers under policies, from a small untrained model: what decodes, what is kept of it, and what
the table makes of lines.
"""

import itertools
import json
from dataclasses import fields
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch", reason="answers need fmsim[model]")

from tiny_model import CSA, HCA, SLIDING, oracle, ours

from fmsim.cli import program
from fmsim.errors import FmsimError
from fmsim.exec.decode.engine import Engine
from fmsim.exec.decode.prompt import Prompt
from fmsim.exec.runs.native import native_indexer
from fmsim.experiments import accuracy
from fmsim.experiments.accuracy import Lines, Plan, ask, policy_of, signals, summary
from fmsim.experiments.accuracy.answer import answers
from fmsim.geometry import PRESETS
from fmsim.indexer import checkpoint
from fmsim.nano import tokens as corpora
from fmsim.report.grid import View, show_parts
from fmsim.report.tables import accuracy as table
from fmsim.sim.footprint import ModelMemory
from fmsim.tasks import Question, TaskContext

MODEL = ours(oracle(5, layer_types=[SLIDING, CSA, HCA, CSA], vocab_size=4096))
RANDOM = np.random.default_rng(0)
MEMORY = ModelMemory(PRESETS["v4-flash"])
CONTEXT = TaskContext(
    RANDOM.integers(2, 4096, 300).astype(np.uint16),
    tuple(
        Question(
            "t",
            tuple(RANDOM.integers(2, 4096, size).tolist()),
            tuple(range(10, 22)),
            ("no such thing",),
        )
        for size in (7, 3)
    ),
)
TEXT = (
    "The river ran past an old mill, and nobody knew who had built it there before the stones of"
    " the bridge were cut. " * 60
)


@torch.no_grad()
def test_a_prompt_that_goes_on_is_the_prompt_that_was_read_whole():
    tokens, more = CONTEXT.tokens.tolist(), list(CONTEXT.questions[0].tokens)
    extended = Prompt(MODEL, tokens, 20).extended(more, 5)
    whole = Prompt(MODEL, tokens + more, 5)
    assert extended.tokens == whole.tokens
    np.testing.assert_allclose(extended.hidden, whole.hidden, atol=1e-4)
    np.testing.assert_allclose(extended.mass, whole.mass, atol=2e-2, rtol=2e-3)  # sums of float16
    torch.testing.assert_close(extended.session().logits, whole.session().logits, atol=1e-4, rtol=0)
    with pytest.raises(FmsimError, match="room for 20"):
        Prompt(MODEL, tokens, 20).extended(more, 14)


@pytest.fixture(scope="module")
def found():
    makers = {
        spec: lambda spec=spec: policy_of(spec, "20%")
        for spec in ("full", "lru", "recency", "random", "h2o", "oracle")
    }
    wanted = [(number, label) for number in range(2) for label in makers]
    return {
        (answer.question, answer.label): answer
        for answer in answers(MODEL, CONTEXT, wanted, makers, MEMORY)
    }


@torch.no_grad()
def test_exact_policies_answer_as_a_plain_decode_does(found):
    for number, question in enumerate(CONTEXT.questions):
        session = Prompt(MODEL, [*CONTEXT.tokens.tolist(), *question.tokens], 12).session()
        greedy = session.generate(12)
        for label in ("full", "lru"):
            assert found[number, label].tokens == greedy
    assert found[0, "full"].ledger.hit.sum() == found[0, "full"].ledger.accessed.sum()


@pytest.mark.slow
def test_questions_side_by_side_are_answered_as_one_by_one(native):
    answer = CONTEXT.questions[0].answer
    lengths = (6, 4, 6, 6, 4)
    questions = tuple(
        Question("t", tuple(RANDOM.integers(2, 4096, 3 + n).tolist()), answer[:length], ("x",))
        for n, length in enumerate(lengths)
    )
    context = TaskContext(CONTEXT.tokens, questions)
    specs = (
        "full",
        "lsa:budget=60%",
        "lsa:budget=60%,on_miss=fallback",
        "lru:granularity=4",
        "random",
        "h2o",
        "oracle",
    )
    makers = {spec: lambda spec=spec: policy_of(spec, "20%", native) for spec in specs}
    wanted = [
        (number, spec)
        for number in range(5)
        for spec in specs
        if (number, spec) not in ((2, "full"), (0, "h2o"), (3, "h2o"))
    ]
    together, alone = (
        {
            (found.question, found.label): found
            for found in answers(MODEL, context, wanted, makers, MEMORY, abreast_entries=entries)
        }
        for entries in (2000, 1)
    )
    assert set(together) == set(alone) == set(wanted)
    for key, one in alone.items():
        other = together[key]
        assert other.tokens == one.tokens and len(one.tokens) == lengths[key[0]]
        assert (other.confidence is None) == (
            one.confidence is None
        ) and other.confidence == pytest.approx(one.confidence)
        for field in fields(one.ledger):
            kept, wanted_kept = getattr(other.ledger, field.name), getattr(one.ledger, field.name)
            if field.name.startswith("mass"):
                np.testing.assert_allclose(
                    kept, wanted_kept, rtol=1e-3, atol=1e-5
                )  # sums of float16
            else:
                assert np.array_equal(kept, wanted_kept), (key, field.name)


def test_the_oracle_keeps_more_than_any_other_of_the_same_budget(found):
    for number in range(2):
        kept = {
            label: float(found[number, label].ledger.mass_kept.sum())
            for label in ("recency", "random", "h2o", "oracle")
        }
        assert max(kept, key=kept.get) == "oracle"
        slots = {label: found[number, label].ledger.n_slots for label in kept}
        assert len(set(slots.values())) == 1
        assert (found[number, "oracle"].ledger.resident <= slots["oracle"]).all()


def test_the_future_is_refused_without_hindsight():
    prompt = Prompt(MODEL, CONTEXT.tokens.tolist(), 4)
    with pytest.raises(FmsimError, match="oracle: looks into the future"):
        Engine(prompt, policy_of("oracle", "20%"))


def test_policies_are_read_from_specs(tmp_path):
    assert str(policy_of("recency", "10%").params.budget) == str(
        policy_of("recency:budget=10%", "40%").params.budget
    )
    path = tmp_path / "i.safetensors"
    lsa = policy_of("lsa:on_miss=fallback,fallback_below=0.9", "10%", str(path))
    assert (lsa.params.on_miss, lsa.params.fallback_below, lsa.params.checkpoint) == (
        "fallback",
        0.9,
        path,
    )
    for spec, said in (
        ("lsa:fallback", "key=value"),
        ("lru:budget=[", "budget, line 2: not valid YAML"),
        ("lsi", "did you mean"),
        ("lru:bugdet=3", "bugdet"),
    ):
        with pytest.raises(FmsimError, match=said):
            policy_of(spec, "10%")


def opened():
    return MODEL, corpora.from_texts({f"text {n}": TEXT for n in range(3)})


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    path = tmp_path_factory.mktemp("native") / "native.safetensors"
    checkpoint.save(native_indexer(MODEL, "tiny"), path)
    return str(path)


def small_plan(native, **changes):
    plan = {
        "tasks": ("niah_single", "memory"),
        "lengths": (768,),
        "samples": 2,
        "policies": ("full", "lsa", "recency"),
        "budget": "30%",
        "checkpoint": native,
    }
    return Plan(**(plan | changes))


def test_a_run_goes_on_where_it_was_interrupted(tmp_path, native, monkeypatch):
    plan, path = small_plan(native), tmp_path / "answers.jsonl"
    whole = accuracy.run(opened, plan, Lines(plan, {"model": "tiny"}, path))
    assert len(whole) == 2 * 2 * 3
    kept = path.read_text().splitlines(keepends=True)
    path.write_text("".join(kept[:6]) + kept[6][:20])  # killed while it wrote the sixth answer
    asked = []
    real = ask.costs
    monkeypatch.setattr(ask, "costs", lambda ledger, plan: asked.append(1) or real(ledger, plan))
    again = accuracy.run(opened, plan, Lines(plan, {"model": "tiny"}, path))
    assert len(asked) == 7 and again == whole
    longer = small_plan(native, samples=3, policies=("full", "recency", "random"))
    more = accuracy.run(opened, longer, Lines(longer, {"model": "tiny"}, path))
    assert len(more) == 3 * 2 * 3 and [
        line for line in more if line["policy"] == "full" and line["sample"] < 2
    ] == [line for line in whole if line["policy"] == "full"]
    path.write_text(path.read_text() + "no answer\n")
    with pytest.raises(FmsimError, match="line 24 is no answer"):
        Lines(plan, {"model": "tiny"}, path)
    for other, about in (
        (small_plan(native, budget="31%"), {"model": "tiny"}),
        (small_plan(native, model="v4-pro"), {"model": "tiny"}),
        (plan, {"model": "other"}),
    ):
        with pytest.raises(FmsimError, match="answers.jsonl: holds answers of another"):
            Lines(other, about, path)


def test_several_processes_answer_as_one_does(tmp_path, native):
    torch.save(opened(), tmp_path / "source.pt")
    source = partial(torch.load, tmp_path / "source.pt", weights_only=False)
    plan, path = (
        small_plan(native, lengths=(768, 700), samples=1, seeds=(42, 7), policies=("full", "lsa")),
        tmp_path / "answers.jsonl",
    )
    alone = accuracy.run(opened, plan, Lines(plan, {}, path))
    assert [(line["tokens"], line["seed"]) for line in alone] == [
        pair for pair in ((768, 42), (768, 7), (700, 42), (700, 7)) for _ in range(4)
    ]
    kept = path.read_text().splitlines(keepends=True)
    path.write_text("".join(kept[:4]))  # three answers of the first context
    told = []
    again = accuracy.run(
        source, plan, Lines(plan, {}, path), lambda *what: told.append(what), workers=2
    )
    assert again == alone and summary(again) == summary(alone)
    assert sorted(path.read_text().splitlines()) == sorted("".join(kept).splitlines())
    dones = [done for _, done, _ in told]
    assert dones == sorted(dones) and dones[0] == 0 and dones[-1] == 4
    assert any(done % 1 for done in dones)  # within a context too
    assert {total for _, _, total in told} == {4}


def test_no_context_is_begun_after_the_time_given(native, monkeypatch):
    plan = small_plan(native, policies=("full",))
    for seconds, contexts in ((1.5, 1), (2.5, 2)):
        clock = SimpleNamespace(monotonic=itertools.count().__next__)  # a look takes a second
        monkeypatch.setattr(ask, "time", clock)
        found = accuracy.run(opened, plan, Lines(plan, {}), seconds=seconds)
        assert len({line["sample"] for line in found}) == contexts
    with pytest.raises(FmsimError, match="--seconds 0: over before the first context began"):
        accuracy.run(opened, plan, Lines(plan, {}), seconds=0)


def line(policy, score, task="vt", tokens=1024, sample=0, question=0, missing=0.0, seed=42):
    costs = {
        "gpu_bytes": 20,
        "gpu_ratio": 0.2,
        "max_requests": 3,
        "kv_bytes": 10,
        "kv_ratio": 0.1,
        "golden_kept": 1.0,
        "mass_kept": 1.0 - missing / 2,
        "least_mass_kept": 0.1,
        "heaviest_lost": missing,
        "h2d_bytes_per_step": 4.0,
        "stall_ratio": 0.0,
    }
    return {
        "policy": policy,
        "task": task,
        "tokens": tokens,
        "seed": seed,
        "sample": sample,
        "question": question,
        "score": score,
        "selected_resident": 1 - missing,
        "confidence": None if policy == "full" else missing,
    } | costs


def test_the_summary_by_hand():
    lines = [
        line("full", 1.0),
        line("lsa", 0.0, missing=0.9),
        line("full", 1.0, sample=1),
        line("lsa", 1.0, sample=1, missing=0.2),
        line("full", 0.0, sample=2),
        line("lsa", 0.5, sample=2, missing=0.5),
        line("full", 1.0, task="qa"),
        line("lsa", 1.0, task="qa", missing=0.3),
        line("full", 1.0, task="qa", question=1),
        line("lsa", 0.0, task="qa", question=1, missing=0.1),
    ]
    found = summary(lines)
    cells = {(cell["task"], cell["policy"]): cell for cell in found["cells"]}
    assert cells["vt", "lsa"]["score"] == pytest.approx(0.5) and cells["vt", "lsa"]["samples"] == 3
    assert (
        cells["qa", "lsa"]["score"] == pytest.approx(0.5)
        and cells["qa", "lsa"]["versus_full_ci95"]["half_width"] is None
    )
    differences = np.array([-1.0, 0.0, 0.5])
    assert cells["vt", "lsa"]["versus_full"] == pytest.approx(differences.mean())
    spread = cells["vt", "lsa"]["versus_full_ci95"]
    assert spread["n"] == 3
    # Student's t for two degrees of freedom times the standard error
    error = differences.std(ddof=1) / 3**0.5
    assert spread["half_width"] == pytest.approx(4.303 * error, rel=0.05)
    assert (spread["low"], spread["high"]) == (-1.0, 1.0)
    [average] = [row for row in found["averages"] if row["policy"] == "full"]
    assert average["score"] == pytest.approx((2 / 3 + 1) / 2)
    assert average["score_ci95"]["n"] == 4  # vt and qa are asked in contexts of their own
    assert found["overall"][0]["kv_ratio"] == pytest.approx(0.1)
    # lost with 0.9 and 0.1 missing, kept with 0.2 and 0.3; what full does not answer does not count
    auc = dict.fromkeys(signals.SIGNALS, 0.5)
    assert found["signals"] == {"lsa": {"lost": 2, "kept": 2, "auc": auc}}
    # by sample: vt -1, 0 and +0.5; qa's one sample the mean of 0 and -1; the seed's the mean of
    # both tasks'
    assert found["paired"] == {
        "lsa": {
            "better": 1,
            "worse": 2,
            "same": 1,
            "difference": pytest.approx(-1 / 3),
            "difference_ci95": found["paired"]["lsa"]["difference_ci95"],
            "by_seed": {"42": pytest.approx(-1 / 3)},
        }
    }
    # qa has one context, which cannot be drawn: its difference is taken for sure
    spread = found["paired"]["lsa"]["difference_ci95"]
    assert spread["n"] == 4
    assert spread["half_width"] == pytest.approx(4.303 * error / 2, rel=0.05)


def test_a_difference_is_weighed_against_the_spread_from_context_to_context():
    lines = []
    for seed, scores in ((42, (1.0, 0.5)), (43, (0.0, 0.5)), (44, (1.0, 1.0))):
        for sample, score in enumerate(scores):
            lines += [
                line("full", 0.5, sample=sample, seed=seed),
                line("lsa", score, sample=sample, seed=seed),
            ]
    lines += [line("recency", 0.0, sample=9, seed=45)]  # full was not asked
    found = summary(lines)
    row = found["paired"].pop("lsa")
    assert found["paired"] == {} and row["by_seed"] == {"42": 0.25, "43": -0.25, "44": 0.5}
    assert (row["better"], row["worse"], row["same"]) == (3, 1, 2)
    assert row["difference"] == pytest.approx(1 / 6)
    differences = np.array([0.5, 0.0, -0.5, 0.0, 0.5, 0.5])
    spread = row["difference_ci95"]
    assert spread["n"] == 6
    error = differences.std(ddof=1) / 6**0.5
    assert spread["half_width"] == pytest.approx(2.571 * error, rel=0.05)
    assert spread["low"] == pytest.approx(1 / 6 - spread["half_width"])
    [cell] = [cell for cell in found["cells"] if cell["policy"] == "lsa"]
    assert cell["samples"] == 6 and cell["versus_full"] == pytest.approx(
        1 / 6
    )  # each seed's samples are their own


def test_a_signal_is_judged_by_how_it_orders_lost_and_kept():
    lost = np.array([True, False, False])
    assert signals._auc(np.array([0.9, 0.1, 0.2]), lost) == 1.0
    assert signals._auc(np.array([0.1, 0.1, 0.2]), lost) == 0.25


def test_the_command_prints_writes_and_plots(tmp_path, native, monkeypatch, capsys):
    from fmsim.cli import eval as command

    monkeypatch.setattr(command, "_model", lambda device: MODEL)
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 3)
    call = [
        "eval",
        "--text",
        str(text),
        "-t",
        "niah_single",
        "-t",
        "vt",
        "-l",
        "768",
        "--samples",
        "1",
        "--budget",
        "30%",
        "--checkpoint",
        native,
    ]
    call += [
        "--out",
        str(tmp_path / "out"),
        "-p",
        "full",
        "-p",
        "lsa",
        "-p",
        "lsa:on_miss=fallback",
        "-p",
        "oracle",
    ]
    shown = CliRunner().invoke(program(["eval"]), [*call, "--plot", str(tmp_path / "plot.html")])
    assert shown.exit_code == 0, shown.output
    assert (
        "scores at 768 tokens" in shown.stdout
        and "MiB/step" in shown.stdout
        and "beside full" in shown.stdout
        and "single" in shown.stdout
    )
    assert (
        "still answer with less KV on the GPU, at 768 tokens?"
        in (tmp_path / "plot.html").read_text()
    )
    report = json.loads(CliRunner().invoke(program(["eval"]), [*call, "--json"]).stdout)
    assert report["cells"] == json.loads((tmp_path / "out" / "report.json").read_text())["cells"]
    ratios = {row["policy"]: row["kv_ratio"] for row in report["overall"]}
    assert (
        ratios["full"] == 1.0
        and max(ratio for policy, ratio in ratios.items() if policy != "full") <= 0.32
    )
    flat = CliRunner().invoke(program(["eval"]), [*call, "--csv"]).stdout.splitlines()
    assert len(flat) == 1 + len(report["cells"]) and flat[0].startswith("tokens,task,policy,")
    for width in (80, 100, 120):
        show_parts(table.parts(report), View(width))
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= width and not any("…" in line for line in lines)
    for wrong, said in (
        (["eval"], "--corpus"),
        ([*call, "-t", "niah"], "niah"),
        ([*call, "-p", "nope"], "nope"),
    ):
        with pytest.raises(FmsimError, match=said):
            CliRunner().invoke(program(["eval"]), wrong, catch_exceptions=False)
