"""Statistics of BatchNormalization for a network that predicts without the noise of its training."""

import contextlib
import functools
import operator
from collections.abc import Iterator
from typing import Any

import keras

from keras_vdrop.checks import check_positive_int
from keras_vdrop.posterior import owners, posteriors


def update_batch_normalization(model: keras.Model, x: Any, batch_size: int = 128) -> keras.Model:
    """Set the statistics of every BatchNormalization to those of the given inputs without noise, and return the model.

    In `fit`, the moving variance of an activation includes the variance of the noise. `predict` adds no noise, so it
    divides by too large a number. Call this function after `fit`, or on the result of `compact` or `to_deterministic`.
    `MonteCarlo` needs no such call: its draws contain the noise that the statistics of `fit` include.

    Noise and dropout are off. A layer whose inputs come from another BatchNormalization sees them normalized by the
    statistics of the batch. Over several batches or calls of a layer, means and variances are averaged, weighted by
    their rows. A layer that is frozen (`trainable=False`) keeps its statistics.

    Args:
        model: A built Keras model, variational or not. It is changed in place.
        x: Inputs as in training, augmented if they were: an array of shape (rows, ...), a dict, list or tuple of such
            arrays, or an iterable of batches (a dataset or `DataLoader`), each of them inputs or, as in `fit`, a tuple
            or list (inputs, targets, ...). A few thousand rows are enough.
        batch_size: Int, for arrays.

    Raises:
        ValueError: If there are no rows, if arrays differ in their number of rows, or if the model is a `MonteCarlo`.

    Examples:
        >>> import keras, keras_vdrop as kv, numpy as np
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.BatchNormalization()])
        >>> model = kv.update_batch_normalization(model, np.array([[0.0], [4.0]]))
        >>> float(model.layers[-1].moving_mean[0]), float(model.layers[-1].moving_variance[0])
        (2.0, 4.0)

    Reference:
        Li et al., 2018, https://arxiv.org/abs/1801.05134 (noise shifts the variance); Izmailov et al., 2018,
        https://arxiv.org/abs/1803.05407, section 3 (one pass after training)
    """
    check_positive_int("batch_size", batch_size)
    if hasattr(model, "consistent") and isinstance(getattr(model, "model", None), keras.Model):  # a `MonteCarlo`
        raise ValueError(f"A {type(model).__name__} draws weights. Pass its `.model`, which predicts without noise.")
    layers = [each for each in model._flatten_layers() if _is_normalization(each)]
    seen = 0
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_collecting(layer))
        for batch in _batches(x, batch_size):
            model(batch, training=False)
            seen += len(keras.tree.flatten(batch)[0])
    if not seen:
        raise ValueError("`x` must have at least one row. Received: 0 rows")
    return model


def normalizations_of_noise(model: keras.Model) -> list[str]:
    """Return the names of BatchNormalizations that are not frozen and come after a posterior in the model's layers."""
    noisy_layers = set(map(id, owners(posteriors(model))))
    names, noisy = [], False
    for layer in model._flatten_layers():
        noisy |= id(layer) in noisy_layers
        if noisy and _is_normalization(layer) and layer.trainable:
            names.append(layer.name)
    return names


def _is_normalization(layer: keras.layers.Layer) -> bool:
    return isinstance(layer, keras.layers.BatchNormalization)


@contextlib.contextmanager
def _collecting(layer: keras.layers.Layer) -> Iterator[None]:
    """Let the layer set its statistics to the average over its calls, although the model is not training."""
    momenta, call, seen = _momenta(layer), layer.call, 0

    @functools.wraps(call)
    def call_in_training(inputs, *args, **kwargs):
        nonlocal seen
        rows = len(inputs)
        for name in momenta:
            setattr(layer, name, seen / max(seen + rows, 1))
        seen += rows
        return call(inputs, *args, **{**kwargs, "training": True})

    layer.call = call_in_training
    try:
        yield
    finally:
        del layer.call
        for name, momentum in momenta.items():
            setattr(layer, name, momentum)


def _momenta(layer: keras.layers.Layer) -> dict[str, float]:
    """Return {name: momentum} of the layer's moving averages. Renormalization, where Keras has it, has its own."""
    return {name: getattr(layer, name) for name in ("momentum", "renorm_momentum") if hasattr(layer, name)}


def _batches(x: Any, batch_size: int) -> Iterator[Any]:
    """Yield the batches of arrays, or the inputs of an iterable of batches."""
    if not (isinstance(x, (dict, list, tuple)) or hasattr(x, "shape")):
        yield from (keras.utils.unpack_x_y_sample_weight(batch)[0] for batch in x)
        return
    x = keras.tree.map_structure(keras.ops.convert_to_numpy, x)
    rows = {len(each) for each in keras.tree.flatten(x)}
    if len(rows) > 1:
        raise ValueError(f"The arrays in `x` must have the same number of rows. Received: {sorted(rows)} rows")
    for begin in range(0, max(rows, default=0), batch_size):
        of_batch = slice(begin, begin + batch_size)
        yield keras.tree.map_structure(operator.itemgetter(of_batch), x)
