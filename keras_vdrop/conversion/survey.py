"""Which layers of a model have weights that can be distributions, where they are, and which of them are meant."""

import dataclasses
import inspect
import re

import keras
from keras import layers

from keras_vdrop import layers as ours
from keras_vdrop.conversion.graphs import children, is_graph, is_plain_graph, serialized
from keras_vdrop.layers.base import DropIn, StochasticLayer, VariationalLayer
from keras_vdrop.layers.recurrent import RecurrentLayer
from keras_vdrop.layers.variational import trained_variables
from keras_vdrop.posterior import posteriors

# What is at a place: a layer for whose class there is one of ours; another with kernels; one that is variational; one
# with a low-rank adaptation; noise.
COUNTERPART, OTHER, VARIATIONAL, ADAPTED, NOISE = "counterpart", "other", "variational", "adapted", "noise"

NOISES = (
    *(layers.Dropout, layers.SpatialDropout1D, layers.SpatialDropout2D, layers.SpatialDropout3D),
    *(layers.GaussianDropout, layers.GaussianNoise, layers.AlphaDropout),
)

# Of these a weight is a scale or a shift, of however many axes.
_NO_KERNELS = tuple(
    getattr(layers, name)
    for name in ("BatchNormalization", "GroupNormalization", "LayerNormalization", "RMSNormalization", "PReLU")
    if hasattr(layers, name)
)


def _counterparts():
    classes = [getattr(ours, name) for name in ours.__all__]
    kernels = [cls for cls in classes if issubclass(cls, (VariationalLayer, RecurrentLayer))]
    return {next(base for base in cls.__mro__ if base.__module__.startswith("keras.")): cls for cls in kernels}


# Our classes, by Keras's that they stand for.
COUNTERPARTS = _counterparts()


@dataclasses.dataclass(frozen=True)
class Place:
    """A layer of a model that could be another.

    Attributes:
        layer: The layer.
        path: The names of the models and wrappers around it, below the model, and its own: "encoder/dense".
        around: Those models and wrappers, the outermost first.
        kind: One of the constants above.
    """

    layer: keras.layers.Layer
    path: str
    around: tuple
    kind: str

    def is_within(self, layer):
        """Whether the layer is this one, or around it."""
        return any(each is layer for each in (*self.around, self.layer))

    def __str__(self):
        return f"{self.path} ({type(self.layer).__name__})"


def survey(model):
    """The places of a model, in its order; of a layer that is at several, the first."""
    if is_plain_graph(model):
        every = _in_graph(model, "", ())
    else:  # of its own code, which alone knows its layers
        every = [Place(model, model.name, (), VARIATIONAL if posteriors(model) else OTHER)]
    found = {}
    for place in every:
        found.setdefault(id(place.layer), place)
    return list(found.values())


def _in_graph(graph, path, around):
    return [place for layer in graph.layers for place in _visit(layer, path + layer.name, around)]


def _visit(layer, path, around):
    """The places within a layer, or the one that it is."""

    def here(kind):
        return [Place(layer, path, around, kind)]

    if isinstance(layer, (DropIn, StochasticLayer)):
        return here(VARIATIONAL) if posteriors(layer) else []
    if is_graph(layer):
        return _in_graph(layer, f"{path}/", (*around, layer))
    if type(layer) in COUNTERPARTS:
        return here(ADAPTED if getattr(layer, "lora_enabled", False) else COUNTERPART)
    if type(layer) in NOISES:
        return here(NOISE)
    exchangeable = layers_in_config(layer)
    inner = [place for each in exchangeable for place in _visit(each, f"{path}/{each.name}", (*around, layer))]
    if inner and _hold_all_kernels(exchangeable, layer) and _can_hold(layer, inner):
        return inner
    if posteriors(layer):
        return here(VARIATIONAL)
    return here(OTHER) if kernels(layer) else []


def _hold_all_kernels(some, layer):
    held = {id(kernel) for each in some for kernel in kernels(each)}
    return all(id(kernel) in held for kernel in kernels(layer))


def _can_hold(layer, inner):
    """Whether a layer can be given `Variational`s in the places within it: others ask for more than a call."""
    return isinstance(layer, layers.TimeDistributed) or all(place.kind != OTHER for place in inner)


def kernels(layer):
    """The variables of a layer, and of all within it, that are matrices or more, and no scales, shifts or biases."""
    none = {
        id(variable) for each in layer._flatten_layers() if isinstance(each, _NO_KERNELS) for variable in each.weights
    }
    return [
        variable
        for path, variable in trained_variables(layer)
        if len(variable.shape) > 1 and "bias" not in variable.name and id(variable) not in none
    ]


def layers_in_config(layer):
    """The layers that a layer's config holds, so that others can take their places: those that a wrapper wraps."""
    found = []
    if children(layer):
        try:
            config = serialized(layer)
        except Exception:  # of a class of the user's own, whose config may fail in any way
            return []
        exchange(config["config"], children(layer), lambda inner, _: found.append(inner))
    return found


def exchange(value, pool, function):
    """What Keras serialized, with `function(layer, config)` in the place of the config of each layer of the pool.

    Args:
        value: The config.
        pool: A list of layers; those that are found are taken out of it.
        function: Called in the order of the config.
    """
    if isinstance(value, (list, tuple)):
        return [exchange(each, pool, function) for each in value]
    if not isinstance(value, dict):
        return value
    config = value.get("config")
    if isinstance(config, dict):
        for index, layer in enumerate(pool):
            if (type(layer).__name__, layer.name) == (value.get("class_name"), config.get("name")):
                return function(pool.pop(index), value)
    return {key: exchange(each, pool, function) for key, each in value.items() if key != "build_config"}


# Which are meant


def choose(places, wanted, model):
    """Those of the places that have kernels and are meant.

    Args:
        places: Of `model`.
        wanted: As `to_variational` takes `layers`.

    Raises:
        ValueError: If `wanted` is nothing of the kind, or fits no place.
    """
    found = [place for place in places if place.kind != NOISE]
    if wanted is None or (isinstance(wanted, (list, tuple)) and not wanted):
        return found if wanted is None else []
    fits = _last(model, found) if isinstance(wanted, str) and wanted == "last" else _filter(wanted)
    chosen = list(filter(fits, found))
    if found and not chosen:
        raise ValueError(
            f"`layers` fits none of the layers of {model.name!r} that have kernels: {', '.join(map(str, found))}. "
            f"Received: layers={wanted!r}"
        )
    return chosen


def _filter(wanted):
    """A function from a place to whether it is meant."""
    if isinstance(wanted, (list, tuple)):
        filters = list(map(_filter, wanted))
        return lambda place: any(fits(place) for fits in filters)
    if isinstance(wanted, str):
        try:
            pattern = re.compile(wanted)
        except re.error as error:
            raise ValueError(f"`layers` must be a regular expression: {error}. Received: layers={wanted!r}") from error
        return lambda place: pattern.search(place.path) is not None
    if inspect.isclass(wanted) and issubclass(wanted, keras.layers.Layer):
        return lambda place: any(isinstance(each, wanted) for each in (*place.around, place.layer))
    if callable(wanted) and not inspect.isclass(wanted):
        return lambda place: bool(wanted(place.layer))
    raise ValueError(
        "`layers` must be a layer class, a regular expression, a function from a layer to a bool, a list of them, "
        f'"last" or None. Received: layers={wanted!r}'
    )


def _last(model, places):
    """A function from a place to whether no other comes after it on the way to one of the outputs."""

    def within(layer):
        if is_plain_graph(layer):
            return _ends(layer, within)
        return {id(place) for place in places if place.is_within(layer)}

    last = within(model)
    return lambda place: id(place) in last


def _ends(graph, within):
    """What `within(layer)` finds, of the last layers of a graph in which it finds something."""
    if isinstance(graph, keras.Sequential):
        return next((found for layer in reversed(graph.layers) if (found := within(layer))), set())
    ends, seen, tensors = set(), set(), list(graph.outputs)
    entries = set(map(id, graph.inputs))
    while tensors:
        tensor = tensors.pop()
        operation, index, _ = tensor._keras_history
        node = operation._inbound_nodes[index]
        if id(tensor) in entries or id(node) in seen:
            continue
        seen.add(id(node))
        found = within(operation) if isinstance(operation, keras.layers.Layer) else set()
        ends |= found
        if not found:
            tensors += node.input_tensors
    return ends
