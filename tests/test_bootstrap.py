"""The block bootstrap beside a plain one, and how often its intervals hold the truth."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmsim import bootstrap


def plain_draws(part, whole, strata):
    """The same in loops over draws and blocks, written out."""
    counts = []  # of every block in every draw
    for place, n in enumerate(strata):
        random = np.random.default_rng((bootstrap.SEED, place, n))
        chance = np.full(n, 1 / n)
        for _ in range(n):
            counts.append([])
        for _ in range(bootstrap.N_DRAWS):
            drawn = random.multinomial(n - 1, chance) * n / (n - 1) if n > 1 else [1.0]
            for block in range(n):
                counts[len(counts) - n + block].append(float(drawn[block]))
    draws = []
    for draw in range(bootstrap.N_DRAWS):
        above = below = 0.0
        for block, count in enumerate(counts):
            above += count[draw] * part[block]
            below += count[draw] * whole[block]
        draws.append(above / below if below else float("nan"))
    return draws


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.integers(0, 2**32 - 1))
def test_draws_are_those_of_the_plain_way(strata, seed):
    random = np.random.default_rng(seed)
    whole = random.uniform(0, 2, sum(strata)) * (random.random(sum(strata)) < 0.8)
    part = whole * random.random(sum(strata))
    strata = tuple(strata)
    found = bootstrap.ratio_draws(part, whole, strata)
    assert found == pytest.approx(plain_draws(part, whole, strata), rel=1e-9, nan_ok=True)


def test_the_spread_of_a_mean_is_the_textbooks():
    """Without a bias of (n - 1) / n, which at four blocks would be a quarter of the variance."""
    values = np.array([0.1, 0.5, 0.2, 0.9])
    found = bootstrap.mean(values)
    error = values.std(ddof=1) / 2
    assert found.value == pytest.approx(values.mean()) and found.blocks == 4
    assert found.half_width == pytest.approx(3.1824 * error, rel=0.05)


def series(random, windows, tau=64, memory=0.95):
    """A trace's mass and the mass kept of it, by window: steps of one window have an effect in
    common and depend on each other, windows do not. The mean share kept is 0.8.
    """
    noise = random.normal(size=(windows, tau))
    noise[:, 0] /= np.sqrt(1 - memory**2)
    for step in range(1, tau):
        noise[:, step] += memory * noise[:, step - 1]
    share = 0.8 + 0.03 * random.normal(size=(windows, 1)) + 0.01 * noise
    mass = random.uniform(0.5, 1.5, size=(windows, tau))
    return (share * mass).sum(1), mass.sum(1)


@pytest.mark.parametrize("windows", [3, 4, 6, 8, 16])
def test_an_interval_holds_the_truth_in_about_95_of_100_series(windows):
    random, n_series = np.random.default_rng(windows), 800
    found = [bootstrap.ratio(*series(random, windows)) for _ in range(n_series)]
    held = np.mean([abs(each.value - 0.8) <= each.half_width for each in found])
    assert 0.925 <= held <= 0.975  # three standard errors


def test_steps_drawn_one_by_one_would_be_far_too_sure():
    """Why blocks: the same series, each step taken for independent."""
    random, n_series = np.random.default_rng(0), 200
    held = 0
    for _ in range(n_series):
        share = 0.8 + 0.03 * np.repeat(random.normal(size=8), 64)
        share += 0.01 * random.normal(size=512)
        found = bootstrap.mean(share)
        held += abs(found.value - 0.8) <= found.half_width
    assert held / n_series < 0.5


def test_strata_are_drawn_each_for_itself():
    random, n_series, held = np.random.default_rng(5), 800, 0
    strata = (6, 14)
    weights = bootstrap.block_weights(strata)
    for _ in range(n_series):
        one, other = random.normal(0, 1, 6), random.normal(1, 1, 14)
        draws = (weights[:, :6] @ one / 6 + weights[:, 6:] @ other / 14) / 2
        found = bootstrap.estimate((one.mean() + other.mean()) / 2, draws, strata)
        held += abs(found.value - 0.5) <= found.half_width
    assert 0.925 <= held / n_series <= 0.975


def test_a_paired_difference_is_surer_than_either_figure():
    """Windows that are hard for both policies drop out of the difference."""
    random = np.random.default_rng(3)
    hard = random.normal(0, 0.1, 8)
    one, other = 0.8 + hard + random.normal(0, 0.01, 8), 0.7 + hard + random.normal(0, 0.01, 8)
    difference = bootstrap.mean(one - other)
    assert difference.half_width < bootstrap.mean(one).half_width / 4
    draws = bootstrap.ratio_draws(one, np.ones(8), (8,)) - bootstrap.ratio_draws(
        other, np.ones(8), (8,)
    )
    paired = bootstrap.estimate(one.mean() - other.mean(), draws, (8,))
    assert paired.half_width == pytest.approx(difference.half_width)


def test_one_block_tells_nothing_and_none_is_no_figure():
    assert bootstrap.mean([0.3]) == bootstrap.Estimate(0.3, None, 1)
    assert bootstrap.mean([0.3]).plain() == {
        "half_width": None,
        "low": None,
        "high": None,
        "blocks": 1,
    }
    assert bootstrap.mean([]) is None
    assert bootstrap.ratio(np.zeros(3), np.zeros(3)) is None


def test_an_interval_ends_where_the_figure_does():
    found = bootstrap.Estimate(0.95, 0.1, 5).plain(least=0.0, most=1.0)
    assert found == {
        "half_width": 0.1,
        "low": pytest.approx(0.85),
        "high": 1.0,
        "blocks": 5,
    }


def test_students_quantiles_are_those_of_its_density():
    """The area above the quantile, by summing the density."""
    for freedom in (1, 2, 3, 7, 20, 21, 25, 60, 1000):
        quantile = bootstrap.t_quantile(freedom)
        angle = np.linspace(np.arctan(quantile / freedom**0.5), np.pi / 2, 200_001)
        # t = sqrt(freedom) tan(angle): the density becomes a power of the cosine
        whole = np.linspace(-np.pi / 2, np.pi / 2, 200_001)
        above = np.trapezoid(np.cos(angle) ** (freedom - 1), angle)
        area = np.trapezoid(np.cos(whole) ** (freedom - 1), whole)
        assert above / area == pytest.approx(0.025, rel=1e-3), freedom


def test_the_same_blocks_give_the_same_bytes_again():
    first = bootstrap.block_weights((5, 8)).tobytes()
    bootstrap.block_weights.cache_clear()
    assert bootstrap.block_weights((5, 8)).tobytes() == first
    # a stratum's draws do not depend on those beside it
    assert np.array_equal(bootstrap.block_weights((5,)), bootstrap.block_weights((5, 8))[:, :5])
