"""Back to Keras's own layers: the same predictions without the distributions, or one draw of them."""

import collections
import inspect
import re

import keras
from keras import layers, ops

from keras_vdrop.conversion.copying import carry_over
from keras_vdrop.conversion.graphs import (
    check_built,
    check_lookup,
    graph_copy,
    is_graph,
    known_layers,
    model_copy,
    serialized,
    take_over,
)
from keras_vdrop.layers import ConcreteDropout, Variational, VariationalGaussianDropout
from keras_vdrop.layers.base import DropIn, StochasticLayer


def to_deterministic(model, sample=False, seed=None):
    """The same model of Keras's own layers: w = loc, or with `sample` one draw w ~ N(loc, exp(log_variance)) of each
    weight; 0 where pruned.

    Nothing of this package is needed to load or serve it. At the mean it predicts what `model` predicts. A draw is one
    network of the posterior: several calls make an ensemble, each of them in a plain file. Layers that only make noise
    become what they are without it, and `ConcreteDropout` the layer that it wraps. A low-rank update is in the kernel
    that it is of. A layer that was named after its class is named after its new one (`variational_dense_3`, `dense_3`),
    unless another has that name; a name that you gave stays.

    Args:
        model: A built Functional or Sequential model, or a `Variational` of any other; models and wrappers within it
            are converted too.
        sample: Whether weights are drawn.
        seed: Int for the same draw every time, or None.

    Returns:
        A model of the same kind, not compiled.

    Raises:
        ValueError: For a subclassed model, whose layers its own code puts together; one that has not been built; or
            one with a layer that cannot be made again from its arguments and weights: a subclass of one of ours, one
            with a function that is not registered, or a lookup that has learned its vocabulary.

    Example:
        >>> import keras, keras_vdrop as kv
        >>> model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(3, kl_weight=1 / 1000)])
        >>> x = keras.ops.ones((2, 4))
        >>> bool(keras.ops.all(keras.ops.abs(kv.to_deterministic(model)(x) - model(x)) < 1e-6))
        True
        >>> members = [kv.to_deterministic(model, sample=True, seed=seed) for seed in range(5)]
        >>> bool(keras.ops.any(members[0](x) == members[1](x)))
        False

    Reference:
        Weight Uncertainty in Neural Networks, Blundell et al., 2015, https://arxiv.org/abs/1505.05424
    """
    if not sample:
        return stock_twin(model, lambda weight: weight.mean())
    generator = keras.random.SeedGenerator(seed)
    return stock_twin(model, lambda weight: weight.mean() + weight.perturbation(generator))


def stock_twin(model, value):
    """The model of Keras's own layers in which every `VariationalWeight` is `value(weight)`, a tensor."""
    inside = model.layer if isinstance(model, Variational) else model
    if not is_graph(inside) and inside is model:
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
    names = _Names(model)

    def stock_layer(layer):
        check_lookup(layer)
        if isinstance(layer, VariationalGaussianDropout):
            return _stock_gaussian_dropout(layer, value, names)
        stock = _stock(serialized(layer), names)
        try:
            return keras.saving.deserialize_keras_object(stock, safe_mode=False)
        except TypeError as error:
            raise ValueError(
                f"{layer.name!r}, a {type(layer).__name__}, cannot be made again from its arguments: give its "
                "functions and classes, such as an activation of your own, "
                "@keras.saving.register_keras_serializable()."
            ) from error

    made = {}
    if is_graph(inside):
        twin, made = graph_copy(inside, stock_layer)
    else:
        with known_layers(model):
            twin = model_copy(inside)
        check_built(twin, inside)
    carry_over(model, twin, made, value)
    take_over(twin)
    return twin


# A low-rank update is in the kernel of the twin.
_OF_UPDATES = {"lora_rank", "lora_alpha"}


class _Names:
    """Names after Keras's classes for layers that were named after ours; all others stay, and none is given twice."""

    def __init__(self, model):
        layers_within = model._flatten_layers()
        operations = [each for graph in filter(is_graph, layers_within) for each in getattr(graph, "operations", ())]
        every = {id(each): each.name for each in (*layers_within, *operations)}
        self._uses = collections.Counter(every.values())

    def __call__(self, name, cls, new):
        """The name of what takes the place of a layer of class `cls`: something of the class `new`."""
        named_after = re.fullmatch(rf"(forward_|backward_)?{_snake_case(cls)}(_\d+)?", name)
        if named_after is None:
            return name
        before, number = (part or "" for part in named_after.groups())
        return self._unless_taken(f"{before}{_snake_case(new)}{number}", name, 0)

    def of_wrapper(self, name, cls, within):
        """The name of what takes the place of a wrapper of class `cls`: the layer that was within it."""
        named_after = re.fullmatch(rf"{_snake_case(cls)}(_\d+)?", name)
        return name if named_after is None else self._unless_taken(within, name, 1)

    def _unless_taken(self, name, otherwise, uses):
        if self._uses[name] > uses:
            return otherwise
        self._uses[name] += 1
        return name


class _SameNames:
    """Every name stays."""

    def __call__(self, name, cls, new):
        return name

    of_wrapper = __call__


def _snake_case(cls):
    """The name that Keras gives to the first layer of a class."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", cls.__name__)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _stock(value, names):
    """What Keras serialized, with its own layers in the places of ours, at every depth."""
    if isinstance(value, (list, tuple)):
        return [_stock(each, names) for each in value]
    if not isinstance(value, dict):
        return value
    name = value.get("registered_name")
    cls = name and keras.saving.get_registered_object(name)
    if "inbound_nodes" in value:
        names = _SameNames()  # the calls of other layers refer to them
    if not (isinstance(cls, type) and issubclass(cls, (DropIn, StochasticLayer))):
        # Sizes of variables that the twin does not have are no use to it.
        return {key: _stock(each, names) for key, each in value.items() if key != "build_config"}
    calls = {key: value[key] for key in ("name", "inbound_nodes") if key in value}
    return {**calls, **_stock_of_ours(cls, value["config"], names)}


def _stock_of_ours(cls, config, names):
    """The same of one of our layers."""
    if not cls.__module__.startswith("keras_vdrop."):
        raise ValueError(
            f"{config['name']!r} is a {cls.__name__}, of which only its own code knows how it differs from the layer "
            "of ours that it extends: it has no counterpart in Keras."
        )
    if cls in (ConcreteDropout, Variational):
        layer = _stock(config["layer"], names)
        name = names.of_wrapper(config["name"], cls, layer["config"]["name"])
        return {**layer, "config": {**layer["config"], "name": name}}
    if cls is VariationalGaussianDropout:
        raise ValueError(
            "VariationalGaussianDropout within a wrapper cannot be converted; it needs no wrapper, as its units are on "
            f"one axis of whatever it is called on. Received: {config['name']!r}"
        )
    keras_layer = next(base for base in cls.__mro__ if base.__module__.startswith("keras."))
    arguments = {*inspect.signature(keras_layer.__init__).parameters, "name", "trainable", "dtype"} - _OF_UPDATES
    kept = {name: _stock(each, names) for name, each in config.items() if name in arguments}
    return {
        "module": "keras.layers",
        "class_name": keras_layer.__name__,
        "config": {**kept, "name": names(config["name"], cls, keras_layer)},
        "registered_name": None,
    }


def _stock_gaussian_dropout(layer, value, names):
    """Without noise it is x, and 0 in the units that are pruned; of a draw, x times a number for each unit."""
    scale = None if layer.alpha == "fixed" else ops.convert_to_numpy(value(layer.scale))
    plain = scale is None or (scale == 1.0).all()
    stock = layers.Identity if plain else layers.Rescaling
    arguments = {"name": names(layer.name, type(layer), stock), "dtype": layer.dtype_policy.name}
    if plain:
        return layers.Identity(**arguments)
    rank = len(layer.input.shape)
    if rank == 2:
        if keras.config.image_data_format() == "channels_first":
            raise ValueError(f"With channels first, Keras cannot rescale vectors. Received: {layer.name!r}")
        return layers.Rescaling(scale.tolist(), **arguments)
    shape = [1] * rank
    shape[layer.axis % rank] = -1
    return layers.Rescaling(scale.reshape(shape).tolist(), **arguments)
