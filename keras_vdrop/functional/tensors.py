"""Conversion of arguments, so that functions accept tensors, NumPy arrays, and Python numbers and lists."""

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
