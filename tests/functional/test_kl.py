"""KLs against quadrature, closed forms and TFP."""

import keras
import numpy as np
import pytest
from keras import ops
from scipy import integrate, special

from keras_vdrop.functional import kl
from tests.cases import array

LOG_ALPHA = np.linspace(-10.0, 10.0, 401)
LOC = np.array([-3.0, -0.2, 1e-3, 0.5, 7.0])


def exact_log_uniform(log_alpha):
    """2·∫₀^√λ D(s) ds with λ = 1/(2·alpha) and D Dawson's function."""
    upper = np.sqrt(0.5 * np.exp(-log_alpha))
    return 2 * integrate.quad(special.dawsn, 0, upper, limit=500, epsabs=1e-10)[0]


def grid(log_alpha=LOG_ALPHA, loc=1.0):
    """loc and log_variance of that log_alpha, float32."""
    loc = np.full(log_alpha.shape, loc, "float32")
    return loc, (log_alpha + np.log(loc**2)).astype("float32")


@pytest.mark.parametrize("log_alpha, value", [(-4, 2.626), (-3, 2.10798), (0, 0.42669), (3, 0.024688)])
def test_the_quadrature_itself(log_alpha, value):
    np.testing.assert_allclose(exact_log_uniform(log_alpha), value, rtol=3e-4)


@pytest.mark.parametrize("loc", LOC)
def test_log_uniform_is_within_its_stated_error(loc):
    exact = np.array([exact_log_uniform(a) for a in LOG_ALPHA])
    error = np.abs(array(kl.log_uniform(*grid(loc=loc))) - exact)
    assert error.max() < 0.0051


def test_log_uniform_has_the_right_sign_and_vanishes_with_large_alpha():
    values = array(kl.log_uniform(*grid()))
    assert (values > 0).all() and (np.diff(values) < 0).all() and values[-1] < 1e-4


def test_log_uniform_stays_finite_far_out():
    loc = np.array([0.0, 1e-30, 1.0, 30.0, 1.0], "float32")
    log_variance = np.array([-10.0, 0.0, -70.0, -70.0, 80.0], "float32")
    values = array(kl.log_uniform(loc, log_variance))
    assert np.isfinite(values).all()
    np.testing.assert_allclose(values[2:4], [exact_far(70.0), exact_far(70.0 + 2 * np.log(30.0))], atol=0.0051)


def exact_far(minus_log_alpha):
    """The exact KL for alpha → 0 up to O(alpha): ½·log(1/alpha) + (log 2 + γ)/2."""
    return 0.5 * minus_log_alpha + 0.5 * (np.log(2) + np.euler_gamma)


def test_cubic_is_a_constant_away_for_alpha_up_to_one():
    log_alpha = LOG_ALPHA[LOG_ALPHA <= 0]
    offset = array(kl.log_uniform_cubic(log_alpha.astype("float32"))) - [exact_log_uniform(a) for a in log_alpha]
    assert np.abs(offset + 0.6352).max() < 0.041


def test_cubic_is_clipped_above_alpha_one():
    at_one = -(1.16145124 - 1.50204118 + 0.58629921)
    np.testing.assert_allclose(array(kl.log_uniform_cubic(np.array([0.0, 2.0], "float32"))), at_one, rtol=1e-5)


def test_ard_is_the_least_normal_kl():
    from scipy.optimize import minimize_scalar

    for loc, log_variance in [(0.3, -2.0), (-2.0, 0.5), (0.01, -9.0)]:

        def of_scale(log_scale, loc=loc, log_variance=log_variance):
            return float(array(kl.normal(loc, log_variance, np.exp(log_scale))))

        least = minimize_scalar(of_scale, bounds=(-6, 3), method="bounded", options={"xatol": 1e-4}).fun
        np.testing.assert_allclose(array(kl.ard(loc, log_variance)), least, rtol=1e-4, atol=1e-5)


def test_ard_never_exceeds_log_uniform():
    loc, log_variance = grid()
    gap = array(kl.log_uniform(loc, log_variance)) - array(kl.ard(loc, log_variance))
    assert gap.min() > -0.0051 and gap.max() < 0.640


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_normal_against_quadrature(scale):
    for loc, log_variance in [(0.3, -2.0), (-2.0, 0.5)]:
        sd = np.exp(0.5 * log_variance)

        def integrand(x, loc=loc, sd=sd):
            log_q = -0.5 * ((x - loc) / sd) ** 2 - np.log(sd)
            log_p = -0.5 * (x / scale) ** 2 - np.log(scale)
            return np.exp(log_q) / np.sqrt(2 * np.pi) * (log_q - log_p)

        exact = integrate.quad(integrand, loc - 12 * sd, loc + 12 * sd)[0]
        np.testing.assert_allclose(array(kl.normal(loc, log_variance, scale)), exact, rtol=1e-5)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TFP is TensorFlow's")
def test_normal_against_tfp():
    from tensorflow_probability import distributions as tfd

    loc, log_variance = np.random.default_rng(0).normal(size=(2, 50)).astype("float32")
    expected = tfd.kl_divergence(tfd.Normal(loc, np.exp(0.5 * log_variance)), tfd.Normal(0.0, 0.7))
    np.testing.assert_allclose(array(kl.normal(loc, log_variance, 0.7)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="differentiated by TensorFlow")
@pytest.mark.parametrize("function", [kl.log_uniform, kl.ard, kl.normal])
def test_gradients_are_finite_at_zero_and_true_elsewhere(function):
    import tensorflow as tf

    loc = tf.constant([0.0, 1e-20, 0.4, -2.0], "float64")
    log_variance = tf.constant([-10.0, -10.0, -1.0, 0.3], "float64")
    with tf.GradientTape() as tape:
        tape.watch([loc, log_variance])
        value = ops.sum(function(loc, log_variance))
    by_loc, by_log_variance = tape.gradient(value, [loc, log_variance])
    assert np.isfinite(by_loc).all() and np.isfinite(by_log_variance).all()
    h = 1e-6
    np.testing.assert_allclose(
        by_loc[2:], (function(loc + h, log_variance) - function(loc - h, log_variance))[2:] / (2 * h), rtol=1e-6
    )
    np.testing.assert_allclose(
        by_log_variance, (function(loc, log_variance + h) - function(loc, log_variance - h)) / (2 * h), atol=1e-8
    )
