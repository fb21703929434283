"""Which weights carry signal: log alpha, masks and counts."""

from keras import ops

# About the least normal float32, so that log alpha of a weight that is exactly 0 stays finite.
_SMALLEST_SQUARE = 1e-37


def log_alpha(loc, log_variance):
    """log alpha = log_variance − log(loc²), the log of the noise-to-signal ratio; large means dispensable.

    Args:
        loc: Tensor, the posterior mean.
        log_variance: Tensor of the same shape, the logarithm of the posterior variance.

    Returns:
        Tensor of the same shape, not clipped; where `loc` is 0, large and finite.
    """
    return log_variance - ops.log(ops.maximum(ops.square(loc), _SMALLEST_SQUARE))


def keep_mask(loc, log_variance, threshold=3.0):
    """True where log alpha ≤ threshold and `loc` is not 0: the weights that are worth keeping.

    At the customary threshold of 3 a dropped weight is at least 95 % noise: alpha ≥ 20.

    Args:
        loc: Tensor, the posterior mean.
        log_variance: Tensor of the same shape, the logarithm of the posterior variance.
        threshold: Float, in units of log alpha.

    Returns:
        Boolean tensor of the same shape.
    """
    return ops.logical_and(ops.not_equal(loc, 0.0), log_alpha(loc, log_variance) <= threshold)


def count(mask):
    """The number of True entries of a mask, as an int."""
    return int(ops.sum(ops.cast(mask, "int32")))
