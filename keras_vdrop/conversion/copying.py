"""What a copy of a model is given of it: weights, states, what is frozen, and what it was compiled with."""

import math
from types import MappingProxyType

import keras
import numpy as np
from keras import ops

from keras_vdrop.conversion.graphs import children, is_graph
from keras_vdrop.layers import Variational, VariationalGaussianDropout
from keras_vdrop.layers.base import StochasticLayer, is_unset
from keras_vdrop.posterior import VariationalWeight, posteriors


def stock_weights(layer):
    """The weights of a model or layer that Keras's own layers have too: of a posterior its mean, of noise nothing, and
    of a low-rank update the weight that it is of."""
    ours_alone = set()
    for posterior in posteriors(layer):
        owner = posterior.owner
        ours_alone.update(map(id, (owner.kl_weight, owner.free_bits, *posterior.variables)))
        if _update(posterior) is not None:
            ours_alone.add(id(posterior.update.b))
        elif isinstance(posterior, VariationalWeight) and not isinstance(owner, VariationalGaussianDropout):
            ours_alone.discard(id(posterior.loc))
    return [variable for variable in layer.weights if id(variable) not in ours_alone]


def _update(posterior):
    """The low-rank update that a posterior is a part of, or None."""
    return getattr(posterior, "update", None)


def _origins(layer, value):
    """What stands in the places of variables that layers of Keras's do not have.

    Args:
        layer: A model or layer.
        value: Function from a `VariationalWeight` to what stands for it, a tensor.

    Returns:
        Dict from the id of a variable to a function that gives its place a value, and the variable that tells whether
        it is frozen.
    """
    found = {}
    for posterior in posteriors(layer):
        if _update(posterior) is not None:
            found[id(posterior.update.kernel)] = (lambda one=posterior: one.update.whole(value(one))), posterior.loc
        elif isinstance(posterior, VariationalWeight):
            found[id(posterior.loc)] = (lambda one=posterior: value(one)), posterior.loc
    return found


def array(variable):
    """The values of a variable or tensor: a copy, because JAX gives away what a variable holds."""
    return np.array(ops.convert_to_numpy(variable))


def carry_over(model, twin, made, value=None):
    """Give a twin, in which some layers are of other classes, the weights of the model, its states and what is frozen.

    Args:
        model: The model.
        twin: The twin.
        made: Dict from ids of layers of the model to those of the twin, as `graph_copy` returns it.
        value: Function from a `VariationalWeight` of the model to what its place is given where it has none.

    Returns:
        List of the posteriors that the model does not have.

    Raises:
        ValueError: Where the twin has other weights.
    """
    origins = {} if value is None else _origins(model, value)
    pairs = list(_pairs(model, twin, made))
    for old, new in pairs:
        new.trainable = old.trainable  # and so is all within it, until its own turn
    fresh = []
    for old, new in pairs:
        if _is_alike(old, new):
            _assign(old, _own_variables(old), _own_variables(new))
            _keep_kl_weight(old, new)
            continue
        fresh += posteriors(new)
        if not _is_wrapped(old, new):  # whose layer is in another pair
            _assign(old, _by_name(stock_weights(old)), _by_name(stock_weights(new)), origins)
            _assign(old, _recurrent_states(old), _recurrent_states(new))
    _check_shared(model, twin)
    for posterior in fresh:
        if _update(posterior) is not None:
            posterior.update.kernel.trainable = False
        elif isinstance(posterior, VariationalWeight) and not posterior.loc.trainable:
            posterior.log_variance.trainable = False
    return fresh


def _pairs(old, new, made):
    """Every layer of a model with that of its twin, after those that it is in; within layers of one class alone."""
    yield old, new
    for pair in _within(old, new, made):
        yield from _pairs(*pair, made)


def _within(old, new, made):
    if _is_wrapped(old, new):
        return [(old, new.layer)]
    if id(old) in made and is_graph(old):
        # A class of models may hold its layers in another order than that of the graph.
        return [(layer, made[id(layer)]) for layer in old.layers if id(layer) in made]
    if not _is_alike(old, new):
        return []
    inside = children(old), children(new)
    if len(inside[0]) != len(inside[1]):
        raise ValueError(
            f"{old.name!r}, a {type(old).__name__}, has {len(inside[1])} layers when it is made again from its config, "
            f"in place of {len(inside[0])}: let its config name all of them, or its constructor make them."
        )
    return list(zip(*inside))


def _is_alike(old, new):
    """Whether the twin of a layer has the same parts."""
    return type(new) is type(old) or (is_graph(old) and is_graph(new))


def _is_wrapped(old, new):
    return isinstance(new, Variational) and not isinstance(old, Variational)


def _own_variables(layer):
    """The variables of a layer that are not of the layers within it; the states of generators among them."""
    within = {id(variable) for each in children(layer) for variable in each.variables}
    return [variable for variable in layer.variables if id(variable) not in within]


def _recurrent_states(layer):
    """What a recurrent layer keeps from one batch to the next."""
    kept = isinstance(layer, keras.layers.RNN) and layer.stateful and layer.states is not None
    return keras.tree.flatten(layer.states) if kept else []


def _by_name(variables):
    """The order in which a layer of ours has the variables of Keras's, though some are frozen in only one of them."""
    return sorted(variables, key=lambda variable: variable.name.removesuffix("_loc"))


def _assign(layer, sources, targets, origins=MappingProxyType({})):
    """Give variables the values of others, or what stands for those, and freeze those whose others are frozen."""
    shapes, expected = ([tuple(each.shape) for each in variables] for variables in (targets, sources))
    if shapes != expected:
        raise ValueError(
            f"{layer.name!r}, a {type(layer).__name__}, has other weights when it is made again from its config: "
            f"expected the shapes {expected}. Received: {shapes}"
        )
    for source, target in zip(sources, targets):
        value, variable = origins.get(id(source), (lambda one=source: one, source))
        target.assign(array(value()))
        target.trainable = variable.trainable


def _check_shared(model, twin):
    """Raise a `ValueError` where the twin has two of what is one in the model."""
    sizes = [sum(math.prod(each.shape) for each in stock_weights(each_model)) for each_model in (model, twin)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"In {model.name!r}, a layer within a wrapper is used outside of it too, or in another one. Of these Keras "
            "makes separate layers when they are made again: put what is shared into a model, and wrap nothing of it."
        )


def _keep_kl_weight(old, new):
    """Let a layer know that its KL weight has been set, by a callback, if that is so."""
    if isinstance(old, StochasticLayer) and old._kl_weight is not None and not is_unset(old):
        new.kl_weight = float(array(old.kl_weight))


def compile_as(model, twin):
    """Compile a twin with what a model was compiled with: an optimizer of the same arguments, and copies of metrics.

    Returns:
        None, or the reason why it cannot be done.
    """
    if not model.compiled:
        return None
    given = getattr(getattr(model, "_compile_config", None), "config", None)
    if given is None:
        return f"{type(model).__name__} has a `compile` of its own"
    try:
        optimizer = _again(model.optimizer)
        metrics = {name: _copied_metrics(given[name]) for name in ("metrics", "weighted_metrics")}
        scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        twin.compile(**{**given, **metrics, "optimizer": optimizer, "auto_scale_loss": scaled})
    except Exception as error:  # of a class of the user's own, whose config may fail in any way
        return f"of its optimizer or metrics there is no copy ({type(error).__name__}: {error})"
    return None


def _again(thing):
    return None if thing is None else type(thing).from_config(thing.get_config())


def _copied_metrics(value):
    """What `compile` takes as metrics, with copies of those that have a state."""
    if isinstance(value, dict):
        return {name: _copied_metrics(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copied_metrics(each) for each in value]
    return _again(value) if isinstance(value, keras.metrics.Metric) else value
