"""Conversion of arguments to tensors, and small questions about tensors, arrays and shapes."""

import math

import keras
from keras import ops


def tensors(*values, least=None):
    """Convert values to tensors of one floating dtype: the widest among them, or `floatx` if all are ints.

    Args:
        *values: Tensors, arrays, or numbers and lists of numbers.
        least: The narrowest dtype of the result, such as "float32", or None.
    """
    values = [ops.convert_to_tensor(value) for value in values]
    dtypes = {keras.backend.standardize_dtype(value.dtype) for value in values}
    dtype = keras.backend.result_type(*dtypes, float, *([] if least is None else [least]))
    return tuple(ops.cast(value, dtype) for value in values)


def is_float(x):
    """Return whether a tensor has a floating dtype."""
    return keras.backend.is_float_dtype(x.dtype)


def left_along(kept, axes):
    """Return, for the indices along some axes of a boolean array, (number with any True, number of all)."""
    axes = {axis % kept.ndim for axis in axes}
    left = kept.any(axis=tuple(axis for axis in range(kept.ndim) if axis not in axes))
    return int(left.sum()), left.size


def product(sizes):
    """Multiply sizes, of which some may be None: 0 if any is 0, else None if any is None; 1 if there are none."""
    sizes = list(sizes)
    return 0 if 0 in sizes else None if None in sizes else math.prod(sizes)
