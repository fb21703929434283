"""Unbiased, differentiable draws of `linear(x, w)` for w ~ N(loc, exp(log_variance)).

An estimator is one function `(linear, x, loc, log_variance, seed, sign_axes, dtype) -> output`, where
`linear(x, w)` is any operation linear in `x` and in `w` (a product, a convolution, an einsum, a lookup). All of them
have the same mean `linear(x, loc)` and, for one output at a time, the same variance `linear(x², exp(log_variance))`.
They differ in what is drawn, and so in cost and in how outputs vary together:

| estimator | draws | products | noise is shared by |
| --- | --- | --- | --- |
| `local_reparameterization` | one number for each output | 2 | nothing |
| `flipout` | one weight for the batch, signs for each example | 2 | nothing but one weight draw |
| `reparameterization` | one weight for the batch | 1 | all examples of the batch |

`loc` and `log_variance` are float32 (or wider). The mean is computed in the type of the output, the variance in theirs.
An `x` of an integer type is a lookup: it stands for rows that are 1 in one place and 0 elsewhere.
"""

import keras
from keras import ops

from keras_vdrop.functional import noise
from keras_vdrop.functional.tensors import tensors

# Keeps the gradient of the square root finite where an output has no variance at all.
_SMALLEST_VARIANCE = 1e-16

# The axes of the input, and of the output, along which flipout's signs differ: examples and channels.
_BATCH_AND_CHANNELS = ((0, -1), (0, -1))


def reparameterize(loc, log_variance, seed):
    """One draw w = loc + exp(½·log_variance)·ε with ε ~ N(0, 1), of the shape and type of `loc`."""
    loc, log_variance = tensors(loc, log_variance, least="float32")
    return loc + perturbation(log_variance, seed)


def perturbation(log_variance, seed):
    """One draw exp(½·log_variance)·ε with ε ~ N(0, 1), of the shape and type of `log_variance`."""
    (log_variance,) = tensors(log_variance, least="float32")
    return ops.exp(0.5 * log_variance) * noise.normal(ops.shape(log_variance), seed, log_variance.dtype)


def local_reparameterization(linear, x, loc, log_variance, seed, sign_axes=_BATCH_AND_CHANNELS, dtype=None):
    """linear(x, loc) + sqrt(linear(x², exp(log_variance)))·ε, with ε ~ N(0, 1) for each output.

    A draw of the weight where an example uses each number of it once, as a product of (B, D) does. Where it uses one
    at several places, as a convolution does, each place has noise of its own: no draw of the weight does that.

    Args:
        linear: Callable `(x, w) -> output`, linear in both.
        x: Tensor, the input, the batch on its first axis.
        loc: Tensor, the mean of the weight.
        log_variance: Tensor of the same shape, its log variance.
        seed: A `keras.random.SeedGenerator`.
        sign_axes: Not used here.
        dtype: Of the output, and of what `linear` computes the mean in; by default that of `x`.

    Returns:
        Tensor of the shape of `linear(x, loc)`.

    Reference:
        Variational Dropout and the Local Reparameterization Trick, Kingma, Salimans, Welling, 2015,
        https://arxiv.org/abs/1506.02557
    """
    del sign_axes
    x, loc, log_variance = _arguments(x, loc, log_variance)
    mean = linear(x, ops.cast(loc, dtype or x.dtype))
    # float16 ends at 65504, so the square of 300 is already infinite in it. The square of a row of a lookup is itself.
    squared = x if _is_lookup(x) else ops.square(ops.cast(x, log_variance.dtype))
    scale = ops.sqrt(linear(squared, ops.exp(log_variance)) + _SMALLEST_VARIANCE)
    epsilon = noise.normal(ops.shape(mean), seed, log_variance.dtype)
    return mean + ops.cast(scale * epsilon, mean.dtype)


def flipout(linear, x, loc, log_variance, seed, sign_axes=_BATCH_AND_CHANNELS, dtype=None):
    """linear(x, loc) + s·linear(r·x, Δw), one Δw ~ N(0, exp(log_variance)), signs r and s for each example.

    Multiplying the input's and the output's channels by random signs gives each example a perturbation of its own,
    uncorrelated with its neighbours', from one draw of the weight. For an example it is itself a draw of the weight,
    the same at all of its places: a normal number times a sign is as normal as before.

    Args:
        linear: Callable `(x, w) -> output`, linear in both.
        x: Tensor, the input, the batch on its first axis.
        loc: Tensor, the mean of the weight.
        log_variance: Tensor of the same shape, its log variance.
        seed: A `keras.random.SeedGenerator`.
        sign_axes: Two tuples, the axes of `x` and those of the output along which signs differ: the batch, and whatever
            axes they share with the weight. Along the others an example keeps its signs.
        dtype: Of the output, and of what `linear` computes in; by default that of `x`.

    Returns:
        Tensor of the shape of `linear(x, loc)`.

    Reference:
        Flipout: Efficient Pseudo-Independent Weight Perturbations on Mini-Batches, Wen et al., 2018,
        https://arxiv.org/abs/1803.04386
    """
    x, loc, log_variance = _arguments(x, loc, log_variance)
    dtype = dtype or x.dtype
    mean = linear(x, ops.cast(loc, dtype))
    delta = ops.cast(perturbation(log_variance, seed), dtype)
    # A lookup meets one row of the weight at a time: the output's signs alone make it independent.
    signed = x if _is_lookup(x) else x * _signs(x, seed, sign_axes[0])
    return mean + linear(signed, delta) * _signs(mean, seed, sign_axes[1])


def _arguments(x, loc, log_variance):
    """All three as tensors."""
    return ops.convert_to_tensor(x), *tensors(loc, log_variance, least="float32")


def _is_lookup(x):
    return "int" in keras.backend.standardize_dtype(x.dtype)


def _signs(tensor, seed, axes):
    """Signs along some axes of `tensor`, of size 1 along its others."""
    kept = {axis % len(tensor.shape) for axis in axes}
    shape = tuple(size if axis in kept else 1 for axis, size in enumerate(ops.shape(tensor)))
    return noise.rademacher(shape, seed, tensor.dtype)


def reparameterization(linear, x, loc, log_variance, seed, sign_axes=_BATCH_AND_CHANNELS, dtype=None):
    """linear(x, w) with one draw w = loc + exp(½·log_variance)·ε for the whole batch.

    The cheapest estimator, and the one whose gradient varies most: its noise does not average out over the batch.

    Args:
        linear: Callable `(x, w) -> output`, linear in both.
        x: Tensor, the input, the batch on its first axis.
        loc: Tensor, the mean of the weight.
        log_variance: Tensor of the same shape, its log variance.
        seed: A `keras.random.SeedGenerator`.
        sign_axes: Not used here.
        dtype: Of the output, and of what `linear` computes the mean in; by default that of `x`.

    Returns:
        Tensor of the shape of `linear(x, loc)`.

    Reference:
        Weight Uncertainty in Neural Networks, Blundell et al., 2015, https://arxiv.org/abs/1505.05424
    """
    del sign_axes
    x, loc, log_variance = _arguments(x, loc, log_variance)
    return linear(x, ops.cast(reparameterize(loc, log_variance, seed), dtype or x.dtype))


ESTIMATORS = {
    "local_reparameterization": local_reparameterization,
    "flipout": flipout,
    "reparameterization": reparameterization,
}
