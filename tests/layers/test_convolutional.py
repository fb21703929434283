"""Convolutions against sums over patches in NumPy."""

import numpy as np
import pytest

import keras_vdrop as kv
from tests.cases import array, randomize
from tests.statistics import assert_mean, assert_variance, draws


def patches(x, w, strides, dilation, groups):
    """The convolution, one output at a time."""
    height, width, channels, filters = w.shape
    rows = (x.shape[1] - dilation * (height - 1) - 1) // strides + 1
    columns = (x.shape[2] - dilation * (width - 1) - 1) // strides + 1
    result = np.zeros((len(x), rows, columns, filters))
    for i in range(rows):
        for j in range(columns):
            patch = x[:, i * strides :: dilation, j * strides :: dilation][:, :height, :width]
            for f in range(filters):
                first = (f * groups // filters) * channels
                result[:, i, j, f] = (patch[..., first : first + channels] * w[..., f]).sum(axis=(1, 2, 3))
    return result


@pytest.mark.parametrize("estimator", ["local_reparameterization", "flipout", "reparameterization"])
@pytest.mark.parametrize("strides, dilation, groups", [(1, 1, 1), (2, 1, 2), (1, 2, 2)])
def test_mean_and_variance_patch_by_patch(estimator, strides, dilation, groups):
    layer = kv.VariationalConv2D(
        4, (3, 2), strides, dilation_rate=dilation, groups=groups, estimator=estimator, use_bias=False, kl_weight=0.1
    )
    x = np.random.default_rng(0).normal(size=(2, 7, 6, 4)).astype("float32")
    layer(x)
    randomize(layer)
    loc, variance = array(layer.kernel.loc), np.exp(array(layer.kernel.log_variance))
    samples = draws(lambda: layer(x, training=True), 1500)
    expected = patches(x**2, variance, strides, dilation, groups)
    assert_mean(samples, patches(x, loc, strides, dilation, groups))
    if estimator == "flipout":  # its signs give outputs the tails of no normal variable
        error = np.sqrt(((samples - samples.mean(0)) ** 2).var(axis=0) / len(samples))
        assert (np.abs(samples.var(axis=0) - expected) < 5 * error).all()
    else:
        assert_variance(samples, expected)
