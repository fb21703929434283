"""`compact`: a smaller model of Keras's own layers that computes the same function.

A channel is an index on the last axis of a tensor. Two things are found out about each: whether it is the same number
for every input, and whether anything needs it. How they go through a layer of a known kind, its `Rule` says. Constants
run forward, once. Needs run both ways until nothing changes; they only grow, so they end at the smallest set that is
consistent. Then weights are cut, and what constants contribute goes into the next bias.
"""

import contextlib

import keras
import numpy as np
from keras import layers, ops

from keras_vdrop.compaction.whole import shrink
from keras_vdrop.conversion import input_structure, stock_twin, to_deterministic
from keras_vdrop.posterior import posteriors, prunable_weights
from keras_vdrop.pruning import sparsity, warn_of_empty_layers


def compact(model, threshold=None, x=None):
    """A model of stock Keras layers with smaller shapes and the same predictions.

    Units, filters and channels on which nothing depends vanish, and those whose output is constant go into the next
    bias; embeddings lose dimensions, recurrent layers hidden units, and attention heads and their sizes in the same
    way. This goes through activations, pooling, padding, BatchNormalization, dropout, Flatten, Reshape, merging layers,
    wrappers, branches, shared layers and models within the model (of which each has its own copy of a layer that they
    share with others). An embedding with many words of the same row becomes two, in a Sequential model of its name:
    the first has the number of the row. Any other layer keeps its shape, and so do inputs and outputs. What is left
    unstructured stays zero in the smaller kernels.

    Args:
        model: A built Functional or Sequential model of our layers, or of Keras's with zeros in their kernels. It stays
            as it is.
        threshold: As for `sparsity`: weights whose log alpha is above it are zero in the result.
        x: Arrays, as `model` takes them, on the first 256 rows of which the two are compared, besides made-up ones.

    Returns:
        A model of the same kind, not compiled, whose layers `to_deterministic` has named.

    Raises:
        ValueError: As `to_deterministic`; and where no made-up inputs will do and `x` is None.
        RuntimeError: If the two do not predict the same, to 1e-5 of the largest output (with layers that compute in
            float16 to 1e-2, in bfloat16 to 5e-2).

    Example:
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


def _compare(large, small, inputs):
    """Raise a `RuntimeError` unless both models predict the same."""
    tolerance = max(_TOLERANCE.get(layer.compute_dtype, 1e-5) for layer in large._flatten_layers())
    for x in inputs:
        with _forgetting(large), _forgetting(small):
            pairs = zip(*(keras.tree.flatten(model(x, training=False)) for model in (large, small)))
            for expected, found in ((_floats(expected), _floats(found)) for expected, found in pairs):
                both_nan = np.isnan(expected) & np.isnan(found)
                error = np.max(np.where(both_nan, 0.0, np.abs(expected - found)), initial=0.0)
                largest = np.max(np.abs(expected), initial=1e-3, where=~np.isnan(expected))
                if not error <= tolerance * largest:
                    raise RuntimeError(
                        f"The smaller model does not predict what {large.name!r} does: outputs of up to {largest:.3g} "
                        f"differ by {error:.3g}. It was dropped. Where large numbers cancel, as with inputs that are "
                        "not scaled, that is rounding: scale them. Else please report it as a fault of `compact`."
                    )


def _floats(tensor):
    return ops.convert_to_numpy(ops.cast(tensor, "float32")).astype("float64")


@contextlib.contextmanager
def _forgetting(model):
    """Recurrent layers that keep their state begin without one, and have their own again afterwards."""
    keeping = [layer for layer in model._flatten_layers() if isinstance(layer, layers.RNN) and layer.stateful]
    states = [state for layer in keeping for state in keras.tree.flatten(layer.states)]
    before = [ops.convert_to_numpy(state) for state in states]
    for layer in keeping:
        layer.reset_state()
    try:
        yield
    finally:
        for state, value in zip(states, before):
            state.assign(value)


def _inputs(model, x):
    """On which models are compared: the first rows of `x`, and made-up ones where the model can take them."""
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
            f"The model {model.name!r} does not run on made-up inputs ({type(failure).__name__}: {failure}). Pass "
            "`x=`, real ones on which to compare."
        ) from failure
    return given


def _made_up_inputs(model, length, examples=4):
    """Normal numbers, or indices into the smallest table; `length` where the model leaves the size open."""
    rng = np.random.default_rng(0)
    tables = [layer.input_dim for layer in model._flatten_layers() if isinstance(layer, layers.Embedding)]

    def made_up(x):
        shape = [examples if x.shape[0] is None else x.shape[0]]
        shape += [length if size is None else size for size in x.shape[1:]]
        whole = rng.integers(0, 2 if x.dtype == "bool" else min(tables, default=2), shape)
        values = rng.normal(size=shape) if "float" in x.dtype else whole
        return ops.convert_to_tensor(values, x.dtype)

    return keras.tree.map_structure(made_up, input_structure(model))
