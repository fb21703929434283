"""Scores of predicted distributions against quadrature and scipy, and what intervals hold, by simulation."""

import numpy as np
import pytest
from scipy import integrate, stats

from keras_vdrop.scores import regression
from tests.statistics import assert_mean

RNG = np.random.default_rng(0)
LOC, SCALE, Y = RNG.normal(size=20), RNG.uniform(0.1, 3.0, size=20), RNG.normal(size=20)


def test_nll_is_that_of_scipys_normal():
    expected = -stats.norm(LOC, SCALE).logpdf(Y).mean()
    np.testing.assert_allclose(regression.normal_negative_log_likelihood(LOC, SCALE, Y), expected)


def test_mixture_nll_takes_the_mean_of_the_densities_row_by_row():
    loc, scale = RNG.normal(size=(7, 20)), RNG.uniform(0.1, 3.0, size=(7, 20))
    expected = -np.log(stats.norm(loc, scale).pdf(Y).mean(axis=0)).mean()
    np.testing.assert_allclose(regression.normal_mixture_negative_log_likelihood(loc, scale, Y), expected)
    alone = regression.normal_mixture_negative_log_likelihood(LOC[None], SCALE[None], Y)
    np.testing.assert_allclose(alone, regression.normal_negative_log_likelihood(LOC, SCALE, Y))


def test_mixture_nll_far_from_every_component():
    far = regression.normal_mixture_negative_log_likelihood([[0.0], [1.0]], [[1.0], [1.0]], [100.0])
    np.testing.assert_allclose(far, 0.5 * np.log(2 * np.pi) + 0.5 * 99.0**2 + np.log(2.0))


def test_mixture_nll_of_shapes_that_do_not_fit():
    for loc, scale, y in ((LOC, SCALE, Y), ([LOC], SCALE, Y), ([LOC], [SCALE], [Y])):
        with pytest.raises(ValueError, match="shapes"):
            regression.normal_mixture_negative_log_likelihood(loc, scale, y)
    with pytest.raises(ValueError, match="above 0"):
        regression.normal_mixture_negative_log_likelihood([LOC], [-SCALE], Y)


def test_normal_crps_is_the_integral():
    def crps(loc, scale, y):
        normal = stats.norm(loc, scale)
        below, _ = integrate.quad(lambda t: normal.cdf(t) ** 2, loc - 12 * scale, y, epsabs=1e-10)
        above, _ = integrate.quad(lambda t: normal.sf(t) ** 2, y, loc + 12 * scale, epsabs=1e-10)
        return below + above

    for row in zip(LOC, SCALE, Y):
        np.testing.assert_allclose(regression.normal_crps(*([value] for value in row)), crps(*row), rtol=1e-7)
    np.testing.assert_allclose(regression.normal_crps([1.0], [1e-9], [3.0]), 2.0)


def test_sample_crps_by_its_pairs():
    samples, y = RNG.normal(size=(5, 3)), RNG.normal(size=3)
    pairs = np.abs(samples[:, None] - samples[None]).sum(axis=(0, 1)) / (5 * 4)
    expected = (np.abs(samples - y).mean(axis=0) - 0.5 * pairs).mean()
    np.testing.assert_allclose(regression.sample_crps(samples, y), expected)
    # any shape of y
    same = regression.sample_crps(samples.reshape(5, 3, 1), y.reshape(3, 1))
    np.testing.assert_allclose(same, expected)


@pytest.mark.parametrize("count", [2, 5])
def test_sample_crps_is_on_average_that_of_the_distribution(count):
    rng = np.random.default_rng(1)
    samples = rng.normal(0.5, 2.0, size=(20_000, count, 1))
    scores = [regression.sample_crps(draw, [1.0]) for draw in samples]
    assert_mean(scores, regression.normal_crps([0.5], [2.0], [1.0]))


def test_normal_interval():
    for level in (0.5, 0.9, 0.99):
        expected = stats.norm(LOC, SCALE).interval(level)
        np.testing.assert_allclose(regression.normal_interval(LOC, SCALE, level), expected)


@pytest.mark.parametrize("level, count", [(0.9, 19), (0.5, 32), (0.8, 100)])
def test_sample_interval_holds_one_more_sample_so_often(level, count):
    rng = np.random.default_rng(2)
    draws = rng.uniform(size=(count + 1, 20_000))
    lower, upper = regression.sample_interval(draws[1:], level)
    assert_mean((lower <= draws[0]) & (draws[0] <= upper), level)


def test_normal_interval_holds_a_normal_so_often():
    rng = np.random.default_rng(3)
    loc, scale = rng.normal(size=20_000), rng.uniform(0.5, 2.0, size=20_000)
    y = rng.normal(loc, scale)
    lower, upper = regression.normal_interval(loc, scale, 0.9)
    assert_mean((lower <= y) & (y <= upper), 0.9)
    assert regression.interval_coverage(lower, upper, y) == ((lower <= y) & (y <= upper)).mean()


def test_coverage_by_hand():
    assert regression.interval_coverage([0, 0, 0, -np.inf], [1, 1, 1, np.inf], [0, 1, 1.5, 9]) == 0.75


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 2 rows"):
        regression.normal_crps([0.0, np.nan], [1.0, 1.0], [0.0, 0.0])
    with pytest.raises(ValueError, match="not its logarithm"):
        regression.normal_interval([0.0], [-1.0])
    with pytest.raises(ValueError, match=r"`scale` \(2,\)"):
        regression.normal_negative_log_likelihood([0.0], [1.0, 1.0], [0.0])
    with pytest.raises(ValueError, match="level=90"):
        regression.normal_interval([0.0], [1.0], level=90)
    with pytest.raises(ValueError, match=r"at least 19 samples\. .*at most .*Received: 18 samples"):
        regression.sample_interval(np.zeros((18, 2)))
    with pytest.raises(ValueError, match="at least two"):
        regression.sample_crps([[0.0]], [0.0])
    with pytest.raises(ValueError, match="shapes"):
        regression.sample_crps(np.zeros((5, 2)), np.zeros(3))
    with pytest.raises(ValueError, match=r"lower > upper.* at 1 of 2 positions"):
        regression.interval_coverage([0, 2], [1, 1], [0, 0])
    with pytest.raises(ValueError, match="same shape"):
        regression.interval_coverage([0], [1], [0, 0])
