"""Log densities log p(y) of the distributions behind the losses: tensors in, tensors out, in nats."""

import math

from keras import ops

from keras_vdrop.functional.tensors import Tensor, TensorLike, tensors

LEAST_SCALE = 1e-3


def scale_of(raw_scale: TensorLike) -> Tensor:
    """Map an unbounded output to a scale, log(1 + exp(raw_scale)) + `LEAST_SCALE`, in the units of y.

    Without the least scale, an output far below 0, as for an outlier among the inputs, would make the scale so small
    that ((y − loc) / scale)² overflows in float32. The least scale requires y not much smaller than 1: standardise y.
    """
    (raw_scale,) = tensors(raw_scale)
    return ops.softplus(raw_scale) + LEAST_SCALE


def normal(y: TensorLike, loc: TensorLike, scale: TensorLike) -> Tensor:
    """Compute −½·log(2π) − log scale − ½·((y − loc) / scale)².

    Args:
        y, loc, scale: Tensors of broadcastable shapes, in the units of y. `scale` is the standard deviation, > 0.
    """
    y, loc, scale = tensors(y, loc, scale)
    return -0.5 * math.log(2.0 * math.pi) - ops.log(scale) - 0.5 * ops.square((y - loc) / scale)


def laplace(y: TensorLike, loc: TensorLike, scale: TensorLike) -> Tensor:
    """Compute −log(2·scale) − |y − loc| / scale.

    Args:
        y, loc, scale: As for `normal`; the standard deviation is √2·scale.
    """
    y, loc, scale = tensors(y, loc, scale)
    return -math.log(2.0) - ops.log(scale) - ops.abs(y - loc) / scale


def student_t(y: TensorLike, df: float, loc: TensorLike, scale: TensorLike) -> Tensor:
    """Compute the log density of Student's t distribution.

    log Γ((df + 1)/2) − log Γ(df/2) − ½·log(π·df) − log scale − (df + 1)/2·log(1 + ((y − loc) / scale)² / df)

    Args:
        y, loc, scale: As for `normal`; the standard deviation is scale·√(df / (df − 2)) for df > 2, else infinite.
        df: Float > 0, the degrees of freedom. Fewer mean heavier tails; the limit ∞ is the normal distribution.
    """
    y, loc, scale = tensors(y, loc, scale)
    constant = math.lgamma(0.5 * (df + 1.0)) - math.lgamma(0.5 * df) - 0.5 * math.log(math.pi * df)
    return constant - ops.log(scale) - 0.5 * (df + 1.0) * ops.log1p(ops.square((y - loc) / scale) / df)


def normal_mixture(y: TensorLike, logits: TensorLike, loc: TensorLike, scale: TensorLike) -> Tensor:
    """Compute log Σ_k softmax(logits)_k·N(y; loc_k, scale_k²).

    Args:
        y: Tensor (B, ...).
        logits, loc, scale: Tensors (B, ..., K), of K normal distributions; `scale` > 0.
    """
    y, logits, loc, scale = tensors(y, logits, loc, scale)
    parts = normal(ops.expand_dims(y, axis=-1), loc, scale)
    return ops.logsumexp(ops.log_softmax(logits, axis=-1) + parts, axis=-1)
