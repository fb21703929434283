"""Log densities log p(y) of the distributions behind the losses: tensors in, tensors out, in nats."""

import math

from keras import ops

from keras_vdrop.functional.tensors import Tensor, TensorLike, tensors

LEAST_SCALE = 1e-3


def scale_of(raw_scale: TensorLike) -> Tensor:
    """Map an unbounded output to a scale, log(1 + exp(raw_scale)) + `LEAST_SCALE`, in the units of y.

    Without this lower bound, an output far below 0, as for an outlier among the inputs, would give a scale so small
    that ((y − loc) / scale)² overflows in float32. Standardise y: the bound is too coarse for numbers much smaller than
    1.

    Args:
        raw_scale: Tensor or number, any real values.

    Returns:
        Tensor of the same shape, > 0.

    Examples:
        >>> from keras_vdrop.functional import likelihoods
        >>> [round(float(likelihoods.scale_of(raw)), 3) for raw in (-100.0, 0.0, 100.0)]  # log 2 = 0.693
        [0.001, 0.694, 100.001]
    """
    (raw_scale,) = tensors(raw_scale)
    return ops.softplus(raw_scale) + LEAST_SCALE


def normal(y: TensorLike, loc: TensorLike, scale: TensorLike) -> Tensor:
    """Compute −½·log(2π) − log scale − ½·((y − loc) / scale)².

    Args:
        y, loc, scale: Tensors of broadcastable shapes, in the units of y. `scale` is the standard deviation, > 0.

    Examples:
        >>> from keras_vdrop.functional import likelihoods
        >>> round(float(likelihoods.normal(0.0, loc=0.0, scale=1.0)), 3)  # −½·log 2π
        -0.919
    """
    y, loc, scale = tensors(y, loc, scale)
    return -0.5 * math.log(2.0 * math.pi) - ops.log(scale) - 0.5 * ops.square((y - loc) / scale)


def laplace(y: TensorLike, loc: TensorLike, scale: TensorLike) -> Tensor:
    """Compute −log(2·scale) − |y − loc| / scale.

    Args:
        y, loc, scale: As for `normal`; the standard deviation is √2·scale.

    Examples:
        >>> from keras_vdrop.functional import likelihoods
        >>> round(float(likelihoods.laplace(1.0, loc=0.0, scale=0.5)), 3)  # −log 1 − 1 / 0.5
        -2.0
    """
    y, loc, scale = tensors(y, loc, scale)
    return -math.log(2.0) - ops.log(scale) - ops.abs(y - loc) / scale


def student_t(y: TensorLike, df: float, loc: TensorLike, scale: TensorLike) -> Tensor:
    """Compute the log density of Student's t distribution.

    log Γ((df + 1)/2) − log Γ(df/2) − ½·log(π·df) − log scale − (df + 1)/2·log(1 + ((y − loc) / scale)² / df)

    Args:
        y, loc, scale: As for `normal`; the standard deviation is scale·√(df / (df − 2)) for df > 2, else infinite.
        df: Float > 0, the degrees of freedom. Fewer mean heavier tails; the limit ∞ is the normal distribution.

    Examples:
        >>> from keras_vdrop.functional import likelihoods
        >>> round(float(likelihoods.student_t(0.0, df=1.0, loc=0.0, scale=1.0)), 3)  # −log π
        -1.145
    """
    y, loc, scale = tensors(y, loc, scale)
    constant = math.lgamma(0.5 * (df + 1.0)) - math.lgamma(0.5 * df) - 0.5 * math.log(math.pi * df)
    return constant - ops.log(scale) - 0.5 * (df + 1.0) * ops.log1p(ops.square((y - loc) / scale) / df)


def normal_mixture(y: TensorLike, logits: TensorLike, loc: TensorLike, scale: TensorLike) -> Tensor:
    """Compute log Σ_k softmax(logits)_k·N(y; loc_k, scale_k²).

    Args:
        y: Tensor (B, ...).
        logits, loc, scale: Tensors (B, ..., K), of K normal distributions; `scale` > 0.

    Examples:
        >>> from keras_vdrop.functional import likelihoods
        >>> same = likelihoods.normal_mixture([0.0], logits=[[0.0, 0.0]], loc=[[0.0, 0.0]], scale=[[1.0, 1.0]])
        >>> round(float(same[0]), 3)  # two equal normals: −½·log 2π
        -0.919

    Reference:
        Mixture Density Networks, Bishop, 1994, https://publications.aston.ac.uk/id/eprint/373/
    """
    y, logits, loc, scale = tensors(y, logits, loc, scale)
    parts = normal(ops.expand_dims(y, axis=-1), loc, scale)
    return ops.logsumexp(ops.log_softmax(logits, axis=-1) + parts, axis=-1)
