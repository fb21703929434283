"""Reading the files that commands are given."""

import os
from typing import Any

import keras
import numpy as np


def load_model(path: str | os.PathLike) -> Any:
    """Load a saved model without its optimizer.

    Raises:
        OSError: If the file is not a model or is damaged.
    """
    try:
        return keras.saving.load_model(path, compile=False)
    except Exception as error:  # a damaged file may raise any exception
        raise OSError(f"Cannot load {path} as a model: {type(error).__name__}: {error}") from error


def load_inputs(path: str | os.PathLike, model: Any) -> Any:
    """Load the inputs of a model from an .npz file.

    Returns:
        The file's array if there is one, else the list of its arrays in the order of their names.

    Raises:
        OSError: If the file is damaged.
        ValueError: If it does not hold one array for each input, where the number of inputs is known.
    """
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in sorted(file.files)}
    except Exception as error:  # a damaged file may raise any exception
        raise OSError(f"Cannot read {path}: {type(error).__name__}: {error}") from error
    inputs = getattr(getattr(model, "layer", model), "inputs", None)  # those of the model in a `Variational`
    count = len(arrays) if inputs is None else len(inputs)
    if len(arrays) != count:
        raise ValueError(
            f"The model needs one array for each input: {count}. Received: {path} with {', '.join(arrays)}"
        )
    x = list(arrays.values())
    return x[0] if count == 1 else x
