"""Unbiased, differentiable draws of `linear(x, w)` for w ~ N(loc, exp(log_variance)).

An estimator is a function `(linear, x, loc, log_variance, seed, sign_axes, dtype) -> output`, where `linear(x, w)` is
an operation linear in `x` and in `w` (a product, a convolution, an einsum, a lookup). All estimators have the same mean
`linear(x, loc)` and, for each single output, the same variance `linear(x², exp(log_variance))`. They differ in what
they draw, and so in cost and in the dependence between outputs:

| estimator | draws | products | noise of different examples |
| --- | --- | --- | --- |
| `local_reparameterization` | one number for each output | 2 | independent, also among outputs |
| `flipout` | one weight for the batch, signs for each example | 2 | uncorrelated, but from one weight draw |
| `reparameterization` | one weight for the batch | 1 | the same weight draw |

`loc` and `log_variance` are float32 (or wider). The mean is computed in the dtype of the output, and the variance in
that of `log_variance`. An `x` of an integer dtype means a lookup: each integer stands for a one-hot row.
"""

from collections.abc import Callable, Sequence

import keras
from keras import ops

from keras_vdrop.functional import noise
from keras_vdrop.functional.tensors import DType, Tensor, TensorLike, tensors

# Keeps the gradient of the square root finite if an output has zero variance.
_SMALLEST_VARIANCE = 1e-16

# The axes of the input and of the output along which flipout draws signs: examples and channels.
_BATCH_AND_CHANNELS = ((0, -1), (0, -1))


def reparameterize(loc: TensorLike, log_variance: TensorLike, seed: keras.random.SeedGenerator | int) -> Tensor:
    """Draw w = loc + exp(½·log_variance)·ε with ε ~ N(0, 1), of the shape and dtype of `loc`.

    Examples:
        >>> from keras_vdrop.functional import estimators
        >>> w = estimators.reparameterize(loc=[1.0, 2.0], log_variance=[-40.0, -40.0], seed=0)
        >>> [round(float(each), 3) for each in w]  # the standard deviation is 2e-9
        [1.0, 2.0]

    Reference:
        Auto-Encoding Variational Bayes, Kingma, Welling, 2014, https://arxiv.org/abs/1312.6114
    """
    loc, log_variance = tensors(loc, log_variance, least="float32")
    return loc + perturbation(log_variance, seed)


def perturbation(log_variance: TensorLike, seed: keras.random.SeedGenerator | int) -> Tensor:
    """Draw exp(½·log_variance)·ε with ε ~ N(0, 1), of the shape and dtype of `log_variance`.

    Examples:
        >>> from keras import ops
        >>> from keras_vdrop.functional import estimators
        >>> deviation = estimators.perturbation(ops.zeros((2, 3)), seed=0)
        >>> deviation.shape == (2, 3), bool(ops.any(deviation != 0.0))
        (True, True)
    """
    (log_variance,) = tensors(log_variance, least="float32")
    return ops.exp(0.5 * log_variance) * noise.normal(ops.shape(log_variance), seed, log_variance.dtype)


def local_reparameterization(
    linear: Callable[[Tensor, Tensor], Tensor],
    x: TensorLike,
    loc: TensorLike,
    log_variance: TensorLike,
    seed: keras.random.SeedGenerator,
    sign_axes: tuple[tuple[int, ...], tuple[int, ...]] | None = _BATCH_AND_CHANNELS,
    dtype: DType | None = None,
) -> Tensor:
    """Compute linear(x, loc) + sqrt(linear(x², exp(log_variance)))·ε, with ε ~ N(0, 1) for each output.

    If an example uses each number of the weight once, as in a product with inputs (B, D), this is equivalent to a draw
    of the weight. If it uses one at several positions, as in a convolution, each position has independent noise, which
    no draw of the weight produces.

    Args:
        linear: Callable `(x, w) -> output`, linear in both.
        x: Tensor, the input, the batch on its first axis.
        loc: Tensor, the mean of the weight.
        log_variance: Tensor of the same shape, its log variance.
        seed: A `keras.random.SeedGenerator`.
        sign_axes: Ignored.
        dtype: Dtype of the output and of `linear(x, loc)`; by default that of `x`.

    Returns:
        Tensor of the shape of `linear(x, loc)`.

    Examples:
        >>> import keras
        >>> from keras_vdrop.functional import estimators
        >>> x, loc, log_variance = keras.ops.ones((2, 1)), [[0.0]], [[0.0]]
        >>> seed = keras.random.SeedGenerator(0)
        >>> y = estimators.local_reparameterization(keras.ops.matmul, x, loc, log_variance, seed)
        >>> bool(y[0, 0] == y[1, 0])  # the noise of two examples is independent
        False

    Reference:
        Variational Dropout and the Local Reparameterization Trick, Kingma, Salimans, Welling, 2015,
        https://arxiv.org/abs/1506.02557
    """
    del sign_axes
    x, loc, log_variance = _arguments(x, loc, log_variance)
    mean = linear(x, ops.cast(loc, dtype or x.dtype))
    # In float16, which ends at 65504, even the square of 300 is infinite. A one-hot row of a lookup is its own square.
    squared = x if _is_lookup(x) else ops.square(ops.cast(x, log_variance.dtype))
    scale = ops.sqrt(linear(squared, ops.exp(log_variance)) + _SMALLEST_VARIANCE)
    epsilon = noise.normal(ops.shape(mean), seed, log_variance.dtype)
    return mean + ops.cast(scale * epsilon, mean.dtype)


def flipout(
    linear: Callable[[Tensor, Tensor], Tensor],
    x: TensorLike,
    loc: TensorLike,
    log_variance: TensorLike,
    seed: keras.random.SeedGenerator,
    sign_axes: tuple[tuple[int, ...], tuple[int, ...]] = _BATCH_AND_CHANNELS,
    dtype: DType | None = None,
) -> Tensor:
    """Compute linear(x, loc) + s·linear(r·x, Δw) with one Δw ~ N(0, exp(log_variance)) and signs r, s per example.

    Random signs on the channels of the input and the output turn one draw of the weight into a different perturbation
    for each example, uncorrelated with those of other examples. For a single example the result is a draw of the
    weight, the same at all positions, since a zero-mean normal number keeps its distribution if its sign is flipped.

    Args:
        linear: Callable `(x, w) -> output`, linear in both.
        x: Tensor, the input, the batch on its first axis.
        loc: Tensor, the mean of the weight.
        log_variance: Tensor of the same shape, its log variance.
        seed: A `keras.random.SeedGenerator`.
        sign_axes: Two tuples, the axes of `x` and those of the output along which signs differ: the batch, and the axes
            that they share with the weight. Along all other axes, the signs of an example are constant.
        dtype: Dtype of the output and of both products; by default that of `x`.

    Returns:
        Tensor of the shape of `linear(x, loc)`.

    Examples:
        >>> import keras
        >>> from keras_vdrop.functional import estimators
        >>> x, loc, log_variance = keras.ops.ones((2, 1)), [[0.0]], [[0.0]]
        >>> y = estimators.flipout(keras.ops.matmul, x, loc, log_variance, keras.random.SeedGenerator(0))
        >>> bool(abs(y[0, 0]) == abs(y[1, 0]))  # both examples have the same draw, up to signs
        True

    Reference:
        Flipout: Efficient Pseudo-Independent Weight Perturbations on Mini-Batches, Wen et al., 2018,
        https://arxiv.org/abs/1803.04386
    """
    x, loc, log_variance = _arguments(x, loc, log_variance)
    dtype = dtype or x.dtype
    mean = linear(x, ops.cast(loc, dtype))
    delta = ops.cast(perturbation(log_variance, seed), dtype)
    # A lookup reads a single row of the weight, so the signs of the output suffice.
    signed = x if _is_lookup(x) else x * _signs(x, seed, sign_axes[0])
    return mean + linear(signed, delta) * _signs(mean, seed, sign_axes[1])


def _arguments(x: TensorLike, loc: TensorLike, log_variance: TensorLike) -> tuple[Tensor, Tensor, Tensor]:
    """Convert all three to tensors."""
    return ops.convert_to_tensor(x), *tensors(loc, log_variance, least="float32")


def _is_lookup(x: Tensor) -> bool:
    return "int" in keras.backend.standardize_dtype(x.dtype)


def _signs(tensor: Tensor, seed: keras.random.SeedGenerator, axes: Sequence[int]) -> Tensor:
    """Draw signs along some axes of `tensor`; all other axes have size 1."""
    kept = {axis % len(tensor.shape) for axis in axes}
    shape = tuple(size if axis in kept else 1 for axis, size in enumerate(ops.shape(tensor)))
    return noise.rademacher(shape, seed, tensor.dtype)


def reparameterization(
    linear: Callable[[Tensor, Tensor], Tensor],
    x: TensorLike,
    loc: TensorLike,
    log_variance: TensorLike,
    seed: keras.random.SeedGenerator,
    sign_axes: tuple[tuple[int, ...], tuple[int, ...]] | None = _BATCH_AND_CHANNELS,
    dtype: DType | None = None,
) -> Tensor:
    """Compute linear(x, w) with one draw w = loc + exp(½·log_variance)·ε for the whole batch.

    This is the cheapest estimator. Its gradient has the highest variance, as the noise does not average out over the
    batch.

    Args:
        linear: Callable `(x, w) -> output`, linear in both.
        x: Tensor, the input, the batch on its first axis.
        loc: Tensor, the mean of the weight.
        log_variance: Tensor of the same shape, its log variance.
        seed: A `keras.random.SeedGenerator`.
        sign_axes: Ignored.
        dtype: Dtype of the output and of the product; by default that of `x`.

    Returns:
        Tensor of the shape of `linear(x, loc)`.

    Examples:
        >>> import keras
        >>> from keras_vdrop.functional import estimators
        >>> x, loc, log_variance = keras.ops.ones((2, 1)), [[0.0]], [[0.0]]
        >>> y = estimators.reparameterization(keras.ops.matmul, x, loc, log_variance, keras.random.SeedGenerator(0))
        >>> bool(y[0, 0] == y[1, 0])  # both examples have the same draw
        True

    Reference:
        Weight Uncertainty in Neural Networks, Blundell et al., 2015, https://arxiv.org/abs/1505.05424
    """
    del sign_axes
    x, loc, log_variance = _arguments(x, loc, log_variance)
    return linear(x, ops.cast(reparameterize(loc, log_variance, seed), dtype or x.dtype))


ESTIMATORS: dict[str, Callable[..., Tensor]] = {
    "local_reparameterization": local_reparameterization,
    "flipout": flipout,
    "reparameterization": reparameterization,
}
