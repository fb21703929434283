"""Copy weights, states, `trainable` flags and the compile configuration from a model to its twin, a converted copy."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import keras
import numpy as np

from keras_vdrop.conversion.graphs import children, is_graph
from keras_vdrop.functional.tensors import to_numpy
from keras_vdrop.layers import Variational, VariationalGaussianDropout
from keras_vdrop.layers.stochastic import StochasticLayer, is_unset
from keras_vdrop.posterior import LowRankUpdate, Posterior, VariationalWeight, posteriors


def stock_weights(layer: Any) -> list[Any]:
    """Return the weights of a model or layer that the corresponding layers of Keras have too.

    A posterior contributes its mean, a low-rank update the weight that it updates, and a noise layer nothing.
    """
    ours_alone = set()
    for posterior in posteriors(layer):
        owner = posterior.owner
        ours_alone.update(map(id, (owner.kl_weight, owner.free_bits, *posterior.variables)))
        if (update := _update(posterior)) is not None:
            ours_alone.add(id(update.b))
        elif isinstance(posterior, VariationalWeight) and not isinstance(owner, VariationalGaussianDropout):
            ours_alone.discard(id(posterior.loc))
    return [variable for variable in layer.weights if id(variable) not in ours_alone]


def _update(posterior: Any) -> LowRankUpdate | None:
    """Return the low-rank update that a posterior belongs to, or None."""
    return getattr(posterior, "update", None)


def _origins(layer: Any, value: Callable[[VariationalWeight], Any]) -> dict[int, tuple[Callable[[], Any], Any]]:
    """Return the values that replace the weights with a posterior in a twin made of Keras's own layers.

    Args:
        layer: A model or layer.
        value: Function from a `VariationalWeight` to the tensor that replaces it.

    Returns:
        Dict from the id of a variable (`loc`, or the weight that has a low-rank update) to a pair: a function that
        returns the value to copy, and the variable whose `trainable` flag the target takes over.
    """
    found = {}
    for weight in posteriors(layer):
        if not isinstance(weight, VariationalWeight):
            continue
        if weight.update is None:
            found[id(weight.loc)] = (lambda one=weight: value(one)), weight.loc
        else:
            found[id(weight.update.kernel)] = (lambda one=weight: one.update.whole(value(one))), weight.loc
    return found


def array(variable: Any) -> np.ndarray:
    """Return the values of a variable or tensor as a copy: JAX may donate the buffer of a variable."""
    return np.array(to_numpy(variable))


def carry_over(
    model: keras.Model,
    twin: keras.Model,
    made: Mapping[int, Any],
    value: Callable[[VariationalWeight], Any] | None = None,
) -> list[Posterior]:
    """Copy weights, states and `trainable` flags from a model to a twin in which some layers have other classes.

    Args:
        model: The model.
        twin: The twin.
        made: Dict from the ids of the model's layers to the layers of the twin, as `graph_copy` returns it.
        value: Function from a `VariationalWeight` of the model to the tensor that replaces it in a twin without
            posteriors; None if the twin keeps the posteriors of the model.

    Returns:
        List of the posteriors of the twin that the model does not have.

    Raises:
        ValueError: If the weights of the twin do not match those of the model.
    """
    origins = {} if value is None else _origins(model, value)
    pairs = list(_pairs(model, twin, made))
    for old, new in pairs:
        new.trainable = old.trainable  # sets all sublayers too, which come later in `pairs`
    fresh = []
    for old, new in pairs:
        if _is_alike(old, new):
            _assign(old, _own_variables(old), _own_variables(new))
            _keep_kl_weight(old, new)
            continue
        fresh += posteriors(new)
        if not _is_wrapped(old, new):  # the layer in the wrapper is a pair of its own
            _assign(old, _by_name(stock_weights(old)), _by_name(stock_weights(new)), origins)
            _assign(old, _recurrent_states(old), _recurrent_states(new))
    _check_shared(model, twin)
    for posterior in fresh:
        if (update := _update(posterior)) is not None:
            update.kernel.trainable = False
        elif isinstance(posterior, VariationalWeight) and not posterior.loc.trainable:
            posterior.log_variance.trainable = False
    return fresh


def _pairs(old: Any, new: Any, made: Mapping[int, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield pairs of a layer and its twin, outer layers first; sublayers only if both have the same parts."""
    yield old, new
    for pair in _within(old, new, made):
        yield from _pairs(*pair, made)


def _within(old: Any, new: Any, made: Mapping[int, Any]) -> list[tuple[Any, Any]]:
    if _is_wrapped(old, new):
        return [(old, new.layer)]
    if id(old) in made and is_graph(old):
        # A subclass of `Functional` may hold its layers in another order than the graph.
        return [(layer, made[id(layer)]) for layer in old.layers if id(layer) in made]
    if not _is_alike(old, new):
        return []
    inside = children(old), children(new)
    if len(inside[0]) != len(inside[1]):
        raise ValueError(
            f"{old.name!r}, a {type(old).__name__}, has {len(inside[1])} sublayers when recreated from its config, not "
            f"{len(inside[0])}. List all sublayers in the config, or create them in the constructor."
        )
    return list(zip(*inside))


def _is_alike(old: Any, new: Any) -> bool:
    """Return whether a layer and its twin have the same parts: both are of one class, or both are graphs."""
    return type(new) is type(old) or (is_graph(old) and is_graph(new))


def _is_wrapped(old: Any, new: Any) -> bool:
    return isinstance(new, Variational) and not isinstance(old, Variational)


def _own_variables(layer: Any) -> list[Any]:
    """Return the variables of a layer without those of its sublayers, but with the states of its seed generators."""
    within = {id(variable) for each in children(layer) for variable in each.variables}
    return [variable for variable in layer.variables if id(variable) not in within]


def _recurrent_states(layer: Any) -> list[Any]:
    """Return the states that a stateful recurrent layer keeps from one batch to the next."""
    kept = isinstance(layer, keras.layers.RNN) and layer.stateful and layer.states is not None
    return keras.tree.flatten(layer.states) if kept else []


def _by_name(variables: Iterable[Any]) -> list[Any]:
    """Sort variables by name: the order in a layer depends on which are frozen, and that may differ between twins."""
    return sorted(variables, key=lambda variable: variable.name.removesuffix("_loc"))


def _assign(
    layer: Any,
    sources: Sequence[Any],
    targets: Sequence[Any],
    origins: Mapping[int, tuple[Callable[[], Any], Any]] = MappingProxyType({}),
) -> None:
    """Copy values (or their replacements in `origins`) and `trainable` flags from `sources` to `targets`."""
    shapes, expected = ([tuple(each.shape) for each in variables] for variables in (targets, sources))
    if shapes != expected:
        raise ValueError(
            f"{layer.name!r}, a {type(layer).__name__}, has different weights when recreated from its config. "
            f"Expected the shapes {expected}. Received: {shapes}"
        )
    for source, target in zip(sources, targets):
        value, variable = origins.get(id(source), (lambda one=source: one, source))
        target.assign(array(value()))
        target.trainable = variable.trainable


def _check_shared(model: keras.Model, twin: keras.Model) -> None:
    """Raise a `ValueError` if the twin has separate copies of weights that the model shares."""
    sizes = [sum(math.prod(each.shape) for each in stock_weights(each_model)) for each_model in (model, twin)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"In {model.name!r}, a layer within a wrapper is also used outside it or in another wrapper. Keras would "
            "recreate it as several separate layers. Put the shared layers into a model, and do not wrap any of them."
        )


def _keep_kl_weight(old: Any, new: Any) -> None:
    """Mark the KL weight of the new layer as set if that of the old one is set, for example by a callback."""
    if isinstance(old, StochasticLayer) and old._kl_weight is not None and not is_unset(old):
        new.kl_weight = float(array(old.kl_weight))


def compile_as(model: keras.Model, twin: keras.Model) -> str | None:
    """Compile a twin as its model was compiled, with a new optimizer of the same arguments and copies of the metrics.

    Returns:
        None, or the reason why the twin could not be compiled.
    """
    if not model.compiled:
        return None
    given = getattr(getattr(model, "_compile_config", None), "config", None)
    if given is None:
        return f"{type(model).__name__} overrides `compile`"
    try:
        optimizer = _again(model.optimizer)
        metrics = {name: _copied_metrics(given[name]) for name in ("metrics", "weighted_metrics")}
        scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        twin.compile(**{**given, **metrics, "optimizer": optimizer, "auto_scale_loss": scaled})
    except Exception as error:  # the config of a user's class may fail with any exception
        return f"its optimizer or metrics cannot be copied ({type(error).__name__}: {error})"
    return None


def _again(thing: Any) -> Any:
    return None if thing is None else type(thing).from_config(thing.get_config())


def _copied_metrics(value: Any) -> Any:
    """Copy the `metrics` argument of `compile`; only `Metric` objects, which have a state, become new objects."""
    if isinstance(value, dict):
        return {name: _copied_metrics(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copied_metrics(each) for each in value]
    return _again(value) if isinstance(value, keras.metrics.Metric) else value
