"""Targets, sample weights and masks in the layout of a model's outputs."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import layers, ops


def targets(y_true: Any, y_pred: Any, what: str, size: int | None = None) -> Any:
    """Return the targets (B, ...) of outputs (B, ..., n); a last axis of 1 is added or removed as needed.

    Raises:
        ValueError: For targets of another shape than the outputs', or n other than `size`, if given.
    """
    y = aligned(y_true, y_pred.shape[:-1], ops.shape(y_pred)[:-1])
    if y is None or size not in (None, y_pred.shape[-1]):
        raise ValueError(f"Expected {what}. Received: shapes {tuple(y_true.shape)} and {tuple(y_pred.shape)}")
    return y


def outside(labels: Any, num_classes: int) -> Any:
    """Return where labels are not class numbers in [0, C)."""
    return ops.logical_or(ops.less(labels, 0), ops.greater_equal(labels, num_classes))


def aligned(y: Any, shape: Sequence[int | None], sizes: Any = None) -> Any:
    """Return `y` in the given shape, or None if it has another one.

    A last axis of 1 is added or removed as needed. Other shapes must not be broadcast: that would compare the numbers
    of one example with those of others.

    Args:
        y: Tensor.
        shape: Tuple of ints, with None for a size that is not known before the graph runs.
        sizes: The same shape with the sizes known when the graph runs, or None. If given, `y` is reshaped to it where
            `shape` leaves a size open, so that `y` of other sizes fails at run time instead of being broadcast.
    """
    if not _has_rank(y):
        return None if sizes is None else ops.reshape(y, sizes)
    if len(y.shape) == len(shape) + 1 and y.shape[-1] == 1:
        y = ops.squeeze(y, axis=-1)
    elif len(y.shape) == len(shape) - 1 and shape[-1] == 1:
        y = ops.expand_dims(y, axis=-1)
    if len(y.shape) != len(shape) or any(None not in pair and pair[0] != pair[1] for pair in zip(y.shape, shape)):
        return None
    known = sizes is None or None not in (*y.shape[1:], *shape[1:])
    return y if known else ops.reshape(y, sizes)


def weights_of(sample_weight: Any, values: Any) -> Any:
    """Reshape sample weights so that they broadcast to values (B, ...), with which they share the leading axes.

    Args:
        sample_weight: Tensor of shape (), (B,), (B, T), ..., or (..., 1). Along an axis of size 1, the weight is
            shared.
        values: Tensor (B, ...).

    Raises:
        ValueError: For another shape, or in TensorFlow, an unknown number of axes.
    """
    weight, rank = sample_weight, len(values.shape)
    if not _has_rank(weight):
        raise ValueError(
            "TensorFlow does not know the number of axes of `sample_weight`, because it differed in an earlier "
            "call. Call `compile` again, or keep the number of axes. Received: sample_weight of unknown shape"
        )
    if len(weight.shape) == rank + 1 and weight.shape[-1] == 1:
        weight = ops.squeeze(weight, axis=-1)
    pairs = zip(weight.shape, values.shape)
    if len(weight.shape) > rank or any(size not in (1, None) and other not in (size, None) for size, other in pairs):
        raise ValueError(
            f"Sample weights and masks must have the shape of the values, {tuple(values.shape)}, or of their leading "
            f"axes. Received: sample_weight or mask of shape {tuple(sample_weight.shape)}"
        )
    return ops.reshape(weight, tuple(ops.shape(weight)) + (1,) * (rank - len(weight.shape)))


def mask_of(tensor: Any) -> Any:
    """Return the mask that Keras attaches to a tensor, or None. Only a layer has public access to it."""
    if not (ops.is_tensor(tensor) or isinstance(tensor, keras.KerasTensor)):
        return None
    if keras.backend.backend() == "torch":
        return getattr(tensor, "_keras_mask", None)  # code that PyTorch compiles cannot create a layer
    found = []
    _MaskReader(found.append)(tensor)
    return found[0]


def with_mask(tensor: Any, mask: Any) -> Any:
    """Return the tensor with a mask attached as Keras does; unchanged if the mask is None."""
    return tensor if mask is None else _MaskWriter(mask)(tensor)


class _MaskReader(layers.Layer):
    def __init__(self, tell: Callable[[Any], Any]):
        super().__init__(name="mask_reader", autocast=False)
        self.supports_masking = True
        self._tell = tell

    def call(self, inputs: Any, mask: Any = None) -> Any:
        self._tell(mask)
        return inputs


class _MaskWriter(layers.Layer):
    def __init__(self, mask: Any):
        super().__init__(name="mask_writer", autocast=False)
        self.supports_masking = True
        self._mask = mask

    def call(self, inputs: Any) -> Any:
        return inputs

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> Any:
        return self._mask


def _has_rank(tensor: Any) -> bool:
    """Return whether the number of axes is known. It is not in a graph that TensorFlow traced for several ranks."""
    return getattr(tensor.shape, "rank", 0) is not None
