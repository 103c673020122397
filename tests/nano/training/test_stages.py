"""Curricula: lengths, rates, how many entries a query attends to."""

from itertools import pairwise

import pytest

from fmsim.errors import FmsimError
from fmsim.nano.training.stages import CURRICULA, curriculum


@pytest.mark.parametrize("name", CURRICULA)
def test_a_curriculum_is_one_falling_cosine_and_has_a_small_likeness(name):
    stages = curriculum(name)
    for stage, small in zip(stages, curriculum(f"tiny-{name}"), strict=True):
        assert small.length <= stage.length and small.rates == stage.rates
        assert sum(odds for _, odds in stage.top_k) == pytest.approx(1)
    assert stages[0].learning_rate(10_000, 0.0) == pytest.approx(stages[0].rates[0])
    assert stages[-1].learning_rate(10_000, 1.0) == pytest.approx(stages[-1].rates[1])
    for before, after in pairwise(stages):
        end, begin = before.learning_rate(10_000, 1.0), after.learning_rate(10_000, 0.0)
        assert end == pytest.approx(begin)


def test_another_name_is_told():
    with pytest.raises(FmsimError, match="there are nano2, chains"):
        curriculum("shrunk")


def test_top_k_is_drawn_by_its_odds():
    stage = curriculum("nano2")[0]
    drawn = [stage.draw_top_k(number / 100) for number in range(100)]
    assert {count: drawn.count(count) for count in drawn} == {512: 50, 256: 25, 128: 25}
    assert curriculum("tiny-nano2")[0].draw_top_k(0.9) is None
