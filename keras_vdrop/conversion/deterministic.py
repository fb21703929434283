"""Convert back to Keras's own layers: the model at the posterior mean, or one draw of it."""

from __future__ import annotations

import collections
import inspect
import re
from collections.abc import Callable
from typing import Any

import keras
from keras import layers

from keras_vdrop.checks import require_built
from keras_vdrop.conversion.copying import carry_over
from keras_vdrop.conversion.graphs import (
    check_built,
    check_lookup,
    finalize_normalizations,
    graph_copy,
    is_graph,
    known_layers,
    model_copy,
    serialized,
)
from keras_vdrop.functional.tensors import to_numpy
from keras_vdrop.layers import ConcreteDropout, Variational, VariationalGaussianDropout
from keras_vdrop.layers.drop_in import DropIn
from keras_vdrop.layers.stochastic import StochasticLayer
from keras_vdrop.posterior import VariationalWeight


def to_deterministic(model: keras.Model, sample: bool = False, seed: int | None = None) -> keras.Model:
    """Return the same model made of Keras's own layers, with w = loc, or one draw w ~ N(loc, exp(log_variance)).

    Pruned weights are 0. The result loads and runs without this package. At the mean, it predicts what `model`
    predicts. With `sample`, it is one draw from the posterior: several calls make an ensemble, each member of which can
    be saved to a plain file. Layers that only add noise are replaced by their noise-free form, and `ConcreteDropout` by
    the layer that it wraps: `sample` draws weights, but no dropout masks. A low-rank update is merged into its kernel.
    A layer that Keras named after its class is renamed after its new class (`variational_dense_3` to `dense_3`), unless
    that name is taken; a name that you gave stays.

    Args:
        model: A built Functional or Sequential model, or a `Variational` around any other model. Models and wrappers
            within it are converted too.
        sample: Whether to draw the weights.
        seed: Int for the same draw every time, or None.

    Returns:
        A model of the same kind, not compiled.

    Raises:
        ValueError: For a subclassed model, because only its own code knows how the layers are connected; for a model
            that has not been built; or for a layer that cannot be made again from its arguments and weights: a
            subclass of one of our layers, a layer with a function that is not registered, or a lookup layer that has
            learned its vocabulary.

    Examples:
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


def stock_twin(model: keras.Model, value: Callable[[VariationalWeight], Any]) -> keras.Model:
    """Return the model made of Keras's own layers in which each `VariationalWeight` is the tensor `value(weight)`."""
    inside = model.layer if isinstance(model, Variational) else model
    if not is_graph(inside) and inside is model:
        if isinstance(getattr(model, "model", None), keras.Model):  # such as `MonteCarlo`
            raise ValueError(
                f"{model.name!r}, a {type(model).__name__}, wraps another model. Pass the wrapped model, its attribute "
                f"`model` ({model.model.name!r})."
            )
        raise ValueError(
            "Expected a Functional or Sequential model. In any other model, only its own code defines how the layers "
            "are connected. Write it as keras.Model(inputs, outputs), or convert the models within it. "
            f"Received: {model.name!r} of type {type(model).__name__}"
        )
    require_built(model)
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
                f"{layer.name!r}, a {type(layer).__name__}, cannot be recreated from its arguments. Decorate its "
                "custom functions and classes, such as an activation, with "
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
    finalize_normalizations(twin)
    return twin


# Arguments without a use in the twin, where low-rank updates are merged into the kernels.
_OF_UPDATES = {"lora_rank", "lora_alpha"}


class _Names:
    """Name layers after Keras's classes if they were named after ours. Other names stay, and all stay unique."""

    def __init__(self, model: keras.Model):
        layers_within = model._flatten_layers()
        operations = [each for graph in filter(is_graph, layers_within) for each in getattr(graph, "operations", ())]
        every = {id(each): each.name for each in (*layers_within, *operations)}
        self._uses = collections.Counter(every.values())

    def __call__(self, name: str, cls: type, new: type) -> str:
        """Return the name of the layer of class `new` that replaces a layer `name` of class `cls`."""
        named_after = re.fullmatch(rf"(forward_|backward_)?{_snake_case(cls)}(_\d+)?", name)
        if named_after is None:
            return name
        before, number = (part or "" for part in named_after.groups())
        return self._unless_taken(f"{before}{_snake_case(new)}{number}", name, 0)

    def of_wrapper(self, name: str, cls: type, within: str) -> str:
        """Return the name of the layer that replaces its wrapper `name` of class `cls`; its own name is `within`."""
        named_after = re.fullmatch(rf"{_snake_case(cls)}(_\d+)?", name)
        return name if named_after is None else self._unless_taken(within, name, 1)

    def _unless_taken(self, name: str, otherwise: str, uses: int) -> str:
        if self._uses[name] > uses:
            return otherwise
        self._uses[name] += 1
        return name


class _SameNames:
    """Keep every name."""

    def __call__(self, name: str, cls: type, new: type) -> str:
        return name

    of_wrapper = __call__


def _snake_case(cls: type) -> str:
    """Return the name that Keras gives to the first layer of a class."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", cls.__name__)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _stock(value: Any, names: _Names | _SameNames) -> Any:
    """Replace our layers by Keras's in a serialized value, at every depth."""
    if isinstance(value, (list, tuple)):
        return [_stock(each, names) for each in value]
    if not isinstance(value, dict):
        return value
    name = value.get("registered_name")
    cls = name and keras.saving.get_registered_object(name)
    if "inbound_nodes" in value:
        names = _SameNames()  # the calls of other layers refer to these names
    if not (isinstance(cls, type) and issubclass(cls, (DropIn, StochasticLayer))):
        # The build config describes variables that the twin may not have.
        return {key: _stock(each, names) for key, each in value.items() if key != "build_config"}
    calls = {key: value[key] for key in ("name", "inbound_nodes") if key in value}
    return {**calls, **_stock_of_ours(cls, value["config"], names)}


def _stock_of_ours(cls: type, config: dict[str, Any], names: _Names | _SameNames) -> dict[str, Any]:
    """Return the serialized layer of Keras that replaces one of our layers."""
    if not cls.__module__.startswith("keras_vdrop."):
        raise ValueError(
            f"{config['name']!r} is a {cls.__name__}, which extends a layer of keras_vdrop. Such a subclass has no "
            "counterpart in Keras. Use the layer that it extends."
        )
    if cls in (ConcreteDropout, Variational):
        layer = _stock(config["layer"], names)
        name = names.of_wrapper(config["name"], cls, layer["config"]["name"])
        return {**layer, "config": {**layer["config"], "name": name}}
    if cls is VariationalGaussianDropout:
        raise ValueError(
            "A VariationalGaussianDropout within a wrapper cannot be converted. Use it without the wrapper: its units "
            f"are on one axis of any input. Received: {config['name']!r}"
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


def _stock_gaussian_dropout(
    layer: Any, value: Callable[[VariationalWeight], Any], names: _Names | _SameNames
) -> keras.layers.Layer:
    """Return `Identity`, or `Rescaling` by a factor for each unit: 0 for a pruned unit, or the drawn factor."""
    scale = None if layer.alpha == "fixed" else to_numpy(value(layer.scale))
    plain = scale is None or (scale == 1.0).all()
    stock = layers.Identity if plain else layers.Rescaling
    arguments = {"name": names(layer.name, type(layer), stock), "dtype": layer.dtype_policy.name}
    if plain:
        return layers.Identity(**arguments)
    rank = len(layer.input.shape)
    if rank == 2:
        if keras.config.image_data_format() == "channels_first":
            raise ValueError(
                f'Keras cannot rescale the vectors of {layer.name!r} if the image data format is "channels_first". '
                'Call `keras.config.set_image_data_format("channels_last")` first, or leave the layer out.'
            )
        return layers.Rescaling(scale.tolist(), **arguments)
    shape = [1] * rank
    shape[layer.axis % rank] = -1
    return layers.Rescaling(scale.reshape(shape).tolist(), **arguments)
