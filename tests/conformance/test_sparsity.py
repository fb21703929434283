"""The report of `sparsity` is exact: it agrees with the pruned weights, the Keras layer and the counted products."""

import dataclasses
import warnings

import numpy as np
import pytest

import keras_vdrop as kv
from keras_vdrop.layers.weights import AffineLayer
from tests.cases import CASES, array, posteriors, randomize

PRUNABLE = [each for each in CASES if each.is_kernel or each.name == "gaussian_dropout"]
over_prunable = pytest.mark.parametrize("prunable", PRUNABLE, ids=str)


def kernels(model):
    return [weight for weight in posteriors(model) if weight.prunable]


def randomly_pruned(case, density):
    """Return a model that keeps a random share `density` of its prunable weights, and its sparsity report.

    The threshold of 50 prunes no further weights, so only the masks count.
    """
    model = case.model()
    randomize(model)
    rng = np.random.default_rng(1)
    for weight in kernels(model):
        weight.mask.assign(rng.uniform(size=weight.shape) < density)
    return model, kv.sparsity(model, 50.0)


@over_prunable
def test_left_is_what_unclipped_log_alpha_says_and_prune_leaves(prunable):
    model = prunable.model()
    randomize(model)

    def log_alpha(weight):
        if weight.prior.groups:
            return array(weight.log_alpha())
        with np.errstate(divide="ignore"):
            return array(weight.log_variance) - np.log(array(weight.loc) ** 2)

    for threshold in (1.5, 0.0, -1.0):
        report = kv.sparsity(model, threshold)
        assert report.left == sum(int((log_alpha(weight) <= threshold).sum()) for weight in kernels(model))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "No weights are kept in")
            assert kv.prune(model, threshold) == report
        values = [array(weight.mean()) for weight in kernels(model)]
        assert report.left == sum(map(np.count_nonzero, values))
        assert report.weights == sum(map(np.size, values))


@over_prunable
def test_bytes_are_those_of_the_keras_layer(prunable):
    model, report = randomly_pruned(prunable, 0.5)
    for variable in model.weights:
        if "bias" in variable.path and "mask" not in variable.path:
            variable.assign(np.ones(variable.shape))
    stored = [array(variable) for variable in kv.to_deterministic(model).weights]
    assert report.bytes == 4 * sum(map(np.size, stored))
    assert report.bytes_left == 4 * sum(map(np.count_nonzero, stored))


def products(layer, input_shape):
    """Return each kernel of a layer with the function that multiplies by it and an input of ones."""
    ones = np.ones((1, *input_shape[1:]), "float32")
    if not isinstance(layer, kv.VariationalSeparableConv2D):
        return [(layer.kernel, layer.linear, ones)]
    between = np.ones_like(layer._depthwise(ones, array(layer.depthwise_kernel.mask)))
    return [(layer.depthwise_kernel, layer._depthwise, ones), (layer.pointwise_kernel, layer._pointwise, between)]


@over_prunable
def test_ones_sum_to_the_multiply_adds(prunable):
    """With ones for inputs and weights, the sum of the products is their number. Padding is off, as it adds zeros."""
    if "padding" in prunable.keras:
        prunable = dataclasses.replace(prunable, keras={**prunable.keras, "padding": "valid"})
    model, report = randomly_pruned(prunable, 0.3)
    layers = list(dict.fromkeys(weight.owner for weight in kernels(model)))
    for layer, row in zip(layers, report.layers, strict=True):
        if isinstance(layer, AffineLayer):
            shape = layer.get_build_config()["input_shape"]
            of_left = of_all = 0
            for kernel, multiply, ones in products(layer, shape):
                of_left += array(multiply(ones, array(kernel.mask))).sum()
                of_all += array(multiply(ones, np.ones(kernel.shape, "float32"))).sum()
            assert (row.multiply_adds, row.multiply_adds_left) == (of_all, of_left)
        else:
            steps = prunable.shape[1] if prunable.is_cell or prunable.is_rnn else 0
            assert (row.multiply_adds, row.multiply_adds_left) == (steps * row.weights, steps * row.left)
    assert report.multiply_adds == sum(row.multiply_adds for row in report.layers)


@over_prunable
def test_units_are_the_outputs_that_are_not_zero(prunable):
    model, report = randomly_pruned(prunable, 0.1)
    layers = list(dict.fromkeys(weight.owner for weight in kernels(model)))
    for layer, row in zip(layers, report.layers, strict=True):
        (name, counts), *_ = row.structure.items()
        if not isinstance(layer, AffineLayer) or isinstance(layer, kv.VariationalSeparableConv2D):
            continue
        shape = layer.get_build_config()["input_shape"]
        x = np.random.default_rng(2).uniform(1, 2, size=(2, *shape[1:])).astype("float32")
        y = array(layer.linear(x, array(layer.kernel.mask)))
        axes = {axis % y.ndim for axis in layer._sign_axes()[1][1:]}
        alive = (y != 0).any(axis=tuple(set(range(y.ndim)) - axes))
        assert name in ("units", "filters", "channels")
        assert counts == (alive.sum(), alive.size)
