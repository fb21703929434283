"""Which weights carry signal: log alpha, masks and counts."""

from keras import ops

# About the least normal float32, so that log alpha of a weight that is exactly 0 stays finite.
_SMALLEST_SQUARE = 1e-37


def log_alpha(loc, log_variance, group_axis=None):
    """log alpha = log_variance − log(loc²), the log of the noise-to-signal ratio; large means dispensable.

    Of a group of weights it is log(Σ variance / Σ loc²).

    Args:
        loc: Tensor, the posterior mean.
        log_variance: Tensor of the same shape, the logarithm of the posterior variance.
        group_axis: Int for one group for each index along that axis, or None for every weight by itself.

    Returns:
        Tensor of the same shape, not clipped; where `loc` is 0, large and finite.
    """
    square = ops.square(loc)
    if group_axis is not None:
        axes = other_axes(loc, group_axis)
        group_variance = ops.logsumexp(log_variance, axis=axes, keepdims=True)
        log_variance = ops.broadcast_to(group_variance, ops.shape(loc))
        square = ops.sum(square, axis=axes, keepdims=True)
    return log_variance - ops.log(ops.maximum(square, _SMALLEST_SQUARE))


def other_axes(tensor, axis):
    """All axes of a tensor but one, as a tuple."""
    rank = len(tensor.shape)
    if not -rank <= axis < rank:
        raise ValueError(
            f"A weight of shape {tuple(tensor.shape)} has no axis {axis} for groups. Received: group_axis={axis}"
        )
    return tuple(other for other in range(rank) if other != axis % rank)


def keep_mask(loc, log_variance, threshold=3.0, group_axis=None):
    """True where log alpha ≤ threshold and `loc` is not 0: the weights that are worth keeping.

    At the customary threshold of 3 a dropped weight is at least 95 % noise: alpha ≥ 20.

    Args:
        loc: Tensor, the posterior mean.
        log_variance: Tensor of the same shape, the logarithm of the posterior variance.
        threshold: Float, in units of log alpha.
        group_axis: As for `log_alpha`: a group is kept or dropped as a whole.

    Returns:
        Boolean tensor of the same shape.
    """
    return ops.logical_and(ops.not_equal(loc, 0.0), log_alpha(loc, log_variance, group_axis) <= threshold)


def count(mask):
    """The number of True entries of a mask, as an int."""
    return int(ops.sum(ops.cast(mask, "int32")))
