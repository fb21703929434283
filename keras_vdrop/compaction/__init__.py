"""`compact`: a smaller model of Keras's own layers that computes the same function.

A channel is an index on the last axis of a tensor. For each channel, the algorithm determines whether it is the same
number for every input, and whether anything needs it. The `Rule` of a layer says how both pass through it. Constants
are propagated forward, once. Needs are propagated both ways until nothing changes; they only grow, so the result is
the smallest consistent set. Then the weights are cut, and the next bias absorbs what constant channels contribute.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from keras_vdrop.compaction.propagation import shrink
from keras_vdrop.conversion import input_structure, stock_twin, to_deterministic
from keras_vdrop.functional.precision import full_precision
from keras_vdrop.functional.tensors import to_numpy
from keras_vdrop.posterior import posteriors, prunable_weights
from keras_vdrop.pruning import sparsity, warn_of_empty_layers


def compact(model: keras.Model, threshold: float | None = None, x: Any = None) -> keras.Model:
    """Return a model of Keras's own layers with smaller shapes and the same predictions.

    Units, filters and channels on which nothing depends are removed, and those with a constant output are folded into
    the next bias. In the same way, embeddings lose columns, recurrent layers hidden units, and attention layers heads
    and key and value dimensions. This works through activations, pooling, padding, BatchNormalization, dropout,
    Flatten, Reshape, merging layers, wrappers, branches, shared layers and models within the model (each gets its own
    copy of a layer that it shares with another model). An embedding in which many words have equal rows becomes a
    Sequential model of the same name with two embeddings: the first maps a word to the index of its row. Every other
    layer keeps its shape, and so do inputs and outputs. Zeros that do not fill a whole unit stay in the smaller
    kernels.

    Args:
        model: A built Functional or Sequential model of our layers, or of Keras's with zeros in their kernels. It does
            not change.
        threshold: As for `sparsity`: weights whose log alpha is above it are zero in the result.
        x: Arrays in the structure that `model` takes. The predictions of both models are compared on the first 256
            rows, and on generated inputs.

    Returns:
        A model of the same kind, not compiled, with the layer names that `to_deterministic` gives.

    Raises:
        ValueError: As `to_deterministic`; and if the model does not run on generated inputs and `x` is None.
        RuntimeError: If the predictions differ by more than 1e-5 of the largest output (1e-2 with layers that compute
            in float16, 5e-2 in bfloat16).

    Examples:
        >>> import keras, keras_vdrop as kv
        >>> model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(8), kv.VariationalDense(2)])
        >>> noisy = model.layers[0].kernel.log_variance
        >>> _ = noisy.assign(keras.ops.concatenate([noisy[:, :2] - 20.0, noisy[:, 2:] + 30.0], axis=1))
        >>> kv.compact(model).layers[0].units
        2

    Reference:
        Group Sparse Regularization for Deep Neural Networks, Scardapane et al., 2017, https://arxiv.org/abs/1607.00485
    """
    if posteriors(model) and prunable_weights(model):
        warn_of_empty_layers(sparsity(model, threshold))

    def value(weight):
        mean = weight.mean()
        return ops.where(weight.keep_mask(threshold), mean, 0.0) if weight.prunable else mean

    exact, inputs = to_deterministic(model), _inputs(model, x)
    _compare(model, exact, inputs)
    large = stock_twin(model, value)
    small = shrink(large)
    _compare(large, small, inputs)
    return small


_TOLERANCE = {"float16": 1e-2, "bfloat16": 5e-2}
_ROWS = 256


def _compare(large: keras.Model, small: keras.Model, inputs: Iterable[Any]) -> None:
    """Raise a `RuntimeError` unless both models predict the same on all inputs."""
    tolerance = max(_TOLERANCE.get(layer.compute_dtype, 1e-5) for layer in large._flatten_layers())
    for x in inputs:
        with full_precision(), _forgetting(large), _forgetting(small):
            pairs = zip(*(keras.tree.flatten(model(x, training=False)) for model in (large, small)))
            for expected, found in ((_floats(expected), _floats(found)) for expected, found in pairs):
                both_nan = np.isnan(expected) & np.isnan(found)
                error = np.max(np.where(both_nan, 0.0, np.abs(expected - found)), initial=0.0)
                largest = np.max(np.abs(expected), initial=1e-3, where=~np.isnan(expected))
                if not error <= tolerance * largest:
                    raise RuntimeError(
                        f"The smaller model does not predict the same as {large.name!r}: outputs of up to "
                        f"{largest:.3g} differ by {error:.3g}. The smaller model is discarded. If the inputs are not "
                        "scaled, large numbers may cancel and leave rounding errors: scale the inputs. Otherwise, "
                        "report this as a bug in `compact`."
                    )


def _floats(tensor: Any) -> np.ndarray:
    return to_numpy(ops.cast(tensor, "float32")).astype("float64")


@contextlib.contextmanager
def _forgetting(model: keras.Model) -> Iterator[None]:
    """Reset the states of stateful recurrent layers, and restore them afterwards."""
    keeping = [layer for layer in model._flatten_layers() if isinstance(layer, layers.RNN) and layer.stateful]
    states = [state for layer in keeping for state in keras.tree.flatten(layer.states)]
    before = [to_numpy(state) for state in states]
    for layer in keeping:
        layer.reset_state()
    try:
        yield
    finally:
        for state, value in zip(states, before):
            state.assign(value)


def _inputs(model: keras.Model, x: Any) -> list[Any]:
    """Return the inputs for the comparison: the first rows of `x`, and generated ones if the model runs on them."""
    given = [] if x is None else [keras.tree.map_structure(lambda each: ops.convert_to_tensor(each[:_ROWS]), x)]
    for length in (8, 64):
        try:
            made_up = _made_up_inputs(model, length)
            with _forgetting(model):
                model(made_up, training=False)
        except Exception as error:
            failure = error
        else:
            return [made_up, *given]
    if not given:
        raise ValueError(
            f"The model {model.name!r} does not run on generated inputs ({type(failure).__name__}: {failure}). Pass "
            "real inputs as `x`, on which both models are compared."
        ) from failure
    return given


def _made_up_inputs(model: keras.Model, length: int, examples: int = 4) -> Any:
    """Generate normal numbers, or indices into the smallest table; `length` replaces every unknown size."""
    rng = np.random.default_rng(0)
    tables = [layer.input_dim for layer in model._flatten_layers() if isinstance(layer, layers.Embedding)]

    def made_up(x):
        shape = [examples if x.shape[0] is None else x.shape[0]]
        shape += [length if size is None else size for size in x.shape[1:]]
        whole = rng.integers(0, 2 if x.dtype == "bool" else min(tables, default=2), shape)
        values = rng.normal(size=shape) if "float" in x.dtype else whole
        return ops.convert_to_tensor(values, x.dtype)

    return keras.tree.map_structure(made_up, input_structure(model))
