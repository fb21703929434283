"""Models of which Keras knows how their layers are put together, and their copies of other layers."""

import contextlib
import warnings

import keras
from keras import layers


def is_graph(model):
    """Whether it is a model of which Keras knows how its layers are put together."""
    return _graph_class(model) is not None


def is_plain_graph(model):
    """The same, where the model's own code does not put them together in another way."""
    base = _graph_class(model)
    return base is not None and type(model).call is base.call


def _graph_class(model):
    return next((cls for cls in type(model).__mro__ if cls.__name__ in ("Functional", "Sequential")), None)


def children(layer):
    """The layers that a layer holds itself, in the order in which it was given them."""
    return layer._flatten_layers(include_self=False, recursive=False)


def serialized(layer):
    """A layer as Keras serializes it."""
    with _without_warnings():
        return keras.saving.serialize_keras_object(layer)


def config_of(layer):
    """The config of a layer."""
    with _without_warnings():
        return layer.get_config()


@contextlib.contextmanager
def _without_warnings():
    """Of a lambda there is no need to warn: it stays in this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def graph_copy(model, make):
    """A model of the same graph, not compiled.

    Args:
        model: A Functional or Sequential model, built.
        make: Function from a layer, or another operation, at any depth of models within models, to what takes its
            place.

    Returns:
        The model, whose weights are those that its layers start with; and a dict from the ids of layers and models to
        what takes their places.

    Raises:
        ValueError: For a model within it whose copy would have another `call`.
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
                f"{graph.name!r}, a {type(graph).__name__}, has a `call` of its own, and a constructor that is not of "
                "inputs and outputs: a copy would be without both. Convert what it is made of, or make it a layer."
            )
        if not new.built:
            new.build(graph.input_shape)
        return new

    with _not_compiled(model), known_layers(model):
        return again(model), made


def model_copy(model):
    """A model of the same class and arguments, built if Keras can, and not compiled."""
    config = {name: value for name, value in serialized(model).items() if name != "compile_config"}
    with _without_warnings():  # that it cannot be built, `check_built` says
        return keras.saving.deserialize_keras_object(config, safe_mode=False)


def check_built(copy, model):
    """Raise a `ValueError` if the copy of a model has no weights yet."""
    if not copy.built:
        raise ValueError(
            f"Keras cannot build a copy of {model.name!r}, a {type(model).__name__}. Make one yourself: call a new "
            "model on some data and give it the weights by `set_weights`."
        )


def known_layers(model):
    """A scope in which the types of the model's layers are found by their names, registered or not."""
    types = [type(layer) for layer in model._flatten_layers()]
    return keras.saving.custom_object_scope(
        {cls.__name__: cls for cls in types if not cls.__module__.startswith("keras.")}
    )


def input_structure(model):
    """The symbolic inputs as the model takes them: one, a list or a dict."""
    return model.inputs[0] if isinstance(model, keras.Sequential) else model.input


def check_lookup(layer):
    """Raise a `ValueError` for a layer that has learned what neither its arguments nor its weights hold."""
    if isinstance(layer, (layers.IntegerLookup, layers.StringLookup, layers.TextVectorization)):
        raise ValueError(
            f"{layer.name!r} has its vocabulary neither in its arguments nor in its weights. Leave it out of the "
            f"model: convert what comes after it. Received: a layer of type {type(layer).__name__}"
        )


def take_over(model):
    """Let layers that do not compute with their weights, but with what they once took from them, take it again."""
    for layer in model._flatten_layers():
        if isinstance(layer, layers.Normalization):
            layer.finalize_state()


@contextlib.contextmanager
def _not_compiled(model):
    """Keras would compile a clone too, by way of a config that cannot hold every loss."""
    compiled = [each for each in model._flatten_layers() if getattr(each, "compiled", False)]
    for each in compiled:
        each.compiled = False
    try:
        yield
    finally:
        for each in compiled:
            each.compiled = True


def _same_inputs(model, made):
    """Inputs of the same names, which Keras would give new ones; None for a Sequential model, where it does not.

    Args:
        model: A Functional or Sequential model.
        made: Dict from the ids of inputs to those in their places, to which these are added: models may share them.
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
