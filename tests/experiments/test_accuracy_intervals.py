"""How sure a score is: contexts are drawn whole."""

import numpy as np
import pytest

from fmsim.experiments.accuracy.intervals import context_of, interval
from fmsim.tasks import FAMILIES, in_contexts

SHARED = in_contexts(FAMILIES)[0]  # families that are asked about in one context


def sample(value, task=SHARED[0], number=0, seed=42, tokens=8192):
    return {"tokens": tokens, "task": task, "seed": seed, "sample": number, "score": value}


def test_families_of_one_text_are_one_context():
    one, other = sample(1.0, SHARED[0]), sample(1.0, SHARED[1])
    alone = sample(1.0, in_contexts(FAMILIES)[-1][0])
    assert context_of(one) == context_of(other) != context_of(alone)
    assert context_of(one) != context_of(sample(1.0, seed=43))
    found = interval(
        [sample(v, task, n) for n, v in enumerate((0, 1, 1)) for task in SHARED], "score", 0, 1
    )
    assert found["n"] == 3


@pytest.mark.parametrize("n", [5, 10])
def test_intervals_hold_the_truth_in_about_95_of_100_trials(n):
    """Contexts are easy or hard for all of their families together; the mean score is 0.6."""
    random, trials = np.random.default_rng(n), 600
    held = as_if_independent = 0
    for _ in range(trials):
        ease = random.uniform(0.3, 0.9, size=n)
        samples = [
            sample(ease[number] + random.uniform(-0.1, 0.1), task, number)
            for number in range(n)
            for task in SHARED[:4]
        ]
        found = interval(samples, "score", -9, 9)
        held += found["low"] <= 0.6 <= found["high"]
        scores = np.array([one["score"] for one in samples])
        error = scores.std(ddof=1) / len(scores) ** 0.5
        as_if_independent += abs(scores.mean() - 0.6) <= 2 * error
    assert 0.92 <= held / trials <= 0.98
    assert as_if_independent / trials < 0.8  # why contexts: samples of one text are not independent


def test_where_all_contexts_came_out_alike_n_says_how_sure_that_is():
    found = interval([sample(1.0, number=n) for n in range(8)], "score", 0.0, 1.0)
    assert found["high"] == 1.0 and found["n"] == 8 and found["alike"]
    assert (found["low"]) ** 8 == pytest.approx(0.025)  # so many successes in a row
    assert interval([sample(1.0, number=n) for n in range(80)], "score", 0, 1)["low"] > 0.95
    none = interval([sample(0.0, number=n) for n in range(8)], "score", -1.0, 1.0)
    assert none["low"] == pytest.approx(-none["high"])


def test_one_context_tells_no_interval():
    found = interval([sample(1.0)], "score", 0.0, 1.0)
    assert found == {"half_width": None, "low": None, "high": None, "n": 1, "alike": False}


def test_cells_count_by_their_weights():
    samples = [sample(float(n % 2), SHARED[0], n) for n in range(10)]
    samples += [sample(1.0, SHARED[0], n, tokens=32768) for n in range(10)]
    cells = {(8192, SHARED[0]): 1.0, (32768, SHARED[0]): 3.0}
    even = interval(samples, "score", 0.0, 1.0)
    weighed = interval(samples, "score", 0.0, 1.0, cells)
    assert weighed["half_width"] == pytest.approx(even["half_width"] / 2)
    assert weighed["n"] == 20
