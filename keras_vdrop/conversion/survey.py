"""Find the layers of a model that can be converted, their sites in it, and those that the user chose."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any

import keras
from keras import layers

from keras_vdrop import layers as ours
from keras_vdrop.conversion.graphs import children, is_graph, is_plain_graph, serialized
from keras_vdrop.costs import nodes
from keras_vdrop.layers.drop_in import DropIn
from keras_vdrop.layers.monte_carlo_dropout import KERAS_NOISE
from keras_vdrop.layers.recurrent import RecurrentLayer
from keras_vdrop.layers.stochastic import StochasticLayer
from keras_vdrop.layers.variational import trained_variables
from keras_vdrop.layers.weights import VariationalLayer
from keras_vdrop.posterior import posteriors

# The kinds of sites: a layer that has a counterpart; another layer with kernels; a variational layer; a layer with a
# low-rank adaptation of Keras's; a noise layer.
COUNTERPART, OTHER, VARIATIONAL, ADAPTED, NOISE = "counterpart", "other", "variational", "adapted", "noise"

# Layers whose weights are scales or shifts, whatever their number of axes.
_NO_KERNELS = tuple(
    getattr(layers, name)
    for name in ("BatchNormalization", "GroupNormalization", "LayerNormalization", "RMSNormalization", "PReLU")
    if hasattr(layers, name)
)


def _counterparts() -> dict[Any, Any]:
    classes = [getattr(ours, name) for name in ours.__all__]
    kernels = [cls for cls in classes if issubclass(cls, (VariationalLayer, RecurrentLayer))]
    return {next(base for base in cls.__mro__ if base.__module__.startswith("keras.")): cls for cls in kernels}


# Dict from a class of Keras to its counterpart.
COUNTERPARTS = _counterparts()


@dataclasses.dataclass(frozen=True)
class Site:
    """A layer of a model that may be replaced, and where it is.

    Attributes:
        layer: The layer.
        path: The names of the models and wrappers around it, without the model itself, and its own: "encoder/dense".
        around: Those models and wrappers, outermost first.
        kind: One of the constants above.
    """

    layer: keras.layers.Layer
    path: str
    around: tuple[keras.layers.Layer, ...]
    kind: str

    def is_within(self, layer: Any) -> bool:
        """Return whether `layer` is this layer or one around it."""
        return any(each is layer for each in (*self.around, self.layer))

    def __str__(self) -> str:
        return f"{self.path} ({type(self.layer).__name__})"


def survey(model: keras.Model, has_counterpart: Callable[[Any], bool] = lambda layer: True) -> list[Site]:
    """Return the sites of a model, in its order. A layer that is at several sites is listed at the first.

    Args:
        model: A built model.
        has_counterpart: Function from a layer of a class in `COUNTERPARTS` to whether the counterpart supports it.
    """
    if is_plain_graph(model):
        every = _in_graph(model, "", (), has_counterpart)
    else:  # a subclassed model, where only its own code knows how its layers are used
        every = [Site(model, model.name, (), VARIATIONAL if posteriors(model) else OTHER)]
    found = {}
    for site in every:
        found.setdefault(id(site.layer), site)
    return list(found.values())


def _in_graph(
    graph: Any, path: str, around: tuple[keras.layers.Layer, ...], has_counterpart: Callable[[Any], bool]
) -> list[Site]:
    return [site for layer in graph.layers for site in _visit(layer, path + layer.name, around, has_counterpart)]


def _visit(
    layer: Any, path: str, around: tuple[keras.layers.Layer, ...], has_counterpart: Callable[[Any], bool]
) -> list[Site]:
    """Return the sites within a layer, or the layer itself as one site."""

    def here(kind):
        return [Site(layer, path, around, kind)]

    if isinstance(layer, (DropIn, StochasticLayer)):
        return here(VARIATIONAL) if posteriors(layer) else []
    if is_graph(layer):
        return _in_graph(layer, f"{path}/", (*around, layer), has_counterpart)
    if type(layer) in COUNTERPARTS:
        return here(ADAPTED if getattr(layer, "lora_enabled", False) else COUNTERPART)
    if type(layer) in KERAS_NOISE:
        return here(NOISE)
    exchangeable = layers_in_config(layer)
    inner = [
        site for each in exchangeable for site in _visit(each, f"{path}/{each.name}", (*around, layer), has_counterpart)
    ]
    if inner and _hold_all_kernels(exchangeable, layer) and _can_hold(layer, inner, has_counterpart):
        return inner
    if posteriors(layer):
        return here(VARIATIONAL)
    return here(OTHER) if kernels(layer) else []


def _hold_all_kernels(some: Iterable[keras.layers.Layer], layer: Any) -> bool:
    held = {id(kernel) for each in some for kernel in kernels(each)}
    return all(id(kernel) in held for kernel in kernels(layer))


def _can_hold(layer: Any, inner: Iterable[Site], has_counterpart: Callable[[Any], bool]) -> bool:
    """Return whether the replacements of its sublayers work in a layer.

    Only `TimeDistributed` can hold a `Variational`, which replaces a layer without a counterpart: other wrappers do
    more than call their layers.
    """
    if isinstance(layer, layers.TimeDistributed):
        return True
    return all(site.kind != OTHER and (site.kind != COUNTERPART or has_counterpart(site.layer)) for site in inner)


def kernels(layer: Any) -> list[Any]:
    """Return the variables of a layer and its sublayers with at least two axes that are no scales, shifts or biases."""
    none = {
        id(variable) for each in layer._flatten_layers() if isinstance(each, _NO_KERNELS) for variable in each.weights
    }
    return [
        variable
        for path, variable in trained_variables(layer)
        if len(variable.shape) > 1 and "bias" not in variable.name and id(variable) not in none
    ]


def layers_in_config(layer: Any) -> list[Any]:
    """Return the sublayers in a layer's config, such as those of a wrapper, which can therefore be replaced."""
    found = []
    if children(layer):
        try:
            config = serialized(layer)
        except Exception:  # the config of a user's class may fail with any exception
            return []
        exchange(config["config"], children(layer), lambda inner, _: found.append(inner))
    return found


def exchange(value: Any, pool: list[Any], function: Callable[[Any, Any], Any]) -> Any:
    """Return a config in which `function(layer, serialized)` replaces each serialized layer of the pool.

    Args:
        value: The config.
        pool: List of layers. Those that are found, by class and name, are removed from it.
        function: Function of a layer and its serialized form, called in the order of the config.
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


# Choosing among the sites


def choose(sites: Iterable[Site], wanted: Any, model: keras.Model) -> list[Site]:
    """Return the sites with kernels that the user chose.

    Args:
        sites: The sites of `model`.
        wanted: As `layers` of `to_variational`.
        model: The model.

    Raises:
        ValueError: If `wanted` is of an unknown kind or fits no site.
    """
    found = [site for site in sites if site.kind != NOISE]
    if wanted is None or (isinstance(wanted, (list, tuple)) and not wanted):
        return found if wanted is None else []
    fits = _last(model, found) if isinstance(wanted, str) and wanted == "last" else _filter(wanted)
    chosen = list(filter(fits, found))
    if found and not chosen:
        raise ValueError(
            f"`layers` must match a layer of {model.name!r} that has a kernel: {', '.join(map(str, found))}. "
            f"Received: layers={wanted!r}"
        )
    return chosen


def _filter(wanted: Any) -> Callable[[Site], bool]:
    """Return a function from a site to whether it is chosen."""
    if isinstance(wanted, (list, tuple)):
        filters = list(map(_filter, wanted))
        return lambda site: any(fits(site) for fits in filters)
    if isinstance(wanted, str):
        try:
            pattern = re.compile(wanted)
        except re.error as error:
            raise ValueError(
                f"`layers` must be a valid regular expression: {error}. Received: layers={wanted!r}"
            ) from error
        return lambda site: pattern.search(site.path) is not None
    if inspect.isclass(wanted) and issubclass(wanted, keras.layers.Layer):
        return lambda site: any(isinstance(each, wanted) for each in (*site.around, site.layer))
    if callable(wanted) and not inspect.isclass(wanted):
        return lambda site: bool(wanted(site.layer))
    raise ValueError(
        "`layers` must be a layer class, a regular expression, a function from a layer to a bool, a list of them, "
        f'"last" or None. Received: layers={wanted!r}'
    )


def _last(model: keras.Model, sites: Iterable[Site]) -> Callable[[Site], bool]:
    """Return a function from a site to whether no other site follows it on a path to one of the outputs."""

    def within(layer):
        if is_plain_graph(layer):
            return _ends(layer, within)
        return {id(site) for site in sites if site.is_within(layer)}

    last = within(model)
    return lambda site: id(site) in last


def _ends(graph: Any, within: Callable[[Any], set[int]]) -> set[int]:
    """Return the union of `within(layer)` over the last layers of a graph for which it is not empty."""
    if isinstance(graph, keras.Sequential):
        return next((found for layer in reversed(graph.layers) if (found := within(layer))), set())

    def of_call(node):
        return within(node.operation) if isinstance(node.operation, keras.layers.Layer) else set()

    return set().union(*map(of_call, nodes(graph, ends_at=of_call)))
