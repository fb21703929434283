"""Which weights carry signal: log alpha and masks."""

from keras import ops

from keras_vdrop.functional.tensors import tensors

# About the least normal float32, so that log alpha of a weight that is exactly 0 stays finite.
_SMALLEST_SQUARE = 1e-37


def log_alpha(loc, log_variance, group_axis=None, blocks=1):
    """log alpha = log_variance − log(loc²), the log of the noise-to-signal ratio; large means dispensable.

    Of a group of weights it is log(Σ variance / Σ loc²).

    Args:
        loc: Tensor, the posterior mean.
        log_variance: Tensor of the same shape, the logarithm of the posterior variance.
        group_axis: Int for one group for each index along that axis, or None for every weight by itself.
        blocks: Positive int: the axis is that many blocks side by side, as are the gates of a recurrent kernel, and a
            group is an index within all of them.

    Returns:
        Tensor of the same shape, not clipped; where `loc` is 0, large and finite.
    """
    loc, log_variance = tensors(loc, log_variance, least="float32")
    square = ops.square(loc)
    if group_axis is not None:
        log_variance = over_groups(ops.logsumexp, log_variance, group_axis, blocks)
        square = over_groups(ops.sum, square, group_axis, blocks)
    return log_variance - ops.log(ops.maximum(square, _SMALLEST_SQUARE))


def check_groups(shape, group_axis=None, blocks=1):
    """Raise a `ValueError` unless a weight of that shape has those groups."""
    shape, rank = tuple(shape), len(shape)
    if group_axis is None:
        return
    if not -rank <= group_axis < rank:
        raise ValueError(f"A weight of shape {shape} has no axis {group_axis}. Received: group_axis={group_axis}")
    if shape[group_axis] % blocks:
        raise ValueError(f"Axis {group_axis} of a weight of shape {shape} is not {blocks} blocks. Received: {blocks=}")


def over_groups(reduce, tensor, group_axis, blocks=1):
    """`reduce(tensor, axis, keepdims)` over each group, in the place of each of its members."""
    (tensor,) = tensors(tensor)
    shape, rank = tuple(tensor.shape), len(tensor.shape)
    check_groups(shape, group_axis, blocks)
    axis = group_axis % rank
    split = (*shape[:axis], blocks, shape[axis] // blocks, *shape[axis + 1 :])
    others = tuple(other for other in range(rank + 1) if other != axis + 1)
    reduced = reduce(ops.reshape(tensor, split), axis=others, keepdims=True)
    return ops.reshape(ops.broadcast_to(reduced, split), shape)


def keep_mask(loc, log_variance, threshold=3.0, group_axis=None, blocks=1):
    """True where log alpha ≤ threshold and `loc` is not 0: the weights that are worth keeping.

    At the customary threshold of 3 a dropped weight is at least 95 % noise: alpha ≥ 20.

    Args:
        loc: Tensor, the posterior mean.
        log_variance: Tensor of the same shape, the logarithm of the posterior variance.
        threshold: Float, in units of log alpha.
        group_axis, blocks: As for `log_alpha`: a group is kept or dropped as a whole.

    Returns:
        Boolean tensor of the same shape.
    """
    loc, log_variance = tensors(loc, log_variance, least="float32")
    return ops.logical_and(ops.not_equal(loc, 0.0), log_alpha(loc, log_variance, group_axis, blocks) <= threshold)
