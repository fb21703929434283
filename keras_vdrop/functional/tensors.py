"""What the functions on tensors take: tensors, NumPy arrays and Python's numbers and lists alike."""

import keras
from keras import ops


def tensors(*values, least=None):
    """Those values as tensors of one floating type: the widest among them, float32 where all are whole numbers.

    Args:
        *values: Tensors, arrays, or numbers and lists of numbers.
        least: The narrowest type that will do, such as "float32", or None.
    """
    values = [ops.convert_to_tensor(value) for value in values]
    dtypes = {keras.backend.standardize_dtype(value.dtype) for value in values}
    dtype = keras.backend.result_type(*dtypes, float, *([] if least is None else [least]))
    return tuple(ops.cast(value, dtype) for value in values)
