"""Back to Keras's own layers: the same predictions without the distributions."""

import contextlib
import inspect

import keras
import numpy as np
from keras import layers, ops

from keras_vdrop.layers import ConcreteDropout, VariationalGaussianDropout
from keras_vdrop.layers.base import DropIn, StochasticLayer, VariationalLayer
from keras_vdrop.posterior import posteriors


def to_deterministic(model):
    """The same model of Keras's own layers: every distribution is its mean, every pruned weight is 0.

    It predicts what `model` predicts, and nothing of this package is needed to load or serve it. Layers that only make
    noise become what they are without it, and `ConcreteDropout` the layer that it wraps.

    Args:
        model: A built Functional or Sequential model; models and wrappers within it are converted too.

    Returns:
        A model of the same kind, not compiled.

    Raises:
        ValueError: For a subclassed model, whose layers its own code puts together; one that has not been built; or
            one with a layer that cannot be made again from its arguments and weights: a subclass of one of ours, one
            with a function that is not registered, or a lookup that has learned its vocabulary.
    """
    return stock_twin(model, lambda weight: weight.mean())


def stock_twin(model, value):
    """The model of Keras's own layers in which every `VariationalWeight` is `value(weight)`, a tensor."""
    if not is_graph(model):
        if isinstance(getattr(model, "model", None), keras.Model):  # as `MonteCarlo` does
            raise ValueError(
                f"{model.name!r}, a {type(model).__name__}, wraps another model: pass that one, its `model` "
                f"({model.model.name!r})."
            )
        raise ValueError(
            "Expected a Functional or Sequential model: of any other, only its own code knows how the layers are put "
            "together. Write it as keras.Model(inputs, outputs), or convert the models within it. "
            f"Received: {model.name!r} of type {type(model).__name__}"
        )
    if not model.built:
        raise ValueError(f"The model {model.name!r} has not been built: call it on some data first.")

    def stock_layer(layer):
        if isinstance(layer, VariationalGaussianDropout):
            return _stock_gaussian_dropout(layer, value)
        if isinstance(layer, (layers.IntegerLookup, layers.StringLookup, layers.TextVectorization)):
            raise ValueError(
                f"{layer.name!r} has its vocabulary neither in its arguments nor in its weights. Leave it out of the "
                f"model: convert what comes after it. Received: a layer of type {type(layer).__name__}"
            )
        stock = _stock(keras.saving.serialize_keras_object(layer))
        try:
            return keras.saving.deserialize_keras_object(stock)
        except TypeError as error:
            raise ValueError(
                f"{layer.name!r}, a {type(layer).__name__}, cannot be made again from its arguments: give its "
                "functions and classes, such as an activation of your own, "
                "@keras.saving.register_keras_serializable()."
            ) from error

    with _not_compiled(model), known_layers(model):
        twin = keras.models.clone_model(model, _same_inputs(model), clone_function=stock_layer, recursive=True)
    if not twin.built:
        twin.build(model.input_shape)
    twin.set_weights(_stock_weights(model, value))
    take_over(twin)
    return twin


def take_over(model):
    """Let layers that do not compute with their weights, but with what they once took from them, take it again."""
    for layer in model._flatten_layers():
        if isinstance(layer, layers.Normalization):
            layer.finalize_state()


def known_layers(model):
    """A scope in which the types of the model's layers are found by their names, registered or not."""
    return keras.saving.custom_object_scope({type(layer).__name__: type(layer) for layer in model._flatten_layers()})


def is_graph(model):
    """Whether it is a model of which Keras knows how its layers are put together."""
    return bool({"Functional", "Sequential"} & {cls.__name__ for cls in type(model).__mro__})


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


def _same_inputs(model):
    """Inputs of the same names, which Keras would give new ones; None for a Sequential model, where it does not."""
    if isinstance(model, keras.Sequential):
        return None
    names = {id(layer.output): layer.name for layer in model.layers if isinstance(layer, keras.layers.InputLayer)}
    return keras.tree.map_structure(
        lambda x: keras.Input(batch_shape=x.shape, dtype=x.dtype, name=names[id(x)]), input_structure(model)
    )


def input_structure(model):
    """The symbolic inputs as the model takes them: one, a list or a dict."""
    return model.inputs[0] if isinstance(model, keras.Sequential) else model.input


def _stock(value):
    """What Keras serialized, with its own layers in the places of ours, at every depth."""
    if isinstance(value, (list, tuple)):
        return [_stock(each) for each in value]
    if not isinstance(value, dict):
        return value
    name = value.get("registered_name")
    cls = name and keras.saving.get_registered_object(name)
    if not (isinstance(cls, type) and issubclass(cls, (DropIn, StochasticLayer))):
        # Sizes of variables that the twin does not have are no use to it.
        return {key: _stock(each) for key, each in value.items() if key != "build_config"}
    config = value["config"]
    if not cls.__module__.startswith("keras_vdrop."):
        raise ValueError(
            f"{config['name']!r} is a {cls.__name__}, of which only its own code knows how it differs from the layer "
            "of ours that it extends: it has no counterpart in Keras."
        )
    if cls is ConcreteDropout:
        layer = _stock(config["layer"])
        return {**layer, "config": {**layer["config"], "name": config["name"]}}
    if cls is VariationalGaussianDropout:
        raise ValueError(
            "VariationalGaussianDropout within a wrapper cannot be converted; it needs no wrapper, as its units are on "
            f"one axis of whatever it is called on. Received: {config['name']!r}"
        )
    keras_layer = next(base for base in cls.__mro__ if base.__module__.startswith("keras."))
    names = {*inspect.signature(keras_layer.__init__).parameters, "name", "trainable", "dtype"}
    return {
        "module": "keras.layers",
        "class_name": keras_layer.__name__,
        "config": {name: _stock(each) for name, each in config.items() if name in names},
        "registered_name": None,
    }


def _stock_gaussian_dropout(layer, value):
    """Without noise it is x, and 0 in the units that are pruned."""
    arguments = {"name": layer.name, "dtype": layer.dtype_policy.name}
    scale = None if layer.alpha == "fixed" else ops.convert_to_numpy(value(layer.scale))
    if scale is None or scale.all():
        return layers.Identity(**arguments)
    rank = len(layer.input.shape)
    if rank == 2:
        if keras.config.image_data_format() == "channels_first":
            raise ValueError(f"With channels first, Keras cannot rescale vectors. Received: {layer.name!r}")
        return layers.Rescaling(scale.tolist(), **arguments)
    shape = [1] * rank
    shape[layer.axis % rank] = -1
    return layers.Rescaling(scale.reshape(shape).tolist(), **arguments)


def _stock_weights(model, value):
    """The weights of the twin, in the order of its own: copies, because JAX gives away what a variable holds."""
    values, ours_alone = {}, set()
    for posterior in posteriors(model):
        owner = posterior.owner
        ours_alone.update(map(id, (owner.kl_weight, owner.free_bits, *posterior.variables)))
        if isinstance(owner, VariationalLayer):
            values[id(posterior.loc)] = value(posterior)
    return [
        np.array(ops.convert_to_numpy(values.get(id(variable), variable)))
        for variable in model.weights
        if id(variable) not in ours_alone - set(values)
    ]
