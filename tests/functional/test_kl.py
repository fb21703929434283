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


@pytest.mark.parametrize("loc", LOC)
def test_exact_log_uniform_is_exact(loc):
    exact = np.array([exact_log_uniform(a) for a in LOG_ALPHA])
    np.testing.assert_allclose(array(kl.log_uniform_exact(*grid(loc=loc))), exact, atol=4e-6 + 3e-7 * exact.max())


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="differentiated by TensorFlow")
@pytest.mark.parametrize("jit", [False, True])
def test_slope_of_exact_log_uniform_is_dawsons(jit):
    """dKL/d log alpha = −x·D(x) with x = 1/sqrt(2·alpha); also compiled, where TensorFlow has no Dawson function."""
    import tensorflow as tf

    loc, log_variance = (tf.constant(value) for value in grid())

    @tf.function(jit_compile=jit)
    def slope():
        with tf.GradientTape() as tape:
            tape.watch(log_variance)
            value = ops.sum(kl.log_uniform_exact(loc, log_variance))
        return tape.gradient(value, log_variance)

    x = np.sqrt(0.5 * np.exp(-LOG_ALPHA))
    np.testing.assert_allclose(slope(), -x * special.dawsn(x), atol=1.2e-5)


def test_exact_log_uniform_stays_finite_far_out():
    loc, log_variance = np.array([0.0, 1e-30, 1.0, 30.0], "float32"), np.array([-10.0, 0.0, -70.0, -70.0], "float32")
    values = array(kl.log_uniform_exact(loc, log_variance))
    expected = [0.0, 0.0, exact_far(70.0), exact_far(70.0 + 2 * np.log(30.0))]
    np.testing.assert_allclose(values, expected, atol=2e-5)


def test_cubic_is_within_its_stated_error_for_alpha_up_to_one():
    log_alpha = LOG_ALPHA[LOG_ALPHA <= 0]
    error = array(kl.log_uniform_cubic(log_alpha.astype("float32"))) - [exact_log_uniform(a) for a in log_alpha]
    assert np.abs(error).max() < 0.041


def test_cubic_is_clipped_above_alpha_one():
    at_one = 0.5 * (np.euler_gamma + np.log(2)) - (1.16145124 - 1.50204118 + 0.58629921)
    np.testing.assert_allclose(array(kl.log_uniform_cubic(np.array([0.0, 2.0], "float32"))), at_one, rtol=1e-5)


def test_ard_is_the_least_normal_kl():
    from scipy.optimize import minimize_scalar

    for loc, log_variance in [(0.3, -2.0), (-2.0, 0.5), (0.01, -9.0)]:

        def of_scale(log_scale, loc=loc, log_variance=log_variance):
            return float(array(kl.normal(loc, log_variance, np.exp(log_scale))))

        least = minimize_scalar(of_scale, bounds=(-6, 3), method="bounded", options={"xatol": 1e-4}).fun
        np.testing.assert_allclose(array(kl.ard(loc, log_variance)), least, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group_axis", [0, 1, -1])
def test_ard_of_groups_is_the_least_normal_kl_of_each(group_axis):
    from scipy.optimize import minimize_scalar

    rng = np.random.default_rng(0)
    loc, log_variance = rng.normal(size=(3, 4)).astype("float32"), rng.uniform(-4, 1, (3, 4)).astype("float32")
    others = 1 - group_axis % 2
    ours = array(kl.ard(loc, log_variance, group_axis)).sum(axis=others)
    for index, total in enumerate(ours):
        group = [np.take(value, index, axis=group_axis) for value in (loc, log_variance)]

        def of_scale(log_scale, group=group):
            return float(array(kl.normal(*group, np.exp(log_scale))).sum())

        least = minimize_scalar(of_scale, bounds=(-6, 3), method="bounded", options={"xatol": 1e-4}).fun
        np.testing.assert_allclose(total, least, rtol=1e-4)


def test_ard_of_blocks_is_that_of_the_axis_taken_apart():
    rng = np.random.default_rng(0)
    loc, log_variance = rng.normal(size=(3, 8)).astype("float32"), rng.uniform(-4, 1, (3, 8)).astype("float32")
    ours = array(kl.ard(loc, log_variance, group_axis=-1, blocks=4)).sum()
    apart = (np.reshape(value, (12, 2)) for value in (loc, log_variance))
    np.testing.assert_allclose(ours, array(kl.ard(*apart, group_axis=-1)).sum(), rtol=1e-5)


def test_ard_with_groups_of_one_is_ard():
    loc, log_variance = grid()
    np.testing.assert_allclose(array(kl.ard(loc, log_variance, 0)), array(kl.ard(loc, log_variance)), atol=2e-5)


MIXTURES = [(0.5, 1.0, 0.0025), (0.25, 1.0, 0.0005), (0.75, 0.5, 0.1), (0.5, 1.0, 0.9), (0.1, 2.0, 0.01)]


@pytest.mark.parametrize("probability, wide, narrow", MIXTURES)
def test_scale_mixture_against_quadrature(probability, wide, narrow):
    from scipy.stats import norm

    for loc, log_variance in [(0.0, -14.0), (0.001, -10.0), (0.02, -7.0), (0.1, -4.0), (-3.0, -1.0), (1.0, 1.0)]:
        sd = np.exp(0.5 * log_variance)

        def integrand(x, loc=loc, sd=sd):
            parts = np.log(probability) + norm.logpdf(x, 0, wide), np.log1p(-probability) + norm.logpdf(x, 0, narrow)
            return norm.pdf(x, loc, sd) * (norm.logpdf(x, loc, sd) - np.logaddexp(*parts))

        ends = loc - 9 * sd, loc + 9 * sd
        breaks = np.unique(np.clip([0, loc, *(s * k * narrow for s in (-1, 1) for k in (1, 3, 6))], *ends))
        pieces = zip([ends[0], *breaks], [*breaks, ends[1]])
        exact = sum(integrate.quad(integrand, low, high, limit=200)[0] for low, high in pieces)
        ours = kl.scale_mixture(np.float32(loc), np.float32(log_variance), probability, wide, narrow)
        np.testing.assert_allclose(array(ours), exact, atol=1e-4, rtol=1e-5)


def test_scale_mixture_is_finite_far_from_the_peak():
    values = array(kl.scale_mixture(np.float32([30.0, 0.0]), np.float32([-20.0, -40.0]), 0.5, 1.0, 0.0025))
    assert np.isfinite(values).all()


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


def grouped(loc, log_variance):
    return kl.ard(ops.reshape(loc, (2, 2)), ops.reshape(log_variance, (2, 2)), 0)


def mixture(loc, log_variance):
    return kl.scale_mixture(loc, log_variance, 0.5, 1.0, 0.1)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="differentiated by TensorFlow")
@pytest.mark.parametrize("function", [kl.log_uniform, kl.log_uniform_exact, kl.ard, kl.normal])
def test_gradients_of_a_log_variance_that_weights_share(function):
    import tensorflow as tf

    loc, log_variance = tf.constant([0.3, -2.0, 1.0]), tf.constant([-1.0])
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([loc, log_variance])
        shared = ops.sum(function(loc, log_variance))
        own = ops.sum(function(loc, log_variance + tf.zeros(3)))
    for variable in (loc, log_variance):
        assert tape.gradient(shared, variable).shape == variable.shape
        np.testing.assert_allclose(tape.gradient(shared, variable), tape.gradient(own, variable), rtol=1e-5)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="differentiated by TensorFlow")
@pytest.mark.parametrize("function", [kl.log_uniform, kl.log_uniform_exact, kl.ard, kl.normal, grouped, mixture])
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
    for index, step in enumerate(np.eye(4) * h):
        ahead, behind = (ops.sum(function(loc + sign * step, log_variance)) for sign in (1, -1))
        if abs(loc[index]) > 1e-3:
            np.testing.assert_allclose(by_loc[index], (ahead - behind) / (2 * h), rtol=1e-6)
        ahead, behind = (ops.sum(function(loc, log_variance + sign * step)) for sign in (1, -1))
        np.testing.assert_allclose(by_log_variance[index], (ahead - behind) / (2 * h), atol=1e-8, rtol=1e-6)


FINITE = [kl.log_uniform, kl.log_uniform_exact, kl.ard, kl.normal, grouped, mixture]


def gradients(function, loc, log_variance):
    """Of the sum, by loc and by log_variance; on every backend."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        loc, log_variance = tf.constant(loc), tf.constant(log_variance)
        with tf.GradientTape() as tape:
            tape.watch([loc, log_variance])
            value = ops.sum(function(loc, log_variance))
        return tape.gradient(value, [loc, log_variance])
    if backend == "jax":
        import jax

        return jax.grad(lambda *both: ops.sum(function(*both)), argnums=(0, 1))(loc, log_variance)
    both = [ops.convert_to_tensor(value).requires_grad_(True) for value in (loc, log_variance)]
    ops.sum(function(*both)).backward()
    return [value.grad for value in both]


@pytest.mark.parametrize("function", FINITE)
def test_finite_wherever_a_layer_may_start(function):
    from keras_vdrop import checks

    locs = [-1e4, -30.0, -1e-3, -1e-20, 0.0, 1e-30, 1e-10, 0.1, 1.0, 1e4]
    log_variances = np.linspace(checks._LEAST_LOG_VARIANCE, checks._LARGEST_LOG_VARIANCE, 25)
    loc, log_variance = (value.ravel().astype("float32") for value in np.meshgrid(locs, log_variances))
    pairs = [(loc, log_variance)]
    if function is grouped:
        pairs = [(np.full(4, one, "float32"), np.full(4, other, "float32")) for one, other in zip(loc, log_variance)]
    for pair in pairs:
        assert np.isfinite(array(function(*pair))).all()
        for gradient in gradients(function, *pair):
            assert np.isfinite(array(gradient)).all()


def test_scale_mixture_where_a_deviation_is_below_the_precision_of_the_mean():
    """KL = −½·log(2πe·variance) − log p(loc), as q is all but a point."""
    loc, log_variance = np.float32([1e-3, 0.05, 1.0]), np.float32([-50.0, -60.0, -70.0])
    wide, narrow = (0.5 / scale / np.sqrt(2 * np.pi) * np.exp(-0.5 * (loc / scale) ** 2) for scale in (1.0, 0.0025))
    expected = -0.5 * (np.log(2 * np.pi * np.e) + log_variance) - np.log(wide + narrow)
    np.testing.assert_allclose(array(kl.scale_mixture(loc, log_variance, 0.5, 1.0, 0.0025)), expected, rtol=1e-5)
