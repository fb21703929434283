"""Convolutions against sums over patches in NumPy."""

import numpy as np
import pytest

import keras_vdrop as kv
from keras_vdrop.functional import estimators
from tests.cases import array, randomize
from tests.statistics import assert_mean, assert_variance, sample

ESTIMATORS = list(estimators.ESTIMATORS)


def patches(x, size, strides=1, padding="valid", dilation_rate=1):
    """Every location of the output and the patch (B, *size, D) that it sees of the padded input."""
    size, lengths, dilation = np.array(size), np.array(x.shape[1:-1]), np.broadcast_to(dilation_rate, len(size))
    strides, reach = np.broadcast_to(strides, len(size)), dilation * (size - 1) + 1
    if padding == "causal":
        x = np.pad(x, [(0, 0), (reach[0] - 1, 0), (0, 0)])
    elif padding == "same":
        missing = np.maximum((-(-lengths // strides) - 1) * strides + reach - lengths, 0)
        x = np.pad(x, [(0, 0), *((m // 2, m - m // 2) for m in missing), (0, 0)])
    for where in np.ndindex(*(np.array(x.shape[1:-1]) - reach) // strides + 1):
        window = [slice(i * s, i * s + r, d) for i, s, r, d in zip(where, strides, reach, dilation)]
        yield where, x[(slice(None), *window)]


def assembled(columns):
    """The outputs (B, ..., U), given as a dict from each location to what is there (B, U)."""
    grid = np.max(list(columns), axis=0) + 1
    rows = np.stack([columns[where] for where in np.ndindex(*grid)], axis=1)
    return rows.reshape(len(rows), *grid, -1)


def convolution(x, w, groups=1, **how):
    """Each output is a sum over the locations of a patch and over the channels of its filter's group."""
    *size, channels, filters = w.shape
    axes = tuple(range(1, w.ndim))
    first = [f * groups // filters * channels for f in range(filters)]
    columns = {}
    for where, patch in patches(x, size, **how):
        sums = [(patch[..., c : c + channels] * w[..., f]).sum(axes) for f, c in enumerate(first)]
        columns[where] = np.stack(sums, axis=-1)
    return assembled(columns)


def depthwise(x, w, **how):
    """Each output is a sum over the locations of a patch, of one channel; each channel has several outputs."""
    *size, channels, multiplier = w.shape
    axes = tuple(range(1, w.ndim - 1))
    columns = {}
    for where, patch in patches(x, size, **how):
        sums = [(patch[..., c] * w[..., c, m]).sum(axes) for c in range(channels) for m in range(multiplier)]
        columns[where] = np.stack(sums, axis=-1)
    return assembled(columns)


def transposed(x, w, strides=1, padding="valid", dilation_rate=1, output_padding=None):
    """Each input adds itself times the kernel to a patch of the output, whose rim "same" cuts off."""
    size, lengths = np.array(w.shape[:-2]), np.array(x.shape[1:-1])
    strides, dilation = np.broadcast_to(strides, len(size)), np.broadcast_to(dilation_rate, len(size))
    reach = dilation * (size - 1) + 1
    covered = (lengths - 1) * strides + reach
    if output_padding is None:
        outputs = lengths * strides if padding == "same" else np.maximum(covered, lengths * strides)
    else:
        outputs = covered + output_padding - (reach // 2 * 2 if padding == "same" else 0)
    result = np.zeros((len(x), *np.maximum(covered, outputs), w.shape[-2]))
    for where in np.ndindex(*lengths):
        window = [slice(i * s, i * s + r, d) for i, s, r, d in zip(where, strides, reach, dilation)]
        result[(slice(None), *window)] += np.tensordot(x[(slice(None), *where)], w, (-1, -1))
    rim = np.maximum(covered - outputs, 0) // 2
    return result[(slice(None), *(slice(r, r + o) for r, o in zip(rim, outputs)))]


def noisy(cls, shape, **arguments):
    """A layer of random weights, and an input."""
    layer = cls(**{"use_bias": False, "kl_weight": 0.1, **arguments})
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    layer(x)
    randomize(layer)
    return layer, x


CASES = {
    "conv_1d": (kv.VariationalConv1D, (2, 6, 3), {"filters": 2, "kernel_size": 3, "padding": "same"}),
    "conv_1d_causal_dilation": (
        kv.VariationalConv1D,
        (2, 6, 2),
        {"filters": 2, "kernel_size": 2, "padding": "causal", "dilation_rate": 3},
    ),
    "conv_1d_causal_strides": (
        kv.VariationalConv1D,
        (2, 6, 2),
        {"filters": 2, "kernel_size": 3, "padding": "causal", "strides": 2},
    ),
    "conv_2d": (kv.VariationalConv2D, (2, 5, 4, 2), {"filters": 3, "kernel_size": (3, 2)}),
    "conv_2d_groups_strides": (
        kv.VariationalConv2D,
        (2, 5, 6, 4),
        {"filters": 4, "kernel_size": (3, 2), "strides": (2, 3), "groups": 2, "padding": "same"},
    ),
    "conv_2d_dilation": (
        kv.VariationalConv2D,
        (2, 6, 5, 2),
        {"filters": 2, "kernel_size": (2, 3), "dilation_rate": (3, 2)},
    ),
    "conv_3d": (kv.VariationalConv3D, (2, 3, 4, 3, 2), {"filters": 2, "kernel_size": (2, 3, 1), "strides": (1, 1, 2)}),
    "conv_1d_transpose": (kv.VariationalConv1DTranspose, (2, 3, 2), {"filters": 2, "kernel_size": 3, "strides": 2}),
    "conv_1d_transpose_dilation": (
        kv.VariationalConv1DTranspose,
        (2, 4, 2),
        {"filters": 2, "kernel_size": 2, "dilation_rate": 2},
    ),
    "conv_2d_transpose": (
        kv.VariationalConv2DTranspose,
        (2, 3, 2, 2),
        {"filters": 3, "kernel_size": (3, 2), "strides": (2, 1), "padding": "same"},
    ),
    "conv_2d_transpose_output_padding": (
        kv.VariationalConv2DTranspose,
        (2, 2, 3, 2),
        {"filters": 2, "kernel_size": (3, 4), "strides": (2, 3), "padding": "same", "output_padding": (1, 2)},
    ),
    "depthwise_conv_2d": (
        kv.VariationalDepthwiseConv2D,
        (2, 5, 4, 2),
        {"kernel_size": (3, 2), "depth_multiplier": 2, "padding": "same"},
    ),
    "depthwise_conv_2d_strides": (kv.VariationalDepthwiseConv2D, (2, 6, 5, 3), {"kernel_size": (2, 3), "strides": 2}),
}
ORACLES = {"conv_1d_t": transposed, "conv_2d_t": transposed, "depthwise": depthwise}
HOW = ("strides", "padding", "dilation_rate", "groups", "output_padding")


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("case", CASES)
def test_mean_and_variance_patch_by_patch(case, estimator):
    """Every output is normal, by flipout too: its signs do not change the variance of any one output."""
    cls, shape, arguments = CASES[case]
    layer, x = noisy(cls, shape, **arguments, estimator=estimator)
    oracle = ORACLES.get(case[:9], convolution)
    how = {name: arguments[name] for name in HOW if name in arguments}
    mean = oracle(x.astype("float64"), array(layer.kernel.loc), **how)
    np.testing.assert_allclose(array(layer(x)), mean, rtol=1e-4, atol=1e-5)
    samples = sample(layer, x)
    assert_mean(samples, mean)
    assert_variance(samples, oracle(x.astype("float64") ** 2, np.exp(array(layer.kernel.log_variance)), **how))


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("how", [{"strides": 2, "padding": "same"}, {"dilation_rate": 2}], ids=str)
def test_separable_convolution_is_a_product_of_two_random_kernels(how, estimator):
    """Of Σ h·w, independent: mean Σ E[h]·E[w] and variance Σ (E[h]²·V[w] + V[h]·E[w]² + V[h]·V[w]); not normal."""
    arguments = {"filters": 2, "kernel_size": (3, 2), "depth_multiplier": 2, "estimator": estimator, **how}
    layer, x = noisy(kv.VariationalSeparableConv2D, (2, 5, 4, 2), **arguments)
    first, second = layer.depthwise_kernel, layer.pointwise_kernel
    h = depthwise(x.astype("float64"), array(first.loc), **how)
    h_variance = depthwise(x.astype("float64") ** 2, np.exp(array(first.log_variance)), **how)
    w, w_variance = array(second.loc)[0, 0], np.exp(array(second.log_variance))[0, 0]
    np.testing.assert_allclose(array(layer(x)), h @ w, rtol=1e-4, atol=1e-5)
    samples = sample(layer, x)
    assert_mean(samples, h @ w)
    assert_mean((samples - h @ w) ** 2, h**2 @ w_variance + h_variance @ w**2 + h_variance @ w_variance)


SEPARABLE = (kv.VariationalSeparableConv2D, (2, 5, 4, 2), {"filters": 3, "kernel_size": 2, "depth_multiplier": 2})
ONE_OF_EACH = [
    "conv_1d_causal_dilation",
    "conv_2d_groups_strides",
    "conv_3d",
    "conv_1d_transpose",
    "conv_2d_transpose_output_padding",
    "depthwise_conv_2d",
    "separable_conv_2d",
]


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_channels_first_is_channels_last_transposed(case):
    """In inference, and by flipout in training: from one seed, examples and channels get the same signs."""
    cls, shape, arguments = {**CASES, "separable_conv_2d": SEPARABLE}[case]
    arguments = {**arguments, "use_bias": True, "bias_prior": "normal", "estimator": "flipout", "seed": 3}
    last, x = noisy(cls, shape, **arguments)
    moved = np.moveaxis(x, -1, 1)
    first = cls(**arguments, kl_weight=0.1, data_format="channels_first")
    first.build(moved.shape)
    first.set_weights(last.get_weights())
    for training in (False, True):
        expected = np.moveaxis(array(last(x, training=training)), -1, 1)
        np.testing.assert_allclose(array(first(moved, training=training)), expected, rtol=1e-4, atol=1e-5)
