"""Graphs, which are Functional and Sequential models, and copies of them with other layers."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import layers


def is_graph(model: Any) -> bool:
    """Return whether a model is a graph, Functional or Sequential: Keras knows how its layers are connected."""
    return _graph_class(model) is not None


def is_plain_graph(model: Any) -> bool:
    """Return whether a model is a graph and does not override `call`, which could connect the layers differently."""
    base = _graph_class(model)
    return base is not None and type(model).call is base.call


def _graph_class(model: Any) -> Any:
    return next((cls for cls in type(model).__mro__ if cls.__name__ in ("Functional", "Sequential")), None)


def children(layer: keras.layers.Layer) -> list[Any]:
    """Return the direct sublayers of a layer, in the order in which they were assigned."""
    return layer._flatten_layers(include_self=False, recursive=False)


def serialized(layer: keras.layers.Layer) -> Any:
    """Return the dict to which Keras serializes a layer."""
    with _without_warnings():
        return keras.saving.serialize_keras_object(layer)


def config_of(layer: Any) -> dict[str, Any]:
    """Return the config of a layer without warnings."""
    with _without_warnings():
        return layer.get_config()


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Suppress warnings, such as that about a serialized lambda: the config does not leave this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def graph_copy(model: Any, make: Callable[[Any], Any]) -> tuple[keras.Model, dict[int, Any]]:
    """Copy a model's graph with other layers. The copy is not compiled.

    Args:
        model: A built Functional or Sequential model.
        make: Function from a layer or another operation to its replacement. It is called at every depth of nested
            models.

    Returns:
        The copy, with freshly initialized weights; and a dict from the ids of the layers and models to their
        replacements.

    Raises:
        ValueError: For a model, or a model within it, whose copy would lose its own `call`.
    """
    made, inputs = {}, {}

    def again(operation):
        if id(operation) not in made:
            made[id(operation)] = copy(operation) if is_graph(operation) else make(operation)
        return made[id(operation)]

    def copy(graph):
        new = keras.models.clone_model(graph, _same_inputs(graph, inputs), clone_function=again)
        if type(new) is not type(graph) and not is_plain_graph(graph):
            raise ValueError(
                f"{graph.name!r}, a {type(graph).__name__}, overrides `call`, and its constructor does not take inputs "
                "and outputs. A copy would lose both. Convert its parts separately, or write it as a layer."
            )
        if not new.built:
            new.build(graph.input_shape)
        return new

    with _not_compiled(model), known_layers(model):
        return again(model), made


def model_copy(model: keras.Model) -> Any:
    """Return a model of the same class and arguments, not compiled, and built if Keras can build it."""
    config = {name: value for name, value in serialized(model).items() if name != "compile_config"}
    with _without_warnings():  # `check_built` reports a model that cannot be built
        return keras.saving.deserialize_keras_object(config, safe_mode=False)


def check_built(copy: keras.Model, model: keras.Model) -> None:
    """Raise a `ValueError` if the copy of a model has no weights yet."""
    if not copy.built:
        raise ValueError(
            f"Keras cannot build a copy of {model.name!r}, a {type(model).__name__}. Create one yourself: call a new "
            "model on some data, and copy the weights to it with `set_weights`."
        )


def known_layers(model: keras.layers.Layer) -> contextlib.AbstractContextManager[Any]:
    """Return a scope in which Keras finds the classes of the model's layers by name, registered or not."""
    types = [type(layer) for layer in model._flatten_layers()]
    return keras.saving.custom_object_scope(
        {cls.__name__: cls for cls in types if not cls.__module__.startswith("keras.")}
    )


def input_structure(model: Any) -> Any:
    """Return the symbolic inputs in the structure that the model takes: one tensor, a list or a dict."""
    return model.inputs[0] if isinstance(model, keras.Sequential) else model.input


def check_lookup(layer: keras.layers.Layer) -> None:
    """Raise a `ValueError` for a lookup layer: neither its arguments nor its weights hold the learned vocabulary."""
    if isinstance(layer, (layers.IntegerLookup, layers.StringLookup, layers.TextVectorization)):
        raise ValueError(
            f"The vocabulary of {layer.name!r} is neither in its arguments nor in its weights. Leave this layer out, "
            f"and convert only the layers after it. Received: a layer of type {type(layer).__name__}"
        )


def finalize_normalizations(model: keras.layers.Layer) -> None:
    """Let `Normalization` layers recompute the values that they derive from their weights and compute with."""
    for layer in model._flatten_layers():
        if isinstance(layer, layers.Normalization):
            layer.finalize_state()


@contextlib.contextmanager
def _not_compiled(model: Any) -> Iterator[None]:
    """Mark models as not compiled: Keras would compile the clone from a config, which cannot hold every loss."""
    compiled = [each for each in model._flatten_layers() if getattr(each, "compiled", False)]
    for each in compiled:
        each.compiled = False
    try:
        yield
    finally:
        for each in compiled:
            each.compiled = True


def _same_inputs(model: Any, made: dict[int, Any]) -> Any:
    """Return new inputs of the same names; None for a Sequential model, where Keras keeps the names itself.

    Args:
        model: A Functional or Sequential model.
        made: Dict from the ids of inputs to the new inputs. New ones are added to it, because models may share inputs.
    """
    if isinstance(model, keras.Sequential):
        return None
    input_layers = {id(layer.output): layer for layer in model.layers if isinstance(layer, layers.InputLayer)}
    kept = "batch_shape", "dtype", "name", "sparse", "ragged", "optional"

    def same(x):
        if id(x) not in made:
            config = input_layers[id(x)].get_config()
            made[id(x)] = keras.Input(**{name: config[name] for name in kept if config.get(name)})
        return made[id(x)]

    return keras.tree.map_structure(same, input_structure(model))
