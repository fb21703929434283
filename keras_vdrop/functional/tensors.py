"""Conversion of arguments to tensors, and small questions about tensors, arrays and shapes."""

import math
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
from keras import ops

# Keras is not annotated, so to a type checker these are anything. They tell a reader what is meant.
Tensor = Any  # a tensor of the backend
TensorLike = Any  # a tensor, or what becomes one: an array, a number, lists of numbers
DType = Any  # the name of a dtype, such as "float32", or a dtype of the backend


def tensors(*values: TensorLike, least: str | None = None) -> tuple[Tensor, ...]:
    """Convert values to tensors of one floating dtype: the widest among them, or `floatx` if all are ints.

    Args:
        *values: Tensors, arrays, or numbers and lists of numbers.
        least: The narrowest dtype of the result, such as "float32", or None.
    """
    converted: list[Any] = [ops.convert_to_tensor(value) for value in values]
    dtypes = {keras.backend.standardize_dtype(value.dtype) for value in converted}
    dtype = keras.backend.result_type(*dtypes, float, *([] if least is None else [least]))
    return tuple(ops.cast(value, dtype) for value in converted)


def to_numpy(x: Tensor) -> np.ndarray:
    """Return the values of a tensor or a variable."""
    return np.asarray(ops.convert_to_numpy(x))


def is_float(x: Tensor) -> bool:
    """Return whether a tensor has a floating dtype."""
    return keras.backend.is_float_dtype(x.dtype)


def channel_axis(layer: keras.layers.Layer) -> int:
    """Return the axis of the channels in the inputs and outputs of a layer."""
    return 1 if getattr(layer, "data_format", None) == "channels_first" else -1


def equal_parts(x: Tensor, count: int) -> Any:
    """Split a tensor into a number of equal parts along its last axis."""
    return ops.split(x, count, axis=-1)


def left_along(kept: np.ndarray, axes: Iterable[int]) -> tuple[int, int]:
    """Return, for the indices along some axes of a boolean array, (number with any True, number of all)."""
    axes = {axis % kept.ndim for axis in axes}
    left = kept.any(axis=tuple(axis for axis in range(kept.ndim) if axis not in axes))
    return int(left.sum()), left.size


def product(sizes: Iterable[int | None]) -> int | None:
    """Multiply sizes, of which some may be None: 0 if any is 0, else None if any is None; 1 if there are none."""
    sizes = list(sizes)
    known = [size for size in sizes if size is not None]
    return 0 if 0 in known else math.prod(known) if len(known) == len(sizes) else None
