"""Answers kept, worked by hand; whether mass foretells them; and the file that ships."""

import pytest

from fmsim.errors import FmsimError
from fmsim.experiments import measured_answers as measured
from fmsim.experiments.accuracy import Plan, at_budgets, policy_of, summary
from fmsim.experiments.accuracy.ask import evenly
from fmsim.experiments.accuracy.kept import _ranks, answers_kept, guide
from fmsim.policies import registry


def line(policy, score, sample=0, task="memory", question=0, mass=0.5, tokens=1024):
    costs = dict.fromkeys(("gpu_bytes", "gpu_ratio", "max_requests"), 2.0)
    return costs | {
        "policy": policy,
        "task": task,
        "tokens": tokens,
        "seed": 1,
        "sample": sample,
        "question": question,
        "score": score,
        "mass_kept": mass,
    }


def test_answers_kept_by_hand():
    """Two contexts. In the first full has 1 of memory and 1/2 of two rounds, h2o 1 and 0: 1 of 1.5.
    In the second both have 1. So h2o keeps 2 of 2.5.
    """
    lines = []
    for policy, rounds in (("full", (1.0, 0.0)), ("h2o", (0.0, 0.0))):
        lines.append(line(policy, 1.0))
        lines += [
            line(policy, score, task="multi_round", question=number)
            for number, score in enumerate(rounds)
        ]
        lines.append(line(policy, 1.0, sample=1))
    lines.append(line("h2o", 1.0, sample=7))  # full was not asked
    rows = {row["policy"]: row for row in answers_kept(lines)}
    assert rows["h2o"]["kept"] == pytest.approx(2 / 2.5)
    assert (rows["h2o"]["contexts"], rows["h2o"]["questions"]) == (2, 4)
    assert rows["h2o"]["full_score"] == pytest.approx(2.5 / 3)
    assert rows["h2o"]["score"] == pytest.approx(2 / 3)
    # drawn twice, each context stands alone: 1/1.5 and 1/1; Student's t of one degree
    assert rows["h2o"]["kept_ci95"]["half_width"] == pytest.approx(12.7062 / 6, rel=0.05)
    # where all came out alike, a share of 1 - sqrt(0.025) of two contexts could be otherwise
    assert rows["full"]["kept"] == 1.0
    assert [rows[name]["kept_ci95"]["alike"] for name in rows] == [True, False]
    assert rows["full"]["kept_ci95"]["half_width"] == pytest.approx(1 - 0.025**0.5)
    [nothing] = answers_kept([line("full", 0.0)])
    assert nothing["kept"] is None and nothing["kept_ci95"] is None


def test_a_rank_correlation_by_hand():
    """Masses rank 0 1 2, answers 0 2 1: Spearman's is 1 - 6 x 2 / (3 x 8) = 0.5."""
    rows = [
        {"policy": name, "tokens": 8, "mass_kept": mass, "kept": kept}
        for name, mass, kept in (("a", 0.2, 0.1), ("b", 0.5, 0.9), ("c", 0.6, 0.4))
    ]
    full = {"policy": "full", "tokens": 8, "mass_kept": 1.0, "kept": 1.0}
    found = guide([*rows, full])
    assert found["all"] == {"rank_correlation": pytest.approx(0.5), "points": 3}
    assert found["by_length"] == {"8": found["all"]}
    assert guide(rows[:2])["all"] == {"rank_correlation": None, "points": 2}
    assert _ranks([3.0, 1.0, 3.0]).tolist() == [1.5, 0.0, 1.5]


def test_a_refused_policy_stands_apart():
    lines = [line("full", 1.0), line("lru", 1.0) | {"refused": "too small"}]
    for each in lines:
        each |= {"kv_bytes": 1, "kv_ratio": 1, "golden_kept": 1, "h2d_bytes_per_step": 0}
        each |= {"stall_ratio": 0, "least_mass_kept": 1, "heaviest_lost": 0}
        each |= {"selected_resident": 1, "confidence": None}
    found = summary(lines)
    assert found["refused"] == [{"tokens": 1024, "policy": "lru", "why": "too small"}]
    assert {row["policy"] for row in found["averages"]} == {"full"}


def test_policies_at_several_budgets():
    found = at_budgets(["full", "lru", "lsa:layers=[4]", "h2o:budget=5%"], ["10% gpu", "20%"])
    assert found == [
        "full",
        "lru:budget=10% gpu",
        "lru:budget=20%",
        "lsa:layers=[4],budget=10% gpu",
        "lsa:layers=[4],budget=20%",
        "h2o:budget=5%",
    ]
    assert str(policy_of(found[1], "40%").params.budget) == "10% gpu"


def test_a_length_may_have_fewer_contexts():
    plan = Plan(("memory",), (64, 128), 3, seeds=(1, 2), fewer=((128, 1, 1),))
    items = [(item.tokens, item.seed, item.sample) for item in plan.items()]
    assert items == [(64, seed, sample) for seed in (1, 2) for sample in range(3)] + [(128, 1, 0)]
    # a run that is cut off has as much of each, the longest first
    begun = [(item.tokens, item.sample) for item in evenly(plan.items())]
    assert begun == [(128, 0), (64, 0), (64, 1), (64, 2), (64, 0), (64, 1), (64, 2)]
    with pytest.raises(FmsimError, match="at least 1"):
        Plan(("memory",), (64,), fewer=((64, 0, 1),))


def test_the_file_that_ships_is_found_by_length_policy_and_budget(monkeypatch):
    policy = registry.build({"policy": "lsa", "budget": "12.5% gpu"})
    row = measured.identity(policy) | {"kept": 0.9, "half_width": 0.05, "contexts": 16}
    table = {
        "about": {"model": {"sha256": "ab"}, "geometry": "v4-flash"},
        "rows": [row | {"tokens": 524288}, row | {"tokens": 32768, "kept": 0.7}],
    }
    monkeypatch.setattr(measured, "_table", lambda: table)

    def ask(sha256="ab", tokens=512_000, geometry="v4-flash", **changes):
        spec = {"policy": "lsa", "budget": "12.5% gpu"} | changes
        return measured.answers_kept(sha256, tokens, registry.build(spec), geometry)

    assert ask() == measured.AnswersKept(0.9, 0.05, 16, 524288)
    assert ask(tokens=32_000).kept == 0.7
    assert ask(checkpoint="other.safetensors").kept == 0.9
    for other in (
        {"sha256": "cd"},
        {"tokens": 128_000},
        {"geometry": "v4-pro"},
        {"budget": "10% gpu"},
        {"fill": False},
    ):
        assert ask(**other) is None
