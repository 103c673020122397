"""Steps of training: what they learn from, and what they do with its gradients."""

import math
from types import SimpleNamespace

import pytest
import torch

from fmsim.indexer.network import MemoryIndexer
from fmsim.indexer.scorer import ScorerConfig
from fmsim.indexer.train import TrainingRun, TrainOptions

CONFIG = ScorerConfig(rope_dims=2, rope_theta=10_000.0)


def nothing():
    """A trace of which only the device is asked."""
    return SimpleNamespace(hidden=torch.zeros(0))


def test_a_step_is_adamws_with_a_gradient_of_at_most_1(monkeypatch):
    """The mean of two traces' gradients; four steps of one number, reckoned in plain floats."""
    slopes = iter((0.25, 0.75, 30.0, 40.0, -0.5, 0.25, 0.0, 0.5))
    monkeypatch.setattr(
        "fmsim.indexer.train._loss", lambda model, *others: next(slopes) * model.margin
    )
    model = MemoryIndexer([0], 1, 1, 2, 1, CONFIG)
    with torch.no_grad():
        model.margin.fill_(0.5)
    options = TrainOptions(
        steps=10, warm_up=0.3, traces_per_step=2, learning_rate=0.1, weight_decay=0.2
    )
    run = TrainingRun(model, [nothing()] * 2, options, ["a"])
    value, mean, square = 0.5, 0.0, 0.0
    for step, slope in enumerate((0.5, 1.0, -0.125, 0.25), start=1):
        rate = 0.1 * TrainingRun._rate(run, step - 1)
        mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2
        value *= 1 - 0.2 * rate
        value -= rate * (mean / (1 - 0.9**step)) / (math.sqrt(square / (1 - 0.999**step)) + 1e-8)
        run._one_step()
        assert model.margin.item() == pytest.approx(value, rel=1e-5)


def test_a_run_is_of_the_newest_states_unless_it_says_their_age():
    model = MemoryIndexer([0], 1, 1, 2, 1, CONFIG)
    ages = {(): 0, (0,): 0, (1,): 1}
    runs = {age: TrainingRun(model, [nothing()], TrainOptions(), ["a"], *age) for age in ages}
    assert runs[()].about == runs[0,].about != runs[1,].about


def test_a_step_learns_from_each_trace_once(monkeypatch):
    """Three of three; and two of three, not always the same."""
    batches = [nothing() for _ in range(3)]
    asked = []

    def loss(model, batch, options, generator):
        asked.append(next(n for n, each in enumerate(batches) if each is batch))
        return model.margin * 1.0

    monkeypatch.setattr("fmsim.indexer.train._loss", loss)
    model = MemoryIndexer([0], 1, 1, 2, 1, CONFIG)
    for most, expected in ((3, {(0, 1, 2)}), (9, {(0, 1, 2)}), (2, {(0, 1), (0, 2), (1, 2)})):
        run = TrainingRun(model, batches, TrainOptions(traces_per_step=most, steps=99), ["a"])
        asked.clear()
        for _ in range(20):
            run._one_step()
        size = min(most, 3)
        steps = {tuple(sorted(asked[at : at + size])) for at in range(0, len(asked), size)}
        assert (run.step, len(asked), steps) == (20, 20 * size, expected)
