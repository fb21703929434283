"""Take the first rows of data, and handle data without rows, which no backend can predict."""

from typing import Any

import keras
import numpy as np
from keras import ops


def has_no_rows(inputs: Any) -> bool:
    """Return whether the inputs are arrays of 0 rows."""
    shapes = [tuple(getattr(each, "shape", ())) for each in keras.tree.flatten(inputs)]
    return bool(shapes) and all(shape[:1] == (0,) for shape in shapes)


def has_no_batch(data: Any) -> bool:
    """Return whether a data set reports that it has no batch."""
    if isinstance(data, keras.utils.PyDataset):
        return data.num_batches == 0
    cardinality = getattr(data, "cardinality", None)  # of a `tf.data.Dataset`
    return callable(cardinality) and int(cardinality()) == 0


def first_rows(data: Any, count: int) -> Any:
    """Return at most `count` inputs of arrays, or of the first batch of a data set; None if they cannot be taken."""
    is_batch = _are_arrays(data)
    batch = data if is_batch else _first_batch(data)
    if batch is None or has_no_rows(batch):
        return None
    inputs = batch if is_batch else keras.utils.unpack_x_y_sample_weight(batch)[0]
    have_rows = all(getattr(each, "shape", ()) and hasattr(each, "__getitem__") for each in keras.tree.flatten(inputs))
    return keras.tree.map_structure(lambda each: each[:count], inputs) if have_rows else None


def gives_no_rows(data: Any) -> bool:
    """Return whether a data set that can be read again has no batch, or a first batch of 0 rows."""
    if _are_arrays(data):
        return False
    first = _first_batch(data, otherwise=data)
    return first is not data and (first is None or has_no_rows(first))


def _are_arrays(data: Any) -> bool:
    return any(hasattr(each, "shape") for each in keras.tree.flatten(data))


def _first_batch(data: Any, otherwise: Any = None) -> Any:
    """Return the first batch of a data set, None if it has none, or `otherwise` if it cannot be read again."""
    try:
        batches = iter(data)
    except TypeError:
        return otherwise
    return otherwise if batches is data else next(batches, None)


def no_rows_message(x: Any) -> str:
    return f"There are no rows to evaluate. Pass data with at least one row. Received: x={x!r}"


def without_rows(found: Any) -> Any:
    return keras.tree.map_structure(lambda each: each[:0], found)


def one_row_of(inputs: Any) -> Any:
    """Return one row of zeros in the layout of inputs without rows."""

    def row(each):
        if ops.is_tensor(each):
            return ops.zeros((1, *ops.shape(each)[1:]), dtype=each.dtype)
        each = np.asarray(each)
        return np.zeros((1, *each.shape[1:]), each.dtype)

    return keras.tree.map_structure(row, inputs)
