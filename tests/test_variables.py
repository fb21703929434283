"""A variational weight, and its log variance, where Keras and users take them for variables."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_vdrop as kv
from tests.cases import array

MEAN = np.arange(6, dtype="float32").reshape(3, 2) - 2.0


def weight(**arguments):
    layer = kv.VariationalDense(2, kl_weight=0.1, **arguments)
    layer.build((None, 3))
    layer.kernel.assign(MEAN)
    return layer.kernel


def log_variance(**arguments):
    found = weight(**arguments).log_variance
    found.assign(MEAN)
    return found


BOTH = pytest.mark.parametrize("make", [weight, log_variance])


@BOTH
def test_it_answers_like_a_variable(make):
    variable = make()
    assert tuple(variable.shape) == (3, 2) and variable.ndim == 2 and variable.dtype == "float32"
    for values in (np.asarray(variable), np.array(variable), variable.numpy(), array(variable.value)):
        np.testing.assert_allclose(values, MEAN, rtol=1e-6)
        assert values.dtype == "float32"
    assert np.asarray(variable, dtype="float64").dtype == "float64"


@BOTH
def test_operations_are_those_of_its_value(make):
    variable = make()
    results = {
        "square": (ops.square(variable), MEAN**2),
        "sum": (ops.sum(variable), MEAN.sum()),
        "mean": (ops.mean(ops.abs(variable)), np.abs(MEAN).mean()),
        "matmul": (ops.matmul(np.ones((1, 3), "float32"), variable), MEAN.sum(axis=0, keepdims=True)),
        "convert": (ops.convert_to_tensor(variable), MEAN),
        "cast": (ops.cast(variable, "float16"), MEAN),
        "operators": (2.0 * variable + 1.0 - variable / 4.0, 2.0 * MEAN + 1.0 - MEAN / 4.0),
        "two": (variable - variable, 0.0 * MEAN),
        "floor": (variable // 1.7, MEAN // 1.7),
        "remainder": (variable % 1.7, MEAN % 1.7),
        "index": (variable[1], MEAN[1]),
        "compare": (variable > 0.0, MEAN > 0),
        "equal": (variable == 0.0, MEAN == 0),
        "not equal": (variable != variable, MEAN != MEAN),
        "negative": (-variable, -MEAN),
    }
    for name, (found, expected) in results.items():
        np.testing.assert_allclose(array(found), expected, rtol=1e-6, atol=1e-6, err_msg=name)


@BOTH
def test_numbers_are_divided_by_it(make):
    variable = make()
    variable.assign(MEAN + 3.0)
    np.testing.assert_allclose(array(7.3 // variable), 7.3 // (MEAN + 3.0), rtol=1e-6)
    np.testing.assert_allclose(array(7.3 % variable), 7.3 % (MEAN + 3.0), rtol=1e-5)


@BOTH
def test_assigning_adds_and_returns_the_value(make):
    variable = make()
    for change, expected in (
        (variable.assign, MEAN),
        (variable.assign_add, 2.0 * MEAN),
        (variable.assign_sub, MEAN),
    ):
        np.testing.assert_allclose(array(change(MEAN)), expected, rtol=1e-6)
        np.testing.assert_allclose(np.asarray(variable), expected, rtol=1e-6)


def test_a_path_ends_in_the_name():
    kernel = weight(name="mine")
    assert kernel.name == "kernel" and kernel.path == "mine/kernel"
    assert kernel.log_variance.path == "mine/kernel_log_variance"


@pytest.mark.parametrize("prior", ["ard", kv.priors.Normal(trainable=True)], ids=["", "a prior that learns"])
def test_a_frozen_weight_learns_nothing_and_costs_nothing(prior):
    layer = kv.VariationalDense(2, kl_weight=0.1, kernel_prior=prior, use_bias=False)
    layer.build((None, 3))
    learned = len(layer.trainable_variables)
    assert layer.kernel.trainable and len(layer.losses) == 2
    layer.kernel.trainable = False
    assert not layer.kernel.trainable and layer.trainable_variables == [] and layer.losses == []
    layer.kernel.trainable = True
    assert layer.kernel.trainable and len(layer.trainable_variables) == learned


def test_what_never_learned_does_not_begin_to():
    """The mean of a scale that is 1."""
    layer = kv.VariationalGaussianDropout(0.2, kl_weight=0.1)
    layer.build((None, 3))
    layer.scale.trainable = True
    assert not layer.scale.loc.trainable and layer.scale.trainable


@BOTH
def test_it_is_itself_in_a_set_and_has_no_truth_value(make):
    variable = make()
    assert variable in {variable} and make() not in {variable}
    with pytest.raises(TypeError, match="no truth value"):
        bool(variable)


def test_assigning_to_a_weight_sets_its_mean_and_leaves_its_variance():
    kernel = weight(initial_log_variance=-4.0)
    np.testing.assert_array_equal(array(kernel.loc), MEAN)
    np.testing.assert_allclose(array(kernel.log_variance.value), np.full((3, 2), -4.0), rtol=1e-6)


def test_a_pruned_weight_is_0():
    kernel = weight()
    kernel.mask.assign(MEAN > 0)
    np.testing.assert_array_equal(np.asarray(kernel), np.maximum(MEAN, 0.0))


def test_repr_says_what_it_is():
    text = repr(weight(kernel_prior="ard"))
    assert "VariationalWeight" in text and "kernel" in text and "(3, 2)" in text and "ARD" in text


@pytest.mark.parametrize("rate", [1.0, 10.0])
def test_a_step_of_adam_moves_a_log_variance_by_so_many_learning_rates(rate):
    layer = kv.VariationalDense(2, kernel_prior="normal", kl_weight=1.0, log_variance_rate=rate)
    model = keras.Sequential([keras.Input((3,)), layer])
    model.compile(keras.optimizers.Adam(1e-3), lambda y, prediction: 0.0 * ops.sum(prediction))
    before = array(layer.kernel.log_variance.value)
    model.train_on_batch(np.ones((4, 3)), np.ones((4, 2)))
    moved = array(layer.kernel.log_variance.value) - before
    np.testing.assert_allclose(moved, np.full((3, 2), 1e-3 * rate), rtol=1e-2)


def test_the_mean_of_a_weight_has_a_gradient_in_a_regularizer():
    """By `value`, on every backend."""
    layer = kv.VariationalDense(2, kernel_prior="normal", kl_weight=0.0)
    model = keras.Sequential([keras.Input((3,)), layer])
    model.compile(keras.optimizers.SGD(0.5), lambda y, prediction: 0.0 * ops.sum(prediction))
    layer.kernel.loc.regularizer._regularizer = lambda loc: ops.sum(ops.square(layer.kernel.value))
    layer.kernel.assign(MEAN)
    model.train_on_batch(np.ones((4, 3)), np.ones((4, 2)))
    np.testing.assert_allclose(array(layer.kernel), np.zeros((3, 2)), atol=1e-6)


def test_spectral_normalization_wraps_a_variational_layer():
    """Keras's wrapper reads the kernel and assigns to it."""
    wrapped = keras.layers.SpectralNormalization(kv.VariationalDense(4, kl_weight=0.1), power_iterations=20)
    model = keras.Sequential([keras.Input((3,)), wrapped])
    wrapped.layer.kernel.assign(5.0 * np.random.default_rng(0).normal(size=(3, 4)))
    model(np.ones((2, 3), "float32"), training=True)
    np.testing.assert_allclose(np.linalg.norm(np.asarray(wrapped.layer.kernel), ord=2), 1.0, rtol=1e-2)
