"""Inputs and data sets without rows, of which no backend can draw."""

import keras
import numpy as np
from keras import ops


def has_no_rows(inputs):
    """Return whether the inputs are arrays of 0 rows."""
    shapes = [tuple(getattr(each, "shape", ())) for each in keras.tree.flatten(inputs)]
    return bool(shapes) and all(shape[:1] == (0,) for shape in shapes)


def has_no_batch(data):
    """Return whether a data set reports that it has no batch."""
    if isinstance(data, keras.utils.PyDataset):
        return data.num_batches == 0
    cardinality = getattr(data, "cardinality", None)  # of a `tf.data.Dataset`
    return callable(cardinality) and int(cardinality()) == 0


def gives_no_rows(data):
    """Return whether a data set that can be read again has no batch, or a first batch of 0 rows."""
    if any(hasattr(each, "shape") for each in keras.tree.flatten(data)):
        return False
    try:
        batches = iter(data)
    except TypeError:
        return False
    if batches is data:  # a generator, for which Keras raises a clear error itself
        return False
    first = next(batches, None)
    return first is None or has_no_rows(first)


def nothing_to_evaluate(x):
    return f"There are no rows to evaluate. Pass data with at least one row. Received: x={x!r}"


def without_rows(found):
    return keras.tree.map_structure(lambda each: each[:0], found)


def one_row_of(inputs):
    """Return one row of zeros in the layout of inputs without rows."""

    def row(each):
        if ops.is_tensor(each):
            return ops.zeros((1, *ops.shape(each)[1:]), dtype=each.dtype)
        each = np.asarray(each)
        return np.zeros((1, *each.shape[1:]), each.dtype)

    return keras.tree.map_structure(row, inputs)
