"""By default an example sees one draw of the weights, the same at all of its positions."""

import contextlib

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_vdrop as kv
from tests.cases import CASES, array, posteriors, randomize
from tests.statistics import STANDARD_ERRORS, sample

DRAWS = 3000
WEIGHTS = [case.replace(estimator="auto") for case in CASES if case.is_kernel]
LINEAR = [
    case
    for case in WEIGHTS
    if not (case.is_rnn or case.is_cell or case.is_attention or "separable" in case.name or "activation" in case.keras)
]
OTHERS = [case for case in WEIGHTS if case not in LINEAR]


def covariance(samples):
    """Return the covariance matrix (P, P) of samples (S, P), and its standard errors (P, P)."""
    centred = samples - samples.mean(axis=0)
    products = centred[:, :, None] * centred[:, None, :]
    return products.mean(axis=0), products.std(axis=0) / np.sqrt(len(samples))


def assert_close(found, expected, error):
    deviation = np.abs(found - expected) / np.maximum(error, 1e-6 * np.abs(expected).max())
    assert deviation.max() < STANDARD_ERRORS, f"{deviation.max():.1f} standard errors off"


def jacobian(case, layer, x, weight):
    """Return ∂(outputs of x)/∂(weight), (P, W), of a layer that is linear in the weight: one call per element."""
    loc = array(weight.loc)
    at = array(case.call(layer, x)).ravel()
    columns = []
    for index in range(loc.size):
        moved = loc.copy()
        moved.flat[index] += 1.0
        weight.loc.assign(moved)
        columns.append(array(case.call(layer, x)).ravel() - at)
    weight.loc.assign(loc)
    return np.stack(columns, axis=1)


def of_one_example(case, layer, x):
    """Return draws (S, P) of the outputs of one example, taken from a batch of two equal examples."""
    equal = np.repeat(x[:1], 2, axis=0)
    return sample(layer, (equal, equal) if case.is_attention else equal, DRAWS)[:, 0].reshape(DRAWS, -1)


@pytest.mark.parametrize("linear", LINEAR, ids=str)
def test_covariance_over_places_is_that_of_the_posterior(linear):
    """The covariance is Σ J·diag(variance)·Jᵀ over the layer's weights."""
    layer = linear.built()
    randomize(layer)
    x = linear.inputs()
    expected = 0.0
    for weight in posteriors(layer):
        derivative = jacobian(linear, layer, x[:1], weight)
        expected = expected + (derivative * np.exp(array(weight.log_variance)).ravel()) @ derivative.T
    found, error = covariance(of_one_example(linear, layer, x))
    assert_close(found, expected, error)


@pytest.mark.slow
@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_covariance_over_places_is_that_of_weights_drawn_whole(other):
    """Layers that are not linear in their weights: the default estimator agrees with `reparameterization`."""
    found = []
    for case in (other, other.replace(estimator="reparameterization")):
        layer = case.built()
        randomize(layer, log_variance=(-4.0, -1.0))
        found.append(covariance(of_one_example(case, layer, case.inputs())))
    (by_default, error), (whole, other_error) = found
    assert_close(by_default, whole, np.hypot(error, other_error))


def shared():
    """Return a model that calls one layer on two inputs."""
    layer = kv.VariationalDense(2, use_bias=False, kl_weight=0.1)
    inputs = [keras.Input((3,)), keras.Input((3,))]
    return keras.Model(inputs, layers.Concatenate()([layer(each) for each in inputs]))


def over_time():
    """Return a model that applies one layer to two time steps by `TimeDistributed`."""
    inputs = [keras.Input((3,)), keras.Input((3,))]
    steps = ops.stack(inputs, axis=1)
    layer = layers.TimeDistributed(kv.VariationalDense(2, use_bias=False, kl_weight=0.1))
    return keras.Model(inputs, layers.Flatten()(layer(steps)))


def twice():
    """Return a model that calls an inner model twice."""
    inner = keras.Sequential([keras.Input((3,)), kv.VariationalDense(2, use_bias=False, kl_weight=0.1)])
    inputs = [keras.Input((3,)), keras.Input((3,))]
    return keras.Model(inputs, layers.Concatenate()([inner(each) for each in inputs]))


class OwnLayer(layers.Layer):
    """A layer whose `call` calls its sublayer twice, which the graph of the model does not show."""

    def __init__(self):
        super().__init__()
        self.inner = kv.VariationalDense(2, use_bias=False, kl_weight=0.1)

    def build(self, shapes):
        self.inner.build(shapes[0])

    def call(self, inputs):
        return ops.concatenate([self.inner(each) for each in inputs], axis=-1)


class OwnModel(keras.Model):
    """A subclassed model that calls a layer twice."""

    def __init__(self):
        super().__init__()
        self.inner = kv.VariationalDense(2, use_bias=False, kl_weight=0.1)

    def call(self, inputs):
        return ops.concatenate([self.inner(each) for each in inputs], axis=-1)


def in_own_layer():
    inputs = [keras.Input((3,)), keras.Input((3,))]
    return keras.Model(inputs, OwnLayer()(inputs))


def in_own_model():
    model = OwnModel()
    model([np.zeros((1, 3), "float32")] * 2)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("consistent", [False, True])
@pytest.mark.parametrize("make", [shared, over_time, twice, in_own_layer, in_own_model])
def test_an_example_keeps_its_draw_from_call_to_call(make, consistent):
    """Outputs (x·W, z·W) have covariance blocks diag(Σ x·z·variance). Examples differ unless `consistent`."""
    model = make()
    randomize(model)
    is_known = make in (shared, over_time, twice)
    (weight,) = posteriors(model)
    variance = np.exp(array(weight.log_variance))
    x, z = np.random.default_rng(0).normal(size=(2, 1, 3)).astype("float32")
    with pytest.warns(UserWarning, match="draw of their weights") if is_known else contextlib.nullcontext():
        drawn = kv.MonteCarlo(model, DRAWS, output="samples", consistent=consistent, seed=0, sample_batch_size=500)
    samples = drawn.predict([np.repeat(x, 2, axis=0), np.repeat(z, 2, axis=0)], verbose=0)
    blocks = [[np.diag((one * other)[0] @ variance) for other in (x, z)] for one in (x, z)]
    found, error = covariance(samples[0])
    assert_close(found, np.block(blocks), error)
    np.testing.assert_equal((samples[0] == samples[1]).all(), consistent)


LOCAL = {"estimator": "local_reparameterization"}


@pytest.mark.parametrize(
    "make",
    [
        lambda: kv.VariationalConv2D(2, 2, **LOCAL),
        lambda: kv.VariationalDense(2, **LOCAL),
        lambda: kv.VariationalSeparableConv2D(2, 2, **LOCAL),
        lambda: layers.TimeDistributed(layers.TimeDistributed(kv.VariationalDense(2))),
    ],
)
def test_noise_of_places_is_reported(make):
    model = keras.Sequential([keras.Input((4, 4, 3)), make()])
    with pytest.warns(UserWarning, match="draw of their weights"):
        kv.MonteCarlo(model)


def test_noise_of_examples_is_not_reported():
    """Noise that is one draw per example raises no warning, nor does local reparameterisation where it is exact."""
    for layer in (kv.VariationalConv2D(2, 2), kv.VariationalConv2D(2, 4, **LOCAL), kv.VariationalDense(2)):
        kv.MonteCarlo(keras.Sequential([keras.Input((4, 4, 3)), layer]))
    kv.MonteCarlo(keras.Sequential([keras.Input((4,)), kv.VariationalDense(2, **LOCAL)]))
    kv.MonteCarlo(keras.Sequential([keras.Input((4, 3)), kv.VariationalLSTM(2), kv.VariationalDense(2)]))
