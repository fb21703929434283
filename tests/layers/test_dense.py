"""Dense layers: the moments of einsums of every form, and the constructor, which is Keras's."""

import inspect

import keras
import numpy as np
import pytest

import keras_vdrop as kv
from keras_vdrop.functional import estimators
from tests.cases import array, randomize
from tests.statistics import assert_mean, assert_variance, sample

ESTIMATORS = list(estimators.ESTIMATORS)

# The shape of the input, and that of the output without the batch.
EINSUMS = {
    "abc,cd->abd": ((2, 3, 4), (None, 2)),
    "abc,cde->abde": ((2, 2, 3), (None, 2, 2)),
    "abc,bcd->ad": ((2, 2, 3), (2,)),
    "abc,bcd->abd": ((2, 2, 3), (2, 2)),
    "abc,bd->acbd": ((2, 2, 3), (None, 2, 2)),
    "...x,xy->...y": ((2, 2, 2, 3), 2),
    "ab...,bc->ac...": ((2, 3, 2, 2), 2),
}


def noisy(equation, shape, output_shape, **arguments):
    """A layer of random weights, and an input."""
    layer = kv.VariationalEinsumDense(equation, output_shape, **{"kl_weight": 0.1, **arguments})
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    layer(x)
    randomize(layer)
    return layer, x


def moments(weight):
    """Mean and variance of a posterior."""
    return array(weight.loc), np.exp(array(weight.log_variance))


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("equation", EINSUMS)
def test_mean_and_variance_of_an_einsum(equation, estimator):
    """Every output is normal, by flipout too: its signs do not change the variance of any one output."""
    layer, x = noisy(equation, *EINSUMS[equation], estimator=estimator)
    loc, variance = moments(layer.kernel)
    mean = np.einsum(equation, x, loc)
    np.testing.assert_allclose(array(layer(x)), mean, rtol=1e-4, atol=1e-5)
    samples = sample(layer, x)
    assert_mean(samples, mean)
    assert_variance(samples, np.einsum(equation, x**2, variance))


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_mean_and_variance_of_a_bias_over_two_axes(estimator):
    layer, x = noisy("abc,cd->abd", (2, 3, 4), (3, 2), estimator=estimator, bias_axes="bd", bias_prior="normal")
    (loc, variance), (bias, bias_variance) = moments(layer.kernel), moments(layer.bias)
    assert bias.shape == (3, 2)
    np.testing.assert_allclose(array(layer(x)), x @ loc + bias, rtol=1e-4, atol=1e-5)
    samples = sample(layer, x)
    assert_mean(samples, x @ loc + bias)
    assert_variance(samples, x**2 @ variance + bias_variance)


def test_flipout_gives_examples_uncorrelated_noise_of_one_draw():
    """With one input, all noise is plus or minus the same draw; an example has its own signs, at all its positions."""
    layer = kv.VariationalEinsumDense(
        "abc,cd->abd",
        (None, 2),
        kernel_initializer="zeros",
        initial_log_variance=0.0,
        estimator="flipout",
        kl_weight=0.1,
    )
    x = np.ones((2, 3, 1), "float32")
    layer.build(x.shape)
    samples = sample(layer, x)
    np.testing.assert_array_equal(samples, samples[:, :, :1].repeat(3, axis=2))
    first, second = samples[:, 0, 0], samples[:, 1, 0]
    np.testing.assert_array_equal(np.abs(first), np.abs(second))
    assert_mean(first * second, 0.0)
    assert_mean(first[:, 0] * first[:, 1], 0.0)


@pytest.mark.parametrize(
    "equation, output_shape, shape",
    [
        ("abc,cd->abd", (None, 3), (4, None)),
        ("...x,xy->...y", 3, (4, None)),
        ("ab...,bc->ac...", 3, (None, 4)),
        ("abc,bcd->abd", (4, 3), (None, 4)),
        ("abc,bcd->ad", 3, (4, None)),
    ],
)
def test_an_unknown_size_that_the_kernel_needs(equation, output_shape, shape):
    with pytest.raises(ValueError, match="None"):
        kv.VariationalEinsumDense(equation, output_shape)(keras.Input(shape))


def test_an_unknown_size_that_the_kernel_does_not_need():
    assert kv.VariationalEinsumDense("abc,cd->abd", (None, 3))(keras.Input((None, 4))).shape == (None, None, 3)


@pytest.mark.parametrize(
    "equation, arguments",
    [("abc,bcd->abd", {}), ("abc,cd->abd", {"bias_axes": "bd", "bias_prior": "normal"})],
    ids=["kernel", "bias"],
)
def test_an_unknown_output_size_that_the_weights_need(equation, arguments):
    with pytest.raises(ValueError, match="None"):
        kv.VariationalEinsumDense(equation, (None, 3), **arguments)(keras.Input((2, 4)))


@pytest.mark.parametrize("equation", ["abc;cd->abd", "abc,cd", "abc,cd,de->abe"])
def test_a_bad_equation_is_named(equation):
    with pytest.raises(ValueError, match=equation):
        kv.VariationalEinsumDense(equation, (None, 3))(keras.Input((2, 4)))


VARIATIONAL = [
    "kernel_prior",
    "bias_prior",
    "estimator",
    "kl_weight",
    "initial_log_variance",
    "log_variance_rate",
    "threshold",
    "seed",
]


@pytest.mark.parametrize(
    "cls, twin",
    [(kv.VariationalDense, keras.layers.Dense), (kv.VariationalEinsumDense, keras.layers.EinsumDense)],
)
def test_the_signature_is_that_of_keras_and_then_ours_by_keyword(cls, twin):
    *theirs, theirs_rest = inspect.signature(twin).parameters.values()
    *both, rest = inspect.signature(cls).parameters.values()
    assert theirs_rest.kind is rest.kind is inspect.Parameter.VAR_KEYWORD
    assert [(p.name, p.default, p.kind) for p in both[: len(theirs)]] == [(p.name, p.default, p.kind) for p in theirs]
    ours = both[len(theirs) :]
    assert [p.name for p in ours] == VARIATIONAL and {p.kind for p in ours} == {inspect.Parameter.KEYWORD_ONLY}


def test_arguments_by_position_are_those_of_keras():
    layer = kv.VariationalDense(3, "relu", False, "ones", kernel_prior="ard", kl_weight=0.1)
    twin = keras.layers.Dense(3, "relu", False, "ones")
    expected, config = twin.get_config(), layer.get_config()
    assert {name: config[name] for name in expected} == {**expected, "name": layer.name}
    assert isinstance(layer.kernel_prior, kv.priors.ARD)


def test_too_many_arguments_by_position():
    size = len(inspect.signature(keras.layers.Dense).parameters) - 1
    kv.VariationalDense(3, *[None] * (size - 1))
    with pytest.raises(TypeError, match=str(size)):
        kv.VariationalDense(3, *[None] * size)


def test_an_argument_too_few_and_one_too_many():
    with pytest.raises(TypeError, match="units"):
        kv.VariationalDense()
    with pytest.raises(ValueError, match="unit"):
        kv.VariationalDense(3, unit=3)


def test_an_argument_given_twice():
    with pytest.raises(TypeError, match="units"):
        kv.VariationalDense(3, units=4)


class Wide(kv.VariationalDense):
    """A user's layer with a constructor of its own."""

    def __init__(self, width, *, times=2, **kwargs):
        super().__init__(width * times, "relu", **kwargs)


class Inherited(kv.VariationalDense):
    """A user's layer without one."""


class Wider(Wide):
    """A user's layer that inherits the constructor of another."""


@pytest.mark.parametrize("cls", [Wide, Wider])
def test_a_constructor_of_ones_own_shows(cls):
    assert list(inspect.signature(cls).parameters) == ["width", "times", "kwargs"]
    layer = cls(3, times=5, kl_weight=0.1)
    assert layer.units == 15 and layer.activation is keras.activations.relu and layer.kl_weight == 0.1


def test_an_inherited_constructor_shows():
    assert inspect.signature(Inherited) == inspect.signature(kv.VariationalDense)
    assert Inherited(3, "relu").units == 3
