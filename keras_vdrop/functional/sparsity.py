"""Log alpha, which measures how much signal a weight carries, and masks of the kept weights."""

from collections.abc import Callable, Sequence

from keras import ops

from keras_vdrop.functional.tensors import Tensor, TensorLike, tensors

# Near the least normal float32; keeps log alpha finite for a weight that is exactly 0.
_SMALLEST_SQUARE = 1e-37

__all__ = ["keep_mask", "log_alpha"]


def log_alpha(
    loc: TensorLike,
    log_variance: TensorLike,
    group_axis: int | None = None,
    blocks: int = 1,
) -> Tensor:
    """Compute log alpha = log_variance − log(loc²), the log noise-to-signal ratio.

    A weight with a large log alpha is dispensable. For a group of weights it is log(Σ variance / Σ loc²).

    Args:
        loc: Tensor, the posterior mean.
        log_variance: Tensor that broadcasts to that shape, the logarithm of the posterior variance.
        group_axis: Int, an axis of which each index forms a group, or None to treat every weight separately.
        blocks: Positive int, the number of equal blocks that make up the axis, such as the gates of a recurrent kernel.
            A group takes the weights at one index of every block.

    Returns:
        Tensor of the same shape, not clipped. Where `loc` is 0, it is large but finite.

    Raises:
        ValueError: If the weight has no axis `group_axis`, or the axis cannot be divided into `blocks` equal blocks.

    Examples:
        >>> from keras_vdrop.functional import sparsity
        >>> [round(float(each), 3) for each in sparsity.log_alpha([1.0, 0.1], [0.0, 0.0])]  # 0 and log 100
        [0.0, 4.605]

    Reference:
        Variational Dropout Sparsifies Deep Neural Networks, Molchanov, Ashukha, Vetrov, 2017,
        https://arxiv.org/abs/1701.05369
    """
    loc, log_variance = tensors(loc, log_variance, least="float32")
    square = ops.square(loc)
    if group_axis is not None:
        log_variance = ops.broadcast_to(log_variance, ops.shape(loc))
        log_variance = over_groups(ops.logsumexp, log_variance, group_axis, blocks)
        square = over_groups(ops.sum, square, group_axis, blocks)
    return log_variance - ops.log(ops.maximum(square, _SMALLEST_SQUARE))


def check_groups(shape: Sequence[int], group_axis: int | None = None, blocks: int = 1) -> None:
    """Raise a `ValueError` unless a weight of the given shape can be split into these groups."""
    shape, rank = tuple(shape), len(shape)
    if group_axis is None:
        return
    if not -rank <= group_axis < rank:
        raise ValueError(f"A weight of shape {shape} has no axis {group_axis}. Received: group_axis={group_axis}")
    if shape[group_axis] % blocks:
        raise ValueError(
            f"Axis {group_axis} of a weight of shape {shape} cannot be divided into {blocks} equal blocks. "
            f"Received: {blocks=}"
        )


def over_groups(reduce: Callable[..., Tensor], tensor: TensorLike, group_axis: int, blocks: int = 1) -> Tensor:
    """Apply `reduce(tensor, axis, keepdims)` to each group and broadcast the result to all members of the group."""
    (tensor,) = tensors(tensor)
    shape, rank = tuple(tensor.shape), len(tensor.shape)
    check_groups(shape, group_axis, blocks)
    axis = group_axis % rank
    split = (*shape[:axis], blocks, shape[axis] // blocks, *shape[axis + 1 :])
    others = tuple(other for other in range(rank + 1) if other != axis + 1)
    reduced = reduce(ops.reshape(tensor, split), axis=others, keepdims=True)
    return ops.reshape(ops.broadcast_to(reduced, split), shape)


def keep_mask(
    loc: TensorLike,
    log_variance: TensorLike,
    threshold: float = 3.0,
    group_axis: int | None = None,
    blocks: int = 1,
) -> Tensor:
    """Return a mask of the weights worth keeping: True where log alpha ≤ threshold and `loc` is not 0.

    At the customary threshold of 3, alpha of a pruned weight is at least 20: the weight is at least 95 % noise.

    Args:
        loc: Tensor, the posterior mean.
        log_variance: Tensor of the same shape, the logarithm of the posterior variance.
        threshold: Float, in units of log alpha.
        group_axis, blocks: As for `log_alpha`. The log alpha of a group decides for all of its weights that are not 0.

    Returns:
        Boolean tensor of the same shape.

    Raises:
        ValueError: If the weight has no axis `group_axis`, or the axis cannot be divided into `blocks` equal blocks.

    Examples:
        >>> from keras import ops
        >>> from keras_vdrop.functional import sparsity
        >>> ops.convert_to_numpy(sparsity.keep_mask([1.0, 0.1, 0.0], [0.0, 0.0, 0.0])).tolist()
        [True, False, False]

    Reference:
        As for `log_alpha`
    """
    loc, log_variance = tensors(loc, log_variance, least="float32")
    return ops.logical_and(ops.not_equal(loc, 0.0), log_alpha(loc, log_variance, group_axis, blocks) <= threshold)
