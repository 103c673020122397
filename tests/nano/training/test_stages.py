"""Curricula: lengths, rates, how many entries a query attends to."""

import pytest

from fmsim.errors import FmsimError
from fmsim.nano.training.stages import curriculum


def test_curricula_have_small_likenesses_and_rates_fall_to_their_ends():
    for name in ("grown", "minute", "longer"):
        for stage, small in zip(curriculum(name), curriculum(f"tiny-{name}"), strict=True):
            assert small.length <= stage.length and small.rates == stage.rates
            assert stage.learning_rate(10_000, 0.0) == pytest.approx(stage.rates[0])
            assert stage.learning_rate(10_000, 1.0) == pytest.approx(stage.rates[1])
            assert sum(odds for _, odds in stage.top_k) == pytest.approx(1)
    with pytest.raises(FmsimError, match="grown"):
        curriculum("shrunk")


def test_top_k_is_drawn_by_its_odds():
    stage = curriculum("grown")[0]
    drawn = [stage.draw_top_k(number / 100) for number in range(100)]
    assert {count: drawn.count(count) for count in drawn} == {512: 50, 256: 25, 128: 25}
    assert curriculum("tiny-grown")[0].draw_top_k(0.9) is None
