"""The moments of the estimators' outputs against the analytic ones."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_vdrop.functional import estimators
from tests.cases import array
from tests.statistics import assert_mean, assert_uncorrelated, assert_variance, draws

DRAWS = 4000
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 3)).astype("float32")
IMAGES = RNG.normal(size=(2, 4, 4, 2)).astype("float32")
SEQUENCE = RNG.normal(size=(2, 4, 3)).astype("float32")


def convolution(x, w):
    return ops.conv(x, w, strides=1, padding="valid")


PROBLEMS = {
    "product": (ops.matmul, X, (3, 2)),
    "sequence": (ops.matmul, SEQUENCE, (3, 2)),
    "convolution": (convolution, IMAGES, (3, 3, 2, 2)),
}


def weight(shape):
    rng = np.random.default_rng(1)
    return rng.normal(size=shape).astype("float32"), rng.uniform(-3, 1, size=shape).astype("float32")


def draw(estimator, linear, x, loc, log_variance, count=DRAWS, seed=3):
    generator = keras.random.SeedGenerator(seed)
    x, loc, log_variance = (ops.convert_to_tensor(value) for value in (x, loc, log_variance))
    return draws(lambda: estimator(linear, x, loc, log_variance, generator), count)


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("name", estimators.ESTIMATORS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_mean_and_variance_of_the_output(name, problem):
    linear, x, shape = PROBLEMS[problem]
    loc, log_variance = weight(shape)
    samples = draw(estimators.ESTIMATORS[name], linear, x, loc, log_variance)
    assert_mean(samples, array(linear(x, loc)))
    expected = array(linear(x**2, np.exp(log_variance)))
    if name == "flipout":  # its signs make the kurtosis of a sum of products that of no normal variable
        error = np.sqrt(((samples - samples.mean(0)) ** 2).var(axis=0) / DRAWS)
        assert (np.abs(samples.var(axis=0) - expected) < 5 * error).all()
    else:
        assert_variance(samples, expected)


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("name", ["local_reparameterization", "flipout"])
def test_examples_have_noise_of_their_own(name):
    loc, log_variance = weight((3, 2))
    same = np.repeat(X[:1], 2, axis=0)
    samples = draw(estimators.ESTIMATORS[name], ops.matmul, same, loc, log_variance)
    assert_uncorrelated(samples[:, 0, 0], samples[:, 1, 0])


def test_one_draw_is_shared_by_the_batch():
    loc, log_variance = weight((3, 2))
    same = np.repeat(X[:1], 2, axis=0)
    samples = draw(estimators.reparameterization, ops.matmul, same, loc, log_variance, count=3)
    np.testing.assert_allclose(samples[:, 0], samples[:, 1], rtol=1e-5)


def test_flipout_keeps_an_examples_signs_along_a_sequence():
    """At every position of one example the perturbed weight is the same."""
    loc, log_variance = np.zeros((3, 2), "float32"), np.zeros((3, 2), "float32")
    same = np.repeat(SEQUENCE[:, :1], 4, axis=1)
    samples = draw(estimators.flipout, ops.matmul, same, loc, log_variance, count=3)
    np.testing.assert_allclose(samples, samples[:, :, :1].repeat(4, axis=2), rtol=1e-5)


def test_local_reparameterization_without_variance_is_finite_and_silent():
    loc = np.ones((3, 2), "float32")
    output = draw(estimators.local_reparameterization, ops.matmul, X, loc, np.full((3, 2), -np.inf, "float32"), count=1)
    np.testing.assert_allclose(output[0], X @ loc, atol=1e-6)


def test_nan_and_infinity_are_not_hidden():
    loc, log_variance = weight((3, 2))
    for bad in (np.nan, np.inf):
        x = X.copy()
        x[0, 0] = bad
        for estimator in estimators.ESTIMATORS.values():
            output = draw(estimator, ops.matmul, x, loc, log_variance, count=1)[0]
            assert not np.isfinite(output[0]).any() and np.isfinite(output[1]).all()
