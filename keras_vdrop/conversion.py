"""Back to Keras's own layers: the same predictions without the distributions."""

import inspect

import keras
from keras import ops

from keras_vdrop.layers import ConcreteDropout, VariationalGaussianDropout
from keras_vdrop.layers.base import VariationalLayer
from keras_vdrop.posterior import posteriors

_OURS = "keras_vdrop>"


def to_deterministic(model):
    """The same model of Keras's own layers: every distribution is its mean, every pruned weight is 0.

    It predicts what `model` predicts, and nothing of this package is needed to load or serve it. Layers that only make
    noise become what they are without it, and `ConcreteDropout` the layer that it wraps.

    Args:
        model: A built Functional or Sequential model; models and wrappers within it are converted too.

    Returns:
        A model of the same kind, compiled as `model` is.

    Raises:
        ValueError: For a subclassed model, whose layers its own code puts together, or one that has not been built.
    """
    return stock_twin(model, lambda weight: weight.mean())


def stock_twin(model, value):
    """The model of Keras's own layers in which every `VariationalWeight` is `value(weight)`, a tensor."""
    if not {"Functional", "Sequential"} & {cls.__name__ for cls in type(model).__mro__}:
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
        return keras.saving.deserialize_keras_object(_stock(keras.saving.serialize_keras_object(layer)))

    twin = keras.models.clone_model(model, _same_inputs(model), clone_function=stock_layer, recursive=True)
    if not twin.built:
        twin.build(model.input_shape)
    twin.set_weights(_stock_weights(model, value))
    return twin


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
    if not str(value.get("registered_name")).startswith(_OURS):
        # Sizes of variables that the twin does not have are no use to it.
        return {key: _stock(each) for key, each in value.items() if key != "build_config"}
    cls, config = keras.saving.get_registered_object(value["registered_name"]), value["config"]
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
        return keras.layers.Identity(**arguments)
    rank = len(layer.input.shape)
    shape = [1] * (rank - 1)
    shape[layer.axis % rank - 1] = -1
    return keras.layers.Rescaling(scale.reshape(shape).tolist(), **arguments)


def _stock_weights(model, value):
    """The weights of the twin, in the order of its own."""
    values, ours_alone = {}, set()
    for posterior in posteriors(model):
        owner = posterior.owner
        ours_alone.update(map(id, (owner.kl_weight, owner.free_bits, *posterior.variables)))
        if isinstance(owner, VariationalLayer):
            values[id(posterior.loc)] = value(posterior)
    return [
        values.get(id(variable), variable) for variable in model.weights if id(variable) not in ours_alone - set(values)
    ]
